"""What a disk holds after a power cut: only what was synced is sure, of the rest each part may be there or not.

The calls that changed files below a folder are read from the log of watch.c. A file's data is sure once the file was
synced, a name in a folder (made, renamed, deleted) once that folder was: POSIX promises no more, and file systems
differ in what they give beyond it (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014, whose tool ALICE
does the like). A rename between two folders is one change, which comes whole or not at all.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HEAD = struct.Struct("<IBBBBQQ")  # `struct line` in watch.c
SECTOR = 512  # bytes that a disk writes whole


@dataclass(eq=False)
class File:
    """A file's bytes as programs see them, as they surely are on the disk, and the writes in between."""

    seen: bytearray = field(default_factory=bytearray)
    sure: bytearray = field(default_factory=bytearray)
    writes: list[tuple[int, bytes | None]] = field(default_factory=list)  # (offset, data); (size, None) truncates

    def change(self, offset: int, data: bytes | None) -> None:
        apply(self.seen, offset, data)
        self.writes.append((offset, data))

    def sync(self) -> None:
        self.sure, self.writes = bytearray(self.seen), []

    def cut(self, rng: random.Random) -> bytearray:
        """Return what is left: the synced bytes, with none, all, the first or any of the writes since; one is torn."""
        left, way = bytearray(self.sure), rng.choice(("none", "all", "first", "any"))
        if not self.writes or way == "none":
            return left
        chosen = [write for write in self.writes if way != "any" or rng.random() < 0.5]
        if way == "first":
            chosen = chosen[: rng.randint(0, len(chosen))]
            if chosen and chosen[-1][1]:
                offset, data = chosen[-1]
                torn = rng.randint(0, len(data or b"") // SECTOR) * SECTOR
                chosen[-1] = (offset, (data or b"")[:torn])
        for offset, data in chosen:
            apply(left, offset, data)
        return left


@dataclass(eq=False)
class Folder:
    """A folder's names as programs see them, and as they surely are on the disk."""

    seen: dict[str, Node] = field(default_factory=dict)
    sure: dict[str, Node] = field(default_factory=dict)


@dataclass(eq=False)
class Link:
    """A symbolic link, which comes with its name."""

    target: bytes


Node = File | Folder | Link


@dataclass(frozen=True)
class Change:
    """What one call changes in folders: names and what they lead to from then on; None deletes the name."""

    number: int
    of: Node  # what got, lost or changed its name
    effects: tuple[tuple[Folder, str, Node | None], ...]


def apply(data: bytearray, offset: int, written: bytes | None) -> None:
    """Do one write or truncation; a gap before it reads as zeros."""
    if written is None:
        del data[offset:]
    data.extend(bytes(max(0, offset - len(data))))
    if written is not None:
        data[offset : offset + len(written)] = written


class Disk:
    """The disk below `root`, which begins as the folder is now; `log` is the file that watch.c appends to."""

    def __init__(self, root: Path, log: Path) -> None:
        self.root, self.log = root, log
        self.begin()

    def begin(self) -> None:
        """Take the folder as it is for synced, and empty the log."""
        self.inodes: dict[int, Node] = {}
        self.changes: list[Change] = []
        self.newest: dict[tuple[Folder, str], int] = {}  # of (folder, name): the last change that is on the disk
        self.number = 0
        self.top = self._folder(self.root)
        self.log.write_bytes(b"")

    def _folder(self, path: Path) -> Folder:
        found = Folder()
        self.inodes[path.stat().st_ino] = found
        for entry in path.iterdir():
            if entry.is_symlink():
                node: Node = Link(os.fsencode(entry.readlink()))
            elif entry.is_dir():
                node = self._folder(entry)
            else:
                data = entry.read_bytes()
                node = self.inodes.setdefault(entry.stat().st_ino, File(bytearray(data), bytearray(data)))
            found.seen[entry.name] = found.sure[entry.name] = node
        return found

    def read(self) -> None:
        """Take over what the log says. A last line that is cut short, by the death of its process, is dropped."""
        lines = self.log.read_bytes()
        at = 0
        while at + HEAD.size <= len(lines):
            size, call, first, second, _, one, two = HEAD.unpack_from(lines, at)
            body = lines[at + HEAD.size : at + HEAD.size + size]
            if len(body) < size:
                break
            at += HEAD.size + size
            names = os.fsdecode(body[:first]), os.fsdecode(body[first : first + second])
            self._take(chr(call), one, two, names, body[first + second :])
        self.log.write_bytes(b"")

    def _take(self, call: str, one: int, two: int, names: tuple[str, str], data: bytes) -> None:
        if call == "N":
            self.inodes[one] = File()
            return
        node = self.inodes[one]  # KeyError: what made it was not seen
        if isinstance(node, File):
            if call == "F":
                node.sync()
            else:
                node.change(two, data if call == "W" else None)
        elif isinstance(node, Folder) and call == "F":
            for change in [change for change in self.changes if any(effect[0] is node for effect in change.effects)]:
                self._keep(change)
        elif isinstance(node, Folder):
            self._change(call, node, two, names, data)

    def _change(self, call: str, folder: Folder, two: int, names: tuple[str, str], data: bytes) -> None:
        name, other = names
        node: Node
        if call in "CM":  # an inode's number is used again once it is free
            self.inodes[two] = node = File() if call == "C" else Folder()
        elif call == "L":
            node = self.inodes[two]
        else:
            node = Link(data) if call == "S" else folder.seen[name]
        effects: tuple[tuple[Folder, str, Node | None], ...] = ((folder, name, None if call in "RU" else node),)
        if call == "R":
            into = self.inodes[two]
            assert isinstance(into, Folder)
            effects = (*effects, (into, other, node))
        for where, label, leads_to in effects:
            put(where.seen, label, leads_to)
        self.number += 1
        self.changes.append(Change(self.number, node, effects))

    def _keep(self, change: Change) -> None:
        """Put a change on the disk, and with it the earlier ones of the same file: it is never in two places.

        What a newer one has said of a name stands.
        """
        for earlier in [one for one in self.changes if one.of is change.of and one.number < change.number]:
            self._keep(earlier)
        if change not in self.changes:
            return
        self.changes.remove(change)
        for folder, name, node in change.effects:
            if self.newest.get((folder, name), 0) < change.number:
                self.newest[folder, name] = change.number
                put(folder.sure, name, node)

    def unseen(self) -> list[str]:
        """Return where the folder is not as the log has it: a write that watch.c missed."""
        found = dict(contents(self.root))
        known = {name: bytes(node.seen) for name, node in files(self.top, "")}
        return sorted(name for name in found.keys() | known.keys() if found.get(name) != known.get(name))

    def cut(self, rng: random.Random) -> str:
        """Leave in the folder what a disk may hold after a power cut now; return in words which it was.

        Of the names that no sync made sure: none, the first (as a journal keeps them), or any.
        """
        way, pending = rng.choice(("none", "first", "any")), list(self.changes)
        first = rng.randint(0, len(pending))
        kept = {"none": [], "first": pending[:first], "any": [one for one in pending if rng.random() < 0.5]}[way]
        for change in kept:
            self._keep(change)
        unsynced = sum(bool(node.writes) for _, node in files(self.top, ""))
        self._write(rng)
        self.begin()
        return f"{way} of its names kept, {len(kept)} of {len(pending)}, {unsynced} files not synced"

    def _write(self, rng: random.Random) -> None:
        for entry in self.root.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        left: dict[File, bytearray] = {}  # a file with two names is one

        def fill(folder: Folder, path: Path) -> None:
            for name, node in sorted(folder.sure.items()):
                if isinstance(node, Folder):
                    (path / name).mkdir()
                    fill(node, path / name)
                elif isinstance(node, Link):
                    (path / name).symlink_to(os.fsdecode(node.target))
                else:
                    if node not in left:
                        left[node] = node.cut(rng)
                    (path / name).write_bytes(left[node])

        fill(self.top, self.root)


def put(names: dict[str, Node], name: str, node: Node | None) -> None:
    """Have `name` lead to `node`, or to nothing."""
    names.pop(name, None)
    if node is not None:
        names[name] = node


def files(folder: Folder, prefix: str) -> Iterator[tuple[str, File]]:
    """Yield the files below a folder as programs see them, by their paths."""
    for name, node in folder.seen.items():
        if isinstance(node, Folder):
            yield from files(node, f"{prefix}{name}/")
        elif isinstance(node, File):
            yield f"{prefix}{name}", node


def contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the files below a real folder."""
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield str(path.relative_to(root)), path.read_bytes()
