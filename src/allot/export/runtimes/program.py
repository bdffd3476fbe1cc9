"""What a program of `torch.export` may hold so that it is opened: numbers, and operations that only calculate.

`torch.export.load` unpickles where the file says so, evaluates sizes and guards as Python, looks operations up by their
names anywhere in torch, imports what a tree of outputs names, and writes the names of nodes into code that it runs. So
every text in the file is held to what our own writer puts there, and torch is given an archive of what was read here.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from allot.errors import UsageError
from allot.export.files.formats import most_weights

_ENTRIES = re.compile(
    r"models/\w+\.json|data/(weights|constants)/\w+_config\.json"
    r"|(\.data/)?(version|archive_format|archive_version|byteorder|serialization_id)"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|\.data/\w+|data/sample_inputs/\w+\.pt",
    re.ASCII,
)
_OPERATION = re.compile(
    r"_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lshift|lt|mod|mul|ne|neg|not_|or_|pos|pow|rshift|sub|truediv)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.(sym_\w+|_sym_sqrt)|torch\.ops\.higher_order\.(cond|while_loop|wrap_with_set_grad_enabled|wrap_with_autocast)",
    re.ASCII,
)
_OVERLOAD = re.compile(
    r"torch\.ops\.(aten|torchvision(?=\.(nms|roi_align|roi_pool|ps_roi_align|ps_roi_pool|deform_conv2d)\.))\.(\w+)\.(\w+)",
    re.ASCII,
)
_FUNCTION = re.compile(
    "Integer|Rational|Add|Mul|Pow|Max|Min|max|min|Abs|Mod|floor|ceiling|And|Or|Not|Equality|Unequality|LessThan"
    "|StrictLessThan|GreaterThan|StrictGreaterThan|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt"
    "|FloorToInt|CeilDiv|IntTrueDiv|FloatTrueDiv|LShift|RShift|PowByNatural|FloatPow|TruncToFloat|TruncToInt|RoundToInt"
    "|RoundDecimal|ToFloat|Identity"
)
_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift")
_LONGEST = 10_000  # characters of an expression
_NAME = re.compile(r"([A-Za-z_]\w*)?", re.ASCII)
_TEXT = re.compile(r"[\w.:/@ <>,+-]*")
_TREE = re.compile(r"[^{}\\']*")  # no object: one may name an enumeration to import
_NEVER = ("custom_obj", "as_custom_obj", "custom_obj_values", "constant_input")


def checked_program(path: Path, content: bytes) -> io.BytesIO:
    """An archive of the same entries, for `torch.export.load`: nothing in it runs but operations on numbers.

    Raises:
        UsageError: it holds something else, or stands for more than so large a file may.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if sum(entry.file_size for entry in entries) > len(content) or any(entry.compress_type for entry in entries):
            raise UsageError(f"{path} holds more than its size: a program is written uncompressed. It is not opened.")
        for entry in entries:
            known = _ENTRIES.fullmatch(entry.filename.partition("/")[2])
            empty = not entry.filename.endswith(".pt") or not entry.file_size  # inputs are all that would be pickled
            if not known or not empty or names.count(entry.filename) > 1:
                raise UsageError(f"{path} may hold pickled objects in {entry.filename[:80]}: it is not opened.")
        held = {name: archive.read(name) for name in names}
    for name, text in held.items():
        if name.endswith(".json"):
            _check_json(path, name, text, len(content))
    again = io.BytesIO()
    with zipfile.ZipFile(again, "w") as archive:  # torch's reader may see more in the file than Python's
        for name, text in held.items():
            archive.writestr(name, text)
    again.seek(0)
    return again


def stripped(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program itself, without example inputs and without where its lines came from: file names of the writer's."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in node.meta.keys() - {"val", "nn_module_stack"}:
                del node.meta[key]
    return program


def _check_json(path: Path, name: str, text: bytes, size: int) -> None:
    try:
        content = json.loads(text.decode())
        if name.endswith("_config.json"):
            _check_payloads(path, name, content["config"].values(), size)
        for key, parent, found in _texts(content):
            rule = _RULES.get(key, _TEXT.fullmatch)
            if key == "as_string" and parent != "arg":  # of an input, it would be compared within quotes
                rule = _NAME.fullmatch
            if not rule(found):
                raise UsageError(f"{path} has an unknown {key or 'text'} {found[:80]!r}: it is not opened.")
    except (LookupError, TypeError, ValueError, AttributeError, SyntaxError, RecursionError, MemoryError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is damaged in {name[:80]}: {type(error).__name__}: {error}") from error


def _check_payloads(path: Path, name: str, payloads: Any, size: int) -> None:
    total = 0
    for each in payloads:
        if each["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", each["path_name"]):
            raise UsageError(f"{path} may hold pickled objects in {name}: it is not opened.")
        total += math.prod(side["as_int"] for side in each["tensor_meta"]["sizes"])
    if total > most_weights(size):
        raise UsageError(f"{path} is damaged: so small a file cannot hold {total:,} weights.")


def _texts(content: Any, key: str = "", parent: str = "") -> Iterator[tuple[str, str, str]]:
    """(its key, the key above, text) of every text, keys among them.

    Raises:
        ValueError: an object, or something that allot leaves away.
    """
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield "", key, name
            unknown = key == "metadata" and name != "nn_module_stack"
            if (name in _NEVER and value) or unknown:
                raise ValueError(f"{name[:80]} is unknown")
            yield from _texts(value, name, key)
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value, key, parent)
    elif isinstance(content, str):
        yield key, parent, content


def _is_operation(name: str) -> bool:
    """Whether a name is that of an operation on numbers and tensors; none that opens files."""
    if not (found := _OVERLOAD.fullmatch(name)):
        return bool(_OPERATION.fullmatch(name))
    namespace, _, operation, overload = found.groups()
    known = getattr(getattr(getattr(torch.ops, namespace), operation, None), overload, None)
    return isinstance(known, torch._ops.OpOverload) and all(a.name != "filename" for a in known._schema.arguments)


def _is_expression(text: str) -> bool:
    """Whether a text is arithmetic on sizes: sympy's and torch's own functions of whole numbers, and symbols.

    A guard may ask for sizes as well: `L['x'].size()[0]`.
    """
    if len(text) > _LONGEST or not text.isascii():
        return False
    return _is_arithmetic(ast.parse(text, mode="eval").body)


def _is_arithmetic(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=value):
            return isinstance(value, bool) or (isinstance(value, int | float) and abs(value) < 2**63)
        case ast.Name(id=name):
            return bool(re.fullmatch(r"[a-z]{1,8}\d+|true|false", name))
        case ast.Call(func=ast.Name(id="Symbol" | "Float" as kind), args=[ast.Constant(value=str(text))]):
            form = r"[a-z_]{1,12}\d*" if kind == "Symbol" else r"-?\d{1,40}(\.\d{1,40})?(e[+-]?\d{1,3})?"
            return bool(re.fullmatch(form, text)) and all(isinstance(k.value, ast.Constant) for k in node.keywords)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return (
                bool(_FUNCTION.fullmatch(name))
                and all(map(_is_arithmetic, args))
                and (name not in _POWERS or _is_small(args))
            )
        case ast.Call(func=ast.Attribute(value=of, attr="size" | "stride" | "storage_offset"), args=[], keywords=[]):
            return _is_input(of)
        case ast.Subscript(value=ast.Call() as of, slice=ast.Constant(value=int())):
            return _is_arithmetic(of)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.FloorDiv() | ast.Mod()):
            return _is_arithmetic(left) and _is_arithmetic(node.right)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _is_arithmetic(left) and _is_small([left, right])
        case ast.UnaryOp(operand=operand):
            return _is_arithmetic(operand)
        case ast.Compare(left=left, comparators=others):
            return all(map(_is_arithmetic, (left, *others)))
        case ast.BoolOp(values=values):
            return all(map(_is_arithmetic, values))
    return False


def _is_input(node: ast.AST) -> bool:
    """`L`, and what is taken out of it by names and positions."""
    while isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "L"


def _is_small(power: list[Any]) -> bool:
    """Whether base and exponent make no giant of a number: a constant exponent of at most 8, of no other power."""
    base, exponent = power if len(power) == 2 else (None, None)
    if isinstance(exponent, ast.Call) and isinstance(exponent.func, ast.Name) and exponent.func.id == "Integer":
        exponent = exponent.args[0] if exponent.args else None
    if isinstance(exponent, ast.UnaryOp):
        exponent = exponent.operand
    names = {each.id for each in ast.walk(base) if isinstance(each, ast.Name)} if isinstance(base, ast.AST) else set()
    powers = any(isinstance(each, ast.Pow) for each in ast.walk(base)) if isinstance(base, ast.AST) else True
    fits = isinstance(exponent, ast.Constant) and isinstance(exponent.value, int | float) and exponent.value <= 8
    return fits and not powers and not names & set(_POWERS)


def _is_tree(text: str) -> bool:
    """Whether a text is the tree of inputs or outputs, of kinds that come without an import."""
    _, tree = json.loads(text)
    open_ones = [tree]
    while open_ones:
        each = open_ones.pop()
        kind, context = each["type"], each["context"]
        if kind is not None and (not re.fullmatch(r"[\w.]+", kind) or kind.endswith("defaultdict")):
            return False
        if context is not None and not _TREE.fullmatch(context):
            return False
        open_ones += each["children_spec"]
    return True


_RULES: dict[str, Callable[[str], Any]] = {
    "expr_str": _is_expression,
    "guards_code": _is_expression,
    "target": _is_operation,
    "as_operator": _is_operation,
    "in_spec": _is_tree,
    "out_spec": _is_tree,
    "name": _NAME.fullmatch,
    "as_name": _NAME.fullmatch,
    "forward_arg_names": _NAME.fullmatch,
    "as_string": lambda text: True,  # written into code by its repr
    "as_strings": lambda text: True,
    "nn_module_stack": lambda text: True,  # only kept
}
