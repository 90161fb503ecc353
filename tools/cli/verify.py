"""`recipe verify`: prove what a run, several devices or a board are relied on for; code 6 where it does not hold."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from tools.cli.options import RUN, container_option, hw_option, json_option, set_option


@click.group()
def verify() -> None:
    """Prove that a run, data parallel, a board, or these checks do what they should. Exit code 6 where not."""


@verify.command()
@click.argument("run", type=RUN)
@json_option
def run(run: Path, as_json: bool) -> None:
    """Check what a run left: its first step, last checkpoint, data and export."""
    from tools.verify.run import print_verification

    print_verification(run, as_json, click.echo)


@verify.command()
@click.option("--recipe", "name", default="ddp-n300", show_default=True, help="What is trained.")
@click.option("--hw", envvar="HW", metavar="BOARD", help="Board; unset: the one found here, or cpu-x2.")
@click.option("--world", type=click.IntRange(min=2), help="Devices to compare with one; unset: all.")
@click.option("--steps", type=click.IntRange(min=2), default=8, show_default=True, help="To train and compare.")
@click.option("--weak", is_flag=True, help="Measure with a batch for each device.")
@click.option("--record", is_flag=True, help="From a clean tree: write the figures into results.yaml.")
@set_option
@container_option
@json_option
def ddp(**asked: Any) -> int:
    """Compare several devices with one, step by step, then measure the gain."""
    from tools.verify.ddp import run as compare

    return compare(**asked)


@verify.command()
@hw_option
@container_option
@json_option
def board(hw: str | None, container: bool | None, as_json: bool) -> int:
    """Check that a board computes what it should, before its first run."""
    from tools.containers import launcher
    from tools.machine import lease
    from tools.machine.detect import choose_board

    found = choose_board(hw, require_present=True)
    if launcher.wanted(container, found.hardware):
        words = ("verify", "board", "--hw", found.hardware.name, *(["--json"] if as_json else []))
        return launcher.run_words(words, found.hardware, found.nodes, partial(click.echo, err=True))
    from tools.bringup.run import print_bring_up  # needs numpy, which a board's host, a launcher alone, lacks

    with lease.of_board(found.hardware, found.nodes, "verify board"):
        print_bring_up(found.hardware, found.reason, as_json, click.echo)
    return 0


@verify.command()
@json_option
def calibrate(as_json: bool) -> None:
    """See each check of `verify run` catch a planted defect."""
    from tools.verify.calibrate import print_calibration

    print_calibration(as_json, click.echo)
