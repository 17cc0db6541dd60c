"""Run an episode of a task in simulation: print its score, film it, watch it, or record it.

With --expert a scripted expert does the task; without, the arms keep their ready pose. With --bags the
expert's episodes become recordings as the recorder node makes them, without ROS. A display is only needed for
--viewer; --video and --bags need an OpenGL library; none needs a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kuavo_smolvla_ros.errors import UsageError, UserError

if TYPE_CHECKING:
    from kuavo_smolvla_ros.sim.simulation import Simulation


FAILURES_IN_A_ROW = 5


class ViewerClosedError(Exception):
    """The viewer's window was closed."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task", type=int, default=1, metavar="N", help="task 1 to 4 (default 1), or one of KUAVO_TASKS"
    )
    parser.add_argument("--level", default="easy", help="easy or contest (default easy)")
    parser.add_argument("--seed", type=int, default=0, help="which episode (default 0)")
    parser.add_argument("--expert", action="store_true", help="let the scripted expert do the task")
    parser.add_argument("--video", type=Path, metavar="FILE", help="write an mp4")
    parser.add_argument("--still", type=Path, metavar="FILE", help="write one picture (.jpg or .png)")
    parser.add_argument("--at", type=float, default=5.0, metavar="S", help="when to take it (default 5 s)")
    parser.add_argument("--bags", type=Path, metavar="FOLDER", help="record the expert's episodes here")
    parser.add_argument("--episodes", type=int, default=1, metavar="N", help="that succeed (default 1)")
    parser.add_argument(
        "--robot", metavar="NAME", help="description to record by, a name or a file (default: the task's own)"
    )
    parser.add_argument("--viewer", action="store_true", help="show it in MuJoCo's viewer, in real time")
    parser.epilog = (
        "examples:\n"
        "  kuavo-smolvla sim --task 1 --expert --video out.mp4\n"
        "  kuavo-smolvla sim --task 1 --bags outputs/bags --episodes 20\n"
        "Exit status: 0 the task succeeded or nobody tried, 1 the expert failed, 2 used wrongly."
    )


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("mujoco") is None:
        raise UserError("the simulator needs MuJoCo; install it with: pip install 'kuavo_smolvla_ros[sim]'")
    from kuavo_smolvla_ros.sim.episode import run_expert, run_still
    from kuavo_smolvla_ros.sim.simulation import Simulation
    from kuavo_smolvla_ros.sim.tasks import make_task

    if args.seed < 0:
        raise UsageError(f"--seed must be 0 or more, not {args.seed}")
    sim = Simulation(make_task(args.task, args.level))
    if args.bags is not None:
        return _record(args, sim)
    play = run_expert if args.expert else run_still
    with ExitStack() as stack:
        watchers: list[Callable[[], None]] = []
        if args.video is not None:
            from kuavo_smolvla_ros.sim.film import Film

            watchers.append(stack.enter_context(Film(args.video, sim)).shoot)
        if args.still is not None:
            from kuavo_smolvla_ros.sim.film import Still

            still = Still(args.still, sim, args.at)
            watchers.append(still.shoot)
        if args.viewer:
            watchers.append(stack.enter_context(_viewer(sim)))

        def watch() -> None:
            for watcher in watchers:
                watcher()

        try:
            episode = play(sim, args.seed, watch=watch)
        except ViewerClosedError:
            print("the viewer was closed before the end of the episode")
            return 0
    for part, points in episode.score.parts.items():
        print(f"{part:24s} {points:5.1f}")
    print(f"{'time':24s} {episode.score.time_points:5.1f}")
    outcome = "succeeded" if episode.score.success else "not done"
    print(
        f"task {args.task} ({args.level}, seed {args.seed}): {outcome} after {episode.time_s:.1f} s, "
        f"{episode.score.total:.1f} points"
    )
    if args.video is not None:
        print(f"video: {args.video}")
    if args.still is not None and not still.written:
        raise UserError(f"no picture was taken: the episode ended before --at {args.at:g} s")
    return 1 if args.expert and not episode.score.success else 0


def _record(args: argparse.Namespace, sim: Simulation) -> int:
    """Episodes from the seed on until so many have succeeded; those that fail are not kept."""
    for package in ("rosbags", "mcap"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--bags needs {package}; install it with: pip install 'kuavo_smolvla_ros[bags]'")
    from kuavo_smolvla_ros.nodes.recording import next_folder
    from kuavo_smolvla_ros.nodes.sim_bag import record_expert
    from kuavo_smolvla_ros.robot.spec import load_spec

    if args.episodes < 1 or args.video or args.still or args.viewer:
        raise UsageError(
            "--bags records --episodes of at least 1, and goes without --video, --still, --viewer"
        )
    spec = load_spec(args.robot or sim.task.robot)
    kept = failed = failed_now = 0
    while kept < args.episodes:
        seed = args.seed + kept + failed
        folder = next_folder(args.bags, sim.task.name)
        episode = record_expert(sim, seed, folder, spec)
        if episode.score.success:
            kept, failed_now = kept + 1, 0
            print(f"{folder}: seed {seed}, succeeded after {episode.time_s:.1f} s")
        else:
            failed, failed_now = failed + 1, failed_now + 1
            print(f"seed {seed}: not done after {episode.time_s:.1f} s, not kept")
            if failed_now == FAILURES_IN_A_ROW:
                raise UserError(f"the expert failed {failed_now} times in a row; watch it with --video FILE")
    sim.close()
    return 0


@contextmanager
def _viewer(sim: Simulation) -> Iterator[Callable[[], None]]:
    """MuJoCo's own window; what it yields shows the present state when its time has come."""
    if sys.platform.startswith("linux") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        raise UsageError("--viewer needs a display, and DISPLAY is not set; use --video FILE instead")
    import mujoco.viewer

    from kuavo_smolvla_ros.sim.cameras import overview

    with mujoco.viewer.launch_passive(sim.model, sim.data) as window:
        view = overview(wide=sim.task.mobile)
        window.cam.lookat[:] = view.lookat
        window.cam.distance, window.cam.azimuth, window.cam.elevation = (
            view.distance,
            view.azimuth,
            view.elevation,
        )
        started = time.perf_counter()

        def show() -> None:
            if not window.is_running():
                raise ViewerClosedError
            window.sync()
            time.sleep(max(0.0, sim.time_s - (time.perf_counter() - started)))

        yield show
