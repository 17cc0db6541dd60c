"""Which of LeRobot's video backends works on this machine, found by decoding a small clip with each."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np

from kuavo_smolvla_ros.errors import UserError

# Fastest first. LeRobot itself takes torchcodec wherever its package is found, and then fails on the first
# sample where FFmpeg's libraries are missing.
BACKENDS = ("torchcodec", "pyav")
FPS = 10
LEVELS = (40, 120, 200)  # one grey frame each, far enough apart to survive lossy coding
TOLERANCE = 12


def write_clip(path: Path) -> None:
    """One grey frame per level, in the codec that LeRobot's datasets use (AV1)."""
    import av

    os.environ.setdefault("SVT_LOG", "1")  # the encoder's errors, not its settings
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libsvtav1", rate=FPS, options={"preset": "12", "crf": "30", "g": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for level in LEVELS:
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def failure(backend: str, clip: Path) -> str | None:
    """Why `backend` cannot decode the clip; None when it can."""
    from lerobot.datasets.video_utils import decode_video_frames

    stamps = [index / FPS for index in range(len(LEVELS))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torchvision announces the end of its decoder
            frames = decode_video_frames(clip, stamps, tolerance_s=0.5 / FPS, backend=backend)
    except Exception as error:  # whatever a native library raises is the answer that is asked for
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else repr(error)
    seen = np.asarray(frames).mean(axis=(1, 2, 3)) * 255
    if seen.shape != (len(LEVELS),) or np.abs(seen - LEVELS).max() > TOLERANCE:
        return f"frames of brightness {LEVELS} came out as {np.round(seen).tolist()}"
    return None


@functools.cache
def try_backends() -> dict[str, str | None]:
    """Each backend and why it fails (None: it works), up to the first that works."""
    results: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(clip)
        for backend in BACKENDS:
            results[backend] = failure(backend, clip)
            if results[backend] is None:
                break
    return results


def choose_video_backend() -> str:
    """The fastest backend that decodes here, for LeRobotDataset's `video_backend`."""
    results = try_backends()
    for backend, problem in results.items():
        if problem is None:
            return backend
    problems = "; ".join(f"{backend}: {problem}" for backend, problem in results.items())
    raise UserError(
        f"no video backend can decode on this machine ({problems}); run make setup again, "
        "or install FFmpeg's libraries (Debian: apt-get install ffmpeg)"
    )
