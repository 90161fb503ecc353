"""Documents that are nearly valid: a valid one, changed a little in its bytes or in its tree.

Noise alone is refused at the first byte; what is mostly right gets as far as the code behind the parser.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

# Values of every type, and of the kind that code forgets: of another type, empty, huge, negative, not finite, nested,
# with characters that file names, terminals and encodings trip over.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**12, 10**30, 0.0, -0.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), -float("inf")),
    *("", " ", "0", "-1", "null", "nan", "1e999", "a\x00b", "\ud800", "\u2028"),
    *("../../etc/passwd", "/dev/null", "~", "%s", "{x}", "[b]", "\x1b[31m", "x" * 5000, "9" * 5000, "<b>", "é", "😀"),
    *([], [[]], {}, {"": ""}, {"a": {"b": {}}}, [None], [0, "a"], [[1, 2], [3]], {"loss": []}, [{}, {}]),
)
# Bytes that mean something to one of the formats, or to none.
TOKENS: tuple[bytes, ...] = (
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\n", b"\r", b"\r\n", b"\t", b" ", b"\x1b[0m"),
    *(b"{", b"}", b"[", b"]", b"[" * 2000, b'{"a":' * 2000, b"(" * 200),
    *(b'"', b"'", b":", b": ", b",", b"#", b"|", b">", b"- ", b"? ", b"&a ", b"*a", b"<<: ", b"!!int "),
    *(b"!!python/name:os.system ", b"%YAML 1.1\n---\n", b"---\n", b"..."),
    *(
        b"NaN",
        b"Infinity",
        b"-0",
        b"1e999",
        b"9" * 5000,
        b"0x10",
        b"0b",
        b"1:30",
        b"2026-13-45",
        b"=",
        b"$",
        b"\\",
        b"\\u",
    ),
)


def edited(tree: Any, edit: Callable[[str, int], int], odd: Any) -> Any:
    """Return a copy of `tree` with one change; `edit(what, n)` chooses a number below n."""
    tree = copy.deepcopy(tree)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            walk(inner)

    walk(tree)
    how = edit("how", 8)
    if not places or how == 0:
        return odd
    parent, key = places[edit("place", len(places))]
    if how == 1:
        del parent[key]
    elif how == 2:  # the same again, elsewhere
        other, there = places[edit("other", len(places))]
        other[there] = copy.deepcopy(parent[key])
    elif how == 3 and isinstance(parent, dict):
        parent[f"{key}{['', 's', '_', ' '][edit('suffix', 4)]}x"] = parent.pop(key)
    elif how == 4:
        parent[key] = [parent[key]]
    elif how == 5:
        parent[key] = {"text": parent[key]}
    elif how == 6 and isinstance(parent[key], int | float):
        parent[key] = [-parent[key], parent[key] + 1, parent[key] * 1000, str(parent[key])][edit("number", 4)]
    else:
        parent[key] = odd
    return tree


@st.composite
def trees(draw: st.DrawFn, documents: Sequence[Any]) -> Any:
    """Return one of some trees of JSON, with up to four changes."""
    tree = draw(st.sampled_from(documents))
    for _ in range(draw(st.integers(1, 4))):
        tree = edited(tree, lambda _, n: draw(st.integers(0, n - 1)), draw(st.sampled_from(ODD)))
    return tree


@st.composite
def torn(draw: st.DrawFn, documents: st.SearchStrategy[bytes], most: int = 4) -> bytes:
    """Return a document with up to `most` changes of its bytes: flipped, cut, said twice, or with a token put in."""
    data = draw(documents)
    for _ in range(draw(st.integers(0, most))):
        at, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        how = draw(st.integers(0, 4))
        if how == 0:
            data = data[:at] + draw(st.sampled_from(TOKENS)) + data[at:]
        elif how == 1:
            data = data[:at] + draw(st.sampled_from(TOKENS)) + data[end:]
        elif how == 2:
            data = data[:at] + data[end:]
        elif how == 3:
            data = data[:end] + data[at:]
        else:
            data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    return data


def json_bytes(tree: Any) -> bytes:
    """Return a tree as JSON, which is YAML, too; half of a surrogate pair stays escaped."""
    return json.dumps(tree).encode()


def of_trees(*documents: Any) -> st.SearchStrategy[bytes]:
    """Return documents of JSON that are changed in their tree, in their bytes, or in both."""
    changed = trees(documents).map(json_bytes)
    return changed | torn(changed | st.sampled_from([json_bytes(tree) for tree in documents]))


def of_bytes(*documents: bytes) -> st.SearchStrategy[bytes]:
    """Return documents that are changed in their bytes; now and then only noise."""
    return torn(st.sampled_from(documents), most=6) | st.binary(max_size=200)


def of_lines(*records: Any) -> st.SearchStrategy[bytes]:
    """Return files of JSON lines, some of them changed."""
    lines = st.lists(trees(records) | st.sampled_from(records), min_size=1, max_size=4)
    return torn(lines.map(lambda found: b"\n".join(map(json_bytes, found))), most=2)
