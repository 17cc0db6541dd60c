"""`KuavoSim-v0`: the simulation as a Gymnasium environment with LeRobot's observations and actions.

    import gymnasium, kuavo_smolvla_ros.sim.env
    env = gymnasium.make("KuavoSim-v0", task=1, level="easy")

An observation is `agent_pos` (16 measured joint values) and `pixels` (one picture per camera role); an
action is the next 0.1 s' target of each joint. `obs_type="state"` leaves the pictures out and needs no
OpenGL.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.cameras import overview, sizes
from kuavo_smolvla_ros.sim.command import ARM_WIDTH, CommandError, action_limits
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.task import Level
from kuavo_smolvla_ros.sim.tasks import make_task

ENV_ID = "KuavoSim-v0"
OBS_TYPES = ("pixels_agent_pos", "state")
STATE_SLACK = 0.5
"""Contacts and overshoot take a joint a little past its range, never this far."""
RENDER_SIZE = (480, 640)

Observation = dict[str, Any]


class KuavoSimEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """One task at one level. The reward is the score gained, as a share of 100 points."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / kuavo.POLICY_PERIOD_S)}

    def __init__(
        self,
        task: int = 1,
        level: Level | str = Level.EASY,
        obs_type: str = "pixels_agent_pos",
        observation_height: int = 480,
        observation_width: int = 640,
        render_mode: str | None = None,
    ) -> None:
        if obs_type not in OBS_TYPES:
            raise UsageError(f"obs_type must be one of {', '.join(OBS_TYPES)}, not {obs_type!r}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UsageError(f"render_mode must be rgb_array or None, not {render_mode!r}")
        cameras = sizes(observation_height, observation_width) if obs_type == "pixels_agent_pos" else {}
        self.simulation = Simulation(make_task(task, level), cameras)
        self.render_mode = render_mode
        self.task = self.simulation.task.name
        self.task_description = self.simulation.task.instruction
        self._max_episode_steps = round(self.simulation.task.time_limit_s / kuavo.POLICY_PERIOD_S)
        self._steps = 0
        self._lower, self._upper = action_limits(self.simulation.task.mobile)
        self.action_space = spaces.Box(self._lower.astype(np.float32), self._upper.astype(np.float32))
        self.observation_space = self._make_observation_space()

    def _make_observation_space(self) -> spaces.Dict:
        lower, upper = self._lower[:ARM_WIDTH], self._upper[:ARM_WIDTH]
        parts: dict[str, spaces.Space[Any]] = {
            "agent_pos": spaces.Box(
                (lower - STATE_SLACK).astype(np.float32), (upper + STATE_SLACK).astype(np.float32)
            )
        }
        pictures = {
            role: spaces.Box(0, 255, (*size, 3), np.uint8)
            for role, size in self.simulation.cameras.sizes.items()
        }
        if pictures:
            parts["pixels"] = spaces.Dict(pictures)
        return spaces.Dict(parts)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the episode of a seed; without one, of the next seed in the environment's own sequence."""
        super().reset(seed=seed)
        episode = int(self.np_random.integers(2**31)) if seed is None else seed
        self.simulation.reset(episode)
        self._steps = 0
        return self._observation(), self._info(refused=None, clipped_rad=0.0)

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Execute an action for 0.1 s.

        Values outside the limits are clipped to them, as the robot's executor does with a policy's output.
        Anything that is no number is refused: the arms keep their last target and `info["refused"]` says
        why.
        """
        values = np.asarray(action, dtype=np.float64)
        before = self.simulation.score().total
        refused, clipped = None, 0.0
        if values.shape == self._lower.shape and np.all(np.isfinite(values)):
            inside = np.clip(values, self._lower, self._upper)
            clipped = float(np.abs(values - inside).max())
            values = inside
        try:
            self.simulation.act(values)
        except CommandError as error:
            refused = str(error)
            self.simulation.step(round(kuavo.POLICY_PERIOD_S / kuavo.CONTROL_PERIOD_S))
        self._steps += 1
        score = self.simulation.score()
        truncated = not score.success and self._steps >= self._max_episode_steps
        reward = (score.total - before) / 100.0
        info = self._info(refused, clipped)
        return self._observation(), reward, score.success, truncated, info

    def _observation(self) -> Observation:
        observation: Observation = {"agent_pos": self.simulation.state().astype(np.float32)}
        if self.simulation.cameras.sizes:
            observation["pixels"] = self.simulation.images()
        return observation

    def _info(self, refused: str | None, clipped_rad: float) -> dict[str, Any]:
        score = self.simulation.score()
        info: dict[str, Any] = {
            "is_success": score.success,
            "score": score.total,
            "clipped": clipped_rad,
            "task": self.task,
        }
        if refused is not None:
            info["refused"] = refused
        return info

    def render(self) -> NDArray[np.uint8] | None:
        """The scene from beside the robot."""
        if self.render_mode is None:
            return None
        sim = self.simulation
        return sim.cameras.picture(sim.data, overview(wide=sim.task.mobile), RENDER_SIZE)

    def close(self) -> None:
        self.simulation.close()


# LeRobot reads `task_description` off what `make` returns, and a wrapper would hide it: without it a language
# policy would silently get an empty instruction.
gymnasium.register(
    id=ENV_ID,
    entry_point="kuavo_smolvla_ros.sim.env:KuavoSimEnv",
    order_enforce=False,
    disable_env_checker=True,
)
