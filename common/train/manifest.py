"""manifest.json: what ran, not what was asked. Every key of it, with its type and meaning.

A key that was never set is not written, so the file of a young run is shorter than that of a finished one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from common.engine import BackendInfo
from common.errors import MachineError
from common.files import read_json, sha256_file, write_json
from common.hardware import cpu_class
from common.paths import ROOT
from common.train.launch import Launch

FORMAT = 1
NAME = "manifest.json"


class Section(BaseModel):
    """A part of the manifest. Keys of a later version, which it does not know, are kept as they are."""

    model_config = ConfigDict(extra="allow", validate_assignment=True)


class ImageFacts(Section):
    """The container image that the run was in."""

    reference: str  # digest of a published image, or id of one built here
    target: str | None = None  # of docker/docker-bake.hcl
    source: str | None = None  # published or local
    pins_sha256: str | None = None  # over the pins that the image was built from


class HostFacts(Section):
    """The machine under the run; lists go by device node."""

    kernel: str | None = None
    driver: str | None = None  # version of the tenstorrent kernel module
    nodes: list[str] = []  # /dev/tenstorrent/<N>
    pci: list[str | None] = []  # addresses
    firmware: list[str | None] = []  # versions of the firmware bundle
    iommu: list[str | None] = []  # types of the IOMMU groups


class Environment(Section):
    """The code and the machine of one process. Of these, `lock_sha256` and `cpu_class` fix a CPU run's bits."""

    git_commit: str | None = None
    git_dirty: bool | None = None  # whether the checkout differed from the commit; null: no git there
    lock_sha256: str | None = None  # of the lock file of this Python's libraries
    image: ImageFacts | None = None  # null: the machine's own Python
    host: HostFacts = HostFacts()
    cpu_class: str | None = None  # vendor, family and instruction sets


class Resumption(Environment):
    """One time that the run went on, or its start from another run's checkpoint."""

    at: str  # UTC, as every time here
    step: int  # the last one done
    command: list[str]
    overrides: list[str]
    config_digest: str
    notes: list[str]  # what differs from the run until then, what of it was accepted, whether the bits end there


class BaseFacts(Section):
    """The weights that training started from."""

    name: str
    identity: str  # a hash of the weights, or the rule that makes random ones
    origin: str
    licence: str


class DataFacts(Section):
    """What was trained on: hashes, and the counts that outlive the token files. `rows` and `tokens` go by split."""

    source_key: str = ""  # names the folder of token files in the home
    tokens_sha256: str
    length: int  # T of every batch, tokens
    rows: dict[str, int]
    tokens: dict[str, int]
    supervised_share: float | None = None  # of the training tokens: what the loss counts
    rows_cut: int = 0  # rows that were longer than `length`
    corpus: dict[str, Any] | None = None  # by split: sha256, documents and characters of the text


class ExportFacts(Section):
    """What export.json says of the export, in short."""

    status: str  # verified, unverified or failed
    reason: str
    step: int
    dtype: str
    difference: dict[str, float | None] | None = None  # by folder: held-out loss less the run's, nats per token


class Manifest(Environment):
    """The record of a run."""

    format: Literal[1] = 1
    run: str  # the folder's name
    recipe: str
    recipe_dir: str | None = None
    command: list[str]
    overrides: list[str]
    start: str
    end: str | None = None
    exit_reason: str  # running, done, `stopped: ...` or `failed: ...`
    error: str | None = None  # the whole message of a failure
    parent: str | None = None  # <run>/<checkpoint> that this run branched from
    resumed: list[Resumption] = []
    hw: str
    reasons: dict[str, str] = {}  # why this hardware, and why this precision
    seed: int
    steps: int  # max_steps
    config_digest: str
    training_digest: str | None = None
    base: BaseFacts
    data: DataFacts
    tokenizer_sha256: str
    base_parameters: int | None = None  # without adapters
    backend: BackendInfo | None = None  # the engine, as it described itself last
    first_loss: str | None = None  # what the gate of random weights found
    ended_early: int | None = None  # the step that eval_config.patience ended the run at
    trained: str | None = None  # when the last step was evaluated and saved
    metrics_sha256: str | None = None  # of metrics.jsonl at that time
    peak_memory_mib: int | None = None  # of the host, by this process; a device's own memory is not in it
    replicas: list[str] | None = None  # sha256 over the trained parameters by device; null: one device
    never_moved: list[str] | None = None  # trained tensors that ended as they began
    export: ExportFacts | None = None

    def save(self, folder: Path) -> None:
        """Write the keys that were set as the manifest of the run in `folder`, whole."""
        write_json(folder / NAME, {"format": FORMAT, **self.model_dump(mode="json", exclude_unset=True)})

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Return the manifest of the run in `folder`. Raises MachineError, which says what the file lacks."""
        try:
            return cls.model_validate(read_json(folder / NAME, FORMAT))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise MachineError(f"{NAME}: {key}: {first['msg']}", where=str(folder)) from error


def launch_facts(launch: Launch) -> dict[str, Any]:
    """Return what a launch stands on: commit, image and machine as it was told, and what only this process sees."""
    lock = ROOT / "requirements" / f"cpu-{sys.version_info[0]}.{sys.version_info[1]}.txt"
    return {
        "git_commit": launch.git_commit,
        "git_dirty": launch.git_dirty,
        "lock_sha256": sha256_file(lock) if lock.is_file() else None,
        "image": launch.image,
        "host": launch.host,
        "cpu_class": cpu_class(),
    }
