"""Image tokens of single cameras, encoded when a picture arrives and used by the chunk that asks for it.

A picture is known by its camera and its stamp. One whose stamp the chunk's pictures repeat is not encoded
again; so cameras that deliver nothing new cost nothing, and those that do can be encoded while the robot
still moves along the previous chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kuavo_smolvla_ros.policy.images import CameraError, prepare_pixels, require_cameras
from kuavo_smolvla_ros.policy.sampler import Sampler, SamplerError


class _Encoded(NamedTuple):
    stamp: int | None
    picture: Tensor | None  # kept only to recognise the same contents
    tokens: Tensor
    build: int  # of the sampler: tokens of other weights are not used


class CameraTokens:
    """The newest encoded picture of each camera. Pictures are RGB uint8, height x width x 3.

    `size` (width, height) is what pictures are brought to; `cameras` are in the prefix's order.
    """

    def __init__(
        self, sampler: Sampler, cameras: Sequence[str], size: tuple[int, int], unused: Sequence[str] = ()
    ) -> None:
        self._sampler, self._cameras, self._unused = sampler, tuple(cameras), tuple(unused)
        self._size = sampler.options.image_size or size
        self._kept: dict[str, _Encoded] = {}
        self.encoded = 0  # pictures that went through the vision encoder

    def put(self, camera: str, picture: Tensor, stamp: int) -> None:
        """Encode a picture now. A camera the policy does not look at is passed over."""
        if camera in self._unused and camera not in self._cameras:
            return
        if camera not in self._cameras:
            raise CameraError(f"the policy has no camera {camera}; it has {', '.join(self._cameras)}")
        with self._sampler.lock:
            self._sampler.refresh()
            if not self._known(camera, picture, stamp):
                self._encode({camera: picture}, {camera: stamp})

    def tokens(self, pictures: Mapping[str, Tensor], stamps: Mapping[str, int] | None = None) -> Tensor:
        """All cameras' tokens (1, T, width); those not encoded before go through the encoder together."""
        require_cameras(pictures, self._cameras, self._unused)
        stamps = stamps or {}
        with self._sampler.lock:
            self._sampler.refresh()
            new = {
                name: pictures[name]
                for name in self._cameras
                if not self._known(name, pictures[name], stamps.get(name))
            }
            if new:
                self._encode(new, stamps)
            return torch.cat([self._kept[name].tokens for name in self._cameras])[None]

    def _known(self, camera: str, picture: Tensor, stamp: int | None) -> bool:
        kept = self._kept.get(camera)
        if kept is None or kept.build != self._sampler.builds:
            return False
        if stamp is not None and kept.stamp == stamp:
            return True
        return kept.picture is not None and torch.equal(kept.picture, picture)

    def _encode(self, pictures: Mapping[str, Tensor], stamps: Mapping[str, int]) -> None:
        sampler, names = self._sampler, list(pictures)
        planes = [pictures[name].to(sampler.device)[None] for name in names]
        size = self._fitted(planes, names) if sampler.options.unpadded else self._size
        pixels = prepare_pixels(planes, size, names)[0]
        ids = sampler.patch_ids(self._size[1], self._size[0])
        if size != self._size:  # without the rows and columns that would have been black
            patch = sampler.sizes.vision.patch_size
            ids = ids.unflatten(0, (-1, self._size[0] // patch))
            ids = ids[-(size[1] // patch) :, -(size[0] // patch) :].flatten()
        tokens = sampler.encode(pixels, ids)
        self.encoded += len(names)
        for name, own in zip(names, tokens.clone(), strict=True):
            picture = pictures[name].clone() if sampler.options.reuse_unchanged else None
            self._kept[name] = _Encoded(stamps.get(name), picture, own, sampler.builds)

    def _fitted(self, planes: Sequence[Tensor], names: Sequence[str]) -> tuple[int, int]:
        """The size (width, height) of the pictures themselves within the padded square."""
        sizes = set()
        for plane in planes:
            rows, columns = plane.shape[1:3]
            ratio = max(columns / self._size[0], rows / self._size[1])
            sizes.add((int(columns / ratio), int(rows / ratio)))
        if len(sizes) > 1:
            raise SamplerError(
                f"unpadded pictures must have one shape; {', '.join(names)} have {len(sizes)} after resizing"
            )
        return sizes.pop()
