"""Frames of a video at given indices, and images -> uint8 arrays.

    frames, seconds = load_video({"path": "a.mp4", "start": 2.0, "end": 7.5}, frames=8)
    image = load_image("b.png")

decord decodes videos; PyAV decodes those that decord cannot read (AV1, for instance). Every error
names its file. Legend: F frames, H height, W width, n frames of a whole clip.
"""

import dataclasses
import math
import os
import warnings
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
FOLDER_FPS = 8  # frame rate of a folder of frames that names none


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


def read_frames(path, choose):
    """Decode some frames of a video file -> uint8 (F, H, W, 3).

    choose: function of the clip's number of frames and frame rate (1/s) that returns the indices
    (F,) of the frames to decode, increasing and perhaps with repeats.
    Raises FileNotFoundError, or MediaError with the reasons of both decoders.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such video file")

    # Imported here: decord, imported before torch, can hang the workers of a DataLoader; and a
    # program that reads no videos needs neither decord nor PyAV.
    import decord

    try:
        reader = decord.VideoReader(path, num_threads=1)
        n = len(reader)
        fps = float(reader.get_avg_fps())
        if n > 0 and fps > 0:
            return reader.get_batch(choose(n, fps)).asnumpy()
        reason = f"{n} frames at {fps} fps"
    except (RuntimeError, decord.DECORDError, IndexError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[-1] if lines else type(error).__name__

    return read_frames_with_pyav(path, choose, reason)


def read_frames_with_pyav(path, choose, decord_reason):
    """Do the same with PyAV, which decodes the whole file twice: to count its frames, to keep some.

    decord_reason: why decord could not, for the message of MediaError.
    """
    import av

    try:
        # The number of frames in the file's header is often absent or wrong.
        with av.open(path) as file:
            fps = float(file.streams.video[0].average_rate or 0)
            n = sum(1 for _ in file.decode(video=0))
        if n == 0 or fps <= 0:
            raise MediaError(f"{path}: {n} frames at {fps} fps")

        indices = choose(n, fps).tolist()
        wanted = set(indices)
        kept = {}
        with av.open(path) as file:
            for i, frame in enumerate(file.decode(video=0)):
                if i in wanted:
                    kept[i] = frame.to_ndarray(format="rgb24")

        # Python shows a warning from one line of code once.
        message = "decord cannot read some videos (AV1, for instance); PyAV reads those"
        warnings.warn(message, stacklevel=2)
        return np.stack([kept[i] for i in indices])
    # UnicodeDecodeError: metadata that is not UTF-8; IndexError: no video stream;
    # KeyError: fewer frames than were counted.
    except (av.FFmpegError, UnicodeDecodeError, IndexError, KeyError) as error:
        raise MediaError(
            f"{path}: not a readable video (decord: {decord_reason}; PyAV: {error})"
        ) from error


@dataclasses.dataclass
class Window:
    """The part of a clip from `start` to `end` (seconds; None: to the clip's end)."""

    path: str  # for messages
    start: float
    end: float | None
    frames: int  # to sample from it
    seconds: float = 0.0  # its true length, known once the clip is open

    def choose(self, n, fps):
        """Return the indices of uniform frames inside the window, at least one frame long."""
        start, end = self.start, self.end
        if start < 0 or start * fps >= n or (end is not None and end <= start):
            raise MediaError(
                f"{self.path}: start {start} and end {end} do not lie in a clip of {n / fps:.2f} s"
            )
        first = int(start * fps)
        stop = n
        if end is not None:
            # The tolerance: in floating point 0.1 * 3 s * 10 fps is a little more than 3 frames.
            stop = min(n, max(first + 1, math.ceil(end * fps - 1e-6)))
        self.seconds = (stop - first) / fps
        return first + sample_indices(stop - first, self.frames)


def load_video(video, frames=8):
    """Decode uniform frames of a video -> (uint8 (F, H, W, 3), seconds of the clip or window).

    video: the path of a file or of a folder of frames in name order, or a dict {"path", "start",
    "end", "fps"} with optional seconds and the frame rate of a folder (8). frames: F, even.
    Raises MediaError or FileNotFoundError, naming the file.
    """
    spec = video if isinstance(video, dict) else {"path": video}
    path = str(spec["path"])
    window = Window(path, spec.get("start") or 0, spec.get("end"), frames)
    if not os.path.isdir(path):
        pixels = read_frames(path, window.choose)
        return pixels, window.seconds

    names = sorted(name for name in os.listdir(path) if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        accepted = ", ".join(sorted(IMAGE_SUFFIXES))
        raise MediaError(f"{path}: a folder without frames ({accepted})")
    indices = window.choose(len(names), spec.get("fps") or FOLDER_FPS)
    images = [load_image(os.path.join(path, names[i])) for i in indices]

    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise MediaError(f"{path}: frames of different sizes {sizes}")
    return np.stack(images), window.seconds


def load_image(image):
    """Decode an image -> uint8 (H, W, 3).

    image: a path, or {"video": path, "time": seconds} for a frame of a video.
    Raises MediaError or FileNotFoundError, naming the file.
    """
    if isinstance(image, dict):
        path = str(image["video"])
        time = image["time"]

        def choose(n, fps):
            if not 0 <= time <= n / fps:
                raise MediaError(f"{path}: time {time} does not lie in a clip of {n / fps:.2f} s")
            return np.array([min(int(time * fps), n - 1)])

        return read_frames(path, choose)[0]

    from PIL import Image

    if not os.path.isfile(image):
        raise FileNotFoundError(f"{image}: no such image file")
    try:
        with Image.open(image) as file:
            return np.asarray(file.convert("RGB"))
    # Pillow raises any of these for a damaged file.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{image}: not a readable image ({error})") from error


@dataclasses.dataclass
class Clip:
    """Uniform frames of a video, and how they were decoded."""

    pixels: np.ndarray  # (F, H, W, 3) uint8
    seconds: float  # length of the clip or its window
    decoder: str  # "decord", "pyav" or "folder"
    note: str = ""  # says what is missing, where a damaged file gave only what decodes


def open_clip(video, frames=8):
    """Decode uniform frames of a video -> Clip."""
    pixels, seconds = load_video(video, frames)
    path = video["path"] if isinstance(video, dict) else video
    return Clip(pixels, seconds, "folder" if os.path.isdir(path) else "decord")
