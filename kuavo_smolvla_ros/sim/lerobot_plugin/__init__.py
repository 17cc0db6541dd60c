"""Makes `KuavoSim-v0` known to LeRobot's own commands:

    lerobot-eval --env.discover_packages_path=kuavo_smolvla_ros.sim.lerobot_plugin --env.type=kuavo_sim \\
        --env.number=1 --env.level=easy --policy.path=outputs/train/.../best \\
        --eval.n_episodes=20 --eval.batch_size=1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.cameras import ROLES
from kuavo_smolvla_ros.sim.command import action_names
from kuavo_smolvla_ros.sim.env import ENV_ID
from kuavo_smolvla_ros.sim.tasks import make_task


@EnvConfig.register_subclass("kuavo_sim")
@dataclass
class KuavoSimEnvConfig(EnvConfig):
    """One of the tasks (`number`) at a level, seen through three cameras."""

    number: int = 1
    level: str = "easy"
    fps: int = round(1 / kuavo.POLICY_PERIOD_S)
    observation_height: int = 480
    observation_width: int = 640
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            ACTION: ACTION,
            "agent_pos": OBS_STATE,
            **{f"pixels/{role}": f"{OBS_IMAGES}.{role}" for role in ROLES},
        }
    )

    def __post_init__(self) -> None:
        task = make_task(self.number, self.level)
        picture = (self.observation_height, self.observation_width, 3)
        self.task = task.name
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (len(action_names(task.mobile)),)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (len(kuavo.STATE_NAMES),)),
            **{f"pixels/{role}": PolicyFeature(FeatureType.VISUAL, picture) for role in ROLES},
        }

    @property
    def gym_id(self) -> str:
        return ENV_ID

    @property
    def package_name(self) -> str:
        return "kuavo_smolvla_ros.sim.env"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {
            "task": self.number,
            "level": self.level,
            "observation_height": self.observation_height,
            "observation_width": self.observation_width,
            "render_mode": "rgb_array",
        }
