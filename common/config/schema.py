"""The sections of a configuration: every key with its type, default, bounds, unit and meaning; rules over several."""

from __future__ import annotations

import math
import shlex
import typing
from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from common.hardware import TILE

if TYPE_CHECKING:
    from typing_extensions import Self

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SAME_INPUT: tuple[set[Projection], ...] = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
_Positive = Annotated[int, Field(gt=0, lt=2**31)]


class Section(BaseModel):
    # strict: "4" is no number and 1 no truth, which YAML writes apart; a wrong type is a mistake and never converted.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """Yield the dotted key below this section, and what is wrong, for every rule over several keys that is broken.

        Asked only where every key alone is valid.
        """
        yield from ()

    @model_validator(mode="after")
    def _keeps_its_rules(self) -> Self:
        found: list[InitErrorDetails] = [
            {"type": PydanticCustomError("rule", "{text}", {"text": text}), "loc": tuple(key.split(".")), "input": self}
            for key, text in self.mistakes()
        ]
        if found:
            raise ValidationError.from_exception_data(type(self).__name__, found)
        return self


class Optimizer(Section):
    # The constants are the defaults of torch.optim.AdamW.
    type: Literal["AdamW", "AdamWFp32Norms", "AdamWFullPrecision"] = "AdamW"
    """AdamW; with the gains of norms in fp32; or with fp32 masters and moments beside all bf16 weights."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay; on all parameters, as on the board."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    stochastic_rounding: bool = False
    """Round bf16 weights stochastically at the update, so that small updates are not lost (boards only)."""


class Scheduler(Section):
    type: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up from 0; clamped to the run's length, and said."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """The last learning rate as a share of the first (linear and cosine)."""


class Training(Section):
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of data order, initial weights and dropout."""
    batch_size: int = Field(gt=0, lt=2**31)
    """Rows of one optimizer step, over all devices and all accumulation (the global batch)."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Rows that one device holds at once, at most batch_size / devices; null: as many as hardware.yaml has."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    max_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps of the run; either this or num_epochs."""
    num_epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows; steps = ceil(epochs x rows / batch_size)."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    precision: Literal["auto", "fp32", "bf16-mixed", "bf16"] = "auto"
    """bf16-mixed: fp32 masters under autocast; bf16: weights and moments too; auto: the device's best."""
    optimizer: Optimizer = Optimizer()
    """The optimizer and its constants."""
    scheduler: Scheduler = Scheduler()
    """The learning rate as a function of the step."""

    def mistakes(self) -> Iterator[tuple[str, str]]:
        if (self.max_steps is None) == (self.num_epochs is None):
            yield "num_epochs", "exactly one of max_steps and num_epochs must be set"


class Architecture(Section):
    """A Llama in Hugging Face's names; used with init: random."""

    vocab_size: int = Field(gt=0, multiple_of=TILE)
    """Rows of the embedding, a multiple of 32 (the hardware's tile); a tokenizer has as many ids, or fewer."""
    hidden_size: _Positive
    """Width of the residual stream."""
    intermediate_size: _Positive
    """Width inside the feed-forward block."""
    num_hidden_layers: int = Field(gt=0, le=1024)  # eight times those of the largest Llama
    """Transformer blocks."""
    num_attention_heads: _Positive
    """Query heads; divides hidden_size."""
    num_key_value_heads: _Positive
    """Key/value heads; divides num_attention_heads."""
    max_position_embeddings: _Positive
    """Longest sequence, tokens."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary embedding."""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of the RMS norms."""
    tie_word_embeddings: bool = False
    """Input embedding and output head are one matrix."""

    def mistakes(self) -> Iterator[tuple[str, str]]:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads:
            yield "num_attention_heads", f"{heads} heads do not divide hidden_size {self.hidden_size}"
        if heads % groups:
            yield "num_key_value_heads", f"{groups} key/value heads do not divide num_attention_heads {heads}"


class Lora(Section):
    """Low-rank adapters: W + alpha / rank x B A, only A and B are trained."""

    rank: int = Field(default=8, gt=0)
    """Rows of A and columns of B."""
    alpha: float = Field(default=16.0, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before A."""
    tie_groups: Literal["build"] | list[list[Projection]] = "build"
    """Projections that share one A; build: those that the build of ttml fuses; [] for plain PEFT adapters."""
    target_modules: list[Projection] = Field(default=list(typing.get_args(Projection)), min_length=1)
    """Projections that get an adapter (Hugging Face's names); a tie group is targeted whole or not at all."""

    def tied(self, groups: list[list[Projection]]) -> Lora:
        """Return the adapters with their groups named: these `groups` where they are the build's."""
        return self.model_copy(update={"tie_groups": groups}) if self.tie_groups == "build" else self

    def key_of(self, projection: str) -> str:
        """Return the name of the A that `projection` has: its tie group's, such as `k_proj+v_proj`, or its own."""
        assert self.tie_groups != "build", "the groups are named by now: see `tied`"
        return next(("+".join(group) for group in self.tie_groups if projection in group), projection)

    def mistakes(self) -> Iterator[tuple[str, str]]:
        groups = [] if self.tie_groups == "build" else self.tie_groups
        tied = [name for group in groups for name in group]
        if len(tied) != len(set(tied)):
            yield "tie_groups", "a projection stands in two tie groups"
        if len(self.target_modules) != len(set(self.target_modules)):
            yield "target_modules", "a projection is named twice"
        for group in groups:
            if not any(set(group) <= inputs for inputs in SAME_INPUT):
                yield "tie_groups", f"{group} share no input to have one A for: tie among q, k, v or among gate, up"
            missing = [name for name in group if name not in self.target_modules]
            if missing and missing != group:
                cure = f"add {missing}, remove the others, or change model_config.lora.tie_groups"
                yield "target_modules", f"the tie group {group} is targeted in part: {cure}"


class Model(Section):
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the weights of `base`, or from random weights of `architecture`."""
    base: str | None = None
    """A name in common/models.lock.yaml or the recipe's own models.lock.yaml, or a path to a Hugging Face folder."""
    preset: str | None = None
    """Name of a file in the recipe's presets/, merged over config.yaml."""
    architecture: Architecture | None = None
    """The model's shape; only with init: random."""
    initializer: Literal["ttml", "gpt2"] = "ttml"
    """Random weights as tt-train's or as GPT-2's (init: random): see common/model/init.py."""
    lora: Lora | None = None
    """Low-rank adapters over a pretrained base; null trains all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 30 % more compute."""

    def mistakes(self) -> Iterator[tuple[str, str]]:
        random = self.init == "random"
        if not random and self.base is None:
            yield "base", "init: pretrained needs a base model"
        if random == (self.architecture is None):
            yield "architecture", "belongs to init: random, which needs it; a pretrained base brings its own"
        if not random and self.initializer != "ttml":
            yield "initializer", "belongs to init: random; a pretrained base has its weights"
        if random and self.lora:
            yield "lora", "adapters need a pretrained base: over random weights there is nothing to adapt"


class Tokenizer(Section):
    type: Literal["char", "bpe"] = "char"
    """One id a character, or byte-level BPE."""
    vocab_size: int | None = Field(default=None, gt=256)  # the 256 bytes have an id each: more leave room for a merge
    """Ids of BPE, which it must reach; null: as many as the model has rows."""

    def mistakes(self) -> Iterator[tuple[str, str]]:
        if self.type == "char" and self.vocab_size is not None:
            yield "vocab_size", "belongs to type: bpe; characters are as many as the corpus has"


CONVERTED = (".csv", ".tsv", ".parquet", ".txt", ".md", ".json")  # forms that `recipe data convert` reads


def is_converted(source: str) -> bool:
    """Return whether rows of `source` have to be converted before anything is trained on them."""
    return source.startswith("hub:") or source.lower().endswith(CONVERTED)


def converted_name(source: str) -> str:
    """Return the name of the JSONL file that rows of `source` are converted to."""
    stem = source.rpartition("/")[2] if source.startswith("hub:") else source.removesuffix(PurePath(source).suffix)
    return f"{stem}{'-rows' if source == f'{stem}.jsonl' else ''}.jsonl"


class Data(Section):
    source: str | None = Field(default=None, min_length=1)
    """Rows as JSONL: a path relative to the recipe's folder, or an absolute one."""
    corpus: str | None = Field(default=None, min_length=1)
    """Plain text in place of rows: a name in corpora.yaml, or a file or folder of *.txt, relative to the recipe."""
    tokenizer: Tokenizer = Tokenizer()
    """The tokenizer that is made from the corpus."""
    num_proc: int | None = Field(default=None, gt=0)
    """Threads that encode a corpus by BPE; null: all cores."""
    system_prompt: str | None = None
    """Put before every conversation that has no system message."""
    held_out_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the rows kept for evaluation, 0 to 1."""
    split_by: str | None = None
    """Row key whose values go to one side of the split whole, e.g. topic."""
    max_length: int | None = Field(default=None, gt=0, multiple_of=TILE)
    """Tokens per row, a multiple of 32; null: the smallest that holds every row. What is cut is listed."""
    control: Literal["none", "permuted_responses", "shuffled_words"] = "none"
    """Negative control on the training rows: a run that must not improve."""
    supervise_all: bool = False
    """Train on every token, prompts too."""

    def mistakes(self) -> Iterator[tuple[str, str]]:
        if is_converted(source := self.source or ""):
            command = shlex.join(["recipe", "data", "convert", source, converted_name(source)])
            yield "source", f"training reads rows as JSONL: {command}"
        if (self.source is None) == (self.corpus is None):
            yield "corpus", "exactly one of source (rows) and corpus (plain text) must be set"
        if self.corpus and self.max_length is None:
            yield "max_length", "a corpus needs it: the tokens of one context"
        changed = {name for name, info in Data.model_fields.items() if getattr(self, name) != info.default}
        for key in sorted(changed & {"tokenizer", "num_proc"}) if self.source else ():
            yield key, "belongs to a corpus; rows are read with the base's tokenizer"
        for key in sorted(changed & {"system_prompt", "split_by", "control", "supervise_all"}) if self.corpus else ():
            yield key, "belongs to rows (source); it means nothing for a corpus"


class Evaluation(Section):
    every: int = Field(ge=0)
    """Optimizer steps between evaluations; 0: only at the end."""
    prompts: str | list[str]
    """Prompts answered at every evaluation: a JSONL file relative to the recipe's folder, or a list."""
    max_rows: int | None = Field(default=None, gt=1)
    """Held-out rows that are evaluated, evenly spread and always the same; null: all."""
    max_new_tokens: int = Field(default=64, gt=0)
    """Longest answer, tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens; 0 is off."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens that hold this share of the probability; 1 is off."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides the logits of tokens already there; 1 is off."""
    patience: int | None = Field(default=None, gt=0)
    """The run ends after this many evaluations in a row without a lower held-out loss; null: at its last step."""


class Checkpoint(Section):
    every: int = Field(ge=0)
    """Optimizer steps between checkpoints; the last step is always saved; 0: only that."""
    keep_last: int = Field(default=3, gt=0)
    """Checkpoints that are kept, the newest first."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest held-out loss, and export that one."""


class Device(Section):
    mesh_shape: Annotated[tuple[_Positive, _Positive], Strict(False)] | None = None
    """Devices as [1, N]; null: the board's own (hardware.yaml)."""
    enable_ddp: bool | None = None
    """Data parallel over the mesh; null: where there is more than one device."""
    threads: int | None = Field(default=None, gt=0)
    """CPU threads of each process; null: cores / processes."""
    compile: Literal["auto", "always", "never"] = "auto"
    """torch.compile on the CPU; auto: where the run is long enough to pay for it."""

    @property
    def devices(self) -> int:
        """Return the devices of the mesh; 1 where none is set."""
        return math.prod(self.mesh_shape or (1, 1))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        if self.mesh_shape and self.mesh_shape[0] != 1:
            yield "mesh_shape", "data parallel runs on a line, [1, N]: ttml lets a 2-D mesh have only two parallelisms"


class Logging(Section):
    use_wandb: bool = False
    """Also write Weights & Biases records."""
    wandb_mode: Literal["offline", "online"] = "offline"
    """offline writes a folder; online sends the numbers to the service."""
    use_tensorboard: bool = False
    """Also write TensorBoard events."""
    log_level: Literal["DEBUG", "INFO", "WARNING"] = "INFO"
    """How much the console says."""
    log_every: int = Field(default=1, gt=0)
    """Optimizer steps between the console's lines; metrics.jsonl always has every step."""


class Export(Section):
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: fp32 from fp32 masters, bf16 from bf16 weights."""
