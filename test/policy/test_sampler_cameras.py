"""Cameras encoded ahead give the same chunk, and are encoded once."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.policy.images import CameraError
from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors
from kuavo_smolvla_ros.policy.runtime import PolicyRunner
from kuavo_smolvla_ros.policy.sampler import Sampler, SamplerOptions
from kuavo_smolvla_ros.policy.sampler_cameras import CameraTokens

ROLES = ("head_cam_h", "wrist_cam_l")
STATE = np.linspace(-0.5, 0.5, 16, dtype=np.float32)


def pictures(seed, height=48, width=64):
    random = np.random.default_rng(seed)
    return {role: random.integers(0, 255, (height, width, 3), np.uint8) for role in ROLES}


@pytest.fixture
def make_runner(make_policy):
    def make(policy=None, **how):
        policy = make_policy() if policy is None else policy
        pipelines = make_kuavo_smolvla_pre_post_processors(policy.config, statistics=policy.statistics)
        return PolicyRunner(policy, *pipelines, **how)

    return make


def ask(runner, images, **how):
    return runner.chunk(images, STATE, "pick up the parcel", seed=3, **how)


class TestRunner:
    @pytest.mark.parametrize("shape", [(48, 64), (120, 160), (64, 48)])
    def test_fast_and_plain_give_the_same(self, make_runner, make_policy, shape):
        policy, images = make_policy(), pictures(0, *shape)
        fast, plain = make_runner(policy), make_runner(policy, fast=False)
        assert plain.sampler is None
        assert not plain.encode_camera(ROLES[0], images[ROLES[0]], 1)
        rest = ask(plain, pictures(1))[5:]
        for how in ({}, {"prefix": rest, "delay": 3}):
            assert np.abs(ask(fast, images, **how) - ask(plain, images, **how)).max() < 1e-5

    def test_a_camera_encoded_ahead_is_used(self, make_runner):
        runner, images = make_runner(), pictures(0)
        expected = ask(runner, images)
        cameras = runner._cameras
        for stamp, role in enumerate(ROLES):
            assert runner.encode_camera(role, images[role], stamp)
        count = cameras.encoded
        stamps = {role: stamp for stamp, role in enumerate(ROLES)}
        assert np.abs(ask(runner, images, stamps=stamps) - expected).max() < 1e-5
        assert cameras.encoded == count, "both were at hand"
        assert np.abs(ask(runner, images, stamps={**stamps, ROLES[1]: 7}) - expected).max() < 1e-5
        assert cameras.encoded == count + 1, "only the camera with another stamp is encoded"
        ask(runner, images)
        assert cameras.encoded == count + 3, "without stamps nothing is assumed"

    def test_an_old_picture_is_not_used_for_a_new_stamp(self, make_runner):
        runner, old, new = make_runner(), pictures(0), pictures(1)
        for role in ROLES:
            runner.encode_camera(role, old[role], 1)
        stamps = dict.fromkeys(ROLES, 2)
        assert np.array_equal(ask(runner, new, stamps=stamps), ask(runner, new))

    def test_new_weights_encode_anew(self, make_runner):
        runner, images = make_runner(), pictures(0)
        stamps = dict.fromkeys(ROLES, 1)
        for role in ROLES:
            runner.encode_camera(role, images[role], 1)
        with torch.no_grad():
            runner.policy.model.connector.modality_projection.proj.weight.mul_(2.0)
        expected = ask(make_runner(runner.policy, fast=False), images)
        assert np.abs(ask(runner, images, stamps=stamps) - expected).max() < 1e-5

    def test_errors_are_those_of_the_plain_path(self, make_runner):
        runner, images = make_runner(), pictures(0)
        with pytest.raises(CameraError, match="missing: wrist_cam_l"):
            ask(runner, {ROLES[0]: images[ROLES[0]]})
        with pytest.raises(CameraError, match="no camera chest"):
            runner.encode_camera("chest", images[ROLES[0]], 1)
        with pytest.raises(UserError):
            runner.chunk(images, STATE, "put the parcel there " * 40)

    def test_threads_wait_for_each_other(self, make_runner):
        runner, images = make_runner(), pictures(0)
        expected, wrong = ask(runner, images), []

        def encode():
            for stamp in range(10):
                for role in ROLES:
                    runner.encode_camera(role, pictures(stamp)[role], stamp)

        def think():
            for _ in range(10):
                if np.abs(ask(runner, images) - expected).max() > 1e-5:
                    wrong.append(True)

        threads = [threading.Thread(target=f) for f in (encode, think)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


class TestLevers:
    def test_unchanged_pictures_are_recognised_by_their_contents(self, make_runner):
        runner = make_runner(options=SamplerOptions(reuse_unchanged=True))
        dark = {role: np.zeros((48, 64, 3), np.uint8) for role in ROLES}
        first = ask(runner, dark)
        count = runner._cameras.encoded
        assert np.array_equal(ask(runner, {role: p.copy() for role, p in dark.items()}), first)
        assert runner._cameras.encoded == count
        dark[ROLES[0]][5, 5] = 255
        assert not np.array_equal(ask(runner, dark), first)
        assert runner._cameras.encoded == count + 1

    def test_an_unpadded_picture_keeps_its_place_in_the_square(self, make_policy):
        """96 x 64 patches without the upper third: fewer tokens, positions of the lower rows."""
        policy = make_policy(resize_imgs_with_padding=(64, 96))
        sampler = Sampler(policy, SamplerOptions(unpadded=True))
        cameras = CameraTokens(sampler, ROLES[:1], (64, 96))
        picture = torch.from_numpy(pictures(0, 64, 64)[ROLES[0]])
        tokens = cameras.tokens({ROLES[0]: picture})
        assert tokens.shape[1] == 4
        seen = []
        sampler._steps.encode, encode = (
            (lambda p, i: (seen.append(i), encode(p, i))[1]),
            sampler._steps.encode,
        )
        CameraTokens(sampler, ROLES[:1], (64, 96)).tokens({ROLES[0]: picture})
        assert torch.equal(seen[0], sampler.patch_ids(96, 64)[-64:])

    def test_a_smaller_picture_size(self, make_runner, make_policy):
        policy = make_policy()
        small = make_runner(policy, options=SamplerOptions(image_size=(32, 32)))
        expected = make_policy(resize_imgs_with_padding=(32, 32))
        expected.load_state_dict(policy.state_dict())
        images = pictures(0)
        assert np.abs(ask(small, images) - ask(make_runner(expected), images)).max() < 1e-5
