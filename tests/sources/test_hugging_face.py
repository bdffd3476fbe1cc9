"""Directories and GGUF files of the transformers library: what fails is named, what loads is an ordinary model."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import allot
from allot import UsageError
from allot.cli import console
from allot.cli import prune as planning
from allot.errors import with_cause
from allot.sources.load import load_model
from allot.sources.origins import build
from cli.command import done, refused
from sources.language import bert, gpt2, llama, text

transformers = pytest.importorskip("transformers")


# Failures


def chained(message: str, root: Exception) -> Exception:
    """An error as libraries raise it: `root` is two errors below."""
    try:
        try:
            try:
                raise root
            except Exception as inner:
                raise RuntimeError("something in between") from inner
        except RuntimeError:
            raise ModuleNotFoundError(message)  # without `from`: the context says where it came from
    except ModuleNotFoundError as error:
        return error


def test_a_model_that_cannot_be_imported_is_explained_by_the_innermost_error(monkeypatch: pytest.MonkeyPatch):
    llama()
    broken = chained("Could not import module 'LlamaConfig'.", RuntimeError("operator torchvision::nms does not exist"))

    def fail(*args: object, **options: object) -> None:
        raise broken

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    said = refused("plan hf:net --budget sparsity=0.5")
    assert said == (
        "error: cannot load hf:net: Could not import module 'LlamaConfig'. "
        "(RuntimeError: operator torchvision::nms does not exist)\n"
    )


def test_a_cause_that_says_the_same_is_not_repeated_and_a_hidden_one_not_named():
    assert with_cause(ValueError("no file x")) == "no file x"
    assert with_cause(chained("it says: disk full", OSError("disk full"))) == "it says: disk full"
    hidden = ValueError("clear")
    hidden.__context__, hidden.__suppress_context__ = KeyError("detail"), True  # what `from None` does
    assert with_cause(hidden) == "clear"
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one  # a ring ends
    assert with_cause(one) == "one (ValueError: other)"


def test_downloads_are_mentioned_only_where_there_is_one():
    Path("net").mkdir()
    Path("net/config.json").write_text("{")
    said = refused("prune hf:net --budget sparsity=0.5 --out RUN")
    assert said.startswith("error: cannot load hf:net: ") and "download" not in said and "--weights" not in said

    def fail() -> torch.nn.Module:
        raise OSError("no network")

    with pytest.raises(UsageError, match=r"cannot load timm:x: no network \(--weights FILE or --weights random need"):
        build("timm:x", fail)


# GGUF


def test_a_gguf_file_that_is_not_there_or_cannot_be_read_here_is_named(monkeypatch: pytest.MonkeyPatch):
    assert refused("plan hf:net/none.gguf --budget sparsity=0.5") == "error: hf:net/none.gguf: no such file.\n"
    Path("some.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    said = refused("plan hf:some.gguf --budget sparsity=0.5")
    assert said == "error: gguf is not installed: pip install 'allot[gguf]'.\n"


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A language model of one block in one file; some of its weights, by their names in the model."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    tokens = ["<|endoftext|>", *(chr(97 + i) for i in range(20)), "ab", "cd", "Ġ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    draw = np.random.default_rng(0)
    block = {"attn_v": (16, 16), "attn_output": (16, 16), "attn_q": (16, 16), "attn_k": (16, 16)}
    block |= {"ffn_gate": (24, 16), "ffn_up": (24, 16), "ffn_down": (16, 24)}
    shapes = {"token_embd": (len(tokens), 16), "output": (len(tokens), 16)}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    weights = {name: draw.normal(size=shape).astype(np.float32) / 4 for name, shape in shapes.items()}
    weights |= {name: np.ones(16, np.float32) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    for name, value in weights.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    named = {"blk.0.attn_v": "self_attn.v_proj", "blk.0.ffn_down": "mlp.down_proj", "blk.0.ffn_up": "mlp.up_proj"}
    return {f"model.layers.0.{long}.weight": weights[short] for short, long in named.items()}


def test_a_gguf_file_is_an_ordinary_model_from_end_to_end():
    Path("files").mkdir()
    weights = write_gguf(Path("files/tiny.gguf"))
    source = load_model("hf:files/tiny.gguf")
    state = source.model.state_dict()
    assert all(torch.equal(state[name], torch.from_numpy(value)) for name, value in weights.items())
    assert {type(module) for module in source.model.modules() if "Linear" in type(module).__name__} == {torch.nn.Linear}
    Path("some.txt").write_text("abcdefgh" * 60)
    line = "prune hf:files/tiny.gguf --data text:some.txt --input 8 --samples 8"
    done(f"{line} --budget sparsity=0.5 --repair none --out RUN")
    assert done("export RUN --to hf --json").json["error"] == 0
    again = transformers.AutoModelForCausalLM.from_pretrained("RUN/hf").state_dict()
    assert all(torch.equal(again[name], value) for name, value in allot.load("RUN").items())
    tokenizer = transformers.AutoTokenizer.from_pretrained("RUN/hf")
    assert tokenizer("abcdab")["input_ids"] == source.tokenizer()("abcdab")["input_ids"] == [21, 22, 21]


# Plans


def planned(line: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The plan, made from shapes alone; of the loaded model it is the same."""
    with monkeypatch.context() as patched:
        patched.setattr(planning, "_planned", None)
        from_shapes = done(f"plan {line} --json").json
    with monkeypatch.context() as patched:
        patched.setattr(planning, "_planned_from_shapes", lambda *_: None)
        assert done(f"plan {line} --json").json == from_shapes
    return from_shapes


@pytest.mark.parametrize("build", [partial(llama, blocks=3), gpt2, bert])
@pytest.mark.parametrize("budget", ["sparsity=0.7", "macs=50%", "bytes=70%"])
@pytest.mark.parametrize("method", ["uniform", "erk"])
def test_a_plan_by_shapes_reads_no_weights_and_is_the_plan_of_the_model(build, budget, method, monkeypatch):
    build()
    planned(f"hf:net --budget {budget} --method {method}", monkeypatch)
    Path("net/model.safetensors").unlink()
    done(f"plan hf:net --budget {budget} --method {method}")
    assert "cannot load hf:net" in refused(f"plan hf:net --budget {budget} --method lamp")


def test_bytes_are_those_of_the_precision_of_the_weights(monkeypatch: pytest.MonkeyPatch):
    llama()
    whole = planned("hf:net --budget bytes=60%", monkeypatch)["budget"][0]["limit"]
    transformers.LlamaForCausalLM.from_pretrained("net").bfloat16().save_pretrained("net")
    assert planned("hf:net --budget bytes=60%", monkeypatch)["budget"][0]["limit"] < 0.7 * whole


@pytest.mark.parametrize("spec", ["torchvision:swin_t", "timm:vit_tiny_patch16_224", "timm:mobilenetv3_small_050"])
def test_plans_of_pictures_are_made_from_shapes(spec: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip(spec.partition(":")[0])
    planned(f"{spec} --budget macs=50%", monkeypatch)


def test_an_allocation_is_replayed_from_shapes_and_channels_are_not(monkeypatch: pytest.MonkeyPatch):
    llama()
    done("plan hf:net --budget sparsity=0.5 --method lamp --save given.json")
    given = planned("hf:net --budget sparsity=0.5 --allocate given.json", monkeypatch)
    kept = {layer["name"]: layer["kept"] for layer in given["layers"]}
    assert kept == {name: row["kept"] for name, row in json.loads(Path("given.json").read_text())["layers"].items()}
    monkeypatch.setattr(planning, "load_shapes", None)
    done("plan hf:net --budget sparsity=0.2 --allocate uniform --pattern channels")


def test_a_rule_that_matches_no_layer_is_told_before_weights_are_read(monkeypatch: pytest.MonkeyPatch):
    llama()
    monkeypatch.setattr(planning, "_planned", None)
    assert "rule 'nothing' matches no prunable layer" in refused("plan hf:net --budget sparsity=0.5 --exclude nothing")


def test_a_model_that_decides_by_numbers_is_loaded_for_its_plan(monkeypatch: pytest.MonkeyPatch):
    llama()
    real = transformers.LlamaModel.forward

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        assert float(self.norm.weight.sum()) == 16  # no meta tensor has a sum
        return real(self, *args, **options)

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    assert done("plan hf:net --budget macs=50% --json").json["budget"][0]["met"]


def test_a_model_without_values_is_not_pruned():
    with torch.device("meta"):
        model = torch.nn.Linear(4, 4)
    with pytest.raises(UsageError, match="weight holds no values yet"):
        allot.prune(model, None, "sparsity=0.5")


def test_blocks_alike_share_a_row_of_the_table_and_json_has_every_layer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console.people, "width", 120)  # in a narrow terminal names fold
    llama(blocks=3)
    outcome = done("plan hf:net --budget sparsity=0.5 --exclude lm_head")
    assert "model.layers.*.mlp.up_proj.weight x3" in outcome.err and "layers.0" not in outcome.err
    names = [layer["name"] for layer in done("plan hf:net --budget sparsity=0.5 --json").json["layers"]]
    assert [name for name in names if "up_proj" in name] == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]


# From a directory to a directory


def test_a_language_model_is_pruned_by_a_text_into_a_directory_that_from_pretrained_opens():
    llama()
    line = f"prune hf:net --data text:{text(400)} --test text:{text(90, 'other.txt')} --input 8 --samples 24"
    done(f"{line} --score wanda --budget sparsity=0.5 --out RUN")
    done("export RUN --to hf --out sparse")
    again = transformers.AutoModelForCausalLM.from_pretrained("sparse")
    kept = allot.load("RUN")
    assert all(torch.equal(value, kept[name]) for name, value in again.state_dict().items())
    words = "the cat sat on a mat"
    ids = [transformers.AutoTokenizer.from_pretrained(place)(words)["input_ids"] for place in ("net", "sparse")]
    assert ids[0] == ids[1] and len(ids[0]) == 6
    assert done("verify RUN --json").json["passed"]
    score = done(f"evaluate hf:sparse --data text:{text(90, 'other.txt')} --input 8 --json").json
    assert score["perplexity"] == pytest.approx(done("evaluate RUN --json").json["perplexity"])


# The adapter of the guide


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> type:
    """The class of docs/howto/llm.md, on a stand-in for the package that it is written for."""
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = type("LM", (), {"__init__": lambda self: None})
    guide = (Path(__file__).parents[2] / "docs" / "howto" / "llm.md").read_text(encoding="utf-8")
    (code,) = [
        block for block in re.findall(r"```python no-run\n(.*?)```", guide, re.DOTALL) if "class Adapter" in block
    ]
    names: dict[str, Any] = {}
    exec(compile(code, "llm.md", "exec"), names)
    return names["Adapter"]


def test_the_adapter_gives_the_log_likelihood_of_each_token_once_with_all_the_context_that_fits(adapter: type):
    gpt2(places=8)
    model = transformers.GPT2LMHeadModel.from_pretrained("net").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("net")
    tokenizer.bos_token = "the"
    asked = adapter(model, tokenizer, length=8)

    def log_p(given: list[int], token: int) -> torch.Tensor:
        return model(torch.tensor([given])).logits[0, -1].log_softmax(-1)[token]

    ids = tokenizer(Path(text(21)).read_text())["input_ids"]
    start = tokenizer.bos_token_id
    whole = [start, *ids]
    with torch.no_grad():
        # blocks of 8 predictions; the last one, of 5, sees 3 tokens of the block before
        first = sum(log_p(whole[8 * (i // 8) : i + 1], ids[i]) for i in range(16))
        rolling = first + sum(log_p(whole[13 : i + 1], ids[i]) for i in range(16, 21))
        pair = sum(log_p([start, *ids[:i]], ids[i]) for i in (3, 4))
    words = tokenizer.convert_ids_to_tokens(ids)
    (found,) = asked.loglikelihood_rolling([SimpleNamespace(args=(" ".join(words),))])
    assert found == pytest.approx(float(rolling), abs=1e-4)
    ((found, _),) = asked.loglikelihood([SimpleNamespace(args=(" ".join(words[:3]), " " + " ".join(words[3:5])))])
    assert found == pytest.approx(float(pair), abs=1e-4)


def test_the_adapter_continues_greedily_up_to_a_stop_and_knows_its_own_choice(adapter: type):
    gpt2()
    model = transformers.GPT2LMHeadModel.from_pretrained("net").eval()
    asked = adapter(model, transformers.AutoTokenizer.from_pretrained("net"), length=16)
    asked.start = [1]
    options = {"until": ["nothing"], "max_gen_toks": 3}
    (made,) = asked.generate_until([SimpleNamespace(args=("the cat", options))])
    ((_, greedy),) = asked.loglikelihood([SimpleNamespace(args=("the cat", " " + made))])
    assert len(made.split()) == 3 and greedy
    (cut,) = asked.generate_until([SimpleNamespace(args=("the cat", options | {"until": [made.split()[0]]}))])
    assert cut == ""
