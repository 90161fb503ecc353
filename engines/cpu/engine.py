"""The CPU twin: transformers' Llama on PyTorch, with the data, loss, checkpoints and files of every other engine.

Three things make it fast without changing what it computes: rows lie end to end, so that next to no padding is
computed; hidden states go through the output head only where the mask supervises; and frozen weights keep the bf16
copy that autocast would otherwise make again at every use.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

# Huge pages for tensors: on a virtual machine the first touch of a small page can cost more than the arithmetic on it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from common.config import Config
from common.data.tokens import Batch
from common.engine import Array, BackendInfo, StepStats, not_finite, supervised_tokens
from common.errors import MachineError, RankLost, RecipeError, UsageError
from common.hardware import TILE
from common.model.llama import PREFIX, misfit
from engines.cpu import ragged
from engines.cpu.cross_entropy import LinearCrossEntropy, nll_rows
from engines.cpu.lora import add_lora, lora_layers
from engines.cpu.ranks import Ranks, losing_ranks, ranks_of

TRIM_EVERY = 16  # steps: where batches differ in their number of tokens, the kept heap would fragment and grow
FEW_LENGTHS = 2  # of batches: full ones and an epoch's last; their memory is used again, and fits
COMPILE_FROM_STEPS = 300  # compiling costs about a minute here: `compile: auto` wants that many steps to earn it back


@contextlib.contextmanager
def open_cpu(config: Config) -> Iterator[TorchCPU]:
    """The CPU engine for `config`; its precision must be resolved (not `auto`)."""
    keep_large_buffers()
    ranks = ranks_of(config)
    threads = config.device.threads or max(1, len(os.sched_getaffinity(0)) // ranks.on_this_host)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time
    transformers.utils.logging.set_verbosity_error()
    if ranks.world > 1:
        ranks.tell("open", config.with_values(**{"device.threads": threads}).dump())  # one number on all hosts
    backend = TorchCPU(config, threads, ranks)
    try:
        yield backend
    finally:
        backend.close()


def keep_large_buffers() -> None:
    """Let malloc keep freed activations instead of giving each back to the kernel.

    glibc maps every block above 32 MB afresh, so each step would touch the same pages for the first time again.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def give_back_memory() -> None:
    """Return to the kernel what malloc keeps and nobody uses."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class TorchCPU:
    """Implements `common.engine.Backend`."""

    def __init__(self, config: Config, threads: int, ranks: Ranks) -> None:
        training = config.training
        if training.optimizer.stochastic_rounding:
            raise UsageError(
                "stochastic rounding exists on Tenstorrent boards only",
                where="training_config.optimizer.stochastic_rounding",
                todo="leave it false on cpu, or use AdamWFullPrecision, which needs none",
            )
        self.config, self.threads, self.ranks = config, threads, ranks
        self.synchronised = True
        self.stored = torch.bfloat16 if training.precision == "bf16" else torch.float32
        self.mixed = training.precision == "bf16-mixed"
        self.compiled, self.compile_reason = decide_compile(config)
        self.steps_done = 0
        self.lengths: set[int] = set()  # tokens of the batches laid end to end so far
        self.model: LlamaForCausalLM
        self.padded_forward: Callable[..., Any]  # what a compiled run trains through: one shape for every step
        self.objective: nn.Module
        self.optimizer: torch.optim.AdamW
        self.head16: Tensor | None = None  # a frozen head's bf16 copy, as lora.Frozen keeps one
        self.trained: dict[str, nn.Parameter] = {}
        self.updated: dict[str, Tensor] = {}  # what the optimizer updates: the trained parameters, or their masters
        self.masters: dict[str, Tensor] = {}

    @functools.cached_property
    def info(self) -> BackendInfo:
        packages = ("torch", "transformers", "numpy", "safetensors", "tokenizers")
        return BackendInfo(
            backend="torch-cpu",
            device=cpu_name(),
            precision=self.config.training.precision,
            world=self.ranks.world,
            threads=self.threads,
            compiled=self.compiled,
            versions={"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
            reason=f"HW={self.config.hw} trains on PyTorch; {self.compile_reason}",
        )

    # --- building -----------------------------------------------------------------------------------------------

    def build(self, architecture: Mapping[str, Any]) -> None:
        self.ranks.tell("build", dict(architecture))
        with torch.device("meta"):
            self.model = LlamaForCausalLM(LlamaConfig.from_dict(dict(architecture)))

    def load(self, weights: Mapping[str, Array]) -> int:
        model, config = self.model, self.config.model
        self.ranks.tell("load")
        tensors = {name: to_torch(array).to(self.stored) for name, array in self.ranks.shared(weights).items()}
        if model.config.tie_word_embeddings:
            tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
        check_names(tensors, dict(model.state_dict()))
        model.load_state_dict(tensors, strict=True, assign=True)
        model.tie_weights()
        model.model.rotary_emb = LlamaRotaryEmbedding(
            config=model.config
        )  # its buffers were on meta, and not in a file
        parameters = sum(p.numel() for p in model.parameters())
        if config.lora:
            add_lora(model, config.lora, self.config.training.seed, dtype=self.stored, keep_half=self.mixed)
        if self.mixed:
            cast_norm_outputs(model)
            self.head16 = model.lm_head.weight.detach().bfloat16() if config.lora else None
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._make_optimizer()
        self.padded_forward = torch.compile(model.model.forward, dynamic=False) if self.compiled else model.model
        self.objective = self.ranks.parallel(Objective(model, lambda batch: self._nll_sum(batch)))
        self._settle_buckets()
        return parameters

    def _make_optimizer(self) -> None:
        options = self.config.training.optimizer
        updated: dict[str, Tensor] = dict(self.trained)
        if options.type == "AdamWFullPrecision" and self.stored is not torch.float32:
            self.masters = {name: p.detach().float() for name, p in self.trained.items()}
            updated = self.masters
        self.optimizer = torch.optim.AdamW(
            list(updated.values()),
            lr=self.config.training.learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.updated = updated

    # --- training -----------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepStats:
        started = time.perf_counter()
        self.ranks.tell("train_step", learning_rate, step, batches=micro_batches)
        torch.manual_seed(self.config.training.seed * 1_000_003 + step)  # dropout hangs on the step, not on history
        self.model.train()
        supervised = supervised_tokens(micro_batches, step)
        total = self._backward([self.ranks.rows_of(batch) for batch in micro_batches], supervised)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
        loss_value, norm_value = sum(self.ranks.gather(float(total))), float(norm)
        if not (np.isfinite(loss_value) and np.isfinite(norm_value)):
            self._clear_gradients()
            raise not_finite(loss_value, norm_value, learning_rate, step)
        if (limit := self.config.training.max_grad_norm) > 0:
            torch.nn.utils.clip_grads_with_norm_(self.trained.values(), limit, norm)
        self._update(learning_rate)
        self.steps_done = step
        if step % TRIM_EVERY == 0 and len(self.lengths) > FEW_LENGTHS:
            give_back_memory()
        tokens = int(sum(batch.lengths().sum() for batch in micro_batches))
        return StepStats(loss_value, norm_value, learning_rate, tokens, supervised, time.perf_counter() - started)

    def _backward(self, batches: Sequence[Batch], supervised: int) -> Tensor:
        """Add up the gradients of this rank's rows, then all ranks'; return the sum of its nll / `supervised`."""
        total = torch.zeros((), dtype=torch.float32)
        for index, batch in enumerate(batches):
            sums_up = self.synchronised and self.ranks.world > 1 and index == len(batches) - 1
            if not (sums_up or batch.loss_mask.any()):
                continue
            with losing_ranks(), self.ranks.summing(self.objective, sums_up):
                with self._autocast():
                    loss = self._loss(batch) / supervised
                loss.backward()
            total += loss.detach()
        return total

    def _loss(self, batch: Batch) -> Tensor:
        """The sum of nll of `batch`. A rank without a supervised token has to take part in the summing all the same."""
        if batch.loss_mask.any():
            return cast(Tensor, self.objective(batch))
        mask = np.zeros_like(batch.loss_mask)
        mask[0, 0] = 1
        return cast(Tensor, self.objective(dataclasses.replace(batch, loss_mask=mask)) * 0)

    def _settle_buckets(self) -> None:
        """Let DDP choose its buckets now.

        It chooses them anew after its first backward, by the order in which gradients came, and with them the order of
        a sum over three ranks or more: a resumed run would end in other bits.
        """
        if self.ranks.world > 1:
            ids, mask = np.zeros((1, TILE), np.uint32), np.zeros((1, TILE), np.float32)
            self.model.eval()  # never compiled for this one batch
            self._backward([Batch(ids, ids, mask, np.zeros(1, np.int64))], 1)
            self._clear_gradients()

    def synchronise(self, on: bool) -> None:
        self.ranks.tell("synchronise", on)
        self.synchronised = on

    def replicas(self) -> list[str]:
        self.ranks.tell("replicas")
        digest = hashlib.sha256()
        for tensor in self.trained.values():
            digest.update(to_numpy(tensor).tobytes())
        return self.ranks.collect(digest.hexdigest())

    def _nll_sum(self, batch: Batch) -> Tensor:
        hidden, labels = self._supervised(batch)
        if self.mixed:
            hidden = hidden.bfloat16()
        weight = self.model.lm_head.weight if self.head16 is None else self.head16
        return cast(Tensor, LinearCrossEntropy.apply(hidden, weight, labels))  # type: ignore[no-untyped-call]

    def _supervised(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states [N, H] and labels [N] of the N supervised positions, row by row."""
        if self.compiled and self.model.training:
            return self._supervised_padded(batch)
        ids, positions, labels, supervised, bounds = ragged.lay_out(batch)
        self.lengths.add(ids.shape[1])
        self.model.set_attn_implementation(ragged.NAME)
        hidden = self.model.model(input_ids=ids, position_ids=positions, use_cache=False, bounds=bounds)
        return hidden.last_hidden_state[0][supervised], labels[supervised]

    def _supervised_padded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same with padding: every step has one shape, as a compiled graph needs it."""
        mask = torch.from_numpy(batch.loss_mask > 0)
        ids, labels = (torch.from_numpy(array.astype(np.int64)) for array in (batch.input_ids, batch.labels))
        self.model.set_attn_implementation("sdpa")
        hidden = self.padded_forward(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[mask], labels[mask]

    def _update(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for name, master in self.masters.items():
            gradient = self.trained[name].grad
            master.grad = None if gradient is None else gradient.float()
        self.optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                self.trained[name].copy_(master)
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.trained.values():
            parameter.grad = None

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.mixed)

    # --- evaluation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def eval_nll(self, batch: Batch) -> tuple[Array, Array]:
        self.ranks.tell("eval_nll", batches=[batch])
        self.model.eval()
        mine = self.ranks.rows_of(batch)
        sums = torch.zeros(batch.input_ids.shape[0], dtype=torch.float64)
        if mine.loss_mask.any():
            with self._in_fp32():
                hidden, labels = self._supervised(mine)
                nll = nll_rows(hidden.float(), self.model.lm_head.weight.float(), labels).double()
            first = self.ranks.rank * len(sums) // self.ranks.world
            sums.index_add_(0, torch.from_numpy(first + np.nonzero(mine.loss_mask > 0)[0]), nll)
        return self.ranks.fill(sums.numpy()), batch.loss_mask.sum(axis=1, dtype=np.float64)

    @contextlib.contextmanager
    def _in_fp32(self) -> Iterator[None]:
        """Held-out losses that are compared are computed in fp32. Widening bf16 and narrowing it again is exact."""
        if self.stored is torch.float32:
            yield
            return
        parameters = list(self.model.parameters())
        for parameter in parameters:
            parameter.data = parameter.data.float()
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.data = parameter.data.bfloat16()

    @torch.no_grad()
    def next_token_logits(self, ids: Array, lengths: Array, cache: Any = None) -> tuple[Array, Any]:
        self.model.eval()
        new = torch.from_numpy(ids.astype(np.int64))
        if cache is None:
            real = torch.arange(new.shape[1])[None] < torch.from_numpy(lengths.astype(np.int64))[:, None]
            cache = {
                "past": DynamicCache(),
                "attend": real,
                "next": torch.from_numpy(lengths.astype(np.int64)),
            }
            positions, last = torch.arange(new.shape[1])[None].expand_as(new), cache["next"] - 1
        else:
            cache["attend"] = torch.cat([cache["attend"], torch.ones_like(new, dtype=torch.bool)], dim=1)
            positions, last = cache["next"][:, None], torch.zeros(len(new), dtype=torch.int64)
            cache["next"] = cache["next"] + 1
        self.model.set_attn_implementation("sdpa")
        with self._autocast():
            hidden = self.model.model(
                input_ids=new,
                attention_mask=cache["attend"].long(),
                position_ids=positions,
                past_key_values=cache["past"],
                use_cache=True,
            ).last_hidden_state
            logits = self.model.lm_head(hidden[torch.arange(len(new)), last])
        return logits.float().numpy(), cache

    @contextlib.contextmanager
    def untuned(self) -> Iterator[None]:
        self.enable_adapters(False)
        try:
            yield
        finally:
            self.enable_adapters(True)

    def enable_adapters(self, enabled: bool) -> None:
        self.ranks.tell("enable_adapters", enabled)
        for _, layer in lora_layers(self.model):
            layer.enabled = enabled

    # --- state --------------------------------------------------------------------------------------------------

    def state(self) -> Iterator[tuple[str, Array]]:
        for name, tensor in self._model_state().items():
            yield f"model/{name}", to_numpy(tensor)
        for name, tensor in self.masters.items():
            yield f"optimizer/master/{name}", to_numpy(tensor)
        for name, tensor in self.updated.items():
            slots = self.optimizer.state[tensor]
            for slot in ("exp_avg", "exp_avg_sq"):
                yield f"optimizer/{slot}/{name}", to_numpy(slots.get(slot, torch.zeros_like(tensor)))
        yield "optimizer/step", np.array([self.steps_done], np.int64)

    def _model_state(self) -> dict[str, Tensor]:
        if not self.config.model.lora:
            tied = self.model.config.tie_word_embeddings
            return {k: v for k, v in self.model.state_dict().items() if not (tied and k == "lm_head.weight")}
        layers = dict(lora_layers(self.model))
        return {
            f"{PREFIX}{name}.{matrix}.weight": getattr(layer, matrix)
            for name, layer in layers.items()
            for matrix in ("lora_A", "lora_B")
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Array]) -> None:
        self.ranks.tell("load_state")
        state = self.ranks.shared(state)
        mine = dict(self.state_shapes())
        if set(mine) != set(state):
            odd = sorted(set(mine) ^ set(state))
            raise MachineError(
                f"the checkpoint does not fit this model: {len(odd)} tensor names differ, such as {odd[0]}",
                where="the checkpoint that is resumed",
                todo="resume with the model_config it was trained with, or start anew with --resume never",
            )
        for name, tensor in self._model_state().items():
            take(tensor, state[f"model/{name}"], name)
        self.steps_done = int(state["optimizer/step"][0])
        for name, tensor in self.masters.items():
            take(tensor, state[f"optimizer/master/{name}"], name)
        for name, tensor in self.updated.items():
            slots = self.optimizer.state[tensor]
            slots["step"] = torch.tensor(float(self.steps_done))
            for slot in ("exp_avg", "exp_avg_sq"):
                slots[slot] = torch.empty_like(tensor)
                take(slots[slot], state[f"optimizer/{slot}/{name}"], name)
        self._check_ties(state)

    def state_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of `state`, without copying a tensor."""
        for name, tensor in self._model_state().items():
            yield f"model/{name}", tuple(tensor.shape)
        for slot, tensors in (
            ("master", self.masters),
            ("exp_avg", self.updated),
            ("exp_avg_sq", self.updated),
        ):
            for name, tensor in tensors.items():
                yield f"optimizer/{slot}/{name}", tuple(tensor.shape)
        yield "optimizer/step", (1,)

    def _check_ties(self, state: Mapping[str, Array]) -> None:
        """Projections that share one A here must have been saved with equal ones."""
        for name, layer in lora_layers(self.model):
            saved = state[f"model/{PREFIX}{name}.lora_A.weight"]
            if not np.array_equal(to_numpy(layer.lora_A), saved):
                raise MachineError(
                    f"the adapter was trained with another tying of A: {name} has one of its own",
                    where="model_config.lora.tie_groups",
                    todo="set lora.tie_groups to what the adapter was trained with",
                )

    def close(self) -> None:
        """Free model and optimizer; the backend cannot be used again. Closing twice is harmless."""
        with contextlib.suppress(RankLost):  # then nobody is left to be told
            self.ranks.tell("close")
        for name in ("model", "padded_forward", "objective", "optimizer"):
            self.__dict__.pop(name, None)
        self.trained, self.updated, self.masters, self.head16 = {}, {}, {}, None
        gc.collect()  # a module and its hooks refer to each other
        give_back_memory()


class Objective(nn.Module):
    """What is differentiated, as the module that data parallel wraps: a batch's sum of nll in nats."""

    def __init__(self, model: nn.Module, nll_sum: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.model, self.nll_sum = model, nll_sum

    def forward(self, batch: Batch) -> Tensor:
        return self.nll_sum(batch)


def follow(ranks: Ranks) -> int:
    """What every rank but the first does: the same as rank 0's engine, on rows of its own, until rank 0 has ended.

    Returns the exit code that rank 0 ended with.
    """
    with contextlib.ExitStack() as opened:
        for call, arguments, batches in ranks.heard():
            if call == "end":
                return int(arguments[0])
            if call == "open":
                backend = opened.enter_context(open_cpu(Config.model_validate(arguments[0])))
                continue
            try:
                if call in ("load", "load_state"):
                    getattr(backend, call)({})
                elif call == "train_step":
                    backend.train_step(batches, *arguments)
                elif call == "eval_nll":
                    backend.eval_nll(*batches)
                elif call in ("build", "enable_adapters", "synchronise", "replicas", "close"):
                    getattr(backend, call)(*arguments)
                else:
                    raise AssertionError(f"rank 0 asks for {call}, which is no call")
            except RankLost:
                raise
            except RecipeError:
                continue  # rank 0 has the same one, and says so
    raise AssertionError("rank 0 has no end")


def decide_compile(config: Config) -> tuple[bool, str]:
    """Whether to compile, from the config and the total steps alone (never the steps left), and why."""
    choice, steps = config.device.compile, config.training.max_steps or 0
    if choice == "never":
        return False, "eager, as configured"
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        return False, "eager: no C++ compiler on this machine"
    if choice == "always":
        return True, "compiled, as configured"
    if config.model.lora or config.model.gradient_checkpointing or steps < COMPILE_FROM_STEPS:
        return False, "eager: too few steps, or adapters, to earn back the compilation"
    return True, f"compiled: {steps} steps earn it back"


def cast_norm_outputs(model: LlamaForCausalLM) -> None:
    """Round each norm's output to bf16 once, not once per projection that reads it; autocast gives the same bits."""

    def cast_output(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.bfloat16() if torch.is_autocast_enabled("cpu") else output

    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(cast_output)
        layer.post_attention_layernorm.register_forward_hook(cast_output)


def check_names(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Every tensor mapped, or an error that names the odd ones."""
    odd = [f"{name} is missing" for name in expected if name not in given]
    odd += [f"{name} is unknown" for name in given if name not in expected]
    odd += [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if odd:
        raise misfit(odd)


def take(target: Tensor, array: Array, name: str) -> None:
    """Copy `array` into `target`, which must have its shape."""
    if tuple(array.shape) != tuple(target.shape):
        raise MachineError(f"{name} has shape {tuple(array.shape)} in the checkpoint, {tuple(target.shape)} here")
    target.copy_(to_torch(array))


def to_torch(array: Array) -> Tensor:
    """A tensor over the array's memory; ml_dtypes' bfloat16 becomes torch's."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array).view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


def to_numpy(tensor: Tensor) -> Array:
    """A copy of the tensor as numpy; torch's bfloat16 becomes ml_dtypes'."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return cast(Array, tensor.view(torch.uint16).numpy().copy().view(ml_dtypes.bfloat16))
    return cast(Array, tensor.numpy().copy())


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()
