"""What is started together, described once; launch files and `kuavo-smolvla bringup` make it processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.paths import PACKAGE, config_dir


@dataclass(frozen=True)
class Argument:
    """One launch argument. Its default's type decides how text is read."""

    name: str
    default: str | float | int | bool
    meaning: str
    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The default as it is written on a command line."""
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)

    def read(self, text: str) -> Any:
        """The value meant by `name:=text`."""
        if isinstance(self.default, bool):
            if text.lower() not in ("true", "false"):
                raise UsageError(f"{self.name} is true or false, not '{text}'")
            return text.lower() == "true"
        try:
            value = type(self.default)(text)
        except ValueError:
            raise UsageError(f"{self.name} is a number such as {self.default}, not '{text}'") from None
        if self.choices and value not in self.choices:
            raise UsageError(f"{self.name} is one of {', '.join(self.choices)}, not '{text}'")
        return value


@dataclass(frozen=True)
class Process:
    """One node in a process of its own; with `command`, another program that is no node."""

    name: str
    executable: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    namespace: str = ""
    package: str = PACKAGE
    command: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        return f"kuavo_smolvla_ros.nodes.{self.executable}"


@dataclass(frozen=True)
class Bringup:
    """A thing one can start: its arguments, and the processes they make."""

    name: str
    meaning: str
    arguments: tuple[Argument, ...]
    make: Callable[[Mapping[str, Any]], tuple[Process, ...]]

    def processes(self, given: Mapping[str, Any]) -> tuple[Process, ...]:
        """The processes for these arguments, defaults filled in."""
        known = {a.name: a for a in self.arguments}
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise UsageError(f"{self.name} has no argument '{unknown[0]}'; it has {', '.join(known)}")
        values = {name: given.get(name, argument.default) for name, argument in known.items()}
        read = {n: known[n].read(v) if isinstance(v, str) else v for n, v in values.items()}
        return self.make(read)


ROBOT = Argument("robot", "kuavo_sim", "robot description: a shipped name or a YAML file")
NAMESPACE = Argument("namespace", "", "namespace of all nodes")
LOOPBACK = Argument("loopback", False, "keep all traffic on this machine")
SIM_TIME = Argument("use_sim_time", False, "take the time from /clock")
POLICY_ARGUMENTS = (
    Argument("checkpoint", "", "folder or hub id of the policy"),
    Argument("instruction", "", "what to do: a sentence or the name of a task"),
    Argument("mode", "realtime", "think while moving, or in turns", ("realtime", "synchronous")),
    Argument("device", "", "cpu or cuda; empty: as the checkpoint says"),
    Argument("dry_run", True, "decide everything and command nothing: set to false once all looks right"),
    Argument("limit_profile", "", "limits: hardware, default, first_run; empty: as described"),
    Argument("transition", "blend", "on a new task", ("finish_chunk", "blend", "stop_then_switch")),
)
SIM_ARGUMENTS = (
    Argument("task", 1, "task to simulate: 1 to 4, or one of your own (KUAVO_TASKS)"),
    Argument("level", "easy", "how far things vary", ("easy", "contest")),
    Argument("seed", 0, "seed of the episode"),
    Argument("expert", False, "let the scripted expert move the robot"),
    Argument("real_time_factor", 1.0, "simulated seconds per second; 0: as fast as possible"),
    Argument("picture_height", 0, "height of the pictures; 0: as described"),
    Argument("picture_width", 0, "width of the pictures; 0: as described"),
)
RECORD_ARGUMENTS = (
    Argument("folder", "outputs/bags", "where episodes go, a folder for each"),
    Argument("task", "", "task of the episodes: one of the curriculum, a YAML file, or a name of your own"),
    Argument("instruction", "", "sentence of the episodes; empty: the task's own"),
    Argument("min_free_gb", 2.0, "GB left free on that disk"),
)

GAZEBO_ARGUMENTS = (
    Argument("world", "", "world to simulate (SDF); empty: the shipped one"),
    Argument("bridge", "", "topics for ros_gz_bridge (YAML); empty: the shipped list, for kuavo_gazebo"),
    Argument("headless", False, "no window"),
)


def _policy(values: Mapping[str, Any]) -> tuple[Process, ...]:
    common = {"robot": values["robot"], "use_sim_time": values["use_sim_time"]}
    thinking = common | {name: values[name] for name in ("checkpoint", "instruction", "mode", "device")}
    moving = common | {name: values[name] for name in ("dry_run", "limit_profile", "transition")}
    namespace = values["namespace"].strip("/")
    moving["policy"] = f"/{namespace}/policy" if namespace else "/policy"
    return (
        Process("executor", "executor_node", moving, namespace),
        Process("policy", "policy_node", thinking, namespace),
    )


def _sim(values: Mapping[str, Any]) -> tuple[Process, ...]:
    parameters = {argument.name: values[argument.name] for argument in SIM_ARGUMENTS}
    simulator = Process("kuavo_sim", "sim_node", parameters | {"robot": values["sim_robot"]})
    if not values["checkpoint"]:
        return (simulator,)
    return (simulator, *_policy({**values, "use_sim_time": True}))


def _gazebo(values: Mapping[str, Any]) -> tuple[Process, ...]:
    folder = config_dir() / "gazebo"
    world = values["world"] or str(folder / "kuavo.sdf")
    topics = {"config_file": values["bridge"] or str(folder / "bridge.yaml")}
    options = ("-r", "-s") if values["headless"] else ("-r",)
    gazebo = (
        Process("gazebo", command=("gz", "sim", *options, world)),
        Process("gazebo_bridge", "parameter_bridge", topics, package="ros_gz_bridge"),
    )
    if not values["checkpoint"]:
        return gazebo
    return (*gazebo, *_policy({**values, "use_sim_time": True}))


def _record(values: Mapping[str, Any]) -> tuple[Process, ...]:
    parameters = {argument.name: values[argument.name] for argument in RECORD_ARGUMENTS}
    parameters |= {"robot": values["robot"], "use_sim_time": values["use_sim_time"]}
    return (Process("recorder", "recorder_node", parameters, values["namespace"].strip("/")),)


BRINGUPS = {
    bringup.name: bringup
    for bringup in (
        Bringup(
            "policy",
            "policy and executor, for a robot",
            (ROBOT, *POLICY_ARGUMENTS, NAMESPACE, SIM_TIME),
            _policy,
        ),
        Bringup(
            "sim",
            "a simulated Kuavo; with a checkpoint, policy and executor too",
            (
                ROBOT,
                Argument("sim_robot", "kuavo_mobile", "description whose topics the simulator plays"),
                *SIM_ARGUMENTS,
                *POLICY_ARGUMENTS,
                NAMESPACE,
            ),
            _sim,
        ),
        Bringup(
            "gazebo",
            "the Kuavo in a Gazebo world; with a checkpoint, policy and executor too",
            (
                Argument("robot", "kuavo_gazebo", "robot description whose topics the bridge carries"),
                *GAZEBO_ARGUMENTS,
                *POLICY_ARGUMENTS,
                NAMESPACE,
            ),
            _gazebo,
        ),
        Bringup(
            "record",
            "records episodes of a robot or simulator that is running",
            (ROBOT, *RECORD_ARGUMENTS, NAMESPACE, SIM_TIME),
            _record,
        ),
    )
}
