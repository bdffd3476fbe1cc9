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
from allot.export.certificate.certificate import verify
from allot.export.certificate.probe import probe_of
from allot.export.certificate.rows import sealed
from allot.export.export import export_run
from allot.export.files.formats import ALLOCATION, BITMASK, PLAIN, REPORT, SLIM, save_tensors
from allot.pruning.prune import prune
from contract.cases import CASES
from export.damage import DAMAGES, any_flipped_bit_fails, damage, passed

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
        assert not passed(path)


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
    said = {key: value for key, value in about.items() if key not in ("format", "seal", "pad")}
    save_tensors(path, tensors, about["format"], said)  # sealed again


def certificate(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((run / "certificate.json").read_text())
    change(content)
    content = sealed(content) if "promised" in content else content  # forged with care
    (run / "certificate.json").write_text(json.dumps(content, indent=2) + "\n")


def forge(run: Path) -> None:
    """Give the certificate the sizes and sums of the files that are there."""

    def change(content: dict[str, Any]) -> None:
        for name in (PLAIN, BITMASK, ALLOCATION):
            raw = (run / name).read_bytes()
            content["promised"]["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    certificate(run, change)


def denser(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    if "full.weight" in tensors:
        tensors["full.weight"] = torch.ones_like(tensors["full.weight"])


def test_a_file_with_more_weights_fails_even_with_a_forged_certificate(run: Path):
    rewrite(run / PLAIN, denser)
    forge(run)
    checks = {check for _, check in failed(run)}
    assert "nonzeros per layer" in checks and "sparsity=0.7" in checks
    certificate(run, lambda content: content["promised"]["kept"].update({"full.weight": 216}))
    assert "sparsity=0.7" in {check for _, check in failed(run)}
    assert not passed(run / PLAIN)


@pytest.mark.parametrize("kind", BUDGETS)
def test_a_single_file_is_held_to_its_own_limits(runs: dict[str, Path], kind: str, tmp_path: Path):
    for name in (PLAIN, BITMASK):
        shutil.copy(runs[kind] / name, tmp_path / name)
        rewrite(tmp_path / name, lambda tensors, about: about["limits"].update({kind: about["limits"][kind] // 2}))
        broken = [check.split("=")[0] for _, check in failed(tmp_path / name)]
        # the limit of bytes is about the small file: no plain one could hold it
        assert broken == ([kind] if (kind, name) != ("bytes", PLAIN) else [])


def test_a_limit_that_cannot_be_counted_is_not_met(runs: dict[str, Path], tmp_path: Path):
    def change(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        about["layers"] = {name: [shape, None] for name, (shape, _) in about["layers"].items()}

    for name in (PLAIN, BITMASK):
        shutil.copy(runs["macs"] / name, tmp_path / name)
        rewrite(tmp_path / name, change)
        [row] = [row for row in verify(tmp_path / name)["rows"] if not row["passed"]]
        assert (row["check"], row["found"]) == ("macs=40%", "cannot be counted")


def test_files_that_differ_from_each_other_fail(run: Path):
    def change(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        tensors["out.bias"] = tensors["out.bias"] + 1

    rewrite(run / PLAIN, change)
    forge(run)
    report = json.loads((run / REPORT).read_text())
    report["bytes"] |= {"dense": (run / PLAIN).stat().st_size}
    (run / REPORT).write_text(json.dumps(sealed(report), indent=2) + "\n")
    assert [row["check"] for row in verify(run)["rows"] if not row["passed"]] == [f"same tensors as {PLAIN}"]


def test_an_edited_allocation_fails(run: Path):
    content = json.loads((run / "allocation.json").read_text())
    content["layers"]["out.weight"]["kept"] += 1
    (run / "allocation.json").write_text(json.dumps(content, indent=2))
    assert ("allocation.json", "sha256") in failed(run)
    forge(run)
    [row] = [row for row in verify(run)["rows"] if not row["passed"]]
    assert (row["check"], row["found"]) == ("kept per layer", "out.weight")


@pytest.mark.parametrize("key", ["density", "total", "budget"])
def test_an_allocation_is_promised_to_the_last_byte(run: Path, key: str):
    content = json.loads((run / "allocation.json").read_text())
    if key == "budget":
        content["budget"] = {"sparsity": "0.5"}
    else:
        content["layers"]["out.weight"][key] = 0.123
    (run / "allocation.json").write_text(json.dumps(content, indent=2) + "\n")
    assert ("allocation.json", "sha256") in failed(run)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_broken_allocation_is_a_row_of_its_own_name(run: Path, how: str):
    damage(run / "allocation.json", how)
    assert {name for name, _ in failed(run)} == {"allocation.json"}


def failed(path: Path) -> list[tuple[str, str]]:
    return [(row["file"], row["check"]) for row in verify(path)["rows"] if not row["passed"]]


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


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.float8_e4m3fn])
def test_layers_of_numbers_that_cannot_be_counted_are_a_row(run: Path, dtype: torch.dtype):
    rewrite(run / PLAIN, lambda tensors, about: tensors.update({"full.weight": torch.ones(8, 3, 3, 3).to(dtype)}))
    assert failed(run / PLAIN) == [(PLAIN, "metadata")]


def test_weights_that_are_not_finite_are_a_row(run: Path):
    def change(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        weight = tensors["full.weight"]
        weight[weight != 0] = float("nan")

    rewrite(run / PLAIN, change)
    assert failed(run / PLAIN) == [(PLAIN, "weights finite")]


def test_rows_count_weights(run: Path):
    [row] = [row for row in verify(run / PLAIN)["rows"] if row["check"] == "sparsity=0.7"]
    total = sum(layer["kept"] for layer in json.loads((run / "allocation.json").read_text())["layers"].values())
    assert (row["promised"], row["found"]) == (f"at most {total:,} kept", f"{total:,} kept")


# what the run says of itself


@pytest.mark.parametrize("how", DAMAGES)
def test_a_broken_report_is_a_row(run: Path, how: str):
    damage(run / REPORT, how)
    assert {name for name, _ in failed(run)} == {REPORT}


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda report: report["layers"][0].update(kept=1), "kept per layer"),
        (lambda report: report["layers"].pop(), "kept per layer"),
        (lambda report: report.update(kept=1), "kept"),
        (lambda report: report["bytes"].update(file=1), "bytes"),
        (lambda report: report["bytes"].update(dense=1), "bytes"),
    ],
)
def test_a_report_is_held_to_the_certificate(run: Path, change: Callable[[dict[str, Any]], Any], check: str):
    report = json.loads((run / REPORT).read_text())
    change(report)
    (run / REPORT).write_text(json.dumps(sealed(report), indent=2) + "\n")
    assert failed(run) == [(REPORT, check)]


@pytest.mark.parametrize("key", ["sparsity", "budget", "seed", "macs"])
def test_any_change_of_a_report_is_found(run: Path, key: str):
    report = json.loads((run / REPORT).read_text())
    (run / REPORT).write_text(json.dumps({**report, key: []}, indent=2) + "\n")
    assert failed(run) == [(REPORT, "untouched")]


def test_a_broken_record_of_the_run_is_a_row_where_it_was_certified(run: Path):
    whole = (run / "run.json").read_bytes()
    for content in (b"", b"[1]", whole.replace(b'"done"', b'"dome"')):
        (run / "run.json").write_bytes(content)
        assert {name for name, _ in failed(run)} == {"run.json"}


@pytest.mark.parametrize("name", ["/dev/zero", "../../etc/passwd", "report.html", ""])
def test_a_certificate_names_files_of_a_run_and_no_others(run: Path, name: str):
    certificate(run, lambda content: content["promised"]["files"].update({name: {"bytes": 1, "sha256": ""}}))
    assert failed(run) == [("certificate.json", "files")]


# every bit


every = pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])  # 7: each of 8 places in a byte


def flips(path: Path, places: range, step: int = 1) -> list[int]:
    """Bits of these bytes, every step-th, whose flip `verify` does not answer with a failed row."""
    whole, missed = path.read_bytes(), []
    for bit in range(8 * places.start, 8 * places.stop, step):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        if passed(path):
            missed.append(bit)
    path.write_bytes(whole)
    return missed


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each format, of a net of eight weights."""
    folder = tmp_path_factory.mktemp("small")
    net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 2, bias=False))
    report = prune(net, None, "sparsity=0.5", repair="none", save_to=folder / "run").report()
    x = torch.randn(4, 2)
    prune(net, x, "params=50%", allocate="uniform", pattern="channels", repair="none", save_to=folder / "cut")
    csr = Path(export_run(net, folder / "run", report, x[:1], "csr", folder / "csr")["file"])
    probe_of(csr).unlink()
    return {
        "plain": folder / "run" / PLAIN,
        "bitmask": folder / "run" / BITMASK,
        "slim": folder / "cut" / SLIM,
        "csr": csr,
    }


@every
@pytest.mark.parametrize("form", ["plain", "bitmask", "slim", "csr"])
def test_every_bit_of_the_header_of_a_file_alone_is_sealed(
    form: str, step: int, small: dict[str, Path], tmp_path: Path
):
    path = Path(shutil.copy(small[form], tmp_path / "file"))
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert passed(path) and header > 300 and flips(path, range(header), step) == []


@every
def test_every_bit_of_a_certificate_is_sealed(step: int, small: dict[str, Path], tmp_path: Path):
    (tmp_path / "certificate.json").write_bytes((small["plain"].parent / "certificate.json").read_bytes())
    content = json.loads((tmp_path / "certificate.json").read_text())
    (tmp_path / "certificate.json").write_text(
        json.dumps(sealed(content | {"rows": content["rows"][:1]}), indent=2) + "\n"
    )
    whole = (tmp_path / "certificate.json").read_bytes()
    for bit in range(0, 8 * len(whole), step):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "certificate.json").write_bytes(flipped)
        assert ("certificate.json", "untouched") in (found := failed(tmp_path)) or (
            "certificate.json",
            "opens",
        ) in found


def test_a_file_without_a_seal_fails(run: Path):
    with safetensors.safe_open(run / PLAIN, "pt") as file:
        tensors, about = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["allot"])  # noqa: SIM118
    del about["seal"]
    safetensors.torch.save_file(tensors, run / PLAIN, {"allot": json.dumps(about, separators=(",", ":"))})
    assert failed(run / PLAIN) == [(PLAIN, "untouched")]


@pytest.mark.parametrize("form", ["safetensors", "csr"])
def test_a_limit_of_bytes_is_about_the_small_file_alone(form: str, tmp_path: Path):
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    report = prune(net, None, "bytes=40%", repair="none", save_to=tmp_path / "run").report()
    row = export_run(net, tmp_path / "run", report, torch.randn(1, 16), form, tmp_path / "away.safetensors")
    assert passed(Path(row["file"])) and passed(tmp_path / "run")
    assert ("away.safetensors", "bytes=40%") not in {(r["file"], r["check"]) for r in verify(row["file"])["rows"]}
    assert any(r["check"] == "bytes=40%" for r in verify(tmp_path / "run" / BITMASK)["rows"])


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
