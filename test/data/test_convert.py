"""A conversion ends in the same bytes whatever happens on the way, and one bad recording touches no other."""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kuavo_smolvla_ros.data import convert as convert_module
from kuavo_smolvla_ros.data import dataset as dataset_module
from kuavo_smolvla_ros.data import journal as journal_module
from kuavo_smolvla_ros.data import shard as shard_module
from kuavo_smolvla_ros.data.convert import ConversionSettings, Report, convert, rehearse
from kuavo_smolvla_ros.data.dataset import STAGING, open_dataset
from kuavo_smolvla_ros.data.pool import in_processes, in_this_process
from kuavo_smolvla_ros.data.recordings import Recording
from kuavo_smolvla_ros.data.staging import Staging
from kuavo_smolvla_ros.data.stills import StillSettings
from kuavo_smolvla_ros.data.synthetic import extract_recipe, write_recipe
from kuavo_smolvla_ros.data.video import VideoSettings
from kuavo_smolvla_ros.data.writer import PackLimits, PackWriter
from kuavo_smolvla_ros.errors import UserError

Recipes = Callable[..., list[Recording]]
Contents = Callable[[Path], dict[str, str]]

GOOD: dict[str, list[dict[str, Any]]] = {
    "a": [{"length": 6, "seed": 1}],
    "b": [{"length": 5, "seed": 2}, {"length": 4, "seed": 3, "instruction": "Weigh", "task": "task2"}],
    "c": [{"length": 8, "seed": 4}],
    "d": [{"length": 3, "seed": 5, "instruction": "Sort", "task": "task4"}],
}
BAD: dict[str, list[dict[str, Any]]] = {
    "aa": [{"reject": "/gripper/state is missing"}],
    "bb": [{"length": 6, "seed": 6, "broken_picture": 3}],
    "cc": [{"crash": "a defect"}],
    "dd": [{"length": 6, "seed": 4, "size": [32, 96]}],
    "ee": [],
}


@pytest.fixture
def settings(small_spec: str) -> ConversionSettings:
    return ConversionSettings(small_spec, limits=PackLimits(seconds=1.0))


@pytest.fixture
def run(settings: ConversionSettings) -> Callable[..., Report]:
    def conversion(recordings: list[Recording], root: Path, **options: Any) -> Report:
        return convert(recordings, root, options.pop("settings", settings), extract_recipe, **options)

    return conversion


Run = Callable[..., Report]


# The same bytes ---------------------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_workers_or_threads(
    run: Run, recipes: Recipes, tmp_path: Path, contents: Contents
) -> None:
    recordings = recipes(**GOOD, **BAD)
    run(recordings, tmp_path / "one")
    reference = contents(tmp_path / "one")
    assert sum(name.endswith(".mp4") for name in reference) == 12
    run(recordings, tmp_path / "threads", camera_threads=3)
    assert contents(tmp_path / "threads") == reference
    run(recordings, tmp_path / "processes", runner=in_processes(3))
    assert contents(tmp_path / "processes") == reference


def test_running_again_changes_nothing(
    run: Run, recipes: Recipes, tmp_path: Path, contents: Contents
) -> None:
    recordings = recipes(**GOOD, bad=BAD["aa"])
    first = run(recordings, tmp_path / "out")
    before = contents(tmp_path / "out")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    second = run(recordings, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == times
    assert (first.converted, first.known, first.episodes) == (5, 0, 5)
    assert (second.converted, second.known, second.episodes) == (0, 5, 0)
    assert second.left_out == first.left_out != []


class Crash(BaseException):
    """As sudden as SIGKILL: nothing of ours runs afterwards."""


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Callable[[], int]]:
    """Crash at the n-th operation that makes something durable; tells how many there were."""

    def arm(number: int) -> Callable[[], int]:
        count = 0

        def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    raise Crash
                return operation(*args, **kwargs)

            return wrapper

        monkeypatch.setattr(os, "fsync", counted(lambda descriptor: None))  # no power is lost here
        monkeypatch.setattr(os, "replace", counted(os.replace))
        monkeypatch.setattr(Path, "rename", counted(Path.rename))
        monkeypatch.setattr(dataset_module.shutil, "rmtree", counted(dataset_module.shutil.rmtree))
        return lambda: count

    monkeypatch.setattr(Staging, "abandon", lambda self: None)
    return arm


def test_a_crash_at_any_durable_step_and_another_run_equal_one_clean_run(
    settings: ConversionSettings,
    recipes: Recipes,
    tmp_path: Path,
    contents: Contents,
    crash_at: Callable[[int], Callable[[], int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recordings = recipes(a=GOOD["a"], b=GOOD["b"], aa=BAD["aa"], bb=BAD["bb"])
    # Encoding and reading descriptions are other tests'; here the same is converted a hundred times.
    robot = convert_module.load_spec(settings.spec)
    ready = {r.name: shard_module.process(_job(settings, tmp_path), r) for r in recordings}

    def runner(job: shard_module.Job, pending: list[Recording]) -> Iterator[Any]:
        yield from (ready[recording.name] for recording in pending)

    def once(root: Path) -> Report:
        with monkeypatch.context() as patch:
            patch.setattr(convert_module, "load_spec", lambda _: robot)
            return convert(recordings, root, settings, extract_recipe, runner=runner)

    with monkeypatch.context() as patch:
        count = crash_at(0)
        once(tmp_path / "clean")
        steps = count()
        patch.undo()
    reference = contents(tmp_path / "clean")
    assert steps > 40
    resumed = 0
    for number in range(1, steps + 1):
        root = tmp_path / f"crash{number}"
        with monkeypatch.context():
            crash_at(number)
            with pytest.raises(Crash):
                once(root)
            monkeypatch.undo()
        report = once(root)
        resumed += report.resumed > 0
        assert contents(root) == reference, f"after a crash at step {number}"
        assert not (root / STAGING).exists()
    assert resumed > steps / 4


def _job(settings: ConversionSettings, spool: Path) -> shard_module.Job:
    return shard_module.Job(settings.spec, extract_recipe, settings.extract, settings.pictures, spool)


SCRIPT = """
import json, sys
from pathlib import Path
from kuavo_smolvla_ros.data.convert import ConversionSettings, convert
from kuavo_smolvla_ros.data.pool import in_processes
from kuavo_smolvla_ros.data.recordings import find_recordings
from kuavo_smolvla_ros.data.synthetic import extract_recipe
from kuavo_smolvla_ros.data.writer import PackLimits

if __name__ == "__main__":
    bags, out, spec = sys.argv[1:4]
    settings = ConversionSettings(spec, limits=PackLimits(seconds=3.0))
    def tell(recording, shard):
        print(recording.name, flush=True)
    report = convert(find_recordings([Path(bags)]), Path(out), settings, extract_recipe,
                     runner=in_processes(2), progress=tell)
    print("done", report.resumed, flush=True)
"""


def start(script: Path, *arguments: Path | str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def is_importing(pid: int) -> bool:
    """Python is up, with its own way of taking Ctrl-C, and has come as far as numpy."""
    try:
        return "_multiarray_umath" in Path(f"/proc/{pid}/maps").read_text()
    except FileNotFoundError:
        return False


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_at_random_moments_and_run_again_equals_one_clean_run(
    small_spec: str, tmp_path: Path, recipes: Recipes, contents: Contents
) -> None:
    recipes(**{f"r{n:02d}": [{"length": 25, "seed": n}] for n in range(12)})
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    clean = start(script, tmp_path / "bags", tmp_path / "clean", small_spec)
    lines = clean.communicate(timeout=200)[0].splitlines()
    assert lines[-1] == "done 0", lines
    dice = random.Random(3)
    done = ""
    for _ in range(3):  # once some recordings have gone by, at any moment from then on
        victim = start(script, tmp_path / "bags", tmp_path / "killed", small_spec)
        assert victim.stdout is not None
        for _ in range(dice.randint(1, 4)):
            victim.stdout.readline()
        time.sleep(dice.uniform(0, 0.2))
        workers = descendants(victim.pid)
        victim.kill()
        victim.wait()
        deadline = time.monotonic() + 20
        while any(map(is_running, workers)):  # nobody goes on encoding for nobody
            assert time.monotonic() < deadline, "workers outlived the conversion that was killed"
            time.sleep(0.05)
    last = start(script, tmp_path / "bags", tmp_path / "killed", small_spec)
    done = last.communicate(timeout=200)[0].splitlines()[-1]
    assert done.startswith("done")
    assert int(done.split()[1]) > 0, "nothing of what had been done was used"
    assert contents(tmp_path / "killed") == contents(tmp_path / "clean")


def test_ctrl_c_while_the_workers_start_is_one_traceback(
    small_spec: str, tmp_path: Path, recipes: Recipes
) -> None:
    """They import for a second before they run anything of ours, and hear the terminal as well."""
    recipes(**{f"r{n}": [{"length": 40, "seed": n}] for n in range(6)})
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = start(script, tmp_path / "bags", tmp_path / "out", small_spec)
    deadline = time.monotonic() + 60
    while sum(map(is_importing, descendants(process.pid))) < 2:  # both workers
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert errors.count("Traceback") == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_ctrl_c_ends_at_once_and_keeps_what_is_done(
    small_spec: str, tmp_path: Path, recipes: Recipes
) -> None:
    recipes(**{f"r{n:02d}": [{"length": 40, "seed": n}] for n in range(30)})
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = start(script, tmp_path / "bags", tmp_path / "out", small_spec)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    errors = process.communicate(timeout=60)[1]
    assert time.monotonic() - began < 10
    assert errors.count("Traceback") == 1, errors  # ours, which the command line turns into an exit status
    assert "KeyboardInterrupt" in errors
    assert [p.name for p in (tmp_path / "out").iterdir()] in ([], [STAGING])
    if (tmp_path / "out" / STAGING).exists():
        assert sorted(p.name for p in (tmp_path / "out" / STAGING).iterdir()) == ["journal.jsonl", "packs"]


# Adding -----------------------------------------------------------------------------------------------------


def test_new_recordings_are_added_and_nothing_old_is_rewritten(
    run: Run, recipes: Recipes, tmp_path: Path, contents: Contents
) -> None:
    root = tmp_path / "out"
    run(recipes(**{k: GOOD[k] for k in "ab"}), root)
    before = contents(root)
    report = run(recipes(**GOOD), root)
    assert (report.known, report.converted, report.episodes) == (2, 2, 2)
    after = contents(root)
    rewritten = {name for name in before if after[name] != before[name]}
    assert rewritten == {f"meta/{n}" for n in ("info.json", "stats.json", "tasks.parquet")} | {
        "meta/kuavo.json",
        "meta/kuavo_journal.jsonl",
    }
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("test/added", root=root, video_backend="pyav")
    assert [dataset[i]["episode_index"].item() for i in (0, 14, 15, 22, 23, 25)] == [0, 2, 3, 3, 4, 4]
    assert dataset[25]["task"] == "Sort"
    assert dataset[25]["index"] == 25
    run(recipes(**GOOD), tmp_path / "at_once")
    at_once = LeRobotDataset("test/at_once", root=tmp_path / "at_once", video_backend="pyav")
    for name, feature in at_once.meta.stats.items():
        for key, value in feature.items():
            assert dataset.meta.stats[name][key] == pytest.approx(value, abs=1e-9), (name, key)


def test_adding_survives_a_crash_like_everything_else(
    run: Run, recipes: Recipes, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("clean", "crashed"):
        run(recipes(**{k: GOOD[k] for k in "ab"}), tmp_path / name)
    recordings = recipes(**GOOD)
    run(recordings, tmp_path / "clean")
    before = contents(tmp_path / "crashed")
    with monkeypatch.context() as patch:

        def crash(*_: object) -> None:
            raise Crash

        patch.setattr("kuavo_smolvla_ros.data.convert.mark_ready", crash)
        with pytest.raises(Crash):
            run(recordings, tmp_path / "crashed")
    untouched = {k: v for k, v in contents(tmp_path / "crashed").items() if not k.startswith(STAGING)}
    assert untouched == before
    report = run(recordings, tmp_path / "crashed")
    assert report.resumed == 2
    assert contents(tmp_path / "crashed") == contents(tmp_path / "clean")


def test_what_is_between_two_known_recordings_comes_last(run: Run, recipes: Recipes, tmp_path: Path) -> None:
    run(recipes(a=GOOD["a"], c=GOOD["c"]), tmp_path / "out")
    run(recipes(b=GOOD["b"]), tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    assert dataset is not None
    assert list(dataset.recordings) == ["a.bag", "c.bag", "b.bag"]


def test_an_interrupted_run_with_other_recordings_now_equals_a_clean_one(
    run: Run, recipes: Recipes, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = recipes(a=GOOD["a"], b=GOOD["b"], d=GOOD["d"])
    with monkeypatch.context() as patch:
        patch.setattr("kuavo_smolvla_ros.data.convert.mark_ready", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            run(few, tmp_path / "out")
    everything = recipes(**GOOD)  # c comes between b and d
    report = run(everything, tmp_path / "out")
    assert report.resumed == 2
    run(everything, tmp_path / "clean")
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_an_interrupted_run_under_other_settings_begins_again(
    run: Run, recipes: Recipes, tmp_path: Path, contents: Contents, settings: ConversionSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recordings = recipes(**GOOD)
    with monkeypatch.context() as patch:
        patch.setattr("kuavo_smolvla_ros.data.convert.mark_ready", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            run(recordings, tmp_path / "out")
    finer = ConversionSettings(settings.spec, VideoSettings(crf=20), limits=settings.limits)
    assert run(recordings, tmp_path / "out", settings=finer).resumed == 0
    run(recordings, tmp_path / "clean", settings=finer)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_a_recording_that_changed_while_interrupted_is_converted_again(
    run: Run, recipes: Recipes, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings = recipes(**GOOD)
    with monkeypatch.context() as patch:
        patch.setattr("kuavo_smolvla_ros.data.convert.mark_ready", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            run(recordings, tmp_path / "out")
    write_recipe(tmp_path / "bags" / "b.bag", {"length": 7, "seed": 99})
    assert run(recordings, tmp_path / "out").resumed == 1
    run(recordings, tmp_path / "clean")
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


# Bad recordings ---------------------------------------------------------------------------------------------


def test_a_bad_recording_never_touches_another(
    run: Run, recipes: Recipes, tmp_path: Path, contents: Contents
) -> None:
    run(recipes("good", **GOOD), tmp_path / "good_only")
    report = run(recipes("both", **GOOD, **BAD), tmp_path / "both_kinds")
    good, both = contents(tmp_path / "good_only"), contents(tmp_path / "both_kinds")
    changed = {name for name in good.keys() | both.keys() if good.get(name) != both.get(name)}
    assert changed == {"meta/kuavo_journal.jsonl"}
    reasons = dict(report.left_out)
    assert reasons == {
        "aa.bag#0": "/gripper/state is missing",
        "bb.bag#0": "wrist_cam_r: the picture at step 3 is truncated",
        "cc.bag": "failed with RuntimeError: a defect",
        "dd.bag#0": "head_cam_h: the picture at step 0 is 96x32 uint8, declared is 96x64 uint8 RGB",
        "ee.bag": "holds no episode",
    }
    assert "RuntimeError: a defect" in report.tracebacks["cc.bag"]


def test_one_bad_episode_of_a_recording_leaves_the_others(run: Run, recipes: Recipes, tmp_path: Path) -> None:
    recordings = recipes(
        a=[{"length": 4, "seed": 1}, {"length": 5, "seed": 2, "broken_picture": 0}, {"length": 6, "seed": 3}]
    )
    report = run(recordings, tmp_path / "out")
    assert (report.episodes, report.frames) == (2, 10)
    assert report.left_out == [("a.bag#1", "wrist_cam_r: the picture at step 0 is truncated")]


def test_rejections_are_remembered_and_failures_tried_again(
    run: Run, recipes: Recipes, tmp_path: Path
) -> None:
    root = tmp_path / "out"
    run(recipes(**GOOD, aa=BAD["aa"], cc=BAD["cc"]), root)
    dataset = open_dataset(root)
    assert dataset is not None
    assert dataset.recordings["aa.bag"]["rejected"][0]["reason"] == "/gripper/state is missing"
    assert "cc.bag" not in dataset.recordings
    again = run(recipes(), root)
    assert (again.known, again.converted) == (5, 1)
    assert again.left_out == [
        ("aa.bag#0", "/gripper/state is missing"),
        ("cc.bag", "failed with RuntimeError: a defect"),
    ]
    mended = run(recipes(cc=[{"length": 4, "seed": 8}]), root)
    assert (mended.converted, mended.episodes) == (1, 1)
    assert [source for source, _ in mended.left_out] == ["aa.bag#0"]


def test_rejected_recordings_can_be_looked_at_again(
    run: Run, recipes: Recipes, tmp_path: Path, settings: ConversionSettings
) -> None:
    """For example after the rules have been relaxed (here: the recipe's default no longer rejects)."""
    root = tmp_path / "out"
    recordings = recipes(**GOOD, z=[{"length": 5, "seed": 70, "broken_picture": 1}])
    run(recordings, root)
    assert run(recordings, root).converted == 0
    assert run(recordings, root, retry_rejected=True).left_out != []
    dataset = open_dataset(root)
    assert dataset is not None
    assert dataset.info["total_episodes"] == 5
    assert [e["rejected"] != [] for e in dataset.recordings.values()] == [False] * 4 + [True]


def test_the_same_recording_under_two_names_counts_once(run: Run, recipes: Recipes, tmp_path: Path) -> None:
    report = run(recipes(a=GOOD["a"], b=GOOD["b"], twin=GOOD["a"]), tmp_path / "out")
    assert report.left_out == [("twin.bag", "is the same recording as a.bag")]
    assert report.episodes == 3
    later = run(recipes(another=GOOD["b"]), tmp_path / "out")
    assert sorted(later.left_out) == [
        ("another.bag", "is the same recording as b.bag"),
        ("twin.bag", "is the same recording as a.bag"),
    ]


def test_nothing_good_leaves_nothing_behind(run: Run, recipes: Recipes, tmp_path: Path) -> None:
    report = run(recipes(**BAD), tmp_path / "out")
    assert len(report.left_out) == 5
    assert report.episodes == 0
    assert not (tmp_path / "out").exists()


def test_a_recording_that_vanishes_is_a_failure_of_its_own(
    run: Run, recipes: Recipes, tmp_path: Path
) -> None:
    recordings = recipes(**GOOD)
    (tmp_path / "bags" / "b.bag").unlink()
    report = run(recordings, tmp_path / "out")
    assert report.left_out == [("b.bag", "cannot be read: No such file or directory")]
    assert report.episodes == 3


def test_a_recording_without_permission_is_named_and_tried_again(
    recipes: Recipes, tmp_path: Path, settings: ConversionSettings, locked: Callable[[Path], Any]
) -> None:
    (recording,) = recipes(a=GOOD["a"])
    job = _job(settings, tmp_path)
    with locked(recording.path) as path:
        shard = shard_module.process(job, Recording("a.bag", path, 0))
    assert (shard.name, shard.failure) == ("a.bag", "cannot be read: Permission denied")
    assert shard.parts == (), "a failure is not a judgement: the next run looks at it again"


# Refusals ---------------------------------------------------------------------------------------------------


def test_a_recording_that_changed_after_conversion_is_refused(
    run: Run, recipes: Recipes, tmp_path: Path, contents: Contents
) -> None:
    run(recipes(**GOOD), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"b\.bag has changed since it was converted.*give it a new name"):
        run(recipes(b=GOOD["a"]), tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("pictures", "complaint"),
    [
        (VideoSettings("h264", preset="ultrafast"), "codec libsvtav1, asked for is h264"),
        (VideoSettings(crf=20), "crf 30, asked for is 20"),
        (VideoSettings(gop=5), "gop 2, asked for is 5"),
        (StillSettings(), "None"),
    ],
)
def test_other_pictures_are_not_mixed_in(
    run: Run, recipes: Recipes, tmp_path: Path, settings: ConversionSettings, pictures: Any, complaint: str
) -> None:
    run(recipes(**GOOD), tmp_path / "out")
    with pytest.raises(UserError, match=complaint):
        run(recipes(**GOOD), tmp_path / "out", settings=ConversionSettings(settings.spec, pictures))


def test_another_robot_is_not_mixed_in(run: Run, recipes: Recipes, tmp_path: Path, small_spec: str) -> None:
    run(recipes(**GOOD), tmp_path / "out")
    with pytest.raises(UserError, match="action is 20 wide here and 16 there"):
        run(recipes(**GOOD), tmp_path / "out", settings=ConversionSettings("kuavo_mobile"))
    bigger = ConversionSettings("kuavo_sim")
    with pytest.raises(UserError, match=r"head_cam_h is \[64, 96, 3\] there and \[480, 640, 3\] here"):
        run(recipes(**GOOD), tmp_path / "out", settings=bigger)


def test_a_folder_of_something_else_is_left_alone(run: Run, recipes: Recipes, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"is no dataset of this package \(meta/kuavo.json is missing\)"):
        run(recipes(**GOOD), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_two_conversions_into_one_folder_are_refused(run: Run, recipes: Recipes, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        journal_module.exclusive(tmp_path / "out"),
        pytest.raises(UserError, match="another conversion is writing"),
    ):
        run(recipes(**GOOD), tmp_path / "out")


def test_a_broken_frame_rate_is_refused(run: Run, recipes: Recipes, tmp_path: Path, small_spec: str) -> None:
    odd = Path(small_spec).with_name("odd.yaml")
    odd.write_text(f"extends: {small_spec}\nfps: 12.5\n")
    with pytest.raises(UserError, match=r"whole number of frames per second, not 12\.5"):
        run(recipes(**GOOD), tmp_path / "out", settings=ConversionSettings(str(odd)))
    assert not (tmp_path / "out").exists()


# The machine ------------------------------------------------------------------------------------------------

DISK_FULL = """
import subprocess, sys
from pathlib import Path
from kuavo_smolvla_ros.data.convert import ConversionSettings, convert
from kuavo_smolvla_ros.data.recordings import find_recordings
from kuavo_smolvla_ros.data.synthetic import extract_recipe
from kuavo_smolvla_ros.data.writer import PackLimits
from kuavo_smolvla_ros.errors import UserError

bags, disk, spec = sys.argv[1:4]
def once(size):
    settings = ConversionSettings(spec, limits=PackLimits(seconds=3.0))
    report = convert(find_recordings([Path(bags)]), Path(disk) / "out", settings, extract_recipe)
    return report.resumed
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], check=True)
try:
    once("small")
    print("did not fill up")
except UserError as error:
    print(error)
left = sorted(p.relative_to(disk).as_posix() for p in Path(disk).rglob("*"))
print([name for name in left if "open" in name or "spool" in name or "/meta/info" in name])
subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
print("resumed", once("large") > 0)
subprocess.run(["cp", "-r", disk + "/out", sys.argv[4]], check=True)
"""


def test_a_full_disk_is_one_sentence_and_can_be_continued(
    run: Run, recipes: Recipes, tmp_path: Path, contents: Contents, settings: ConversionSettings
) -> None:
    probe = ["unshare", "-Urm", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not allow private mounts")
    (tmp_path / "disk").mkdir()
    recipes(**{f"r{n:02d}": [{"length": 25, "seed": n}] for n in range(12)})
    script = tmp_path / "script.py"
    script.write_text(DISK_FULL)
    result = subprocess.run(
        ["unshare", "-Urm", sys.executable, str(script), str(tmp_path / "bags"), str(tmp_path / "disk"),
         settings.spec, str(tmp_path / "copied")],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    said, left, resumed = result.stdout.splitlines()
    assert said.startswith("no space is left for")
    assert said.endswith("free some and run the same command again")
    assert left == "[]"
    assert resumed == "resumed True"
    from kuavo_smolvla_ros.data.recordings import find_recordings

    clean = ConversionSettings(settings.spec, limits=PackLimits(seconds=3.0))
    run(find_recordings([tmp_path / "bags"]), tmp_path / "clean", settings=clean)
    assert contents(tmp_path / "copied") == contents(tmp_path / "clean")


def test_a_place_without_permission_is_one_sentence(run: Run, recipes: Recipes) -> None:
    with pytest.raises(UserError, match=r"no permission for /sys/|Read-only|no space"):
        run(recipes(**GOOD), Path("/sys/dataset"))


def test_a_full_disk_in_a_worker_ends_the_run(
    run: Run, recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard_module, "encode", full)
    with pytest.raises(UserError, match="no space is left"):
        run(recipes(**GOOD), tmp_path / "out")


def test_an_error_while_writing_leaves_what_is_journaled_and_nothing_else(
    run: Run, recipes: Recipes, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings = recipes(**GOOD)
    close = PackWriter.close

    def fail_at_the_second(self: PackWriter) -> dict[str, Any]:
        if self.number == 1:
            raise OSError(errno.ENOSPC, "full")
        return close(self)

    with monkeypatch.context() as patch:
        patch.setattr(PackWriter, "close", fail_at_the_second)
        with pytest.raises(UserError, match="no space is left"):
            run(recordings, tmp_path / "out")
    staging = tmp_path / "out" / STAGING
    assert sorted(p.relative_to(staging).parts[0] for p in staging.rglob("*.mp4")) == ["packs"] * 3
    assert sorted(p.name for p in staging.iterdir()) == ["journal.jsonl", "packs"]
    run(recordings, tmp_path / "out")
    run(recordings, tmp_path / "clean")
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_a_killed_worker_is_one_sentence_and_what_is_done_stays(
    run: Run, recipes: Recipes, tmp_path: Path, contents: Contents
) -> None:
    # The last ones take long: however late this process hears of the first, there is a worker to kill.
    lengths = [25] * 4 + [250] * 4
    recordings = recipes(**{f"r{n:02d}": [{"length": each, "seed": n}] for n, each in enumerate(lengths)})

    def kill_one(recording: Recording, shard: object) -> None:
        if recording.name == "r02.bag":
            import multiprocessing

            multiprocessing.active_children()[0].kill()

    with pytest.raises(
        UserError, match=r"a worker process was killed while converting r0.*again, with fewer"
    ):
        run(recordings, tmp_path / "out", runner=in_processes(2), progress=kill_one)
    report = run(recordings, tmp_path / "out")
    assert 0 < report.resumed < 8
    run(recordings, tmp_path / "clean")
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_very_long_episodes_travel_through_files_and_leave_none(
    run: Run, recipes: Recipes, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings = recipes(**GOOD, bb=BAD["bb"])
    run(recordings, tmp_path / "memory")
    monkeypatch.setattr(shard_module, "SPOOL_BYTES", 0)
    spooled: list[int] = []

    def look(recording: Recording, shard: shard_module.RecordingShard | None) -> None:
        assert shard is not None
        blobs = [c.blob for e in shard.episodes for c in e.cameras.values()]
        assert all(blob.data is None for blob in blobs)
        spooled.append(len(list((tmp_path / "files" / STAGING / "spool").iterdir())))

    run(recordings, tmp_path / "files", progress=look)
    assert spooled == [0] * 5
    assert contents(tmp_path / "files") == contents(tmp_path / "memory")


def test_results_wait_in_bounded_number_for_a_slow_one(
    tmp_path: Path, recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first recording takes long; meanwhile not more than two per worker are begun."""
    recordings = recipes(**{f"r{n}": [] for n in range(12)})
    begun = tmp_path / "begun"
    begun.mkdir()
    settings = {"begun": str(begun), "slow": "r0.bag", "until": str(tmp_path / "go")}
    (tmp_path / "slow_extract.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)  # the workers get it as well
    extract = importlib.import_module("slow_extract").extract
    job = shard_module.Job("kuavo_sim", extract, settings, VideoSettings(), tmp_path, encode=False)
    results = in_processes(2)(job, recordings)

    def release() -> None:
        deadline = time.monotonic() + 60
        while len(list(begun.iterdir())) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # whoever wanted to begin a sixth has had the time
        (tmp_path / "go").write_text(str(len(list(begun.iterdir()))))

    helper = threading.Thread(target=release)
    helper.start()
    names = [shard.name for shard in results]
    helper.join()
    assert names == [recording.name for recording in recordings]
    assert (tmp_path / "go").read_text() == "5"


SLOW = """
import time
from pathlib import Path

def extract(path, spec, settings):
    (Path(settings["begun"]) / path.name).touch()
    deadline = time.monotonic() + 90
    while path.name == settings["slow"] and not Path(settings["until"]).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return []
"""


# Dry run and progress ---------------------------------------------------------------------------------------


def test_a_rehearsal_says_what_would_be_and_writes_nothing(
    run: Run, recipes: Recipes, tmp_path: Path, settings: ConversionSettings, contents: Contents
) -> None:
    recordings = recipes(**GOOD, aa=BAD["aa"], twin=GOOD["a"])
    report = rehearse(recordings, tmp_path / "out", settings, extract_recipe)
    assert not (tmp_path / "out").exists()
    assert (report.converted, report.episodes, report.frames) == (6, 5, 26)
    assert [source for source, _ in report.left_out] == ["aa.bag#0", "twin.bag"]
    real = run(recordings, tmp_path / "out")
    assert (real.episodes, real.frames, real.left_out) == (report.episodes, report.frames, report.left_out)
    before = contents(tmp_path)
    again = rehearse(recordings, tmp_path / "out", settings, extract_recipe)
    assert (again.known, again.converted) == (6, 0)
    assert contents(tmp_path) == before


def test_progress_is_told_once_for_each_recording(run: Run, recipes: Recipes, tmp_path: Path) -> None:
    told: list[tuple[str, bool]] = []

    def tell(recording: Recording, shard: object) -> None:
        told.append((recording.name, shard is not None))

    run(recipes(a=GOOD["a"]), tmp_path / "out", progress=tell)
    run(recipes(b=GOOD["b"]), tmp_path / "out", progress=tell)
    assert told == [("a.bag", True), ("a.bag", False), ("b.bag", True)]


def test_findings_travel_into_the_journal(recipes: Recipes, tmp_path: Path, small_spec: str) -> None:
    run_settings = ConversionSettings(small_spec)
    convert(recipes(a=[{"length": 3}]), tmp_path / "out", run_settings, extract_with_findings)
    (line,) = (tmp_path / "out" / "meta" / "kuavo_journal.jsonl").read_text().splitlines()
    (entry,) = json.loads(line)["recordings"]
    assert entry["episodes"][0]["findings"] == [{"kind": "gap", "topic": "/cam_h"}]
    assert entry["episodes"][0]["start_ns"] == 1_700_000_000_000_000_000


class Gap:
    def to_dict(self) -> dict[str, str]:
        return {"kind": "gap", "topic": "/cam_h"}


def extract_with_findings(path: Path, spec: Any, settings: Any) -> list[Any]:
    from dataclasses import replace

    return [replace(part, findings=(Gap(),)) for part in extract_recipe(path, spec, settings)]


def test_in_this_process_is_lazy(recipes: Recipes, tmp_path: Path) -> None:
    recordings = recipes(a=[], b=[])
    seen: list[str] = []

    def extract(path: Path, spec: object, settings: object) -> list[Any]:
        seen.append(path.name)
        return []

    job = shard_module.Job("kuavo_sim", extract, {}, VideoSettings(), tmp_path, encode=False)
    next(in_this_process(job, recordings))
    assert seen == ["a.bag"]
