"""`recipe base` against a Hub on this machine, over HTTP."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.model import bases, llama
from tests.doubles.hub import Handler, Hub, files_of, serve_hub
from tests.support.hub_files import in_shards
from tools import recipes
from tools.bases import lock, verbs
from tools.cli.main import recipe
from tools.launch.exit_codes import exit_code_of

pytest.importorskip("huggingface_hub")
RESOLVE = "/{repo_id}/resolve/{revision}/{filename}"  # a file's path on a Hub
REPO, TOKEN = "someone/tiny-llama.v1", "hf_secretsecretsecret"
COMMENT = "# ours: asked Anna about the licence\n"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as found:
        yield found


@pytest.fixture
def mine(tmp_path) -> Path:
    """A recipe that names no base of the Hub yet."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text("# Mine.\nmodel_config:\n  base: tinyllama-1.1b-chat\n")
    return folder


@pytest.fixture
def base(tmp_path, hub, monkeypatch, capsys) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `recipe base WORDS` here, with `hub` as its Hub and no token but the environment's.

    The Hub's library reads its environment once, at its import: what it made of it is set instead.
    """
    constants = pytest.importorskip("huggingface_hub.constants")

    def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        endpoint = environment.get("HF_ENDPOINT", hub.address)
        with monkeypatch.context() as patch:
            patch.setenv("RECIPES_HOME", str(tmp_path / "home"))
            for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(constants, "ENDPOINT", endpoint)
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + RESOLVE)
            patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
            patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
            patch.setattr(constants, "HF_HUB_OFFLINE", "HF_HUB_OFFLINE" in environment)
            capsys.readouterr()
            arguments = ["base", *map(str, words)]
            code = exit_code_of(lambda: recipe.main(arguments, standalone_mode=False), debug=False)
            said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, said.out, said.err)

    return run


def pinned(recipe: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((recipe / bases.OWN_LOCK).read_text())["bases"])


def config_with(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    return {**files, "config.json": json.dumps(json.loads(files["config.json"]) | changes).encode()}


# --- add ----------------------------------------------------------------------------------------------------------


def test_a_model_in_shards_is_pinned_without_downloading_its_weights(hub, base, mine, tiny_base):
    files = in_shards(files_of(tiny_base))
    commit = hub.push(REPO, {**files, "README.md": b"#", "flax_model.msgpack": b"1"}, card={"license": "llama3.2"})
    done = base("add", REPO, "--recipe", mine)
    assert done.returncode == 0, done.stderr
    entry = pinned(mine)[REPO]
    architecture = json.loads(files["config.json"])
    assert entry["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert (entry["repo"], entry["revision"], entry["licence"]) == (REPO, commit, "llama3.2")
    assert entry["parameters"] == llama.parameters(architecture)
    assert entry["chat_template"] == "chat_template.jinja"
    assert llama.shapes(entry["architecture"]) == llama.shapes(architecture)
    for word in (commit[:12], f"{entry['parameters']:,} parameters", "licence llama3.2", f"model_config.base: {REPO}"):
        assert word in done.stdout
    asked = [path for path in hub.asked if "resolve" in path and path.endswith(".safetensors")]
    assert len(asked) == 2, "each file's first bytes, once"
    assert all(commit in path for path in hub.asked if "resolve" in path)
    assert base("list").returncode == 0


def test_a_branch_becomes_the_commit_that_it_is_at(hub, base, mine, tiny_base):
    files = files_of(tiny_base)
    first = hub.push(REPO, files, branch="v1.0")
    hub.push(REPO, {**files, "generation_config.json": b"{}"})
    assert base("add", f"{REPO}@v1.0", "--recipe", mine).returncode == 0
    assert pinned(mine)[REPO]["revision"] == first


def test_a_pin_stays_until_it_is_replaced_and_comments_stay_with_it(hub, base, mine, tiny_base):
    files = files_of(tiny_base)
    first = hub.push(REPO, files)
    base("add", REPO, "--recipe", mine)
    path = mine / bases.OWN_LOCK
    path.write_text(path.read_text().replace("bases:\n", f"bases:\n  {COMMENT}"))
    before = path.read_text()
    again = base("add", REPO, "--recipe", mine)
    assert (again.returncode, path.read_text()) == (0, before)
    assert "is pinned there already" in again.stdout
    second = hub.push(REPO, {**files, "generation_config.json": b"{}"})
    refused = base("add", REPO, "--recipe", mine)
    assert (refused.returncode, path.read_text()) == (2, before)
    assert f"{first[:12]}, and {second[:12]} was asked for" in refused.stderr
    assert "--replace" in refused.stderr
    assert base("add", REPO, "--recipe", mine, "--replace").returncode == 0
    assert pinned(mine)[REPO]["revision"] == second
    assert COMMENT in path.read_text()


def test_what_is_written_into_the_lock_while_the_hub_is_asked_is_kept(hub, base, mine, tiny_base):
    hub.push(REPO, files_of(tiny_base))
    path = mine / bases.OWN_LOCK
    path.write_text(lock.HEAD + "bases:\n  a/b: {source: hub, revision: '0'}\n")

    def edit(asked: str) -> None:
        if asked.endswith("config.json") and COMMENT not in path.read_text():
            path.write_text(path.read_text() + COMMENT + "  c/d: {source: hub, revision: '1'}\n")

    hub.on_request = edit
    assert base("add", REPO, "--recipe", mine).returncode == 0
    assert set(pinned(mine)) == {"a/b", "c/d", REPO}
    assert COMMENT in path.read_text()


def test_a_lock_with_conflict_marks_is_refused_before_the_hub_is_asked(hub, base, mine, tiny_base):
    hub.push(REPO, files_of(tiny_base))
    (mine / bases.OWN_LOCK).write_text("<<<<<<< ours\nformat: 1\n")
    done = base("add", REPO, "--recipe", mine)
    assert (done.returncode, hub.asked) == (4, [])
    assert "models.lock.yaml cannot be read" in done.stderr
    assert "line 2, column 7" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_follows_of_no_template_no_licence_and_of_boards_is_said(hub, base, mine, tiny_base):
    files = config_with(files_of(tiny_base), rms_norm_eps=1e-6)
    del files["chat_template.jinja"]
    hub.push(REPO, files)
    done = base("add", REPO, "--recipe", mine)
    assert done.returncode == 0, done.stderr
    assert pinned(mine)[REPO]["chat_template"] is None
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert [any(word in note for note in notes) for word in ("no chat template", "no licence", "rms_norm_eps")] == [
        True
    ] * 3


WEIGHTS = ("model.safetensors",)


def without(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name not in names}


def with_a_bias(files: dict[str, bytes]) -> dict[str, bytes]:
    from safetensors.numpy import load, save

    tensors = load(files["model.safetensors"])
    bias = tensors["model.norm.weight"]
    return {**files, "model.safetensors": save({**tensors, "model.layers.0.self_attn.q_proj.bias": bias})}


REFUSED: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "another family": (
        lambda files: config_with(files, model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
        "it is a qwen2 model (Qwen2ForCausalLM)",
    ),
    "RoPE": (lambda files: config_with(files, rope_scaling={"rope_type": "yarn", "factor": 4.0}), "RoPE of type yarn"),
    "biases and activation": (
        lambda files: config_with(files, attention_bias=True, hidden_act="gelu"),
        "projections with biases; the activation gelu",
    ),
    "biases that no config names": (with_a_bias, "model.layers.0.self_attn.q_proj.bias is unknown"),
    "another shape": (lambda files: config_with(files, intermediate_size=128), "expected (128, 64)"),
    "quantised": (lambda files: config_with(files, quantization_config={"bits": 4}), "quantised weights"),
    "no sizes": (lambda files: {**files, "config.json": b'{"model_type": "llama"}'}, "has no number for vocab_size"),
    "pickled": (
        lambda files: {**without(files, *WEIGHTS), "pytorch_model.bin": b"PK"},
        "its weights are pickled (pytorch_model.bin)",
    ),
    "no weights": (lambda files: without(files, *WEIGHTS), "neither model.safetensors nor"),
    "no tokenizer.json": (
        lambda files: {**without(files, "tokenizer.json"), "tokenizer.model": b"1"},
        "it has no tokenizer.json",
    ),
    "GGUF alone": (lambda _: {"tiny.gguf": b"GGUF"}, "it has GGUF files"),
    "an adapter": (lambda _: {"adapter_config.json": b"{}", "adapter_model.safetensors": b"1"}, "a PEFT adapter"),
    "a shard that is not there": (
        lambda files: without(in_shards(files), "model-00002-of-00002.safetensors"),
        "names model-00002-of-00002.safetensors, which the repository lacks",
    ),
    "a shard outside": (
        lambda files: {
            **without(files, *WEIGHTS),
            "../x.safetensors": b"1",
            "model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}',
        },
        "names ../x.safetensors",
    ),
    "no safetensors": (
        lambda files: {**files, "model.safetensors": b"<html>"},
        "model.safetensors is no safetensors file",
    ),
    "a header of other JSON": (
        lambda files: {**files, "model.safetensors": (2).to_bytes(8, "little") + b"[]"},
        "model.safetensors is no safetensors file",
    ),
    "nested without end": (lambda files: {**files, "config.json": b"[" * 100_000}, "config.json cannot be read"),
    "a page in its place": (lambda files: {**files, "config.json": b"<html>"}, "config.json cannot be read"),
    "another family, oddly": (
        lambda files: config_with(files, model_type="qwen2", architectures=[7]),
        "it is a qwen2 model (7)",
    ),
    "no numbers": (
        lambda files: config_with(files, hidden_size=True, num_attention_heads=0, head_dim="x", rms_norm_eps="y"),
        "no number for hidden_size, num_attention_heads, head_dim, rms_norm_eps",
    ),
    "RoPE as a list": (lambda files: config_with(files, rope_scaling=[1]), "RoPE of type one for each kind of layer"),
    "RoPE by layer": (
        lambda files: config_with(files, rope_parameters={"full_attention": {"rope_type": "yarn"}}),
        "RoPE of type one for each kind of layer",
    ),
    "a million layers": (lambda files: config_with(files, num_hidden_layers=10**9), "1000000000 layers, and its"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_these_recipes_cannot_train_is_one_message(hub, base, mine, tiny_base, case):
    change, message = REFUSED[case]
    hub.push(REPO, change(files_of(tiny_base)))
    done = base("add", REPO, "--recipe", mine)
    assert done.returncode == 4, done.stderr
    assert message in done.stderr.splitlines()[-3]
    assert REPO in done.stderr.splitlines()[-2]
    assert done.stderr.splitlines()[-1].startswith("  to do: ")
    assert "Traceback" not in done.stderr
    assert not (mine / bases.OWN_LOCK).exists()


@pytest.mark.parametrize(
    ("changes", "file", "message"),
    [
        ({"sha": "../../mine"}, {}, "a commit '../../mine'"),
        ({}, {"size": "much"}, "'config.json' with the size 'much'"),
        ({}, {"lfs": {"sha256": "00\n", "size": 1, "pointerSize": 1}}, r"'config.json' with the sha256 '00\n'"),
    ],
)
def test_an_answer_that_no_hub_gives_is_not_written_into_the_lock(
    hub, base, mine, tiny_base, monkeypatch, changes, file, message
):
    facts = Handler.facts

    def changed(*arguments: Any) -> dict[str, Any]:
        found = facts(*arguments) | changes
        next(entry for entry in found["siblings"] if entry["rfilename"] == "config.json").update(file)
        return found

    hub.push(REPO, files_of(tiny_base))
    monkeypatch.setattr(Handler, "facts", changed)
    done = base("add", REPO, "--recipe", mine)
    assert done.returncode == 4, done.stderr
    assert f"the Hub's answer about {REPO} is none: {message}" in done.stderr
    assert not (mine / bases.OWN_LOCK).exists()


@pytest.mark.parametrize("card", [["mit"], {"license": ["mit", "\x1b[2Jx"]}])
def test_an_odd_card_does_not_keep_a_model_from_being_pinned(hub, base, mine, tiny_base, card):
    hub.push(REPO, files_of(tiny_base), card=card)
    done = base("add", REPO, "--recipe", mine)
    assert done.returncode == 0, done.stderr
    assert pinned(mine)[REPO]["licence"] == ("mit,  [2Jx" if isinstance(card, dict) else "unknown")


@pytest.mark.parametrize("wanted", ["tiny", "a/b/c", "../mine", "https://huggingface.co/a/b", "-a/b"])
def test_what_is_no_name_on_the_hub_is_refused_without_asking_it(hub, base, mine, wanted):
    done = base("add", "--recipe", mine, "--", wanted)
    assert (done.returncode, hub.asked) == (2, [])
    assert "owner/name" in done.stderr


# --- what the Hub refuses -----------------------------------------------------------------------------------------


def refusal(done: subprocess.CompletedProcess[str], recipe: Path) -> str:
    """The message of a refused add: one, without a token in it, and nothing written."""
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert not (recipe / bases.OWN_LOCK).exists()
    return "\n".join(done.stderr.splitlines()[-3:])


def test_a_gated_model_without_a_token_names_the_page_and_the_variable(hub, base, mine, tiny_base):
    hub.push(REPO, files_of(tiny_base), gated=True)
    message = refusal(base("add", REPO, "--recipe", mine), mine)
    assert "is gated: its owner wants its terms accepted, and no token was sent" in message
    assert f"{hub.address}/{REPO}" in message
    assert "HF_TOKEN" in message


def test_a_gated_model_whose_terms_this_account_has_not_accepted(hub, base, mine, tiny_base):
    hub.push(REPO, files_of(tiny_base), gated=True)
    hub.readers[TOKEN] = set()
    message = refusal(base("add", REPO, "--recipe", mine, HF_TOKEN=TOKEN), mine)
    assert "the account of your token has no access" in message
    assert f"{hub.address}/{REPO}" in message


def test_a_gated_model_with_access_is_pinned_and_the_token_is_written_nowhere(hub, base, mine, tiny_base, tmp_path):
    hub.push(REPO, files_of(tiny_base), gated=True)
    hub.readers[TOKEN] = {REPO}
    done = base("add", REPO, "--recipe", mine, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_token_that_the_hub_does_not_know(hub, base, mine, tiny_base):
    hub.push(REPO, files_of(tiny_base))
    message = refusal(base("add", REPO, "--recipe", mine, HF_TOKEN=TOKEN), mine)
    assert "the Hub refuses your token" in message
    assert "settings/tokens" in message


def test_no_such_model_and_no_such_revision(hub, base, mine, tiny_base):
    assert f"the Hub has no model {REPO}" in refusal(base("add", REPO, "--recipe", mine), mine)
    hub.push(REPO, files_of(tiny_base))
    message = refusal(base("add", f"{REPO}@v9", "--recipe", mine), mine)
    assert f"{REPO} has no revision 'v9'" in message


def test_no_network_and_offline_on_purpose(base, mine):
    closed = base("add", REPO, "--recipe", mine, HF_ENDPOINT="http://127.0.0.1:9")
    assert "check the network" in refusal(closed, mine)
    offline = base("add", REPO, "--recipe", mine, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in refusal(offline, mine)


# --- remove, check, list ------------------------------------------------------------------------------------------


def test_what_a_config_names_is_not_removed(hub, base, mine, tiny_base):
    hub.push(REPO, files_of(tiny_base))
    base("add", REPO, "--recipe", mine)
    (mine / "hw").mkdir()
    (mine / "hw/cpu.yaml").write_text(f"model_config:\n  base: {REPO}\n")
    refused = base("remove", REPO, "--recipe", mine)
    assert refused.returncode == 2
    assert "hw/cpu.yaml" in refused.stderr
    assert "config.yaml" not in refused.stderr
    (mine / "hw/cpu.yaml").unlink()
    assert base("remove", REPO, "--recipe", mine).returncode == 0
    assert not (mine / bases.OWN_LOCK).exists(), "it was the only pin"
    assert "does not pin" in base("remove", REPO, "--recipe", mine).stderr


def test_a_pin_that_lost_a_line_is_named_with_what_pins_it_anew(hub, base, mine, tiny_base):
    hub.push(REPO, files_of(tiny_base))
    path = mine / bases.OWN_LOCK
    path.write_text(f"{lock.HEAD}bases:\n  {REPO}: {{source: hub, repo: {REPO}}}\n")
    done = base("check", "--recipe", mine)
    assert (done.returncode, f"the pin of {REPO} has no revision, files," in done.stderr) == (4, True), done.stderr
    assert f"recipe base add {REPO} --recipe mine --replace" in done.stderr
    assert base("remove", REPO, "--recipe", mine).returncode == 0
    path.write_text(f"{lock.HEAD}bases:\n  {REPO}: {{source: hub, repo: {REPO}}}\n")
    assert base("add", REPO, "--recipe", mine, "--replace").returncode == 0
    assert base("check", "--recipe", mine).returncode == 0


def test_one_of_two_pins_is_removed_and_the_rest_of_the_file_stays(mine):
    path = mine / bases.OWN_LOCK
    path.write_text(f"{lock.HEAD}bases:\n  a/b.c: {{revision: '0'}}\n  {COMMENT}  d/e: {{revision: '1'}}\n")
    lock.take_out(mine, "a/b.c")
    assert path.read_text() == f"{lock.HEAD}bases:\n  {COMMENT}  d/e: {{revision: '1'}}\n"


def test_check_tells_what_is_here_damaged_moved_changed_and_gone(hub, base, mine, tiny_base, tmp_path):
    files = files_of(tiny_base)
    commit = hub.push(REPO, files)
    base("add", REPO, "--recipe", mine)
    fresh = base("check", "--recipe", mine)
    assert fresh.returncode == 0
    assert "not on this machine yet" in fresh.stdout
    assert f"the Hub has {commit[:12]} with these files; main is there, too" in fresh.stdout
    moved = hub.push(REPO, {**files, "generation_config.json": b"{}"})
    assert f"main has moved on to {moved[:12]}" in base("check", "--recipe", mine).stdout
    offline = base("check", "--recipe", mine, HF_HUB_OFFLINE="1")
    assert (offline.returncode, "the Hub was not asked" in offline.stdout) == (0, True)
    hub.repositories[REPO].commits[commit]["model.safetensors"] += b"1"
    changed = base("check", "--recipe", mine)
    assert changed.returncode == 6
    assert f"the Hub has other files at {commit[:12]}: model.safetensors" in changed.stdout
    folder = bases.folder_of(REPO, pinned(mine)[REPO])
    cached = tmp_path / "home/bases" / folder.name
    cached.mkdir(parents=True)
    for name in pinned(mine)[REPO]["files"]:
        (cached / name).write_bytes(files[name])
    (cached / "base.json").write_text(json.dumps({"format": 1, "sha256": pinned(mine)[REPO]["files"]}))
    assert "every file has its sha256" in base("check", "--recipe", mine).stdout
    (cached / "tokenizer.json").write_bytes(b"{}")
    del hub.repositories[REPO]
    gone = base("check", "--recipe", mine)
    assert gone.returncode == 6
    assert "the base model is damaged: tokenizer.json" in gone.stdout
    assert f"the Hub has no model {REPO}" in gone.stdout


def test_the_list_says_who_pins_and_who_names(hub, base, mine, tiny_base, monkeypatch):
    hub.push(REPO, files_of(tiny_base), card={"license": "other", "license_name": "ours-1.0"})
    base("add", REPO, "--recipe", mine)
    (mine / "presets").mkdir()
    (mine / "presets/small.yaml").write_text(f"model_config:\n  base: {REPO}\n")
    monkeypatch.setattr(recipes, "RECIPES", mine.parent)
    rows = {row.name: row for row in verbs.listed()}
    assert set(rows) == {*bases.locked(), REPO}
    assert rows[REPO].used_by == {"mine": ["presets/small.yaml"]}
    assert rows["tinyllama-1.1b-chat"].used_by == {"mine": ["config.yaml"]}
    said: list[str] = []
    verbs.print_list(False, said.append)
    line = next(line for line in said if line.startswith(REPO))
    assert line.split("  ")[-1] == "mine (presets/small.yaml)"
    assert "ours-1.0" in line
    verbs.print_list(True, said.append)
    assert [row["pinned_by"] for row in json.loads(said[-1])] == [None, None, "mine"]
