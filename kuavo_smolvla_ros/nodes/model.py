"""Loading a policy for a node: held against the robot's description, warmed, with progress in the log."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes.instruction import Instruction, known_tasks
from kuavo_smolvla_ros.robot.description import RobotSpec

PROGRESS_EVERY_S = 2.0
WARM_UPS = 2


@dataclass
class LoadedPolicy:
    """A warmed policy, and what the node must know of it."""

    runner: Any
    instructions: dict[str, tuple[str, ...]]  # by task, its own sentence first
    n_action_steps: int
    execution_horizon: int
    check_instruction: Callable[[str], None]
    latency_s: float = 0.0  # of a chunk while warming up

    def problem_with(self, instruction: Instruction) -> str | None:
        """Why the policy cannot read this sentence (too long for its tokenizer), or None."""
        try:
            self.check_instruction(instruction.sentence)
        except UserError as error:
            return str(error)
        return None

    def free(self) -> None:
        """Give the memory back."""
        self.runner = None
        gc.collect()


def load_policy(
    spec: RobotSpec,
    checkpoint: str,
    *,
    device: str | None,
    log: Callable[[str], None],
    overrides: Mapping[str, Any] | None = None,
) -> LoadedPolicy:
    """Load, with some settings replaced, compare with the robot, and run on empty pictures until warm."""
    if not checkpoint:
        raise UserError("no checkpoint: set the parameter 'checkpoint' to a folder or a hub id")
    started = time.monotonic()
    done = threading.Event()
    reporter = threading.Thread(target=_report_progress, args=(done, started, checkpoint, log), daemon=True)
    reporter.start()
    try:
        policy = _load(spec, checkpoint, device, overrides)
        log(f"loaded {checkpoint} in {time.monotonic() - started:.1f} s, warming up")
        latency_s = _warm_up(spec, policy)
        log(f"warm: one chunk takes {latency_s * 1000:.0f} ms")
        policy.latency_s = latency_s
    finally:
        done.set()
        reporter.join()
    return policy


def _report_progress(
    done: threading.Event, started: float, checkpoint: str, log: Callable[[str], None]
) -> None:
    while not done.wait(PROGRESS_EVERY_S):
        log(f"still loading {checkpoint} ({time.monotonic() - started:.0f} s)")


def _load(
    spec: RobotSpec, checkpoint: str, device: str | None, overrides: Mapping[str, Any] | None
) -> LoadedPolicy:
    # torch and lerobot take seconds to import; the node answers its services before that.
    from kuavo_smolvla_ros.policy.language import TASK_INSTRUCTIONS, check_instructions
    from kuavo_smolvla_ros.policy.runtime import PolicyRunner
    from kuavo_smolvla_ros.policy.steps import TokenizeInstruction

    runner = PolicyRunner.load(
        checkpoint, device=device, robot_fingerprint=spec.fingerprint, overrides=overrides
    )
    config = runner.policy.config
    wanted, there = sorted(config.cameras), sorted(spec.cameras)
    if wanted != there:
        raise UserError(f"the policy sees {', '.join(wanted)}, the robot has {', '.join(there)}")
    (reader,) = (step for step in runner.preprocessor.steps if isinstance(step, TokenizeInstruction))
    return LoadedPolicy(
        runner=runner,
        instructions=known_tasks(config.tasks, config.instructions, TASK_INSTRUCTIONS),
        n_action_steps=config.n_action_steps,
        execution_horizon=config.rtc_execution_horizon,
        check_instruction=lambda text: check_instructions(reader.tokenizer, [text], reader.max_length),
    )


def _warm_up(spec: RobotSpec, policy: LoadedPolicy) -> float:
    """Seconds for a chunk once all that is built at first use has been built."""
    images = {role: np.zeros((c.height, c.width, 3), np.uint8) for role, c in spec.cameras.items()}
    limits = spec.limits(spec.state_names)
    sentence = next(iter(policy.instructions.values()), ("warm up",))[0]
    latency_s = 0.0
    for _ in range(WARM_UPS):
        started = time.monotonic()
        policy.runner.chunk(images, (limits.lower + limits.upper) / 2, sentence, seed=0)
        latency_s = time.monotonic() - started
    return latency_s
