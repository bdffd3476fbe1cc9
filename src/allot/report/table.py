"""Reports as terminal tables: what comes out is for rich to print."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from allot.export.timing.clock import verdict

_BAR = 12


def run_table(report: Mapping[str, Any]) -> RenderableType:
    """One run: what was promised, what it cost, and every layer."""
    title = f"{report['model']}: {report['method']} ({report['pattern']}, score {report['score']}"
    title += f", repair {'+'.join(report['repair'])})" if report["repair"] else ")"
    layers = layer_table(report["layers"])
    return Group(Text(title, style="bold"), _summary(report), layers, *_exports(report), *_skipped(report))


def plan_table(plan: Mapping[str, Any]) -> RenderableType:
    """A plan: the budget's rows and every layer."""
    title = Text(f"{plan['model']}: {plan['method']} ({plan['pattern']})", style="bold")
    table = _table()
    for column in ("budget", "achieved", ""):
        table.add_column(column)
    for cells in _budget_rows(plan):
        table.add_row(*cells)
    kept, total = plan["kept"], plan["total"]
    table.add_row("weights kept in scope", f"{kept:,} of {total:,}", f"{100 * kept / total:.2f} %")
    return Group(title, table, layer_table(plan["layers"]), *_skipped(plan))


def layer_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """Every layer with what it keeps."""
    table = _table("layers")  # figures stay whole: a long name folds, and the bar gives way
    table.add_column("layer", overflow="fold", min_width=12)
    for column in ("kept", "of", "density"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("MACs kept", justify="right", no_wrap=True)
    table.add_column("", width=_BAR, no_wrap=True)
    for layer in layers:
        density = layer["density"]
        macs = "not counted" if layer["macs"] is None else f"{round(layer['macs'] * layer['kept'] / layer['total']):,}"
        bar = "█" * round(density * _BAR) or "▏"
        table.add_row(escape(layer["name"]), f"{layer['kept']:,}", f"{layer['total']:,}", f"{density:.3f}", macs, bar)
    return table


def comparison_table(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Several runs side by side: (label, report) each."""
    table = _table("runs")
    table.add_column("run", overflow="fold")
    table.add_column("model", overflow="fold")
    table.add_column("method", overflow="fold")
    for column in ("sparsity", "MACs", "bytes", "dense", "sparse", "speed"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, report in reports:
        macs, scores, size = report["macs"], report["scores"], report["bytes"]["file"]
        table.add_row(
            escape(label),
            escape(report["model"]),
            escape(" + ".join((report["method"], *report["repair"]))),
            f"{report['sparsity']:.4f}",
            _share(macs["sparse"], macs["dense"]) if macs else "not counted",
            "not saved" if size is None else f"{size:,}",
            f"{scores['dense']:.4f}" if scores else "not scored",
            f"{scores['sparse']:.4f}" if scores else "not scored",
            "not measured" if (fast := speed(report))["times"] is None else f"{fast['times']:.2f}x",
        )
    return table


def speed(report: Mapping[str, Any]) -> dict[str, Any]:
    """`{times, where, verdict, dense_ms, sparse_ms}`: how many times as fast as dense the run was measured, or null.

    Of exports, the fastest form of the run over the fastest of the dense net: what is slow in one runtime is no gain.
    """
    if latency := report["latency"]:
        dense, sparse, where = latency["dense_ms"], latency["sparse_ms"], latency["runtime"]
    elif exports := report["exports"]:
        slow, fast = (min(exports, key=lambda row: row["milliseconds"][kind]) for kind in ("dense", "sparse"))
        dense, sparse = slow["milliseconds"]["dense"], fast["milliseconds"]["sparse"]
        if slow is fast:
            return _speed(fast["faster"], fast["form"], fast["verdict"], dense, sparse)
        where = f"{fast['form']}; dense as {slow['form']}"
    else:
        return _speed(None, None, None, None, None)
    return _speed(dense / sparse, where, verdict(dense / sparse), dense, sparse)


def _speed(times: float | None, where: str | None, word: str | None, dense: float | None, sparse: float | None) -> Any:
    return {"times": times, "where": where, "verdict": word, "dense_ms": dense, "sparse_ms": sparse}


def sweep_table(results: Mapping[str, Any]) -> Table:
    """Means over seeds: a row a budget, a column a method."""
    means = results["means"]
    methods = list(dict.fromkeys(row["method"] for row in means))
    table = _table("score, mean ± standard deviation over seeds")
    table.add_column("budget", overflow="fold")
    for method in methods:
        table.add_column(escape(method), justify="right", no_wrap=True)
    by_cell = {(row["budget"], row["method"]): row for row in means}
    for budget in dict.fromkeys(row["budget"] for row in means):
        table.add_row(escape(budget), *(_mean(by_cell[budget, method]) for method in methods))
    return table


def _mean(row: Mapping[str, Any]) -> str:
    if row["score"] is None:
        return "cannot be met" if row["failed"] else "not scored"
    spread = f" ± {row['spread']:.4f}" if row["spread"] is not None else ""
    return f"{row['score']:.4f}{spread}" + (f" ({row['failed']} failed)" if row["failed"] else "")


def certificate_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Every check of `verify`."""
    table = _table("certificate")
    table.add_column("file", overflow="fold")
    table.add_column("check", overflow="fold")
    table.add_column("promised", overflow="fold")
    table.add_column("found", overflow="fold")
    table.add_column("", no_wrap=True)
    for row in rows:
        passed = Text("pass", style="green") if row["passed"] else Text("FAIL", style="bold red")
        promised, found = (short(row[key]) for key in ("promised", "found"))
        table.add_row(escape(row["file"]), escape(row["check"]), escape(promised), escape(found), passed)
    return table


def export_table(row: Mapping[str, Any]) -> RenderableType:
    """One export next to the dense model in the same form."""
    table = _table()
    table.add_column("", no_wrap=True)
    for column in ("dense", "sparse", ""):
        table.add_column(column, justify="right")
    table.add_row("bytes", f"{row['dense_bytes']:,}", f"{row['bytes']:,}", _share(row["bytes"], row["dense_bytes"]))
    if row["limit"]:
        over = f"file is {row['bytes'] / row['limit']:.2f} of it"
        table.add_row("information limit", "", f"{row['limit']:,}", over)
    table.add_row(
        "params", f"{row['dense_params']:,}", f"{row['params']:,}", _share(row["params"], row["dense_params"])
    )
    table.add_row("MACs executed", f"{row['dense_macs']:,}", f"{row['macs']:,}", _share(row["macs"], row["dense_macs"]))
    taken = row["milliseconds"]
    table.add_row("one input, median ms", f"{taken['dense']:.2f}", f"{taken['sparse']:.2f}", _faster(row))
    near = f"equal to {row['error']:.0e} of the largest" if row["error"] else "the same, bit for bit"
    said = f"{row['file']}: opened again, outputs are {near}"
    return Group(table, Text(said), *([Text(row["note"])] if row.get("note") else ()))


def _exports(report: Mapping[str, Any]) -> list[Table]:
    if not report["exports"]:
        return []
    table = _table("exports, opened again and timed beside dense")
    for column in ("form", "bytes", "dense bytes", "of the limit", "ms", "dense ms", "speed (half of the rounds)"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for row in report["exports"]:
        sizes = (
            f"{row['bytes']:,}",
            f"{row['dense_bytes']:,}",
            f"{row['bytes'] / row['limit']:.2f}x" if row["limit"] else "",
        )
        taken = row["milliseconds"]
        table.add_row(escape(row["form"]), *sizes, f"{taken['sparse']:.3f}", f"{taken['dense']:.3f}", _faster(row))
    return [table]


def _faster(row: Mapping[str, Any]) -> str:
    low, high = row["spread"]
    return f"{row['verdict']} here: {row['faster']:.2f}x ({low:.2f} to {high:.2f})"


def advice_table(told: Mapping[str, Any]) -> RenderableType:
    """What pays here: the whole net as foretold, linear layers as measured."""
    net = _table("the whole net, foretold")
    for column in ("", "left", "times as fast"):
        net.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in told["channels"]:
        net.add_row(f"channels, {told['runtime']}", f"{100 * row['macs']:.0f} % of MACs", f"{row['faster']:.2f}")
    gained = (told["net"] or {"faster": {}})["faster"]
    for density, times in gained.items() if any(times > 1 for times in gained.values()) else ():
        net.add_row("sparse matrices, PyTorch", f"{100 * float(density):g} % of weights", f"{times:.2f}")
    layers = _table("linear layers as sparse matrices, times as fast")
    layers.add_column("layer", overflow="fold")
    densities = list(told["linear"][0]["faster"]) if told["linear"] else []
    for column in (*(f"{100 * float(density):g} %" for density in densities), "breaks even at"):
        layers.add_column(column, justify="right", no_wrap=True)
    for row in told["linear"]:
        even = "never" if row["break_even"] is None else f"{100 * row['break_even']:.1f} %"
        name = f"{escape(row['layer'])}" + (f" and {row['layers'] - 1} alike" if row["layers"] > 1 else "")
        layers.add_row(name, *(f"{times:.2f}" for times in row["faster"].values()), even)
    tables = [table for table in (net, layers) if table.row_count]
    return Group(*tables, *(Text(sentence) for sentence in told["said"]))


def methods_table(rows: Sequence[tuple[str, str, str, str]]) -> Table:
    """(name, role, needs, what it does) of every method."""
    table = _table()
    for column in ("name", "role", "needs", "what it does"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _table(title: str | None = None) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _summary(report: Mapping[str, Any]) -> Table:
    table = _table()
    table.add_column("", no_wrap=True)
    table.add_column("dense", justify="right")
    table.add_column("sparse", justify="right")
    table.add_column("", justify="right")
    total, kept = report["total"], report["kept"]
    table.add_row("weights in scope", f"{total:,}", f"{kept:,}", f"{100 * kept / total:.2f} %")
    if macs := report["macs"]:
        table.add_row(
            "MACs in scope" if report["groups"] else "MACs, zeros skipped",
            f"{macs['dense']:,}",
            f"{macs['sparse']:,}",
            _share(macs["sparse"], macs["dense"]),
        )
    size = report["bytes"]
    if size["file"]:
        table.add_row("bytes on disk", f"{size['dense']:,}", f"{size['file']:,}", _share(size["file"], size["dense"]))
    if size.get("limit"):
        over = f"file is {size['file'] / size['limit']:.2f} of it"
        table.add_row("information limit", "", f"{size['limit']:,}", over)
    if scores := report["scores"]:
        change = f"{100 * (scores['sparse'] - scores['dense']):+.2f} points"
        table.add_row(
            escape(f"{scores['metric']} on held-out data"), f"{scores['dense']:.4f}", f"{scores['sparse']:.4f}", change
        )
    else:
        table.add_row("score", "", "", "not measured: --test DATA")
    if scores and (perplexity := scores.get("perplexity")):
        dense, sparse = perplexity["dense"], perplexity["sparse"]
        table.add_row("perplexity, lower is better", f"{dense:,.2f}", f"{sparse:,.2f}", f"x {sparse / dense:.3f}")
    if unreadable := report.get("unreadable", 0) + (scores or {}).get("unreadable", 0):
        table.add_row("samples that cannot be read", "", f"{unreadable:,}", "left out")
    for name, achieved, met in _budget_rows(report):
        table.add_row(f"budget {name}", "", achieved, met)
    if time := report["latency"]:
        within, allowed = (100 * time[key] / time["dense_ms"] for key in ("sparse_ms", "limit_ms"))
        share = f"{within:.1f} %, {allowed:.1f} % allowed"
        named = f"ms a batch of {time['batch']}, {time['runtime'].partition(':')[0]}, measured"
        table.add_row(escape(named), f"{time['dense_ms']:.3f}", f"{time['sparse_ms']:.3f}", share)
    seconds = sum(report["seconds"].values())
    images = report["images"]
    table.add_row("cost", "", f"{seconds:.1f} s", f"{images['forward']:,} images forward, {images['backward']:,} back")
    return table


def _budget_rows(told: Mapping[str, Any]) -> list[tuple[str, str, Text]]:
    """(what was asked, what it came to, verdict) of every limit."""
    cells = []
    for row in told["budget"]:
        achieved = f"{row['achieved']:,} of {row['limit']:,}"
        if row["kind"] == "latency":
            achieved = f"{row['achieved'] / 1e6:.3f} of {row['limit'] / 1e6:.3f} ms foretold"
        if row["kind"] == "sparsity":  # as near as whole weights come
            achieved = f"{told['kept']:,} kept"
        met = Text("met", style="green") if row["met"] else Text("MISSED", style="bold red")
        cells.append((escape(f"{row['kind']}={row['asked']}"), achieved, met))
    return cells


def _skipped(report: Mapping[str, Any]) -> list[Text]:
    reasons: dict[str, int] = {}
    for reason in report["skipped"].values():
        reasons[reason] = reasons.get(reason, 0) + 1
    if not reasons:
        return []
    listed = "; ".join(f"{count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    return [Text(f"left dense: {listed}", style="dim")]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else ""


def short(value: Any) -> str:
    """What a check promised or found, as text; of a digest its first digits."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {short(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(short, value)) or "none"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{64}", text) else text
