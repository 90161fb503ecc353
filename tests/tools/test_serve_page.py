"""The page at `/`: how it is sent, and what it is told of the models. What it does: tests/browser/test_chat_page.py."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any, cast

from starlette.testclient import TestClient

from common.data.chat import ChatTokenizer
from tests.support.run_folders import write_lines, write_run
from tools.generate.chat import Speaker, folder_config
from tools.runs.folder import read_run
from tools.serve.app import make_app
from tools.serve.batcher import Batcher, Scheduler
from tools.serve.model import Model
from tools.serve.service import Service
from tools.serve.target import EXAMPLE, EXAMPLES, Target


class Nothing:
    """Slots in which nobody is answered."""

    count, context = 1, 256


def served(base: Path, key: str | None = None, ready: bool = True) -> TestClient:
    """A client of a server with a model "fox" and its untuned one, "base"."""
    changes = {"eval.temperature": 0.5, "eval.max_new_tokens": 9, "data.system_prompt": "Be brief."}
    tokenizer = ChatTokenizer.load(base)
    speaker = Speaker("tiny", cast(Any, None), tokenizer, folder_config(base).with_values(**changes), 256)
    service = Service(print, print, key, ("localhost",))
    if ready:
        schedulers = [Scheduler(cast(Any, Nothing())) for _ in range(2)]
        tuned, untuned = Model("fox", speaker, schedulers[0], "base", ["Why?"]), Model("base", speaker, schedulers[1])
        service.models = {model.name: model for model in (tuned, untuned)}
        service.batcher = Batcher(schedulers, 1, print)
    return TestClient(make_app(service), base_url="http://localhost")


def test_only_its_own_script_and_style_run_and_it_asks_nobody_else(tiny_base):
    response = served(tiny_base).get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        assert len(text) > 1000
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert "unsafe" not in str(policy)
    assert policy["require-trusted-types-for"] == "'script'"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
    assert re.findall(r'(?:src|href|action)="(?!data:)', response.text) == []
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", response.text) == []


def test_it_needs_no_key_and_says_that_one_is_needed(tiny_base):
    with_key, without = served(tiny_base, key="s3cret"), served(tiny_base)
    assert "<body data-key>" in with_key.get("/").text
    assert "s3cret" not in with_key.get("/").text
    assert "fox" not in with_key.get("/").text, "which models there are is for those who have the key"
    assert with_key.get("/v1/models").status_code == 401
    assert with_key.post("/", json={}).status_code == 405
    assert "<body>" in without.get("/").text


def test_a_foreign_host_gets_no_page(tiny_base):
    assert served(tiny_base).get("/", headers={"host": "evil.example"}).status_code == 403


def test_while_the_weights_are_read_it_looks_again(tiny_base):
    text = served(tiny_base, ready=False).get("/").text
    assert '<meta http-equiv="refresh" content="1">' in text
    assert "Reading the weights" in text
    assert "<script>" not in text
    assert "refresh" not in re.sub("(?s)<script>.*</script>", "", served(tiny_base).get("/").text)


def test_the_models_say_what_they_do_unless_a_request_says_otherwise(tiny_base):
    tuned, untuned = served(tiny_base).get("/v1/models").json()["data"]
    defaults = {"temperature": 0.5, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "max_tokens": 9}
    assert tuned["defaults"] == defaults
    assert (tuned["id"], tuned["parent"], untuned["id"], untuned["parent"]) == ("fox", "base", "base", None)
    assert (tuned["chat"], tuned["max_model_len"], tuned["system_prompt"]) == (True, 256, "Be brief.")
    assert tuned["examples"] == ["Why?"]
    assert served(tiny_base).get("/v1/models/base").json() == untuned


def test_the_examples_are_prompts_that_the_run_was_asked(tmp_path):
    folder = write_run(tmp_path, "20260101T000000Z-whole-cpu-0000")
    run = read_run(folder)
    assert target(run).examples() == ["ACT I.", "Romeo"]
    prompts = ["x" * (EXAMPLE + 1), *(f"number {number}" for number in range(EXAMPLES + 1))]
    samples = ["damaged", {}, *({"prompt": prompt, "answer": ""} for prompt in prompts)]
    record = {**run.evaluations[-1], "samples": samples}
    write_lines(folder / "evaluations.jsonl", [record])
    assert target(read_run(folder)).examples() == prompts[1 : EXAMPLES + 1]
    (folder / "evaluations.jsonl").unlink()
    assert target(read_run(folder)).examples() == []
    assert target(None).examples() == []


def target(run: Any) -> Target:
    return Target(Path(), Path(), run, None, {})
