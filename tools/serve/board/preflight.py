"""Can these chips serve this model? By arithmetic alone, before anything is started.

Sources: tenstorrent/tt-metal, models/ttt_compat/tt/model_config.py (the model: `ModelArgs`), autumn 2026, and
tenstorrent/vllm-tt-plugin, src/vllm_tt_plugin/worker.py (the pool: `get_num_available_blocks_tt`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import MachineError, UsageError
from common.hardware import TILE, Hardware, round_up, table
from common.model.llama import attention_widths, kv_heads, parameters
from engines.ttml.limits import rope_of

GB = 1e9
GALAXY = 32, (8, 4)  # chips, and the mesh that TG and BH-Galaxy stand for: worker.py, tg_mesh_grid
BATCHES = (1, 2, 4, 8, 16, 32)  # ModelArgs, supported_batches
LEAST_CONTEXT = 128  # the shortest prefill: shorter prompts are padded to it
POOL_TOKENS = 131_072  # of all requests together, whatever their context: a Llama's get_max_tokens_all_users
BLOCK = 64  # tokens of a block of the pool; one more of them for each request
# Bytes of a key or a value, and of a weight. `accuracy`, which the commands ask for, keeps attention and its cache in
# bf16 for all but a few models by name (ModelOptimizations.accuracy); other weights are narrower, at most this wide.
VALUE_BYTES = WEIGHT_BYTES = 2
GALAXY_WIDTH = GALAXY[0] * TILE  # ModelArgs, lm_head_num_rows: no other hidden_size ends its search on 32 chips
ROPES = ("default", "linear", "llama3", "yarn", "longrope")  # tt-metal, models/ttt_compat/tt/rope.py


@dataclass(frozen=True)
class Mesh:
    """Chips that serve as one, under their name for MESH_DEVICE. A model's heads are split over the chips of a row."""

    name: str
    rows: int
    columns: int
    dram: float  # bytes of a chip

    @property
    def chips(self) -> int:
        return self.rows * self.columns


def mesh_of(hw: Hardware) -> Mesh:
    """Return the mesh of all chips of a board. Raises UsageError for a CPU."""
    if hw.mesh_device is None or hw.dram_gib_per_chip is None:
        raise UsageError(
            f"{hw.name} serves by itself, with one process", where="--hw", todo="--hw cpu, or leave it out"
        )
    rows, columns = GALAXY[1] if hw.chips == GALAXY[0] else hw.mesh_shape
    return Mesh(hw.mesh_device, rows, columns, hw.dram_gib_per_chip * 2**30)


def meshes_of(hw: Hardware) -> list[Mesh]:
    """Return the meshes that a board's chips can be, few chips first: those of smaller boards with the same chips."""
    found = {(mesh := mesh_of(hw)).chips: mesh}
    for other in table().values():
        if (other.arch, other.dram_gib_per_chip) == (hw.arch, hw.dram_gib_per_chip) and other.chips < hw.chips:
            found.setdefault(other.chips, mesh_of(other))
    return [found[chips] for chips in sorted(found)]


def choose_mesh(hw: Hardware, name: str | None) -> Mesh:
    """Return the mesh that `--mesh` names, without a name that of the whole board. Raises UsageError."""
    known = {mesh.name: mesh for mesh in meshes_of(hw)}
    if name is not None and name not in known:
        raise UsageError(f"{hw.name} has no mesh {name!r}", where="--mesh", todo=f"one of {', '.join(known)}")
    return known[name] if name else mesh_of(hw)


def choose_context(architecture: Mapping[str, Any], wanted: int | None) -> int:
    """Return the tokens of prompt and answer together: what is wanted, else all that the model has.

    Raises UsageError for a number that the model has not, or that is no power of two: a warm-up is of that length.
    """
    own = int(architecture["max_position_embeddings"])
    context = wanted or own
    if context > own:
        raise UsageError(f"the model has {own} positions", where=f"--context {context}")
    if context & (context - 1) or not LEAST_CONTEXT <= context <= POOL_TOKENS:
        most = 1 << (min(own, POOL_TOKENS).bit_length() - 1)
        what = f"a context of {context} tokens: tt-metal takes powers of two, from {LEAST_CONTEXT} to {POOL_TOKENS}"
        todo = f"--context {most}" if most >= LEAST_CONTEXT else "this model has too few positions to be served there"
        raise UsageError(what, where=f"--context {context}", todo=todo)
    return context


def check_slots(slots: int) -> None:
    """Raise UsageError for a number of answers at once that tt-metal does not take."""
    if slots not in BATCHES:
        known = ", ".join(map(str, BATCHES))
        raise UsageError(f"tt-metal takes batches of {known}", where=f"--slots {slots}", todo="one of these")


def pool_bytes(architecture: Mapping[str, Any], mesh: Mesh, slots: int) -> int:
    """Return the bytes of a chip that keys and values take: reserved at the start, of every layer, asked or not."""
    heads = kv_heads(architecture)
    width = attention_widths(architecture)[1] // heads
    tokens = POOL_TOKENS + BLOCK * slots
    of_a_token = 2 * (heads // min(mesh.chips, heads)) * round_up(width)  # model_runner.py splits over all chips
    return int(tokens * architecture["num_hidden_layers"] * of_a_token * VALUE_BYTES)


def weight_bytes(architecture: Mapping[str, Any], mesh: Mesh) -> int:
    """Return the most bytes of a chip that the weights take."""
    return parameters(architecture) * WEIGHT_BYTES // mesh.chips


def obstacle(architecture: Mapping[str, Any], mesh: Mesh, slots: int) -> str:
    """Return why the model cannot be served by a mesh; empty where nothing known is against it."""
    heads, keys = architecture["num_attention_heads"], kv_heads(architecture)
    if heads % mesh.columns or keys % mesh.columns:
        of = f"{keys} heads of keys and values" if keys != heads else "as many of keys and values"
        return f"{heads} heads and {of} are not shared out evenly to the {mesh.columns} chips of a row"
    hidden, wide = architecture["hidden_size"], architecture["intermediate_size"]
    if mesh.chips == GALAXY[0] and hidden % GALAXY_WIDTH:
        return f"{mesh.chips} chips want a hidden_size of whole {GALAXY_WIDTH}s, it is {hidden}"
    if hidden % TILE or wide % (TILE * mesh.chips):  # find_grid_k_n; on 32 chips we only suppose so
        return f"sizes {hidden} and {wide} are no whole tiles of {TILE} on each of {mesh.chips} chips"
    pool, weights = pool_bytes(architecture, mesh, slots), weight_bytes(architecture, mesh)
    if pool + weights > mesh.dram:
        return (
            f"keys and values take {pool / GB:.1f} GB of a chip and the weights up to {weights / GB:.1f} GB, it has"
            f" {mesh.dram / GB:.1f} GB; no setting of either road makes that pool of {POOL_TOKENS} tokens smaller"
        )
    return ""


def check_model(architecture: Mapping[str, Any], hw: Hardware, mesh: Mesh, slots: int) -> None:
    """Raise MachineError, with the meshes that would do, for a model that a mesh of the board cannot serve."""
    if (kind := rope_of(architecture)["rope_type"]) not in ROPES:
        raise MachineError(f"positions by rope {kind!r}; tt-metal has {', '.join(ROPES)}", where="config.json")
    if why := obstacle(architecture, mesh, slots):
        here = [other for other in meshes_of(hw) if not obstacle(architecture, other, slots)]
        there = [
            other.name
            for other in table().values()
            if other.mesh_device and not obstacle(architecture, mesh_of(other), slots)
        ]
        if here:
            names, least = ", ".join(other.name for other in here), here[0].name
            todo = f"--mesh {least} (MESH_DEVICE={least}); by arithmetic these of {hw.name} would do: {names}"
        else:
            todo = f"by arithmetic these boards would do: {', '.join(there)}" if there else "no board would do"
        raise MachineError(f"this model cannot be served by {mesh.name}: {why}", where=f"--hw {hw.name}", todo=todo)
