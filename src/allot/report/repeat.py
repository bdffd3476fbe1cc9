"""How to use a run, and how to repeat it: a command line, and a few lines of Python."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from allot.run.recipes import RECIPES

Report = Mapping[str, Any]

WIDTH = 72  # characters in a line of a command
_PARTS = ("allocate", "score", "pattern", "repair")
_NO_OPTION = {"digest", "hyperparameters", "data", "options", "compute"}
_USUAL = {"floor": 1, "batch_norm": "auto"}  # what the command line does by itself


def repeat_command(report: Report, out: str = "runs/again") -> str:
    r"""The command that makes the same run again; empty for a run that was made in Python, whose model has no name.

    >>> report = {"model": "zoo:net", "method": "erk", "seed": 0, "budget": [{"kind": "macs", "asked": "50%"}]}
    >>> report |= {"settings": {"data": "zoo:net", "samples": 64, "batch_norm": "auto"}, "score": "magnitude"}
    >>> report |= {"allocate": "lamp", "pattern": "unstructured", "repair": ["bn", "variance"]}
    >>> print(repeat_command(report))
    allot prune zoo:net --data zoo:net --budget macs=50% --method erk \
      --allocate lamp --samples 64 --out runs/again
    """
    settings = report.get("settings") or {}
    if "batch_norm" not in settings:  # a key of every recipe of the command line
        return ""
    data = ["--data", settings["data"]] if settings.get("data") else []
    budget = [word for row in report["budget"] for word in ("--budget", f"{row['kind']}={row['asked']}")]
    words = ["allot", "prune", report["model"], *data, *budget, *_chain(report), *_settings(settings)]
    for row in report.get("guarantees") or ():
        words += [f"--{row['kind']}", str(row["asked"])]
    words += ["--seed", str(report["seed"])] if report["seed"] else []
    return shell_lines([*map(str, words), "--out", out])


def shell_lines(words: Sequence[str]) -> str:
    r"""Words as a command of a shell, in lines of `WIDTH` characters or so, each after the first with an option first.

    >>> print(shell_lines(["allot", "prune", "zoo:glyph-mobilenetv2", "--data", "a b", "--budget", "macs=50%"]))
    allot prune zoo:glyph-mobilenetv2 --data 'a b' --budget macs=50%
    """
    lines, line = list[str](), ""
    for i, word in enumerate(map(shlex.quote, words)):
        ahead = len(word) + (len(shlex.quote(words[i + 1])) + 1 if i + 1 < len(words) else 0)
        if word.startswith("--") and len(line) + ahead > WIDTH:
            lines, line = [*lines, line], f"  {word}"
        else:
            line = f"{line} {word}" if line else word
    return " \\\n".join([*lines, line])


def load_snippet(report: Report, run: str) -> str:
    """Python that puts the sparse weights into the model.

    Args:
        run: the run directory.

    >>> print(load_snippet({"model": "zoo:digits-resnet20", "groups": []}, "runs/x"))
    import allot
    <BLANKLINE>
    model = allot.zoo.model("digits-resnet20")
    model.load_state_dict(allot.load("runs/x"))
    """
    lines, make = ["import allot"], f"...  # the model that was pruned: {_one_line(report['model'])}"
    origin, _, name = report["model"].partition(":")
    if origin == "zoo":
        make = f"allot.zoo.model({json.dumps(name)})"
    elif origin == "torchvision":
        lines, make = [*lines, "import torchvision"], f"torchvision.models.get_model({json.dumps(name)})"
    elif origin == "timm":
        lines, make = [*lines, "import timm"], f"timm.create_model({json.dumps(name)})"
    lines += ["", f"model = {make}"]
    if report["groups"]:
        return "\n".join([*lines, f"model = allot.load_slim(model, {json.dumps(run)})  # whole channels are gone"])
    return "\n".join([*lines, f"model.load_state_dict(allot.load({json.dumps(run)}))"])


def _chain(report: Report) -> Iterator[str]:
    """The method, and the parts that are not its own."""
    yield from ("--method", report["method"]) if report["method"] in RECIPES else ()
    recipe = RECIPES.get(report["method"])
    for part in _PARTS:
        value = report[part]
        usual = getattr(recipe, part) if recipe else None
        if part == "repair":
            value, usual = ",".join(value) or "none", ",".join(usual) or "none" if usual is not None else None
        if value != usual:
            yield from (f"--{part}", value)


def _settings(settings: Report) -> Iterator[str]:
    """Options of the command line for all other choices that are not the usual ones."""
    for key, value in settings.items():
        if key in _NO_OPTION or value in (None, False, [], {}) or _USUAL.get(key) == value:
            continue
        flag = "--" + key.replace("_", "-")
        if value is True:
            yield flag
        elif isinstance(value, Mapping):
            yield from (word for name, number in value.items() for word in (flag, f"{name}={number}"))
        elif key in ("include", "exclude"):
            yield from (word for pattern in value for word in (flag, pattern))
        else:
            yield from (flag, ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
    for method, options in (settings.get("options") or {}).items():
        for name, value in options.items():
            yield from ("--set", f"options.{method}.{name}={value if isinstance(value, str) else json.dumps(value)}")
    for key, value in (settings.get("compute") or {}).items():
        yield from ("--set", f"compute.{key}={value if isinstance(value, str) else json.dumps(value)}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
