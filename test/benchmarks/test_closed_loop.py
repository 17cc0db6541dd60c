"""The closed-loop benchmark: its trouble, its script, its table; one episode of each mode."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def loop() -> Iterator[Any]:
    """The program as a module; its folder is on the path as when it is run."""
    sys.path.insert(0, str(HERE))
    try:
        import closed_loop

        yield closed_loop
    finally:
        sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def pick(loop: Any) -> Any:
    import support.belt_pick

    return support.belt_pick


def row(loop: Any, seed: int, success: bool, time_s: float = 5.0, **cell: Any) -> dict[str, Any]:
    fields = {"latency_s": 0.0, "n_action_steps": 8, "realtime": True} | cell
    ends = {"success": success, "time_s": time_s, "how": "lifted" if success else "passed by", "thoughts": 3}
    return {"version": loop.version(), **fields, "seed": seed, **ends}


def test_trouble_belongs_to_its_seed_and_a_plain_belt_has_none(pick: Any) -> None:
    first, again, other = pick.Trouble.draw(3), pick.Trouble.draw(3), pick.Trouble.draw(4)
    assert first == again
    assert first != other
    plain = pick.Trouble.draw(3, every_s=np.inf, jerk_every_s=np.inf)
    assert plain.changes == ((0.0, 0.1, 0.0),)
    times = np.arange(0.0, pick.TIME_LIMIT_S, 0.05)
    along, sideways = np.array([first.at(t) for t in times]).T
    assert 0.04 <= along.min() < along.max() <= 0.14
    assert set(np.abs(sideways)) <= {0.0, 0.1}, "never two jerks at once"
    assert first.at(0.0)[0] == 0.1


def test_the_script_goes_to_where_the_part_will_be_on_the_belt_as_it_runs(pick: Any) -> None:
    from kuavo_smolvla_ros.sim.tasks import make_task

    ready = make_task(1, "contest").ready_state()
    script = pick.Picker(ready)
    hands = []
    for belt in (0.05, 0.12):
        seen = pick.Observation(ready[:8], np.zeros(7), np.array([0.5, 0.55, 0.958]), belt)
        rows = script.chunk(seen, 30)
        assert rows.shape == (30, 16)
        assert np.isfinite(rows).all()
        assert np.abs(np.diff(rows[:, :7], axis=0)).max() <= 0.22 + 1e-9, "within the joints' speed"
        assert rows[0, 7] == 0.0
        assert rows[-1, 7] == 1.0, "it has closed by then"
        closes = int(np.argmax(rows[:, 7] > 0.5))
        script._ik.set_joints(rows[closes, :7])
        part_x = 0.5 - belt * (0.1 * closes + 0.1)
        hands.append(abs(script._ik.pose().translation()[0] - part_x))
    assert max(hands) < 0.03


def test_a_chunk_begins_with_what_is_executed_meanwhile(pick: Any) -> None:
    from kuavo_smolvla_ros.sim.tasks import make_task

    ready = make_task(1, "contest").ready_state()
    script = pick.Picker(ready)
    seen = pick.Observation(ready[:8], np.zeros(7), np.array([0.5, 0.55, 0.958]), 0.1)
    first = script.chunk(seen, 20)
    later = pick.Observation(first[8, :8], np.zeros(7), np.array([0.42, 0.55, 0.958]), 0.1)
    second = script.chunk(later, 20, first[8:], 6)
    assert second[:6].tolist() == first[8:14].tolist()
    assert np.abs(second[6] - second[5])[:7].max() <= 0.22 + 1e-9


@pytest.mark.parametrize("realtime", [False, True])
def test_a_plain_belt_is_picked_from_at_once_and_late(loop: Any, pick: Any, realtime: bool) -> None:
    plain = pick.Trouble.draw(0, every_s=np.inf, jerk_every_s=np.inf)
    cell = loop.Cell(0.1, 16, realtime)
    outcome = loop.run_episode(cell, 0, plain)
    assert outcome.success, outcome
    assert outcome == loop.run_episode(cell, 0, plain), "the same again, to the last digit"


def test_a_run_is_continued_and_other_versions_are_not_mixed_in(
    loop: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    rows = [row(loop, seed, seed != 1, realtime=r) for seed in range(3) for r in (False, True)]
    stale = row(loop, 0, False) | {"version": "another"}
    lines = [json.dumps(r) for r in [*rows, stale]]
    results.write_text("\n".join(lines) + '\n{"cut short', encoding="utf-8")
    line = ["--episodes", "3", "--latencies", "0", "--steps", "8", "--results", str(results)]
    files = ["--json", str(tmp_path / "table.json"), "--plot", str(tmp_path / "plot.svg")]
    assert loop.main([*line, *files]) == 0, "all of it was there"
    table = json.loads((tmp_path / "table.json").read_text())
    assert [entry["episodes"] for entry in table] == [3, 3]
    assert [entry["failures"] for entry in table] == [{"passed by": 1}] * 2
    assert table[0]["success"] == pytest.approx(2 / 3)
    assert table[0]["low"] < 2 / 3 < table[0]["high"]
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    assert loop.main([*line[:1], "4", *line[2:], "--seconds", "-1", "--check"]) == 1
    assert "2 of 8 episodes are still to run" in capsys.readouterr().out


def test_wrong_use_is_said(loop: Any) -> None:
    for wrong in (["--episodes", "0"], ["--latencies", "-1"], ["--steps", "0"]):
        with pytest.raises(SystemExit) as ended:
            loop.main(wrong)
        assert ended.value.code == 2


def test_targets_compare_the_two_modes(loop: Any) -> None:
    rows = [
        row(loop, seed, seed < good, time_s, latency_s=latency, realtime=realtime)
        for latency, realtime, good, time_s in (
            (0.0, False, 10, 4.0), (0.0, True, 10, 4.0), (1.2, False, 2, 8.0), (1.2, True, 5, 6.0),
        )
        for seed in range(10)
    ]  # fmt: skip
    figures = loop.overall(loop.summary(rows))
    assert figures["success at once"] == pytest.approx(1.0)
    assert figures["lost to latency, in turns"] == pytest.approx(0.8)
    assert figures["realtime above in turns"] == pytest.approx(0.3)
    assert figures["seconds saved by realtime"] == pytest.approx(2.0)
