"""The trained policy drives the simulated arms: policy and executor as nodes, told by sentences what to do.

The policy has learnt little in its minutes. What is shown is what surrounds it: sentences choose the task,
every command stays within limits, a stop brings the arms to rest and only a resume lets them go on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.demo.crew import Crew
from kuavo_smolvla_ros.demo.record import LOGS, ON_AIR_S, ROBOTS, STUCK_S
from kuavo_smolvla_ros.demo.road import Place
from kuavo_smolvla_ros.demo.robots import WALKING
from kuavo_smolvla_ros.demo.train import checkpoint
from kuavo_smolvla_ros.errors import UserError

DRIVES = "drives"
VIDEOS = "videos"
FLIGHTS = "flights"
LOADED_S = 300.0  # importing torch, loading and warming the policy
MOVES_S = 120.0  # from a sentence to the first command, on a machine that is busy with other things
IDLING = 0.05  # real-time factor of the simulator while the policy is loaded: both want the same cores
MOVING = ("following", "ramping")
GOES_ON = ("", "starved", "task_switch")  # the next chunk ends these by itself
SEED = 7  # not among the recorded ones
# A policy of minutes asks for poses far from where the arms are; they ramp there.
REFUSE_ABOVE_RAD = 3.0


@dataclass(frozen=True)
class DriveStep:
    """Some simulated seconds of each task."""

    seconds: float = 5.0
    # Two cores draw three cameras, simulate, think and record: at half the speed all of them keep up.
    real_time_factor: float = 0.5

    name = "drive"
    title = "drive the simulated arms by sentences: policy, executor, simulator and recorder as nodes"

    def settings(self) -> Mapping[str, Any]:
        return asdict(self)

    def commands(self, place: Place) -> Sequence[str]:
        robots = place.root / ROBOTS
        robot, sim_robot = robots / f"{_robot(place)}.yaml", robots / f"{WALKING}.yaml"
        return (
            f"kuavo-smolvla bringup sim robot:={robot} sim_robot:={sim_robot} "
            f"checkpoint:={checkpoint(place)} instruction:={place.told['train']['tasks'][0]} dry_run:=false",
            "ros2 topic pub --once /policy/instruction std_msgs/msg/String '{data: task2_weighing}'",
            "ros2 service call /executor/stop std_srvs/srv/Trigger   # then /executor/resume",
        )

    def run(self, place: Place) -> dict[str, Any]:
        shutil.rmtree(place.root / DRIVES, ignore_errors=True)
        tasks = [entry["task"] for entry in place.told["convert"]["datasets"]]
        with Crew(place.root / LOGS) as crew, Stage(crew, place, self.real_time_factor) as stage:
            told = [stage.drive(task, self.seconds, stops=task == tasks[0]) for task in tasks]
            switch = stage.switch(tasks[-1], tasks[0]) if len(tasks) > 1 else None
            policy, held = stage.policy.now, dict(stage.held)
        place.say(
            f"{policy['chunks']} chunks, each after {float(policy['latency_p50_s']) * 1000:.0f} ms (median)"
        )
        if held:
            reasons = ", ".join(f"{reason} {count} times" for reason, count in held.items())
            place.say(f"held by itself and was resumed: {reasons}; this machine was busy with other things")
        return {
            "tasks": told,
            "switch": switch,
            "real_time_factor": self.real_time_factor,
            "held": held,
            "chunks": int(policy["chunks"]),
            "failures": int(policy["failures"]),
            "latency_p50_s": float(policy["latency_p50_s"]),
            "latency_max_s": float(policy["latency_max_s"]),
        }


def _robot(place: Place) -> str:
    """Whose policy it is: that of the last task, whose actions are the widest."""
    return str(place.told["record"]["episodes"][-1]["robot"])


class Status:
    """The newest status of a node."""

    def __init__(self, remote: Any, node: str) -> None:
        from diagnostic_msgs.msg import DiagnosticStatus
        from rclpy.qos import DurabilityPolicy, QoSProfile

        self.now: dict[str, str] = {}
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        remote.hear(DiagnosticStatus, f"/{node}/status", self._take, latched)

    def _take(self, message: Any) -> None:
        from kuavo_smolvla_ros.nodes.diagnostics import as_dict

        self.now = {**as_dict(message), "message": message.message}


class Stage:
    """Simulator, policy, executor and recorder that are running."""

    def __init__(self, crew: Crew, place: Place, real_time_factor: float) -> None:
        from std_msgs.msg import String

        from kuavo_smolvla_ros.nodes.remote import Remote

        self._crew, self._place = crew, place
        robots = place.root / ROBOTS
        self._robot = robots / f"{_robot(place)}.yaml"
        self._score: dict[str, Any] = {}
        self._factor = float(real_time_factor)
        self.held: Counter[str] = Counter()  # the executor's own reasons to stop, after which it was resumed
        place.say("starting the simulator, the policy and the recorder")
        common = {"robot": self._robot, "use_sim_time": True}
        crew.start(
            "kuavo_sim", "sim_node", robot=robots / f"{WALKING}.yaml", real_time_factor=IDLING,
        )  # fmt: skip
        crew.start("policy", "policy_node", checkpoint=checkpoint(place), device="cpu", **common)
        crew.start(
            "recorder", "recorder_node", folder=place.root / DRIVES, task="drive", min_free_gb=0.5,
            instruction="as told", **common,
        )  # fmt: skip
        self._remote = Remote(crew.domain, alive=crew.check)
        self.policy, self._executor = Status(self._remote, "policy"), Status(self._remote, "executor")
        self._remote.hear(String, "/simulator/score", self._hear_score)

    def _wait_for_all(self) -> None:
        self._remote.wait(lambda: self._score, "the simulator", ON_AIR_S)
        self._remote.wait(lambda: self.policy.now.get("active") == "True", "the policy", LOADED_S)
        self._remote.set("/kuavo_sim", real_time_factor=self._factor)

    def _hear_score(self, message: Any) -> None:
        self._score = json.loads(message.data)

    def drive(self, task: str, seconds: float, stops: bool) -> dict[str, Any]:
        """Set the task's scene, say its sentence, and let the policy drive; once, stop and resume."""
        from kuavo_smolvla_ros.nodes.recording import instruction_of

        sentence = instruction_of(task) or task
        self._crew.stop("executor")
        number = int(task.removeprefix("task").partition("_")[0])
        self._remote.set("/kuavo_sim", task=number, seed=SEED, expert=False)
        self._ask("/simulator/reset")
        self._say(sentence)
        self._executor.now = {}
        self._place.say(f'{task}: "{sentence}"')
        self._crew.start(
            "executor", "executor_node", robot=self._robot, dry_run=False, use_sim_time=True,
            refuse_above=REFUSE_ABOVE_RAD, starvation_latches=False, flight_folder=self._place.root / FLIGHTS,
        )  # fmt: skip
        moving_s = self._timed(lambda: self._follows(task), f"the arms to move for {task}", MOVES_S)
        self._remote.set("/recorder", task=task, instruction=sentence)
        self._remote.wait(self._starts, "the recorder to hear all streams")
        told: dict[str, Any] = {"task": task, "sentence": sentence, "start_s": round(moving_s, 3)}
        self._pass(seconds / 2)
        if stops:
            told |= self._stop_and_resume()
        self._pass(seconds / 2)
        answer = self._ask("/recorder/stop")
        bag = max((self._place.root / DRIVES).glob("episode_*"))
        video = self._place.folder(VIDEOS) / f"drive_{task}.mp4"
        self._film(bag, video)
        told |= {
            "video": str(video.relative_to(self._place.root)),
            "refused_chunks": int(self._executor.now.get("refused_chunks", 0)),
            "score": self._score["total"],
            "success": self._score["success"],
            "recorded": answer,
        }
        parts = [f"drove {seconds:g} simulated seconds", f"{told['score']:.0f} points"]
        if stops:
            parts.append(f"stopped in {told['stop_s'] * 1000:.0f} ms, resumed")
        self._place.say(f"{task}: {', '.join(parts)}")
        return told

    def switch(self, before: str, task: str) -> dict[str, Any]:
        """Say another sentence while the arms move: the first command for it comes so much later."""
        from kuavo_smolvla_ros.nodes.recording import instruction_of

        self._timed(self._moves, "the arms to move", MOVES_S)
        self._say(instruction_of(task) or task)
        took_s = self._timed(lambda: self._follows(task), f"the arms to move for {task}", MOVES_S)
        self._place.say(f"told to change from {before} to {task} while moving: {took_s:.2f} s")
        return {"from": before, "to": task, "seconds": round(took_s, 3)}

    def _stop_and_resume(self) -> dict[str, Any]:
        begun = time.monotonic()
        self._ask("/executor/stop")
        self._timed(lambda: self._executor.now["state"] == "holding", "the arms to rest", MOVES_S)
        stop_s = time.monotonic() - begun
        reason = self._executor.now["reason"]
        begun = time.monotonic()
        self._remote.wait(self._resumes, "the executor to resume", MOVES_S)
        self._timed(self._moves, "the arms to move", MOVES_S)
        resume_s = time.monotonic() - begun
        return {"stop_s": round(stop_s, 3), "stop_reason": reason, "resume_s": round(resume_s, 3)}

    def _resumes(self) -> bool:
        return bool(self._remote.trigger("/executor/resume")[0])

    def _starts(self) -> bool:
        return bool(self._remote.trigger("/recorder/start")[0])

    def _follows(self, task: str) -> bool:
        return self._moves() and self._executor.now.get("task") == task

    def _moves(self) -> bool:
        """Whether the arms are led; where the executor stopped them by itself, it is asked to resume.

        On a machine that is too busy it hears nothing of the policy or of the joints for too long, and stops
        as it should.
        """
        now = self._executor.now
        if now.get("state") == "holding" and now.get("reason") not in GOES_ON and self._resumes():
            self.held[now["reason"]] += 1
        return now.get("state") in MOVING

    def _say(self, sentence: str) -> None:
        from std_msgs.msg import String

        self._remote.say("/policy/instruction", String(data=sentence))

    def _timed(self, condition: Callable[[], bool], what: str, timeout_s: float) -> float:
        begun = time.monotonic()
        try:
            self._remote.wait(condition, what, timeout_s)
        except UserError as error:
            executor, policy = self._executor.now, self.policy.now
            raise UserError(
                f"{error} (executor: {executor.get('message', 'silent')}, refused "
                f"{executor.get('last_refusals', '')}; policy: {policy.get('message', 'silent')})"
            ) from error
        return time.monotonic() - begun

    def _pass(self, seconds: float) -> None:
        """Let simulated time go by."""
        until_s = self._score["time_s"] + seconds

        def over() -> bool:
            self._moves()
            return bool(self._score["time_s"] >= until_s)

        self._remote.wait(over, "simulated time", STUCK_S)

    def _ask(self, service: str) -> str:
        done, answer = self._remote.trigger(service)
        if not done:
            raise UserError(f"{service}: {answer}")
        return str(answer)

    def _film(self, bag: Path, video: Path) -> None:
        from kuavo_smolvla_ros.demo.videos import video_of_recording
        from kuavo_smolvla_ros.robot.spec import load_spec

        video_of_recording(bag, load_spec(str(self._robot)), video)

    def __enter__(self) -> Stage:
        try:
            self._wait_for_all()
        except BaseException:
            self._remote.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remote.close()
