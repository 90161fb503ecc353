"""The CPU twin: a Llama on PyTorch, with the data, loss, checkpoints and files of every other engine.

Four things make it fast without changing what it computes: rows lie end to end, and what several begin with is computed
once (ragged.py); the blocks of the model are written by hand (blocks.py); hidden states go through the output head only
where the mask supervises (cross_entropy.py); and frozen weights keep the bf16 copy that autocast would otherwise make
again at every use. Generation calls the model's layers one by one (decode.py); only steps that are compiled go through
transformers' own forward, and only they wait for its import (llama.py).
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
from typing import TYPE_CHECKING, Any, cast

import numpy as np

# Huge pages for tensors: on a virtual machine the first touch of a small page can cost more than the arithmetic on it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation

import torch
from torch import Tensor, nn

from common.config import Config
from common.config.schema import Model
from common.data.tokens import Batch
from common.engine import Array, BackendInfo, StepStats, not_reached, supervised_tokens
from common.errors import MachineError, RankLost, RecipeError, UsageError
from common.hardware import TILE
from common.model.llama import PREFIX
from engines.cpu import blocks, decode, ragged
from engines.cpu.cross_entropy import LinearCrossEntropy, nll_rows
from engines.cpu.llama import Llama, transformers_llama, transformers_rotary
from engines.cpu.lora import add_lora, lora_layers
from engines.cpu.ranks import Ranks, gloo_errors, ranks_of
from engines.refusals import misfit, not_finite

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# Shapes: B rows, T positions of a padded row, S tokens of rows laid end to end, N supervised ones among them,
# H hidden_size, V rows of the vocabulary. `hidden_NH` is [N, H].

# Steps: where batches differ in their number of tokens, the kept heap would fragment and grow. Of four blocks of
# SmolLM2-135M in bf16, 18 steps peaked at 1,015 MB trimmed every 16 steps, at 946 every 8 in the same CPU time, and at
# 919 every 4 in 4 % more.
TRIM_EVERY = 8
FEW_LENGTHS = 2  # of batches: full ones and an epoch's last; their memory is used again, and fits
# Compiling costs about a minute here: over 300 steps it is earned back where each becomes 0.2 s shorter.
COMPILE_FROM_STEPS = 300


@contextlib.contextmanager
def open_cpu(config: Config) -> Iterator[TorchCPU]:
    """Open the CPU engine for `config`; its precision must be resolved (not `auto`)."""
    keep_large_buffers()
    ranks = ranks_of(config)
    # The cores that this process may use: os.cpu_count() would count those that taskset or a container withholds, too.
    threads = config.device.threads or max(1, len(os.sched_getaffinity(0)) // ranks.on_this_host)
    torch.set_num_threads(threads)
    # What has no deterministic form raises here, rather than give other bits in the next run.
    torch.use_deterministic_algorithms(True)
    # It would fill all that torch.empty returns, so that a read before a write shows: time, and no bit of a result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if ranks.world > 1:
        ranks.broadcast_command(
            "open", config.with_values(**{"device.threads": threads}).dump()
        )  # one number on all hosts
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
        libc.mallopt(m_mmap_threshold, 1 << 30)  # 1 GiB: above any activation here
        libc.mallopt(m_trim_threshold, 2**31 - 1)  # the largest int: never trim, but when asked (give_back_memory)


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
        self.grad_sync = True
        self.stored = torch.bfloat16 if training.precision == "bf16" else torch.float32
        self.mixed = training.precision == "bf16-mixed"
        self.compiled, self.compile_reason = decide_compile(config)
        self.steps_done = 0
        self.model: Llama
        self.architecture: Mapping[str, Any] = {}
        self.objective: Objective
        self.parallel_objective: nn.Module  # the same, its gradients summed over the ranks; alone, the objective itself
        self.optimizer: torch.optim.AdamW
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
        self.ranks.broadcast_command("build", dict(architecture))
        self.architecture = architecture
        with torch.device("meta"):  # shapes alone: `load` assigns the weights, so that none is drawn or held twice
            self.model = transformers_llama(architecture) if self.compiled else Llama(architecture)

    def load(self, weights: Mapping[str, Array]) -> int:
        model, config = self.model, self.config.model
        self.ranks.broadcast_command("load")
        tensors = {
            name: to_torch(array).to(self.stored) for name, array in self.ranks.broadcast_tensors(weights).items()
        }
        if tied := bool(self.architecture.get("tie_word_embeddings")):
            # The file of a tied model has one matrix for both; `check_names` asks for each by its name.
            tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
        check_names(tensors, dict(model.state_dict()))
        # assign: nothing can be copied into a tensor on meta. A tied matrix becomes two parameters, then one again.
        model.load_state_dict(tensors, strict=True, assign=True)
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        if self.compiled:
            model.model.rotary_emb = transformers_rotary(self.architecture)
        # Counted before adapters are added: it is the base's number that is returned.
        parameters = sum(p.numel() for p in model.parameters())
        if config.lora:
            add_lora(model, config.lora, self.config.training.seed, dtype=self.stored, keep_half=self.mixed)
        if self.compiled and self.mixed:
            cast_norm_outputs(model)
        if self.compiled and config.gradient_checkpointing:
            # The reentrant kind wants an input that requires a gradient, which a frozen embedding does not give.
            as_transformers = cast("LlamaForCausalLM", model)
            as_transformers.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # After LoRA, which freezes the rest. An A that several projections share comes once, by the first one's name.
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._make_optimizer()
        self.objective = Objective(model, self.mixed, self.compiled, config)
        self.parallel_objective = self.ranks.parallel(self.objective)
        self._settle_buckets()
        return parameters

    def _make_optimizer(self) -> None:
        options = self.config.training.optimizer
        if options.type != "AdamW" and self.stored is not torch.float32:
            gains_alone = options.type == "AdamWFp32Norms"
            self.masters = {n: p.detach().float() for n, p in self.trained.items() if p.ndim == 1 or not gains_alone}
        updated: dict[str, Tensor] = {**self.trained, **self.masters}
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
        self.ranks.broadcast_command("train_step", learning_rate, step, batches=micro_batches)
        # Dropout depends only on seed and step: a resumed run draws what the unbroken one drew. The factor, a prime,
        # keeps the steps of one seed apart from those of the next.
        torch.manual_seed(self.config.training.seed * 1_000_003 + step)
        self.model.train()

        # 1) Forward and backward. The loss is divided by the supervised tokens of all micro-batches on all ranks, so
        #    that gradients simply add up and no split into micro-batches or ranks can change them.
        supervised = supervised_tokens(micro_batches, step)
        total = torch.zeros((), dtype=torch.float32)  # this rank's part of the loss
        for index, whole in enumerate(micro_batches, 1):
            batch = self.ranks.rows_of(whole)
            # DDP sums the gradients of all ranks once, during the backward pass of the last micro-batch.
            syncs = self.grad_sync and self.ranks.world > 1 and index == len(micro_batches)
            if not (syncs or batch.loss_mask.any()):
                continue
            with gloo_errors(), contextlib.nullcontext() if syncs else self.ranks.no_sync(self.parallel_objective):
                with self.autocast():
                    if batch.loss_mask.any():
                        nll = self.parallel_objective(batch)
                    else:  # every rank has to take part in the sum: one without a supervised token adds zeros
                        nll = self.parallel_objective(supervise_first_token(batch)) * 0
                    loss = nll / supervised  # sum of -log p(label) (cross_entropy.py) / supervised tokens of the step
                loss.backward()
            total += loss.detach()

        # 2) Loss and norm are looked at before the update: where either is not finite, the weights stay as they were.
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
        # The parts are added on every rank, in the ranks' order: all have the same bits, and raise or go on alike.
        loss_value, norm_value = sum(self.ranks.all_gather(float(total))), float(norm)
        if not (np.isfinite(loss_value) and np.isfinite(norm_value)):
            self._clear_gradients()
            raise not_finite(loss_value, norm_value, learning_rate, step)

        # 3) Clip and update; every rank does the same to its own copy.
        unreached = self._without_gradient()
        if (limit := self.config.training.max_grad_norm) > 0:
            torch.nn.utils.clip_grads_with_norm_(self.trained.values(), limit, norm)
        self._update(learning_rate)
        self.steps_done = step
        if step % TRIM_EVERY == 0 and len(self.objective.lengths) > FEW_LENGTHS:
            give_back_memory()
        tokens = int(sum(batch.lengths().sum() for batch in micro_batches))
        seconds = time.perf_counter() - started
        return StepStats(loss_value, norm_value, learning_rate, tokens, supervised, seconds, unreached)

    def _update(self, learning_rate: float) -> None:
        """Let AdamW update the trained weights, or their fp32 masters, which are then rounded into the weights."""
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
        for parameter in self.trained.values():  # with masters, these are none of the optimizer's
            parameter.grad = None

    def _without_gradient(self) -> tuple[str, ...]:
        return tuple(name for name, parameter in self.trained.items() if parameter.grad is None)

    def _settle_buckets(self) -> None:
        """Let DDP choose its buckets now, over one step whose gradients are dropped.

        It chooses them anew after its first backward, by the order in which gradients came, and with them the order of
        a sum over three ranks or more: a resumed run would end in other bits. Raises TrainingError for a tensor that no
        gradient reaches, for which DDP would wait in the first step.
        """
        if self.ranks.world > 1:
            ids, mask = np.zeros((1, TILE), np.uint32), np.zeros((1, TILE), np.float32)
            self.eval_mode()  # never compiled for this one batch
            with gloo_errors():
                with self.autocast():
                    nll = self.parallel_objective(supervise_first_token(Batch(ids, ids, mask, np.zeros(1, np.int64))))
                (nll * 0).backward()
            if unreached := self._without_gradient():
                raise not_reached(unreached, "the first backward pass, before step 1")
            self._clear_gradients()

    def set_grad_sync(self, on: bool) -> None:
        self.ranks.broadcast_command("set_grad_sync", on)
        self.grad_sync = on

    def replicas(self) -> list[str]:
        self.ranks.broadcast_command("replicas")
        digest = hashlib.sha256()
        for tensor in self.trained.values():
            digest.update(to_numpy(tensor).tobytes())
        return self.ranks.all_gather_text(digest.hexdigest())

    def autocast(self) -> torch.autocast:
        """Return the context that forward passes run in: bf16 where the run is mixed, else nothing."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.mixed)

    # --- evaluation ---------------------------------------------------------------------------------------------

    def eval_mode(self) -> None:
        """Put the model into evaluation mode, if it is not: eval() visits every module, 0.9 ms for SmolLM2-135M."""
        if self.model.training:
            self.model.eval()

    @torch.no_grad()
    def eval_nll(self, batch: Batch) -> tuple[Array, Array]:
        self.ranks.broadcast_command("eval_nll", batches=[batch])
        self.eval_mode()
        mine = self.ranks.rows_of(batch)
        sums = torch.zeros(batch.input_ids.shape[0], dtype=torch.float64)  # [B]; 0 in the rows of other ranks
        if mine.loss_mask.any():
            with self._in_fp32():
                hidden, labels = self.objective.supervised_hidden(mine)
                nll = nll_rows(hidden.float(), self.model.lm_head.weight.float(), labels).double()
            # The row of the batch that this rank begins with, as Batch.cut has it.
            first = self.ranks.rank * len(sums) // self.ranks.world
            sums.index_add_(0, torch.from_numpy(first + np.nonzero(mine.loss_mask > 0)[0]), nll)
        return self.ranks.all_reduce_sum(sums.numpy()), batch.loss_mask.sum(axis=1, dtype=np.float64)

    @contextlib.contextmanager
    def _in_fp32(self) -> Iterator[None]:
        """Compute in fp32 within, as held-out losses have to be. Widening bf16 and narrowing it again is exact."""
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

    @torch.inference_mode()
    def next_token_logits(self, ids: Array, lengths: Array, cache: Any = None) -> tuple[Array, Any]:
        self.eval_mode()
        if cache is None:
            work = torch.bfloat16 if self.mixed else self.stored
            cache = decode.Rows(decode.Linears(self.model, work, self.objective.head16), ids, lengths)
        else:
            cache.append(ids[:, 0], lengths > 0)
        logits = cache.logits()  # of the rows that go on
        found = np.zeros((len(ids), logits.shape[1]), np.float32)
        found[cache.live.numpy()] = logits.numpy()
        return found, cache

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.enable_adapters(False)
        try:
            yield
        finally:
            self.enable_adapters(True)

    def enable_adapters(self, enabled: bool) -> None:
        self.ranks.broadcast_command("enable_adapters", enabled)
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
            for slot in ("exp_avg", "exp_avg_sq"):  # AdamW makes both at its first step; until then they are zero
                yield f"optimizer/{slot}/{name}", to_numpy(slots.get(slot, torch.zeros_like(tensor)))
        yield "optimizer/step", np.array([self.steps_done], np.int64)

    def _model_state(self) -> dict[str, Tensor]:
        if not self.config.model.lora:
            tied = self.architecture.get("tie_word_embeddings")
            return {k: v for k, v in self.model.state_dict().items() if not (tied and k == "lm_head.weight")}
        layers = dict(lora_layers(self.model))
        return {
            f"{PREFIX}{name}.{matrix}.weight": getattr(layer, matrix)
            for name, layer in layers.items()
            for matrix in ("lora_A", "lora_B")
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Array]) -> None:
        self.ranks.broadcast_command("load_state")
        state = self.ranks.broadcast_tensors(state)
        mine = dict(self.state_shapes())
        if set(mine) != set(state):
            odd = sorted(set(mine) ^ set(state))
            raise MachineError(
                f"the checkpoint does not fit this model: {len(odd)} tensor names differ, such as {odd[0]}",
                where="the checkpoint that is resumed",
                todo="resume with the model_config it was trained with, or start anew with --resume never",
            )
        # Each name that is read from `state` is sent to all ranks: they have to read in one order.
        for name, tensor in self._model_state().items():
            take(tensor, state[f"model/{name}"], name)
        self.steps_done = int(state["optimizer/step"][0])
        for name, tensor in self.masters.items():
            take(tensor, state[f"optimizer/master/{name}"], name)
        for name, tensor in self.updated.items():
            slots = self.optimizer.state[tensor]
            slots["step"] = torch.tensor(float(self.steps_done))  # float, as AdamW keeps it for its bias correction
            for slot in ("exp_avg", "exp_avg_sq"):
                slots[slot] = torch.empty_like(tensor)
                take(slots[slot], state[f"optimizer/{slot}/{name}"], name)
        self._check_ties(state)

    def state_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Return names and shapes of `state`, without copying a tensor."""
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
        """Raise MachineError where projections that share one A here were saved with different ones."""
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
            self.ranks.broadcast_command("close")
        for name in ("model", "objective", "parallel_objective", "optimizer"):
            self.__dict__.pop(name, None)
        self.trained, self.updated, self.masters = {}, {}, {}
        gc.collect()  # a module and its hooks refer to each other
        give_back_memory()


class Objective(nn.Module):
    """The sum of a batch's nll in nats over its supervised positions: what a step differentiates.

    A module, because DistributedDataParallel hooks into the forward of one. Only the supervised positions go through
    the output head, which for a vocabulary of 49,152 is more arithmetic than a block.
    """

    def __init__(self, model: Llama, mixed: bool, compiled: bool, config: Model) -> None:
        super().__init__()
        self.model, self.mixed = model, mixed
        # A frozen head's bf16 copy, as lora.Frozen keeps one: autocast would make it anew at every use.
        self.head16 = model.lm_head.weight.detach().bfloat16() if mixed and config.lora else None
        self.recompute = config.gradient_checkpointing
        self.dropout = bool(config.lora and config.lora.dropout)
        forward = model.model.forward
        # dynamic=False: a graph for the one shape [B, T] that padded steps have, not one for any shape.
        self.padded_forward: Callable[..., Any] = torch.compile(forward, dynamic=False) if compiled else forward
        self.compiled = compiled
        self.lengths: set[int] = set()  # tokens of the batches laid end to end so far

    def forward(self, batch: Batch) -> Tensor:
        hidden_NH, labels_N = self.supervised_hidden(batch)
        if self.mixed:
            hidden_NH = hidden_NH.bfloat16()  # a Function of our own is not autocast
        weight_VH = self.model.lm_head.weight if self.head16 is None else self.head16
        return cast(Tensor, LinearCrossEntropy.apply(hidden_NH, weight_VH, labels_N))  # type: ignore[no-untyped-call]

    def supervised_hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return hidden states [N, H] and labels [N] of the batch's N supervised positions, row by row."""
        if self.compiled and self.model.training:
            return self.supervised_hidden_padded(batch)
        # Where dropout acts, each row has draws of its own: its beginning is then no other row's.
        layout = ragged.lay_out(batch, share=not (self.dropout and self.model.training))
        self.lengths.add(len(layout.ids))
        work = torch.bfloat16 if torch.is_autocast_enabled("cpu") else self.model.dtype
        hidden_UH = blocks.hidden_states(self.model, layout, work, self.recompute)
        return hidden_UH[layout.place], layout.labels  # [N, H], [N]

    def supervised_hidden_padded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the same with padding computed: every step has one shape, as a compiled graph needs it."""
        mask_BT = torch.from_numpy(batch.loss_mask > 0)
        ids_BT, labels_BT = (torch.from_numpy(array.astype(np.int64)) for array in (batch.input_ids, batch.labels))
        cast("LlamaForCausalLM", self.model).set_attn_implementation("sdpa")
        hidden_BTH = self.padded_forward(input_ids=ids_BT, use_cache=False).last_hidden_state
        return hidden_BTH[mask_BT], labels_BT[mask_BT]  # [N, H], [N]: a mask takes row by row


def supervise_first_token(batch: Batch) -> Batch:
    """Return `batch` with the first token of its first row as the only supervised one."""
    mask = np.zeros_like(batch.loss_mask)
    mask[0, 0] = 1
    return dataclasses.replace(batch, loss_mask=mask)


def follow(ranks: Ranks) -> int:
    """Repeat the calls of rank 0's engine on this rank's own rows, until rank 0 has ended.

    Returns the exit code that rank 0 ended with.
    """
    with contextlib.ExitStack() as opened:
        for call, arguments, batches in ranks.commands():
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
                elif call in ("build", "enable_adapters", "set_grad_sync", "replicas", "close"):
                    getattr(backend, call)(*arguments)
                else:
                    raise AssertionError(f"rank 0 asks for {call}, which is no call")
            except RankLost:
                raise
            except RecipeError:
                continue  # rank 0 has the same one, and says so
    raise AssertionError("rank 0 has no end")


def decide_compile(config: Config) -> tuple[bool, str]:
    """Return whether to compile, and why; by all steps of the run, so that a resumption decides as its start did."""
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


def cast_norm_outputs(model: Llama) -> None:
    """Round each norm's output to bf16 once, not once per projection that reads it; autocast gives the same bits."""

    def cast_output(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.bfloat16() if torch.is_autocast_enabled("cpu") else output

    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(cast_output)
        layer.post_attention_layernorm.register_forward_hook(cast_output)


def check_names(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise MachineError naming every tensor that is missing, unknown or misshapen."""
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
    """Return a tensor over the array's memory; ml_dtypes' bfloat16 becomes torch's."""
    if array.dtype.name == "bfloat16":  # torch does not know ml_dtypes' type: the bits pass as uint16, uncopied
        return torch.from_numpy(np.ascontiguousarray(array).view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


def to_numpy(tensor: Tensor) -> Array:
    """Return a copy of the tensor as numpy; torch's bfloat16 becomes ml_dtypes'."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return cast(Array, tensor.view(torch.uint16).numpy().copy().view(ml_dtypes.bfloat16))
    return cast(Array, tensor.numpy().copy())


def cpu_name() -> str:
    """Return the processor's model name as the kernel has it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()
