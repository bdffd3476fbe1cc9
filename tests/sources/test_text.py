"""Causal language models of the transformers library, and `text:` as their data."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import allot
from allot import UsageError, evaluate
from allot.export.certificate import probe
from allot.export.runtimes import answers
from allot.run import evaluate as evaluation
from allot.sources.files import Texts
from allot.sources.load import load_data, load_model
from cli.command import MLP, done, refused
from sources.language import WORDS, bert, gpt2, llama, text

transformers = pytest.importorskip("transformers")


# Blocks


@pytest.mark.parametrize(("length", "blocks"), [(None, 3), (5, 10), (50, 1)])
def test_a_text_is_cut_into_full_blocks_of_tokens(length, blocks):
    gpt2()
    name = text(50)
    ids = [1 + WORDS.index(word) for word in Path(name).read_text().split()]
    data = load_data(f"text:{name}", load_model("hf:net", shape=length and (length,)))
    length = length or 16  # as many places as the model has
    assert len(data) == blocks and all(sample.keys() == {"input_ids"} for sample in data)
    assert torch.cat([sample["input_ids"] for sample in data]).tolist() == ids[: blocks * length]


def test_blocks_are_of_512_tokens_where_the_model_takes_more():
    gpt2(places=600)
    assert load_data(f"text:{text(1100)}", load_model("hf:net"))[1]["input_ids"].shape == (512,)


def test_texts_that_cannot_be_used_are_refused():
    gpt2()
    line = "prune hf:net --budget sparsity=0.5 --out RUN --data"
    assert "no such file" in refused(f"{line} text:none.txt")
    assert "holds 3 tokens, no block of 16" in refused(f"{line} text:{text(3)}") and not Path("RUN").exists()
    Path("latin.txt").write_bytes(b"caf\xe9")
    assert "no text in UTF-8" in refused(f"{line} text:latin.txt")
    assert "text: is for hf: models" in refused(f"prune {MLP} --budget sparsity=0.5 --out RUN --data text:{text(50)}")
    assert "--input LENGTH is accepted" in refused(f"{line} text:{text(50)} --input 3,8,8")
    gpt2(vocabulary=4)
    assert "the model knows 4" in refused(f"{line} text:{text(50)}")
    Path("net/tokenizer.json").unlink()
    Path("net/tokenizer_config.json").unlink()
    assert "the tokenizer makes no tokens of it" in refused(f"{line} text:{text(50)}")
    llama()
    Path("net/tokenizer.json").write_text("{}")
    assert "no tokenizer for hf:net" in refused(f"{line} text:{text(50)}")


# Scores


def next_tokens(model: nn.Module, blocks: torch.Tensor) -> tuple[float, float]:
    """Accuracy and mean negative log-likelihood of the next token, one position at a time."""
    right, nll = [], []
    with torch.no_grad():
        for block in blocks:
            for t in range(len(block) - 1):
                logits = model(block[None, : t + 1]).logits[0, -1]  # it sees no more than what came before
                right.append(float(logits.argmax() == block[t + 1]))
                nll.append(float(logits.double().logsumexp(0) - logits.double()[block[t + 1]]))
    return sum(right) / len(right), sum(nll) / len(nll)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_language_models_are_scored_by_their_next_tokens(build):
    build()
    spec = f"text:{text(80)}"
    source = load_model("hf:net", shape=(8,))
    accuracy, nll = next_tokens(source.model, load_data(spec, source).blocks)
    for batch_size in (1, 4, 256):
        score = evaluate(source.model, load_data(spec, source), batch_size=batch_size, workers=batch_size % 3)
        assert score.metric == "token_top1" and score.samples == 10
        assert score.score == pytest.approx(accuracy) and score.nll == pytest.approx(nll, rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    outcome = done(f"evaluate hf:net --data {spec} --input 8 --json")
    assert outcome.json == score.to_json() and outcome.json["perplexity"] == score.perplexity
    assert f"perplexity {score.perplexity:.4g}" in done(f"evaluate hf:net --data {spec} --input 8").err


def test_logits_are_summed_up_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch):
    gpt2()
    model = load_model("hf:net").model
    blocks = Texts(torch.randint(0, 11, (5, 8), generator=torch.Generator().manual_seed(0)))
    whole = evaluate(model, blocks)
    for logits in (1, 40, 12 * 7):  # of fewer than a row, of three rows, of a block
        monkeypatch.setattr(evaluation, "LOGITS", logits)
        piecewise = evaluate(model, blocks)
        assert piecewise.nll == pytest.approx(whole.nll, rel=1e-14) and piecewise.score == whole.score


def test_arrays_of_tokens_are_a_text_and_padding_is_not_scored():
    gpt2()
    model = load_model("hf:net").model
    ids = torch.randint(1, 11, (4, 9), generator=torch.Generator().manual_seed(0))
    accuracy, nll = next_tokens(model, ids[:, :6])
    np.savez("plain.npz", input_ids=ids[:, :6].numpy())
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    np.savez("padded.npz", input_ids=ids.numpy(), attention_mask=mask.numpy())
    for name in ("plain", "padded"):
        score = evaluate(model, load_data(f"npz:{name}.npz"))
        assert score.score == pytest.approx(accuracy) and score.nll == pytest.approx(nll, rel=1e-5)


def test_a_model_that_sees_what_comes_is_not_scored_on_text():
    bert()
    spec = f"text:{text(80)}"
    assert "change with tokens that come later" in refused(f"evaluate hf:net --data {spec}")
    done(f"prune hf:net --data {spec} --budget sparsity=0.5 --repair distill --set options.distill.steps=2 --out RUN")


def test_whole_numbers_without_labels_are_no_text_for_a_classifier():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 3))
    with pytest.raises(UsageError, match="the data has no labels"):
        evaluate(model, torch.zeros(6, 5, dtype=torch.long))


# Runs


@pytest.mark.parametrize("build", [gpt2, llama])
def test_language_models_are_pruned_exactly_and_scored_before_and_after(build):
    build()
    data = f"text:{text(400)}"
    line = f"prune hf:net --data {data} --test text:{text(90, 'other.txt')} --input 8 --samples 24 --batch-size 8"
    line += " --budget macs=50%,sparsity=0.5 --method fcpts --set options.fcpts.steps=4 --workers 2 --out RUN"
    told = done(f"{line} --json").json
    assert told["kept"] <= told["total"] / 2 and all(row["met"] for row in told["budget"])
    scores = told["scores"]
    assert scores["metric"] == "token_top1" and scores["samples"] == 11
    assert scores["perplexity"] == {
        net: pytest.approx(math.exp(scores["nll"][net])) for net in ("dense", "sparse")
    }  # fmt: skip
    assert done("evaluate RUN --json").json["perplexity"] == pytest.approx(scores["perplexity"]["sparse"])
    assert "perplexity, lower is better" in done("report RUN").err
    page = Path("RUN/report.html").read_text()
    dense, sparse = (f"{scores['perplexity'][net]:,.2f}" for net in ("dense", "sparse"))
    assert "perplexity, lower is better" in page and dense in page and sparse in page
    assert f"perplexity {scores['perplexity']['dense']:,.4g} \u2192 {scores['perplexity']['sparse']:,.4g}" in page
    assert done("verify RUN --json").json["passed"]


@pytest.mark.parametrize(("length", "batch_size"), [(8, 64), (100, 10), (512, 2), (600, 1)])
def test_texts_are_read_in_small_batches_where_nothing_else_is_asked(length: int, batch_size: int):
    gpt2(places=600)
    model = load_model("hf:net").model
    blocks = Texts(torch.randint(0, 11, (130, length), generator=torch.Generator().manual_seed(0)))
    problem = allot.prune(model, blocks, "sparsity=0.5", repair="none").problem
    used, watched = problem.inputs(), problem.watch.inputs
    assert (len(used) + len(watched), used.batch_size) == (128, batch_size)
    asked = allot.prune(model, blocks, "sparsity=0.5", repair="none", samples=130, batch_size=64).problem
    everything = {*asked.inputs().indices, *asked.watch.inputs.indices}
    assert len(everything) == 130 and asked.inputs().batch_size == 64
    net = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 4))  # not of that library
    plain = allot.prune(net, blocks.blocks, "sparsity=0.5", repair="none")
    assert plain.problem.calibration.batch_size == 64


def test_numbers_that_are_no_sizes_are_refused_for_texts_as_well():
    gpt2()
    line = f"prune hf:net --data text:{text(400)} --budget sparsity=0.5 --out RUN"
    assert "samples=0" in refused(f"{line} --samples 0") and "batch_size=0" in refused(f"{line} --batch-size 0")


def test_an_export_keeps_the_last_logits_of_a_long_text(monkeypatch: pytest.MonkeyPatch):
    gpt2()
    for module in (answers, probe):
        monkeypatch.setattr(module, "PIECE", 30)  # of 8 x 12
    done("prune hf:net --budget sparsity=0.5 --input 8 --repair none --out RUN")
    done("export RUN --to hf")
    kept = safetensors.torch.load_file("RUN/hf/allot.probe.safetensors")
    with torch.no_grad():
        logits = transformers.GPT2LMHeadModel.from_pretrained("RUN/hf")(kept["input.0"]).logits
    assert torch.equal(kept["output.0"], logits.flatten()[-30:])
    checks = {row["check"]: row["found"] for row in done("verify RUN/hf --json").json["rows"]}
    assert checks["outputs on the probe"] == "off by 0"


def test_tokens_in_scope_are_what_is_multiplied():
    llama()
    source = load_model("hf:net")
    assert source.example["input_ids"].shape == (1, 16) and not source.model.config.use_cache
    said = done("plan hf:net --budget macs=50% --input 8 --json").json
    layers = {layer["name"]: layer for layer in said["layers"]}
    assert layers["lm_head.weight"]["macs"] == 8 * layers["lm_head.weight"]["total"]
    assert said["skipped"]["model.embed_tokens.weight"] == "lookup table, not a matrix product"


def test_blocks_calibrate_in_python():
    gpt2()
    model = load_model("hf:net").model
    blocks = Texts(torch.randint(0, 11, (12, 8), generator=torch.Generator().manual_seed(0)))
    result = allot.prune(model, blocks, "sparsity=0.5", method="uniform", repair="bias", test=blocks)
    assert result.report()["scores"]["samples"] == 12
