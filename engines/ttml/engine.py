"""Training on Tenstorrent boards: tt-train's Llama (`ttml`), with the data, loss and files of every other engine.

Several of ttml's calls do something else than they seem to, without an error; each guard against that says which.
Weights, gradients and moments are bf16 (with AdamWFullPrecision fp32 masters and moments, with AdamWFp32Norms of the
norms' gains alone), every device has a replica, and no torch is imported: a board's image needs none.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import math
import os
import platform
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import ml_dtypes
import numpy as np

from common.config import Config
from common.data.tokens import Batch
from common.engine import Array, BackendInfo, StepStats, supervised_tokens
from common.errors import DataError, MachineError, TrainingError, VerificationError
from common.hardware import TILE, Hardware, round_up
from common.model import llama
from common.model.init import uniform
from common.signals import handled
from engines.refusals import not_finite
from engines.ttml import hf_map
from engines.ttml import state as ttml_state
from engines.ttml.contract import Build, explained, linears_by_name, probe
from engines.ttml.hf_map import Entry
from engines.ttml.limits import mesh_of, refuse_architecture, refuse_config, rope_of, rope_scaling
from engines.ttml.mesh import prepare_environment
from engines.ttml.optimizer import gains_in_fp32, make_optimizer, refuse_without_fp32, rounding_note
from engines.ttml.tensors import Tensors

# Times ln(vocabulary), which a guess costs. Tensix takes NaN and infinity for ordinary numbers in most operations
# (tt-metal's tech_reports/Handling_Special_Value), so that an overflow can arrive as a huge loss. On the CPU it cannot.
FAR = 10
NO_LIMIT = 1e20  # a gradient norm that is never reached: clipping there only measures


def refuse_without_ttml(hw: Hardware, config: Config) -> Build:
    """Return what ttml is here. Raises UsageError or MachineError where `config` cannot be trained on `hw` with it.

    Needs no base and no data, so ask before either is fetched. Imports ttml, opens no device.
    """
    refuse_config(hw, config)
    mesh = mesh_of(hw, config)
    prepare_environment(hw, mesh)
    build = probe(hw, math.prod(mesh))
    if config.model.lora and (linears := linears_by_name()):
        hf_map.lora_linears(linears, config.model.lora)
    return build


@contextlib.contextmanager
def open_ttml(hw: Hardware, config: Config) -> Iterator[TTML]:
    """Open the engine on `hw`. Its devices are closed whatever happens: a board left open may need a reset."""
    backend = TTML(hw, config, refuse_without_ttml(hw, config))
    with unwinding_signals():
        try:
            with explained("opening the devices", hw):
                backend.open()
            yield backend
        finally:
            backend.close()


@contextlib.contextmanager
def unwinding_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP leave through every `finally`; by default they end the process there and then."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    here = threading.current_thread() is threading.main_thread()  # elsewhere Python lets nobody set a handler
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if here and signal.getsignal(n) is signal.SIG_DFL]
    with handled(numbers, leave):
        yield


class TTML:
    """Implements `common.engine.Backend`."""

    def __init__(self, hw: Hardware, config: Config, build: Build) -> None:
        self.hw, self.config, self.facts = hw, config, build
        self.ttml: Any = importlib.import_module("ttml")
        self.context: Any = self.ttml.autograd.AutoContext.get_instance()
        self.mesh_shape = mesh_of(hw, config)
        self.devices = math.prod(self.mesh_shape)
        self.is_open = False
        self.steps_done = 0
        self.notes = first_notes(config, self.devices)
        self.grad_sync = True
        self.check_replicas = self.devices > 1 and not config.training.optimizer.stochastic_rounding
        self.io: Tensors
        self.architecture: Mapping[str, Any]  # the keys of config.json
        self.model: Any
        self.optimizer: Any
        self.weights: dict[str, Any] = {}  # by ttml's names, in their order: ttml's own order is that of a hash
        self.entries: dict[str, Entry] = {}
        self.trained: dict[str, Entry] = {}

    def open(self) -> None:
        # Its axes have names: over unnamed ones sync_gradients does nothing, and says nothing.
        mesh = self.ttml.Mesh(self.mesh_shape, ("_0", "dp"))
        self.ttml.open_device_mesh(mesh)
        self.is_open = True
        self.io = Tensors(mesh, self.devices)

    @property
    def info(self) -> BackendInfo:
        packages = ("numpy", "ml_dtypes", "safetensors", "tokenizers")
        versions = {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}
        return BackendInfo(
            backend="ttml",
            device=f"{self.hw.title}, mesh {list(self.mesh_shape)}",
            precision="bf16",
            world=self.devices,
            threads=self.config.device.threads or len(os.sched_getaffinity(0)),
            compiled=False,
            versions=versions | self.facts.versions() | {"ttml linears": ", ".join(hf_map.linears_of(self.entries))},
            reason=f"HW={self.hw.name} trains on ttml",
            notes=tuple(self.notes),
        )

    # --- building -----------------------------------------------------------------------------------------------

    def build(self, architecture: Mapping[str, Any]) -> None:
        refuse_architecture(architecture)
        self.architecture, rope = architecture, rope_of(architecture)
        self.positions = int(architecture["max_position_embeddings"])
        runner, tying = self.ttml.models.RunnerType, self.ttml.models.WeightTyingType
        module = importlib.import_module("ttml.models.llama")
        shape = module.LlamaConfig(
            hidden_size=architecture["hidden_size"],
            intermediate_size=architecture["intermediate_size"],
            num_hidden_layers=architecture["num_hidden_layers"],
            num_attention_heads=architecture["num_attention_heads"],
            num_key_value_heads=llama.kv_heads(architecture),
            vocab_size=architecture["vocab_size"],
            max_position_embeddings=self.positions,
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=module.LlamaRopeScalingConfig(**rope_scaling(rope)),
            runner_type=runner.MemoryEfficient if self.config.model.gradient_checkpointing else runner.Default,
            weight_tying=tying.Enabled if architecture.get("tie_word_embeddings") else tying.Disabled,
        )
        with explained("building the model", self.hw):
            self.model = module.Llama(shape)
        self._map_parameters()

    def _map_parameters(self) -> None:
        self.weights = dict(sorted(self.model.parameters().items()))
        self.entries = hf_map.map_parameters({name: w.shape() for name, w in self.weights.items()}, self.architecture)

    def load(self, weights: Mapping[str, Array]) -> int:
        hf_map.check_names(weights, self.architecture)
        parameters = sum(math.prod(part.shape) for entry in self.entries.values() for part in entry.parts)
        with explained("loading the weights", self.hw):
            for name, entry in self.entries.items():
                self.io.put(self.weights[name], entry.from_hf(weights, ml_dtypes.bfloat16))
            if self.config.model.lora:
                self._add_lora()
            self._make_optimizer()
        return parameters

    def _add_lora(self) -> None:
        """Put adapters on whole fused layers, with A of our own drawing: ttml's comes from numpy's global state."""
        assert self.config.model.lora is not None
        linears = hf_map.linears_of(self.entries)
        lora = self.config.model.lora.tied(hf_map.ties_of(linears))
        linears = hf_map.lora_linears(linears, lora)
        targets = [rf"\.{re.escape(linear.replace('/', '.'))}$" for linear in linears]
        modules = self.ttml.modules
        modules.LoraModel(  # puts adapters into self.model; the wrapper around it is not needed
            self.model,
            modules.LoraConfig(rank=lora.rank, alpha=lora.alpha, target_modules=targets, lora_dropout=lora.dropout),
        )
        if any(linear.startswith("mlp/") for linear in linears):
            self._call_mlp_layers()
        self._map_parameters()
        found = [name for name in self.weights if name.endswith("/lora_A")]
        wanted = len(linears) * self.architecture["num_hidden_layers"]
        if len(found) != wanted:  # ttml says nothing of a target that matches no layer
            raise MachineError(
                f"ttml put adapters on {len(found)} layers, {wanted} were asked for",
                where=f"model_config.lora.target_modules, for ttml {', '.join(targets)}",
                todo="report this with the build's versions",
            )
        for name in found:
            layer, linear = hf_map.tail_of(name).removesuffix("/lora_A").split("/", 2)[1:]
            module = hf_map.module_of(int(layer), hf_map.LINEARS[linear][0]).rpartition(".")[0]
            shape = self.entries[name].shape[2:]
            key = f"{module}.{lora.key_of(hf_map.LINEARS[linear][0])}.lora_A"
            self.io.put(
                self.weights[name], uniform(self.config.training.seed, key, shape, shape[1] ** -0.5)[None, None]
            )

    def _call_mlp_layers(self) -> None:
        """Let every MLP whose gate and up are layers of their own call its three layers, and their adapters with them.

        Since tt-metal PR 45335, LlamaMLP.forward hands the weights of w1, w2 and w3 to one fused op instead: adapters
        would get no gradient and change nothing. This is what it computed before; where it still does, nothing
        changes, so that no build has to be told from another. It costs what the fused op saves, some 10 % of the peak
        (24.3 against 26.7 GB there; engines/ttml/memory.py). Recomputing a block calls the same function.
        """
        silu = self.ttml.ops.unary.silu

        def forward(w1: Any, w2: Any, w3: Any, x: Any) -> Any:
            return w2(silu(w1(x)) * w3(x))

        for mlp in (block.mlp for block in self.model.blocks if hasattr(block.mlp, "w1")):
            mlp.forward = functools.partial(forward, mlp.w1, mlp.w2, mlp.w3)

    def _make_optimizer(self) -> None:
        """Make it over what is trained and nothing else: frozen weights may gather gradients, which nobody clears."""
        self.trained = {name: self.entries[name] for name, w in self.weights.items() if w.get_requires_grad()}
        self.parameters = self.ttml.NamedParameters()
        for name in self.trained:
            self.parameters[name] = self.weights[name]
        training = self.config.training
        if gains := gains_in_fp32(training, self.trained):
            refuse_without_fp32(self.ttml, self.io, training)
            for name in gains:
                self.io.widen(self.weights[name])
        self.optimizer = make_optimizer(self.ttml, self.parameters, training)
        if training.optimizer.stochastic_rounding:
            self.notes.append(rounding_note(self.ttml, self.io, training))

    # --- training -----------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepStats:
        started = time.perf_counter()
        supervised = supervised_tokens(micro_batches, step)
        # Dropout depends on the step, not on history: a resumed run needs no random state. Stochastic rounding does so
        # in builds since tt-metal 48716 (August 2026); before, its seeds come from the host's std::random_device, which
        # no set_seed reaches (adamw_program_factory.cpp): rounding_note says which of the two this build is.
        self.context.set_seed((self.config.training.seed * 1_000_003 + step) % 2**32)
        self.model.train()
        with explained(f"step {step}", self.hw, TrainingError):
            self.optimizer.set_lr(float(learning_rate))
            self.optimizer.zero_grad()
            losses = [self._backward(batch, supervised) for batch in micro_batches if batch.loss_mask.any()]
            if self.devices > 1 and self.grad_sync:
                self.ttml.sync_gradients(self.parameters, axis_names=("dp",))
            limit = self.config.training.max_grad_norm or NO_LIMIT
            norm = self.ttml.core.clip_grad_norm(self.parameters, limit, 2.0, False)
            # The one place in a step where the host waits for the devices.
            loss_value = sum(float(self.io.read(nll).sum(dtype=np.float64)) for nll in losses) / supervised
            norm_value = float(self.io.read(norm).ravel()[0])
            self._refuse_not_finite(loss_value, norm_value, learning_rate, step)
            unreached = self._without_gradient()
            self.optimizer.step()
        self.steps_done = step
        if self.check_replicas:
            self.check_replicas = False
            self._compare_replicas()
        tokens = int(sum(batch.lengths().sum() for batch in micro_batches))
        seconds = time.perf_counter() - started
        return StepStats(loss_value, norm_value, learning_rate, tokens, supervised, seconds, unreached)

    def _without_gradient(self) -> tuple[str, ...]:
        """Return the names, as PyTorch has them, of trained tensors that no backward pass has reached.

        ttml's optimizers pass over such a tensor in silence. zero_grad leaves a gradient that was there: so it is the
        first step that tells.
        """
        unreached = [e for name, e in self.trained.items() if not self.weights[name].is_grad_initialized()]
        return tuple(part.name for entry in unreached for part in entry.under_optimizer().parts)

    def _backward(self, batch: Batch, supervised: int) -> Any:
        """Add the gradients of the batch; return its nll times its mask, [B, 1, T, 1] on the devices.

        The mean over a device's (B / devices) x T positions, averaged over the devices by sync_gradients, is the sum
        over the batch / (B x T); times (B x T) / supervised, the batch's share of the loss of the batch.
        """
        mask = self.io.new(batch.loss_mask[:, None, :, None], "BFLOAT16", self.io.by_rows)
        nll = self._nll(batch) * mask
        loss = self.ttml.ops.unary.mean(nll) * (batch.loss_mask.size / supervised)
        loss.backward(False)
        self.context.reset_graph()
        return nll

    def _nll(self, batch: Batch) -> Any:
        """Return -log p(label) at every position, [B, 1, T, 1]. The labels come shifted: ttml shifts nothing."""
        logits = self._logits(batch.input_ids, self.io.by_rows)
        labels = self.io.new(batch.labels, "UINT32", self.io.by_rows, "ROW_MAJOR")
        return self.ttml.ops.loss.cross_entropy_loss(logits, labels, self.ttml.ops.ReduceType.NONE)

    def _logits(self, ids: Array, mapper: Any) -> Any:
        """Return logits [B, 1, T, V] of ids uint32 [B, T]. Without a mask, attention is causal and faster."""
        width = ids.shape[1]
        if width % TILE or width > self.positions:
            # ttml goes on: with half a tile the embedding gets no gradient, past the positions RoPE turns by nothing.
            raise DataError(
                f"rows of {width} tokens: ttml needs a multiple of {TILE} up to the model's {self.positions} positions",
                where="data_config.max_length",
                todo=f"set it to a multiple of {TILE}, at most {self.positions}",
            )
        return self.model(self.io.new(ids[:, None, None, :], "UINT32", mapper, "ROW_MAJOR"), None)

    def _refuse_not_finite(self, loss: float, norm: float, learning_rate: float, step: int) -> None:
        """Raise TrainingError, with the gradients cleared, where `loss` (nats) or `norm` is none of a sound model."""
        guess = math.log(self.architecture["vocab_size"])
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and loss <= FAR * guess:
            return
        self.optimizer.zero_grad()
        plain = not_finite(loss, norm, learning_rate, step)
        overflowed = (
            f"step {step} has overflowed: loss {loss:.4g} nats, where guessing among {self.architecture['vocab_size']} "
            f"tokens costs {guess:.1f} and {FAR * guess:.0f} are allowed; the update was refused"
        )
        raise TrainingError(
            overflowed if finite else plain.what,
            where=plain.where,
            todo="recipe verify board: where the same step has other bits each time, the board is at fault and not the "
            f"training; else {plain.todo}",
        )

    def set_grad_sync(self, on: bool) -> None:
        self.grad_sync, self.check_replicas = on, False  # who turns it off looks at the replicas himself

    def replicas(self) -> list[str]:
        digests = [hashlib.sha256() for _ in range(self.devices)]
        for name in self.trained:
            for digest, copy in zip(digests, self.io.read(self.weights[name]).reshape(self.devices, -1), strict=True):
                digest.update(copy.tobytes())
        return [digest.hexdigest() for digest in digests]

    def _compare_replicas(self) -> None:
        """Compare one block, once: gradients that were not summed, for whatever reason, show in nothing else."""
        for name in (name for name in self.trained if hf_map.tail_of(name).startswith("blocks/0/")):
            copies = self.io.read(self.weights[name]).reshape(self.devices, -1)
            if (copies != copies[:1]).any():
                raise VerificationError(
                    f"the devices hold different weights after step {self.steps_done} (seen in {name}): gradients are "
                    "not summed",
                    where=f"HW={self.hw.name}, mesh {list(self.mesh_shape)}",
                    todo="train with device_config.mesh_shape=[1,1], and report this with the build's versions",
                )
        self.notes.append(f"replicas: the same bits on {self.devices} devices after step {self.steps_done}")

    # --- evaluation ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        mode = self.ttml.autograd.GradMode
        self.model.eval()  # which turns off dropout, and not the graph
        self.context.set_gradient_mode(mode.DISABLED)
        try:
            with explained("evaluating", self.hw, TrainingError):
                yield
        finally:
            self.context.set_gradient_mode(mode.ENABLED)
            self.context.reset_graph()

    def eval_nll(self, batch: Batch) -> tuple[Array, Array]:
        rows, width = batch.loss_mask.shape
        with self._evaluating():
            nll = self.io.read(self._nll(fill_rows(batch, self.devices)))
        per_token = nll.reshape(-1, width)[:rows].astype(np.float64)
        # `where` and not a product: what a position without supervision holds may be anything
        return np.where(batch.loss_mask > 0, per_token, 0.0).sum(axis=1), batch.loss_mask.sum(axis=1, dtype=np.float64)

    def next_token_logits(self, ids: Array, lengths: Array, cache: Any = None) -> tuple[Array, Any]:
        """Compute all rows so far again at each call, at one width; the cache is these rows and that width.

        That width leaves room for eval_config.max_new_tokens: a new shape would compile new kernels.

        ttml's KvCache is left alone. It has one position for all rows, which RoPE turns by: prompts of other lengths
        would go through it one by one, or shifted, which rounds otherwise and samples another text. And its attention,
        32 queries over all keys, is not the fused one (tt-metal 39558) but the composite, which without a mask is not
        causal: nothing to put into a model that goes on training.
        """
        if cache is None:
            rows = [[int(token) for token in row[:length]] for row, length in zip(ids, lengths, strict=True)]
            room = round_up(max(map(len, rows)) + self.config.eval.max_new_tokens)
            cache = {"rows": rows, "width": min(room, self.positions)}
        else:
            for row, new in zip(cache["rows"], ids, strict=True):
                row.append(int(new[0]))
        last = [len(row) - 1 for row in cache["rows"]]
        cache["width"] = max(cache["width"], round_up(max(last) + 1))
        padded = np.zeros((len(last), cache["width"]), np.uint32)
        for at, row in enumerate(cache["rows"]):
            padded[at, : len(row)] = row  # filled on the right: on the left it would shift positions
        # Only the tiles that hold a last token come to the host: all logits would be hundreds of times as many.
        first, end = min(last) // TILE * TILE, round_up(max(last) + 1)
        with self._evaluating():
            logits = self.io.read_first(self.io.cut(self._logits(padded, None), first, end))
        return logits[np.arange(len(last)), 0, np.array(last) - first].astype(np.float32), cache

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        kept = {name: self.io.read_first(self.weights[name]) for name in self.trained if name.endswith("/lora_B")}
        try:
            for name, values in kept.items():
                self.io.put(self.weights[name], np.zeros_like(values))  # B A = 0
            yield
        finally:
            for name, values in kept.items():
                self.io.put(self.weights[name], values)

    # --- state --------------------------------------------------------------------------------------------------

    def state(self) -> Iterator[tuple[str, Array]]:
        with explained("reading the state", self.hw):
            yield from ttml_state.save(self.io, self.trained, self.weights, self.optimizer, self.steps_done)

    def load_state(self, state: Mapping[str, Array]) -> None:
        with explained("loading the checkpoint", self.hw):
            self.steps_done, notes = ttml_state.restore(self.io, self.trained, self.weights, self.optimizer, state)
        self.notes += notes

    def close(self) -> None:
        """Free everything on the devices, then close them; the backend cannot be used again. Twice is harmless."""
        for name in ("model", "optimizer", "parameters", "io"):
            self.__dict__.pop(name, None)
        self.weights, self.entries, self.trained = {}, {}, {}
        if not self.is_open:
            return
        self.is_open = False
        self.context.reset_graph()  # a step that failed leaves its graph, and that its tensors
        gc.collect()
        if "ttml.close_device_mesh" in self.facts.has:
            self.ttml.close_device_mesh()  # which disarms the fabric as well
            return
        self.context.close_device()
        # One device that is opened with the fabric of several armed hangs for 10 s and needs a reset: tt-metal 55519.
        if self.devices > 1 and "ttml.core.distributed.disable_fabric" in self.facts.has:
            self.ttml.core.distributed.disable_fabric()


def first_notes(config: Config, devices: int) -> list[str]:
    """Return what there is to say about a run before it starts."""
    options, notes = config.training.optimizer, []
    if options.type == "AdamW" and not options.stochastic_rounding:
        notes.append("bf16 weights, no stochastic rounding: updates below half a bf16 step are lost (norms stay at 1)")
    if options.type == "AdamWFp32Norms":
        notes.append("bf16 weights, fp32 gains of norms: updates of matrices below half a bf16 step are lost")
    if devices > 1:
        notes.append(f"a checkpoint is that of the first of {devices} replicas")
    if devices > 1 and options.stochastic_rounding:
        notes.append("replicas: not checkable, each device may round with random numbers of its own")
    if config.device.threads is not None:
        notes.append("device_config.threads is of no effect: it counts the threads of the CPU twin")
    if config.device.compile == "always":
        notes.append("device_config.compile is of no effect: ttml compiles its kernels by itself")
    return notes


def fill_rows(batch: Batch, multiple: int) -> Batch:
    """Return the batch with unsupervised rows added, up to a multiple of the devices."""
    lacking = -len(batch.rows) % multiple
    below = ((0, lacking), (0, 0))
    return Batch(
        np.pad(batch.input_ids, below),
        np.pad(batch.labels, below),
        np.pad(batch.loss_mask, below),
        np.pad(batch.rows, (0, lacking), constant_values=-1),
    )
