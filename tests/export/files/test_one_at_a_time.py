"""Files of tensors are written and read one tensor at a time, and hold what the library would have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allot.errors import UsageError
from allot.export.certificate.recount import recount
from allot.export.files import formats as files
from allot.export.files import reading
from allot.export.files.masks import mask_bytes
from allot.export.files.reading import Stored
from allot.export.files.writing import DTYPES, Later, seal_of
from allot.pruning.memory_limit import peak

NAMES = ["a", "b.weight", "größe", 'with "quotes"', "back\\slash", "tab\tand\nline", "\x7f", "日本", "z" * 70]


def as_the_library_writes(path: Path, tensors: dict[str, Tensor], about: dict[str, object]) -> bytes:
    """The same file by safetensors, with the seal put in afterwards."""
    separate = {name: value.clone().contiguous() for name, value in tensors.items()}
    text = json.dumps(about | {"seal": "0" * 64, "pad": ""}, separators=(",", ":"))
    safetensors.torch.save_file(separate, path, {"allot": text})
    seal, place = seal_of(path)
    content = path.read_bytes()
    return content[:place] + seal.encode() + content[place + 64 :]


@given(
    names=st.lists(st.sampled_from(NAMES), unique=True, max_size=6),
    dtypes=st.lists(st.sampled_from(list(DTYPES)), min_size=6, max_size=6),
    shapes=st.lists(st.sampled_from([(), (0, 3), (1,), (3,), (2, 3), (2, 1, 3, 1)]), min_size=6, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_a_file_holds_the_bytes_that_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], dtypes: list[torch.dtype], shapes: list[tuple[int, ...]]
):
    folder = tmp_path_factory.mktemp("files")
    tensors = {
        name: (torch.arange(torch.Size(shape).numel()) % 2).view(shape).to(dtype)
        for name, dtype, shape in zip(names, dtypes, shapes, strict=False)
    }
    about = {"format": "plain", "layers": {}}
    files.save_tensors(folder / "ours", tensors, "plain", {"layers": {}})
    assert (folder / "ours").read_bytes() == as_the_library_writes(folder / "theirs", tensors, about)
    assert files.untouched(folder / "ours")


def test_every_dtype_that_the_format_and_torch_share_can_be_written(tmp_path: Path):
    tensors = {str(i): torch.ones(2).to(dtype) for i, dtype in enumerate(DTYPES)}
    files.save_tensors(tmp_path / "every", tensors, "plain", {})
    found = safetensors.torch.load_file(tmp_path / "every")
    assert {name: value.dtype for name, value in found.items()} == {name: v.dtype for name, v in tensors.items()}


def test_views_and_tensors_that_share_memory_are_written_as_they_read(tmp_path: Path):
    memory = torch.arange(12.0).view(3, 4)
    tensors = {"whole": memory, "turned": memory.t(), "part": memory[:, 1:3], "again": memory, "one": memory[1, 1]}
    files.save_tensors(tmp_path / "f", tensors, "plain", {})
    found = files.load(tmp_path / "f")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 2).to_sparse(), "w is of layout torch.sparse_coo: only tensors with all their numbers"),
        (torch.ones(2, device="meta"), "w is a tensor on the meta device"),
        (torch.ones(2, dtype=torch.complex128), "w holds torch.complex128, and a file of safetensors does not"),
    ],
)
def test_what_no_file_can_hold_is_refused_and_leaves_no_file(tmp_path: Path, value: Tensor, message: str):
    with pytest.raises(UsageError, match=message):
        files.save_tensors(tmp_path / "f", {"w": value}, "plain", {})
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_made_when_they_are_written_and_let_go_before_the_next(tmp_path: Path):
    shape = (64, 64)

    def make(i: int) -> Tensor:
        return torch.full(shape, float(i))

    later = {str(i): Later(torch.float32, shape, lambda i=i: make(i)) for i in range(20)}
    with peak(torch.device("cpu")) as found:
        files.save_tensors(tmp_path / "f", later, "plain", {})
    assert found.bytes <= 2 * 64 * 64 * 4
    assert {name: float(value.mean()) for name, value in files.load(tmp_path / "f").items()} == {
        str(i): float(i) for i in range(20)
    }


def test_a_bitmask_file_is_written_and_recounted_with_a_few_tensors_in_memory(tmp_path: Path):
    shape = (64, 64)
    one = 64 * 64 * 4
    weights = {str(i): torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(20)}
    weights = {name: torch.where(value > 0, value, 0.0) for name, value in weights.items()}
    about = {"layers": {name: [list(shape), None] for name in weights}, "aliases": {}, "asked": {}, "limits": {}}
    files.save_bitmask(tmp_path / "whole", weights, about)
    later = {name: Later(v.dtype, shape, v.clone) for name, v in weights.items()}
    with peak(torch.device("cpu")) as found:
        files.save_bitmask(tmp_path / "f", later, about)
    assert found.bytes <= 4 * one
    with peak(torch.device("cpu")) as found:
        counted = recount(tmp_path / "f", {name: int(torch.count_nonzero(v)) for name, v in weights.items()})
    assert found.bytes <= 4 * one and all(row["passed"] for row in counted.rows)
    assert (tmp_path / "f").read_bytes() == (tmp_path / "whole").read_bytes()
    assert all(torch.equal(counted.state[name], value) for name, value in weights.items())


def test_a_file_is_opened_anew_after_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "AT_ONCE", 100)
    tensors = {str(i): torch.full((20,), i) for i in range(9)}
    files.save_tensors(tmp_path / "f", tensors, "plain", {})
    opened: list[Path] = []
    real = safetensors.safe_open
    monkeypatch.setattr(
        reading.safetensors, "safe_open", lambda path, framework: opened.append(path) or real(path, framework)
    )
    found = dict(Stored(tmp_path / "f"))
    assert len(opened) == 9 and all(torch.equal(found[name], value) for name, value in tensors.items())


def test_a_layer_that_a_mask_would_not_make_smaller_is_stored_whole_and_the_metadata_count_it(tmp_path: Path):
    full, half = torch.ones(8, 8, dtype=torch.float16), torch.ones(8, 8, dtype=torch.float16).tril(-4)
    layers = {name: [[8, 8], None] for name in ("full", "half")}
    about = {"layers": layers, "aliases": {}, "asked": {}, "limits": {}}
    files.save_bitmask(tmp_path / "some", {"full": full, "half": half}, about)
    assert set(Stored(tmp_path / "some")) == {"full", "half.mask", "half.values"}
    assert files.read(tmp_path / "some")[1]["plain"] == 1
    files.save_bitmask(tmp_path / "none", {"full": half, "half": half}, about)
    assert "plain" not in files.read(tmp_path / "none")[1]
    sizes = [files.layout(state, about) for state in ({"full": full, "half": half}, {"full": half, "half": half})]
    assert sizes[0] == sizes[1]
    assert (tmp_path / "some").stat().st_size == sizes[0].header + 2 * 64 + mask_bytes(64, 10) + 2 * 10
