"""Change single keys in the text of a YAML file; every other line, comments among them, stays as it is."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

import yaml

from common.config.layers import nest, read_override, to_yaml

COMMENTS_AT = 34  # column where comments begin in the recipes' configs
Pair = tuple[yaml.Node, yaml.Node]  # a key and its value


def set_key(text: str, key: str | Sequence[str], value: Any, why: str = "") -> str:
    """Return `text` with `key` set to `value` and `why` beside it; a new key ends its section.

    `key` is dotted, or given by its parts where one of them has a dot of its own.
    """
    parts = parts_of(key)
    lines, found = _opened(text, parts)
    missing = parts[len(found) :]
    if not found:
        column, first, after = 0, len(lines), len(lines)
    elif missing and isinstance(found[-1][1], yaml.MappingNode):
        column, first = found[-1][1].start_mark.column, line_after(found[-1][1], lines)
        after = first
    else:  # the key itself, or a section that is empty
        column, first, after = (
            found[-1][0].start_mark.column,
            found[-1][0].start_mark.line,
            line_after(found[-1][1], lines),
        )
        missing = parts[len(found) - 1 :]
    new = textwrap.indent(to_yaml(nest(tuple(missing), value)), " " * column).splitlines()
    if why:
        new[-1] = f"{new[-1]:<{COMMENTS_AT - 2}}  # {why}"
    lines[first:after] = ["", *new] if not found and lines else new
    return "\n".join(lines) + "\n"


def remove_key(text: str, key: str | Sequence[str]) -> str:
    """Return `text` without `key`, dotted or in parts, and without the sections that would be empty then."""
    parts = parts_of(key)
    if len(_path(text, parts, flow=True)) < len(parts):
        return text
    lines, found = _opened(text, parts)
    while len(found) > 1 and len(found[-2][1].value) == 1:
        found.pop()
    del lines[found[-1][0].start_mark.line : line_after(found[-1][1], lines)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def parts_of(key: str | Sequence[str]) -> list[str]:
    """Return the parts of a key, which a dotted one is split into."""
    return key.split(".") if isinstance(key, str) else list(key)


def line_after(node: yaml.Node, lines: Sequence[str]) -> int:
    """Return the index of the line after a value; comments and empty lines that follow it are not its own.

    A section ends where its last value does (its own end mark stands behind the comments). A block of text, `|` or `>`,
    ends at the start of a line, unless the file ends without one; its lines may begin with #.
    """
    while isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        node = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    is_block = isinstance(node, yaml.ScalarNode) and node.style in ("|", ">")
    after = min(node.end_mark.line + (not is_block or node.end_mark.column > 0), len(lines))
    while not lines[after - 1].strip():
        after -= 1
    return after


def _path(text: str, parts: Sequence[str], flow: bool) -> list[Pair]:
    """The pairs that lead towards a key, from the top; with `flow` also those within `{...}`."""
    node, found = yaml.compose(text, Loader=yaml.SafeLoader), list[Pair]()
    for part in parts:
        pairs = node.value if isinstance(node, yaml.MappingNode) and (flow or not node.flow_style) else []
        pair = next((pair for pair in pairs if pair[0].value == part), None)
        if pair is None:
            break
        found.append(pair)
        node = pair[1]
    return found


def _opened(text: str, parts: Sequence[str]) -> tuple[list[str], list[Pair]]:
    """The lines of a text in which no section of a key stands in one line, `{b: 1}`, and the pairs that lead to it."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if isinstance(root, yaml.MappingNode) and root.flow_style:  # JSON, say
        text = to_yaml(read_override(f"all={text[root.start_mark.index : root.end_mark.index]}").tree["all"])
    while True:
        lines, found = text.splitlines(), _path(text, parts, flow=False)
        section = found[-1][1] if found else None
        if len(found) == len(parts) or not isinstance(section, yaml.MappingNode) or not section.flow_style:
            return lines, found
        name = found[-1][0]
        values = read_override(f"{name.value}={text[section.start_mark.index : section.end_mark.index]}").tree
        block = textwrap.indent(to_yaml(values), " " * name.start_mark.column)
        lines[name.start_mark.line : line_after(section, lines)] = block.splitlines()
        text = "\n".join(lines) + "\n"
