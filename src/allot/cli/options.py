"""The options that several verbs share, each with the words that `--help` says about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from allot.cli.recipe import RecipeFile
from allot.sources.load import DATA_FORMS, MODEL_FORMS

Model = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_FORMS)]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="safetensors, or a .pt with tensors only; or default (what torchvision, timm and hf do without this) "
        "or random",
    ),
]
Data = Annotated[str | None, typer.Option(metavar="DATA", help=DATA_FORMS)]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="KIND=LIMIT",
        help="sparsity=0.9, params=20k, macs=50%, bytes=3MB, latency=5ms; several: repeat or join with commas",
    ),
]
Method = Annotated[
    str | None, typer.Option("--method", metavar="NAME", help="recipe to start from: see `allot methods`  [erk]")
]
Allocate = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE", help="allocator, an allocation.json, or a RUN to take it from  [that of --method]"
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option(metavar="PATTERN", help="unstructured, N:M like 2:4, channels, or channels:8  [unstructured]"),
]
Score = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="magnitude, lamp, wanda or random; of channels magnitude, scale, taylor or random  [magnitude]",
    ),
]
Repair = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="repairs in order, joined with commas; none for none  [those of --method]"),
]
Runtime = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="what latency is measured in: onnx or torch; onnx:64 for 64 samples at a time  [onnx where installed]",
    ),
]
Test = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="labelled data for the score before and after  [test split of zoo data]"),
]
Samples = Annotated[int | None, typer.Option(metavar="N", help="calibration samples used  [512]")]
BatchSize = Annotated[int | None, typer.Option(metavar="N", help="calibration samples at a time  [64]")]
Workers = Annotated[
    int | None, typer.Option(metavar="N", help="threads that read samples ahead, the same ones in the same order  [0]")
]
SkipCorrupt = Annotated[
    bool | None,
    typer.Option("--skip-corrupt", help="leave samples out that cannot be read, and say which  [an error]"),
]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="LAYERS", help="only layers that match: glob, or regular expression after re:  [all]"),
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="LAYERS", help="layers that stay dense: glob, or re:...  [none]")
]
MinDensity = Annotated[
    list[str] | None, typer.Option(metavar="LAYERS=D", help="fewest weights a layer keeps, as a share from 0 to 1")
]
MaxDensity = Annotated[
    list[str] | None, typer.Option(metavar="LAYERS=D", help="most weights a layer keeps, as a share from 0 to 1")
]
Floor = Annotated[
    str | None,
    typer.Option(metavar="N", help="what every layer keeps: weights (1), per row (1/row) or a share (5%)  [1]"),
]
MaxMinutes = Annotated[
    float | None, typer.Option(metavar="M", help="cut training to what fits, from what steps take here")
]
Stream = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="where layer-wise repairs have one block of the model at a time, like cuda; it stays on the host  [whole]",
    ),
]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="where the model runs: cpu, cuda, cuda:1 or mps  [cpu]")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="6GB: what a step of training may take; --checkpoint and --micro-batch are picked so that it does",
    ),
]
MicroBatch = Annotated[
    int | None, typer.Option(metavar="N", help="samples whose activations are kept at a time  [the whole batch]")
]
Checkpoint = Annotated[
    bool | None, typer.Option("--checkpoint", help="compute activations again instead of keeping them: exact, slower")
]
Amp = Annotated[str | None, typer.Option(metavar="TYPE", help="train in bf16 or fp16; weights stay float32  [no]")]
ChannelsLast = Annotated[
    bool | None, typer.Option("--channels-last", help="lay images out with channels last, for convolutions")
]
Compile = Annotated[bool | None, typer.Option("--compile", help="train with torch.compile")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="decides every draw  [0]")]
Shape = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="C,H,W",
        help="shape of one input, without the batch; tokens of a text  [what the origin says]",
    ),
]
RecipePath = Annotated[
    Path | None,
    typer.Option(
        "--recipe", metavar="FILE.yaml|NAME", help="the same as these options, in a file; or see `allot recipes`"
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="override one key of the recipe; repeatable")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]


COMPUTE = ("micro_batch", "amp", "channels_last", "compile", "checkpoint")


def resolved(given: dict[str, Any]) -> RecipeFile:
    """The recipe that a command's arguments, its recipe file and its settings make together."""
    names = {"shape": "input"}
    keys = set(RecipeFile.model_fields) | set(names)
    chosen = {names.get(key, key): value for key, value in given.items() if key in keys}
    compute = [f"compute.{name}={given[name]}" for name in COMPUTE if given.get(name) is not None]
    return RecipeFile.resolve(given.get("recipe"), chosen, [*compute, *(given.get("settings") or ())])
