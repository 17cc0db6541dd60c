"""The Fast DDS profile that lets raw images through, as environment variables for processes that use ROS."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.paths import config_dir

# Fast DDS 2 (Humble, Jazzy) reads the first name, Fast DDS 3 (Kilted and later) the second.
PROFILE_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
# Only the profile decides about the network: asked for "localhost only", rmw_fastrtps adds a transport of its
# own beside the profile's, which opens sockets on every address.
LOOPBACK_VARIABLES = {
    "RMW_IMPLEMENTATION": "rmw_fastrtps_cpp",
    "ROS_AUTOMATIC_DISCOVERY_RANGE": "SYSTEM_DEFAULT",
}
OLD_LOOPBACK_VARIABLE = "ROS_LOCALHOST_ONLY"  # honoured if set, and complained of even where it says 0


def profile(loopback: bool = False) -> Path:
    """The shipped profile; `loopback` is the one whose traffic stays on this machine."""
    path = config_dir() / "dds" / ("fastdds_loopback.xml" if loopback else "fastdds.xml")
    if not path.is_file():
        raise UserError(f"{path}: the Fast DDS profile is missing; install the package again")
    return path


def environment(loopback: bool = False) -> dict[str, str]:
    """The variables a ROS process needs at its start, before `rclpy.init`."""
    variables = dict.fromkeys(PROFILE_VARIABLES, str(profile(loopback)))
    if loopback:
        variables |= LOOPBACK_VARIABLES
        if OLD_LOOPBACK_VARIABLE in os.environ:
            variables[OLD_LOOPBACK_VARIABLE] = "0"
    return variables


def own_profile(environ: Mapping[str, str]) -> str | None:
    """The profile that is already set, by the operator or by a parent process."""
    return next((environ[name] for name in PROFILE_VARIABLES if environ.get(name)), None)


def apply(loopback: bool = False) -> Path:
    """Set the variables in this process and its children; returns the profile in use.

    A profile that the operator set is kept, except for `loopback`: what must stay on this machine stays here.
    """
    chosen = own_profile(os.environ)
    if chosen is not None and not loopback:
        return Path(chosen)
    os.environ.update(environment(loopback))
    return profile(loopback)
