"""Reports as terminal tables: what comes out is for rich to print."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from allot.export.timing.clock import verdict
from allot.report.scores import change_text, is_share, lower_is_better, score_text

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
    tables = _summary_table(report), layer_table(report["layers"]), *_exports_table(report["exports"])
    kept = [Text(row["text"], style="" if row["met"] else "bold red") for row in report.get("guarantees", ())]
    return Group(Text(title, style="bold"), *tables, *kept, *_skipped_lines(report))


def plan_table(plan: Report) -> RenderableType:
    """A plan: the budget's rows and every layer."""
    title = Text(f"{plan['model']}: {plan['method']} ({plan['pattern']})", style="bold")
    table = _table("budget", "achieved", "")
    for cells in _budget_rows(plan):
        table.add_row(*cells)
    kept, total = plan["kept"], plan["total"]
    table.add_row("weights kept in scope", f"{kept:,} of {total:,}", _percent_of(kept, total))
    return Group(title, table, layer_table(plan["layers"]), *_skipped_lines(plan))


def layer_table(layers: Sequence[Report]) -> Table:
    """Every layer with what it keeps; layers alike in repeated blocks share a row, whose figures are their sums."""
    # figures stay whole: a long name folds, and the bar gives way
    figures = map(_whole_column, ("kept", "of", "density", "MACs kept"))
    table = _table(_text_column("layer", min_width=12), *figures, _label_column(width=_BAR), title="layers")
    for name, alike in folded(layers):
        kept, total = (sum(layer[key] for layer in alike) for key in ("kept", "total"))
        counts = [macs_kept(layer) for layer in alike]
        macs = "not counted" if None in counts else f"{sum(filter(None, counts)):,}"
        bar = "█" * round(kept / total * _BAR) or "▏"
        shown = name + (f" x{len(alike)}" if len(alike) > 1 else "")
        table.add_row(escape(shown), f"{kept:,}", f"{total:,}", f"{kept / total:.3f}", macs, bar)
    return table


def folded(layers: Sequence[Report]) -> list[tuple[str, list[Report]]]:
    """(name, layers) of every row: three layers or more that are alike but for one number in their names share a row.

    Alike: of one size, with the same MACs and as many weights kept, but for the one weight by which rounding parts
    them. In the name of the row `*` stands for the number where all layers of such names share it, else the numbers.
    Blocks within blocks fold twice.

    >>> rows = [{"name": f"h.{i}.up", "kept": 5 + (i > 1), "total": 9, "macs": None} for i in range(4)]
    >>> [(name, len(alike)) for name, alike in folded([*rows, {**rows[0], "name": "h.4.up", "kept": 9}])]
    [('h.0-3.up', 4), ('h.4.up', 1)]
    """
    rows = [(tuple(layer["name"].split(".")), [layer]) for layer in layers]
    for place in range(max((len(parts) for parts, _ in rows), default=0)):
        rows = _folded_at(place, rows)
    names = [layer["name"].split(".") for layer in layers]
    return [(".".join(_starred(parts, len(alike), names)), alike) for parts, alike in rows]


def _folded_at(
    place: int, rows: Sequence[tuple[tuple[str, ...], list[Report]]]
) -> list[tuple[tuple[str, ...], list[Report]]]:
    """The rows, folded over the number at one place of their names."""
    by_name: dict[tuple[Any, ...], list[int]] = {}  # the name without the number -> rows
    for i, (parts, _) in enumerate(rows):
        if len(parts) > place and parts[place].isdigit():
            by_name.setdefault((parts[:place], parts[place + 1 :]), []).append(i)
    first_of: dict[int, tuple[tuple[str, ...], list[Report]]] = {}  # a row -> the row that it becomes
    gone: set[int] = set()
    for same_name in by_name.values():
        for alike in _alike([rows[i][1] for i in same_name]):
            indices = [same_name[j] for j in alike]
            if len(indices) >= 3:
                parts = rows[indices[0]][0]
                numbers = [int(rows[i][0][place]) for i in indices]
                row = (*parts[:place], _ranges(numbers), *parts[place + 1 :])
                first_of[indices[0]] = row, [layer for i in indices for layer in rows[i][1]]
                gone.update(indices[1:])
    return [first_of.get(i, row) for i, row in enumerate(rows) if i not in gone]


def _starred(parts: tuple[str, ...], count: int, names: Sequence[list[str]]) -> list[str]:
    """The parts of a row's name with `*` for its numbers, where its `count` layers are all of such names."""
    if count == 1:
        return list(parts)
    starred = ["*" if not part.isdigit() and re.fullmatch(r"[\d,-]+", part) else part for part in parts]
    such = sum(
        len(name) == len(starred)
        and all(part.isdigit() if star == "*" else part == star for part, star in zip(name, starred, strict=True))
        for name in names
    )
    return starred if such == count else list(parts)


def _alike(groups: Sequence[list[Report]]) -> list[list[int]]:
    """Places of the groups, together where their layers have the same sizes and keep as much, to one weight."""
    clusters: list[tuple[Any, int, int, list[int]]] = []  # sizes, fewest and most kept, places
    for i, layers in enumerate(groups):
        sizes = sorted((layer["total"], layer.get("macs") or 0) for layer in layers)
        fewest, most = (pick(layer["kept"] for layer in layers) for pick in (min, max))
        for j, (other, low, high, places) in enumerate(clusters):
            if other == sizes and max(high, most) - min(low, fewest) <= 1:
                clusters[j] = other, min(low, fewest), max(high, most), [*places, i]
                break
        else:
            clusters.append((sizes, fewest, most, [i]))
    return [places for *_, places in clusters]


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short.

    >>> _ranges([1, 2, 3, 5])
    '1-3,5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def macs_kept(row: Report) -> int | None:
    """The MACs of a layer where zeros are skipped; None where they were not counted, and for groups of channels."""
    macs = row.get("macs")
    return None if macs is None else round(macs * row["kept"] / row["total"])


def comparison_table(reports: Sequence[tuple[str, Report]]) -> Table:
    """Several runs side by side: (label, report) each."""
    figures = map(_whole_column, ("sparsity", "MACs", "bytes", "dense", "sparse", "speed"))
    table = _table(*map(_text_column, ("run", "model", "method")), *figures, title="runs")
    for label, report in reports:
        macs, scores, size = report["macs"], report["scores"], report["bytes"]["file"]
        speedup = speed(report)["speedup"]
        table.add_row(
            escape(label),
            escape(report["model"]),
            escape(" + ".join((report["method"], *report["repair"]))),
            f"{report['sparsity']:.4f}",
            _percent_of(macs["sparse"], macs["dense"]) if macs else "not counted",
            "not saved" if size is None else f"{size:,}",
            _score_text(scores["dense"], scores) if scores else "not scored",
            _score_text(scores["sparse"], scores) if scores else "not scored",
            "not measured" if speedup is None else f"{speedup:.2f}x",
        )
    return table


def speed(report: Report) -> dict[str, Any]:
    """`{speedup, form, verdict, dense_ms, sparse_ms}`: how many times as fast as dense the run was measured, or nulls.

    Of exports, the fastest form of the run over the fastest of the dense net: what is slow in one runtime is no gain.
    """
    speedup = form = word = dense_ms = sparse_ms = None
    if latency := report["latency"]:
        dense_ms, sparse_ms, form = latency["dense_ms"], latency["sparse_ms"], latency["runtime"]
    elif exports := report["exports"]:
        dense, sparse = (min(exports, key=lambda row: row["milliseconds"][net]) for net in ("dense", "sparse"))
        dense_ms, sparse_ms = dense["milliseconds"]["dense"], sparse["milliseconds"]["sparse"]
        form = sparse["form"] if dense is sparse else f"{sparse['form']}; dense as {dense['form']}"
        speedup, word = (sparse["faster"], sparse["verdict"]) if dense is sparse else (None, None)
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
    _add_limit(table, row["bytes"], row["limit"])
    _add_counts(table, "params", row["dense_params"], row["params"])
    _add_counts(table, "MACs executed", row["dense_macs"], row["macs"])
    times = row["milliseconds"]
    table.add_row("one input, median ms", f"{times['dense']:.2f}", f"{times['sparse']:.2f}", _speed_cell(row))
    error = f"equal to {row['error']:.0e} of the largest" if row["error"] else "the same, bit for bit"
    sentence = f"{row['file']}: opened again, outputs are {error}"
    return Group(table, Text(sentence), *([Text(row["note"])] if row.get("note") else ()))


def _exports_table(exports: Sequence[Report]) -> list[Table]:
    """All exports in one table; no table without exports."""
    figures = map(
        _figure_column, ("bytes", "dense bytes", "of the limit", "ms", "dense ms", "speed (half of the rounds)")
    )
    table = _table("form", *figures, title="exports, opened again and timed beside dense")
    for row in exports:
        over = f"{row['bytes'] / row['limit']:.2f}x" if row["limit"] else ""
        times = (f"{row['milliseconds'][net]:.3f}" for net in ("sparse", "dense"))
        sizes = f"{row['bytes']:,}", f"{row['dense_bytes']:,}", over
        table.add_row(escape(row["form"]), *sizes, *times, _speed_cell(row))
    return [table] if exports else []


def _speed_cell(row: Report) -> str:
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
    return Group(*tables, *(Text(sentence) for sentence in advice["said"]))


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


def _add_limit(table: Table, size: int, limit: int | None) -> None:
    if limit:
        table.add_row("information limit", "", f"{limit:,}", f"file is {size / limit:.2f} of it")


def _summary_table(report: Report) -> Table:
    table = _dense_and_sparse_table()
    _add_counts(table, "weights in scope", report["total"], report["kept"])
    if macs := report["macs"]:
        name = "MACs in scope" if report["groups"] else "MACs, zeros skipped"
        _add_counts(table, name, macs["dense"], macs["sparse"])
    size = report["bytes"]
    if size["file"]:
        _add_counts(table, "bytes on disk", size["dense"], size["file"])
    _add_limit(table, size["file"], size.get("limit"))
    if scores := report["scores"]:
        for name, pair in scores.get("values", {scores["metric"]: scores}).items():
            dense, sparse = pair["dense"], pair["sparse"]
            label = f"{name}{', lower is better,' if lower_is_better(scores, name) else ''} on held-out data"
            cells = _score_text(dense, scores), _score_text(sparse, scores), change_text(dense, sparse, scores)
            table.add_row(escape(label), *cells)
    else:
        table.add_row("score", "", "", "not measured: --test DATA")
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
    images = f"{report['images']['forward']:,} images forward, {report['images']['backward']:,} back"
    table.add_row("cost", "", f"{sum(report['seconds'].values()):.1f} s", images)
    return table


def _budget_rows(report: Report) -> list[tuple[str, str, Text]]:
    """(limit as requested, amount that was reached, verdict) of every limit."""
    cells = []
    for row in report["budget"]:
        achieved = f"{row['achieved']:,} of {row['limit']:,}"
        if row["kind"] == "latency":
            achieved = f"{row['achieved'] / 1e6:.3f} of {row['limit'] / 1e6:.3f} ms foretold"
        if row["kind"] == "sparsity":  # as near as whole weights come
            achieved = f"{report['kept']:,} kept"
        cells.append((escape(f"{row['kind']}={row['asked']}"), achieved, _met(met=row["met"])))
    return cells


def _met(*, met: bool) -> Text:
    return Text("met", style="green") if met else Text("MISSED", style="bold red")


def _score_text(value: float, scores: Report) -> str:
    return f"{value:.4f}" if is_share(scores) else score_text(value, scores)


def _skipped_lines(report: Report) -> list[Text]:
    reasons = Counter(report["skipped"].values()).most_common()
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
    lines = [Text(f"left dense: {listed}", style="dim")] if reasons else []
    total, weights = report["total"], report.get("weights", 0)
    if total < weights:
        share = f"in scope: {_percent_of(total, weights)} of the {weights:,} weights of the model"
        half = "; less than half: the budget holds for these weights alone" if 2 * total < weights else ""
        lines.append(Text(share + half, style="bold yellow" if half else "dim"))
    return lines


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
