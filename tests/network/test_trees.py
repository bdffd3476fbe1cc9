"""Every kind of container that models take or return is walked and mapped by its rule."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from allot.network.trees import cloned, floats_in, leaves_of, map_leaves, map_tensors, tensors_in


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Answer:
    logits: Any
    more: Any = None


class Output(OrderedDict[str, Any]):
    """As `ModelOutput` of transformers: a mapping and a dataclass at once; None fields are left out of the mapping."""

    logits: Any
    more: Any

    def __init__(self, logits: Any, more: Any = None) -> None:
        super().__init__({"logits": logits} | ({} if more is None else {"more": more}))
        self.logits, self.more = logits, more


Output = dataclass(init=False, repr=False, eq=False)(Output)  # type: ignore[misc]

# kind -> (the tree, its leaves, the tree with every leaf as text)
KINDS: dict[str, tuple[Any, list[Any], Any]] = {
    "leaf": (1, [1], "1"),
    "None": (None, [None], "None"),
    "text": ("ab", ["ab"], "ab"),
    "bytes": (b"ab", [b"ab"], "b'ab'"),
    "class": (Answer, [Answer], str(Answer)),
    "tuple": ((1, 2), [1, 2], ("1", "2")),
    "empty tuple": ((), [], ()),
    "list": ([1, (2,)], [1, 2], ["1", ("2",)]),
    "dict": ({"b": 1, "a": {"c": None}}, [1, None], {"b": "1", "a": {"c": "None"}}),
    "ordered dict": (OrderedDict(b=1, a=2), [1, 2], {"b": "1", "a": "2"}),
    "mapping that is no dict": (UserDict(a=1, b=[2]), [1, 2], {"a": "1", "b": ["2"]}),
    "view of a mapping": (MappingProxyType({"a": 1}), [1], {"a": "1"}),
    "named tuple": (Pair(1, [2]), [1, 2], Pair("1", ["2"])),
    "structseq": (torch.tensor([3, 1]).max(0), [torch.tensor(3), torch.tensor(0)], ("tensor(3)", "tensor(0)")),
    "dataclass": (Answer(1, [2]), [1, 2], str(Answer(1, [2]))),
    "dataclass in a tuple": ((Answer(1), 2), [1, None, 2], (str(Answer(1)), "2")),
    "mapping that is a dataclass": (Output(1), [1], {"logits": "1"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_walked_and_mapped_by_its_rule(kind: str):
    tree, leaves, texts = KINDS[kind]
    assert list(leaves_of(tree)) == leaves
    mapped = map_leaves(str, tree)
    assert mapped == texts and type(mapped) is type(texts)


def test_lists_become_what_is_asked_for_at_every_depth():
    assert map_leaves(str, {"a": [1, ([2],)]}, lists=tuple) == {"a": ("1", (("2",),))}
    assert map_tensors(Tensor.tolist, [torch.ones(1), 3], lists=tuple) == ([1.0], 3)


def test_tensors_are_mapped_and_other_leaves_stay():
    other = object()
    seen: list[int] = []

    def doubled(tensor: Tensor) -> Tensor:
        seen.append(tensor.numel())
        return 2 * tensor

    mapped = map_tensors(doubled, {"x": (torch.ones(2), None), "y": ["text", other, torch.ones(1)]})
    assert seen == [2, 1] and mapped["x"][0].tolist() == [2.0, 2.0] and mapped["x"][1] is None
    assert mapped["y"][:2] == ["text", other] and mapped["y"][2].tolist() == [2.0]


def test_tensors_and_floats_come_in_order():
    a, b, c = torch.ones(1), torch.ones(2).int(), nn.Parameter(torch.ones(3))
    tree = [Output(a, {"x": (b, None, "text")}), 3, Answer(Pair(c, None))]
    assert [tensor.numel() for tensor in tensors_in(tree)] == [1, 2, 3]
    assert [tensor.numel() for tensor in floats_in(tree)] == [1, 3]


def test_clones_share_no_memory_and_no_graph():
    x = torch.ones(2, requires_grad=True)
    copies = cloned(Pair({"a": [x]}, (x, "text")))
    assert type(copies) is Pair and copies.second[1] == "text"
    for copy in (copies.first["a"][0], copies.second[0]):
        assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr() and not copy.requires_grad
