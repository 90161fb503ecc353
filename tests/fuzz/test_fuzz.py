"""Whatever bytes a parser of ours is given, it returns a result or one of our errors, soon and in little memory.

FUZZ is the number of inputs over all parsers: `make fuzz N=100000`. What fails is made as small as it gets, and kept as
a file in `seeds/`, which every run of the tests reads again.
"""

from __future__ import annotations

import hashlib
import os
import signal
import tempfile
import tracemalloc
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import DataError, MachineError, RecipeError, UsageError, VerificationError
from tests.fuzz.targets import TARGETS, Call, Target
from tools.serve.errors import APIError

SEEDS = Path(__file__).parent / "seeds"
INPUTS = int(os.environ.get("FUZZ") or 128)
# Of documents of some kilobytes. What is counted is the processor's time for this process, whatever else it has to do.
SECONDS = 5.0
MEMORY = 64 << 20  # bytes


class TooSlow(BaseException):
    """What a parser that does not end is ended with: no `except Exception` catches it."""


def end(_number: int, _frame: FrameType | None) -> None:
    raise TooSlow


def check(target: Target, data: bytes) -> None:
    """Fail where a parser does anything but return a result or raise one of our errors within its bounds."""
    before = signal.signal(signal.SIGPROF, end)
    tracemalloc.start()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            target.read(data, Path(folder))
    except (UsageError, DataError, MachineError, VerificationError, APIError):
        pass
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        signal.signal(signal.SIGPROF, before)
    assert peak < MEMORY, f"{peak >> 20} MiB"


def kept(target: Target, data: bytes) -> Path:
    """Write a document that failed to seeds/, and return its file."""
    path = SEEDS / target.name / hashlib.sha256(data).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_result_or_one_of_our_errors(target: Target) -> None:
    smallest: list[bytes] = []

    @settings(
        max_examples=max(1, INPUTS // len(TARGETS)),
        deadline=None,
        derandomize="FUZZ" not in os.environ,  # the fast tests are the same ones each time
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(data=target.documents)
    def try_one(data: bytes) -> None:
        try:
            check(target, data)
        except BaseException:
            smallest[:] = [data]
            raise

    try:
        try_one()
    except BaseException:
        if smallest:
            print(f"kept as {kept(target, smallest[0])}")
        raise


@pytest.mark.parametrize(
    ("target", "seed"),
    [
        pytest.param(target, path, id=f"{target.name}-{path.name}")
        for target in TARGETS
        for path in sorted((SEEDS / target.name).glob("*"))
    ],
)
def test_what_failed_once_does_not_again(target: Target, seed: Path) -> None:
    check(target, seed.read_bytes())


def swells(_data: bytes, _folder: Path) -> object:
    return bytearray(MEMORY)


def hangs(_data: bytes, _folder: Path) -> object:
    while True:
        pass


def is_of_no_kind(_data: bytes, _folder: Path) -> object:
    raise RecipeError("what kind of error is that?")


def breaks(data: bytes, _folder: Path) -> object:
    return data[1000]


@pytest.mark.parametrize(
    ("read", "fault"), [(swells, AssertionError), (hangs, TooSlow), (is_of_no_kind, RecipeError), (breaks, IndexError)]
)
def test_what_a_parser_may_not_do_is_seen(read: Call, fault: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.SECONDS", 0.2)
    with pytest.raises(fault):
        check(Target("planted", st.just(b""), read), b"x")
