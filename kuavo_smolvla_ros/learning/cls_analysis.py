"""What CLS tokens hold: do they tell tasks apart, do the two kinds agree, have they collapsed?"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.charts import colour, svg
from kuavo_smolvla_ros.policy.checkpoint import atomic_file, write_json
from kuavo_smolvla_ros.policy.delta_policy import cls_tokens, delta_network, project_cls
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.vicreg import vicreg_terms

KINDS = ("observation", "action")
PICTURE, PAGE, FIGURES = "cls_tsne.png", "cls_report.html", "cls_report.json"
LEAST = 8  # samples: below it t-SNE and a probe say nothing


class TokenTable(NamedTuple):
    """One row per sample: tokens of both kinds side by side, their projections, and where each comes from."""

    observation: Tensor
    action: Tensor
    observation_view: Tensor
    action_view: Tensor
    task: NDArray[np.int64]
    episode: NDArray[np.int64]

    def of(self, kind: str) -> Tensor:
        return self.observation if kind == "observation" else self.action


@torch.no_grad()
def collect(
    policy: KuavoSmolVLAPolicy, batches: Iterable[tuple[Mapping[str, Any], Tensor, Any, Any]]
) -> TokenTable:
    """Tokens of batches, each with the base's noise, its samples' tasks and their episodes."""
    network = delta_network(policy)
    rows: list[tuple[Tensor, ...]] = []
    tasks, episodes = [], []
    policy.eval()
    for batch, noise, task, episode in batches:
        seen, done = cls_tokens(policy, batch, noise)
        views = project_cls(network, seen, done)
        rows.append(tuple(x.flatten(1).float().cpu() for x in (seen, done, *views)))
        tasks.append(np.asarray(task, np.int64))
        episodes.append(np.asarray(episode, np.int64))
    if sum(map(len, tasks)) < LEAST:
        raise UserError(f"{sum(map(len, tasks))} held-out samples are too few to say anything; give {LEAST}")
    columns = (torch.cat(column) for column in zip(*rows, strict=True))
    return TokenTable(*columns, np.concatenate(tasks), np.concatenate(episodes))


def effective_rank(x: Tensor) -> float:
    """Exponential of the entropy of the singular values: over how many directions the rows are spread."""
    values = torch.linalg.svdvals((x - x.mean(0)).double())
    total = values.sum()
    if total <= 0:
        return 0.0
    share = values / total
    return float(torch.exp(-(share * torch.log(share.clamp_min(1e-300))).sum()))


def probe(x: Tensor, task: NDArray[np.int64], episode: NDArray[np.int64]) -> float | None:
    """How often a linear classifier names the task of samples from episodes it was not fitted to.

    None where there is one task only, or not two episodes of each.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    test = np.zeros(len(task), bool)
    for number in np.unique(task):
        own = np.unique(episode[task == number])
        if len(own) < 2:
            return None
        test |= (task == number) & np.isin(episode, own[1::2])
    if len(np.unique(task)) < 2:
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    model.fit(x[~test].numpy(), task[~test])
    return float(model.score(x[test].numpy(), task[test]))


def figures(table: TokenTable) -> dict[str, Any]:
    """Everything but the picture, as numbers."""
    a, b = table.observation_view, table.action_view
    similar = torch.nn.functional.cosine_similarity
    counts = np.unique(table.task, return_counts=True)[1]
    terms = vicreg_terms(a, b)
    found: dict[str, Any] = {
        "samples": len(table.task),
        "tasks": len(counts),
        "largest_task_share": float(counts.max() / counts.sum()),
        "cosine_same_sample": float(similar(a, b).mean()),
        "cosine_other_sample": float(similar(a, b.roll(1 + len(b) // 2, 0)).mean()),
        "vicreg": {name: float(value) for name, value in terms._asdict().items()},
    }
    for kind in KINDS:
        x = table.of(kind)
        within = [x[torch.from_numpy(table.task == n)].std(0).mean() for n in np.unique(table.task)]
        found[kind] = {
            "width": x.shape[1],
            "effective_rank": effective_rank(x),
            "std": float(x.std(0).mean()),
            "std_within_tasks": float(torch.stack(within).mean()),
            "probe_accuracy": probe(x, table.task, table.episode),
        }
    return found


def tsne(x: Tensor, seed: int = 0) -> NDArray[np.float64]:
    """Two coordinates per row."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(x) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(x.numpy())


def write_analysis(table: TokenTable, names: Mapping[int, str], folder: Path, title: str) -> dict[str, Any]:
    """The picture, the page and the numbers into a folder."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    found = figures(table)
    drawing = Figure((9, 4), layout="constrained")
    for axes, kind in zip(drawing.subplots(1, 2), KINDS, strict=True):
        points = tsne(table.of(kind))
        for number in np.unique(table.task):
            own = points[table.task == number]
            axes.scatter(*own.T, s=8, color=colour(str(number)), label=names[int(number)])
        axes.set(title=f"{kind} CLS tokens, t-SNE", xticks=[], yticks=[])
    drawing.axes[0].legend(fontsize=8)
    with atomic_file(folder / PICTURE) as fresh:
        drawing.savefig(fresh, format="png", dpi=120)
    with atomic_file(folder / PAGE) as fresh:
        fresh.write_text(_page(found, svg(drawing), title), encoding="utf-8")
    write_json(folder / FIGURES, found)
    return found


def reading(found: Mapping[str, Any]) -> list[str]:
    """The numbers as sentences, with what each is to be compared with."""
    terms = found["vicreg"]
    excess = terms["covariance"] - terms["covariance_floor"]
    lines = [
        f"{found['samples']} held-out samples of {found['tasks']} tasks",
        f"cosine similarity of the two views: {found['cosine_same_sample']:.3f} for the same sample, "
        f"{found['cosine_other_sample']:.3f} for another one; alike means the views tell no samples apart",
        f"VICReg: invariance {terms['invariance']:.4g}, variance {terms['variance']:.4g} (0 is fully spread, "
        f"0.99 collapsed), covariance {terms['covariance']:.4g}, {excess:.4g} above its floor",
    ]
    for kind in KINDS:
        own = found[kind]
        accuracy = own["probe_accuracy"]
        told = (
            "no probe (one task, or too few episodes)"
            if accuracy is None
            else f"a linear probe names the task of {accuracy:.0%} (the largest task is "
            f"{found['largest_task_share']:.0%})"
        )
        lines.append(
            f"{kind} tokens: effective rank {own['effective_rank']:.1f} of {own['width']}, deviation "
            f"{own['std']:.3g}, within a task {own['std_within_tasks']:.3g}; {told}"
        )
    return lines


def _page(found: Mapping[str, Any], picture: str, title: str) -> str:
    rows = "".join(f"<li>{html.escape(line)}</li>" for line in reading(found))
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>CLS tokens of {name}</title>'
        "<style>body{font:15px sans-serif;max-width:60em;margin:2em auto}svg{max-width:100%}</style>"
        f"<h1>CLS tokens of {name}</h1>{picture}<ul>{rows}</ul>"
        "<p>t-SNE keeps neighbours together and little else: distances between groups mean nothing.</p>"
        "</html>"
    )
