"""Videos and images as a viewer shows them -> uint8 arrays.

    clip = open_clip({"path": "a.mp4", "start": 2.0, "end": 7.5}, frames=8)
    clip.pixels, clip.seconds
    image = load_image("b.png")

Time is the container's: it begins with the first frame that a player shows, and the frames that lie
in a window are those whose timestamps do, however far apart they are. Frame i is the i-th frame in
the order of display; frames that an edit list hides do not count.

PyAV decodes. The timestamps of all packets, read without decoding, say which frames to decode. In
mp4 and Matroska files the decoder jumps to the keyframe before each; other containers do not jump
reliably and are decoded from their beginning. Either way, frames that come out are compared with
what the packets promised, and where the two differ the whole file is decoded and its frames count.

Every error names its file. Legend: F frames, H height, W width, n frames of a whole clip.
"""

import bisect
import dataclasses
import itertools
import os
import re
import sys
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"}
FOLDER_FPS = 8  # frame rate of a folder of frames that names none
FALLBACK_RATE = 25  # frames per second of a file that states no rate, as FFmpeg has it

# Containers in which a keyframe can be found again by its timestamp, by FFmpeg's names.
SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
SKIP = 8  # frames that are rather decoded than jumped over
# FFmpeg draws text files as pictures, and follows playlists into other folders.
NO_VIDEO = {"tty", "bin", "xbin", "adf", "idf", "hls", "concat", "dash"}

# Timestamps, and the times that users give, are often whole milliseconds: off by half of one.
ROUNDING = 5e-4
MISPLACED = 1.0  # seconds by which a timestamp may be out of order
LOST = 0.1  # a clip with a larger share of frames that do not decode is refused


class MediaError(ValueError):
    """A media file that cannot be used; the message names it."""


def sample_indices(n, frames):
    """Return UVRB's uniform frame indices of a clip of n frames, (frames,) int64.

    linspace(0, n-1, frames).round(): a shorter clip repeats some. Raises ValueError for an odd or
    too small number of frames.
    """
    if frames < 2 or frames % 2:
        raise ValueError(
            f"frames must be even and at least 2 (Qwen2.5-VL merges frames in pairs), got {frames}"
        )
    return np.linspace(0, n - 1, frames).round().astype(np.int64)


def check_numbers(spec, path):
    """Check a medium's numbers, in seconds or frames per second; None stands for an absent one.

    spec: a dict with any of start, end, time and fps. Raises MediaError that names path and key.
    """
    for key in ("start", "end", "time", "fps"):
        value = spec.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MediaError(f"{path}: {key} must be a number, got {value!r}")
        # A NaN is not at least 0, and JSON may hold integers that no float can.
        if not 0 <= value <= sys.float_info.max:
            raise MediaError(f"{path}: {key} must be finite and not negative, got {value}")

    if spec.get("fps") == 0:
        raise MediaError(f"{path}: fps must be above 0, got 0")
    start = spec.get("start") or 0
    end = spec.get("end")
    if end is not None and end <= start:
        raise MediaError(f"{path}: end {end} must come after start {start}")


# Time


@dataclasses.dataclass
class Timeline:
    """When the frames of a clip are on display."""

    times: np.ndarray  # (n,) float64: seconds from the first frame, in order
    seconds: float  # from the first frame to the last one's end
    rate: float | None  # frames per second; None: variable

    def __len__(self):
        return len(self.times)

    def frame_at(self, time):
        """Return the index of the frame that is on display at `time` seconds."""
        return int(np.searchsorted(self.times, time + ROUNDING, side="right")) - 1

    def window(self, start, end):
        """Return the frames of a window -> (first, stop, seconds that they are on display).

        start, end: seconds; end None: to the clip's end. The first frame is on display at start,
        the others begin in the window.
        """
        first = self.frame_at(start)
        if end is None or end >= self.seconds:
            end = self.seconds
            stop = len(self)
        else:
            stop = int(np.searchsorted(self.times, end - ROUNDING, side="left"))
            stop = max(first + 1, stop)

        # At a constant rate whole frames count, as in UVRB. At a variable rate the frame at start
        # may have stood there for a minute, and its part before the window does not count.
        if self.rate:
            return first, stop, (stop - first) / self.rate
        return first, stop, float(end - start)


def make_timeline(stamps, tick, last, rates):
    """Turn the timestamps of frames in the order of display into a Timeline.

    stamps: n ints, in ticks; None where unknown. tick: seconds. last: ticks that the last frame is
    shown; 0: unknown. rates: frame rates (1/s) that the container states; where the timestamps
    follow one of them, it is taken as exact.
    """
    n = len(stamps)
    constant = Timeline(np.arange(n) / rates[0], n / rates[0], rates[0])
    if None in stamps:
        return constant

    # AVI and MPEG-PS hold few timestamps of presentation; FFmpeg guesses the others, and frames get
    # each other's. One that is seconds away from its place starts a new count, as broadcasts do.
    stamps = np.array(stamps, np.float64) * tick
    ordered = np.sort(stamps)
    if np.abs(ordered - stamps).max() > MISPLACED:
        return constant
    times = ordered - ordered[0]
    misplaced = (np.diff(stamps) <= 0).any()
    if misplaced and abs(times[-1] - constant.times[-1]) < 1 / rates[0]:
        return constant

    tolerance = min(tick, 3 * ROUNDING) + 1e-9
    for rate in rates:
        even = np.arange(n) / rate
        follows = np.abs(times - even).max() <= tolerance
        if follows and (last <= 0 or abs(last * tick - 1 / rate) <= tolerance):
            return Timeline(even, n / rate, rate)

    if last > 0:
        shown = last * tick
    else:
        shown = float(np.median(np.diff(times))) if n > 1 else 1 / rates[0]
    return Timeline(times, float(times[-1]) + shown, None)


# Videos


@dataclasses.dataclass
class Promise:
    """What a file's packets say about its frames, without decoding any."""

    stamps: list  # of the frames shown, in the order of display; None where unknown
    keys: list  # (presentation, decoding) timestamps of the keyframes, in order
    last: int  # ticks that the last frame is shown; 0: unknown
    tick: float  # seconds
    rates: list  # frame rates that the container states
    missing: int  # frames that the header names and the file does not hold
    seekable: bool

    def timeline(self):
        return make_timeline(self.stamps, self.tick, self.last, self.rates)


@dataclasses.dataclass
class Frames:
    """Frames that were read from a file."""

    pictures: list  # one for each of `indices`
    indices: list  # the frames that were chosen
    timeline: Timeline
    decoder: str  # "seek": from keyframe to keyframe, "pass": all of the file
    note: str  # what is wrong with a file that gave only a part of its frames; else empty


class BrokenPromiseError(Exception):
    """A decoder's frames are not those that the packets promised."""


def unreadable(path, reason):
    """Make the MediaError of a file that cannot be read as a video."""
    with open(path, "rb") as file:
        is_mp4 = file.read(12)[4:8] == b"ftyp"
    if is_mp4:
        reason += "; the index of an mp4 file, often at its end, may be cut off or damaged"
    return MediaError(f"{path}: not a readable video ({reason})")


def open_video(path):
    """Open a video file -> (container, its video stream, one thread). Raises MediaError."""
    import av  # here: programs that read no videos need no PyAV

    # Without "file:" FFmpeg takes the part of a name before a colon for a protocol.
    file = av.open(f"file:{path}", metadata_errors="ignore")
    stream = file.streams.best("video")  # the film, not its cover
    if stream is None or file.format.name in NO_VIDEO:
        file.close()
        raise unreadable(path, "no video in it")
    if stream.codec_context is None:
        file.close()
        raise unreadable(path, "no decoder for its video")
    # One: the processes that decode share the cores among them.
    stream.codec_context.thread_count = 1
    stream.codec_context.thread_type = "NONE"
    return file, stream


def read_packets(file, stream):
    """Yield a stream's packets from where the file stands, and then None.

    A file that ends in the middle of a packet ends before it.
    """
    import av

    while True:
        try:
            for packet in file.demux(stream):
                if packet.size:
                    yield packet
        except IndexError:
            continue  # PyAV stumbles over the first packet of a stream that begins late
        except av.FFmpegError:
            pass
        yield None
        return


def scan_packets(file, stream):
    """Read a file's packets without decoding them -> Promise."""
    shown = []
    keys = []
    total = 0
    for packet in read_packets(file, stream):
        if packet is None:
            break
        total += 1
        stamp = packet.dts if packet.pts is None else packet.pts
        if packet.is_keyframe and packet.pts is not None:
            keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        # An edit list hides frames: they are decoded, since others refer to them, and not shown.
        if not packet.is_discard:
            shown.append((stamp, packet.duration or 0, packet.pts is not None))

    if not shown:
        raise unreadable(file.name.removeprefix("file:"), "no frames in it")
    stated = (stream.average_rate, stream.guessed_rate)
    rates = [float(rate) for rate in stated if rate] or [FALLBACK_RATE]

    stamps = [stamp for stamp, _, _ in shown]
    last = 0
    if None not in stamps:
        stamps.sort()
        last = max(shown)[1]
    certain = all(is_pts for _, _, is_pts in shown) and len(set(stamps)) == len(stamps)
    return Promise(
        stamps=stamps,
        keys=sorted(keys),
        last=last,
        tick=float(stream.time_base),
        rates=rates,
        missing=count_missing(file, stream, total),
        seekable=certain and file.format.name in SEEKABLE and bool(keys),
    )


def count_missing(file, stream, total):
    """Return the number of frames that the header names beside the `total` that are there."""
    # Other containers count pauses as frames, or nothing.
    if not file.format.name.startswith("mov"):
        return 0
    # Not stream.frames, which also counts the frames that an edit list takes out altogether.
    named = len(stream.index_entries)
    # A header that names ten times as many frames is damaged itself.
    return max(0, named - total) if named <= 10 * total else 0


def read_frames(path, choose, keep=None):
    """Decode some frames of a video file -> Frames, in the order of their indices.

    choose: function of the clip's Timeline that returns the indices (F,) of the frames, increasing
    and perhaps with repeats. keep: what to make of each frame, uint8 (H, W, 3), as soon as it is
    decoded; no other frames stay in memory.
    Raises FileNotFoundError, or MediaError that names the file.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such video file")
    import av

    try:
        return read_open_frames(path, choose, keep)
    except av.FFmpegError as error:
        raise unreadable(path, error.strerror or type(error).__name__) from error


def read_open_frames(path, choose, keep):
    """Do the work of read_frames, from keyframe to keyframe or in a whole pass."""
    import av

    file, stream = open_video(path)
    with file:
        promise = scan_packets(file, stream)
        timeline = promise.timeline()
        indices = [int(i) for i in choose(timeline)]
        if promise.seekable:
            picture = Picture(stream, keep)
            try:
                kept = decode_by_seeking(file, stream, promise, indices, picture)
            except (BrokenPromiseError, av.FFmpegError):
                pass  # a whole pass tells what can be decoded
            else:
                n = len(timeline)
                note = describe_loss(path, n, n + promise.missing)
                return Frames([kept[i] for i in indices], indices, timeline, "seek", note)

    kept, decoded = decode_all(path, promise, indices, keep)
    if decoded.stamps is not None:
        timeline = make_timeline(decoded.stamps, promise.tick, decoded.last, promise.rates)
        indices = [int(i) for i in choose(timeline)]
        if not kept.keys() >= set(indices):
            kept, _ = decode_all(path, promise, indices, keep)
    # Some containers hold packets without a frame: no loss where all of them decode.
    n = len(timeline)
    lost = len(promise.stamps) - n if decoded.errors else 0
    note = describe_loss(path, n, n + max(lost, 0) + promise.missing)
    return Frames([kept[i] for i in indices], indices, timeline, "pass", note)


def decode_by_seeking(file, stream, promise, indices, picture):
    """Decode frames, jumping to the keyframe before each -> {index: picture}.

    Raises BrokenPromiseError where a frame comes out that the packets did not promise next.
    """
    key_stamps = [pts for pts, _ in promise.keys]
    kept = {}
    frames = None
    last = -1  # index of the last decoded frame
    for i in sorted(set(indices)):
        k = bisect.bisect_right(key_stamps, promise.stamps[i]) - 1
        if k < 0:
            raise BrokenPromiseError
        first = bisect.bisect_left(promise.stamps, key_stamps[k])
        if frames is None or first > last + SKIP:
            frames = decode_from(file, stream, promise.keys[k], promise.stamps[first])
            last = first - 1

        while last < i:
            frame = next(frames, None)
            last += 1
            if frame is None or frame.pts != promise.stamps[last]:
                raise BrokenPromiseError
        kept[i] = picture(frame)
    return kept


def decode_from(file, stream, key, first):
    """Yield the frames from a keyframe on that are shown at the timestamp `first` or later."""
    # mp4 files are searched by decoding timestamps, Matroska by those of presentation.
    for target in key:
        file.seek(target, stream=stream)
        packets = read_packets(file, stream)
        begin = next(packets)
        if begin is not None and begin.pts == key[0]:
            break
    else:
        raise BrokenPromiseError

    # After a keyframe in an open group come frames that are shown before it and need the group
    # before.
    leading = True
    for packet in itertools.chain([begin], packets):
        for frame in stream.codec_context.decode(packet):
            leading = leading and frame.pts is not None and frame.pts < first
            if not leading:
                yield frame


def describe_loss(path, n, whole):
    """Say how many frames of a damaged file are left, "" where none are lost.

    Raises MediaError if too few are.
    """
    if n < (1 - LOST) * whole:
        raise MediaError(f"{path}: damaged: only {n} of {whole} frames decode")
    return f"{path}: damaged: {n} of {whole} frames decode" if n < whole else ""


@dataclasses.dataclass
class Decoded:
    """What a pass over a file gave."""

    stamps: list | None  # of the frames in the order of display; None: as promised
    last: int  # ticks that the last frame is shown; 0: unknown
    errors: int  # packets that do not decode


def decode_all(path, promise, indices, keep):
    """Decode a file from its beginning -> ({index: picture}, Decoded).

    It ends after the last wanted frame where all before it came as promised. Packets that do not
    decode are left out. Raises MediaError where that leaves no frames, or too few.
    """
    import av

    wanted = set(indices)
    most = max(indices)
    kept = {}
    stamps = []
    last = 0
    errors = 0
    as_promised = True

    file, stream = open_video(path)
    with file:
        picture = Picture(stream, keep)
        for packet in read_packets(file, stream):
            try:
                frames = stream.codec_context.decode(packet)  # None: those still held back
            except av.FFmpegError:
                errors += 1
                continue
            for frame in frames:
                i = len(stamps)
                if i in wanted:
                    kept[i] = picture(frame)
                stamps.append(frame.pts)
                last = frame.duration or 0
                as_promised = as_promised and promise.stamps[i : i + 1] == [frame.pts]
            if as_promised and len(stamps) > most:
                return kept, Decoded(None, 0, errors)

    n = len(promise.stamps)
    if errors and len(stamps) < (1 - LOST) * n or not stamps:
        # Here, since too few may also be too few for `indices`.
        raise MediaError(f"{path}: damaged: only {len(stamps)} of {n} frames decode")
    return kept, Decoded(stamps, last, errors)


class Picture:
    """Turn decoded frames into uint8 (H, W, 3) as a player shows them, all of the first one's size.

    Colours become RGB, transparency white, pixels square; the header's rotation is applied. A pixel
    that is wider than high widens the picture, one that is higher than wide heightens it.
    """

    def __init__(self, stream, keep):
        from av.video.reformatter import VideoReformatter

        self.reformatter = VideoReformatter()
        self.aspect = float(stream.sample_aspect_ratio or 1)
        # A hundredth comes from rounding in somebody's resizing, and a tenfold from a damaged file.
        if abs(self.aspect - 1) < 0.02 or not 0.1 < self.aspect < 10:
            self.aspect = 1.0
        self.keep = keep
        self.size = None
        self.matrix = None

    def __call__(self, frame):
        if self.size is None:
            width = round(frame.width * max(1.0, self.aspect))
            height = round(frame.height * max(1.0, 1 / self.aspect))
            self.size = (width, height)
            self.matrix = frame.side_data.get("DISPLAYMATRIX")

        transparent = any(component.is_alpha for component in frame.format.components)
        pixels = self.reformatter.reformat(
            frame,
            width=self.size[0],
            height=self.size[1],
            format="rgba" if transparent else "rgb24",
            threads=1,
        ).to_ndarray()
        if transparent:
            alpha = pixels[..., 3:] / 255
            pixels = (pixels[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)

        if self.matrix is not None:
            pixels = turn(pixels, np.frombuffer(bytes(self.matrix), np.int32))
        return self.keep(pixels) if self.keep else pixels


def turn(pixels, matrix):
    """Apply a display matrix, (9,) ints, to a picture: quarter turns and mirrors only."""
    # A point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = matrix[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        mirrored_x, mirrored_y = a < 0, d < 0
    else:
        pixels = pixels.swapaxes(0, 1)
        mirrored_x, mirrored_y = c < 0, b < 0
    if mirrored_x:
        pixels = pixels[:, ::-1]
    if mirrored_y:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


@dataclasses.dataclass
class Clip:
    """Uniform frames of a video or of a window of it."""

    pixels: np.ndarray  # (F, H, W, 3) uint8
    times: np.ndarray  # (F,) float64: seconds from the first frame of the clip or window
    seconds: float  # length of the clip or window
    decoder: str  # "seek" or "pass" (Frames), or "folder"
    note: str  # a sentence on a damaged file that gave only a part of its frames; else empty


def open_clip(video, frames=8):
    """Decode uniform frames of a video -> Clip.

    video: the path of a file or of a folder of frames in numeric order, or a dict {"path", "start",
    "end", "fps"} with optional seconds and the frame rate of a folder (8). frames: F, even.
    Raises MediaError or FileNotFoundError, naming the file.
    """
    spec = video if isinstance(video, dict) else {"path": video}
    path = os.fspath(spec["path"])
    check_numbers(spec, path)
    start = spec.get("start") or 0
    end = spec.get("end")

    def window(timeline):
        if start >= timeline.seconds:
            raise MediaError(
                f"{path}: start {start} does not lie in a clip of {timeline.seconds:.2f} s"
            )
        return timeline.window(start, end)

    def choose(timeline):
        first, stop, _ = window(timeline)
        return first + sample_indices(stop - first, frames)

    if os.path.isdir(path):
        names = list_frames(path)
        fps = spec.get("fps") or FOLDER_FPS
        timeline = Timeline(np.arange(len(names)) / fps, len(names) / fps, fps)
        pictures = [load_image(os.path.join(path, names[i])) for i in choose(timeline)]
        decoder = "folder"
        note = ""
    else:
        read = read_frames(path, choose)
        pictures = read.pictures
        timeline = read.timeline
        decoder = read.decoder
        note = read.note

    sizes = sorted({picture.shape[:2] for picture in pictures})
    if len(sizes) > 1:
        raise MediaError(f"{path}: frames of different sizes {sizes}")
    first, _, seconds = window(timeline)
    times = timeline.times[choose(timeline)] - timeline.times[first]
    return Clip(np.stack(pictures), times, seconds, decoder, note)


def load_video(video, frames=8):
    """Decode uniform frames of a video -> (uint8 (F, H, W, 3), seconds of the clip or window).

    Arguments and errors are open_clip's.
    """
    clip = open_clip(video, frames)
    return clip.pixels, clip.seconds


def list_frames(folder):
    """Return the names of the frames in a folder: frame2 comes before frame10.

    Hidden files do not count, such as the ._ files of archives that were made on a Mac.
    """
    names = []
    for name in os.listdir(folder):
        if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
            names.append(name)
    if not names:
        accepted = ", ".join(sorted(IMAGE_SUFFIXES))
        raise MediaError(f"{folder}: a folder without frames ({accepted})")

    def numeric(name):
        parts = re.split(r"(\d+)", name)  # texts and numbers in turn
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], name

    return sorted(names, key=numeric)


# Images


def load_image(image):
    """Decode an image as a viewer shows it -> uint8 (H, W, 3).

    image: a path, or {"video": path, "time": seconds} for the frame of a video that is on display
    at that time. Of an animated image, the first frame.
    Raises MediaError or FileNotFoundError, naming the file.
    """
    if isinstance(image, dict):
        path = os.fspath(image["video"])
        time = image["time"]
        check_numbers(image, path)

        def choose(timeline):
            if time > timeline.seconds:
                raise MediaError(
                    f"{path}: time {time} does not lie in a clip of {timeline.seconds:.2f} s"
                )
            return [timeline.frame_at(time)]

        return read_frames(path, choose).pictures[0]

    from PIL import Image

    if not os.path.isfile(image):
        raise FileNotFoundError(f"{image}: no such image file")
    try:
        with Image.open(image) as file:
            file.load()
            return np.asarray(to_rgb(set_upright(file)))
    # Pillow's readers raise whatever they meet in a damaged file: struct.error, KeyError, ...
    except Exception as error:
        raise MediaError(f"{image}: not a readable image ({error})") from error


def set_upright(image):
    """Turn an image as its EXIF orientation says."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    # The picture may be sound where its EXIF data is not. Viewers show it as it is stored.
    except Exception:
        return image


def to_rgb(image):
    """Turn an image of any mode into RGB, with transparent parts on white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(scale_to_8_bits(np.asarray(image))).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")

    if image.mode == "La":  # Pillow knows no direct way from here to RGBA
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def scale_to_8_bits(values):
    """Scale a deep grey image (H, W) of ints or floats to uint8.

    Integers that fit 16 bits by those bits' whole range, since Pillow keeps 16 bits in 32 at times;
    floats in 0..1 by 255, and those in 0..255 not at all. All others from their least value to
    their greatest. What is not finite is black.
    """
    whole = values.dtype.kind in "iu"
    values = np.nan_to_num(values.astype(np.float64), nan=0, posinf=0, neginf=0)
    least = values.min()
    most = values.max()

    if whole and 0 <= least and most <= 65535:
        least, most = 0, 65535
    elif not whole and 0 <= least and most <= 1:
        least, most = 0, 1
    elif not whole and 0 <= least and most <= 255:
        least, most = 0, 255
    return ((values - least) * (255 / max(most - least, 1e-12))).round().astype(np.uint8)
