"""Frames of a video at given times, and images as a viewer shows them."""

import math
import os
import warnings
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class MediaError(ValueError):
    """A media file that cannot be used; the message names it."""


def sample_indices(n, frames):
    """Return UVRB's uniform indices linspace(0, n-1, frames).round(), (frames,) int64; a shorter clip repeats some."""
    if frames < 2 or frames % 2:
        raise ValueError(
            f"frames must be even and at least 2 (Qwen2.5-VL merges frames in pairs), got {frames}"
        )
    return np.linspace(0, n - 1, frames).round().astype(np.int64)


def read_frames(path, choose):
    """Decode the frames whose indices choose(n, fps) returns -> uint8 (F, H, W, 3); decord first, then PyAV."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such video file")
    import decord  # late: imported before torch it can hang DataLoader workers

    try:
        reader = decord.VideoReader(path, num_threads=1)
        n, fps = len(reader), float(reader.get_avg_fps())
        if n > 0 and fps > 0:
            return reader.get_batch(choose(n, fps)).asnumpy()
        reason = f"{n} frames at {fps} fps"
    except (RuntimeError, decord.DECORDError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    import av

    try:
        with av.open(path) as file:
            fps = float(file.streams.video[0].average_rate or 0)
            n = sum(1 for _ in file.decode(video=0))  # the header's count is often absent or wrong
        if n == 0 or fps <= 0:
            raise MediaError(f"{path}: {n} frames at {fps} fps")
        indices = choose(n, fps).tolist()
        with av.open(path) as file:
            kept = {
                i: f.to_ndarray(format="rgb24")
                for i, f in enumerate(file.decode(video=0))
                if i in set(indices)
            }
        warnings.warn(
            "decord cannot read some videos (AV1, for instance); PyAV reads those", stacklevel=2
        )  # shown once
        return np.stack([kept[i] for i in indices])
    except (
        av.FFmpegError,
        UnicodeDecodeError,
        IndexError,
        KeyError,
    ) as error:  # metadata may not be UTF-8
        raise MediaError(
            f"{path}: not a readable video (decord: {reason}; PyAV: {error})"
        ) from error


def load_video(video, frames=8):
    """Decode uniform frames of a resolved video -> (uint8 (F, H, W, 3), duration of the clip or window in seconds).

    video: path of a file or of a folder of frames in name order, or {"path", "start", "end", "fps"}: optional seconds, and the
    folder's frame rate (8). Raises MediaError or FileNotFoundError, naming the file.
    """
    spec = video if isinstance(video, dict) else {"path": video}
    path, start, end, seconds = str(spec["path"]), spec.get("start") or 0, spec.get("end"), 0.0

    def choose(n, fps):
        nonlocal seconds
        if start < 0 or start * fps >= n or (end is not None and end <= start):
            raise MediaError(
                f"{path}: start {start} and end {end} do not lie in a clip of {n / fps:.2f} s"
            )
        first = int(start * fps)
        last = (
            n if end is None else min(n, max(first + 1, math.ceil(end * fps - 1e-6)))
        )  # at least one frame
        seconds = (last - first) / fps
        return first + sample_indices(last - first, frames)

    if not os.path.isdir(path):
        return read_frames(path, choose), seconds
    if not (
        files := sorted(f for f in os.listdir(path) if Path(f).suffix.lower() in IMAGE_SUFFIXES)
    ):
        raise MediaError(f"{path}: a folder without frames ({', '.join(sorted(IMAGE_SUFFIXES))})")
    images = [
        load_image(os.path.join(path, files[i])) for i in choose(len(files), spec.get("fps") or 8)
    ]
    if len({image.shape for image in images}) > 1:
        raise MediaError(
            f"{path}: frames of different sizes {sorted({image.shape[:2] for image in images})}"
        )
    return np.stack(images), seconds


def load_image(image):
    """Decode a path, or {"video": path, "time": seconds} for a video's frame -> uint8 (H, W, 3); raises as load_video."""
    if isinstance(image, dict):

        def choose(n, fps):
            if not 0 <= image["time"] <= n / fps:
                raise MediaError(
                    f"{image['video']}: time {image['time']} does not lie in a clip of {n / fps:.2f} s"
                )
            return np.array([min(int(image["time"] * fps), n - 1)])

        return read_frames(str(image["video"]), choose)[0]
    from PIL import Image

    if not os.path.isfile(image):
        raise FileNotFoundError(f"{image}: no such image file")
    try:
        with Image.open(image) as file:
            return np.asarray(file.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{image}: not a readable image ({error})") from error
