"""Demonstrations of a task, straight from the simulator: many, small, and with disturbed arms.

The scripted expert does not look back: it tells the arms where to be when. So the arms are pushed off its
way now and then, and what is stored is what the expert told, from where the arms then were: how to come back
is what a policy has to learn that will never be exactly on the way (Laskey et al., DART, 2017).

Recording over ROS and video are left out here on purpose: the demonstrations' files hold what the policy
would be given of them. `make demo` is the road with recordings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.cameras import sizes
from kuavo_smolvla_ros.sim.command import action_limits
from kuavo_smolvla_ros.sim.experts import make_expert
from kuavo_smolvla_ros.sim.simulation import ARM_INDICES, Simulation
from kuavo_smolvla_ros.sim.tasks import make_task

ABOUT = "about.json"
ARRAYS = ("pictures", "states", "actions", "places", "episodes")
FIRST_SEED = 1_000_000
"""Demonstrations have seeds from here on; trials have those below."""
NUDGE_KEEPS = 0.7
"""Share of a disturbance that is left after one action: it comes and goes within half a second."""
NUDGE_TURNS = 0.05
"""Chance per action that the arms begin, or cease, to be disturbed."""


@dataclass(frozen=True)
class Gathering:
    """What to gather of one task."""

    task: int
    episodes: int
    level: str = "easy"
    # Rendered twice as large and averaged, as the policy makes a picture smaller.
    height: int = 48
    width: int = 64
    nudge_rad: float = 0.02
    after_success_s: float = 0.8


def cameras(height: int, width: int) -> dict[str, tuple[int, int]]:
    """Sizes to render at for pictures that are stored so large."""
    return dict(sizes(2 * height, 2 * width))


def gather(wanted: Gathering, folder: Path, progress: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Store the demonstrations in `folder`, where they are not there already; returns what is there.

    Where fewer of the same are there, they are added to. `progress` is called after each episode.
    """
    about = folder / ABOUT
    taken: dict[str, list[NDArray[Any]]] = {name: [] for name in ARRAYS}
    tried, kept = 0, 0
    if about.is_file():
        told: dict[str, Any] = json.loads(about.read_text())
        if told["wanted"] == asdict(wanted):
            return told
        if told["wanted"] == asdict(replace(wanted, episodes=told["wanted"]["episodes"])) and (
            told["wanted"]["episodes"] < wanted.episodes
        ):
            tried, kept = told["tried"], told["wanted"]["episodes"]
            taken = {name: [np.load(folder / f"{name}.npy")] for name in ARRAYS}
            for _ in range(kept):
                progress()
    sim = Simulation(make_task(wanted.task, wanted.level), cameras(wanted.height, wanted.width))
    while kept < wanted.episodes:
        episode = demonstrate(sim, FIRST_SEED + tried, wanted)
        tried += 1
        if episode is None:  # pushed so far that the expert, who does not look back, missed
            continue
        episode["episodes"] = np.full(len(episode["states"]), kept, np.int64)
        for name, part in episode.items():
            taken[name].append(part)
        kept += 1
        progress()
    folder.mkdir(parents=True, exist_ok=True)
    about.unlink(missing_ok=True)  # while the arrays change nobody may take them for whole
    for name, parts in taken.items():
        np.save(folder / f"{name}.npy", np.concatenate(parts))
    told = {
        "wanted": asdict(wanted),
        "tried": tried,
        "frames": sum(len(part) for part in taken["episodes"]),
        "name": sim.task.name,
        "cameras": list(sim.cameras.sizes),
        "action_names": list(sim.action_names),
        "things": things(sim),
    }
    sim.close()
    about.write_text(json.dumps(told, indent=2) + "\n")  # last: who finds it finds all
    return told


def demonstrate(sim: Simulation, seed: int, wanted: Gathering) -> dict[str, NDArray[Any]] | None:
    """One episode's arrays, or None where the expert failed."""
    sim.reset(seed)
    expert = make_expert(sim, seed)
    rng = np.random.default_rng([seed, 5])
    lower, upper = action_limits(sim.task.mobile)
    roles, names = list(sim.cameras.sizes), things(sim)
    # What holds at the first moment: the arms as they are, and a base that stands where it is.
    holds = np.concatenate([sim.target, np.zeros(len(lower) - len(sim.target))])
    nudge, nudged = np.zeros(len(ARM_INDICES)), False
    rows: dict[str, list[NDArray[Any]]] = {name: [] for name in ARRAYS if name != "episodes"}
    done_s: float | None = None
    until_s = sim.task.time_limit_s
    while sim.time_s < until_s:
        action = expert.action()
        pictures = sim.images()
        rows["pictures"].append(np.stack([halved(pictures[role]) for role in roles]))
        rows["states"].append(sim.state().astype(np.float32))
        rows["actions"].append(holds.astype(np.float32))
        rows["places"].append(places(sim, names).astype(np.float32))
        # An action is where to be at its end. A recording holds what was commanded when the picture was
        # taken, which is where the action before has led.
        holds = action
        nudged ^= bool(rng.random() < NUDGE_TURNS)
        push = rng.normal(0.0, wanted.nudge_rad, len(nudge)) if nudged else 0.0
        nudge = NUDGE_KEEPS * nudge + math.sqrt(1 - NUDGE_KEEPS**2) * push
        moved = action.copy()
        moved[ARM_INDICES] += nudge
        sim.act(np.clip(moved, lower, upper))
        if done_s is None and sim.score().success:
            done_s = sim.time_s
            until_s = min(until_s, done_s + wanted.after_success_s)
    return None if done_s is None else {name: np.stack(part) for name, part in rows.items()}


def halved(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Each two by two pixels as their mean: what the policy's own resizing makes of it."""
    height, width, _ = picture.shape
    sums = picture.reshape(height // 2, 2, width // 2, 2, 3).astype(np.uint16).sum((1, 3))
    return ((sums + 2) // 4).astype(np.uint8)


def things(sim: Simulation) -> list[str]:
    """What a scene has that is somewhere else in each episode."""
    model = sim.model
    return [
        model.body(i).name
        for i in range(model.nbody)
        if model.body_mocapid[i] >= 0
        or (model.body_jntnum[i] == 1 and model.jnt_type[model.body_jntadr[i]] == mujoco.mjtJoint.mjJNT_FREE)
    ]


def places(sim: Simulation, names: list[str]) -> NDArray[np.float64]:
    """Where these things and both hands are, seen from the robot (x, y, z each), and where the base is: x, y,
    and the cosine and sine of its yaw, which has no seam there.
    """
    x, y, yaw = sim.base_pose()
    cos, sin = math.cos(yaw), math.sin(yaw)
    to_robot = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
    points = [sim.position(name) for name in names] + [sim.pinch(side)[0] for side in kuavo.SIDES]
    seen = [to_robot @ (point - [x, y, 0.0]) for point in points]
    return np.concatenate([*seen, [x, y, cos, sin]])
