from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lerobot.configs.types import RTCAttentionSchedule
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor

from kuavo_smolvla_ros.policy.flow import euler
from kuavo_smolvla_ros.policy.rtc import (
    SCHEDULES,
    RTCError,
    RTCSettings,
    delay_steps,
    guidance_weight,
    hold_to,
    make_guide,
    prefix_weights,
    remaining_chunk,
)

SIZES = {"chunk_size": 50, "padded_width": 4, "num_steps": 10}


def lerobots(settings: RTCSettings) -> RTCProcessor:
    return RTCProcessor(
        RTCConfig(
            enabled=True,
            prefix_attention_schedule=RTCAttentionSchedule(settings.schedule),
            max_guidance_weight=settings.max_guidance_weight,
            execution_horizon=settings.execution_horizon,
        )
    )


@given(st.sampled_from(SCHEDULES), st.integers(0, 20), st.integers(1, 50))
def test_weights_equal_lerobots(schedule, delay, horizon):
    assume(delay <= horizon)
    theirs = lerobots(RTCSettings(horizon, 10.0, schedule)).get_prefix_weights(delay, horizon, 50)
    assert torch.allclose(prefix_weights(delay, horizon, 50, schedule), theirs)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("time", [1.0, 0.9, 0.5, 0.1])
def test_a_guided_step_equals_lerobots(schedule, time):
    settings = RTCSettings(12, 10.0, schedule)
    x, v, prefix = (torch.randn(2, 50, 4) for _ in range(3))
    expected = lerobots(settings).denoise_step(x.clone(), prefix, 3, time, lambda _x: v.clone())
    guide = make_guide(prefix, 3, settings, **SIZES)
    assert torch.allclose(guide(v, x, time), expected, atol=1e-5)


@given(st.floats(0.0, 1.0))
def test_the_pull_is_bounded(time):
    weight = guidance_weight(time, 10.0) if time > 0 else 0.0
    assert 0.0 <= weight <= 10.0


@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_the_guided_part_arrives_at_the_prefix_with_any_number_of_steps(steps):
    """A pull of 10 in steps of a quarter would overshoot further at every step."""
    prefix = torch.randn(1, 20, 4)
    guide = make_guide(prefix, 8, RTCSettings(20, 10.0), chunk_size=50, padded_width=4, num_steps=steps)
    actions = euler(lambda x, _t: x * 0.1, torch.randn(1, 50, 4), steps, guide=guide)
    assert (actions[:, :8] - prefix[:, :8]).abs().max() < 0.02


def test_after_the_horizon_nothing_is_pulled():
    noise = torch.randn(1, 50, 4)
    guide = make_guide(torch.randn(1, 50, 4), 2, RTCSettings(10), **SIZES)
    free = euler(lambda x, _t: x, noise, 10)
    assert torch.equal(euler(lambda x, _t: x, noise, 10, guide=guide)[:, 10:], free[:, 10:])


def test_dimensions_the_robot_does_not_have_are_not_pulled():
    noise = torch.randn(1, 50, 4)
    guide = make_guide(torch.randn(1, 50, 3), 5, RTCSettings(10), **SIZES)
    free = euler(lambda x, _t: x, noise, 10)
    assert torch.equal(euler(lambda x, _t: x, noise, 10, guide=guide)[..., 3], free[..., 3])


def test_a_short_prefix_is_held_for_the_delay_and_never_zero():
    prefix = torch.full((1, 2, 4), 5.0)
    guide = make_guide(prefix, 6, RTCSettings(10), **SIZES)
    actions = euler(lambda x, _t: torch.zeros_like(x), torch.zeros(1, 50, 4), 10, guide=guide)
    assert (actions[:, :6] - 5.0).abs().max() < 0.01
    assert actions[:, 6:].eq(0).all(), "beyond delay and prefix there is nothing to follow"


def test_hold():
    rows = torch.tensor([[[1.0], [2.0]]])
    assert hold_to(rows, 4).flatten().tolist() == [1.0, 2.0, 2.0, 2.0]
    assert hold_to(rows, 1).flatten().tolist() == [1.0]


@pytest.mark.parametrize(
    ("prefix", "delay", "changes", "complaint"),
    [
        (
            torch.zeros(1, 5, 4),
            24,
            {"execution_horizon": 16},
            "delay of 24 steps exceeds the execution horizon of 16",
        ),
        (torch.zeros(1, 5, 4), -1, {}, "cannot be negative"),
        (torch.zeros(1, 0, 4), 0, {}, "at least one step"),
        (torch.zeros(5, 4), 0, {}, "at least one step"),
        (torch.zeros(1, 5, 5), 0, {}, "5 wide"),
        (torch.zeros(1, 5, 4), 0, {"execution_horizon": 51}, "longer than a chunk"),
    ],
)
def test_what_cannot_be_honoured_is_refused(prefix, delay, changes, complaint):
    with pytest.raises(RTCError, match=complaint):
        make_guide(prefix, delay, RTCSettings(), **SIZES, **changes)


@pytest.mark.parametrize(
    "fields", [{"execution_horizon": 0}, {"max_guidance_weight": 0.0}, {"schedule": "linear"}]
)
def test_settings_are_checked(fields):
    with pytest.raises(RTCError):
        RTCSettings(**fields)


@pytest.mark.parametrize(
    ("latency", "fps", "steps"), [(0.0, 10, 0), (0.1, 10, 1), (0.101, 10, 2), (0.3, 10, 3), (0.7, 30, 21)]
)
def test_delay_in_steps(latency, fps, steps):
    assert delay_steps(latency, fps) == steps


@pytest.mark.parametrize("latency", [-0.1, float("nan"), float("inf")])
def test_a_senseless_latency_is_refused(latency):
    with pytest.raises(RTCError, match="makes no sense"):
        delay_steps(latency, 10)


class TestRemaining:
    chunk = np.arange(10, dtype=np.float32)[:, None] * np.array([1.0, -2.0], dtype=np.float32)

    def test_on_the_grid(self):
        rest = remaining_chunk(self.chunk, 0, 300_000_000, 10)
        assert np.allclose(rest, self.chunk[3:])

    def test_between_rows(self):
        rest = remaining_chunk(self.chunk, 0, 350_000_000, 10)
        assert np.allclose(rest[:, 0], np.arange(3.5, 9.0))

    def test_the_last_row_alone(self):
        assert remaining_chunk(self.chunk, 0, 900_000_000, 10).tolist() == [[9.0, -18.0]]

    def test_over(self):
        assert remaining_chunk(self.chunk, 0, 1_000_000_000, 10) is None

    def test_an_older_observation_is_refused(self):
        with pytest.raises(RTCError, match="older"):
            remaining_chunk(self.chunk, 10, 9, 10)

    @given(st.integers(0, 2_000_000_000), st.sampled_from([10.0, 30.0, 7.5]))
    def test_agrees_with_the_old_chunk_at_every_time(self, passed, fps):
        rest = remaining_chunk(self.chunk, 1_000, 1_000 + passed, fps)
        if rest is None:
            assert passed * 1e-9 * fps > 9
            return
        at = passed * 1e-9 * fps + np.arange(len(rest))
        assert at[-1] <= 9 + 1e-5
        assert at[-1] > 8 - 1e-5
        assert np.allclose(rest[:, 0], np.minimum(at, 9.0), atol=1e-4)
