"""What this machine has: one small probe per thing, each tried rather than looked up."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from kuavo_smolvla_ros import dds, paths

MIN_DISK_GB = 20  # a converted task and two checkpoints
MIN_SHARED_MEMORY_MB = 512  # 64 MB per ROS process, for a handful of processes
CORE, ROS, SIM, TRAIN = "core", "ros", "sim", "train"
NEEDS = (CORE, ROS, SIM, TRAIN)
WEIGHTS = {
    "lerobot/smolvla_base": "starting stage 1 from the pretrained policy",
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": "training and running a full-size policy",
}


class AbsentError(Exception):
    """A probe's answer when the thing is absent or does not work: what was seen."""


@dataclass(frozen=True)
class Probe:
    """`look` returns what it found or raises; the texts say what its absence means."""

    name: str
    need: str
    look: Callable[[], str]
    disables: str
    get: str


@dataclass(frozen=True)
class Finding:
    name: str
    need: str
    ok: bool
    found: str
    disables: str
    get: str


def examine(probe: Probe) -> Finding:
    try:
        return Finding(probe.name, probe.need, True, probe.look(), "", "")
    except Exception as error:  # whatever a broken installation raises is the finding
        reason = str(error).strip().splitlines()
        found = reason[0] if reason else type(error).__name__
        return Finding(probe.name, probe.need, False, found, probe.disables, probe.get)


def _python() -> str:
    text = f"{sys.version.split()[0]} ({sys.prefix})"
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        raise AbsentError(text)
    return text


def _packages(*names: str) -> Callable[[], str]:
    """Imports the modules and tells their versions."""

    def look() -> str:
        found = []
        for name in names:
            import_module(name)
            found.append(f"{name} {version(name)}")
        return ", ".join(found)

    return look


def _arrays() -> str:
    import numpy
    import yaml

    return f"numpy {numpy.__version__}, PyYAML {yaml.__version__}"


def _images() -> str:
    import cv2

    return f"OpenCV {cv2.__version__}"


def _configuration() -> str:
    robots = sorted(path.stem for path in (paths.config_dir() / "robot").glob("[!_]*.yaml"))
    if not robots:
        raise AbsentError(f"no robot description in {paths.config_dir() / 'robot'}")
    return f"{paths.config_dir()}: {', '.join(robots)}"


def _ros() -> str:
    distro = os.environ.get("ROS_DISTRO", "")
    if os.environ.get("ROS_VERSION") == "1":
        raise AbsentError(f"ROS 1 ({distro}) is sourced; its message packages hide those of ROS 2")
    import rclpy

    import_module("sensor_msgs.msg")
    import_module("trajectory_msgs.msg")
    return f"{f'ROS 2 {distro}, sourced' if distro else 'wheels'}: rclpy in {Path(rclpy.__file__).parents[1]}"


def _rmw() -> str:
    from rclpy.utilities import get_rmw_implementation_identifier

    name = get_rmw_implementation_identifier()
    if "fastrtps" not in name:
        raise AbsentError(f"{name}: the shipped DDS profile has no effect on it")
    profile = dds.own_profile(os.environ)
    return f"{name}, profile {profile}" if profile else f"{name}, profile applied by launch files and bringup"


def _shared_memory() -> str:
    size_mb = shutil.disk_usage("/dev/shm").total // 2**20
    if size_mb < MIN_SHARED_MEMORY_MB:
        raise AbsentError(f"/dev/shm has {size_mb} MB, {MIN_SHARED_MEMORY_MB} MB are needed")
    return f"/dev/shm has {size_mb} MB"


def _disk() -> str:
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    if free_gb < MIN_DISK_GB:
        raise AbsentError(f"{free_gb:.0f} GB free in {Path.cwd()}, {MIN_DISK_GB} GB are needed")
    return f"{free_gb:.0f} GB free in {Path.cwd()}"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise AbsentError(f"none that torch {torch.__version__} can use")
    count = torch.cuda.device_count()
    memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    return f"{count} x {torch.cuda.get_device_name(0)}, {memory_gb:.0f} GB, CUDA {torch.version.cuda}"


def _video() -> str:
    import_module("lerobot.datasets.video_utils")
    from kuavo_smolvla_ros.video_decoder import BACKENDS, choose_video_backend, try_backends

    chosen = choose_video_backend()
    failed = [f"{name} fails ({reason})" for name, reason in try_backends().items() if reason]
    fastest = "; ".join(failed) or f"the fastest of {len(BACKENDS)}"
    return f"{chosen} ({fastest})"


def _rendering() -> str:
    import mujoco

    from kuavo_smolvla_ros.sim.gl import choose_backend, make_context

    backend = choose_backend()
    context = make_context(32, 32)
    try:
        model = mujoco.MjModel.from_xml_string("<mujoco/>")
        mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100).free()
    finally:
        context.free()
    return f"MuJoCo {mujoco.__version__} renders with {backend}"


def _weights(repository: str) -> Callable[[], str]:
    def look() -> str:
        from huggingface_hub import constants, try_to_load_from_cache

        found = try_to_load_from_cache(repository, "model.safetensors")
        if not isinstance(found, str):
            raise AbsentError(f"not in {constants.HF_HUB_CACHE}")
        return f"{Path(found).resolve().stat().st_size / 1e9:.2f} GB in {constants.HF_HUB_CACHE}"

    return look


SETUP = "make setup"
PROBES = (
    Probe("Python", CORE, _python, "everything", "make setup PYTHON=python3.11 (3.10 to 3.12 work)"),
    Probe("configuration", CORE, _configuration, "everything", f"install again: {SETUP}, or colcon build"),
    Probe("arrays, YAML", CORE, _arrays, "everything", SETUP),
    Probe("images", CORE, _images, "decoding camera images", SETUP),
    Probe("bags", TRAIN, _packages("rosbags", "mcap"), "reading and converting bags", f"{SETUP} EXTRAS=bags"),
    Probe("ROS 2", ROS, _ros, "nodes, live checks, bringup", f"{SETUP}, in a shell without ROS 1 sourced"),
    Probe("middleware", ROS, _rmw, "raw images without losses", "export RMW_IMPLEMENTATION=rmw_fastrtps_cpp"),
    Probe(
        "shared memory",
        ROS,
        _shared_memory,
        "raw images between processes without losses",
        "docker run --shm-size=1g, or: mount -o remount,size=1G /dev/shm",
    ),
    Probe("torch", TRAIN, _packages("torch", "torchvision"), "policies and training", SETUP),
    Probe(
        "GPU",
        "",
        _gpu,
        "training in hours and fast inference (a CPU does both slowly)",
        "an NVIDIA driver, and torch's CUDA build (make setup without TORCH_INDEX)",
    ),
    Probe("LeRobot", TRAIN, _packages("lerobot", "transformers"), "policies, datasets and training", SETUP),
    Probe("video decoder", TRAIN, _video, "reading datasets with video", "apt-get install ffmpeg"),
    Probe("simulator", SIM, _packages("mujoco", "mink"), "simulation, bringup without a robot", SETUP),
    Probe(
        "rendering",
        SIM,
        _rendering,
        "cameras in simulation (physics still runs)",
        "make system-deps, as root",
    ),
    Probe(
        "disk", "", _disk, "converting a task's bags and keeping checkpoints", "free some, or another disk"
    ),
    *(
        Probe(
            f"weights {repository.split('/')[1].split('-')[0]}",
            "",
            _weights(repository),
            disables,
            f"huggingface-cli download {repository}, or give a local folder",
        )
        for repository, disables in WEIGHTS.items()
    ),
)
