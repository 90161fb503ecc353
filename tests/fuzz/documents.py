"""Documents that the parsers take: what ships, and what the tools write, in small."""

from __future__ import annotations

import json
import struct
from typing import Any

from common import known_errors
from common.paths import ROOT
from tests.doubles.tiny_recipe import FINE_TUNE, FROM_SCRATCH
from tests.support import run_folders

SHA = "0" * 64

# --- configurations ---------------------------------------------------------------------------------------------------

CONFIGS = [path.read_bytes() for path in sorted(ROOT.glob("recipes/*/config.yaml"))]
CONFIGS += [(folder / "config.yaml").read_bytes() for folder in (FINE_TUNE, FROM_SCRATCH)]
RESOLVED = run_folders.config().dump()
SETS = (
    b"training_config.seed=1",
    b"training_config.max_steps=10",
    b"training_config.batch_size=64",
    b"training_config.learning_rate=1e-4",
    b"training_config.optimizer={type: AdamW, beta1: 0.9}",
    b"eval_config.prompts=[What is it, 'no: thing']",
    b"model_config.lora={rank: 4, alpha: 8}",
    b"model_config.preset=small",
    b"device_config.mesh_shape=[1, 2]",
    b"logging_config.use_wandb=true",
    b"a.b.c={d: [1]}",
)

# --- rows and texts ---------------------------------------------------------------------------------------------------

ASKED = {"role": "user", "content": "Why is it?"}
SAID = {"role": "assistant", "content": "It is so.", "weight": 1}
FUNCTION = {"name": "sky", "description": "the sky", "parameters": {"type": "object"}}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "sky", "arguments": '{"at": "noon"}'}}],
}
BLUE = {"role": "tool", "content": "blue", "tool_call_id": "1"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}]}
OURS: tuple[dict[str, Any], ...] = (
    {"prompt": "Why?", "response": "So.", "topic": "why"},
    {"messages": [{"role": "system", "content": "Be brief."}, ASKED, SAID, ASKED, SAID]},
    {"messages": [ASKED, CALLS, BLUE, SAID], "tools": [{"type": "function", "function": FUNCTION}]},
)
ROWS: tuple[dict[str, Any], ...] = (
    *OURS,
    {"instruction": "Say it.", "input": "this", "output": "That.", "system": "Be brief.", "history": [["a", "b"]]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s", "tools": "[]"},
    {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "sky", "arguments": {}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "b"},
        ],
        "tools": json.dumps([FUNCTION]),
    },
    {"prompt": [ASKED], "completion": [SAID]},
    {"prompt": "a", "completion": " b", "label": True},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": [ASKED, SAID], "rejected": [ASKED, SAID]},
    {"question": "a", "answer": "b"},
    {"text": "<|user|>\nWhy?</s>\n<|assistant|>\nSo.</s>\n"},
    {"text": "### Instruction:\nSay.\n\n### Response:\nIt."},
    {"messages": json.dumps([ASKED, SAID])},
    {"input": {"messages": [ASKED]}, "preferred_output": [SAID], "non_preferred_output": [SAID]},
    {"contents": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}]},
    {"query": "a", "response": "b", "history": [["c", "d"]], "images": []},
    {"messages": [PARTS, {"role": "assistant", "content": "b", "reasoning_content": None}]},
)
TABLE = b'prompt,response,messages\r\nWhy?,"So,\nthen.",\r\nHow?,Thus.,"[{""role"": ""user""}]"\r\n'
TABLES = (TABLE, TABLE.replace(b",", b";"), TABLE.decode().encode("utf-16"))
MARKED = "Q: Why?\nA: So.\n\nThen.\nQuestion: How?\r\nAnswer: Thus.\u2028x\n".encode()

# --- a run's folder ---------------------------------------------------------------------------------------------------

BACKEND = {
    "backend": "torch-cpu",
    "device": "cpu",
    "precision": "fp32",
    "world": 1,
    "threads": 2,
    "compiled": False,
    "versions": {"torch": "2"},
    "reason": "as told",
    "notes": [],
}
DATA = {
    "tokens_sha256": SHA,
    "length": 32,
    "rows": {"train": 9, "held_out": 2},
    "tokens": {"train": 99, "held_out": 20},
    "supervised_share": 0.5,
    "rows_cut": 0,
    "corpus": {"held_out": {"sha256": SHA, "documents": ["x"], "characters": 9}},
}
MANIFEST: dict[str, Any] = {
    "format": 1,
    "run": "a-run",
    "recipe": "from_scratch",
    "recipe_dir": str(FROM_SCRATCH),
    "command": ["recipe", "run"],
    "overrides": [],
    "start": "2026-01-01T00:00:00Z",
    "end": "2026-01-01T00:10:00Z",
    "exit_reason": "done",
    "error": None,
    "parent": None,
    "resumed": [{"at": "2026", "step": 3, "command": [], "overrides": [], "config_digest": "", "notes": ["one"]}],
    "hw": "cpu",
    "reasons": {"hardware": "as told"},
    "seed": 1,
    "steps": 40,
    "config_digest": SHA,
    "training_digest": SHA,
    "base": {"name": "tiny", "identity": SHA, "origin": "/tiny", "licence": "unknown"},
    "data": DATA,
    "tokenizer_sha256": SHA,
    "backend": BACKEND,
    "ended_early": None,
    "peak_memory_mib": 100,
    "never_moved": ["model.norm.weight"],
    "git_commit": "0" * 40,
    "git_dirty": False,
    "lock_sha256": SHA,
    "image": {"reference": f"sha256:{SHA}"},
    "host": {"kernel": "6", "nodes": ["/dev/tenstorrent/0"]},
    "cpu_class": "x",
    "export": {"status": "verified", "reason": "", "step": 40, "dtype": "fp32", "difference": {"merged": 0.0}},
}
STATE = {
    "format": 1,
    "step": 1,
    "training_digest": SHA,
    "tokens_sha256": SHA,
    "threads": 2,
    "compiled": False,
    "sha256": {"model.safetensors": SHA},
}
RECORDS = (*map(run_folders.training, (1, 2)), run_folders.figures(run_folders.evaluation(2, 0.0)))
EVALUATIONS = tuple(run_folders.evaluation(step, 0.0) for step in (0, 2))
EXPORT = {
    "format": 1,
    "writer": 2,
    "verified": True,
    "status": "verified",
    "reason": "x",
    "step": 2,
    "dtype": "fp32",
    "sha256": {"merged/config.json": SHA},
    "checkpoint": {"model.safetensors": SHA},
    "gguf": {},
}
SAMPLES = [str(row.sample or row.text).encode() for row in known_errors.table() if row.text]
LOG = b"\n".join([b"2026-01-01T00:00:00Z run begins: x", *SAMPLES])


# --- models and their pins --------------------------------------------------------------------------------------------


def safetensors(header: bytes) -> bytes:
    """Return a safetensors file of this header, with 32 bytes of data."""
    return struct.pack("<Q", len(header)) + header + bytes(32)


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [8], "data_offsets": [16, 32]},
}
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "eos_token_id": [1, 2],
    "rope_parameters": {"rope_type": "default"},
}
TOKENIZER = {"chat_template": [{"name": "default", "template": "x"}], "eos_token": {"content": "</s>"}}
TEMPLATE = (
    b"{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{% endfor %}"
    b"{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"
)
PINS = (ROOT / "common/models.lock.yaml").read_bytes()
RESULTS = [path.read_bytes() for path in sorted(ROOT.glob("recipes/*/results.yaml"))]
RESULTS += [(FROM_SCRATCH / "results.yaml").read_bytes()]

# --- machines and images ----------------------------------------------------------------------------------------------

IMAGES = json.loads((ROOT / "docker/images.lock.json").read_text(encoding="utf-8"))
BUILT = {"id": "sha256:1", "lock_sha256": "x", "base": "b", "commit": "c", "created": "t"}
LOCAL = {"format": 1, "images": {"n150": BUILT}}
DESCRIPTORS = [path.read_bytes() for path in sorted(ROOT.glob("docker/mgd/*.textproto"))]
SYS = "sys/class/tenstorrent/tenstorrent!0"
TREE = {
    "visible": "0000:01:00.0,0",
    "dev/tenstorrent/0": "",
    "dev/tenstorrent/1": "",
    "dev/tenstorrent/by-id/x": "",
    f"{SYS}/tt_card_type": "n300 L\n",
    f"{SYS}/tt_serial": "0000",
    f"{SYS}/tt_fw_bundle_ver": "19.16.0\n",
    f"{SYS}/device/subsystem_device": "0x0040\n",
    f"{SYS}/device/iommu_group/type": "identity\n",
    "sys/module/tenstorrent/version": "2.11.0\n",
    "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages": "4\n",
    "proc/driver/tenstorrent/0/pids": "17\n0\n",
    "proc/mounts": "nodev /dev/hugepages-1G hugetlbfs rw,pagesize=1024M 0 0\n",
    "run/lock/recipes-0000:01:00.0.lock": '{"board": "n300", "pid": 1, "run": "a"}',
}

# --- requests ---------------------------------------------------------------------------------------------------------

CHAT = {
    "model": "m",
    "messages": [{"role": "system", "content": "Be brief."}, PARTS],
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "seed": 1,
    "stop": ["a", "b"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "n": 1,
    "tools": [],
    "logit_bias": {},
    "response_format": {"type": "text"},
    "metadata": {"a": "b"},
}
COMPLETION = {"prompt": "Once", "max_tokens": 3, "stop": "x", "repetition_penalty": 1.1, "echo": False, "suffix": ""}
