"""Tables of trained nets: cells in processes of their own, that resume, and what is made of them."""

from __future__ import annotations

import doctest
import importlib
import itertools
import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks.nets.net import Net
from benchmarks.nets.smollm2 import RULES
from benchmarks.nets.smollm2 import measure as perplexity
from benchmarks.runs import chains_of

from allot.errors import UsageError
from allot.pruning.assemble import assemble
from benchmarks import apart, field, language_model, layerwise, shares


@pytest.mark.parametrize("name", ["runs", "apart", "language_model", "layerwise", "controls", "shares"])
def test_examples_in_docstrings_run(name: str):
    assert doctest.testmod(importlib.import_module(f"benchmarks.{name}")).failed == 0


# One cell a file


def test_a_cell_that_is_there_is_not_measured_again(tmp_path, monkeypatch):
    answers = {"a": '{"score": 1}', "b": ""}

    def run(command, **options):
        asked = json.loads(command[4])
        assert command[1:4] == ["-m", "some.module", "--cell"] and options["stdout"] == subprocess.PIPE
        Path(asked["scratch"]).mkdir()
        text = answers[asked["x"]]
        return SimpleNamespace(returncode=int(not text), stdout=text)

    monkeypatch.setattr(apart.subprocess, "run", run)
    cells = {"one": {"x": "a"}, "two": {"x": "b"}}
    assert apart.measured("some.module", cells, tmp_path) == {"one": {"score": 1}}
    assert not (tmp_path / "one").exists() and (tmp_path / "two").exists()  # to look at
    reason = "its process ended with exit code 1"
    assert apart.kept(cells, tmp_path) == ({"one": {"score": 1}}, {"two": reason})
    answers |= {"a": "", "b": '{"score": 2}'}
    assert apart.measured("some.module", cells, tmp_path) == {"one": {"score": 1}, "two": {"score": 2}}
    assert not (tmp_path / "two").exists()
    with pytest.raises(UsageError, match="net dense failed, as its other cells would: its process ended with exit"):
        apart.measured("some.module", {"net dense": {"x": "a", "method": "dense"}}, tmp_path)
    with pytest.raises(UsageError, match=r"one\.json was measured with another x: use another --out"):
        apart.measured("some.module", {"one": {"x": "b"}}, tmp_path)


def test_a_cell_prints_its_answer_or_an_error_in_one_line(capsys, caplog):
    assert apart.answer(lambda asked: {"twice": 2 * asked["x"]}, '{"x": 2}') == 0
    assert json.loads(capsys.readouterr().out) == {"twice": 4}

    def fails(asked):
        raise UsageError("torchcrepe is missing")

    assert apart.answer(fails, "{}") == 1
    assert json.loads(capsys.readouterr().out) == {"failed": "torchcrepe is missing"}
    assert caplog.messages == ["torchcrepe is missing"]
    assert apart.answer(lambda asked: {}["absent"], "{}") == 1
    assert json.loads(capsys.readouterr().out) == {"failed": "KeyError: 'absent'"}

    def is_stopped(asked):
        raise KeyboardInterrupt

    assert apart.answer(is_stopped, "{}") == 130 and capsys.readouterr().out == ""
    assert [record.exc_info is None for record in caplog.records] == [True, False]  # nobody foresaw the second


def test_what_a_block_of_code_costs_counts_its_peak_and_its_seconds():
    with apart.spending() as spent:
        before = apart.resident("VmRSS")
        assert float(torch.ones(2**24).sum()) == 2**24  # 64 MiB, gone when the block ends
        sum(i for i in range(10**5))
    assert spent["peak"] >= before + 0.9 * 2**26 and 0 < spent["cpu"] < 10 and spent["seconds"] > 0
    with apart.spending() as less:
        pass
    assert less["peak"] < spent["peak"]


# The language model


@pytest.fixture
def small_llama(monkeypatch):
    """A Llama of two blocks in the place of SmolLM2."""
    transformers = pytest.importorskip("transformers")

    def load(text, held_out, *, seed, samples, length, predictions):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=40, tie_word_embeddings=True, **sizes)
        model = transformers.LlamaForCausalLM(config).eval()
        blocks = torch.randint(0, 40, (samples, length), generator=torch.Generator().manual_seed(seed))
        tests = torch.randint(0, 40, (-(-predictions // (length - 1)), length))
        return Net("llama", model, blocks, lambda model: perplexity(model, tests), {}, RULES)

    monkeypatch.setattr(language_model.smollm2, "load", load)


def test_the_table_of_a_language_model_compares_allot_with_its_controls(
    small_llama, in_this_process, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    asked = ["--text", "text", "--samples", "4", "--length", "8", "--predictions", "30", "--budget", "50%", "2:4"]
    asked += ["--methods", "wanda", "sparsegpt", "allot-wanda-layer", "--out", "out"]
    assert language_model.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines[2:]]
    assert rows[0][1] == "dense"
    names = ["wanda", "sparsegpt", "allot-wanda-layer"]
    assert [row[:2] for row in rows[1:]] == [[budget, name] for budget in ("50%", "2:4") for name in names]
    assert {row[4] for row in rows[1:]} == {"50.00"}
    found = {file.stem: json.loads(file.read_text())["found"] for file in Path("out").glob("*.json")}
    dense, wanda, sparsegpt = (found[key]["nll"] for key in ("dense", "50% wanda 0", "50% sparsegpt 0"))
    assert float(rows[1][2]) == pytest.approx(math.exp(wanda), abs=0.01)
    assert float(rows[1][3]) == pytest.approx(100 * (sparsegpt - wanda) / (sparsegpt - dense), abs=0.1)
    assert rows[2][3] == "0.0" and rows[3][-1] == f"{found['50% allot-wanda-layer 0']['images'][0]} / 0"
    assert len(in_this_process) == 7 and language_model.main(asked) == 0 and len(in_this_process) == 7
    assert sorted(path.suffix for path in Path("out").iterdir()) == [".json"] * 7


def test_a_chain_of_the_user_and_a_method_that_fails(small_llama, in_this_process, tmp_path, capsys):
    asked = ["--text", "text", "--samples", "4", "--length", "8", "--predictions", "30", "--budget", "50%"]
    asked += ["--methods", "no-such-repair", "--out", str(tmp_path)]
    assert language_model.main([*asked, "--chain", 'mine={"allocate": "uniform", "repair": "none"}']) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["dense", "mine"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--budget", "0.5"], "budget '0.5': a sparsity like 60%, or n:m like 2:4, is accepted"),
        (["--budget", "4:2"], "budget '4:2'"),
        (["--chain", "mine"], "--chain 'mine'"),
    ],
)
def test_what_cannot_be_understood_is_an_error_before_anything_runs(more, said, in_this_process, tmp_path, capsys):
    with pytest.raises(SystemExit):
        language_model.main(["--text", "text", "--out", str(tmp_path), *more])
    assert said in capsys.readouterr().err and in_this_process == []


# Nets of the zoo


def test_pages_of_the_zoo_show_what_was_measured_and_no_more(monkeypatch):
    monkeypatch.setattr(layerwise, "dense", lambda net: "95.0 (nll 0.10)")
    chains = {"admm": {"allocate": "erk", "repair": "admm"}, "pot": {"method": "pot"}}
    keys = [key for key, _ in layerwise.cells(["a", "b"], [0.9], chains)]
    assert keys[:3] == ["a 0.9 admm 0", "b 0.9 admm 0", "a 0.9 pot 0"] and len(keys) == 12
    run = {"score": 0.9, "nll": 0.5, "kept": 0.1, "macs": 0.2, "images": [5000, 100], "cpu": 3.0}
    lines = layerwise.page({key: run for key in keys if "admm" in key}, ["a", "b"], [0.9], ["admm", "pot"])
    assert "| admm | 90.0 ± 0.0 · 0.50 ± 0.00 | 90.0 ± 0.0 · 0.50 ± 0.00 | 90.0 |" in lines
    assert "| admm | 20.0 % | 5.0 / 0.1 | 3 |" in lines and not any("pot" in line for line in lines)


def test_allocations_are_measured_by_the_benchmark_of_each_net(monkeypatch):
    given = {}
    monkeypatch.setattr(layerwise, "main", lambda arguments: given.update(zoo=arguments))
    monkeypatch.setattr(field, "main", lambda arguments: given.update(real=arguments) or 1)
    nets = ["--nets", "glyph-vit", "crepe", "face", "--allocations", "erk", "fcpts, 40 steps"]
    assert shares.main([*nets, "--seeds", "1", "--sparsity", "0.9", "--out", "cells"]) == 1
    assert given["zoo"][:3] == ["--nets", "glyph-vit", "--methods"] and given["real"][:3] == ["--nets", "crepe", "face"]
    for arguments in given.values():
        chains = [text for flag, text in itertools.pairwise(arguments) if flag == "--chain"]
        assert chains_of([], {}, {}, chains) == {
            "erk + admm": {"allocate": "erk", "repair": "admm"},
            "fcpts, 40 steps + admm": {"allocate": "fcpts", "repair": "admm", "options": {"fcpts": {"steps": 40}}},
        }
    assert {"--sparsity", "--workers", "--cache"} <= set(given["zoo"]) and {"--budget", "--out"} <= set(given["real"])


@pytest.mark.parametrize("name", shares.ALLOCATIONS)
def test_every_allocation_is_a_chain_that_exists(name):
    chain = dict(shares.ALLOCATIONS[name])
    assert assemble("erk", **chain).names.repair == ("admm",)
