"""Episodes recorded as on a robot: the simulator and the recorder are nodes, all between them goes over ROS.

The scripted expert sits in the simulator's process, because it looks at the world and not at pictures. Each
of its commands is published on the robot's command topics, where the recorder hears it like any other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.demo.crew import Crew
from kuavo_smolvla_ros.demo.road import Place
from kuavo_smolvla_ros.demo.robots import WALKING, describe, robot_of
from kuavo_smolvla_ros.errors import UserError

RECORDINGS = "recordings"
ROBOTS = "robots"
LOGS = "logs"
ATTEMPTS = 3
ON_AIR_S = 60.0  # until a node that starts answers: importing and compiling a scene takes seconds
READY_S = 30.0
AFTER_SUCCESS_S = 0.5  # simulated; what is done should be seen to stay done
SETTLE_S = 0.1  # simulated; a picture of the scene before it was set anew may be on its way
STUCK_S = 600.0  # on the clock; an episode takes some seconds where the machine has time for it


@dataclass(frozen=True)
class RecordStep:
    """Some episodes of each task."""

    tasks: tuple[int, ...] = (1, 2, 3, 4)
    episodes: int = 2
    first_seed: int = 0
    height: int = 240
    width: int = 320
    # 0: as fast as this machine draws. The simulator then waits for its cameras and leaves no picture out,
    # however busy the machine is.
    real_time_factor: float = 0.0

    name = "record"
    title = "record episodes of each task: simulator and recorder over ROS, scripted experts move the arms"

    def settings(self) -> Mapping[str, Any]:
        return {**asdict(self), "tasks": list(self.tasks)}

    def commands(self, place: Place) -> Sequence[str]:
        task = _task(self.tasks[0])
        return (
            f"kuavo-smolvla bringup sim task:={task.number} expert:=true sim_robot:={WALKING}",
            f"kuavo-smolvla bringup record task:={task.name} use_sim_time:=true folder:=outputs/bags",
            "ros2 service call /recorder/start std_srvs/srv/Trigger   # and /recorder/stop",
        )

    def run(self, place: Place) -> dict[str, Any]:
        robots = describe(place.root / ROBOTS, self.height, self.width)
        shelf = Shelf(place.root / RECORDINGS, self.settings())
        with Crew(place.root / LOGS) as crew:
            studio: Studio | None = None
            try:
                for task in map(_task, self.tasks):
                    for number in range(self.episodes):
                        if (told := shelf.has(task.name, number)) is not None:
                            place.say(f"{_line(told)}, recorded already")
                            continue
                        if studio is None:
                            place.say("starting the simulator and the recorder")
                            studio = Studio(crew, robots, shelf.root, self.real_time_factor)
                        told = studio.record(task, number, self.first_seed + 1000 * number)
                        shelf.put(told)
                        place.say(_line(told))
            finally:
                if studio is not None:
                    studio.close()
        return {"episodes": shelf.told, "failed_attempts": sum(e["failed"] for e in shelf.told)}


def _line(told: Mapping[str, Any]) -> str:
    return (
        f"{told['task']} (seed {told['seed']}): {told['seconds']:.1f} s, {told['messages']} messages, "
        f"{told['megabytes']:.1f} MB, {told['lost'] or 'none lost'}"
    )


def _task(number: int) -> Any:
    from kuavo_smolvla_ros.sim.tasks import make_task

    return make_task(number)


class Shelf:
    """Finished recordings, and what is known of them; for other settings it is emptied."""

    def __init__(self, root: Path, settings: Mapping[str, Any]) -> None:
        self.root = root
        self._list = root / "episodes.json"
        self.told: list[dict[str, Any]] = []
        if self._list.is_file():
            content = json.loads(self._list.read_text())
            if content["settings"] == dict(settings):
                self.told = content["episodes"]
            else:
                shutil.rmtree(root)
        self._settings = dict(settings)
        root.mkdir(parents=True, exist_ok=True)
        known = {Path(told["bag"]).name for told in self.told}
        for folder in root.glob("*/episode_*"):
            if folder.name not in known or not (folder / "metadata.yaml").is_file():
                shutil.rmtree(folder)  # from a run that was interrupted while it recorded

    def has(self, task: str, number: int) -> dict[str, Any] | None:
        """What was told of an episode that is there."""
        return next((t for t in self.told if (t["task"], t["number"]) == (task, number)), None)

    def put(self, told: dict[str, Any]) -> None:
        self.told.append(told)
        part = self._list.with_suffix(".part")
        content = {"settings": self._settings, "episodes": self.told}
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(self._list)


class Studio:
    """A simulator and a recorder that are running, and the hands that lead them."""

    def __init__(self, crew: Crew, robots: Mapping[str, Path], folder: Path, real_time_factor: float) -> None:
        from std_msgs.msg import String

        from kuavo_smolvla_ros.nodes.remote import Remote

        self._crew, self._robots, self._folder = crew, robots, folder
        self._recorder = "", ""
        self._refusal = ""
        self._score: dict[str, Any] = {}
        crew.start("kuavo_sim", "sim_node", robot=robots[WALKING], real_time_factor=float(real_time_factor))
        self._remote = Remote(crew.domain, alive=crew.check)
        self._remote.hear(String, "/simulator/score", self._hear_score)
        try:
            self._remote.wait(lambda: self._score, "the simulator", ON_AIR_S)
        except BaseException:
            self._remote.close()
            raise

    def _hear_score(self, message: Any) -> None:
        self._score = json.loads(message.data)

    def record(self, task: Any, number: int, seed: int) -> dict[str, Any]:
        """One episode in which the expert succeeds; failed ones are discarded and begun anew."""
        self._use(robot_of(task.number), task.name)
        for failed in range(ATTEMPTS):
            self._begin(task, seed + failed)
            if self._succeeds(task):
                answer = self._ask("/recorder/stop")
                bag = max((self._folder / task.name).glob("episode_*"))
                return {
                    "task": task.name,
                    "number": number,
                    "seed": seed + failed,
                    "failed": failed,
                    "robot": self._recorder[0],
                    "instruction": task.instruction,
                    "bag": str(bag.relative_to(self._folder)),
                    **_counted(bag),
                    "lost": _lost(answer),
                }
            self._ask("/recorder/discard")
        raise UserError(
            f"the scripted expert of {task.name} failed in {ATTEMPTS} episodes from seed {seed} on; see "
            f"{self._folder.parent / LOGS / 'kuavo_sim.log'}"
        )

    def _use(self, robot: str, task: str) -> None:
        """Have a recorder for this robot and task."""
        if (robot, task) == self._recorder:
            return
        self._recorder = robot, task
        self._crew.start(
            "recorder",
            "recorder_node",
            robot=self._robots[robot],
            folder=self._folder / task,
            task=task,
            min_free_gb=0.5,
            use_sim_time=True,
        )

    def _begin(self, task: Any, seed: int) -> None:
        """Set the scene and record from its first moment on."""
        self._remote.set("/kuavo_sim", task=task.number, seed=seed, expert=True)
        # Once for the scene to be built, and for all to have found each other.
        self._reset()
        self._remote.wait(self._starts, "the recorder to hear all streams", READY_S)
        self._ask("/recorder/discard")
        self._reset()
        if not self._starts():
            raise UserError(f"the recorder does not start: {self._refusal}")

    def _starts(self) -> bool:
        done, self._refusal = self._remote.trigger("/recorder/start")
        return done

    def _reset(self) -> None:
        before = self._score
        self._ask("/simulator/reset")
        self._remote.wait(
            lambda: self._score is not before and SETTLE_S <= self._score["time_s"] < 5.0, "the new scene"
        )

    def _succeeds(self, task: Any) -> bool:
        self._remote.wait(
            lambda: self._score["success"] or self._score["time_s"] >= task.time_limit_s,
            f"the end of {task.name}",
            STUCK_S,
        )
        if not self._score["success"]:
            return False
        until_s = self._score["time_s"] + AFTER_SUCCESS_S
        self._remote.wait(lambda: self._score["time_s"] >= until_s, "the simulator", STUCK_S)
        return True

    def _ask(self, service: str) -> str:
        done, answer = self._remote.trigger(service)
        if not done:
            raise UserError(f"{service}: {answer}")
        return answer

    def close(self) -> None:
        self._remote.close()


def _counted(bag: Path) -> dict[str, Any]:
    """Length and size, as the recorder wrote them down."""
    import yaml

    told = yaml.safe_load((bag / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    return {
        "seconds": told["duration"]["nanoseconds"] / 1e9,
        "messages": told["message_count"],
        "megabytes": sum(file.stat().st_size for file in bag.iterdir()) / 1e6,
    }


def _lost(answer: str) -> str:
    """What the recorder says was lost; its answer begins with what was recorded."""
    return "; ".join(part for part in answer.split("; ")[1:] if " lost on " in part)
