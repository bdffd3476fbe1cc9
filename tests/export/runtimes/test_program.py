"""A program is opened only where every text in it is understood: none may reach eval, an import or generated code."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.export.certificate.certificate import verify
from allot.export.certificate.probe import probe_of
from allot.export.certificate.rows import digest
from allot.export.export import export
from allot.export.files.formats import save_tensors, stored
from allot.export.runtimes.forms import FORMS
from allot.export.runtimes.program import _is_expression, _is_operation

MODEL, PWN = "archive/models/model.json", "__import__('os').system('touch PWN') or "


class Net(nn.Module):
    """Sizes that are computed, a gelu, two outputs in a dict, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        both = torch.cat([x, 2 * x])[: 2 * x.shape[0] - 1] * self.scale
        return {"a": nn.functional.gelu(self.head(both), approximate="tanh"), "b": both.reshape(-1, 2)}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    export(Net().eval(), torch.randn(3, 4), path)
    return path


def entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(program: Path, place: Path, change: Callable[[dict[str, bytes]], Any], how: int = 0) -> Path:
    """The program with changed entries, and a probe that promises just that."""
    held, path = entries(program), place / "model.pt2"
    change(held)
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in held.items():
            archive.writestr(name, content)
    shutil.copy(probe_of(program), place)
    tensors, promise = stored(probe_of(path))
    promise = {key: promise[key] for key in ("form", "counts", "inputs", "run")} | {"files": {"model": digest(path)}}
    save_tensors(probe_of(path), tensors, "probe", promise)
    return path


def graph(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, bytes]], None]:
    def changed(held: dict[str, bytes]) -> None:
        content = json.loads(held[MODEL])
        change(content)
        held[MODEL] = json.dumps(content).encode()

    return changed


def node(**changed: Any) -> Callable[[dict[str, bytes]], None]:
    return graph(lambda content: content["graph_module"]["graph"]["nodes"][0].update(changed))


def signature(**changed: Any) -> Callable[[dict[str, bytes]], None]:
    def change(content: dict[str, Any]) -> None:
        call = next(each for each in content["graph_module"]["module_call_graph"] if each["signature"])
        call["signature"].update(changed)

    return graph(change)


def text(old: str, new: str) -> Callable[[dict[str, bytes]], None]:
    def change(held: dict[str, bytes]) -> None:
        assert old.encode() in held[MODEL]
        held[MODEL] = held[MODEL].replace(old.encode(), new.encode(), 1)

    return change


ENUM = '[1, {"type": "builtins.list", "context": "{\\"__enum__\\": 1, \\"fqn\\": \\"evil:A\\"}", "children_spec": []}]'
DEFAULT = '[1, {"type": "collections.defaultdict", "context": "evil", "children_spec": []}]'
HARMFUL = {
    "size": text('"expr_str": "', f'"expr_str": "{PWN}'),
    "guard": graph(lambda content: content.update(guards_code=[PWN + "True"])),
    "operation of torch": node(target="torch.hub.load"),
    "operation of Python": node(target="_operator.methodcaller"),
    "attribute of a namespace": node(target="torch.ops.aten.__class__.mro"),
    "a file's operation": node(target="torch.ops.aten.from_file.default"),
    "operation that unpickles": node(target="torch.load"),
    "operator as argument": node(inputs=[{"name": "f", "arg": {"as_operator": "torch.load"}, "kind": 1}]),
    "name of a node": text('"name": "x"', f'"name": "x={PWN}1"'),
    "name of an argument": signature(forward_arg_names=["x=print()"]),
    "import by a tree": signature(out_spec=ENUM),
    "default of a tree": signature(out_spec=DEFAULT),
    "name of a weight": text('"head.weight"', "\"head'+print()+'weight\""),
    "text for an input": graph(lambda content: content["graph_module"]["graph"]["inputs"].append({"as_string": "'+'"})),
    "metadata": node(metadata={"source_fn_stack": "a,torch.hub.load"}),
    "object": graph(lambda content: content["graph_module"]["graph"].update(custom_obj_values={"a": {"name": "b"}})),
    "no JSON": lambda held: held.update({MODEL: b"{"}),
    "deep JSON": lambda held: held.update({MODEL: b"[" * 100_000}),
}


@pytest.mark.parametrize("what", HARMFUL)
def test_a_text_that_could_run_is_not_handed_on(what: str, program: Path, tmp_path: Path, monkeypatch: Any):
    path = rewritten(program, tmp_path, HARMFUL[what])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.export, "load", lambda *rest: pytest.fail("opened"))
    with pytest.raises(UsageError, match=r"it is not opened|is damaged"):
        verify(path)
    assert not (tmp_path / "PWN").exists()


def test_what_was_written_again_unchanged_passes(program: Path, tmp_path: Path):
    path = rewritten(program, tmp_path, lambda held: None)
    assert verify(path)["passed"]
    [a, b] = FORMS["program"].open(path).run(torch.ones(5, 4))
    assert a.shape == (9, 2) and b.shape == (18, 2)


def test_a_program_does_not_tell_where_its_code_lies(program: Path):
    assert all(b"test_program.py" not in content and b"/" not in content for content in entries(program).values())


def test_a_program_that_stands_for_more_than_it_holds_is_not_opened(program: Path, tmp_path: Path):
    def zeros(held: dict[str, bytes]) -> None:
        held["archive/data/weights/weight_9"] = bytes(10**7)

    path = rewritten(program, tmp_path, zeros, zipfile.ZIP_DEFLATED)
    with pytest.raises(UsageError, match="holds more than its size"):
        verify(path)

    def huge(held: dict[str, bytes]) -> None:
        name = "archive/data/weights/model_weights_config.json"
        config = json.loads(held[name])
        config["config"]["head.weight"]["tensor_meta"] |= {
            "sizes": [{"as_int": 2**20}] * 2,
            "strides": [{"as_int": 0}] * 2,
        }
        held[name] = json.dumps(config).encode()

    path = rewritten(program, tmp_path, huge)
    with pytest.raises(UsageError, match="so small a file cannot hold"):
        verify(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_is_there_twice_is_not_opened(program: Path, tmp_path: Path):
    path = rewritten(program, tmp_path, lambda held: None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(MODEL, b"{}")
    with pytest.raises(UsageError, match="may hold pickled objects"):
        FORMS["program"].open(path)


@pytest.mark.parametrize(
    "expression",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(FloorDiv(Symbol('s77', positive=True, integer=True), Integer(2)), Integer(3))",
        "Max(Integer(1), Add(Symbol('u0', integer=True), Integer(-2)))",
        "Mul(Rational(1, 2), Pow(Symbol('s0'), Integer(2)), Float('0.5', precision=53))",
        "Mod(s0 + 3, 8)",
        "3 + (L['x'].size()[0] // 2) > L['x'].size()[0]",
        "max(1, (-2) + L['args'][0]['x'].size()[0]) != 1",
        "Equality(Symbol('s0'), Integer(4))",
    ],
)
def test_arithmetic_is_known(expression: str):
    assert _is_expression(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "Symbol(__import__('os').system('x'))",
        "Symbol('s0', positive=print())",
        "Symbol('x.y')",
        "s0.__class__",
        "S('print()')",
        "(lambda: 1)()",
        "[s0 for s0 in ()]",
        "Integer('print()')",
        "sympify('1')",
        "L['x'].size().__class__",
        "L['x'].size(print())",
        "L[print()].size()[0]",
        "Pow(Integer(10), Integer(1000000000))",
        "Pow(Pow(Integer(9), Integer(8)), Integer(8))",
        "2**2**2**2**9",
        "LShift(Integer(1), Integer(4000000000))",
        "Integer(" + "9" * 30 + ")",
        "1 if s0 else 2",
        "f'{print()}'",
        "ſ0",
        "s0 + " * 5000 + "s0",
    ],
)
def test_anything_else_is_not(expression: str):
    assert not _is_expression(expression)


@pytest.mark.parametrize(
    "name", ["torch.ops.aten.conv2d.default", "torch.ops.aten.__and__.Tensor", "_operator.mul", "torch.sym_max"]
)
def test_operations_that_calculate_are_known(name: str):
    assert _is_operation(name)


@pytest.mark.parametrize(
    "name",
    [
        "torch.ops.aten.save.default",
        "torch.ops.aten.conv2d",
        "torch.ops.aten.no.default",
        "torch.ops.prim.print.default",
        "torch.ops.image.read_file.default",
        "torch.ops.load_library",
        "math.pow.__call__",
        "#a:b",
        "print",
        "",
    ],
)
def test_all_others_are_not(name: str):
    assert not _is_operation(name)
