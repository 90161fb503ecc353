"""Where a launch runs: in a container, in this process, or in several."""

from __future__ import annotations

import click

from common.errors import UsageError
from common.train.launch import Launch
from tools.containers import launcher
from tools.data.fetch import fetch_pinned
from tools.doctor.machine import refuse_unready
from tools.launch.processes import in_processes
from tools.machine import lease


def run(launch: Launch, container: bool | None, build: bool = False) -> int:
    """Train in the board's image or here, as `container` says; return the exit code. `build`: the image, if need be."""
    if launcher.wanted(container, launch.hw):
        if launch.hosts.number > 1:
            raise UsageError("a container has no way to other hosts", where="--nnodes", todo="add --no-container")
        refuse_unready(launch.hw, launch.nodes)
        return launcher.launch(launch, click.echo, build=build)
    fetch_pinned(launch.config, launch.recipe_dir, click.echo)
    with lease.of_board(launch.hw, launch.nodes, launch.recipe_dir.name):
        return run_here(launch)


def run_here(launch: Launch) -> int:
    """Train on this machine's own Python, or that of the container this is, in as many processes as it takes."""
    from tools.launch.after_run import train_here  # needs numpy, which a board's host, a launcher alone, lacks

    return in_processes(launch, train_here, click.echo)
