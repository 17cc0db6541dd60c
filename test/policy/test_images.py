from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lerobot.policies.smolvla.modeling_smolvla import resize_with_pad

from kuavo_smolvla_ros.policy.images import CameraError, camera_images, prepare_pixels, require_cameras

HEAD, LEFT = "observation.images.head_cam_h", "observation.images.wrist_cam_l"


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (480, 640), (64, 64), (33, 100), (7, 9)])
def test_equals_lerobots_picture(size):
    image = torch.rand(2, 3, *size)
    expected = resize_with_pad(image, 64, 64, pad_value=0) * 2.0 - 1.0
    assert torch.allclose(prepare_pixels([image], (64, 64))[:, 0], expected, atol=1e-6)


@given(rows=st.integers(1, 500), columns=st.integers(1, 500), side=st.integers(1, 100), last=st.booleans())
@settings(deadline=None, max_examples=60)
def test_any_picture_is_resized_as_torch_would(rows, columns, side, last):
    image = torch.randint(0, 256, (2, 3, rows, columns), dtype=torch.uint8)
    ratio = max(rows, columns) / side
    size = (int(rows / ratio), int(columns / ratio))
    assume(min(size) > 0)
    given_as = image.permute(0, 2, 3, 1).contiguous() if last and columns != 3 and rows != 3 else image
    picture = prepare_pixels([given_as], (side, side))[:, 0, :, side - size[0] :, side - size[1] :]
    expected = F.interpolate(image / 127.5, size=size, mode="bilinear", align_corners=False) - 1.0
    assert torch.allclose(picture, expected, atol=2e-4)  # the last bit of a place among 500 rows


def test_what_is_found_out_while_inferring_serves_training_too():
    image = torch.randint(0, 256, (1, 3, 301, 403), dtype=torch.uint8)
    with torch.inference_mode():
        prepare_pixels([image], (37, 37))
    pixels = prepare_pixels([image], (37, 37))
    (pixels * torch.ones(1, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("size", [(48, 64), (64, 64)])
def test_bytes_equal_fractions(size):
    image = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    expected = prepare_pixels([image.float() / 255.0], (64, 64))
    assert torch.allclose(prepare_pixels([image], (64, 64)), expected, atol=1e-6)


def test_channels_last_bytes_are_taken():
    image = torch.randint(0, 256, (1, 48, 64, 3), dtype=torch.uint8)
    assert torch.equal(
        prepare_pixels([image], (64, 64)), prepare_pixels([image.permute(0, 3, 1, 2)], (64, 64))
    )


def test_a_time_axis_of_one_is_dropped_and_a_longer_one_refused():
    image = torch.rand(2, 1, 3, 48, 64)
    assert torch.equal(prepare_pixels([image], (64, 64)), prepare_pixels([image[:, 0]], (64, 64)))
    with pytest.raises(CameraError, match="2 pictures in time"):
        prepare_pixels([image.expand(-1, 2, -1, -1, -1)], (64, 64))


def test_padding_is_black_at_left_and_top():
    wide = prepare_pixels([torch.ones(1, 3, 32, 64)], (64, 64))[0, 0]
    assert wide[:, :32].eq(-1).all()
    assert wide[:, 32:].eq(1).all()
    tall = prepare_pixels([torch.ones(1, 3, 64, 32)], (64, 64))[0, 0]
    assert tall[:, :, :32].eq(-1).all()
    assert tall[:, :, 32:].eq(1).all()


def test_the_input_is_not_changed():
    image = torch.rand(1, 3, 64, 64)
    before = image.clone()
    prepare_pixels([image], (64, 64))
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (torch.rand(3, 48, 64), "is not \\(batch, 3, height, width\\)"),
        (torch.rand(1, 1, 48, 64), "three colours"),
        (torch.rand(1, 48, 64, 3), "three colours"),
        (torch.zeros(1, 3, 48, 64, dtype=torch.int64), "int64"),
    ],
)
def test_a_wrong_picture_is_refused_by_camera(image, complaint):
    with pytest.raises(CameraError, match=f"camera head_cam_h: .*{complaint}"):
        prepare_pixels([image], (64, 64), ["head_cam_h"])


def test_order_is_the_policys_not_the_batchs():
    batch = {
        LEFT: torch.zeros(1),
        HEAD: torch.ones(1),
        "observation.images.head_cam_h_is_pad": torch.zeros(1),
    }
    assert [t.item() for t in camera_images(batch, ["head_cam_h", "wrist_cam_l"])] == [1.0, 0.0]


@pytest.mark.parametrize(
    "found", [["head_cam_h"], ["head_cam_h", "wrist_cam_l", "front"], ["front", "wrist_cam_l"]]
)
def test_both_sides_are_listed(found):
    with pytest.raises(CameraError) as error:
        require_cameras(found, ["head_cam_h", "wrist_cam_l"])
    assert "[head_cam_h, wrist_cam_l]" in str(error.value)
    assert f"[{', '.join(sorted(found))}]" in str(error.value)


def test_a_camera_declared_unused_may_be_there_but_need_not():
    require_cameras(["head_cam_h", "front"], ["head_cam_h"], ["front"])
    require_cameras(["head_cam_h"], ["head_cam_h"], ["front"])
