"""Every write of a piece of our code fails once, and what is expected each time.

A piece is run once to find its operations, then once for each of them and each error that it may have. Expected: the
command ends with one message and MachineError's code; every file under a final name is wholly as it was before or
wholly as it is after; and the same command without the fault then succeeds and leaves nothing else behind. A new write
of a piece is covered by itself.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import MachineError, RecipeError
from tests.writes.faults import ERRORS, NOTHING, RUN, SHORT, Fault, Operation, Outcome, run

TIME = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
# What may fail without a word where the work is done: a copy is then made by reading and writing, the folder was there,
# and what was to go stays, under a name that begins with a dot.
REPLACED = ("copy", "mkdir", "rmdir", "unlink")
State = Mapping[str, Any]  # what is under a final name, by its path


def tree(folder: Path) -> State:
    """Every file below `folder` by its path, with its bytes; what begins with a dot has no final name."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        str(name): TIME.sub(b"TIME", path.read_bytes())
        for name, path in files.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def nothing_more(_folder: Path, _state: State) -> None:
    pass


@dataclass(frozen=True)
class Piece:
    """Code that writes below a folder: what is there `before`, and what it does.

    `read` returns what it wrote, by the parts that are each whole or not there. With `apart` some of these may be
    written and others not yet; `check` raises where such a state, which is given to it, cannot be gone on from.
    A command that is given again after it failed does `again`, else the same; `refused_again`: where it was done after
    all, that is refused. `harmless` says of what ended well, with whatever failed, that it may. `in_place` are logs and
    locks.
    """

    name: str
    before: Callable[[Path], object]
    act: Callable[[Path], object]
    read: Callable[[Path], State] = tree
    apart: bool = False
    check: Callable[[Path, State], None] = nothing_more
    again: Callable[[Path], object] | None = None
    refused_again: bool = False
    harmless: Callable[[Outcome], bool] = lambda _outcome: False
    in_place: tuple[str, ...] = ()


@dataclass
class Result:
    """What one fault gave."""

    operation: Operation
    error: str
    code: int
    left: str  # "old", "new", or "part": some files are as after, others as before
    problems: list[str] = field(default_factory=list)
    screen: str = ""


class Trials:
    """A piece in a folder of its own: `operations` that it does, and the result of each fault."""

    def __init__(self, piece: Piece, place: Path) -> None:
        self.piece, self.folder, self.kept = piece, place / "here", place / "before"
        self.folder.mkdir(parents=True)
        piece.before(self.folder)
        shutil.copytree(self.folder, self.kept, symlinks=True)
        self.old = piece.read(self.folder)
        done = self._run(piece.act)
        assert done.code == 0, done.screen
        self.operations = done.operations
        self.new = self.newer = piece.read(self.folder)
        if piece.again:
            done = self._run(piece.again)
            assert done.code == 0, done.screen
            self.newer = piece.read(self.folder)
        self.names = self._names()

    def results(self, every_error: bool, every: int = 1) -> Iterator[Result]:
        """Yield what each fault gave; without `every_error` an operation has one of its errors, in turn.

        `every` n-th operation is tried, of those that are alike (a file's many writes) the first and the last.
        """
        turn: dict[str, int] = {}
        first = {operation: at for at, operation in reversed(list(enumerate(self.operations)))}
        last = {operation: at for at, operation in enumerate(self.operations)}
        tried = range(len(self.operations)) if every == 1 else sorted({*first.values(), *last.values()})[::every]
        for at in tried:
            operation = self.operations[at]
            errors = ERRORS[operation.kind.split()[0]]
            turn[operation.kind] = turn.get(operation.kind, -1) + 1
            for error in errors if every_error else [errors[turn[operation.kind] % len(errors)]]:
                yield self.result(Fault(at, error))

    def result(self, fault: Fault) -> Result:
        """Return what this fault gave, and what is wrong with that."""
        self._put_back()
        done = self._run(self.piece.act, fault)
        result = Result(self.operations[fault.at], fault.error, done.code, "part", screen=done.screen)
        result.problems += self._said_wrong(done, fault)
        try:
            now = self.piece.read(self.folder)
            result.left = self._left(now)
            if result.left == "part":
                self.piece.check(self.folder, now)
        except (AssertionError, RecipeError, OSError, ValueError) as error:
            result.problems.append(f"not whole: {error}")
        if done.code == 0 and result.left != "new" and not self.piece.harmless(done):
            result.problems.append("it ended well and the work is not done")
        if result.left == "part" and not self.piece.apart:
            result.problems.append("some of it is there and some is not")
        result.problems += self._wrong_again(result)
        return result

    def _run(self, action: Callable[[Path], object], fault: Fault | None = None) -> Outcome:
        return run(lambda: action(self.folder), [self.folder], fault)

    def _put_back(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self.kept, self.folder, symlinks=True)

    def _names(self) -> set[str]:
        names = (str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))
        return {re.sub(r"\d{4,}", "N", RUN.sub("RUN", name)) for name in names}

    def _left(self, now: State) -> str:
        if now == self.old or now == self.new:
            return "new" if now == self.new else "old"
        for name in {**self.old, **self.new, **now}:
            found = now.get(name)
            assert found in (self.old.get(name), self.new.get(name)), f"{name} is neither as before nor as after"
        return "part"

    def _said_wrong(self, done: Outcome, fault: Fault) -> Iterator[str]:
        if done.failed is NOTHING:
            yield "the operation did not come again"
            return
        if done.failed != self.operations[fault.at]:
            yield f"another operation came in its place: {done.failed}"
        does = fault.error == SHORT or done.failed.kind in REPLACED
        if done.code == 0 and not (does or self.piece.harmless(done)):
            yield "it ended well, as if nothing had failed"
        elif done.code not in (0, MachineError.code):
            yield f"exit code {done.code}"
        if done.code and (
            len(re.findall(r"^error: ", done.screen, re.MULTILINE)) != 1 or "  to do: " not in done.screen
        ):
            yield "not one message that says what, where and what to do"
        if done.code and "  where: " not in done.screen:
            yield "it does not say where"
        if re.search(r"Traceback|^bug: |Exception ignored", done.screen, re.MULTILINE):
            yield "a traceback"

    def _wrong_again(self, result: Result) -> Iterator[str]:
        again = self._run(self.piece.again or self.piece.act)
        if result.left == "new" and self.piece.refused_again:
            if again.code != 2:
                yield f"the command again: exit code {again.code}"
            return
        if again.code != 0:
            yield f"the command again: exit code {again.code}: {again.screen.strip()}"
        elif self.piece.read(self.folder) != self.newer:
            yield "the command again leaves another result"
        if (more := self._names() - self.names) and result.operation.kind not in ("unlink", "rmdir"):
            yield f"left behind: {', '.join(sorted(more))}"


def fragile(operations: Sequence[Operation], in_place: Sequence[str] = ()) -> list[str]:
    """What a power cut could take although the command ended: in the order of the operations, what is not synced.

    Content is to be on the disk before the rename that gives it a final name, the folder after it; and nothing is
    written under a final name but what is `in_place` to.
    """
    unsynced, renamed, found = dict[str, None](), dict[str, None](), list[str]()
    for operation in operations:
        path, _, target = operation.path.partition(" -> ")
        if operation.kind in ("write", "copy", "truncate"):
            unsynced[path] = None
            if final(path) and not path.endswith(tuple(in_place)):
                found.append(f"{path} is written in place")
        elif operation.kind == "fsync":
            unsynced.pop(path, None)
        elif operation.kind == "fsync folder":
            renamed.pop(path, None)
        elif operation.kind == "unlink":
            unsynced.pop(path, None)
        elif operation.kind == "rename" and final(target):
            inside = [name for name in unsynced if f"{name}/".startswith(f"{path}/")]
            found += [f"{name} is renamed before it is synced" for name in inside]
            renamed[str(Path(target).parent)] = None
    return list(dict.fromkeys([*found, *(f"the folder {name} is not synced after a rename" for name in renamed)]))


def final(path: str) -> bool:
    """Whether a path is one that somebody looks for: no part of it begins with a dot."""
    return not any(part.startswith(".") for part in Path(path).parts)
