"""report.html of one run: what it came to, then why, in one file that needs nothing else and no network."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allot.budget.units import unit
from allot.budget.unused import MUCH, unused
from allot.export.certificate.certificate import rows_of_run
from allot.export.certificate.records import rewrite
from allot.export.files.formats import PAGE, RECIPE
from allot.export.timing.clock import AS_DENSE
from allot.report.explanation import explanation, kept_rows
from allot.report.fidelity import compared_as, fidelity, warnings
from allot.report.folding import folded
from allot.report.frame import percent, template
from allot.report.headline import Headline
from allot.report.repeat import load_snippet, repeat_command
from allot.report.scores import change_text, lower_is_better
from allot.report.seed_groups import reading_report
from allot.report.stages import batch_norm_sentence, looks, other_sentences, stages, training_sentences
from allot.report.table import speed
from allot.report.trajectories import budget_chart, density_chart, loss_charts, read_steps
from allot.run.store import write

Report = Mapping[str, Any]


def write_run(run: Path, report: Report, page: Path | None = None) -> Path:
    """Write RUN/report.html, or `page`, from report.json and the files beside it; returns the path of the page.

    Raises:
        UsageError: one of these files does not hold what a report needs, or the page cannot be written.
    """
    text = page_of(run, report)
    if page is None or page.resolve() == (run / PAGE).resolve():
        rewrite(run, {PAGE: text})
    else:
        write(page, text)
    return page or run / PAGE


def page_of(run: Path, report: Report) -> str:
    """The page of a run, from report.json and the files beside it.

    Raises:
        UsageError: one of these files does not hold what a report needs.
    """
    recipe = run / RECIPE
    with reading_report(run):
        rows = rows_of_run(run, report)
        checked = {"rows": rows, "passed": all(row["passed"] for row in rows)}
        text = recipe.read_text(errors="replace") if recipe.exists() else ""
        return run_page(report, checked, text, read_steps(run), str(run))


def run_page(report: Report, certificate: Report, recipe: str, steps: Sequence[Report], run: str = "RUN") -> str:
    """One run: headline and verdict, size and speed, densities, the work of each stage, and how to use the result.

    Args:
        certificate: `{rows, passed}`.
        recipe: the text of recipe.yaml.
        steps: of steps.jsonl.
        run: the run directory, as commands on the page name it.
    """
    rows, head, passed = kept_rows(report), Headline.of(report), certificate.get("passed", False)
    ranked = sorted(rows, key=lambda row: (row["density"], row["name"]))
    tone, verdict = _verdict(report, head, passed=passed)
    return template("run.html").render(
        report=report,
        headline=head,
        tone=tone,
        verdict=verdict,
        removed=_removed(report),
        score_tone=_TONES[head.grade],
        speed=speed(report),
        speed_sentence=_speed_sentence(report),
        checks=certificate.get("rows", []),
        passed=passed,
        recipe=recipe,
        command=repeat_command(report),
        snippet=load_snippet(report, run),
        verify=shlex.join(["allot", "verify", run]),
        rows=rows,
        bars=_bars(rows),
        explanation=explanation(report),
        most=ranked[-1] if ranked else None,
        least=ranked[0] if ranked else None,
        budget=[{**row, "text": _budget_text(row, report)} for row in report["budget"]],
        density_chart=density_chart(report),
        budget_chart=budget_chart(steps),
        loss_charts=loss_charts(steps),
        exports=report.get("exports", []),
        close=fidelity(report),
        stages=stages(report, steps),
        looks=looks(report),
        others=other_sentences(report),
        trainings=training_sentences(report),
        batch_norm=batch_norm_sentence(report),
        compared_as=compared_as(report),
        warnings=warnings(report),
        memory=report["diagnostics"].get("memory", {}),
        fit=report["diagnostics"].get("fit", {}),
        compute=[_COMPUTE[name].format(value) for name, value in report.get("compute", {}).items() if name in _COMPUTE],
    )


_TONES = {"close": "good", "loss": "warn", "far": "bad", "": ""}


def _verdict(report: Report, head: Headline, *, passed: bool) -> tuple[str, str]:
    """(tone, sentence): whether promises were kept, and how near the net is to the dense one."""
    promises = [*report["budget"], *report.get("guarantees", ())]
    missed = [f"{row['kind']} {row['asked']}" for row in promises if not row["met"]]
    scores, close = report["scores"], fidelity(report)
    if not passed:
        return "bad", "The saved files do not hold what was promised: see the checks below."
    if missed:
        return "bad", f"Missed: {', '.join(missed)}."
    if close and close.value is None:
        return "bad", "Budget met; the outputs are not finite: do not use this net."
    if report.get("untrained"):
        return "bad", "Budget met, but the dense model looks untrained: these figures say nothing."
    if not scores:
        return "", "Budget met; not scored on labelled data."
    change = change_text(scores["dense"], scores["sparse"], scores)
    side = "above" if lower_is_better(scores) else "below"
    return _TONES[head.grade], {
        "far": f"Budget met; the score is far {side} the dense model's ({change}): look before you use this net.",
        "loss": f"Budget met; the score is {side} the dense model's ({change}).",
    }.get(head.grade, f"Budget met; the score is close to the dense model's ({change}).")


def _removed(report: Report) -> tuple[str, str]:
    """(share, of what) the budget removed: of the MACs where these alone are limited, else of the weights in scope."""
    macs = report["macs"]
    if macs and macs["dense"] and {row["kind"] for row in report["budget"]} == {"macs"}:
        return percent(1 - macs["sparse"] / macs["dense"]), "MACs removed"
    in_scope = " in scope" if report.get("weights", 0) > report["total"] else ""
    return percent(report["sparsity"]), f"weights{in_scope} removed"


def _speed_sentence(report: Report) -> str:
    measured = speed(report)
    if measured["verdict"] == AS_DENSE:
        return f"it {AS_DENSE}: a smaller file is no faster by itself."
    if measured["speedup"] is None:
        return "it was not timed: a smaller file is no faster by itself."
    return f"measured to be {measured['verdict']} here: {measured['speedup']:.2f}x ({measured['form']})."


def _bars(rows: Sequence[Report]) -> list[dict[str, Any]]:
    """`{name, layers, kept, total, density}` of each bar of the chart: blocks that are alike share one."""
    bars, every = [], ".weight" if all(row["name"].endswith(".weight") for row in rows) else ""
    for name, alike in folded(rows):
        kept, total = (sum(row[key] for row in alike) for key in ("kept", "total"))
        bars.append(
            {
                "name": name.removesuffix(every),
                "layers": len(alike),
                "kept": kept,
                "total": total,
                "density": kept / total,
            }
        )
    return bars


def _budget_text(row: Report, report: Report) -> str:
    left = unused(report["budget"])
    note = f"; {percent(left)} unused" if left > MUCH else ""
    if row["kind"] == "sparsity":
        return f"{report['kept']:,} of {report['total']:,} weights kept{note}"
    if row["kind"] == "latency":
        return f"{row['achieved'] / 1e6:.3f} of {row['limit'] / 1e6:.3f} ms allowed, by the tables{note}"
    return f"{row['achieved']:,} of {row['limit']:,} {unit(row['kind'])} allowed{note}"


_COMPUTE = {
    "micro_batch": "activations of {} samples at a time (micro_batch)",
    "amp": "training in {} (amp)",
    "channels_last": "images laid out with channels last (channels_last)",
    "compile": "the model compiled (compile)",
    "checkpoint": "activations computed again instead of kept (checkpoint)",
    "cached": "at most {:,} bytes of the dense model's outputs kept (cached)",
}
