"""The video backend is the one that decodes, not the one whose package is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kuavo_smolvla_ros import video_decoder
from kuavo_smolvla_ros.errors import UserError

pytest.importorskip("lerobot")


@pytest.fixture(autouse=True)
def _fresh_answer() -> Iterator[None]:
    video_decoder.try_backends.cache_clear()
    yield
    video_decoder.try_backends.cache_clear()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    video_decoder.write_clip(path)
    return path


def test_the_chosen_backend_decodes_a_clip_it_has_not_seen(tmp_path: Path) -> None:
    import av
    from lerobot.datasets.video_utils import decode_video_frames

    path = tmp_path / "ramp.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libsvtav1", rate=30, options={"preset": "12", "g": "2"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for level in range(20, 220, 10):
            image = np.full((64, 96, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    backend = video_decoder.choose_video_backend()
    frame = decode_video_frames(path, [7 / 30], tolerance_s=0.01, backend=backend)
    assert float(frame.mean()) * 255 == pytest.approx(90, abs=12)


def test_the_answer_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = video_decoder.choose_video_backend()
    monkeypatch.setattr(video_decoder, "BACKENDS", ())
    assert video_decoder.choose_video_backend() == first


def test_a_backend_that_cannot_decode_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    working = video_decoder.choose_video_backend()
    video_decoder.try_backends.cache_clear()
    monkeypatch.setattr(video_decoder, "BACKENDS", ("not_a_backend", working))
    assert video_decoder.choose_video_backend() == working
    problem = video_decoder.try_backends()["not_a_backend"]
    assert problem is not None
    assert "not_a_backend" in problem


def test_no_working_backend_is_an_error_with_each_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_decoder, "BACKENDS", ("first_absent", "second_absent"))
    with pytest.raises(UserError, match=r"first_absent.*second_absent.*ffmpeg"):
        video_decoder.choose_video_backend()


def test_a_broken_file_is_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"not a video" * 100)
    assert video_decoder.failure("pyav", path)


def test_wrong_pixels_are_a_failure(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that runs without error but returns other frames is no decoder."""
    backend = video_decoder.choose_video_backend()
    assert video_decoder.failure(backend, clip) is None
    monkeypatch.setattr(video_decoder, "LEVELS", tuple(reversed(video_decoder.LEVELS)))
    problem = video_decoder.failure(backend, clip)
    assert problem is not None
    assert "brightness" in problem
