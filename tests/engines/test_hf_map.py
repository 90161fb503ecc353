"""Every element of every tensor has a value of its own, so that a row in the wrong place is seen."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import pytest

from common.config.schema import Lora
from common.errors import MachineError, UsageError
from common.model.llama import PREFIX
from engines.ttml.hf_map import (
    LINEARS,
    Entry,
    check_names,
    linears_of,
    lora_linears,
    map_parameters,
    to_halves,
    to_pairs,
)

ARCHITECTURE = {
    "vocab_size": 70,  # no multiple of 32: padded to 96
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
TINYLLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
UNFUSED = ("attention/q_linear", "attention/kv_linear", "attention/out_linear", "mlp/w1", "mlp/w2", "mlp/w3")
FUSED = ("attention/qkv_linear", "attention/out_linear", "mlp/w_gate_up", "mlp/w2")
FUSED_QKV = ("attention/qkv_linear", "attention/out_linear", "mlp/w1", "mlp/w2", "mlp/w3")
FUSED_MLP = ("attention/q_linear", "attention/kv_linear", "attention/out_linear", "mlp/w_gate_up", "mlp/w2")
BUILDS = pytest.mark.parametrize("linears", [UNFUSED, FUSED, FUSED_QKV, FUSED_MLP])


def ttml_shapes(architecture: dict, linears: tuple[str, ...], rank: int = 0, root: str = "Llama") -> dict:
    """What a build reports: written out here a second time, in no particular order."""
    pad, h, ffn = (
        -(-architecture["vocab_size"] // 32) * 32,
        architecture["hidden_size"],
        architecture["intermediate_size"],
    )
    kv = h // architecture["num_attention_heads"] * architecture["num_key_value_heads"]
    rows = {
        "attention/q_linear": (h, h),
        "attention/kv_linear": (2 * kv, h),
        "attention/qkv_linear": (h + 2 * kv, h),
        "attention/out_linear": (h, h),
        "mlp/w1": (ffn, h),
        "mlp/w3": (ffn, h),
        "mlp/w_gate_up": (2 * ffn, h),
        "mlp/w2": (h, ffn),
    }
    shapes = {"fc/weight": (1, 1, pad, h), "ln_fc/gamma": (1, 1, 1, h)}
    if not architecture["tie_word_embeddings"]:
        shapes["tok_emb/weight"] = (1, 1, pad, h)
    for layer in reversed(range(architecture["num_hidden_layers"])):
        for linear in linears:
            out, columns = rows[linear]
            shapes[f"blocks/{layer}/{linear}/weight"] = (1, 1, out, columns)
            if rank:
                shapes[f"blocks/{layer}/{linear}/lora_A"] = (1, 1, rank, columns)
                shapes[f"blocks/{layer}/{linear}/lora_B"] = (1, 1, out, rank)
        for norm in ("attention_norm", "mlp_norm"):
            shapes[f"blocks/{layer}/{norm}/gamma"] = (1, 1, 1, h)
    return {f"{root}/{name}": shape for name, shape in shapes.items()}


def hf_shapes(architecture: dict) -> dict[str, tuple[int, ...]]:
    h, ffn = architecture["hidden_size"], architecture["intermediate_size"]
    kv = h // architecture["num_attention_heads"] * architecture["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (architecture["vocab_size"], h),
        "model.norm.weight": (h,),
    }
    if not architecture["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (architecture["vocab_size"], h)
    for layer in range(architecture["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (n, h) for p, n in {"q": h, "k": kv, "v": kv, "o": h}.items()}
        shapes |= {f"{at}.mlp.{p}_proj.weight": (ffn, h) for p in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (h, ffn)
        shapes |= {f"{at}.{norm}.weight": (h,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return shapes


def distinct(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """No value twice in all the tensors together."""
    tensors, start = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        tensors[name] = np.arange(start, start + size, dtype=np.float64).reshape(shape)
        start += size
    return tensors


def both_ways(entries: Mapping[str, Entry], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Everything into ttml's layout and back."""
    back: dict[str, np.ndarray] = {}
    for entry in entries.values():
        back.update(entry.to_hf(entry.from_hf(tensors, np.float64)))
    return back


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].shape == b[name].shape, name
        assert np.array_equal(a[name], b[name]), name


# --- the order of rows ----------------------------------------------------------------------------------------------


def test_a_head_s_rows_are_paired_and_halved_again():
    rows = np.arange(16).reshape(16, 1)  # two heads of eight
    assert to_pairs(rows, 2).ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert np.array_equal(to_halves(to_pairs(rows, 2), 2), rows)
    assert not np.array_equal(to_pairs(to_pairs(rows, 2), 2), rows), "it is no inverse of itself"


def test_attention_scores_are_those_of_hugging_face():
    """Rotating neighbours after `to_pairs` gives the scores of rotating halves: what the order is for."""
    rng, d, positions = np.random.default_rng(0), 8, np.arange(5)
    wq, wk, x = rng.standard_normal((d, 6)), rng.standard_normal((d, 6)), rng.standard_normal((5, 6))
    angle = positions[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    turn = np.exp(1j * angle)

    def halves(w: np.ndarray) -> np.ndarray:
        y = x @ w.T
        z = (y[:, : d // 2] + 1j * y[:, d // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    def neighbours(w: np.ndarray) -> np.ndarray:
        y = x @ w.T
        z = (y[:, 0::2] + 1j * y[:, 1::2]) * turn
        return np.stack([z.real, z.imag], axis=2).reshape(5, d)

    expected = halves(wq) @ halves(wk).T
    assert neighbours(to_pairs(wq, 1)) @ neighbours(to_pairs(wk, 1)).T == pytest.approx(expected)
    assert np.abs(neighbours(wq) @ neighbours(wk).T - expected).max() > 0.1, "unpermuted they differ"


@BUILDS
def test_rows_of_fused_layers_stand_where_ttml_has_them(linears):
    tensors = distinct(hf_shapes(ARCHITECTURE))
    entries = map_parameters(ttml_shapes(ARCHITECTURE, linears), ARCHITECTURE)
    at = "model.layers.1.self_attn"
    q, k, v = (tensors[f"{at}.{p}_proj.weight"] for p in "qkv")
    pairs = {"q": to_pairs(q, 4), "k": to_pairs(k, 2), "v": v}
    expected = {
        "attention/q_linear": [pairs["q"]],
        "attention/kv_linear": [pairs["k"], v],
        "attention/qkv_linear": [pairs["q"], pairs["k"], v],
        "mlp/w_gate_up": [tensors[f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up")],
        "mlp/w1": [tensors["model.layers.1.mlp.gate_proj.weight"]],
        "mlp/w3": [tensors["model.layers.1.mlp.up_proj.weight"]],
    }
    for linear in set(linears) & set(expected):
        found = entries[f"Llama/blocks/1/{linear}/weight"].from_hf(tensors, np.float64)
        assert found.flags.c_contiguous
        assert np.array_equal(found, np.concatenate(expected[linear])[None, None]), linear


@BUILDS
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_tensor_comes_back_as_it_went(linears, tied):
    architecture = ARCHITECTURE | {"tie_word_embeddings": tied}
    tensors = distinct(hf_shapes(architecture))
    entries = map_parameters(ttml_shapes(architecture, linears, root="Renamed"), architecture)
    same(both_ways(entries, tensors), tensors)


def test_the_vocabulary_is_padded_with_zero_rows_that_do_not_come_back():
    tensors = distinct(hf_shapes(ARCHITECTURE))
    entry = map_parameters(ttml_shapes(ARCHITECTURE, FUSED), ARCHITECTURE)["Llama/fc/weight"]
    array = entry.from_hf(tensors, np.float64)
    assert array.shape == (1, 1, 96, 64)
    assert not array[0, 0, 70:].any()
    assert dict(entry.to_hf(array))["lm_head.weight"].shape == (70, 64)


def test_tied_embeddings_may_have_either_name():
    architecture = ARCHITECTURE | {"tie_word_embeddings": True}
    shapes = ttml_shapes(architecture, FUSED)
    for name in ("Llama/fc/weight", "Llama/tok_emb/weight"):
        renamed = {name if "fc/weight" in old else old: shape for old, shape in shapes.items()}
        assert map_parameters(renamed, architecture)[name].parts[0].name == "model.embed_tokens.weight"


def test_values_are_rounded_to_nearest_even_when_they_are_narrowed():
    entry = map_parameters(ttml_shapes(ARCHITECTURE, FUSED), ARCHITECTURE)["Llama/ln_fc/gamma"]
    tensors = {"model.norm.weight": np.full(64, 1 + 2**-8 + 2**-20, np.float32)}
    assert entry.from_hf(tensors, ml_dtypes.bfloat16).astype(np.float32)[0, 0, 0, 0] == np.float32(1 + 2**-7)


# --- a real base ----------------------------------------------------------------------------------------------------


@BUILDS
def test_every_tensor_of_tinyllama_is_mapped_once(linears):
    hf = hf_shapes(TINYLLAMA)
    assert sum(math.prod(shape) for shape in hf.values()) == 1_100_048_384
    assert len(hf) == 201
    check_names(hf, TINYLLAMA)
    entries = map_parameters(ttml_shapes(TINYLLAMA, linears), TINYLLAMA)
    parts = [part for entry in entries.values() for part in entry.parts]
    assert sorted((part.name, part.shape) for part in parts) == sorted(hf.items())


class Lazy(Mapping[str, np.ndarray]):
    """Tensors made when they are read, and kept by nobody."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def __getitem__(self, name: str) -> np.ndarray:
        return np.zeros(self.shapes[name], np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_one_tensor_is_in_flight(dtype):
    """Two layers of the 1.1B shape, both ways: at most 2.5 times the largest tensor in fp32 (262 MB) at any moment."""
    architecture = TINYLLAMA | {"num_hidden_layers": 2}
    source = Lazy(hf_shapes(architecture))
    entries = map_parameters(ttml_shapes(architecture, FUSED), architecture)
    tracemalloc.start()
    try:
        for entry in entries.values():
            for _name, _array in entry.to_hf(entry.from_hf(source, dtype)):
                pass
            del _array
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 2.5 * 32000 * 2048 * 4


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_a_build_of_another_layout_is_refused():
    shapes = ttml_shapes(ARCHITECTURE, FUSED)
    with pytest.raises(MachineError, match="do not know: Llama/blocks/0/attention/gate"):
        map_parameters({**shapes, "Llama/blocks/0/attention/gate/weight": (1, 1, 64, 64)}, ARCHITECTURE)
    with pytest.raises(MachineError, match=r"ln_fc/gamma is \(1, 1, 1, 32\), expected \(1, 1, 1, 64\)"):
        map_parameters({**shapes, "Llama/ln_fc/gamma": (1, 1, 1, 32)}, ARCHITECTURE)
    with pytest.raises(MachineError, match=r"down_proj.weight has no place in it"):
        map_parameters({n: s for n, s in shapes.items() if "blocks/1/mlp/w2" not in n}, ARCHITECTURE)
    with pytest.raises(MachineError, match=r"gate_proj.weight is in it 2 times"):
        map_parameters(shapes | ttml_shapes(ARCHITECTURE, UNFUSED), ARCHITECTURE)
    with pytest.raises(MachineError, match="an output head of its own"):
        map_parameters(shapes, ARCHITECTURE | {"tie_word_embeddings": True})
    with pytest.raises(MachineError, match=r"lm_head.weight has no place"):
        map_parameters({n: s for n, s in shapes.items() if "tok_emb" not in n}, ARCHITECTURE)


def test_weights_that_do_not_fit_are_named():
    tensors = distinct(hf_shapes(ARCHITECTURE))
    with pytest.raises(MachineError, match=r"lm_head.weight is missing; surplus is unknown"):
        check_names((tensors.keys() - {"lm_head.weight"}) | {"surplus"}, ARCHITECTURE)
    check_names(tensors, ARCHITECTURE | {"tie_word_embeddings": True})  # a tied head may be stored
    entry = map_parameters(ttml_shapes(ARCHITECTURE, FUSED), ARCHITECTURE)["Llama/ln_fc/gamma"]
    with pytest.raises(MachineError, match=r"model.norm.weight is \(63,\), expected \(64,\)"):
        entry.from_hf({"model.norm.weight": np.ones(63)}, np.float32)


# --- adapters -------------------------------------------------------------------------------------------------------


def adapter(linears: tuple[str, ...], rank: int = 4) -> tuple[dict[str, Entry], dict[str, np.ndarray]]:
    """The entries of a build with an adapter on every layer, and a PEFT adapter tied as that build ties."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (out, columns) in ((n, s) for n, s in hf_shapes(ARCHITECTURE).items() if "_proj" in n):
        at = PREFIX + name.removesuffix(".weight")
        shapes |= {f"{at}.lora_A.weight": (rank, columns), f"{at}.lora_B.weight": (out, rank)}
    tensors = distinct(shapes)
    for linear in linears:
        first, *others = LINEARS[linear]
        for name in [n for n in tensors if f".{first}.lora_A" in n]:
            tensors |= {name.replace(first, other): tensors[name] for other in others}
    entries = map_parameters(ttml_shapes(ARCHITECTURE, linears, rank), ARCHITECTURE)
    return {name: entry for name, entry in entries.items() if "lora_" in name}, tensors


@BUILDS
def test_an_adapter_goes_to_peft_and_back(linears):
    entries, tensors = adapter(linears)
    same(both_ways(entries, tensors), tensors)


@BUILDS
def test_an_adapter_has_the_effect_of_its_peft_form(linears):
    """B A of each ttml layer, brought to Hugging Face's rows, is each projection's own B A."""
    entries, tensors = adapter(linears)
    for name, a in entries.items():
        if not name.endswith("lora_A"):
            continue
        b = entries[name.replace("lora_A", "lora_B")]
        product = b.from_hf(tensors, np.float64)[0, 0] @ a.from_hf(tensors, np.float64)[0, 0]
        weight = map_parameters(ttml_shapes(ARCHITECTURE, linears), ARCHITECTURE)[name.replace("lora_A", "weight")]
        for hf, update in weight.to_hf(product[None, None]):
            at = PREFIX + hf.removesuffix(".weight")
            assert np.array_equal(update, tensors[f"{at}.lora_B.weight"] @ tensors[f"{at}.lora_A.weight"]), hf


def test_an_adapter_tied_otherwise_is_refused():
    entries, _ = adapter(FUSED)
    _, free = adapter(UNFUSED)
    with pytest.raises(MachineError, match="another tying of A") as caught:
        both_ways(entries, free)
    assert "tie_groups" in str(caught.value)


def test_moments_of_an_adapter_are_named_as_pytorch_names_parameters():
    entries, _ = adapter(FUSED)
    names = {
        part.name for n, e in entries.items() if "blocks/0/attention/qkv" in n for part in e.under_optimizer().parts
    }
    at = "model.layers.0.self_attn"
    assert names == {f"{at}.q_proj.lora_A", *(f"{at}.{p}_proj.lora_B" for p in "qkv")}, "a shared A once, by its first"
    full = map_parameters(ttml_shapes(ARCHITECTURE, FUSED), ARCHITECTURE)
    assert all(entry.under_optimizer() == entry for entry in full.values())


@pytest.mark.parametrize(
    ("linears", "ties"),
    [
        (FUSED, [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
        (UNFUSED, [["k_proj", "v_proj"]]),
        (FUSED_QKV, [["v_proj", "q_proj", "k_proj"]]),
        (FUSED_MLP, [["k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
    ],
)
def test_adapters_go_where_the_config_s_ties_are_the_build_s(linears, ties):
    found = linears_of(map_parameters(ttml_shapes(ARCHITECTURE, linears), ARCHITECTURE))
    assert found == sorted(linears)
    assert lora_linears(found, Lora(tie_groups=ties)) == sorted(linears)
    others: list[list] = [[], [["q_proj", "k_proj"]], [["v_proj", "q_proj"], ["gate_proj", "up_proj"]]]
    for other in others:
        with pytest.raises(UsageError, match="tie_groups") as caught:
            lora_linears(found, Lora(tie_groups=other))
        assert "set model_config.lora.tie_groups=" in str(caught.value)


def test_only_targeted_layers_count():
    assert lora_linears(FUSED, Lora(tie_groups=[], target_modules=["o_proj", "down_proj"])) == [
        "attention/out_linear",
        "mlp/w2",
    ]
    with pytest.raises(UsageError, match="target \\['k_proj', 'v_proj'\\] too"):
        lora_linears(FUSED, Lora(tie_groups=[], target_modules=["q_proj"]))
    assert lora_linears(UNFUSED, Lora(tie_groups=[], target_modules=["q_proj"])) == ["attention/q_linear"]


def test_a_shared_a_is_drawn_under_the_config_s_name():
    lora = Lora(tie_groups=[["v_proj", "k_proj"]])
    assert lora.key_of("k_proj") == "v_proj+k_proj"
    assert lora.key_of("o_proj") == "o_proj"
