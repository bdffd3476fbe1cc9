"""Never run on ImageNet. A table as data: nets, budgets, chains and what the paper reports, checked before it runs.

A chain is written in the words of `allot prune`: method, allocate, score, pattern, repair, options. Every cell is
checked by what checks a recipe of the command line, so that a typo in a name or an option is an error at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from allot.budget.budget import Budget
from allot.cli.recipe import RecipeFile
from allot.errors import UsageError, unknown
from allot.methods import METHODS
from allot.pruning.assemble import assemble
from allot.run.problem import Chain as PartsOfChain

HERE = Path(__file__).parent
Options = dict[str, dict[str, Any]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Net(_Strict):
    """A trained net.

    Attributes:
        model: as the command line takes it.
        weights: which trained weights the paper began with: a name of `torchvision.models.get_weight`, whose
            preprocessing is used as well; None: those that the name of the model says.
        stated: top-1 in percent that the origin of these weights states.
        size: of a picture.
        any_size: whether the net takes other sizes too.
        budgets: in place of the table's.
        chains: chain -> options that differ for this net.
    """

    model: str
    weights: str | None = None
    stated: float | None = None
    size: int = 224
    any_size: bool = True
    budgets: tuple[str, ...] = ()
    chains: dict[str, Options] = {}


class Chain(_Strict):
    """How a cell is pruned, in the words of `allot prune`; `about` says what the row is for."""

    about: str
    method: str = "erk"
    allocate: str | None = None
    score: str | None = None
    pattern: str | None = None
    repair: str | None = None
    options: Options = {}


class Reported(_Strict):
    """A figure of the paper, in its own words, and where it stands."""

    net: str
    budget: str
    chain: str
    says: str
    source: str


class Table(_Strict):
    """One table.

    Attributes:
        paper: citation.
        protocol: what is known of the paper's protocol, and which epoch it scores.
        differences: what is done otherwise here.
        samples, batch_size: of the calibration pictures.
        augment: whether what trains weights sees random crops, mirrored at random.
    """

    title: str
    paper: str
    protocol: str
    differences: tuple[str, ...]
    samples: int
    batch_size: int
    augment: bool
    budgets: tuple[str, ...]
    nets: dict[str, Net]
    chains: dict[str, Chain]
    reported: tuple[Reported, ...] = ()


@dataclass(frozen=True)
class Small:
    """What a try changes: fewer steps, pictures or pixels, and single options."""

    samples: int | None = None
    batch_size: int | None = None
    steps: int | None = None
    size: int | None = None
    options: tuple[str, ...] = ()

    def changes(self) -> dict[str, Any]:
        """What differs from the table's own settings."""
        return {key: list(value) if key == "options" else value for key, value in vars(self).items() if value}


@dataclass(frozen=True)
class Cell:
    """One run of a table."""

    net: str
    budget: str
    chain: str
    seed: int

    @property
    def key(self) -> str:
        """In results.json."""
        return f"{self.net} {self.budget} {self.chain} {self.seed}"

    def directory(self, out: Path) -> Path:
        """Where its run lives."""
        return out / self.net / re.sub(r"[^\w.=%-]+", "_", self.budget) / self.chain / f"seed-{self.seed}"


def tables() -> dict[str, Path]:
    """Name -> file of the tables that come along."""
    return {path.stem: path for path in sorted(HERE.glob("*.yaml"))}


def load(name: str) -> Table:
    """The table of this name, or in this file, every cell of it checked.

    Raises:
        UsageError: no such table, or anything in it that could not run.
    """
    known = tables()
    if name not in known and not Path(name).is_file():
        raise unknown("table", name, known)
    path = known.get(name, Path(name))
    try:
        table = Table.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        raise UsageError(f"{path.name}: {' '.join(str(error).split())}") from error
    for figure in table.reported:
        budgets = budgets_of(table, figure.net) if figure.net in table.nets else ()
        if figure.chain not in table.chains or figure.budget not in budgets:
            raise UsageError(f"{path.name}: reported: no cell {figure.net} {figure.budget} {figure.chain}.")
    for name, net in table.nets.items():
        for chain in net.chains:
            if chain not in table.chains:
                raise unknown(f"chain of {name}", chain, table.chains)
    for cell in cells(table):
        parts(table, cell)
    return table


def cells(
    table: Table,
    nets: Sequence[str] = (),
    budgets: Sequence[str] = (),
    chains: Sequence[str] = (),
    seeds: int = 1,
) -> list[Cell]:
    """Every cell of these nets, budgets and chains (of all, where none are named), seed by seed.

    Raises:
        UsageError: a name that the table does not have.
    """
    every = dict.fromkeys(budget for net in table.nets for budget in budgets_of(table, net))
    for what, asked, there in (("net", nets, table.nets), ("budget", budgets, every), ("chain", chains, table.chains)):
        for name in asked:
            if name not in there:
                raise unknown(what, name, there)
    return [
        Cell(net, budget, chain, seed)
        for seed in range(seeds)
        for net in nets or table.nets
        for budget in budgets_of(table, net)
        if budget in (budgets or every)
        for chain in chains or table.chains
    ]


def budgets_of(table: Table, net: str) -> tuple[str, ...]:
    """The budgets at which a net is pruned."""
    return table.nets[net].budgets or table.budgets


def recipe(table: Table, cell: Cell, small: Small | None = None) -> RecipeFile:
    """A cell in the words of a recipe file.

    Raises:
        UsageError: a key or value that a recipe does not take.
    """
    small = small or Small()
    net, chain = table.nets[cell.net], table.chains[cell.chain]
    named = {key: getattr(chain, key) for key in ("allocate", "score", "pattern", "repair")}
    given = {
        "model": net.model,
        "budget": cell.budget,
        "method": chain.method,
        **{key: value for key, value in named.items() if value is not None},
        "options": _options(chain.options, net.chains.get(cell.chain, {}), small, chain),
        "input": [3, *[size_of(net, small)] * 2],
        "seed": cell.seed,
        "samples": small.samples or table.samples,
        "batch_size": small.batch_size or table.batch_size,
    }
    return RecipeFile.resolve(None, given, ())


def parts(table: Table, cell: Cell, small: Small | None = None) -> PartsOfChain:
    """The parts of a cell's chain.

    Raises:
        UsageError: an unknown name, option or value.
        BudgetError: a budget that makes no sense.
    """
    said = recipe(table, cell, small)
    Budget.parse(*said.budget)
    return assemble(
        said.method,
        allocate=said.allocate,
        score=said.score,
        pattern=said.pattern,
        repair=said.repair,
        options=said.options,
    )


def size_of(net: Net, small: Small) -> int:
    """Height and width of a picture: smaller in a try, for nets that take any size."""
    return small.size if small.size and net.any_size else net.size


def _options(own: Options, of_net: Options, small: Small, chain: Chain) -> Options:
    found = {method: dict(given) for method, given in own.items()}
    for method, given in of_net.items():
        found[method] = found.get(method, {}) | given
    if small.steps:
        for given in found.values():
            if "steps" in given:
                given["steps"] = min(given["steps"], small.steps)
    for method, option, value in _parsed(small.options):
        if _has(chain, found, method):
            found[method] = found.get(method, {}) | {option: value}
    return found


def _parsed(options: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    for text in options:
        key, equals, value = text.partition("=")
        method, dot, option = key.rpartition(".")
        if not (equals and dot):
            raise UsageError(f"--set {text}: METHOD.OPTION=VALUE is accepted, like layerwise.steps=2.")
        if method not in METHODS:
            raise unknown(f"--set {text}: method", method, METHODS)
        yield method, option, yaml.safe_load(value)


def _has(chain: Chain, options: Mapping[str, Any], method: str) -> bool:
    """Whether options of this method mean anything to the chain."""
    try:
        assemble(
            chain.method,
            allocate=chain.allocate,
            score=chain.score,
            pattern=chain.pattern,
            repair=chain.repair,
            options={**options, method: options.get(method, {})},
        )
    except UsageError:
        return False
    return True
