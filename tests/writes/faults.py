"""What a piece of code asks the kernel to write, one operation after another, and one of them made to fail.

The piece runs in a forked process under a seccomp filter that hands the system calls below to this process, which lets
them pass or answers in the kernel's place (seccomp_unotify(2); Linux 5.9 and later). So it does not matter who writes:
Python, C's stdio within numpy, Rust within safetensors and tokenizers, or a child process. Not seen are stores into a
shared map of a file: nothing of ours writes so.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import os
import re
import select
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.launch.exit_codes import exit_code_of

# System calls of x86-64 by number (arch/x86/entry/syscalls/syscall_64.tbl), with what they are called here.
CALLS = {
    2: "open",
    85: "open",
    257: "open",
    437: "open",
    1: "write",
    18: "write",
    20: "write",
    296: "write",
    328: "write",
    40: "copy",
    326: "copy",
    74: "fsync",
    75: "fsync",
    76: "truncate",
    77: "truncate",
    285: "truncate",
    82: "rename",
    264: "rename",
    316: "rename",
    86: "link",
    265: "link",
    88: "link",
    266: "link",
    83: "mkdir",
    258: "mkdir",
    84: "rmdir",
    87: "unlink",
    263: "unlink",
    3: "close",
    90: "chmod",
    91: "chmod",
    268: "chmod",
    452: "chmod",
    73: "lock",
}
CREAT, OPENAT2, UNLINKAT, WRITE, PWRITE, WRITEV = 85, 437, 263, 1, 18, 20
OF_DESCRIPTOR = {1: 0, 18: 0, 20: 0, 296: 0, 328: 0, 40: 0, 326: 2, 74: 0, 75: 0, 77: 0, 285: 0, 3: 0, 91: 0, 73: 0}
# Which arguments are a folder's descriptor (None: there is none) and the path in it; a rename and a link have two.
OF_PATH: dict[int, Sequence[tuple[int | None, int]]] = {
    **{nr: [(None, 0)] for nr in (2, 85, 76, 83, 84, 87, 90)},
    **{nr: [(0, 1)] for nr in (257, 437, 258, 263, 268, 452)},
    **{nr: [(None, 0), (None, 1)] for nr in (82, 86)},
    **{nr: [(0, 1), (2, 3)] for nr in (264, 316, 265)},
    88: [(None, 1)],
    266: [(1, 2)],
}
FULL = "full"  # a disk with room for half of a write, and for nothing after it
SHORT = "short"  # half of a write is done, as a signal may have it
ERRORS = {
    "open": ("ENOSPC", "EIO", "EDQUOT"),
    "write": (FULL, "EIO", "EDQUOT", SHORT, "ENOSPC"),
    "copy": ("ENOSPC", "EIO", "EDQUOT"),  # from file to file, within the kernel
    "fsync": ("EIO", "ENOSPC", "EDQUOT"),
    "rename": ("EIO", "ENOSPC", "EDQUOT"),
    "link": ("EIO", "ENOSPC", "EDQUOT"),
    "mkdir": ("ENOSPC", "EIO", "EDQUOT"),
    "close": ("EIO", "EDQUOT", "ENOSPC"),
    "truncate": ("EIO",),
    "unlink": ("EIO",),
    "rmdir": ("EIO",),
    "chmod": ("EIO",),
    "lock": ("ENOLCK",),  # as on a network disk
}
NEEDS_ROOM = ("open", "write", "copy", "mkdir", "link")  # what fails on, once a disk is full
TEMPORARY = re.compile(r"(?<=[.-])[a-z0-9_]{8}(?=/|$)|(?<=\.tmp)\w{6}$")  # as tempfile and Rust's tempfile end names
RUN, STEP = re.compile(r"\d{8}T\d{6}Z-[^/]+-[0-9a-f]{4}(?=/|$)"), re.compile(r"step-\d{8}")
RECEIVE, SEND, ADD_FD = 0xC0502100, 0xC0182101, 0x40182103  # ioctls of <linux/seccomp.h>
CONTINUE, SET_FD = 1, 1
DEADLINE = 120  # seconds for a process in which nothing is asked of the kernel


class Unavailable(Exception):
    """This machine, or the container around it, lets no process be watched."""


@dataclass(frozen=True)
class Operation:
    """One system call that writes: its kind, and the path below the folders that are watched."""

    kind: str
    path: str

    def __str__(self) -> str:
        return f"{self.kind} {self.path}"


@dataclass(frozen=True)
class Fault:
    """The error that operation number `at`, from 0, gets: a name of errno, SHORT or FULL."""

    at: int
    error: str


NOTHING = Operation("nothing", "")


@dataclass
class Outcome:
    """How a process ended: its exit code, all that it said, its operations, and the one that got the fault."""

    code: int
    screen: str
    operations: list[Operation] = field(default_factory=list)
    failed: Operation = NOTHING


def run(action: Callable[[], Any], folders: Sequence[Path], fault: Fault | None = None) -> Outcome:
    """Run `action` as a command is run, in a process of its own; watch what it writes below `folders`.

    Raises Unavailable where the kernel, or the container, allows no such filter.
    """
    with tempfile.TemporaryFile() as screen:
        here, there = socket.socketpair()
        child = os.fork()
        if child == 0:
            _be_the_command(action, screen.fileno(), there)
        there.close()
        watcher = None
        try:
            with here:
                why, listeners, *_ = socket.recv_fds(here, 1000, 1)
            assert why, "the process ended before it was under the filter"
            if not listeners:
                raise Unavailable(why.decode())
            watcher = Watcher(listeners[0], child, [str(folder.resolve()) for folder in folders], fault)
            watcher.serve()
        finally:
            if watcher is None or not watcher.over:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        screen.seek(0)
        said = screen.read().decode(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status), said, watcher.operations, watcher.failed)


def _be_the_command(action: Callable[[], Any], screen: int, there: socket.socket) -> None:
    """The child's life: what it says goes to `screen`, what it writes through the filter."""
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(screen, 1)
        os.dup2(screen, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8", write_through=True)
        try:
            listener = _install_filter()
        except OSError as error:
            there.sendall(str(error).encode())
            raise
        socket.send_fds(there, [b"."], [listener])
        os.close(listener)
        there.close()
        code = exit_code_of(action, debug=False)
        sys.stdout.flush()
    finally:
        os._exit(code)


def _install_filter() -> int:
    """Put this thread, and all that it starts, under the filter; return the descriptor that its calls come to."""
    load, equal, give = 0x20, 0x15, 0x06  # BPF: load a word, jump if equal, return
    allow, notify = 0x7FFF0000, 0x7FC00000
    numbers = sorted(CALLS)
    program = [(load, 0, 0, 0)]  # the number of the call is the first word of seccomp_data
    program += [(equal, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    program += [(give, 0, 0, allow), (give, 0, 0, notify)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    set_no_new_privileges, seccomp, set_mode_filter, new_listener = 38, 317, 1, 8
    libc.prctl(set_no_new_privileges, 1, 0, 0, 0)
    listener = int(libc.syscall(seccomp, set_mode_filter, new_listener, head))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp gives no listener")
    return listener


class Watcher:
    """Answers the calls of a process under the filter: all pass but those that the fault is for."""

    def __init__(self, listener: int, child: int, roots: Sequence[str], fault: Fault | None) -> None:
        self.listener, self.child, self.roots, self.fault = listener, child, roots, fault
        self.operations: list[Operation] = []
        self.failed = NOTHING
        self.over = False

    def serve(self) -> None:
        """Answer until the process and all that it started are gone."""
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        with contextlib.closing(os.fdopen(self.listener, closefd=True)):
            while True:
                ready = poll.poll(DEADLINE * 1000)
                if not ready:
                    raise AssertionError(f"nothing happened for {DEADLINE} s after {self.operations[-3:]}")
                if ready[0][1] & select.POLLHUP:
                    self.over = True
                    return
                request = bytearray(80)
                try:
                    fcntl.ioctl(self.listener, RECEIVE, request)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.EINTR):  # the caller was killed meanwhile
                        raise
                    continue
                identity, thread, _, number, _, _, *arguments = struct.unpack("QIIiIQ6Q", request)
                value, failure = self.answer(identity, thread, number, arguments)
                flags = CONTINUE if value is None and not failure else 0
                with contextlib.suppress(FileNotFoundError):
                    fcntl.ioctl(self.listener, SEND, struct.pack("QqiI", identity, value or 0, -failure, flags))

    def answer(self, identity: int, thread: int, number: int, arguments: Sequence[int]) -> tuple[int | None, int]:
        """Return the value and the errno to answer with; (None, 0) lets the call pass."""
        try:
            operation = self.operation(thread, number, arguments)
        except OSError:  # no such descriptor, or no such memory: the kernel says so itself
            return None, 0
        if operation is None:
            return None, 0
        at = len(self.operations)
        self.operations.append(operation)
        passes = 0 if number in (74, 75) else None  # no test pulls the plug, and the disk is slow: it was synced
        if self.fault is None or at < self.fault.at:
            return passes, 0
        error = self.fault.error
        if at > self.fault.at:
            full = error in ("ENOSPC", FULL) and operation.kind in NEEDS_ROOM
            return (None, errno.ENOSPC) if full else (passes, 0)
        self.failed = operation
        if operation.kind == "close":  # which Linux does, whatever it answers: the file is gone from that number
            with Path(os.devnull).open("rb") as null:
                fcntl.ioctl(
                    self.listener, ADD_FD, struct.pack("QIIII", identity, SET_FD, null.fileno(), arguments[0], 0)
                )
        if error in (SHORT, FULL):
            written = self.half(thread, number, arguments)
            return (written, 0) if written else (None, 0 if error == SHORT else errno.ENOSPC)
        return None, int(getattr(errno, error))

    def operation(self, thread: int, number: int, arguments: Sequence[int]) -> Operation | None:
        """Return what a call would write, or None where it writes nothing below the folders."""
        kind = CALLS[number]
        if number in OF_DESCRIPTOR:
            descriptor = _signed(arguments[OF_DESCRIPTOR[number]])
            paths = [str(Path(f"/proc/{thread}/fd/{descriptor}").readlink())]
            if self.below(paths[0]) and kind == "close" and not _writable(thread, descriptor):
                return None
        else:
            if kind == "open" and not _creates_or_writes(thread, number, arguments):
                return None
            paths = [_path(thread, arguments, *where) for where in OF_PATH[number]]
        if not any(map(self.below, paths)):
            return None
        if number == UNLINKAT and arguments[2] & 0x200:  # AT_REMOVEDIR
            kind = "rmdir"
        if kind == "fsync" and Path(paths[0]).is_dir():
            kind = "fsync folder"
        return Operation(kind, " -> ".join(map(self.short, paths)))

    def below(self, path: str) -> bool:
        return any(path == root or path.startswith(f"{root}/") for root in self.roots)

    def short(self, path: str) -> str:
        """A path without what differs from process to process."""
        root = next((root for root in self.roots if self.below(path) and path.startswith(root)), "")
        path = path.removeprefix(root).lstrip("/") or "."
        if path.endswith(" (deleted)"):
            return ".unnamed"
        path = re.sub(rf"\.{self.child}(?=/|$)", ".PID", path)  # alone: small numbers stand in other names, too
        return TEMPORARY.sub("*", RUN.sub("RUN", STEP.sub("step-N", path)))

    def half(self, thread: int, number: int, arguments: Sequence[int]) -> int:
        """Do half of a write for the process; return its bytes, or 0 where it has no half."""
        if number not in (WRITE, PWRITE):
            return 0
        data = _memory(thread, arguments[1], arguments[2] // 2)
        if not data:
            return 0
        with Path(f"/proc/{thread}/status").open(encoding="ascii") as status:
            process = next(int(line.split()[1]) for line in status if line.startswith("Tgid"))
        descriptor = os.pidfd_open(process)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            file = int(libc.syscall(438, descriptor, ctypes.c_int(arguments[0]), 0))  # pidfd_getfd
        finally:
            os.close(descriptor)
        if file < 0:
            raise Unavailable(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
        try:
            return os.write(file, data) if number == WRITE else os.pwrite(file, data, arguments[3])
        finally:
            os.close(file)


def _signed(value: int) -> int:
    return ctypes.c_int(value & 0xFFFFFFFF).value


def _memory(thread: int, address: int, size: int) -> bytes:
    try:
        with Path(f"/proc/{thread}/mem").open("rb", buffering=0) as memory:
            return os.pread(memory.fileno(), size, address)
    except PermissionError as error:
        raise Unavailable(str(error)) from error


def _path(thread: int, arguments: Sequence[int], folder: int | None, name: int) -> str:
    page = 4096 - arguments[name] % 4096  # what follows may not be mapped
    text = _memory(thread, arguments[name], page)
    if b"\0" not in text:
        text += _memory(thread, arguments[name] + page, 4096)
    path = os.fsdecode(text.partition(b"\0")[0])
    at = -100 if folder is None else _signed(arguments[folder])  # AT_FDCWD
    beside = Path(f"/proc/{thread}/cwd" if at == -100 else f"/proc/{thread}/fd/{at}").readlink()
    return os.path.normpath(beside / path)


def _creates_or_writes(thread: int, number: int, arguments: Sequence[int]) -> bool:
    if number == CREAT:
        return True
    flags = arguments[1] if number == 2 else arguments[2]
    if number == OPENAT2:
        flags = struct.unpack("Q", _memory(thread, arguments[2], 8))[0]
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def _writable(thread: int, descriptor: int) -> bool:
    with Path(f"/proc/{thread}/fdinfo/{descriptor}").open(encoding="ascii") as info:
        flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags"))
    return bool(flags & (os.O_WRONLY | os.O_RDWR))
