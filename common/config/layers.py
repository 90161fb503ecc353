"""YAML read as layers that remember where every value stands, and merged key by key.

Rules that differ from a plain `safe_load`: `1e-4` is a number, `yes`/`no`/`on`/`off` and dates stay text, a
duplicate key is a mistake, and so are tags, anchors and keys that are not text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.errors import UsageError

Key = tuple["str | int", ...]

DEPTH = 32  # sections and lists within each other; those of a config are four
_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$"
)
# What a plain scalar may be but text: its form, the characters it may begin with, and its value. Numbers are those of
# JSON, with an optional sign, and .5 and 5. too: no octal, no underscores, no sexagesimals.
_SCALARS: dict[str, tuple[re.Pattern[str], list[str], Callable[[str], Any]]] = {
    "null": (re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""], lambda _: None),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"], lambda text: text.lower() == "true"),
    "int": (re.compile(r"[-+]?(?:0|[1-9][0-9]{0,99})$"), [*"-+0123456789"], int),
    "float": (_FLOAT, [*"-+0123456789."], lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower()))),
}


class _Loader(yaml.SafeLoader):
    """The safe loader, used for its nodes only, with our idea of what a plain scalar is."""

    depth = 0
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own class attribute, replaced on purpose

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        alias = self.check_event(yaml.AliasEvent)
        if alias or self.depth > DEPTH:
            problem = "aliases (*name) are not supported" if alias else "nested too deeply"
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which quotes what either PyYAML's rules or ours would read as something else than text."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds Unicode's own line breaks into plain ones unless they are escaped.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver(f"{_TAG}float", *_SCALARS["float"][:2])
for _name, (_form, _first, _) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", _form, _first)


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
        """Return the value at `a.b.c`, or None."""
        value: Any = self.tree
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def locate(self, key: Key) -> str:
        """Return the place of `key`, or of the nearest mapping around it."""
        around = (key[:length] for length in range(len(key), -1, -1))
        return next((self.where[outer] for outer in around if outer in self.where), "(default)")

    def merge(self, above: Layer) -> Layer:
        """Return this layer under `above`: mappings merge key by key, anything else (null and lists too) replaces."""
        merged = Layer(copy.deepcopy(self.tree), {**above.where, **self.where}, self.problems + above.problems)
        replaced: set[Key] = set()

        def put(target: dict[str, Any], source: Mapping[str, Any], path: Key) -> None:
            for name, value in source.items():
                here = (*path, name)
                if isinstance(value, dict) and isinstance(target.get(name), dict):
                    put(target[name], value, here)  # the section stays where it was first opened
                    continue
                replaced.add(here)
                target[name] = copy.deepcopy(value)

        put(merged.tree, above.tree, ())
        # What is replaced takes its places with it: those of a section or a list that stood here are gone.
        gone = {key for key in merged.where if any(key[:end] in replaced for end in range(1, len(key) + 1))}
        merged.where = {key: place for key, place in merged.where.items() if key not in gone}
        merged.where |= {key: place for key, place in above.where.items() if key in gone}
        return merged


def dotted(key: Key) -> str:
    """Return `("a", "b", 0)` as `a.b[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def shown(path: Path) -> str:
    """Return a path as the user would type it: relative to the working directory where it lies below it."""
    resolved, here = path.resolve(), Path.cwd()
    return str(resolved.relative_to(here) if resolved.is_relative_to(here) else path)


def read_file(path: Path) -> Layer:
    """Read a YAML file whose top is a mapping (or empty). Raise UsageError if it cannot be read or parsed."""
    name = shown(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}", where=name) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: {error.reason}", where=f"{name}, byte {error.start}") from None
    node, layer = _compose(text, name), Layer(where={(): name})
    if node is None:
        return layer
    if not isinstance(node, yaml.MappingNode):
        raise UsageError("the file must hold a mapping of sections", where=f"{name}:1")
    layer.tree = _value(node, (), layer, lambda item: f"{name}:{item.start_mark.line + 1}")
    return layer


def read_override(text: str, option: str = "--set") -> Layer:
    """Read `a.b=value` as a layer; the value is one YAML scalar or flow collection (`[1, 2]`, `{a: 1}`)."""
    place = f"{option} {text}"
    name, equals, value = text.partition("=")
    key: Key = tuple(name.strip().split("."))
    if not equals or not all(key) or len(key) > DEPTH:
        raise UsageError(f"{text!r} is not of the form section.key=value", where=place)
    if not value.strip():
        todo = "write null to clear a key, '' for no text"
        raise UsageError(f"no value after '=' in {text!r}", where=place, todo=todo)
    node = _compose(value, place)
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        raise UsageError(f"the value of {name} is not one scalar, [list] or {{mapping}}", where=place, todo="quote it")
    layer = Layer(where={key[:length]: place for length in range(1, len(key) + 1)})
    layer.tree = nest(key, None if node is None else _value(node, key, layer, lambda _: place))
    return layer


def nest(key: Key, value: Any) -> dict[str, Any]:
    """Return `("a", "b"), 1` as `{"a": {"b": 1}}`."""
    for part in reversed(key):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def flatten(tree: Mapping[str, Any], path: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield every value that is not a non-empty mapping, with its path."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, (*path, name))
        else:
            yield (*path, name), value


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Return YAML text that `read_file` reads back to the same values, keys in their order."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


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


def _value(node: yaml.Node, key: Key, layer: Layer, place: Callable[[yaml.Node], str]) -> Any:
    """Return the plain value of `node`, which stands at `key`; note places and mistakes in `layer`."""
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and kind == "map":
        values: dict[str, Any] = {}
        for name, below in node.value:
            here = (*key, name.value)
            if not isinstance(name, yaml.ScalarNode) or name.tag != f"{_TAG}str":
                layer.problems.append(Problem(place(name), dotted(key), f"a key must be text (quote it): {name.value}"))
            elif name.value in values:
                text = f"duplicate key, first set at {layer.where[here]}"
                layer.problems.append(Problem(place(name), dotted(here), text))
            else:
                layer.where[here] = place(name)
                values[name.value] = _value(below, here, layer, place)
        return values
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        layer.where |= {(*key, index): place(item) for index, item in enumerate(node.value)}
        return [_value(item, (*key, index), layer, place) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and kind == "str":
        return node.value
    # An explicit tag such as `!!int abc` need not fit its text.
    if isinstance(node, yaml.ScalarNode) and kind in _SCALARS and _SCALARS[kind][0].match(node.value):
        return _SCALARS[kind][2](node.value)
    layer.problems.append(Problem(place(node), dotted(key), f"the tag {node.tag} is not supported here"))
    return None
