"""Runs in a reader's own environment, which has nothing of ours: asks one probe the questions of a job.

    python -I ask.py PROBE FOLDER

PROBE is the Python file beside this one of that name. FOLDER has job.json: `open`, what the probe's `open_model` is
given, and `asked`, a list of arguments for each question. Each question is a method of what `open_model` returned; one
that it has not is left out. answers.json, written beside job.json, has a list of answers for each of the others; one
that raised is {"error": its last line}.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(probe: str, folder: Path) -> None:
    """Open the model and put every question to it."""
    spec = importlib.util.spec_from_file_location("probe", Path(__file__).with_name(f"{probe}.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    model = module.open_model(**job["open"])
    answers = {
        name: [answer(getattr(model, name), arguments) for arguments in asked]
        for name, asked in job["asked"].items()
        if hasattr(model, name)
    }
    (folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # without the exit handlers of libraries, whose engines may take long to end, or never do


def answer(question: Any, arguments: list[Any]) -> Any:
    """Return what a question gave, or the error that it raised."""
    try:
        return question(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
