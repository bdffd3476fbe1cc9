"""Never run on ImageNet. A table in Markdown: our protocol and the papers' side by side, each called what it is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.imagenet.cells import Setting
from benchmarks.imagenet.epochs import best
from benchmarks.imagenet.recipes import Table, budgets_of
from benchmarks.runs import cell

Found = Mapping[str, Any]
IMAGENET = 50_000, 1000  # validation pictures, classes
COLUMNS = (
    "last step, nothing chosen",
    "as trained: last epoch",
    "as trained: best epoch, CHOSEN ON THE VALIDATION SET",
    "reported by the paper",
    "weights kept",
    "MACs kept",
    "minutes",
)
GUIDE = """\
- **last step, nothing chosen**: this library's protocol. All steps are done, batch norms are re-estimated on the
  calibration pictures without random crops (and whatever else the chain does last), and that net is scored once.
- **as trained: last epoch**: the same run after its last training step, with the running statistics of training.
- **as trained: best epoch, CHOSEN ON THE VALIDATION SET**: the best of the scores after each epoch, on the very
  pictures that it is reported on, as papers do that score after every epoch. It is no estimate of what new pictures
  would give, and is here to be compared with figures that were made like it. Only epochs whose net met the budget
  count. In brackets, the epoch. A chain without such a column trains no net epoch by epoch.
- **minutes**: all stages, without scoring."""


def page(table: Table, found: Found, setting: Setting) -> str:
    """The whole page."""
    often = "after every epoch" if setting.every == 1 else f"every {setting.every} epochs"
    lines = [
        _status(found, setting),
        "",
        f"# {table.title}",
        "",
        f"{table.paper}.",
        "",
        f"The paper's protocol: {table.protocol}",
        "",
        "Done otherwise here:",
        "",
        *(f"- {difference}" for difference in table.differences),
        "",
        "Top-1 on the validation pictures, in percent; mean ± standard deviation where there are several seeds.",
        f"Nets are scored {often}, and after the last step.",
        "",
        *GUIDE.splitlines(),
        "",
        *(f"- `{name}`: {chain.about}" for name, chain in table.chains.items()),
        "",
    ]
    for name, net in table.nets.items():
        rows = [row for budget in budgets_of(table, name) for row in _rows(table, found, name, budget)]
        if rows:
            dense = found["dense"][name]
            stated = f" (its origin states {net.stated:.2f})" if net.stated and setting.weights is None else ""
            lines += [
                f"## {name}",
                "",
                f"Dense: {100 * dense['score']:.2f}{stated}; the same weights, the same {dense['samples']:,} pictures.",
                "",
                f"| budget | chain | {' | '.join(COLUMNS)} |",
                "|---|---|" + "--:|" * len(COLUMNS),
                *rows,
                "",
            ]
    return "\n".join(lines)


def _status(found: Found, setting: Setting) -> str:
    """The first line: on what this was measured."""
    seen = {(dense["samples"], dense["classes"]) for dense in found["dense"].values()}
    reasons = [f"{samples:,} pictures in {classes:,} classes" for samples, classes in sorted(seen - {IMAGENET})]
    if setting.weights == "random":
        reasons.append("weights at random")
    reasons += [f"{key}={value}" for key, value in setting.small.changes().items()]
    if not seen:
        return "Never run on ImageNet: nothing is measured yet."
    if reasons:
        return f"A try, never run on ImageNet as the recipe says: {'; '.join(reasons)}. No figure here is a result."
    devices = sorted({run["device"] for run in found["cells"].values() if "device" in run})
    return f"Measured on the 50,000 pictures of a validation set of 1,000 classes ({', '.join(devices)})."


def _rows(table: Table, found: Found, net: str, budget: str) -> list[str]:
    rows = []
    for chain in table.chains:
        runs = [r for r in found["cells"].values() if (r["net"], r["budget"], r["chain"]) == (net, budget, chain)]
        done = [run for run in runs if "score" in run]
        seeds = f", {len(done)} seeds" if len(done) > 1 else ""
        if done:
            rows.append(f"| {budget} | {chain}{seeds} | {' | '.join(_figures(table, net, budget, chain, done))} |")
        elif runs:
            rows.append(f"| {budget} | {chain} | {runs[0]['error']} |" + " |" * (len(COLUMNS) - 1))
    return rows


def _figures(table: Table, net: str, budget: str, chain: str, runs: Sequence[Found]) -> list[str]:
    said = [f for f in table.reported if (f.net, f.budget, f.chain) == (net, budget, chain)]
    chosen = [epoch for run in runs if (epoch := best(run["epochs"]))]
    last = [run["epochs"][-1]["top1"] for run in runs if run["epochs"]]
    at = ", ".join(f"{epoch['epoch']:g}" for epoch in chosen)
    first = runs[0]
    macs = first["macs"]
    return [
        _percent([run["score"] for run in runs]),
        _percent(last) if last else "—",
        f"{_percent([epoch['top1'] for epoch in chosen])} ({at})" if chosen else "—",
        "; ".join(f"{figure.says} ({figure.source})" for figure in said) or "—",
        f"{100 * first['kept'] / first['total']:.1f} %",
        f"{100 * macs['sparse'] / macs['dense']:.1f} %" if macs else "—",
        f"{statistics.mean(run['seconds'] for run in runs) / 60:.1f}",
    ]


def _percent(scores: Sequence[float]) -> str:
    return cell([100 * score for score in scores], digits=2)
