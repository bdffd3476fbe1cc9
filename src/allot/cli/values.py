"""YAML of recipes and of `--set`: plain values only, and not more of them than a recipe can hold."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from allot.errors import UsageError

LARGEST = 100_000  # values in a text, aliases written out
DEEPEST = 100  # brackets inside of one another


def parsed(text: str, where: str) -> Any:
    """The value of a text.

    Args:
        where: the text's place, for errors.
    Raises:
        UsageError: it is no YAML, too deep, or too large.

    >>> parsed("2:4", "--set"), parsed("1e-3", "--set")
    ('2:4', 0.001)
    """
    try:
        loader = _Yaml(text)
        node = loader.get_single_node()
        if node is not None and (count := _values_in(node, {})) > LARGEST:
            size = "refers to itself" if count == math.inf else f"holds {count:,} values with its aliases written out"
            raise UsageError(f"{where} {size}: at most {LARGEST:,} values are accepted.")
        return None if node is None else loader.construct_document(node)
    except UsageError:
        raise
    except RecursionError as error:
        raise UsageError(f"{where} is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _values_in(node: yaml.Node, counts: dict[int, float]) -> float:
    """Values in a node when every alias is written out, counted without doing so; infinite where it holds itself."""
    if id(node) not in counts:
        counts[id(node)] = math.inf  # until all parts are counted: then a part is the node itself
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = (part if isinstance(part, tuple) else (part,) for part in parts)
        counts[id(node)] = 1 + sum(_values_in(child, counts) for pair in pairs for child in pair)
    return counts[id(node)]


class _Yaml(yaml.SafeLoader):
    """YAML in which `2:4` is text (YAML 1.1 reads 124, as in minutes and seconds) and `1e-3` is a number."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= DEEPEST:  # here, since the time of the scanner is quadratic in them
            raise RecursionError
        super().fetch_flow_collection_start(token)


_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
}
_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Yaml.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))
