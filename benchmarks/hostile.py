"""Attacks on allot, counted: `python -m benchmarks.hostile --fill docs/reliability.md` writes what came of them.

budgets    random layers, bounds and limits; counts are checked by a second arithmetic of exact fractions
kills      runs of five methods, killed (SIGKILL) at a random moment, and again; files equal those of a whole run
mutations  bits, bytes and lengths of every file of runs and exports changed; `verify`, or a resumed run, must refuse
commands   command lines with hostile words in them; an exit code of the list, one line, no traceback

Every draw follows from --seed; the moment of a kill depends on the machine as well. A part ends with its misses:
what was let through, and what raised anything but an error of allot.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import allot
from allot.cli import main as cli
from allot.errors import AllotError, Stopped
from allot.export.export import export_run
from allot.report.exports import add_export
from benchmarks.budget_oracle import random_limits, random_terms, try_budget
from benchmarks.runs import fill

COUNTS = {"budgets": 20_000, "kills": 200, "mutations": 1_000, "commands": 500}


@dataclass
class Tally:
    """What a part tried, by kind, and what went wrong."""

    tried: Counter[str] = field(default_factory=Counter)
    misses: list[str] = field(default_factory=list)

    def lines(self, seed: int, seconds: float) -> list[str]:
        """The tally in words."""
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(self.tried.items()))
        text = [f"**{sum(self.tried.values()):,} tried, {len(self.misses):,} misses** (seed {seed}, {seconds:.0f} s)."]
        return [*text, "", f"{kinds}.", *(f"\n- {miss}" for miss in self.misses[:10])]


# budgets


def budgets(count: int, seed: int) -> Tally:
    """Counts of random budgets against exact fractions."""
    tally, draw = Tally(), random.Random(seed)
    while sum(tally.tried.values()) < count:
        terms, texts = random_terms(draw), random_limits(draw)
        try:
            tally.tried[try_budget(terms, texts, draw)] += 1
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            tally.tried["wrong"] += 1
            tally.misses.append(f"{texts} on {terms}: {type(error).__name__}: {error}")
    return tally


# kills

_FEW = {"steps": 12}
METHODS: dict[str, dict[str, Any]] = {
    "erk": {"budget": "sparsity=0.8", "repair": "bn,variance"},
    "fcpts": {"budget": "sparsity=0.8", "method": "fcpts", "options": {"fcpts": _FEW}},
    "unipts": {"budget": "sparsity=0.8", "allocate": "erk", "repair": "unipts", "options": {"unipts": _FEW}},
    "dsa": {"budget": "macs=50%", "method": "dsa", "options": {"dsa": _FEW, "distill": _FEW}},
    "admm": {"budget": "sparsity=0.7", "allocate": "erk", "repair": "admm"},
}
SAME = ("model.safetensors", "model.bitmask.safetensors", "model.slim.safetensors", "allocation.json", "steps.jsonl")


def _net() -> nn.Module:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 8)).eval()


def _data() -> torch.Tensor:
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _prune(run: Path, name: str, **other: Any) -> allot.Result:
    arguments = {"batch_size": 8, **METHODS[name], "save_to": run, **other}
    return allot.prune(_net(), _data(), arguments.pop("budget"), **arguments)


def _child(work: Callable[[], Any]) -> int:
    """The id of a process that does this work: a copy of this one, which has everything imported."""
    if pid := os.fork():
        return pid
    code = 1
    with contextlib.suppress(BaseException):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        code = 0
    os._exit(code)


def kills(count: int, seed: int) -> Tally:
    """Runs that are killed once or more, compared with whole ones."""
    tally, draw = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, seconds = {}, {}
        for name in METHODS:
            started = time.monotonic()
            os.waitpid(_child(lambda name=name: _prune(Path(folder, name), name)), 0)
            whole[name], seconds[name] = _files(Path(folder, name)), time.monotonic() - started
        while sum(tally.tried.values()) < count:
            name = list(METHODS)[sum(tally.tried.values()) % len(METHODS)]
            run = Path(tempfile.mkdtemp(dir=folder)) / "run"
            again = 1.0
            while again > draw.random() and sum(tally.tried.values()) < count:
                pid = _child(lambda name=name, run=run: _prune(run, name))
                time.sleep(draw.uniform(0, seconds[name]))
                os.kill(pid, signal.SIGKILL)
                killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
                tally.tried[name] += killed
                again = 0.4
            code = os.waitpid(_child(lambda name=name, run=run: _prune(run, name)), 0)[1]
            wrong = [file for file, content in _files(run).items() if whole[name].get(file) != content]
            if code or wrong or not allot.verify(run)["passed"]:
                tally.misses.append(f"{name}: a resumed run ended with {code}, differs in {wrong}, or does not verify")
            shutil.rmtree(run.parent)
    return tally


def _files(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() if (run / name).exists() else b"" for name in SAME}


# mutations


def _flip(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _swap(content: bytes, draw: random.Random) -> bytes:
    i, j = sorted(draw.randrange(len(content)) for _ in range(2))
    return content[:i] + content[j : j + 1] + content[i + 1 : j] + content[i : i + 1] + content[j + 1 :]


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bit": _flip,
    "two bytes swapped": _swap,
    "cut": lambda content, draw: content[: draw.randrange(len(content))],
    "longer": lambda content, draw: content + draw.randbytes(draw.randint(1, 9)),
    "piece removed": lambda content, draw: content[: (i := draw.randrange(len(content)))] + content[i + 9 :],
    "zeros": lambda content, draw: content[: (i := draw.randrange(len(content)))] + bytes(8) + content[i + 8 :],
    "line ends": lambda content, draw: content.replace(b"\n", b"\r\n"),
    "noise": lambda content, draw: draw.randbytes(len(content)),
    "gone": lambda content, draw: b"",
}


def mutations(count: int, seed: int) -> Tally:
    """Changed files of runs, exports and saved states."""
    tally, draw = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        targets = list(_targets(Path(folder)))
        for number in range(count):
            path, refused = targets[number % len(targets)]
            whole, how = path.read_bytes(), draw.choice(list(MUTATIONS))
            changed = MUTATIONS[how](whole, draw)
            if changed == whole:
                changed = _flip(whole, draw)
            path.unlink() if how == "gone" else path.write_bytes(changed)
            tally.tried[path.suffix.lstrip(".") if path.suffix != ".safetensors" else path.name] += 1
            try:
                passed = not refused()
            except Exception as error:  # noqa: BLE001 - that is what is looked for
                passed = True
                how = f"{how}, {type(error).__name__}: {error}"
            path.write_bytes(whole)
            if passed:
                tally.misses.append(f"{path.relative_to(folder)}: {how}")
    return tally


def _targets(folder: Path) -> Iterator[tuple[Path, Callable[[], bool]]]:
    """Files, and whether what was done to them is refused."""

    def verified(place: Path) -> Callable[[], bool]:
        def refused() -> bool:
            try:
                return not allot.verify(place)["passed"]
            except AllotError:
                return True

        return refused

    def resumed(run: Path, keep: Path) -> Callable[[], bool]:
        def refused() -> bool:
            shutil.copytree(run, keep)
            try:
                _prune(keep, "erk")
            except AllotError:
                return True
            else:
                return not any(
                    keep.parent.glob(f"{run.name}/state-*")
                )  # a state that is gone is no state: from the start
            finally:
                shutil.rmtree(keep)

        return refused

    for name, forms in (("erk", ("csr", "program", "onnx", "openvino")), ("dsa", ("onnx",))):
        run = folder / name
        report = _prune(run, name).report()
        for form in forms:
            with contextlib.suppress(AllotError):  # a form that is not installed here
                add_export(run, export_run(_net(), run, report, _data()[:1], form))
        for path in sorted(file for file in run.rglob("*") if file.is_file()):
            yield path, verified(run)
            if path.suffix == ".safetensors" and path.name.startswith("model.") and "probe" not in path.name:
                alone = folder / f"alone-{name}" / path.name
                alone.parent.mkdir(exist_ok=True)
                yield Path(shutil.copy(path, alone)), verified(alone)
    stop = iter([False] * 3)
    with contextlib.suppress(Stopped):
        _prune(folder / "stopped", "erk", should_stop=lambda: next(stop, True))
    for state in (folder / "stopped").glob("state-*.pt"):
        yield state, resumed(folder / "stopped", folder / "copy")


# commands

NET = "zoo:digits-resnet20"
LINES = (
    f"prune {NET} --data {NET} --budget sparsity=0.9 --samples 8 --repair none --out NEW",
    f"prune {NET} --data {NET} --budget macs=50% --pattern channels --allocate uniform --samples 8 --out NEW",
    f"plan {NET} --budget sparsity=0.9 --method erk --save plan.json",
    f"plan {NET} --budget params=10% --pattern 2:4 --min-density *=0.1",
    f"evaluate RUN --data {NET} --split validation",
    f"evaluate {NET} --data {NET}",
    "verify RUN --json",
    "verify RUN/model.safetensors --model " + NET,
    "export RUN --to bitmask --out copy.safetensors",
    "export RUN --to csr --json",
    "report RUN --json",
    "report RUN RUN --out both.html",
    "methods erk --json",
    "recipes quick",
)
WORDS = (
    "", " ", "-1", "0", "nan", "inf", "1e999", "9" * 400, "1.5", "--", "-", "..", ".", "nowhere/deep/x", "RUN",
    "RUN/run.json", "RUN/report.html", "mine.py", "mine.py:nothing", "nothing:at_all", "zoo:", "zoo:none", "hf:./none",
    "npz:none.npz", "folder:none", "text:none", "synthetic:0,0", "sparsity=", "sparsity=2", "=0.5", "macs=1",
    "bytes=1B", "latency=1ns", "a=b=c", "sparsity=0.5,sparsity=0.6", "\N{SNOWMAN}" * 50, "x" * 5000, "[bold]", "%s",
    "{}", "*", "re:(", "2:4", "0:0", "rows", "--json", "--budget", "--set", "options.erk.x=1", "budget.sparsity=0.99",
    "--help", "--seed",
    "--stream", "--device", "cuda:99", "{a: [",
)  # fmt: skip


def commands(count: int, seed: int) -> Tally:
    """Command lines with a word replaced, left out, doubled or added."""
    tally, draw, home = Tally(), random.Random(seed), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            _command(LINES[0].replace("NEW", "RUN").split())
            for _ in range(count):
                words = shlex.split(draw.choice(LINES))
                for _ in range(min(draw.randint(1, 2), len(words) - 1)):
                    place, word = draw.randrange(1, len(words)), draw.choice(WORDS)
                    replaced = ([word], [], [words[place]] * 2, [words[place], word])
                    words[place : place + 1] = draw.choice(replaced)
                outcome = _command(words)
                tally.tried[f"exit code {outcome}" if isinstance(outcome, int) else "no exit code"] += 1
                if not isinstance(outcome, int):
                    tally.misses.append(f"`allot {shlex.join(words)[:200]}`: {outcome}")
                shutil.rmtree("NEW", ignore_errors=True)
        finally:
            os.chdir(home)
    return tally


def _command(words: list[str]) -> int | str:
    """The exit code, or what is wrong."""
    out, err = io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", ["allot", *words])
    try:
        with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as ended:
        said = err.getvalue().strip().splitlines() or [""]
        code = ended.code if isinstance(ended.code, int) else -1
        if code in (2, 3, 4) and not said[-1].startswith("error: "):
            return f"exit code {code} without an error, but {said[-1][:100]!r}"
        return code if code in (0, 2, 3, 4, 130) else f"exit code {code}"
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        return f"{type(error).__name__}: {error}"[:300]
    return "no exit code"


PARTS: dict[str, Callable[[int, int], Tally]] = {
    "budgets": budgets,
    "kills": kills,
    "mutations": mutations,
    "commands": commands,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While open, the library warns of nothing."""
    log = logging.getLogger("allot")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def main() -> None:
    """Run the parts that are named; exit code 1 if anything was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=list(PARTS), help="all of them")
    parser.add_argument("--count", type=int, help="how many of each  [20,000; 200; 1,000; 500]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fill", type=Path, metavar="PAGE", help="write the counts into this page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    missed = 0
    for name in arguments.parts or PARTS:
        started = time.monotonic()
        with _quiet():
            tally = PARTS[name](arguments.count or COUNTS[name], arguments.seed)
        lines = tally.lines(arguments.seed, time.monotonic() - started)
        sys.stdout.write(f"{name}: " + "\n".join(lines) + "\n")
        sys.stdout.flush()
        missed += len(tally.misses)
        if arguments.fill:
            fill(arguments.fill, f"hostile {name}", lines)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
