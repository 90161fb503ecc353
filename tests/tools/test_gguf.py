"""What a GGUF file and its Modelfile hold, and what is refused. What llama.cpp makes of it: tests/runs/test_gguf.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, TokenType, dequantize

from common.config.schema import Evaluation
from common.data.chat import ChatTokenizer
from common.data.rows import Message
from common.errors import UsageError
from common.model.weights import Weights
from tests.support.llamas import bpe, char, chat, smollm, with_bytes
from tools.cli.runs import GGUF_TYPES
from tools.export.gguf.file import TYPES, write_gguf
from tools.export.gguf.modelfile import modelfile
from tools.export.gguf.vocabulary import vocabulary_of

GREEDY = Evaluation(every=0, prompts=[])


def read(folder: Path, kind: str = "f32") -> GGUFReader:
    path = folder.parent / "x.gguf"
    write_gguf(path, folder, kind, "x")
    return GGUFReader(path)


def value(found: GGUFReader, key: str):
    field = found.fields[key]
    return field.contents()


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


# --- the model ------------------------------------------------------------------------------------------------------


def test_the_facts_are_those_of_config_json(tmp_path):
    base = chat(tmp_path / "base", tied=False)
    edit(base / "config.json", rope_theta=12345.0)
    found = read(base)

    assert value(found, "llama.context_length") == 256
    assert value(found, "llama.block_count") == 2
    assert (value(found, "llama.attention.head_count"), value(found, "llama.attention.head_count_kv")) == (2, 1)
    assert value(found, "llama.rope.dimension_count") == 32
    assert value(found, "llama.rope.freq_base") == 12345.0
    assert value(found, "tokenizer.chat_template") == (base / "chat_template.jinja").read_text()
    assert not value(found, "tokenizer.ggml.add_bos_token")


def test_transformers_5_keep_the_rotary_base_elsewhere(tmp_path):
    base = chat(tmp_path / "base", tied=False)
    edit(base / "config.json", rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 54321.0})

    assert value(read(base), "llama.rope.freq_base") == 54321.0


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_stored_once(tmp_path, tied):
    names = {tensor.name for tensor in read(chat(tmp_path / "base", tied)).tensors}

    assert ("output.weight" in names) is not tied
    assert len(names) == 2 + 2 * 9 + (not tied)


def test_rows_that_are_no_token_are_left_out(tmp_path):
    base = char(tmp_path / "base", tied=False)
    tokens = ChatTokenizer.load(base).vocab_size
    shapes = {tensor.name: tensor.shape.tolist() for tensor in read(base).tensors}

    assert tokens < 320
    assert shapes["token_embd.weight"] == shapes["output.weight"] == [64, tokens]


@pytest.mark.parametrize(("kind", "bound"), [("f32", 0), ("f16", 2**-11), ("q8_0", 1 / 250)])
def test_weights_are_rounded_as_the_type_says_and_norms_are_not(tmp_path, kind, bound):
    base = chat(tmp_path / "base", tied=True)
    weights = Weights([base / "model.safetensors"])
    stored = {tensor.name: tensor for tensor in read(base, kind).tensors}
    down, norm = stored["blk.1.ffn_down.weight"], stored["output_norm.weight"]
    wanted = weights["model.layers.1.mlp.down_proj.weight"]
    found = dequantize(down.data, down.tensor_type).reshape(wanted.shape)

    assert down.tensor_type == TYPES[kind][0]
    assert norm.tensor_type == GGMLQuantizationType.F32
    assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()


def test_the_words_of_the_command_are_the_types_there_are():
    assert tuple(TYPES) == GGUF_TYPES


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type=llama3"),
        ({"tie_word_embeddings": False}, r"lm_head.weight is missing"),
    ],
)
def test_another_llama_is_refused(tmp_path, change, says):
    base = chat(tmp_path / "base", tied=True)
    edit(base / "config.json", **change)
    with pytest.raises(UsageError, match=says):
        read(base)


def test_a_weight_that_f16_has_no_number_for_is_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    base = chat(tmp_path / "base", tied=True)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="beyond f16"):
        read(base, "f16")
    read(base, "f32")


# --- the tokenizer --------------------------------------------------------------------------------------------------


def test_each_kind_of_tokenizer_is_read_off_its_parts(tmp_path):
    found = {make.__name__: vocabulary_of(make(tmp_path / make.__name__, True)) for make in (chat, smollm, bpe, char)}

    assert {name: (one.model, one.words) for name, one in found.items()} == {
        "chat": ("gpt2", "gpt-2"),
        "smollm": ("gpt2", "smollm"),
        "bpe": ("gpt2", "gpt-2"),
        "char": ("llama", "default"),
    }
    assert found["chat"].types[3] == TokenType.CONTROL


def test_where_no_token_ends_an_answer_one_that_no_text_has_stands_for_it(tmp_path):
    """llama.cpp would else end at its own: token 11 of byte-level BPE, which is a comma, and 2 of the others."""
    by_bytes, by_characters = bpe(tmp_path / "bpe", True), char(tmp_path / "char", True)

    assert value(read(by_bytes), "tokenizer.ggml.eos_token_id") == ChatTokenizer.load(by_bytes).library.token_to_id("ÿ")
    assert value(read(by_characters), "tokenizer.ggml.eos_token_id") == ChatTokenizer.load(by_characters).never_ids[0]


def test_scores_follow_the_order_of_the_merges(tmp_path):
    base = with_bytes(tmp_path / "base", True)
    found = vocabulary_of(base)
    merges = json.loads((base / "tokenizer.json").read_text())["model"]["merges"]
    scores = dict(zip(found.tokens, found.scores, strict=True))

    assert found.prefix
    assert scores["".join(merges[0])] == -1
    assert scores["".join(merges[-1])] < scores["".join(merges[0])]
    assert found.types[found.tokens.index("<0x0A>")] == TokenType.BYTE


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("make", "change", "says"),
    [
        (bpe, {"pre_tokenizer": {"type": "Whitespace"}}, "pattern of words"),
        (bpe, {"normalizer": {"type": "NFC"}}, "pattern of words"),
        (with_bytes, {"pre_tokenizer": METASPACE}, "U\\+2581"),
        (char, {"pre_tokenizer": {"type": "Whitespace"}}, "list of words"),
        (bpe, {"model": {"type": "Unigram"}}, "Unigram"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path, make, change, says):
    base = make(tmp_path / "base", True)
    spec = json.loads((base / "tokenizer.json").read_text())
    if "model" in change:
        change = {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}}
        spec["pre_tokenizer"] = spec["decoder"] = None
    (base / "tokenizer.json").write_text(json.dumps(spec | change))
    with pytest.raises(UsageError, match=says) as raised:
        vocabulary_of(base)
    assert "tokenizer.json" in str(raised.value)
    assert "recipe serve" in str(raised.value)


# --- the Modelfile --------------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def fill_in(text: str, messages: list[Message]) -> str:
    """What Ollama makes of a Modelfile's TEMPLATE, of the few words of Go's language that ours have."""
    (template,) = re.findall(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    found = re.fullmatch(r"(.*?)\s*{{- range \.Messages }}(.*?){{ end }}(.*)", template, re.DOTALL)
    assert found, "one turn after the other"
    start, turn, end = found.groups()
    said = (turn.replace("{{ .Role }}", one.role).replace("{{ .Content }}", one.content) for one in messages)
    return start + "".join(said) + end


@pytest.mark.parametrize("template", [None, CHATML], ids=["zephyr", "chatml"])
@pytest.mark.parametrize("system", [None, "Be short."])
def test_ollama_s_template_writes_what_ours_does(tmp_path, template, system):
    base = chat(tmp_path / "base", True)
    if template:
        (base / "chat_template.jinja").write_text(template)
    tokenizer = ChatTokenizer.load(base)
    text = modelfile("x.gguf", tokenizer, GREEDY, 256, system, unknown=False)
    assert text
    asked = [Message("user", "One?"), Message("assistant", "1"), Message("user", " two\n")]
    given = [Message("system", system)] if system else []
    (before,) = re.findall(r'^SYSTEM """(.*?)"""', text, re.MULTILINE) or [""]
    # As Ollama has it: SYSTEM becomes the first message.
    by_ollama = [Message("system", before)] if before else []

    assert fill_in(text, [*by_ollama, *asked]) == tokenizer.render([*given, *asked], answer_next=True)
    assert 'PARAMETER stop """</s>"""' in text


def test_the_recipe_s_sampling_and_the_context_are_in_it(tmp_path):
    tokenizer = ChatTokenizer.load(char(tmp_path / "base", True))
    settings = Evaluation(every=0, prompts=[], temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.1)
    text = modelfile("x.gguf", tokenizer, settings, 64, None, unknown=True)
    assert text

    for line in ("num_ctx 64", "temperature 0.8", "top_k 40", "top_p 0.9", "repeat_penalty 1.1", "num_predict 64"):
        assert f"PARAMETER {line}\n" in text
    assert 'TEMPLATE """{{ .Prompt }}"""' in text
    assert "U+FFFD" in text
    assert "stop" not in text


def test_a_template_of_no_known_family_gets_no_modelfile(tmp_path):
    base = chat(tmp_path / "base", True)
    path = base / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|assistant|>\n", "<|assistant|> "))

    assert modelfile("x.gguf", ChatTokenizer.load(base), GREEDY, 256, None, unknown=False) is None
