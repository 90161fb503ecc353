"""Changing single values of a YAML file and leaving the rest of its lines, comments among them, as they stand."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.config.layers import nest, read_override, to_yaml

WIDTH = 120  # columns of a line
COMMENTS_AT = 34  # where comments begin in the recipes' configs


@dataclass(frozen=True)
class Setting:
    """A value for a dotted key, and why it is this one: the comment beside it."""

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        _, _, value = to_yaml({"x": self.value}).rstrip("\n").partition(" ")
        return f"{self.key}: {value}  ({self.why})"


class YamlFile:
    """A YAML file of nested block mappings, or one that is not there yet. `write` puts it back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []

    def write(self) -> None:
        """Write the file; one that holds no key any more is deleted."""
        if self._root() is None:
            self.path.unlink(missing_ok=True)
            return
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text("\n".join(self.lines).rstrip("\n") + "\n", encoding="utf-8")

    def replace_head(self, lines: list[str]) -> None:
        """Put `lines` in the place of the comment that the file begins with."""
        body = next((at for at, line in enumerate(self.lines) if not line.startswith("#")), len(self.lines))
        self.lines[:body] = [f"# {line}".rstrip() for line in lines]

    def set(self, setting: Setting) -> None:
        """Set a key, in its place where it has one, else at the end of its section."""
        self._unfold(setting.key)
        *sections, name = setting.key.split(".")
        node, depth = self._root(), 0
        for section in sections:
            inner = _child(node, section)
            if inner is None or not isinstance(inner[1], yaml.MappingNode):
                break
            node, depth = inner[1], depth + 1
        found = _child(node, name) if depth == len(sections) else None
        indent = _indent(node)
        if found is None:
            at = self._end(node)
            heads = [f"{' ' * (indent + 2 * level)}{part}:" for level, part in enumerate(sections[depth:])]
            lines = heads + _written(setting, name, indent + 2 * len(heads))
            self.lines[at:at] = ["", *lines] if depth == 0 and self.lines else lines
            return
        first, last = self._span(found)
        while self.lines[first - 1].startswith(" " * indent + "#") and indent:
            first -= 1
        self.lines[first : last + 1] = _written(setting, name, indent)

    def remove(self, key: str) -> None:
        """Take a key out where it is set, and its section with it when nothing else is in there."""
        if _path(self._root(), key) is None:
            return
        self._unfold(key)
        path = _path(self._root(), key) or []
        while len(path) > 1 and len(path[-2][1].value) == 1:
            path.pop()
        first, last = self._span(path[-1])
        between = (
            len(path) == 1 and not "".join(self.lines[first - 1 : first] + self.lines[last + 1 : last + 2]).strip()
        )
        del self.lines[first : last + 1 + between]

    def _root(self) -> yaml.Node | None:
        root: yaml.Node | None = yaml.compose("".join(f"{line}\n" for line in self.lines), Loader=yaml.SafeLoader)
        return root

    def _unfold(self, key: str) -> None:
        """Write the section of a key that stands in one line, `a: {b: 1}`, as lines of its own."""
        root, text = self._root(), "\n".join(self.lines)
        if isinstance(root, yaml.CollectionNode) and root.flow_style:  # JSON
            head = [line for line in self.lines if line.startswith("#")]
            self.lines = [*head, *to_yaml(read_override(f"x={text[root.start_mark.index :]}").tree["x"]).splitlines()]
            return
        node = root
        for part in key.split(".")[:-1]:
            found = _child(node, part)
            if found is None:
                return
            node = found[1]
            if isinstance(node, yaml.MappingNode) and node.flow_style:
                first, last = self._span(found)
                value = text[node.start_mark.index : node.end_mark.index]
                block = to_yaml(read_override(f"{part}={value}").tree)
                self.lines[first : last + 1] = textwrap.indent(block, " " * found[0].start_mark.column).splitlines()
                return

    def _span(self, pair: tuple[yaml.Node, yaml.Node]) -> tuple[int, int]:
        """First and last line of a key with its value; comments and empty lines after it are not its."""
        name, value = pair
        last = value.end_mark.line
        if isinstance(value, yaml.CollectionNode) and not value.flow_style:
            last = min(last, len(self.lines)) - 1
            while not self.lines[last].strip() or self.lines[last].lstrip().startswith("#"):
                last -= 1
        return name.start_mark.line, last

    def _end(self, node: yaml.Node | None) -> int:
        """The line after the last key of a mapping."""
        return self._span(node.value[-1])[1] + 1 if node is not None else len(self.lines)


def _child(node: yaml.Node | None, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((pair for pair in pairs if pair[0].value == name), None)


def _path(node: yaml.Node | None, key: str) -> list[tuple[yaml.Node, yaml.Node]] | None:
    """The pairs that lead to a key, from the top; None where it is not set."""
    path = []
    for part in key.split("."):
        found = _child(node, part)
        if found is None:
            return None
        path.append(found)
        node = found[1]
    return path


def _indent(node: yaml.Node | None) -> int:
    return int(node.start_mark.column) if node is not None else 0


def _written(setting: Setting, name: str, indent: int) -> list[str]:
    """`name: value  # why`, or the comment above it where it does not fit beside."""
    body = textwrap.indent(to_yaml(nest((name,), setting.value)).rstrip("\n"), " " * indent)
    beside = f"{body:<{COMMENTS_AT - 2}}  # {setting.why}"
    if "\n" not in body and len(beside) <= WIDTH:
        return [beside]
    above = textwrap.wrap(setting.why, WIDTH - indent - 2, break_long_words=False, break_on_hyphens=False)
    return [*(f"{' ' * indent}# {line}" for line in above), *body.splitlines()]
