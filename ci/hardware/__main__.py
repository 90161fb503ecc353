"""`python -m ci.hardware PHASE`: run the phase, write down how it ended, end with its code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping

from ci.hardware.collect import collect
from ci.hardware.grade import grade
from ci.hardware.job import Job, say
from ci.hardware.preflight import preflight
from ci.hardware.recover import recover
from ci.hardware.train import train
from common.errors import RecipeError, UsageError
from tools.machine import host

PHASES: Mapping[str, Callable[[Job], str]] = {
    "preflight": preflight,
    "train": train,
    "grade": grade,
    "recover": recover,
    "collect": collect,
}


def main(words: list[str]) -> int:
    """Run the phase that is named; its exit code."""
    phase = words[0] if len(words) == 1 else ""
    try:
        if phase not in PHASES:
            raise UsageError("which phase?", todo=f"ci/hardware.sh {'|'.join(PHASES)}")
        if host.in_container():
            raise UsageError("this is a container of a run", todo="run the job on the board's host")
        job = Job.from_environment()
        job.enter(phase)
    except RecipeError as error:
        say(f"error: {error}")
        return error.code
    code, said = 1, "bug: it ended by an exception"
    try:
        code, said = 0, PHASES[phase](job)
        say(f"{phase}: {said}")
    except RecipeError as error:
        code, said = error.code, str(error)
        say(f"{phase} failed: {said}")
    except Exception:
        traceback.print_exc()
    finally:
        job.leave(phase, code, said)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
