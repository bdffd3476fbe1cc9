"""Slim files: opened in a fresh model, certified, gone on with."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import allot
from allot.errors import Stopped, UsageError, VerificationError
from allot.export.certificate.certificate import verify
from allot.export.certificate.rows import digest, sealed
from allot.export.files.formats import BITMASK, PLAIN, PLAN, SLIM, load, read
from allot.export.files.slim import load_slim
from allot.pruning.result import Result
from contract.cases import CASES, Attention, Convolutions
from export.damage import DAMAGES, any_flipped_bit_fails, damage, passed

FILES = (SLIM, PLAIN, PLAN)


@dataclass(frozen=True)
class Kind:
    """A case, a fresh model of its class, whose weights are others, and a budget that takes channels away."""

    case: str
    fresh: Callable[[], nn.Module]
    budget: str
    allocate: Any = "uniform"
    repair: str = "bn"


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4))


KINDS = {
    "batch norm, depthwise, grouped": Kind(
        "with batch norm",
        lambda: Convolutions(norm=True, reverse=False),
        "params=261",  # what half of every group costs
        {"full": 2 / 4, "grouped": 2 / 3, "pointwise": 5 / 9},
    ),
    "other order of modules": Kind("with batch norm", lambda: Convolutions(norm=True, reverse=True), "macs=40%"),
    "no norms": Kind(
        "without batch norm", lambda: Convolutions(norm=False, reverse=False), "sparsity=0.6", repair="none"
    ),
    "attention": Kind("attention", Attention, "params=60%", repair="none"),
    "by dsa": Kind("with batch norm", lambda: Convolutions(norm=True, reverse=False), "macs=50%", "dsa", "bn,distill"),
    "almost nothing gone": Kind("linear chain", chain, "params=99%", repair="none"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def pruned(kind: Kind, directory: Path, **more: Any) -> Result:
    case = CASES[kind.case]
    parts: dict[str, Any] = {"allocate": kind.allocate, "repair": kind.repair, "pattern": "channels"}
    options = {"dsa": {"steps": 6}} if kind.allocate == "dsa" else {}
    options |= {"distill": {"steps": 4}} if "distill" in kind.repair else {}
    return allot.prune(
        case.make(), case.inputs(), kind.budget, options=options, save_to=directory, batch_size=8, **parts, **more
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return {name: pruned(kind, tmp_path_factory.mktemp("run")) for name, kind in KINDS.items()}


@pytest.fixture
def run(tmp_path: Path, results: dict[str, Result]) -> Path:
    return copied(results["batch norm, depthwise, grouped"], tmp_path)


def copied(result: Result, tmp_path: Path) -> Path:
    assert result.directory
    return Path(shutil.copytree(result.directory, tmp_path / "run"))


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# opened again


@each_kind
@pytest.mark.parametrize("given", ["a directory", "a file", "text", "a function"])
def test_a_slim_file_in_a_fresh_model_answers_as_the_masked_model(results: dict[str, Result], kind: str, given: str):
    result, fresh = results[kind], KINDS[kind].fresh
    assert result.directory
    path = {"a directory": result.directory, "text": str(result.directory)}.get(given, result.directory / SLIM)
    slim = load_slim(fresh if given == "a function" else fresh(), path)
    x = CASES[KINDS[kind].case].inputs(9)
    with torch.no_grad():
        wanted = result.model().eval()(x)
        assert torch.allclose(slim(x), wanted, atol=1e-5)
        assert not torch.allclose(fresh().eval()(x), wanted, atol=1e-2)
    assert not any(module.training for module in slim.modules())


@each_kind
def test_a_slim_file_gives_the_model_that_slim_gives(results: dict[str, Result], kind: str):
    result = results[kind]
    assert result.directory
    own, opened = result.slim().state_dict(), load_slim(KINDS[kind].fresh(), result.directory).state_dict()
    assert own.keys() == opened.keys() == result.state_dict().keys()
    assert all(torch.equal(own[name], opened[name]) for name in own)


def test_a_run_in_which_every_group_lost_channels_is_among_these(results: dict[str, Result]):
    assert results["batch norm, depthwise, grouped"].allocation.kept == {"full": 2, "grouped": 2, "pointwise": 5}
    assert results["attention"].allocation.kept == {"attention.heads": 1}


@each_kind
def test_a_slim_file_holds_what_it_says(results: dict[str, Result], kind: str):
    result = results[kind]
    assert result.directory
    plan, slim, plain = result.plan(), load(result.directory / SLIM), load(result.directory)
    assert plan and all(torch.equal(plan.cut(name, value), slim[name]) for name, value in plain.items())
    held = sum(slim[layer.name].numel() for layer in result.problem.scope)
    assert held == result.problem.budget.cost("params", result.allocation.kept)
    size = (result.directory / SLIM).stat().st_size
    assert size == result.problem.budget.cost("bytes", result.allocation.kept)
    with safetensors.safe_open(result.directory / SLIM, "pt") as file:
        assert list(file.metadata()) == ["allot"] and set(file.keys()) == plain.keys()


@pytest.mark.parametrize("kind", ["batch norm, depthwise, grouped", "attention"])
def test_the_model_that_is_cut_stays_as_it_was(results: dict[str, Result], kind: str):
    directory, model = results[kind].directory, KINDS[kind].fresh().train()
    assert directory
    before, modes = bits_of(model), [module.training for module in model.modules()]
    load_slim(model, directory)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_is_unpickled_on_the_way(run: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert {path.suffix for path in run.iterdir()} <= {".safetensors", ".json", ".jsonl", ".yaml", ".html"}
    load_slim(Convolutions(norm=True, reverse=False), run)
    assert passed(run)


def test_a_slim_file_is_enough_alone(run: Path, tmp_path: Path):
    alone = Path(shutil.copy(run / SLIM, tmp_path / "other-name.safetensors"))
    shutil.rmtree(run)
    assert load_slim(Convolutions(norm=True, reverse=False), alone)(CASES["with batch norm"].inputs(2)).shape == (2, 5)


def test_a_slim_model_trains_and_is_saved_like_any_other(run: Path):
    slim = load_slim(Convolutions(norm=True, reverse=False), run)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in slim.parameters())
    optimizer = torch.optim.SGD(slim.parameters(), 0.1)
    before = bits_of(slim)
    slim.train()(CASES["with batch norm"].inputs(8)).square().sum().backward()
    optimizer.step()
    assert any(not torch.equal(value, before[name]) for name, value in slim.state_dict().items())
    again = load_slim(Convolutions(norm=True, reverse=False), run)
    again.load_state_dict(slim.state_dict())


# refused


def refused(model: Any, path: Path, about: str) -> None:
    with pytest.raises(UsageError, match=about) as found:
        load_slim(model, path)
    assert "\n" not in str(found.value) and path.name in str(found.value)


def test_another_model_is_refused(run: Path):
    refused(Attention(), run / SLIM, "belongs to another model")
    refused(Convolutions(norm=False, reverse=False), run / SLIM, "belongs to another model: .* differ")
    refused(nn.Linear(2, 2), run / SLIM, "belongs to another model")


def changed(change: Callable[[Any], None]) -> nn.Module:
    model = Convolutions(norm=True, reverse=False)
    change(model)
    return model


def test_a_model_of_other_shapes_is_refused(run: Path):
    def narrower(model: Any) -> None:
        model.out = nn.Linear(4, 5)

    def flat(model: Any) -> None:
        model.pointwise.weight.data = model.pointwise.weight.data.flatten(1)

    refused(changed(narrower), run / SLIM, "belongs to another model: out.weight was ")
    refused(changed(flat), run / SLIM, "belongs to another model: pointwise.weight was ")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "grouped", nn.Conv2d(8, 6, 3, groups=1)),
        lambda model: setattr(model, "out", nn.Linear(9, 7)),
        lambda model: setattr(model, "full", nn.Conv2d(3, 8, 5, padding=1, bias=False)),
    ],
    ids=["other groups", "more classes", "a larger kernel"],
)
def test_a_wider_model_is_refused(run: Path, change: Callable[[Any], None]):
    refused(changed(change), run / SLIM, "belongs to another model")


def test_files_that_are_no_slim_ones_are_refused(run: Path, tmp_path: Path):
    model = Convolutions(norm=True, reverse=False)
    refused(model, run / PLAIN, "is no slim file")
    refused(model, run / PLAN, "is not a whole safetensors file")
    refused(model, run / "nowhere.safetensors", "no such file")
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, foreign)
    refused(model, foreign, "is no slim file")
    (run / SLIM).write_bytes((run / SLIM).read_bytes()[:-9])
    refused(model, run / SLIM, "is not a whole safetensors file")
    (run / SLIM).unlink()
    with pytest.raises(UsageError, match=f"{SLIM}: no such file"):
        load_slim(model, run)


def test_the_file_of_single_weights_is_refused(tmp_path: Path):
    case = CASES["with batch norm"]
    allot.prune(case.make(), case.inputs(), "sparsity=0.5", repair="none", save_to=tmp_path / "run")
    refused(Convolutions(norm=True, reverse=False), tmp_path / "run" / BITMASK, "is no slim file: .*channels")


@pytest.mark.parametrize("attributes", [None, {"nowhere": {"heads": 1}}])
def test_metadata_whose_attributes_make_no_sense_is_refused(run: Path, attributes: Any):
    tensors, about = rewritten(run / SLIM)
    about = {key: value for key, value in about.items() if key != "attributes"}
    about |= {"attributes": attributes} if attributes else {}
    safetensors.torch.save_file(tensors, run / SLIM, {"allot": json.dumps(about)})
    refused(Convolutions(norm=True, reverse=False), run / SLIM, "damaged|another model")


# verified


@each_kind
def test_a_channel_run_and_each_of_its_files_pass(results: dict[str, Result], kind: str):
    directory = results[kind].directory
    assert directory and passed(directory) and passed(directory / SLIM) and passed(directory / PLAIN)
    found = {(row["file"], row["check"].split("=")[0]) for row in verify(directory)["rows"]}
    assert {(name, check) for name in FILES for check in ("bytes on disk", "sha256")} <= found
    assert {("allocation.json", "kept per group"), (SLIM, f"same tensors as {PLAIN}")} <= found
    assert {(name, KINDS[kind].budget.split("=")[0]) for name in (SLIM, PLAIN)} <= found


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_fails(run: Path, name: str):
    any_flipped_bit_fails(run, name, 25)


@pytest.mark.parametrize("name", [*FILES, "allocation.json", "certificate.json"])
@pytest.mark.parametrize("how", DAMAGES)
def test_any_damaged_file_fails(run: Path, name: str, how: str):
    damage(run / name, how)
    assert not passed(run)


@pytest.mark.parametrize("more", [1, -1])
def test_an_edited_allocation_fails(run: Path, more: int):
    content = json.loads((run / "allocation.json").read_text())
    content["layers"]["pointwise"]["kept"] += more
    (run / "allocation.json").write_text(json.dumps(content))
    assert ("allocation.json", "sha256") in {(r["file"], r["check"]) for r in verify(run)["rows"] if not r["passed"]}
    certificate = json.loads((run / "certificate.json").read_text())
    certificate["promised"]["files"]["allocation.json"] = digest(run / "allocation.json")
    (run / "certificate.json").write_text(json.dumps(sealed(certificate), indent=2) + "\n")
    [row] = [row for row in verify(run)["rows"] if not row["passed"]]
    assert (row["check"], row["found"]) == ("kept per group", "pointwise")


def rewritten(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["allot"])
    return safetensors.torch.load_file(path), about


@pytest.mark.parametrize("name", [PLAIN, SLIM])
def test_a_single_file_is_held_to_its_own_limits(run: Path, name: str):
    tensors, about = rewritten(run / name)
    about["limits"]["params"] //= 2
    safetensors.torch.save_file(tensors, run / name, {"allot": json.dumps(about)})
    assert not passed(run / name)


def test_a_plan_that_was_exchanged_fails_even_with_a_forged_certificate(run: Path):
    plan = json.loads((run / PLAN).read_text())
    kept = plan["tensors"]["pointwise.weight"]["0"]
    kept[0] = next(i for i in range(9) if i not in kept)
    plan["tensors"]["pointwise.weight"]["0"] = sorted(kept)
    (run / PLAN).write_text(json.dumps(plan))
    certificate = json.loads((run / "certificate.json").read_text())
    del certificate["promised"]["files"][PLAN]
    (run / "certificate.json").write_text(json.dumps(certificate))
    assert not passed(run)


def test_a_certificate_without_the_slim_file_fails(run: Path):
    certificate = json.loads((run / "certificate.json").read_text())
    del certificate["promised"]["files"][SLIM]
    (run / "certificate.json").write_text(json.dumps(certificate))
    assert not passed(run)


# gone on with


def same(left: Result, right: Result) -> None:
    assert dict(left.allocation) == dict(right.allocation) and left.candidate.channels == right.candidate.channels
    assert left.plan() == right.plan() and left.candidate.diagnostics == right.candidate.diagnostics
    assert left.masks.keys() == right.masks.keys()
    assert all(torch.equal(mask, right.masks[name]) for name, mask in left.masks.items())
    for one, other in ((left.state_dict(), right.state_dict()), (left.slim().state_dict(), right.slim().state_dict())):
        assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@each_kind
def test_a_finished_run_is_opened_again_by_the_same_call(results: dict[str, Result], kind: str, tmp_path: Path):
    directory = copied(results[kind], tmp_path)
    steps: list[Any] = []
    again = pruned(KINDS[kind], directory, on_step=steps.append)
    assert steps == [] and again.directory == directory
    same(again, results[kind])
    left, right = again.report(), results[kind].report()
    assert left["layers"] == right["layers"] and left["images"] == right["images"]


def test_a_finished_run_that_was_damaged_is_not_opened(run: Path):
    (run / PLAN).unlink()
    with pytest.raises(VerificationError, match=f"{PLAN}: exists: no"):
        pruned(KINDS["batch norm, depthwise, grouped"], run)


@pytest.mark.parametrize("kind", ["batch norm, depthwise, grouped", "attention", "by dsa"])
@pytest.mark.parametrize("after", [1, 2, 4, 9])
def test_an_unfinished_run_goes_on_to_the_same_result(
    results: dict[str, Result], kind: str, after: int, tmp_path: Path
):
    asked = iter([False] * after + [True] * 100)
    stopped = True
    try:
        pruned(KINDS[kind], tmp_path / "run", should_stop=lambda: next(asked))
        stopped = False
    except Stopped:
        with pytest.raises(UsageError, match="is not finished"):
            verify(tmp_path / "run")
    steps: list[Any] = []
    again = pruned(KINDS[kind], tmp_path / "run", on_step=steps.append)
    assert bool(steps) == stopped
    same(again, results[kind])
    assert passed(tmp_path / "run")


# zeros


@each_kind
def test_the_zeros_of_the_model_are_where_the_plan_says(results: dict[str, Result], kind: str):
    result = results[kind]
    plan, model = result.plan(), result.model()
    assert plan and {name: len(kept) for name, kept in plan.kept.items()} == result.allocation.kept
    for name, parameter in model.named_parameters():
        mask = torch.ones(parameter.shape, dtype=torch.bool)
        for dim, kept in plan.tensors.get(name, {}).items():
            for place in set(range(parameter.shape[dim])) - set(kept):
                mask.select(dim, place).fill_(False)
        assert torch.equal(parameter.detach() != 0, mask)
    for name, parameter in result.problem.model.named_parameters():
        assert bool((parameter != 0).all())  # of the model passed in, none


def test_what_a_slim_file_says_of_the_run_is_what_the_plain_one_says(run: Path):
    slim, plain = read(run / SLIM)[1], read(run / PLAIN)[1]
    for key in ("layers", "asked", "limits", "aliases"):
        assert slim[key] == plain[key]
