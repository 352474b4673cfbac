"""support/media.py: the right frames at the right times from whatever container, codec and cut.

    python tests/test_media.py          the whole matrix, 4 minutes: cells tried and right

Each frame of the test videos shows its own number. The truth is a plain decode of the whole file by
PyAV, frame after frame, and where the file is whole also the numbers and times that were written.
"""

import collections
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
from PIL import Image, ImageOps

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


if __name__ == "__main__":
    tried, wrong = run_matrix(all_kinds())
    print("\n".join(wrong))
    print(f"{tried} cells tried, {tried - len(wrong)} right")
    sys.exit(bool(wrong))
