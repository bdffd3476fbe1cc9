"""Reports as terminal tables: what comes out is for rich to print."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich import box
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from allot.budget.unused import MUCH, unused
from allot.export.timing.clock import AS_DENSE, verdict
from allot.report.fidelity import fidelity, warnings
from allot.report.folding import folded
from allot.report.layers import macs_kept
from allot.report.scores import change_text, is_share, lower_is_better, score_text
from allot.report.stages import stages
from allot.run.recipes import RECIPES

Report = Mapping[str, Any]

_BAR = 12
_text_column = partial(Column, overflow="fold")
_label_column = partial(Column, no_wrap=True)
_figure_column = partial(Column, justify="right")
_whole_column = partial(Column, justify="right", no_wrap=True)  # a figure that is never broken over lines
_table = partial(Table, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def run_table(report: Report) -> RenderableType:
    """One run: what was promised, what it cost, and every layer."""
    title = f"{report['model']}: {report['method']} ({report['pattern']}, score {report['score']}"
    title += f", repair {'+'.join(report['repair'])})" if report["repair"] else ")"
    ladder = ladder_table(report)
    tables = _summary_table(report), *([ladder] if ladder else []), layer_table(report["layers"])
    tables += tuple(_exports_table(report["exports"]))
    kept = [Text(row["text"], style="" if row["met"] else "bold red") for row in report.get("guarantees", ())]
    warned = [Text(line, style="yellow") for line in warnings(report)]
    first = [warned.pop(0)] if report.get("untrained") else []
    return Group(*first, Text(title, style="bold"), *tables, *kept, *warned, *_skipped_lines(report))


def ladder_table(report: Report) -> Table | None:
    """The repairs of a run, how near the dense net each came, and whether it was kept; None where it has one or none.

    >>> ladder_table({"fidelity": []}) is None
    True
    """
    found = [stage for stage in stages(report) if stage.outcome]
    if len(found) < 3:  # the selected weights, and a repair
        return None
    table = _table(_label_column("step"), _label_column("distance from dense"), _label_column(), _label_column())
    for stage in found:
        style = {"undone": "yellow", "left out": "dim"}.get(stage.outcome, "green")
        distance, agreement = (stage.after.distance, stage.after.agreement) if stage.after else ("", "")
        table.add_row(escape(stage.name), distance, agreement, Text(stage.outcome, style=style))
    return table


def plan_table(plan: Report) -> RenderableType:
    """A plan: the budget's rows and every layer."""
    title = Text(f"{plan['model']}: {plan['method']} ({plan['pattern']})", style="bold")
    table = _table("budget", "achieved", "")
    for cells in _budget_rows(plan):
        table.add_row(*cells)
    kept, total = plan["kept"], plan["total"]
    table.add_row("weights kept in scope", f"{kept:,} of {total:,}", _percent_of(kept, total))
    for name, pair in _of_whole_model(plan):
        table.add_row(name, f"{pair['sparse']:,} of {pair['dense']:,}" if pair else "unknown", _share(pair))
    return Group(title, table, layer_table(plan["layers"]), *_skipped_lines(plan))


def layer_table(layers: Sequence[Report]) -> Table:
    """Every layer with what it keeps; layers alike in repeated blocks share a row, whose figures are their sums."""
    # figures stay whole: the bar gives way, and then a long name folds
    figures = map(_whole_column, ("kept", "of", "density", "MACs kept"))
    bars = Column(min_width=4, max_width=_BAR)
    table = _table(_label_column("layer", min_width=12, overflow="fold"), *figures, bars, title="layers")
    if layers and all(layer.get("macs") is None for layer in layers):
        table.caption = "MACs are counted on an input: give --input C,H,W or --data DATA"
    for name, alike in folded(layers):
        kept, total = (sum(layer[key] for layer in alike) for key in ("kept", "total"))
        counts = [macs_kept(layer) for layer in alike]
        macs = "not counted" if None in counts else f"{sum(filter(None, counts)):,}"
        shown = name + (f" x{len(alike)}" if len(alike) > 1 else "")
        table.add_row(escape(shown), f"{kept:,}", f"{total:,}", f"{kept / total:.3f}", macs, Bar(1, 0, kept / total))
    return table


_SHORT = {AS_DENSE: "as dense"}  # in a column of a narrow terminal


def comparison_table(reports: Sequence[tuple[str, Report]]) -> Table:
    """Several runs side by side: (label, report) each; what all have in common stands in the title."""
    models = {report["model"] for _, report in reports}
    labels = [label for label, _ in reports]
    alike = len(set(labels)) > 1 and len({os.path.isabs(label) for label in labels}) == 1
    folder = os.path.commonpath([os.path.dirname(label) for label in labels]) if alike else ""
    title = f"runs{f' of {models.copy().pop()}' if len(models) == 1 else ''}{f', in {folder}' if folder else ''}"
    figures = map(_whole_column, ("sparsity\nof model", "MACs", "bytes", "score\n(dense)", "speed"))
    columns = ("run", *(["model"] if len(models) > 1 else []), "method")
    table = _table(*map(_text_column, columns), *figures, title=escape(title))
    for label, report in reports:
        macs, scores, size = report["macs"], report["scores"], report["bytes"]["file"]
        weights = report.get("whole", {}).get("weights")  # removed from the whole model, beside that of the scope
        measured = speed(report)
        table.add_row(
            escape(os.path.relpath(label, folder) if folder else label),
            *([escape(report["model"])] if len(models) > 1 else []),
            escape(_chain_text(report)),
            f"{report['sparsity']:.4f}" + (f"\n{1 - weights['sparse'] / weights['dense']:.4f}" if weights else ""),
            _percent_of(macs["sparse"], macs["dense"]) if macs else "not counted",
            "not saved" if size is None else f"{size:,}",
            f"{_score_text(scores['sparse'], scores)}\n({_score_text(scores['dense'], scores)})"
            if scores
            else "not scored",
            f"{measured['speedup']:.2f}x" if measured["speedup"] else _SHORT.get(measured["verdict"], "not measured"),
        )
    return table


def _chain_text(report: Report) -> str:
    """The method of a run, and its repairs where they are not those of the recipe."""
    recipe = RECIPES.get(report["method"])
    repairs = [] if recipe and set(report["repair"]) <= set(recipe.repair) else report["repair"]
    return " + ".join((report["method"], *repairs))


def speed(report: Report) -> dict[str, Any]:
    """`{speedup, form, verdict, dense_ms, sparse_ms}`: how many times as fast as dense the run was measured, or nulls.

    Of exports, the fastest form of the run over the fastest of the dense net: what is slow in one runtime is no gain.
    Where all forms compute as dense, there is a verdict without times.
    """
    timed = [row for row in report["exports"] if row["milliseconds"]]
    speedup = form = word = dense_ms = sparse_ms = None
    if latency := report["latency"]:
        dense_ms, sparse_ms, form = latency["dense_ms"], latency["sparse_ms"], latency["runtime"]
    elif timed:
        dense, sparse = (min(timed, key=lambda row: row["milliseconds"][net]) for net in ("dense", "sparse"))
        dense_ms, sparse_ms = dense["milliseconds"]["dense"], sparse["milliseconds"]["sparse"]
        form = sparse["form"] if dense is sparse else f"{sparse['form']}; dense as {dense['form']}"
        speedup, word = (sparse["faster"], sparse["verdict"]) if dense is sparse else (None, None)
    elif report["exports"]:
        word = AS_DENSE
    if dense_ms is not None and speedup is None:
        speedup, word = dense_ms / sparse_ms, verdict(dense_ms / sparse_ms)
    return {"speedup": speedup, "form": form, "verdict": word, "dense_ms": dense_ms, "sparse_ms": sparse_ms}


def sweep_table(results: Report) -> Table:
    """Means over seeds: a row a budget, a column a method."""
    means = {(row["budget"], row["method"]): row for row in results["means"]}
    budgets, methods = (list(dict.fromkeys(names)) for names in zip(*means, strict=True)) if means else ([], [])
    columns = (_whole_column(escape(method)) for method in methods)
    table = _table(_text_column("budget"), *columns, title="score, mean ± standard deviation over seeds")
    for budget in budgets:
        table.add_row(escape(budget), *(_score_cell(means[budget, method]) for method in methods))
    return table


def _score_cell(row: Report) -> str:
    if row["score"] is None:
        return "cannot be met" if row["failed"] else "not scored"
    spread = f" ± {row['spread']:.4f}" if row["spread"] is not None else ""
    return f"{row['score']:.4f}{spread}" + (f" ({row['failed']} failed)" if row["failed"] else "")


def search_table(results: Report) -> Table:
    """A row for every run of a search, in order."""
    table = _table(_text_column("budget"), _label_column("score"), _text_column("why"), title="search")
    for row in results["cells"]:
        met = Text("kept", style="green") if row["met"] else Text("not kept", style="bold red")
        table.add_row(escape(row["budget"]), met, escape(row.get("text") or row["error"]))
    return table


def verified_table(rows: Sequence[Report]) -> RenderableType:
    """A line for every file: what `verify` checked of it, and how many checks passed; those that failed in full."""
    table = _table(_text_column("file"), _text_column("checked"), _figure_column("passed"))
    files: dict[str, list[Report]] = {}
    for row in rows:
        files.setdefault(row["file"].removesuffix(".probe.safetensors"), []).append(row)
    for file, checks in files.items():
        passed, names = sum(row["passed"] for row in checks), dict.fromkeys(row["check"] for row in checks)
        style = "green" if passed == len(checks) else "bold red"
        table.add_row(escape(file), escape(", ".join(names)), Text(f"{passed} of {len(checks)}", style=style))
    failed = [row for row in rows if not row["passed"]]
    return Group(table, certificate_table(failed)) if failed else table


def certificate_table(rows: Sequence[Report]) -> Table:
    """Every check of `verify`."""
    table = _table(*map(_text_column, ("file", "check", "promised", "found")), _label_column(), title="certificate")
    for row in rows:
        passed = Text("pass", style="green") if row["passed"] else Text("FAIL", style="bold red")
        cells = (escape(check_text(row[key])) for key in ("promised", "found"))
        table.add_row(escape(row["file"]), escape(row["check"]), *cells, passed)
    return table


def export_table(row: Report) -> RenderableType:
    """One export next to the dense model in the same form."""
    table = _dense_and_sparse_table()
    _add_counts(table, "bytes", row["dense_bytes"], row["bytes"])
    _add_ideal(table, row["bytes"], row.get("with_ideal_mask"))
    _add_counts(table, "params", row["dense_params"], row["params"])
    _add_counts(table, "MACs executed", row["dense_macs"], row["macs"])
    dense, sparse = _milliseconds(row)
    table.add_row("one input, median ms", dense, sparse, _speed_cell(row))
    error = f"equal to {row['error']:.0e} of the largest" if row["error"] else "the same, bit for bit"
    sentence = f"{row['file']}: opened again, outputs are {error}"
    return Group(table, Text(sentence), *([Text(row["note"])] if row.get("note") else ()))


def _exports_table(exports: Sequence[Report]) -> list[Table]:
    """All exports in one table; no table without exports."""
    figures = map(_figure_column, ("bytes", "dense", "of ideal mask", "ms", "dense ms", "speed (half of the rounds)"))
    table = _table("form", *figures, title="exports, opened again and timed beside dense")
    for row in exports:
        ideal = row.get("with_ideal_mask")
        over = f"{row['bytes'] / ideal:.2f}x" if ideal else ""
        dense, sparse = _milliseconds(row)
        sizes = f"{row['bytes']:,}", f"{row['dense_bytes']:,}", over
        table.add_row(escape(row["form"]), *sizes, sparse, dense, _speed_cell(row))
    return [table] if exports else []


def _milliseconds(row: Report) -> list[str]:
    """Times of the dense and of the sparse model; empty where the form computes as dense."""
    return [f"{row['milliseconds'][net]:.3f}" if row["milliseconds"] else "" for net in ("dense", "sparse")]


def _speed_cell(row: Report) -> str:
    if not row["milliseconds"]:
        return str(row["verdict"])
    low, high = row["spread"]
    return f"{row['verdict']} here: {row['faster']:.2f}x ({low:.2f} to {high:.2f})"


def advice_table(advice: Report) -> RenderableType:
    """What pays on this machine: the whole net as predicted, linear layers as measured."""
    net = _table(_label_column(), *map(_whole_column, ("left", "times as fast")), title="the whole net, predicted")
    for row in advice["channels"]:
        net.add_row(f"channels, {advice['runtime']}", f"{100 * row['macs']:.0f} % of MACs", f"{row['faster']:.2f}")
    speedups = (advice["net"] or {"faster": {}})["faster"]
    for density, speedup in speedups.items() if any(speedup > 1 for speedup in speedups.values()) else ():
        net.add_row("sparse matrices, PyTorch", f"{100 * float(density):g} % of weights", f"{speedup:.2f}")
    densities = (
        f"{100 * float(density):g} %" for density in (advice["linear"][0]["faster"] if advice["linear"] else ())
    )
    figures = map(_whole_column, (*densities, "breaks even at"))
    layers = _table(_text_column("layer"), *figures, title="linear layers as sparse matrices, times as fast")
    for row in advice["linear"]:
        even = "never" if row["break_even"] is None else f"{100 * row['break_even']:.1f} %"
        name = f"{escape(row['layer'])}" + (f" and {row['layers'] - 1} alike" if row["layers"] > 1 else "")
        layers.add_row(name, *(f"{speedup:.2f}" for speedup in row["faster"].values()), even)
    tables = [table for table in (net, layers) if table.row_count]
    commands = [Text(command, style="bold") for command in advice["commands"]]
    return Group(*tables, *(Text(sentence) for sentence in advice["said"]), *commands)


def methods_table(rows: Sequence[tuple[str, str, str, str]]) -> Table:
    """(name, role, needs, what it does) of every method."""
    table = _table(*map(_text_column, ("name", "role", "needs", "what it does")))
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _dense_and_sparse_table() -> Table:
    return _table(_label_column(), *map(_figure_column, ("dense", "sparse", "")))


def _add_counts(table: Table, name: str, dense: int, sparse: int) -> None:
    table.add_row(name, f"{dense:,}", f"{sparse:,}", _percent_of(sparse, dense))


def _add_ideal(table: Table, size: int, ideal: int | None) -> None:
    if ideal:
        table.add_row("bytes with an ideal mask", "", f"{ideal:,}", f"file is {size / ideal:.2f} of it")


def _summary_table(report: Report) -> Table:
    table = _dense_and_sparse_table()
    _add_counts(table, "weights in scope", report["total"], report["kept"])
    if macs := report["macs"]:
        name = "MACs in scope" if report["groups"] else "MACs, zeros skipped"
        _add_counts(table, name, macs["dense"], macs["sparse"])
    size = report["bytes"]
    if size["file"]:
        _add_counts(table, "bytes on disk", size["dense"], size["file"])
    for name, pair in _of_whole_model(report):
        table.add_row(name, *((f"{pair[net]:,}" for net in pair) if pair else ("unknown", "unknown")), _share(pair))
    _add_ideal(table, size["file"], size.get("with_ideal_mask"))
    if scores := report["scores"]:
        for name, pair in scores.get("values", {scores["metric"]: scores}).items():
            dense, sparse = pair["dense"], pair["sparse"]
            label = f"{name}{', lower is better,' if lower_is_better(scores, name) else ''} on held-out data"
            cells = _score_text(dense, scores), _score_text(sparse, scores), change_text(dense, sparse, scores)
            table.add_row(escape(label), *cells)
    else:
        table.add_row("score", "", "", "not measured: --test DATA")
    if close := fidelity(report):
        table.add_row(f"fidelity, {report['watch']['samples']:,} inputs watched", "", close.distance, close.agreement)
    if scores and (perplexity := scores.get("perplexity")):
        dense, sparse = perplexity["dense"], perplexity["sparse"]
        table.add_row("perplexity, lower is better", f"{dense:,.2f}", f"{sparse:,.2f}", f"x {sparse / dense:.3f}")
    if unreadable := report.get("unreadable", 0) + (scores or {}).get("unreadable", 0):
        table.add_row("samples that cannot be read", "", f"{unreadable:,}", "left out")
    for limit, achieved, met in _budget_rows(report):
        table.add_row(f"budget {limit}", "", achieved, met)
    for row in report.get("guarantees", ()):
        table.add_row(escape(f"{row['kind']} {row['asked']}"), "", "", _met(met=row["met"]))
    if time := report["latency"]:
        reached, allowed = (100 * time[key] / time["dense_ms"] for key in ("sparse_ms", "limit_ms"))
        name = escape(f"ms a batch of {time['batch']}, {time['runtime'].partition(':')[0]}, measured")
        share = f"{reached:.1f} %, {allowed:.1f} % allowed"
        table.add_row(name, f"{time['dense_ms']:.3f}", f"{time['sparse_ms']:.3f}", share)
    pushed = f"{report['images']['forward']:,} samples forward, {report['images']['backward']:,} back"
    table.add_row("cost", "", f"{sum(report['seconds'].values()):.1f} s", pushed)
    return table


def _budget_rows(report: Report) -> list[tuple[str, str, Text]]:
    """(limit as requested, amount that was reached, verdict) of every limit."""
    cells, left = [], unused(report["budget"])
    for row in report["budget"]:
        achieved = f"{row['achieved']:,} of {row['limit']:,}"
        if row["kind"] == "latency":
            achieved = f"{row['achieved'] / 1e6:.3f} of {row['limit'] / 1e6:.3f} ms foretold"
        if row["kind"] == "sparsity":  # as near as whole weights come
            achieved = f"{report['kept']:,} kept"
        met = Text("met", style="green") if row["met"] else Text("MISSED", style="bold red")
        if left > MUCH:
            met = Text(f"met, {100 * left:.0f} % unused", style="bold yellow")
        cells.append((escape(f"{row['kind']}={row['asked']}"), achieved, met))
    return cells


def _met(*, met: bool) -> Text:
    return Text("met", style="green") if met else Text("MISSED", style="bold red")


def _score_text(value: float, scores: Report) -> str:
    return f"{value:.4f}" if is_share(scores) else score_text(value, scores)


def _skipped_lines(report: Report) -> list[Text]:
    """What stayed dense, what no repair reached, and how much of the model is in scope."""
    reasons = Counter(report["skipped"].values()).most_common()
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
    lines = [Text(f"left dense: {listed}", style="dim")] if reasons else []
    for method, found in report.get("diagnostics", {}).items():
        if isinstance(found, Mapping) and (layers := found.get("not_repaired")):
            lines.append(Text(f"pruned, and not repaired by {method}: {', '.join(layers)}", style="yellow"))
    total, weights = report["total"], report.get("weights", 0)
    if total < weights:
        share = f"in scope: {_percent_of(total, weights)} of the {weights:,} weights of the model"
        half = "; less than half: the budget holds for these weights alone" if 2 * total < weights else ""
        lines.append(Text(share + half, style="bold yellow" if half else "dim"))
    return lines


def _of_whole_model(report: Report) -> list[tuple[str, Mapping[str, int] | None]]:
    """(name, {dense, sparse}) of weights, MACs and bytes, None where MACs are unknown; reports of before have none."""
    whole = report.get("whole", {})
    return [(f"{'MACs' if kind == 'macs' else kind} of the whole model", pair) for kind, pair in whole.items()]


def _share(pair: Mapping[str, int] | None) -> str:
    return _percent_of(pair["sparse"], pair["dense"]) if pair else "no input to count on"


def _percent_of(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else ""


def check_text(value: Any) -> str:
    """What a check promised or found, as text; of a digest its first digits."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {check_text(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(check_text, value)) or "none"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{64}", text) else text
