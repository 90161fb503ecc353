"""Test doubles of `ttml` and `ttnn`: the part of their Python API that a training backend uses, computed by torch.

They are strict where the real libraries are strict, and wrong where the real ones are wrong. They prove nothing about
a board: they prove that a backend does not step into a trap that is publicly known.

`doubles()` makes them importable in this process; `environment()` gives the variables that do so in a subprocess.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
PREFIX = "TTML_DOUBLE_"


def environment(
    generation: str = "B",
    devices: int = 1,
    *,
    fused: Sequence[str] | None = None,
    calls_mlp_layers: bool = False,
    without: Sequence[str] = (),
    impostor: bool = False,
    bad_cast: bool = False,
    needs_runtime_root: bool = False,
    busy: bool = False,
    oom_at_step: int = 0,
    hang_at_step: int = 0,
    no_update_from_step: int = 0,
    kernel_faults: Sequence[str] = (),
    ordinary_specials: bool = False,
) -> dict[str, str]:
    """The variables under which a subprocess imports the doubles.

    generation: API generation, "B" or "C"; `fused` overrides which projections it fuses ("qkv", "gate_up").
    calls_mlp_layers: an unfused LlamaMLP calls its layers, as until May 2026; since tt-metal PR 45335 it hands their
    weights to a fused op.
    devices: how many are present. without: dotted names that this build of ttml lacks ("open_device_mesh").
    impostor: the unrelated package that is named ttml, too, and has none of the API.
    bad_cast: importing ttml fails as it does over a ttnn with another ABI tag.
    needs_runtime_root: importing ttml fails unless TT_METAL_RUNTIME_ROOT names a folder.
    busy: another process holds the devices. oom_at_step: the backward pass of that optimizer step, from 1, and of all
    later ones finds no memory. hang_at_step: the backward pass of that step does not end. no_update_from_step: the
    optimizer counts that step and all later ones, and changes nothing. kernel_faults: gradients that are wrong in
    silence, of those in ttml/_faults.py ("grouped-heads", "transposed-a", "padded-columns", "dk-in-bf16").
    ordinary_specials: no operation knows NaN or infinity, they count as the largest number, and a NaN that is put on
    the device has other bits there (tt-metal's tech_reports/Handling_Special_Value: so on Tensix outside few of them).
    """
    values = {
        "GENERATION": generation,
        "DEVICES": devices,
        "FUSED": "default" if fused is None else " ".join(fused),
        "CALLS_MLP_LAYERS": int(calls_mlp_layers),
        "WITHOUT": " ".join(without),
        "BAD_CAST": int(bad_cast),
        "NEEDS_RUNTIME_ROOT": int(needs_runtime_root),
        "BUSY": int(busy),
        "OOM_AT_STEP": oom_at_step,
        "HANG_AT_STEP": hang_at_step,
        "NO_UPDATE_FROM_STEP": no_update_from_step,
        "KERNEL_FAULTS": " ".join(kernel_faults),
        "ORDINARY_SPECIALS": int(ordinary_specials),
    }
    folders = [HERE / "impostor", HERE] if impostor else [HERE]
    path = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {PREFIX + name: str(value) for name, value in values.items()} | {"PYTHONPATH": os.pathsep.join(path)}


@contextlib.contextmanager
def doubles(generation: str = "B", devices: int = 1, *, impostor: bool = False, **switches: object) -> Iterator[None]:
    """Within it, `import ttml` and `import ttnn` find fresh doubles; afterwards everything is as before.

    Takes the arguments of `environment`. Devices left open are gone with the modules.
    """
    variables = environment(generation, devices, impostor=impostor, **switches)  # type: ignore[arg-type]
    path = variables.pop("PYTHONPATH").split(os.pathsep)[: 2 if impostor else 1]
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    sys.path[:0] = path
    try:
        yield
    finally:
        for entry in path:
            sys.path.remove(entry)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        for name in list(sys.modules):
            if _is_ours(name):
                del sys.modules[name]
        sys.modules.update(hidden)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("ttml", "ttnn", "_ttml")
