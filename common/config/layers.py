"""YAML read as layers that remember where every value stands, and merged key by key.

Rules that differ from a plain `safe_load`: `1e-4` is a number, `yes`/`no`/`on`/`off` and dates stay text, a
duplicate key is a mistake, and so are tags, anchors and keys that are not text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.errors import UsageError

Key = tuple["str | int", ...]

# JSON's numbers with an optional sign, .5 and 5. too. No octal, no underscores, no sexagesimals.
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$"
)
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """The safe loader, used for its nodes only, with our idea of what a plain scalar is."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own class attribute, replaced on purpose

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported", problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what either PyYAML's rules or ours would read as something else than text."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds Unicode's own line breaks into plain ones unless they are escaped.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
for _name, _pattern, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", _pattern, _first)


@dataclass(frozen=True)
class Problem:
    """One mistake: where (file:line or the option), which key (dotted), what is wrong."""

    where: str
    key: str
    message: str


@dataclass
class Layer:
    """A tree of plain values, the place of every key in it, and the mistakes found while reading."""

    tree: dict[str, Any] = field(default_factory=dict)
    where: dict[Key, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def get(self, dotted: str) -> Any:
        """The value at `a.b.c`, or None."""
        value: Any = self.tree
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def dotted(key: Key) -> str:
    """`("a", "b", 0)` as `a.b[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".")


def locate(where: Mapping[Key, str], key: Key) -> str:
    """The place of `key`, or of the nearest mapping around it."""
    for length in range(len(key), -1, -1):
        if key[:length] in where:
            return where[key[:length]]
    return "(default)"


def shown(path: Path) -> str:
    """A path as the user would type it: relative to the working directory where it lies below it."""
    resolved, here = path.resolve(), Path.cwd()
    return str(resolved.relative_to(here) if resolved.is_relative_to(here) else path)


def read_file(path: Path) -> Layer:
    """A YAML file whose top is a mapping (or empty). Raises UsageError if it cannot be read or parsed."""
    name = shown(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}", where=name) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: {error.reason}", where=f"{name}, byte {error.start}") from None
    node = _compose(text, name)
    layer = Layer(where={(): name})
    if node is None:
        return layer
    if not isinstance(node, yaml.MappingNode):
        raise UsageError("the file must hold a mapping of sections", where=f"{name}:1")
    layer.tree = _Builder(layer, name, by_line=True).value(node, ())
    return layer


def read_override(text: str, option: str = "--set") -> Layer:
    """`a.b=value` as a layer; the value is one YAML scalar or flow collection (`[1, 2]`, `{a: 1}`)."""
    place = f"{option} {text}"
    key_text, equals, value_text = text.partition("=")
    key: Key = tuple(key_text.strip().split("."))
    if not equals or not all(key):
        raise UsageError(f"{text!r} is not of the form section.key=value", where=place)
    if not value_text.strip():
        raise UsageError(
            f"no value after '=' in {text!r}", where=place, todo="write null to clear a key, '' for no text"
        )
    node = _compose(value_text, place)
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        raise UsageError(
            f"the value of {key_text} is not one scalar, [list] or {{mapping}}", where=place, todo="quote it"
        )
    layer = Layer(where={key[:length]: place for length in range(1, len(key) + 1)})
    value = None if node is None else _Builder(layer, place, by_line=False).value(node, key)
    layer.tree = nest(key, value)
    return layer


def nest(key: Key, value: Any) -> dict[str, Any]:
    """`("a", "b"), 1` as `{"a": {"b": 1}}`."""
    for part in reversed(key):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def merge(below: Layer, above: Layer) -> Layer:
    """`above` over `below`: mappings merge key by key, anything else (null and lists too) replaces."""
    merged = Layer(copy.deepcopy(below.tree), dict(below.where), below.problems + above.problems)
    _merge_tree(merged, merged.tree, above.tree, ())
    for key, place in above.where.items():
        # A section that both have stays where it was first opened; its keys are where they were set last.
        if key not in merged.where or not isinstance(_at(above.tree, key), dict):
            merged.where[key] = place
    return merged


def _at(tree: Any, key: Key) -> Any:
    for part in key:
        tree = tree[part]
    return tree


def _merge_tree(merged: Layer, target: dict[str, Any], source: Mapping[str, Any], path: Key) -> None:
    for name, value in source.items():
        here = (*path, name)
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            _merge_tree(merged, target[name], value, here)
            continue
        for key in [key for key in merged.where if key[: len(here)] == here]:
            del merged.where[key]
        target[name] = copy.deepcopy(value)


def flatten(tree: Mapping[str, Any], path: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every value that is not a non-empty mapping, with its path."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, (*path, name))
        else:
            yield (*path, name), value


def to_yaml(tree: Mapping[str, Any]) -> str:
    """YAML text that `read_file` reads back to the same values, keys in their order."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def refuse(problems: Iterable[Problem], what: str) -> None:
    """Raises one UsageError that lists all mistakes, if there are any."""
    found = list(dict.fromkeys(problems))
    if not found:
        return
    count = f"{len(found)} mistake{'s' if len(found) > 1 else ''} in {what}"
    lines = [f"  {item.where}: {item.key + ': ' if item.key else ''}{item.message}" for item in found]
    raise UsageError("\n".join([count, *lines]))


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = name if mark is None or name.startswith("--") else f"{name}:{mark.line + 1}"
        raise UsageError(f"not valid YAML: {error.problem or error.context}", where=place) from None
    except yaml.YAMLError as error:
        raise UsageError(f"not valid YAML: {str(error).splitlines()[0]}", where=name) from None
    return node


class _Builder:
    """Turns nodes into plain values, noting places and mistakes in a layer."""

    def __init__(self, layer: Layer, name: str, *, by_line: bool) -> None:
        self.layer, self.name, self.by_line = layer, name, by_line

    def place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.by_line else self.name

    def problem(self, node: yaml.Node, key: Key, message: str) -> None:
        self.layer.problems.append(Problem(self.place(node), dotted(key), message))

    def value(self, node: yaml.Node, key: Key) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self.mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            for index, item in enumerate(node.value):
                self.layer.where[(*key, index)] = self.place(item)
            return [self.value(item, (*key, index)) for index, item in enumerate(node.value)]
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.ScalarNode) and kind in _CONVERT and _reads_as(kind, node.value):
            return _CONVERT[kind](node.value)
        self.problem(node, key, f"the tag {node.tag} is not supported here")
        return None

    def mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != f"{_TAG}str":
                self.problem(key_node, key, f"a key must be text (quote it): {key_node.value}")
                continue
            name, here = key_node.value, (*key, key_node.value)
            if name in values:
                self.problem(key_node, here, f"duplicate key, first set at {self.layer.where[here]}")
                continue
            self.layer.where[here] = self.place(key_node)
            values[name] = self.value(value_node, here)
        return values


def _reads_as(kind: str, text: str) -> bool:
    # An explicit tag such as `!!int abc` need not fit its text.
    pattern = {"int": _INT, "float": _FLOAT, "bool": _BOOL, "null": _NULL}.get(kind)
    return pattern is None or pattern.match(text) is not None


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_CONVERT: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": _float,
    "bool": lambda text: text.lower() == "true",
    "null": lambda _: None,
}
