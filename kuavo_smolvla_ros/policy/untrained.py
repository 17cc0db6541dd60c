"""A policy nobody has trained: random weights around a pose, to try out all that is around a policy."""

from __future__ import annotations

from pathlib import Path

from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.dimensions import ACTION, STATE, FeatureStatistics, Statistics
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.robot.description import RobotSpec

REACH = 0.02  # standard deviation of the actions around the pose: the arms stir and go nowhere
HALF_OPEN = 0.3


def save_untrained(spec: RobotSpec, folder: Path, *, pose: str, backbone: str = "tiny") -> Path:
    """Write a checkpoint for this robot that moves a little around one of its named poses."""
    config = KuavoSmolVLAConfig(backbone=backbone, device="cpu", robot_fingerprint=spec.fingerprint)
    cameras = {name: (camera.height, camera.width) for name, camera in spec.cameras.items()}
    config.set_features(len(spec.state_names), len(spec.action_names), cameras)
    config.state_names, config.action_names = list(spec.state_names), list(spec.action_names)

    def around(names: tuple[str, ...], spread: float) -> FeatureStatistics:
        grippers = {name: HALF_OPEN for name in names if spec.joints[name].unit == "fraction"}
        centre = tuple(({**dict.fromkeys(names, 0.0), **grippers} | dict(spec.poses[pose]))[n] for n in names)
        return FeatureStatistics(centre, (spread,) * len(names))

    statistics = Statistics({STATE: around(spec.state_names, 0.2), ACTION: around(spec.action_names, REACH)})
    KuavoSmolVLAPolicy(config, statistics=statistics).save_pretrained(folder)
    return folder
