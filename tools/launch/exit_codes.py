"""Every error as one message on the screen and its exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import click

from common.errors import MachineError, RecipeError, Stopped, TrainingError, UsageError, without_secrets
from common.files import disk_errors

OUR_BUG = RecipeError.code
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
READER_WENT_AWAY = 141  # 128 + SIGPIPE
OURS = ("", "common", "engines", "tools")


def exit_code_of(command: Callable[[], Any], debug: bool) -> int:
    """Run `command` and return the code the process is to end with: the int that it returns, 0, or its error's.

    With `debug` an error comes through, for its traceback.
    """
    try:
        with disk_errors("read or write a file"):
            code = command()
        return code if isinstance(code, int) else 0
    except click.exceptions.Abort:
        return _said("interrupted", INTERRUPTED)
    except click.ClickException as error:
        error.show()
        return UsageError.code
    except RecipeError as error:
        if debug and not isinstance(error, Stopped):
            raise
        return _said(str(error) if isinstance(error, Stopped) else f"error: {error}", error.code)
    except KeyboardInterrupt:
        return _said("interrupted; nothing more was saved", INTERRUPTED)
    except ModuleNotFoundError as error:
        if debug or (error.name or "").partition(".")[0] in OURS:
            raise
        lack = f"error: this needs the package {error.name}, which is not here"
        return _said(f"{lack}\n  to do: make setup, without LAUNCHER=1", MachineError.code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away, as `| head` does
        return READER_WENT_AWAY
    except Exception as error:
        if debug:
            raise
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # the second is torch's
            cure = "a smaller training_config.micro_batch_size"
            return _said(f"error: out of memory\n  to do: {cure}", TrainingError.code)
        what = f"bug: {type(error).__name__}: {without_secrets(str(error))}"
        return _said(f"{what}\n  to do: run it with --debug first and report what it prints", OUR_BUG)


def _said(message: str, code: int) -> int:
    click.echo(message, err=True)
    return code
