"""Choices about memory, and the device, on the command line and in recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from allot.cli.recipe import RecipeFile
from allot.sources import load as sources
from cli.command import MLP, SAMPLES, done, refused

SHORT = "--samples 16 --batch-size 8 --set options.fcpts.steps=6"


def test_choices_reach_the_run_and_its_recipe():
    line = f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --method erk --out RUN"
    done(f"{line} --micro-batch 4 --checkpoint --channels-last --amp bf16 --device cpu")
    recipe = yaml.safe_load(Path("RUN/recipe.yaml").read_text())
    assert recipe["compute"] == {"micro_batch": 4, "checkpoint": True, "channels_last": True, "amp": "bf16"}
    assert recipe["device"] == "cpu"
    run = json.loads(Path("RUN/run.json").read_text())
    assert run["configuration"]["compute"] == {"micro_batch": 4, "amp": "bf16"}
    assert RecipeFile.resolve(Path("RUN/recipe.yaml"), {}, ["compute.amp="]).compute == {
        name: value for name, value in recipe["compute"].items() if name != "amp"
    }


def test_a_limit_of_memory_is_told():
    line = f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --method fcpts {SHORT}"
    out = done(f"{line} --out RUN --max-memory 6GB")
    assert "note: max_memory=6.00 GB: a step of training takes" in out.err
    assert json.loads(Path("RUN/report.json").read_text())["diagnostics"]["memory"]["picked"] == {}
    assert "max_memory=100: the least that a step of training takes" in refused(f"{line} --out SMALL --max-memory 100")


def test_what_cannot_be_chosen_is_one_line():
    line = f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --out RUN"
    assert "unknown amp 'fp8'" in refused(f"{line} --amp fp8")
    assert "did you mean 'micro_batch'" in refused(f"{line} --set compute.micro_bach=4")
    assert "max_memory=6XB: a number of bytes" in refused(f"{line} --max-memory 6XB")
    assert "has no repeated blocks" in refused(f"{line} --checkpoint --method fcpts")


def test_a_device_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    line = f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --out RUN"
    assert "--device cuda: there is no such device here; cpu can be had" in refused(f"{line} --device cuda")
    assert "--device mps: there is no such device here" in refused(f"evaluate {MLP} --data {SAMPLES} --device mps")
    assert "--device tpu: cpu, cuda, cuda:1 or mps is accepted" in refused(f"{line} --device tpu")
    assert "--device cpu:3: there is no such device here" in refused(f"{line} --device cpu:3")


def test_processes_of_torchrun_take_a_device_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert sources.device_of("cuda") == torch.device("cuda")
    for name, value in {
        "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert sources.device_of("cuda") == torch.device("cuda:1")
    assert sources.device_of("cuda:0") == torch.device("cuda:0") and sources.device_of(None).type == "cpu"
