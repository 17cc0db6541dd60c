"""The quality report of each dataset, and a short video of each episode."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kuavo_smolvla_ros.demo.convert import DATASETS
from kuavo_smolvla_ros.demo.road import Place
from kuavo_smolvla_ros.errors import UserError

REPORTS = "quality"
VIDEOS = "videos"


@dataclass(frozen=True)
class JudgeStep:
    """What `kuavo-smolvla report` says of them."""

    name = "report"
    title = "judge the datasets: a quality report for each, and videos of the episodes"

    def settings(self) -> Mapping[str, Any]:
        return {}

    def commands(self, place: Place) -> Sequence[str]:
        tasks = [entry["task"] for entry in place.told["convert"]["datasets"]]
        return tuple(
            f"kuavo-smolvla report {place.root / DATASETS / task} --out {place.root / REPORTS / task}"
            for task in tasks
        )

    def run(self, place: Place) -> dict[str, Any]:
        return {"datasets": [self._judge(place, entry) for entry in place.told["convert"]["datasets"]]}

    def _judge(self, place: Place, entry: Mapping[str, Any]) -> dict[str, Any]:
        from kuavo_smolvla_ros.data.dataset_reader import DatasetReader
        from kuavo_smolvla_ros.data.report import VERDICTS, make_report
        from kuavo_smolvla_ros.data.report_page import render
        from kuavo_smolvla_ros.demo.videos import video_of_episode

        task, root = entry["task"], place.root / entry["root"]
        report = make_report(root)
        folder = place.folder(f"{REPORTS}/{task}")
        (folder / "report.html").write_text(render(report))
        (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        if report.verdicts["bad"]:
            reasons = "; ".join(e.why for e in report.episodes if e.verdict == "bad")
            raise UserError(f"{root}: {reasons}; see {folder / 'report.html'}")
        reader, videos = DatasetReader.open(root), []
        for episode in report.episodes:
            path = place.folder(VIDEOS) / f"{task}_{episode.index}.mp4"
            video_of_episode(reader, episode.index, path)
            videos.append(str(path.relative_to(place.root)))
        counts = {verdict: report.verdicts[verdict] for verdict in VERDICTS}
        place.say(f"{task}: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
        return {
            "task": task,
            "verdicts": counts,
            "findings": [str(f) for e in report.episodes for f in e.findings if f.severity.rank],
            "lag_s": [episode.figures["lag_s"] for episode in report.episodes],
            "page": str((folder / "report.html").relative_to(place.root)),
            "videos": videos,
        }
