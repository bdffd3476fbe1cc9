"""A recipe file: the options of `allot prune` as YAML, checked before anything runs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from allot.errors import UsageError, unknown
from allot.run.max_drop import MaxDrop
from allot.run.min_fidelity import MinFidelity
from allot.sources.names import DATA_FORMS, MODEL_FORMS

if TYPE_CHECKING:
    from allot.budget.budget import Budget
    from allot.network.layers import Rules

NO_MODEL = f"no MODEL: {MODEL_FORMS} is accepted."
LONGEST = 2**22  # characters of a recipe


@dataclass(frozen=True)
class Option:
    """How a key of a recipe is given on the command line: what `--help` says, the name of its value, and its type."""

    help: str
    metavar: str = ""
    kind: Any = str


COMPUTE = {  # choices of `Compute`, as options
    "micro_batch": Option("samples whose activations are kept at a time  [the whole batch]", "N", int),
    "checkpoint": Option("compute activations again instead of keeping them: exact, slower", kind=bool),
    "amp": Option("train in bf16 or fp16; weights stay float32  [no]", "TYPE"),
    "channels_last": Option("lay images out with channels last, for convolutions", kind=bool),
    "compile": Option("train with torch.compile", kind=bool),
}


class RecipeFile(BaseModel):
    """Everything that decides a run, and the options of the command line. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    model: Annotated[str | None, Option(MODEL_FORMS, "MODEL")] = None
    weights: Annotated[
        str | None,
        Option(
            "safetensors, or a .pt with tensors only; or default (what torchvision, timm and hf do without this) "
            "or random",
            "FILE",
        ),
    ] = None
    data: Annotated[str | None, Option(DATA_FORMS, "DATA")] = None
    test: Annotated[
        str | None, Option("labelled data for the score before and after  [test split of zoo data]", "DATA")
    ] = None
    metric: Annotated[
        str | None,
        Option(
            "what scores the test data: file.py:function or package.module:function, of (outputs, targets) or of "
            "(model, data)  [top-1]",
            "FUNCTION",
        ),
    ] = None
    max_drop: Annotated[
        float | str | None,
        Option(
            "how far the score may be below dense: 1pt, 5% of it, or a number in the unit of a score that is not from "
            "0 to 1; more is exit code 4  [any]",
            "DROP",
        ),
    ] = None
    min_fidelity: Annotated[
        float | str | None,
        Option("least agreement with the dense model on watched inputs, like 95%; less is exit code 4  [any]", "SHARE"),
    ] = None
    input: Annotated[
        tuple[Annotated[int, Field(gt=0)], ...] | None,
        Option("shape of one input, without the batch; tokens of a text  [from the source of the model]", "C,H,W"),
    ] = None
    budget: Annotated[
        tuple[str, ...],
        Option(
            "sparsity=0.9, params=20k, macs=50%, bytes=3MB, latency=5ms; several: repeat or join with commas",
            "KIND=LIMIT",
            list[str],
        ),
    ] = ()
    method: Annotated[
        str | None,
        Option(
            "recipe to start from: see `allot methods`  [best; of a language model llm; without data erk]",
            "NAME",
        ),
    ] = None
    allocate: Annotated[
        str | None, Option("allocator, an allocation.json, or a RUN to take it from  [that of --method]", "NAME|FILE")
    ] = None
    score: Annotated[
        str | None,
        Option("magnitude, lamp, wanda or random; of channels magnitude, scale, taylor or random  [magnitude]", "NAME"),
    ] = None
    pattern: Annotated[
        str | None, Option("unstructured, rows, N:M like 2:4, n:4, channels, or channels:8  [unstructured]", "PATTERN")
    ] = None
    repair: Annotated[
        str | None, Option("repairs in order, joined with commas; none for none  [those of --method]", "NAMES")
    ] = None
    runtime: Annotated[
        str | None,
        Option(
            "what latency is measured in: onnx or torch; onnx:64 for 64 samples at a time  [onnx where installed]",
            "NAME",
        ),
    ] = None
    options: dict[str, dict[str, Any]] = {}
    include: Annotated[
        tuple[str, ...],
        Option("only layers that match: glob, or regular expression after re:  [all]", "LAYERS", list[str]),
    ] = ()
    exclude: Annotated[
        tuple[str, ...], Option("layers that stay dense: glob, or re:...  [none]", "LAYERS", list[str])
    ] = ()
    min_density: Annotated[
        dict[str, float], Option("fewest weights a layer keeps, as a share from 0 to 1", "LAYERS=D", list[str])
    ] = {}
    max_density: Annotated[
        dict[str, float], Option("most weights a layer keeps, as a share from 0 to 1", "LAYERS=D", list[str])
    ] = {}
    floor: Annotated[
        int | str, Option("what every layer keeps: weights (1), per row (1/row) or a share (5%)  [1]", "N")
    ] = 1
    seed: Annotated[int, Option("seed of all random numbers  [0]", "N", int)] = 0
    samples: Annotated[int | None, Option("calibration samples used  [512]; of texts [128]", "N", int)] = None
    batch_size: Annotated[
        int | None, Option("calibration samples at a time  [64]; of texts as many as hold 1,024 tokens", "N", int)
    ] = None
    workers: Annotated[
        int, Field(ge=0), Option("threads that read samples ahead, the same ones in the same order  [0]", "N", int)
    ] = 0
    skip_corrupt: Annotated[
        bool, Option("leave out samples that cannot be read, and report them  [an error]", kind=bool)
    ] = False
    max_minutes: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Option(
            "shorten training to fit into M minutes, by the step time measured here; steps=auto uses them", "M", float
        ),
    ] = None
    max_steps: Annotated[
        Annotated[int, Field(gt=0)] | None,
        Option("most steps of a repair with steps=auto, which trains while it pays  [no limit]", "N", int),
    ] = None
    stream: Annotated[
        str | None,
        Option(
            "device that runs layer-wise repairs block by block, like cuda; the model stays on the host  [whole]",
            "DEVICE",
        ),
    ] = None
    outputs: Annotated[
        str | None,
        Option(
            "what is compared with the dense model, a function of its output: file.py:function  [logits, or all]",
            "PLACE",
        ),
    ] = None
    loss: Annotated[
        str | None, Option("how outputs are compared: kl for classes, mse for values  [by the outputs]", "NAME")
    ] = None
    batch_norm: Annotated[
        str, Option("statistics of batch norms in training: batch, frozen or auto  [auto: by the dense model]", "NAME")
    ] = "auto"
    views: Annotated[
        int | None,
        Field(ge=0),
        Option("random crops of each picture beside it in statistics and training  [of best: 3, on trial]", "N", int),
    ] = None
    compute: dict[str, Any] = {}
    max_memory: Annotated[
        int | str | None,
        Option(
            "6GB: what a step of training may take; --checkpoint and --micro-batch are picked so that it does", "SIZE"
        ),
    ] = None
    device: Annotated[str | None, Option("where the model runs: cpu, cuda, cuda:1 or mps  [cpu]", "DEVICE")] = None

    @field_validator("compute")
    @classmethod
    def _known_choices(cls, value: dict[str, Any]) -> dict[str, Any]:
        from allot.network.compute import Compute  # imports torch

        return Compute.of(value).to_json()

    @field_validator("max_memory")
    @classmethod
    def _bytes(cls, value: int | str | None) -> int | str | None:
        from allot.budget.units import memory

        return value if value is None or memory("max_memory", value) else None

    @field_validator("max_drop", "min_fidelity")
    @classmethod
    def _guarantee(cls, value: float | str | None, info: ValidationInfo) -> float | str | None:
        if value is not None:
            (MaxDrop if info.field_name == "max_drop" else MinFidelity).read(value)
        return value

    @field_validator("budget", mode="before")
    @classmethod
    def _budget_in_any_form(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return tuple(f"{kind}={amount}" for kind, amount in value.items())
        if isinstance(value, bool) or not isinstance(value, str | int | float | list | tuple):
            raise ValueError("KIND=VALUE is accepted, like sparsity=0.9")
        return value if isinstance(value, list | tuple) else (str(value),)

    @field_validator("repair", mode="before")
    @classmethod
    def _repair_in_any_form(cls, value: Any) -> Any:
        return (",".join(value) or "none") if isinstance(value, list | tuple) else value

    @field_validator("min_density", "max_density", mode="before")
    @classmethod
    def _bounds_in_any_form(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return value
        texts = value if isinstance(value, list | tuple) else (value,)
        bounds = [text.rpartition("=") if isinstance(text, str) else ("", "", "") for text in texts]
        if not all(pattern and density for pattern, _, density in bounds):
            raise ValueError("LAYERS=DENSITY is accepted, like fc=0.2")
        return {pattern: density for pattern, _, density in bounds}

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("input", mode="before")
    @classmethod
    def _shape_in_words(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @classmethod
    def resolve(
        cls, path: Path | None, given: Mapping[str, Any], settings: Iterable[str], *, needs_model: bool = False
    ) -> RecipeFile:
        """The file's recipe, overridden by the values `given` (None: not given), then by `a.b=c` settings.

        Raises:
            UsageError: no model where one is needed, which is said before anything else; unreadable file, unknown key
                (with the nearest), or a value of the wrong type.
        """
        content: dict[str, Any] = _read(path) if path else {}
        content |= {key: value for key, value in given.items() if value is not None and value != ()}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals:
                raise UsageError(f"--set {setting}: write KEY=VALUE, like options.variance.limit=5.")
            first, _, rest = key.partition(".")
            if first == "budget" and rest:
                content["budget"] = _by_kind(content.get("budget", ()))
            # layer names have dots of their own
            inner = [rest] if first in ("min_density", "max_density") else rest.split(".")
            from allot.cli.values import parsed

            _put(content, [first, *inner] if rest else [first], parsed(value, f"--set {setting}"))
        if needs_model and content.get("model") is None:
            raise UsageError(NO_MODEL)
        for key in content:
            if key not in cls.model_fields:
                raise unknown("recipe key", str(key), cls.model_fields)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first_error = error.errors()[0]
            where = ".".join(str(part) for part in first_error["loc"])
            reason = first_error["msg"].removeprefix("Value error, ").rstrip(".")
            value = textwrap.shorten(repr(first_error["input"]), 200)
            raise UsageError(f"recipe: {where}={value}: {reason}.") from error

    def required_model(self) -> str:
        """The model.

        Raises:
            UsageError: the recipe has none.
        """
        if self.model is None:
            raise UsageError(NO_MODEL)
        return self.model

    def parsed_budget(self) -> Budget:
        """The budget.

        Raises:
            UsageError: the recipe has none.
        """
        if not self.budget:
            raise UsageError("no budget: give --budget, like --budget sparsity=0.9 or --budget macs=50%.")
        from allot.budget.budget import Budget

        return Budget.parse(*self.budget)

    def rules(self) -> Rules:
        """The rules on layers."""
        from allot.network.layers import Rules

        return Rules(self.include, self.exclude, self.min_density, self.max_density, self.floor)


def gallery() -> dict[str, Path]:
    """The recipes of this package by name: `--recipe NAME` takes one, for any model."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def _read(path: Path) -> dict[str, Any]:
    from allot.cli.values import parsed

    named = gallery()
    if str(path) in named and not path.exists():
        path = named[str(path)]
    elif path.suffix == "" and not path.exists():
        raise unknown("recipe", str(path), named)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}.") from error
    if len(text) > LONGEST:
        raise UsageError(f"the recipe {path} is longer than {LONGEST:,} characters.")
    content = parsed(text, f"the recipe {path}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"the recipe {path} is no mapping of keys to values.")
    return content


def _by_kind(budget: Any) -> Any:
    """A budget in words as a mapping from kind to amount."""
    if isinstance(budget, Mapping):
        return dict(budget)
    texts = (budget,) if isinstance(budget, str) else budget
    parts = (part.partition("=") for text in texts for part in str(text).split(","))
    return {kind.strip(): amount.strip() for kind, _, amount in parts}


def _put(content: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = content.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UsageError(f"--set {'.'.join(keys)}: {key} is not a mapping.")
        content = inner
    content[keys[-1]] = value
