"""`verify` passes what a run wrote and nothing else."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from allot.errors import UsageError
from allot.prune import prune
from allot.realise.certificate import sealed, verify
from allot.realise.files import BITMASK, PLAIN
from contract.cases import CASES
from realise.damage import DAMAGES, any_flipped_bit_fails, damage, passed

BUDGETS = {"sparsity": "sparsity=0.7", "macs": "macs=40%", "bytes": "bytes=75%", "params": "params=33%"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    case = CASES["with batch norm"]
    found = {}
    for kind, budget in BUDGETS.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        prune(case.make(), case.inputs(), budget, save_to=found[kind])
    return found


@pytest.fixture
def run(tmp_path: Path, runs: dict[str, Path]) -> Path:
    return Path(shutil.copytree(runs["sparsity"], tmp_path / "run"))


@pytest.mark.parametrize("kind", BUDGETS)
def test_what_a_run_wrote_passes_as_a_whole_and_file_by_file(runs: dict[str, Path], kind: str):
    assert passed(runs[kind]) and passed(runs[kind] / PLAIN) and passed(runs[kind] / BITMASK)
    checks = {row["check"].split("=")[0] for row in verify(runs[kind])["rows"]}
    assert {kind, "sha256", "bytes on disk", "nonzeros per layer", "kept per layer"} <= checks


@pytest.mark.parametrize("name", [PLAIN, BITMASK])
def test_any_flipped_bit_of_a_model_file_fails(run: Path, name: str):
    any_flipped_bit_fails(run, name, 40)


@pytest.mark.parametrize("name", [PLAIN, BITMASK])
def test_a_file_alone_knows_of_any_flipped_bit(run: Path, name: str, tmp_path: Path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(run / name, alone / name)
    path, whole = alone / name, (alone / name).read_bytes()
    draw = random.Random(0)
    for _ in range(50):
        content = bytearray(whole)
        content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        assert refused(path)


def refused(path: Path) -> bool:
    try:
        return not passed(path)
    except UsageError as refusal:  # its metadata are gone
        return "was not written by allot" in str(refusal)


@pytest.mark.parametrize("name", [PLAIN, BITMASK, "certificate.json", "allocation.json"])
@pytest.mark.parametrize("how", DAMAGES)
def test_any_damaged_file_fails(run: Path, name: str, how: str):
    damage(run / name, how)
    assert not passed(run)


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Change tensors and metadata of a model file."""
    with safetensors.safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["allot"])
    change(tensors, about)
    safetensors.torch.save_file(tensors, path, {"allot": json.dumps(about)})


def certificate(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((run / "certificate.json").read_text())
    change(content)
    content = sealed(content) if "promised" in content else content  # forged with care
    (run / "certificate.json").write_text(json.dumps(content, indent=2) + "\n")


def forge(run: Path) -> None:
    """Give the certificate the sizes and sums of the files that are there."""

    def change(content: dict[str, Any]) -> None:
        for name in (PLAIN, BITMASK):
            raw = (run / name).read_bytes()
            content["promised"]["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    certificate(run, change)


def denser(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    if "full.weight" in tensors:
        tensors["full.weight"] = torch.ones_like(tensors["full.weight"])


def test_a_file_with_more_weights_fails_even_with_a_forged_certificate(run: Path):
    rewrite(run / PLAIN, denser)
    forge(run)
    failed = {row["check"] for row in verify(run)["rows"] if not row["passed"]}
    assert "nonzeros per layer" in failed and "sparsity=0.7" in failed
    certificate(run, lambda content: content["promised"]["kept"].update({"full.weight": 216}))
    failed = {row["check"] for row in verify(run)["rows"] if not row["passed"]}
    assert "sparsity=0.7" in failed
    assert not passed(run / PLAIN)


@pytest.mark.parametrize("kind", BUDGETS)
def test_a_single_file_is_held_to_its_own_limits(runs: dict[str, Path], kind: str, tmp_path: Path):
    for name in (PLAIN, BITMASK):
        shutil.copy(runs[kind] / name, tmp_path / name)
    rewrite(tmp_path / PLAIN, lambda tensors, about: about["limits"].update({kind: about["limits"][kind] // 2}))
    assert not passed(tmp_path / PLAIN)


def test_files_that_differ_from_each_other_fail(run: Path):
    def change(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        tensors["out.bias"] = tensors["out.bias"] + 1

    rewrite(run / PLAIN, change)
    forge(run)
    assert [row["check"] for row in verify(run)["rows"] if not row["passed"]] == [f"same tensors as {PLAIN}"]


def test_an_edited_allocation_fails(run: Path):
    content = json.loads((run / "allocation.json").read_text())
    content["layers"]["out.weight"]["kept"] += 1
    (run / "allocation.json").write_text(json.dumps(content))
    [row] = [row for row in verify(run)["rows"] if not row["passed"]]
    assert (row["check"], row["found"]) == ("kept per layer", "out.weight")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["promised"].update(files={}),
        lambda content: content["promised"]["files"].pop(BITMASK),
        lambda content: content["promised"].update(kept={}),
        lambda content: content["promised"]["kept"].update({"out.weight": 0}),
        lambda content: content["promised"].pop("kept"),
        lambda content: content.pop("promised"),
        lambda content: content["promised"]["files"].update({PLAIN: None}),
        lambda content: content["promised"]["files"][PLAIN].update(bytes=0),
    ],
)
def test_a_certificate_that_promises_less_fails(run: Path, change: Callable[[dict[str, Any]], Any]):
    certificate(run, change)
    assert not passed(run)


def test_what_the_certificate_says_of_itself_does_not_count(run: Path):
    certificate(run, lambda content: content.update(rows=[], passed=False))  # and sealed again
    assert passed(run)


def test_any_changed_byte_of_a_certificate_fails(run: Path):
    any_flipped_bit_fails(run, "certificate.json", 50)
    path = run / "certificate.json"
    path.write_text(path.read_text().replace('": ', '":  ', 1))  # the same JSON
    assert not passed(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: about.pop("limits"),
        lambda tensors, about: about.pop("layers"),
        lambda tensors, about: about["limits"].update(sparsity="many"),
        lambda tensors, about: about["layers"].update({"full.weight": [[8, 3, 3, 3], "x"]}),
        lambda tensors, about: about["layers"].update({"gone.weight": [[8], 1]}),
        lambda tensors, about: about.pop("asked"),
        lambda tensors, about: tensors.pop("full.weight"),
    ],
)
def test_metadata_that_cannot_be_understood_fails_and_does_not_raise(run: Path, change: Any):
    rewrite(run / PLAIN, change)
    assert not passed(run / PLAIN)
    assert not passed(run)


def test_what_allot_did_not_write_is_refused(tmp_path: Path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UsageError, match="was not written by allot"):
        verify(tmp_path / "foreign.safetensors")
    with pytest.raises(UsageError, match="is no run directory"):
        verify(tmp_path)
    with pytest.raises(UsageError, match="no such file or directory"):
        verify(tmp_path / "nowhere")


def test_an_unfinished_run_is_refused(run: Path):
    content = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(content | {"state": "stopped"}))
    with pytest.raises(UsageError, match="is not finished"):
        verify(run)
