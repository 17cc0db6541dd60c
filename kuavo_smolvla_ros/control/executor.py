"""The state machine between chunks and commands: idle, ramping, following, stopping, holding with a reason.

`step` is called once per control period with everything it may depend on, time included, and answers with a
command or with silence. The same inputs give the same decisions. Rules it keeps:

- Commands come from the guard alone, so its limits hold across every change of state.
- There is one way to stop: brake along the present direction, then hold what was commanded last.
- A stop has a named reason and stays until someone asks to resume; the arms then start from where they are.
- Nothing is commanded before a fresh pose is known, nor while someone else commands the robot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kuavo_smolvla_ros.control.chunk import NS_PER_S, ActionChunk, FloatArray, Refusal
from kuavo_smolvla_ros.control.clock import ClockWatch, Tick
from kuavo_smolvla_ros.control.gates import BoolArray
from kuavo_smolvla_ros.control.guard import Guard
from kuavo_smolvla_ros.control.health import Fault, Health
from kuavo_smolvla_ros.control.intake import Intake
from kuavo_smolvla_ros.control.plan import Plan, plan_from_chunk
from kuavo_smolvla_ros.control.reasons import RefusalReason, Request, State, StopReason, Transition
from kuavo_smolvla_ros.control.records import Answer, Decision, Inputs, JointSample
from kuavo_smolvla_ros.control.settings import Settings

# These replace a less urgent reason of a stop that is under way; any other later fault only follows from it.
_OVERRIDING = (
    StopReason.E_STOP,
    StopReason.FOREIGN_PUBLISHER,
    StopReason.SHUTDOWN,
    StopReason.OPERATOR_STOP,
)
_MOVING = (State.RAMPING, State.FOLLOWING)


@dataclass(frozen=True)
class _Period:
    """One period's inputs, and whether its measured pose can be relied on."""

    inputs: Inputs
    tick: Tick
    joints: JointSample | None
    trouble: Fault | None

    @property
    def ros_ns(self) -> int:
        return self.inputs.ros_ns


class Executor:
    """Follows chunks safely. No clock, no input or output of its own."""

    def __init__(self, settings: Settings) -> None:
        s = self.settings = settings
        self.guard = Guard(s.limits, max_gap_s=s.max_step_s, groups=s.groups, keep_direction=s.keep_direction)
        self.clock = ClockWatch(s.period_s, s.max_time_factor, s.clock_tolerance_s, s.control_gap_s)
        self.health = Health(s)
        self.intake = Intake(s)
        self.state = State.IDLE
        self.reason: StopReason | None = None
        self.detail = "waiting for the joint state"
        self.plan: Plan | None = None
        self.pending: ActionChunk | None = None
        self.hold: FloatArray | None = None
        self.e_stopped = False
        self.ending = False
        self.relaxed = False
        self.rest_since_ns: int | None = None
        self.policy_heard_ns: int | None = None
        self._just_started = False
        self._chunk_limits, self._chunk_gates = s.chunk_limits, s.chunk_gates
        self._gates = s.gates
        self.unplaced: BoolArray = np.zeros(len(s.names), dtype=np.bool_)
        self._chunk_at = s.index(s.chunk_names)
        self._measured_at = s.index(s.measured_names)
        self._pose_at = s.index(s.pose_names)

    def step(self, now: Inputs) -> Decision:
        """One control period."""
        self._just_started = False
        tick = self.clock.tick(now.ros_ns, now.mono_ns)
        if now.policy_heard_ns is not None:
            self.policy_heard_ns = max(now.policy_heard_ns, self.policy_heard_ns or now.policy_heard_ns)
        trouble = self.health.joint_fault(now)
        period = _Period(now, tick, now.joints if trouble is None else None, trouble)
        self._look_for_faults(period)
        answer = self._take_requests(period)
        self._settle_in(period)
        accepted, refused = self._take_chunks(period)
        late = self._turn_to_pending(period)
        self._look_for_starvation(period)
        limited = self._move(period)
        return self._decision(period, limited, accepted, (*refused, *late), answer)

    @property
    def latched(self) -> bool:
        """Whether the present stop ends only by request."""
        if self.reason is StopReason.STARVED:
            return self.settings.starvation_latches
        return self.reason not in (None, StopReason.TASK_SWITCH)

    def _stop(self, reason: StopReason, detail: str) -> None:
        if self.latched and self.reason is not None:
            order = list(StopReason)
            if reason not in _OVERRIDING or order.index(reason) >= order.index(self.reason):
                return
        self.reason, self.detail, self.plan = reason, detail, None
        if self.latched:
            self.pending = None
        if self.state is not State.HOLDING:
            self.state = State.STOPPING

    def _look_for_faults(self, now: _Period) -> None:
        tick = now.tick
        if tick.fault is StopReason.CLOCK_JUMP:
            # Stamps of the old time cannot be compared with those of the new one.
            self.intake.forget_before(now.ros_ns)
            self.rest_since_ns = None
        others = now.inputs.foreign_publishers
        if others:
            self._stop(StopReason.FOREIGN_PUBLISHER, f"also published by {', '.join(others)}")
            self.guard.release()  # two who command the same arm are worse than either: silence at once
        if self.state is State.IDLE or self.latched:
            return
        fault: Fault | None = None
        if tick.fault is not None:
            fault = tick.fault, tick.detail
        elif now.joints is None:
            fault = now.trouble
        elif now.inputs.unmet is not None:
            fault = StopReason.PRECONDITION, now.inputs.unmet
        elif self.state is not State.RAMPING or self.plan is not None:
            # Ramping without a plan is the way back to the measured pose: far from it, and without a policy.
            fault = self.health.following_error(self.guard.position, now.joints)
            fault = fault or self.health.policy_fault(now.inputs.mono_ns, self.policy_heard_ns)
        if fault is not None:
            self._stop(*fault)

    def _look_for_starvation(self, now: _Period) -> None:
        if self.state in _MOVING and self.plan is not None and now.ros_ns > self.plan.valid_until_ns:
            late_s = (now.ros_ns - self.plan.valid_until_ns) / NS_PER_S
            self._stop(StopReason.STARVED, f"the newest chunk ended {late_s:.3f} s ago")

    def _take_requests(self, now: _Period) -> Answer | None:
        answer: Answer | None = None
        for request in now.inputs.requests:
            if request is Request.E_STOP:
                self.e_stopped = True
                self._stop(StopReason.E_STOP, "emergency stop asked for")
            elif request is Request.SHUTDOWN:
                self.ending = True
                self._stop(StopReason.SHUTDOWN, "the executor is ending")
            elif request is Request.STOP:
                self._stop(StopReason.OPERATOR_STOP, "stop asked for")
            elif request is Request.PAUSE:
                self._stop(StopReason.OPERATOR_PAUSE, "pause asked for")
            elif request is Request.RELEASE_E_STOP:
                was, self.e_stopped = self.e_stopped, False
                answer = Answer(was, "released; resume to go on" if was else "no emergency stop is set")
            elif request is Request.UNPAUSE and self.reason is not StopReason.OPERATOR_PAUSE:
                answer = Answer(False, f"not paused ({self._situation()})")
            else:
                answer = self._resume(now)
        return answer

    def _resume(self, now: _Period) -> Answer:
        obstacle = self._obstacle(now)
        if obstacle is not None:
            return Answer(False, obstacle)
        self.reason, self.detail = None, "resumed, waiting for a chunk"
        self.plan = self.pending = None
        self.intake.forget_before(now.ros_ns)
        self.relaxed = False
        self.state = State.IDLE
        if self.guard.started and now.joints is not None:
            self._hold_arms_at(now.joints)
            if self._distance_to(self.hold) > self.settings.ramp_above:
                self.state = State.RAMPING
        return Answer(True, "resumed from the measured pose")

    def _obstacle(self, now: _Period) -> str | None:
        """Why motion cannot resume now, beginning with the name of the reason where there is one."""
        if self.state is not State.HOLDING:
            return f"nothing to resume ({self._situation()})"
        if self.e_stopped:
            return f"{StopReason.E_STOP.value}: release the emergency stop first"
        if self.ending:
            return f"{StopReason.SHUTDOWN.value}: the executor is ending"
        if now.inputs.foreign_publishers:
            return f"{StopReason.FOREIGN_PUBLISHER.value}: {', '.join(now.inputs.foreign_publishers)}"
        if now.trouble is not None:
            return f"{now.trouble[0].value}: {now.trouble[1]}"
        if now.inputs.unmet is not None:
            return f"{StopReason.PRECONDITION.value}: {now.inputs.unmet}"
        return self._outside(now)

    def _situation(self) -> str:
        return self.state.value if self.reason is None else f"{self.state.value}, {self.reason.value}"

    def _outside(self, now: _Period) -> str | None:
        return None if now.joints is None else self.health.outside_limits(now.joints)

    def _settle_in(self, now: _Period) -> None:
        """While idle without a pose, take the first good one and keep it: to follow it lets arms sink."""
        if self.state is not State.IDLE or self.guard.started:
            return
        outside = self._outside(now)
        if now.joints is None or outside is not None:
            self.detail = outside or (now.trouble[1] if now.trouble is not None else "")
            return
        self.detail = "waiting for a chunk"
        if len(self._measured_at) == len(self.settings.names):
            self._start(now.joints, None, now.ros_ns)

    def _start(self, joints: JointSample, plan: Plan | None, ros_ns: int) -> None:
        """Begin commanding at the measured pose; joints that nobody measures begin at their first target."""
        limits = self.settings.limits
        pose: FloatArray = np.empty(len(limits))
        if plan is not None:
            pose[self._chunk_at] = plan.at(ros_ns)[0]
            pose = np.clip(pose, limits.lower, limits.upper)
        pose[self._measured_at] = joints.positions
        self.unplaced = self._gates.gated.copy()
        self.unplaced[self._measured_at] = False
        self.unplaced &= ~self._gates.open(pose)
        self.guard.start(pose)
        self.hold = pose
        self._just_started = True

    def _hold_arms_at(self, joints: JointSample) -> None:
        """Let the arms go to where they are measured, within limits.

        Grippers keep their command: what they grip holds them open, and a command at the measured opening
        would let go of it.
        """
        hold = self.guard.position.copy()
        measured = hold.copy()
        measured[self._measured_at] = joints.positions
        hold[self._pose_at] = measured[self._pose_at]
        self.hold = hold

    def _distance_to(self, target: FloatArray | None) -> float:
        if target is None or not self._pose_at.size:
            return 0.0
        return float(np.abs(target - self.guard.position)[self._pose_at].max())

    def _take_chunks(self, now: _Period) -> tuple[tuple[int, ...], tuple[Refusal, ...]]:
        accepted: list[int] = []
        refused: list[Refusal] = []
        for item in now.inputs.chunks:
            refusal = item if isinstance(item, Refusal) else self._refuse(item, now)
            if refusal is not None:
                refused.append(refusal)
            elif isinstance(item, ActionChunk):
                accepted.append(item.sequence)
                self.intake.newest = item.key
                self.policy_heard_ns = now.inputs.mono_ns  # a chunk is a sign of life as well
                self._use(item, now)
        return tuple(accepted), tuple(refused)

    def _refuse(self, chunk: ActionChunk, now: _Period) -> Refusal | None:
        """Why no chunk at all, or not this one, may be used now."""
        if self.latched:
            return Refusal(RefusalReason.STOPPED, f"the executor is {self._situation()}", chunk.sequence)
        if now.inputs.unmet is not None:
            return Refusal(RefusalReason.STOPPED, now.inputs.unmet, chunk.sequence)
        outside = self._outside(now) if self.state is State.IDLE else None
        if now.joints is None or outside is not None:
            detail = outside or (now.trouble[1] if now.trouble is not None else "")
            return Refusal(RefusalReason.NO_MEASURED_POSE, detail, chunk.sequence)
        return self.intake.refuse(chunk, now.ros_ns, now.joints)

    def _use(self, chunk: ActionChunk, now: _Period) -> None:
        if self.state in (State.STOPPING, State.HOLDING):
            self.pending = chunk
            return
        if self.plan is None:
            self._adopt(chunk, now)
            return
        if chunk.task != self.plan.task and self.settings.transition is not Transition.BLEND:
            self.pending = chunk
            if self.settings.transition is Transition.STOP_THEN_SWITCH:
                self._stop(StopReason.TASK_SWITCH, f"from '{self.plan.task}' to '{chunk.task}'")
            return
        self.pending = None
        self.plan = self._spliced(self.plan, chunk, now)

    def _spliced(self, plan: Plan, chunk: ActionChunk, now: _Period) -> Plan:
        return plan.splice(chunk, now.ros_ns, self._chunk_limits, self.settings.blend, self._chunk_gates)

    def _adopt(self, chunk: ActionChunk, now: _Period) -> None:
        """Begin a chunk from a hold: there is no older plan to blend with."""
        plan = plan_from_chunk(chunk, self._chunk_limits, self._chunk_gates)
        if not self.guard.started and now.joints is not None:
            self._start(now.joints, plan, now.ros_ns)
        self.plan, self.pending = plan, None
        self.reason, self.detail = None, ""
        near = self._distance_to(self._targets(now)[0]) <= self.settings.ramp_above
        self.state = State.FOLLOWING if near else State.RAMPING

    def _turn_to_pending(self, now: _Period) -> tuple[Refusal, ...]:
        """Use a chunk that waited for the old one to end, or for the arms to come to rest."""
        chunk = self.pending
        if chunk is None:
            return ()
        if self.plan is not None:
            blend_ns = round(self.settings.blend.shortest_s * NS_PER_S)
            ready = now.ros_ns >= self.plan.valid_until_ns - blend_ns
        else:
            ready = self.state is State.HOLDING or self.reason is StopReason.STARVED
        if not ready:
            return ()
        if now.joints is None:
            return ()
        self.pending = None
        refusal = self.intake.refuse_waiting(chunk, now.ros_ns, now.joints)
        if refusal is not None:
            return (refusal,)
        if self.plan is None:
            self._adopt(chunk, now)
        else:
            self.plan = self._spliced(self.plan, chunk, now)
        return ()

    def _targets(self, now: _Period) -> tuple[FloatArray, FloatArray]:
        """Where every joint is wanted now, and how fast that moves."""
        target = self.guard.position if self.hold is None else self.hold.copy()
        velocity: FloatArray = np.zeros(len(target))
        if self.plan is not None and now.tick.dt_s > 0.0:
            before_ns = now.ros_ns - round(now.tick.dt_s * NS_PER_S)
            wanted, _ = self.plan.sample(np.array([before_ns, now.ros_ns], dtype=np.int64))
            target[self._chunk_at] = wanted[1]
            velocity[self._chunk_at] = (wanted[1] - wanted[0]) / now.tick.dt_s
        elif self.plan is not None:
            target[self._chunk_at] = self.plan.at(now.ros_ns)[0]
        return target, velocity

    def _executed(self, target: FloatArray, velocity: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What the guard is asked for: a joint that is not commanded stays at its last command.

        Were it to follow unheard, its first command after that would be a leap. A joint that nobody measures
        begins where it is first sent, as at the start.
        """
        is_open = self._gates.open(target)
        if is_open.all():
            return target, velocity
        begins = self._gates.open(self.guard.position) < is_open
        fresh = self.unplaced & is_open
        target = np.where(is_open, target, self.guard.position)
        self.guard.place(fresh | ~is_open, target)
        self.unplaced = self.unplaced & ~fresh
        return target, np.where(is_open & ~begins, velocity, 0.0)

    def _move(self, now: _Period) -> tuple[str, ...]:
        dt_s = now.tick.dt_s
        if not self.guard.started:
            if self.state is State.STOPPING:
                self.state = State.HOLDING
            return ()
        if self.state is State.STOPPING:
            self._brake(now)
            return ()
        if self.state is State.HOLDING:
            self._relax(now)
        if dt_s == 0.0 or self._just_started:
            return ()  # the first command of all is where the joints are
        target, velocity = self._targets(now)
        following = self.state is State.FOLLOWING
        speed = 1.0 if following else self.settings.ramp_speed
        wanted, pace = (target, velocity) if self.plan is None else self._executed(target, velocity)
        self.guard.step(wanted, dt_s, velocity=pace, speed=speed)
        if self.state is State.RAMPING and self._distance_to(target) <= self.settings.ramp_above:
            self.state = State.IDLE if self.plan is None else State.FOLLOWING
        if not following or not self.guard.limited.any():
            return ()
        return tuple(self.settings.names[i] for i in np.flatnonzero(self.guard.limited))

    def _brake(self, now: _Period) -> None:
        if now.tick.dt_s > 0.0:
            self.guard.brake(now.tick.dt_s)
        if not self.guard.at_rest:
            return
        self.state = State.HOLDING
        self.hold = self.guard.position
        self.rest_since_ns, self.relaxed = now.ros_ns, False
        if self.reason is StopReason.PRECONDITION:
            self.guard.release()  # the robot does not listen; when it does again, the arms may be elsewhere

    def _relax(self, now: _Period) -> None:
        """Once the arms have settled far from the held command, something blocks them: stop pushing."""
        if self.relaxed or now.joints is None:
            return
        if self.rest_since_ns is None:
            self.rest_since_ns = now.ros_ns
        if now.ros_ns - self.rest_since_ns < self.settings.settle_s * NS_PER_S:
            return
        self.relaxed = True
        errors = self.health.pose_errors(self.guard.position, now.joints)
        if errors.size and errors.max() > self.settings.hold_error:
            self._hold_arms_at(now.joints)

    def _decision(
        self,
        now: _Period,
        limited: tuple[str, ...],
        accepted: tuple[int, ...],
        refused: tuple[Refusal, ...],
        answer: Answer | None,
    ) -> Decision:
        counts = self.guard.interventions
        names = self.settings.names
        return Decision(
            ros_ns=now.ros_ns,
            state=self.state,
            reason=self.reason,
            detail=self.detail,
            command=self.guard.position if self.guard.started else None,
            at_rest=self.guard.at_rest,
            task=None if self.plan is None else self.plan.task,
            sequence=None if self.plan is None else self.plan.sequence,
            limited=limited,
            interventions={names[i]: int(counts[i]) for i in np.flatnonzero(counts)},
            accepted=accepted,
            refused=refused,
            answer=answer,
        )
