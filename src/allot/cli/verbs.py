"""The verbs: what each takes and shows in its help. The work stands in other files, imported when a verb runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from allot.cli.console import loading
from allot.cli.options import (
    BUDGET,
    CHAIN,
    DATA,
    LIMITS,
    METHOD,
    READING,
    RULES,
    SCORING,
    SPEED,
    WHAT,
    Json,
    RunModel,
    option,
    place,
    takes,
)  # fmt: skip
from allot.cli.recipe import RecipeFile
from allot.errors import UsageError
from allot.run.places import check_directory_place, check_file_place, check_run_place
from allot.sources.names import DATA_FORMS, MODEL_FORMS

Function = Callable[..., None]
_NET, _DATA = "zoo:digits-resnet20", "--data zoo:digits"


@dataclass(frozen=True)
class Verb:
    """A command: its function, whose docstring is its help, and three examples."""

    function: Function
    examples: tuple[str, str, str]

    @property
    def epilog(self) -> str:
        """The examples, a paragraph each."""
        return "\n\n".join(("Examples:", *(f"  allot {example}" for example in self.examples)))


VERBS: dict[str, Verb] = {}


def _verb(name: str, *examples: str) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        first, second, third = examples
        VERBS[name] = Verb(function, (first, second, third))
        return function

    return register


@_verb(
    "prune",
    f"prune {_NET} {_DATA} --budget sparsity=0.9",
    "prune net.py:make --weights net.pt --data npz:x.npz --budget macs=50%",
    "prune timm:resnet18 --data folder:photos --budget 0.8 --max-minutes 9",
)
@takes(
    "model", "data", "budget", *CHAIN, "weights", *SCORING, "min_fidelity", *RULES, *LIMITS, "seed", *READING, "input",
    file=True,
)  # fmt: skip
def prune_verb(
    wanted: RecipeFile,
    out: Annotated[
        Path | None,
        option(
            "run directory; an unfinished one resumes, a finished one of the same settings is shown  "
            "[runs/MODEL-METHOD-BUDGET; -2, -3, ... beside a run of other settings]",
            "--out", parser=place, metavar="RUN",
        ),
    ] = None,
    *,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Prune MODEL to a budget and write a run directory; resumes if RUN is unfinished."""
    if out is not None:
        check_run_place(out)
    wanted.parsed_budget()
    with loading():
        from allot.cli.prune import prune_command

    prune_command(wanted, out, as_json=as_json)


@_verb(
    "sweep",
    f"sweep {_NET} {_DATA} --budget 0.8,0.9 --out S",
    "sweep net.py:net --data npz:x.npz --budget 0.9 --method erk,pot --out S",
    "report S",
)
@takes(
    "model", "data", "pattern", "repair", "score", "weights", "test", "metric", *READING, *LIMITS, "input", file=True
)
def sweep_verb(
    wanted: RecipeFile,
    out: Annotated[
        Path | None, option("a run for each cell, and the comparison", "--out", parser=place, metavar="DIR")
    ] = None,
    budget: Annotated[
        list[str] | None,
        option(
            "sparsity=0.5,0.8,0.9; one with several limits: macs=50% and bytes=3MB", "--budget", metavar="KIND=LIMITS",
            panel=BUDGET,
        ),
    ] = None,
    method: Annotated[
        str | None, option("recipes, joined with commas  [erk]", "--method", metavar="NAMES", panel=METHOD)
    ] = None,
    seeds: Annotated[
        int, option("each cell with seeds 0 to N - 1", "--seeds", metavar="N", min=1, panel=METHOD)
    ] = 3,
    *,
    control: Annotated[
        bool,
        option("beside each method, uniform densities with the same repair", "--control/--no-control", panel=METHOD),
    ] = True,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Prune MODEL by every method to every budget with several seeds; the same command resumes."""
    if out is None or not budget:
        raise UsageError("a sweep needs MODEL, --budget KIND=LIMITS and --out DIR.")
    check_directory_place(out)
    with loading():
        from allot.cli.measure import sweep_command

    methods = [name.strip() for name in (method or "erk").split(",")]
    sweep_command(wanted, out, budget, methods, seeds, control=control, as_json=as_json)


@_verb(
    "search",
    f"search {_NET} {_DATA} --max-drop 1pt --out S",
    "search n.py:net --data npz:x.npz --test npz:y.npz --max-drop 2% --out S",
    "search n.py:net --recipe half-macs --kind macs --max-drop 1pt --out S",
)
@takes("model", "data", *SCORING, *CHAIN, "weights", *RULES, *LIMITS, "seed", *READING, "input", file=True)
def search_verb(
    wanted: RecipeFile,
    out: Annotated[
        Path | None, option("a run for each share that is tried", "--out", parser=place, metavar="DIR")
    ] = None,
    kind: Annotated[
        str, option("what is removed: sparsity or macs", "--kind", metavar="KIND", panel=BUDGET)
    ] = "sparsity",
    runs: Annotated[
        int, option("runs at most; the answer is within 2^-N", "--runs", metavar="N", min=1, panel=SPEED)
    ] = 6,
    *,
    as_json: Json = False,
) -> None:
    """Find the largest sparsity of MODEL that keeps the score within --max-drop; the same command resumes."""
    if out is None or wanted.max_drop is None:
        raise UsageError("a search needs --max-drop DROP, like 1pt, and --out DIR.")
    if wanted.budget:
        raise UsageError("a search finds the budget: leave budget out, and say --kind sparsity or --kind macs.")
    check_directory_place(out)
    with loading():
        from allot.cli.search import search_command

    search_command(wanted, out, kind, runs, as_json=as_json)


@_verb(
    "advise",
    f"advise {_NET}",
    "advise timm:resnet18 --runtime onnx:64",
    "advise net.py:make --input 3,224,224 --out advice.html",
)
@takes("model", "data", "runtime", "weights", "input")
def advise_verb(
    wanted: RecipeFile,
    out: Annotated[Path, option("the page with the curves", "--out", parser=place, metavar="FILE.html")] = Path(
        "advice.html"
    ),
    pattern: Annotated[
        str, option("in what multiples channels go", "--pattern", metavar="PATTERN", panel=METHOD)
    ] = "channels:8",
    *,
    as_json: Json = False,
) -> None:
    """Measure layers of MODEL here, and say which sparsity pays on this machine, if any."""
    check_file_place(out)
    with loading():
        from allot.cli.measure import advise_command

    advise_command(wanted, out, pattern, as_json=as_json)


@_verb(
    "plan",
    f"plan {_NET} --budget sparsity=0.9",
    "plan timm:resnet18 --budget macs=50% --method erk",
    f"plan {_NET} --budget bytes=200kB --save plan.json",
)
@takes(
    "model", "budget", "method", "allocate", "pattern", "runtime", "weights", "data", *RULES, "seed", "input", file=True
)
def plan_verb(
    wanted: RecipeFile,
    save: Annotated[
        Path | None,
        option("write the allocation, to edit and replay", "--save", parser=place, metavar="FILE.json"),
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Show how the budget would be allocated to the layers; needs no data."""
    wanted.parsed_budget()
    if save:
        check_file_place(save)
    with loading():
        from allot.cli.prune import plan_command

    plan_command(wanted, save, as_json=as_json)


@_verb(
    "evaluate",
    f"evaluate {_NET} {_DATA}",
    "evaluate runs/first --data folder:test",
    "evaluate net.py:make --data npz:test.npz --metric net.py:score",
)
@takes("data", "metric", "weights", "device", "input", "workers", "skip_corrupt")
def evaluate_verb(
    wanted: RecipeFile,
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help=f"a run directory, or {MODEL_FORMS}")],
    split: Annotated[str, option("of zoo data: test, validation or calibration", "--split", panel=DATA)] = "test",
    model: RunModel = None,
    *,
    as_json: Json = False,
) -> None:
    """Score a run or a model on labelled data or text: by top-1, perplexity, or a function of yours."""
    if not Path(target).is_dir() and wanted.data is None and ":" in target:
        raise UsageError(f"no data to score on: give --data {DATA_FORMS}.")
    with loading():
        from allot.cli.measure import evaluate_command

    evaluate_command(wanted, target, split, model, as_json=as_json)


@_verb(
    "verify",
    "verify runs/first",
    "verify runs/first/model.bitmask.safetensors",
    "verify runs/first --json",
)
@takes("weights", "input")
def verify_verb(
    wanted: RecipeFile,
    path: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="a run directory or a file that allot wrote")],
    model: Annotated[
        str | None,
        option(
            "the model that runs files of tensors; the same forms as in prune", "--model", metavar="MODEL", panel=WHAT
        ),
    ] = None,
    *,
    trust: Annotated[
        bool, option("open exported programs (.pt2) too: a program can run any code", "--trust", panel=WHAT)
    ] = False,
    every: Annotated[bool, option("every check in a line of its own, not every file", "--all")] = False,
    as_json: Json = False,
) -> None:
    """Re-open, recount and certify; exit code 4 if anything differs from what was promised."""
    from allot.cli.inspect import verify_command

    verify_command(wanted, path, model, trust=trust, every=every, as_json=as_json)


@_verb(
    "export",
    "export runs/first --to onnx",
    "export runs/first --to slim --out small",
    "export runs/first --to csr --data folder:photos",
)
@takes("data", "weights", "input")
def export_verb(
    wanted: RecipeFile,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run directory")],
    to: Annotated[
        str,
        option("safetensors, bitmask, slim, csr, 2:4, onnx, program, openvino or hf", "--to", metavar="FORM"),
    ],
    out: Annotated[
        Path | None,
        option("of slim, openvino and hf a directory  [in RUN]", "--out", parser=place, metavar="PATH"),
    ] = None,
    model: RunModel = None,
    *,
    as_json: Json = False,
) -> None:
    """Write what a runtime reads, open it again, compare it with the run and time it beside the dense model."""
    from allot.cli.inspect import export_command

    export_command(wanted, run, to, out, model, as_json=as_json)


@_verb("report", "report runs/first", "report runs/first runs/second --out both.html", "report runs/sweep --json")
def report_verb(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="finished run directories, or those of sweeps")],
    out: Annotated[
        Path | None,
        option(
            "the page  [RUN/report.html; of several: in their common folder]", "--out", parser=place,
            metavar="FILE.html",
        ),
    ] = None,
    *,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Show one run, or several side by side, here and as one offline page."""
    if out is not None:
        check_file_place(out)
    from allot.cli.inspect import report_command

    report_command(runs, out, as_json=as_json)


@_verb("methods", "methods", "methods polish", "methods fcpts --paper")
def methods_verb(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="a method or recipe")] = None,
    *,
    paper: Annotated[
        bool, option("with the equations, the citation, and the differences from the paper", "--paper")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the methods, or describe one: what it does, what it needs, and its options."""
    from allot.cli.methods import methods_command

    methods_command(name, paper=paper, as_json=as_json)


@_verb("recipes", "recipes", "recipes nine-tenths", f"prune {_NET} {_DATA} --recipe quick")
def recipes_verb(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="a named recipe")] = None,
    *,
    as_json: Json = False,
) -> None:
    """List the named recipes, or show one: `allot prune MODEL --recipe NAME` takes it."""
    from allot.cli.inspect import recipes_command

    recipes_command(name, as_json=as_json)
