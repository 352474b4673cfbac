"""support/media.py: the right frames at the right times from whatever container, codec and cut.

    python tests/test_media.py          the whole matrix, 4 minutes: cells tried and right

Each frame of the test videos shows its own number. The truth is a plain decode of the whole file by
PyAV, frame after frame, and where the file is whole also the numbers and times that were written.
"""

import dataclasses
import itertools
import math
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the command above

from support.media import (  # noqa: E402
    MediaError,
    load_image,
    load_video,
    make_timeline,
    open_clip,
    read_frames,
    sample_indices,
)

# The matrix

HEIGHT, WIDTH = 96, 128
FRAMES = 48
RATE = 25
OFFSET = 5.0  # seconds by which timestamps are moved
CUT = 19  # the first frame that a cut shows

# Options of the fastest settings; pixel formats other than yuv420p.
CODECS = {
    "libx264": {"preset": "ultrafast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libsvtav1": {"preset": "12"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "prores_ks": {},
}
FORMATS = {
    "mjpeg": "yuvj420p",
    "prores_ks": "yuv422p10le",
    "png": "rgb24",
    "qtrle": "rgb24",
    "huffyuv": "yuv422p",
    "gif": "rgb8",
}
HELD = {
    "mp4": ["libx264", "libx265", "libsvtav1", "libvpx-vp9", "mpeg4", "mpeg2video", "mjpeg"],
    "mov": ["libx264", "libx265", "mpeg4", "mjpeg", "prores_ks", "png", "qtrle"],
    "mkv": ["libx264", "libx265", "libsvtav1", "libvpx", "libvpx-vp9", "mpeg4", "mpeg2video"],
    "webm": ["libvpx", "libvpx-vp9", "libsvtav1"],
    "avi": ["libx264", "mpeg4", "msmpeg4", "mpeg2video", "mjpeg", "huffyuv"],
    "ts": ["libx264", "libx265", "mpeg2video", "mpeg4"],
    "mpg": ["mpeg1video", "mpeg2video"],
    "flv": ["libx264", "flv"],
    "gif": ["gif"],
    "wmv": ["wmv2"],
}
WITH_B_FRAMES = {"libx264", "libx265", "mpeg4", "mpeg2video", "mpeg1video"}
INTRA_ONLY = {"mjpeg", "prores_ks", "png", "qtrle", "huffyuv", "gif"}
TURNED = {"mp4", "mov", "mkv"}  # containers whose header may hold a rotation


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a video is written."""

    container: str
    codec: str
    variable: bool = False
    b_frames: int = 0
    distance: int = 12  # of keyframes


def all_kinds():
    """List every kind of file that can be written."""
    kinds = []
    for container, codecs in HELD.items():
        for codec, variable in itertools.product(codecs, (False, True)):
            distances = [1] if codec in INTRA_ONLY else [1, 12, 250]
            b_frames = [0, 2] if codec in WITH_B_FRAMES else [0]
            for b, distance in itertools.product(b_frames, distances):
                kinds.append(Kind(container, codec, variable, b, distance))
    return kinds


def picture(number):
    """A grey picture with the number in 12 black or white blocks."""
    image = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    for bit in range(12):
        y, x = divmod(bit, 4)
        level = 255 if number >> bit & 1 else 0
        image[32 * y + 4 : 32 * y + 28, 32 * x + 4 : 32 * x + 28] = level
    return image


def number_in(image):
    """Read the number that a picture shows."""
    number = 0
    for bit in range(12):
        y, x = divmod(bit, 4)
        block = image[32 * y + 8 : 32 * y + 24, 32 * x + 8 : 32 * x + 24]
        number |= int(block.mean() > 127) << bit
    return number


def ticks_of(variable, n=FRAMES):
    """When each frame is shown, in 1/RATE s: at every tick, or a slow second half and a stutter."""
    if not variable:
        return list(range(n))
    half = n // 2
    fast = [i + i // 7 for i in range(half)]
    return fast + [fast[-1] + 5 * (i + 1) for i in range(n - half)]


def write(path, kind, n=FRAMES, **container):
    """Write a video of n numbered frames."""
    options = dict(CODECS.get(kind.codec, {}))
    if kind.codec not in INTRA_ONLY:
        options["g"] = str(kind.distance)
    if kind.codec in WITH_B_FRAMES:
        options["bf"] = str(kind.b_frames)
    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(kind.codec, rate=RATE, options=options)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = FORMATS.get(kind.codec, "yuv420p")
        stream.codec_context.time_base = Fraction(1, RATE)
        for i, tick in enumerate(ticks_of(kind.variable, n)):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts = tick
            frame.time_base = Fraction(1, RATE)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def copy(source, path, shift=0.0, degrees=0):
    """Copy a video's packets, without decoding, so many seconds later and with a rotation."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        # opaque: its decoder's name, libdav1d, is no encoder's.
        target = new.add_stream_from_template(stream, opaque=stream.codec.name == "libdav1d")
        if degrees:
            target.set_display_rotation(degrees)
        moved = round(shift / stream.time_base)
        for packet in old.demux(stream):
            if packet.size == 0:
                continue
            packet.stream = target
            if packet.pts is not None:
                packet.pts += moved
            if packet.dts is not None:
                packet.dts += moved
            new.mux(packet)
    return path


# What is done to a file: seconds by which a copy's timestamps are moved, None: no copy.
TREATMENTS = {
    "whole": None,
    "window": None,
    "cut": -CUT / RATE,  # as `ffmpeg -ss T -c copy` does
    "offset": OFFSET,
    "negative": -0.5,
}


def truth_of(path):
    """Decode a file plainly -> ([number], [time], quarter turns counter-clockwise)."""
    numbers = []
    times = []
    with av.open(str(path)) as file:
        for frame in file.decode(video=0):
            turns = frame.rotation // 90 % 4
            pixels = frame.to_ndarray(format="rgb24")
            numbers.append(number_in(pixels))
            times.append(frame.time)
    return numbers, times, turns


def check_cell(path, kind, treatment, degrees):
    """Compare what load_video gives with the truth; return what is wrong, or "" if nothing is."""
    numbers, times, turns = truth_of(path)
    if degrees and not turns:
        return "the rotation was not written"
    times = np.array(times)
    if not (np.diff(times) > 0).all():
        # AVI and MPEG-PS store too little for FFmpeg to know which frame is shown when.
        times = np.sort(times) if kind.variable else np.arange(len(numbers)) / RATE
    times = times - times[0]

    spec = {"path": str(path)}
    first = 0
    stop = len(numbers)
    if treatment == "window":
        spec |= {"start": 0.3, "end": 1.1}
        first = int((times <= 0.3005).sum()) - 1
        stop = int((times < 1.0995).sum())
    wanted = [numbers[first + i] for i in sample_indices(stop - first, 8)]

    clip = open_clip(spec)
    upright = [np.rot90(frame, -turns) for frame in clip.pixels]
    found = [number_in(frame) for frame in upright if frame.shape == (HEIGHT, WIDTH, 3)]
    if found != wanted:
        return f"frames {found}, not {wanted}"

    # The last frame's own duration is not stored everywhere: between nothing and a long step.
    if treatment != "window":
        steps = np.diff(times)
        if not times[-1] < clip.seconds <= times[-1] + steps.max() + 0.002:
            return f"{clip.seconds} s, the last frame comes at {times[-1]}"
        even = steps.max() - steps.min() < 0.0021
        if even and abs(clip.seconds - len(times) * times[-1] / (len(times) - 1)) > 0.003:
            return f"{clip.seconds} s for {len(times)} frames until {times[-1]}"
    elif abs(clip.seconds - 0.8) > 0.0801:
        return f"window of {clip.seconds} s"
    return ""


def check_kind(kind, folder, rotations=(0, 90, 180, 270)):
    """Check all treatments and rotations of one kind -> {(treatment, rotation): what is wrong}."""
    source = write(folder / f"whole.{kind.container}", kind)
    numbers, times, _ = truth_of(source)
    assert numbers == list(range(FRAMES)), f"{kind}: written {numbers}"
    if kind.container not in ("avi", "mpg"):
        error = np.diff(times) - np.diff(ticks_of(kind.variable)) / RATE
        assert np.abs(error).max() < 0.0021, f"{kind}: written at {times}"

    results = {}
    for degrees in rotations:
        if degrees and kind.container not in TURNED:
            continue
        for treatment, shift in TREATMENTS.items():
            path = source
            if shift is not None or degrees:
                path = folder / f"{treatment}-{degrees}.{kind.container}"
                try:
                    copy(source, path, shift or 0.0, degrees)
                except (av.FFmpegError, OverflowError):
                    continue  # the container does not take such timestamps
            try:
                results[treatment, degrees] = check_cell(path, kind, treatment, degrees)
            except (MediaError, av.FFmpegError) as error:
                results[treatment, degrees] = f"{type(error).__name__}: {error}"
    return results


def run_matrix(kinds, rotations=(0, 90, 180, 270)):
    """Check kinds -> (cells tried, [a line for each wrong one])."""
    tried = 0
    wrong = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            results = check_kind(kind, Path(folder), rotations)
        tried += len(results)
        for cell, reason in results.items():
            if reason:
                wrong.append(f"{kind} {cell}: {reason}")
    return tried, wrong


USUAL = [
    Kind("mp4", "libx264", b_frames=2),
    Kind("mp4", "libx264", variable=True, distance=250),
    Kind("mp4", "libsvtav1"),
    Kind("mov", "prores_ks", variable=True, distance=1),
    Kind("mkv", "libx264", variable=True, b_frames=2),
    Kind("mkv", "libx265", b_frames=2),
    Kind("webm", "libvpx-vp9", variable=True),
    Kind("avi", "mpeg4", b_frames=2),
    Kind("avi", "libx264", b_frames=2),
    Kind("ts", "libx264", b_frames=2),
    Kind("ts", "mpeg2video", variable=True, b_frames=2),
    Kind("mpg", "mpeg2video", b_frames=2),
    Kind("flv", "libx264", variable=True),
    Kind("gif", "gif", variable=True),
    Kind("wmv", "wmv2"),
]


def test_frames_and_lengths_of_the_usual_files():
    tried, wrong = run_matrix(USUAL, rotations=(0, 90))
    assert tried > 90 and not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_frames_and_lengths_of_the_whole_matrix():
    tried, wrong = run_matrix(all_kinds())
    print(f"{tried} cells tried, {tried - len(wrong)} right")
    assert tried > 2000 and not wrong, "\n".join(wrong)


def write_noise(path, options):
    """Write 60 frames of moving noise, in which every wrong reference shows."""
    noise = (
        np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    )
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=RATE, options={"preset": "veryfast"} | options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(60):
            pixels = np.ascontiguousarray(noise[i : i + HEIGHT, i : i + WIDTH])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())


@pytest.mark.parametrize(
    "name, options, decoder",
    [
        ("open.mp4", {"bf": "3", "x264-params": "open-gop=1:keyint=20:scenecut=0"}, "seek"),
        ("open.mkv", {"bf": "3", "x264-params": "open-gop=1:keyint=20:scenecut=0"}, "seek"),
        # There are no keyframes to jump to but the first: the others are columns that wander.
        ("refresh.mp4", {"x264-params": "intra-refresh=1:keyint=20"}, "pass"),
        ("broadcast.ts", {"g": "20"}, "pass"),
    ],
)
def test_jumps_give_the_pixels_of_a_plain_decode(tmp_path, name, options, decoder):
    path = tmp_path / name
    write_noise(path, options)
    with av.open(str(path)) as file:
        truth = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    for indices in ([0, 29, 59], [44], [57, 58]):
        read = read_frames(path, lambda timeline, indices=indices: indices)
        assert read.decoder == decoder and len(read.timeline) == 60
        np.testing.assert_array_equal(read.pictures, [truth[i] for i in indices])


def test_a_cut_with_an_edit_list_needs_no_whole_pass(tmp_path):
    source = write(tmp_path / "whole.mp4", Kind("mp4", "libx264", b_frames=2))
    clip = open_clip(copy(source, tmp_path / "cut.mp4", -CUT / RATE))
    assert clip.decoder == "seek" and number_in(clip.pixels[0]) == CUT


# Time


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_windows_of_a_variable_rate_are_times(tmp_path, container):
    """A screen recording: 10 s at 30 frames a second, then 10 s at 3."""
    times = [round(1000 * i / 30) for i in range(300)]
    times += [10000 + round(1000 * i / 3) for i in range(30)]  # ms
    path = tmp_path / f"screen.{container}"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts = time
            frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())

    for start, end, first, stop in ((10, 20, 300, 330), (0, 10, 0, 300), (9, 11, 270, 303)):
        frames, seconds = load_video({"path": str(path), "start": start, "end": end})
        wanted = first + sample_indices(stop - first, 8)
        assert [number_in(frame) for frame in frames] == wanted.tolist()
        assert seconds == pytest.approx(end - start, abs=0.34)  # the last frame's own third
    assert load_video(str(path))[1] == pytest.approx(20, abs=0.34)

    # The frame on display, long after it came.
    for time, number in ((12.3, 306), (10.4, 301), (9.99, 299)):
        assert number_in(load_image({"video": str(path), "time": time})) == number


def test_a_slide_that_began_before_the_window_counts_from_its_start():
    line = make_timeline([0, 10, 11], 1.0, 4, [25.0])  # shown for 10, 1 and 4 s
    assert (line.seconds, line.rate) == (15.0, None)
    assert line.window(3, 4) == (0, 1, 1.0)
    assert line.window(9.5, 12) == (0, 3, 2.5)
    assert line.window(12, None) == (2, 3, 3.0)
    assert [line.frame_at(time) for time in (0, 9.9, 10, 10.9996, 15)] == [0, 0, 1, 2, 2]


def test_milliseconds_of_a_constant_rate_are_that_rate():
    rate = 30000 / 1001
    stamps = [round(1000 * i / rate) for i in range(100)]
    line = make_timeline(stamps, 0.001, 33, [rate])
    assert line.rate == rate and line.seconds == 100 / rate
    # A last frame that stays, as at the end of a screen recording.
    held = make_timeline(stamps, 0.001, 5000, [rate])
    assert held.seconds == pytest.approx(99 / rate + 5, abs=0.001)


def test_timestamps_that_start_anew_do_not_count():
    stamps = [*range(200), *range(200)]
    line = make_timeline(stamps, 0.04, 1, [25.0])
    assert line.seconds == 16.0 and line.rate == 25.0


# Damage


def test_a_file_cut_off_gives_what_decodes_and_says_so(tmp_path):
    options = {"movflags": "faststart"}  # the index comes first
    whole = write(tmp_path / "whole.mp4", Kind("mp4", "libx264"), 100, **options)
    content = whole.read_bytes()
    path = tmp_path / "part.mp4"
    path.write_bytes(content[: int(0.95 * len(content))])

    clip = open_clip(path)
    numbers = [number_in(frame) for frame in clip.pixels]
    n = numbers[-1] + 1
    assert 80 < n < 100 and numbers == sample_indices(n, 8).tolist()
    assert clip.seconds == n / RATE and clip.note == f"{path}: damaged: {n} of 100 frames decode"
    assert open_clip(whole).note == ""

    # The index comes last: nothing can be read.
    content = write(whole, Kind("mp4", "libx264"), 100).read_bytes()
    path.write_bytes(content[: int(0.95 * len(content))])
    with pytest.raises(MediaError, match="part.mp4.*index.*cut off"):
        open_clip(path)


@pytest.mark.parametrize(
    "container, codec", [("mp4", "libx264"), ("ts", "libx264"), ("avi", "mpeg4")]
)
def test_flipped_bits_give_eight_frames_or_one_error(tmp_path, container, codec):
    content = write(tmp_path / f"good.{container}", Kind(container, codec), 30).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / f"bad.{container}"
    for _ in range(30):
        flipped = bytearray(content)
        for place in rng.integers(0, len(content), 20):
            flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            clip = open_clip(path)
        except MediaError as error:
            assert path.name in str(error)
        else:
            assert len(clip.pixels) == 8 and clip.seconds > 0


def test_text_and_playlists_are_no_videos(tmp_path):
    """FFmpeg would draw the text, and read files outside the allowed folders."""
    write(tmp_path / "a.ts", Kind("ts", "libx264"))
    (tmp_path / "notes.txt").write_text("words\n" * 99)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:2,\na.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.ts\n")
    for name in ("notes.txt", "list.m3u8", "list.mp4"):
        with pytest.raises(MediaError, match=name):
            load_video(tmp_path / name)


@pytest.mark.parametrize("key, value", [("start", math.nan), ("end", math.inf), ("start", True)])
def test_numbers_that_are_no_times_name_file_and_key(tmp_path, key, value):
    path = str(write(tmp_path / "a.mp4", Kind("mp4", "libx264")))
    with pytest.raises(MediaError, match=f"a.mp4: {key} must be"):
        load_video({"path": path, key: value})
    with pytest.raises(MediaError, match="a.mp4: time must be"):
        load_image({"video": path, "time": value})
    # The clip's very end still shows the last frame.
    last = load_image({"video": path, "time": FRAMES / RATE})
    assert number_in(last) == FRAMES - 1


def test_names_with_colons_and_percent_signs_are_only_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "%03d.mp4", "50% off?.mp4"):
        write(tmp_path / "a.mp4", Kind("mp4", "libx264"), 2).rename(name)
        assert load_video(name, 2)[1] == 2 / RATE


# As a viewer shows it


def test_pixels_that_are_not_square_widen_or_heighten_the_picture(tmp_path):
    for aspect, shape in ((Fraction(3, 2), (96, 192)), (Fraction(2, 3), (144, 128))):
        path = tmp_path / "a.mp4"
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            stream.codec_context.sample_aspect_ratio = aspect
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture(5), format="rgb24")))
            file.mux(stream.encode())
        assert load_video(path, 2)[0].shape[1:3] == shape


@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)])
def test_mirrors_of_the_header_are_applied(tmp_path, matrix):
    """Each stored point (x, y) must come out at (ax + cy, bx + dy), up to a shift."""
    path = write(tmp_path / "a.mp4", Kind("mp4", "libx264"), 2)
    plain = load_video(path, 2)[0][0]
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    a, b, c, d = (65536 * value for value in matrix)
    entries = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4")
    content[place : place + 36] = entries.tobytes()
    path.write_bytes(content)

    shown = load_video(path, 2)[0][0]
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))  # (H, W)
    a, b, c, d = matrix
    to_x = a * x + c * y
    to_y = b * x + d * y
    expected = np.zeros_like(shown)
    expected[to_y - to_y.min(), to_x - to_x.min()] = plain
    np.testing.assert_array_equal(shown, expected)


def test_transparent_parts_of_a_video_lie_on_white(tmp_path):
    path = tmp_path / "a.mov"
    pixels = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    pixels[:, WIDTH // 2 :, 3] = 255  # the left half cannot be seen
    with av.open(str(path), "w") as file:
        stream = file.add_stream("png", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "rgba"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        file.mux(stream.encode())
    frame = load_video(path, 2)[0][0]
    assert (frame[:, : WIDTH // 2] == 255).all() and (frame[:, WIDTH // 2 :] == 0).all()


def test_frames_in_a_folder_come_in_numeric_order_without_hidden_files(tmp_path):
    for i in range(1, 17):
        Image.new("L", (32, 32), 10 * i).save(tmp_path / f"shot-{i}.png")
        (tmp_path / f"._shot-{i}.png").write_bytes(b"a Mac's notes")
    clip = open_clip(tmp_path)
    grey = (clip.pixels.mean((1, 2, 3)) / 10).round().astype(int)
    assert grey.tolist() == (1 + sample_indices(16, 8)).tolist()
    assert (clip.decoder, clip.seconds, clip.note) == ("folder", 2.0, "")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_images_stand_as_their_exif_data_say(tmp_path, orientation, suffix):
    """Exif 2.32, 4.6.4: where the stored first row and first column are shown."""
    stored = np.zeros((40, 60, 3), np.uint8)
    stored[:20] = (255, 0, 0)  # the first rows are red
    stored[:, :20, 2] = 255  # the first columns are blue
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path, exif=exif, quality=95)

    row, column = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    image = load_image(str(path)).astype(int)
    edges = {"top": image[:5], "bottom": image[-5:], "left": image[:, :5], "right": image[:, -5:]}
    assert image.shape == ((40, 60, 3) if orientation < 5 else (60, 40, 3))
    assert edges[row][..., 0].mean() > 200 and edges[column][..., 2].mean() > 200


def test_transparent_parts_of_an_image_lie_on_white(tmp_path):
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:4] = 255
    alpha[7] = 128
    black = np.zeros((8, 8, 4), np.uint8)
    black[..., 3] = alpha
    Image.fromarray(black).save(tmp_path / "rgba.png")
    Image.fromarray(black[..., [0, 3]]).save(tmp_path / "la.png")
    for name in ("rgba.png", "la.png"):
        levels = load_image(str(tmp_path / name))[:, 0, 0]
        assert levels.tolist() == [0, 0, 0, 0, 255, 255, 255, 127]

    palette = Image.fromarray((alpha == 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.save(tmp_path / "p.png", transparency=1)
    palette.save(tmp_path / "p.gif", transparency=1)
    for name in ("p.png", "p.gif"):
        levels = load_image(str(tmp_path / name))[:, 0, 0]
        assert levels.tolist() == [0, 0, 0, 0, 255, 255, 255, 0]


def test_deep_images_are_scaled(tmp_path):
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    wanted = np.arange(256).reshape(16, 16)
    deep = (ramp * 65535).round().astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "16.png")
    Image.fromarray(deep).save(tmp_path / "16.tiff")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "32.tiff")
    Image.fromarray(ramp).save(tmp_path / "unit.tiff")
    Image.fromarray(255 * ramp).save(tmp_path / "bytes.tiff")
    Image.fromarray(3000 * ramp - 1000).save(tmp_path / "heights.tiff")
    for name in ("16.png", "16.tiff", "32.tiff", "unit.tiff", "bytes.tiff", "heights.tiff"):
        image = load_image(str(tmp_path / name))
        error = np.abs(image - wanted[..., None].astype(int))
        assert image.shape == (16, 16, 3) and error.max() <= 1, f"{name}: {error.max()}"

    # 1000 of 65,535 is 3.9 of 255, also in an image without brighter parts.
    Image.fromarray(np.full((2, 2), 1000, np.uint16)).save(tmp_path / "dark.png")
    assert (load_image(str(tmp_path / "dark.png")) == 4).all()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about tags of TIFF files
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tiff", "gif", "bmp", "jp2"])
def test_damaged_images_of_every_format_raise_one_error(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture(77)).save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    errors = 0
    for trial in range(30):
        flipped = bytearray(content[: len(content) if trial % 2 else len(content) // 3])
        for place in rng.integers(0, min(len(flipped), 300), 5):
            flipped[place] = int(rng.integers(256))
        path.write_bytes(flipped)
        try:
            assert load_image(str(path)).dtype == np.uint8
        except MediaError as error:
            assert path.name in str(error)
            errors += 1
    assert errors > 0


if __name__ == "__main__":
    tried, wrong = run_matrix(all_kinds())
    print("\n".join(wrong))
    print(f"{tried} cells tried, {tried - len(wrong)} right")
    sys.exit(bool(wrong))
