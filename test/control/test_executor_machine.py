"""The executor under any order of events: what must hold after every single step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kuavo_smolvla_ros.control.reasons import Request, State, StopReason, Transition

S = 1_000_000_000

_make_world: Any = None


@pytest.fixture(autouse=True)
def _bind(make_world: Any) -> None:
    global _make_world
    _make_world = make_world


class ExecutorMachine(RuleBasedStateMachine):
    @initialize(
        transition=st.sampled_from(list(Transition)),
        latches=st.booleans(),
        robot=st.sampled_from(["kuavo_sim", "kuavo_sim_left", "kuavo_mobile"]),
    )
    def begin(self, transition: Transition, latches: bool, robot: str) -> None:
        self.world = _make_world(robot, transition=transition, starvation_latches=latches)
        self.latches = latches
        self.world.step()
        self.e_stopped = self.shut_down = False

    def one(self, *chunks: Any, **changes: Any) -> None:
        """One step, with the rules that tie two neighbouring steps together."""
        executor = self.world.executor
        before, was_latched = self.world.last, executor.latched
        requests = changes.get("requests", ())
        decision = self.world.tick(*chunks, **changes)
        resumed = (
            decision.answer is not None and decision.answer.accepted and decision.state is not before.state
        )
        if was_latched and not resumed:
            assert decision.state in (State.STOPPING, State.HOLDING)
            assert decision.reason is not None
            assert not decision.accepted
            if not requests and not changes.get("foreign_publishers"):
                assert decision.reason is before.reason
        if before.state is State.HOLDING and decision.state is State.STOPPING:
            raise AssertionError("a hold became a stop again")
        if decision.state in (State.RAMPING, State.FOLLOWING) and before.state in (State.HOLDING,):
            assert resumed or not was_latched
        if Request.E_STOP in requests:
            self.e_stopped = True
        if Request.RELEASE_E_STOP in requests:
            self.e_stopped = False
        self.shut_down = self.shut_down or Request.SHUTDOWN in requests

    @rule(count=st.integers(1, 30))
    def time_passes(self, count: int) -> None:
        for _ in range(count):
            self.one()

    @rule(
        offset=st.floats(-0.3, 0.3),
        steps=st.integers(2, 30),
        age_s=st.sampled_from([0.0, 0.05, 0.4, 2.0, -0.2]),
        task=st.sampled_from(["task1", "task2"]),
    )
    def chunk_comes(self, offset: float, steps: int, age_s: float, task: str) -> None:
        self.one(self.world.chunk(offset, steps=steps, age_s=age_s, task=task))

    @rule(bad=st.sampled_from([np.nan, np.inf, 1e9]), joint=st.integers(0, 7))
    def bad_chunk_comes(self, bad: float, joint: int) -> None:
        values = self.world.chunk().values.copy()
        values[3, joint] = bad
        self.one(self.world.chunk(values=values))
        assert len(self.world.last.refused) == 1

    @rule(request_=st.sampled_from([Request.STOP, Request.PAUSE, Request.UNPAUSE, Request.RESUME]))
    def operator_asks(self, request_: Request) -> None:
        self.one(requests=(request_,))

    @rule(request_=st.sampled_from([Request.E_STOP, Request.RELEASE_E_STOP]))
    def emergency(self, request_: Request) -> None:
        self.one(requests=(request_,))

    @rule()
    @precondition(lambda self: self.world.last.state is State.HOLDING)
    def shut_down_late(self) -> None:
        self.one(requests=(Request.SHUTDOWN,))

    @rule(periods=st.integers(1, 40))
    def joint_state_is_lost(self, periods: int) -> None:
        self.world.state_alive = False
        for _ in range(periods):
            self.one()
        self.world.state_alive = True

    @rule(periods=st.integers(1, 40))
    def policy_dies(self, periods: int) -> None:
        self.world.policy_alive = False
        for _ in range(periods):
            self.one()
        self.world.policy_alive = True

    @rule(seconds=st.sampled_from([-100.0, -1.0, 0.5, 30.0]))
    def clock_jumps(self, seconds: float) -> None:
        self.world.ros_ns += round(seconds * S)
        self.one()

    @rule(dt_s=st.sampled_from([0.0, 0.0005, 0.003, 0.04, 0.08, 0.5]))
    def timer_is_uneven(self, dt_s: float) -> None:
        self.one(dt_s=dt_s)

    @rule(periods=st.integers(1, 3))
    def someone_else_publishes(self, periods: int) -> None:
        for _ in range(periods):
            self.one(foreign_publishers=("/other",))
            assert self.world.last.command is None

    @rule(periods=st.integers(1, 20))
    def robot_is_not_ready(self, periods: int) -> None:
        for _ in range(periods):
            self.one(unmet="not in stance")

    @rule(offset=st.floats(-0.3, 0.3))
    def someone_pushes_the_arms(self, offset: float) -> None:
        limits = self.world.settings.limits
        self.world.pose = np.clip(self.world.pose + offset, limits.lower, limits.upper)
        self.one()

    @invariant()
    def reason_and_state_agree(self) -> None:
        last = self.world.last
        assert (last.reason is not None) == (last.state in (State.STOPPING, State.HOLDING))

    @invariant()
    def a_plan_exists_only_in_motion(self) -> None:
        executor = self.world.executor
        if executor.plan is not None:
            assert executor.state in (State.RAMPING, State.FOLLOWING)
        if executor.state is State.FOLLOWING:
            assert executor.plan is not None

    @invariant()
    def an_emergency_stop_keeps_everything_still(self) -> None:
        if self.e_stopped:
            assert self.world.last.state in (State.STOPPING, State.HOLDING)
            assert self.world.last.reason is StopReason.E_STOP

    @invariant()
    def a_shutdown_is_final(self) -> None:
        if self.shut_down:
            assert self.world.last.state in (State.STOPPING, State.HOLDING)

    @invariant()
    def holding_is_at_rest_unless_it_gives_way(self) -> None:
        world = self.world
        if world.last.state is State.HOLDING and not world.executor.relaxed:
            assert world.last.at_rest


ExecutorMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


class TestExecutorMachine(ExecutorMachine.TestCase):  # type: ignore[misc,name-defined]
    pass
