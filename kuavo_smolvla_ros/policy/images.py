"""Camera pictures to the network's input: bound by name, resized with their shape kept, one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kuavo_smolvla_ros.errors import UserError

IMAGE_PREFIX = "observation.images."
PIXELS = "observation.pixels"
FEATURES = "observation.features"  # what frozen vision layers made of the pictures, in their place
BLACK = -1.0


class CameraError(UserError):
    """The cameras of the data are not those of the policy, or a picture has the wrong form."""


def require_cameras(found: Iterable[str], wanted: Sequence[str], unused: Iterable[str] = ()) -> None:
    """Fail unless the cameras found are exactly those wanted, apart from those declared unused."""
    found, unused = set(found), set(unused)
    missing = [name for name in wanted if name not in found]
    extra = sorted(found - set(wanted) - unused)
    if not missing and not extra:
        return
    faults = []
    if missing:
        faults.append(f"missing: {', '.join(missing)}")
    if extra:
        faults.append(f"not known to the policy: {', '.join(extra)}")
    raise CameraError(
        f"cameras do not match ({'; '.join(faults)}). The policy has [{', '.join(wanted)}], "
        f"the data has [{', '.join(sorted(found))}]. Rename the data's cameras (rename_map), set `cameras`, "
        "or list one that is to be ignored under `unused_cameras`"
    )


def camera_images(
    batch: Mapping[str, object], cameras: Sequence[str], unused: Iterable[str] = ()
) -> list[Tensor]:
    """The pictures of a batch in the policy's camera order."""
    found = [
        key.removeprefix(IMAGE_PREFIX)
        for key in batch
        if key.startswith(IMAGE_PREFIX) and not key.endswith("_is_pad")
    ]
    require_cameras(found, cameras, unused)
    return [batch[IMAGE_PREFIX + name] for name in cameras]  # type: ignore[misc]


def prepare_pixels(images: Sequence[Tensor], size: tuple[int, int], names: Sequence[str] = ()) -> Tensor:
    """Pictures of each camera to (B, cameras, 3, height, width) in [-1, 1]; `size` is (width, height).

    Takes uint8 (0..255), channels first or last, or float channels first (0..1); a time axis of one is
    dropped. The picture keeps its shape, touches the right and bottom edges, and is padded with black at left
    and top.
    """
    width, height = size
    names = names or [str(i) for i in range(len(images))]
    planes = [_channels_first(image, name) for image, name in zip(images, names, strict=True)]
    batch = planes[0].shape[0]
    out = torch.full(
        (batch, len(planes), 3, height, width), BLACK, dtype=torch.float32, device=planes[0].device
    )
    for index, plane in enumerate(planes):
        scale = 2.0 / 255.0 if plane.dtype == torch.uint8 else 2.0
        rows, columns = plane.shape[-2:]
        ratio = max(columns / width, rows / height)
        fitted = (int(rows / ratio), int(columns / ratio))
        picture = _resized(plane, fitted)
        window = out[:, index, :, height - fitted[0] :, width - fitted[1] :]
        torch.mul(picture, scale, out=window).sub_(1.0)
    return out


def _resized(plane: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, in single precision. Of a picture much too high only the rows that count are converted: whole
    ones in floats are so large that the memory goes back to the system and is fetched anew every time.
    """
    rows, wanted = plane.shape[-2], size[0]
    if 2 * wanted >= rows:
        plane = plane.to(torch.float32)
        same = plane.shape[-2:] == size
        return plane if same else F.interpolate(plane, size=size, mode="bilinear", align_corners=False)
    both, weights = _rows_that_count(rows, wanted, plane.device)
    if plane.stride(1) == 1:  # colours stand side by side; whole rows are copied fastest as they lie
        plane = plane.permute(0, 2, 3, 1).index_select(1, both).permute(0, 3, 1, 2)
    else:
        plane = plane.index_select(2, both)
    picture = plane.to(torch.float32)
    picture = F.interpolate(picture, size=(2 * wanted, size[1]), mode="bilinear", align_corners=False)
    return torch.lerp(picture[..., :wanted, :], picture[..., wanted:, :], weights)


@lru_cache(maxsize=16)
def _rows_that_count(rows: int, wanted: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each wanted row the one above it; then, for each, the one below; and how much of that is taken."""
    with torch.inference_mode(False):
        places = (torch.arange(wanted) + 0.5) * (rows / wanted) - 0.5
        above = places.long()
        below = (above + 1).clamp_(max=rows - 1)
        return torch.cat((above, below)).to(device), (places - above)[:, None].to(device)


def _channels_first(image: Tensor, name: str) -> Tensor:
    if image.ndim == 5:
        if image.shape[1] != 1:
            raise CameraError(f"camera {name}: {image.shape[1]} pictures in time, the policy sees one")
        image = image[:, 0]
    if image.ndim != 4:
        raise CameraError(f"camera {name}: shape {tuple(image.shape)} is not (batch, 3, height, width)")
    if image.dtype == torch.uint8 and image.shape[1] != 3 and image.shape[-1] == 3:
        image = image.permute(0, 3, 1, 2)
    if image.shape[1] != 3:
        raise CameraError(f"camera {name}: shape {tuple(image.shape)} has no axis of three colours")
    if image.dtype != torch.uint8 and not image.dtype.is_floating_point:
        raise CameraError(f"camera {name}: {image.dtype} is neither uint8 (0..255) nor float (0..1)")
    return image
