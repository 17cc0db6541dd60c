"""cv_bridge crashes the process under NumPy 2, so whether it is used is settled before it is imported."""

from __future__ import annotations

import array
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from sensor_msgs.msg import CompressedImage, Image

from kuavo_smolvla_ros.robot import images
from kuavo_smolvla_ros.robot.images import ImageError, cv_bridge_obstacle, decode_image, encode_jpeg

STAND_IN = """
import numpy as np
class CvBridge:
    def imgmsg_to_cv2(self, message, encoding):
        assert encoding == "rgb8"
        return np.full((message.height, message.width, 3), 1, np.uint8)
    def compressed_imgmsg_to_cv2(self, message, encoding):
        assert encoding == "rgb8"
        return np.full((4, 5, 3), 2, np.uint8)
"""


def image(encoding: str = "rgb8") -> Image:
    channels = 1 if encoding in ("mono8", "bayer_rggb8") else 3
    data = np.random.default_rng(0).integers(0, 256, 4 * 5 * channels, np.uint8).tobytes()
    return Image(height=4, width=5, encoding=encoding, step=5 * channels, data=array.array("B", data))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another package of cv_bridge's name, to see whether and how it is called."""
    (tmp_path / "cv_bridge.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv_bridge", raising=False)
    yield tmp_path
    sys.modules.pop("cv_bridge", None)


@pytest.mark.parametrize("version", ["2.0.0", "2.2.6", "3.0.0rc1", "10.1"])
def test_numpy_2_is_an_obstacle_wherever_cv_bridge_is_installed(version: str, stand_in: Path) -> None:
    assert "needs NumPy below 2" in str(cv_bridge_obstacle(version))


@pytest.mark.parametrize("version", ["1.21.5", "1.26.4"])
def test_numpy_1_is_none(version: str, stand_in: Path) -> None:
    assert cv_bridge_obstacle(version) is None


def test_absence_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    assert cv_bridge_obstacle("1.26.4") == "cv_bridge is not installed"


def test_it_is_not_even_imported_where_it_would_crash(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stand_in / "cv_bridge.py").write_text("raise SystemExit('imported')")
    monkeypatch.setattr(images, "cv_bridge_obstacle", lambda: cv_bridge_obstacle("2.2.6"))
    with pytest.raises(ImageError, match=r"cv_bridge crashes under NumPy 2\.2\.6"):
        decode_image(image(), via_cv_bridge=True)
    assert "cv_bridge" not in sys.modules


def test_it_is_asked_where_it_works(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "cv_bridge_obstacle", lambda: cv_bridge_obstacle("1.26.4"))
    assert (decode_image(image(), via_cv_bridge=True) == 1).all()
    jpeg = array.array("B", encode_jpeg(np.zeros((4, 5, 3), np.uint8)))
    assert (decode_image(CompressedImage(format="jpeg", data=jpeg), via_cv_bridge=True) == 2).all()
    assert not (decode_image(image()) == 1).all()


def test_bad_messages_never_reach_it(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "cv_bridge_obstacle", lambda: cv_bridge_obstacle("1.26.4"))
    broken = image()
    broken.step = 3
    with pytest.raises(ImageError, match="step is 3"):
        decode_image(broken, via_cv_bridge=True)


@pytest.mark.skipif(cv_bridge_obstacle() is not None, reason=str(cv_bridge_obstacle()))
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "mono8", "bayer_rggb8"])
def test_same_pixels_either_way(encoding: str) -> None:
    assert importlib.util.find_spec("cv_bridge") is not None
    assert np.array_equal(decode_image(image(encoding)), decode_image(image(encoding), via_cv_bridge=True))
