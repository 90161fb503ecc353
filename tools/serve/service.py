"""What the HTTP side knows of the server."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from tools.serve.batcher import Batcher
from tools.serve.errors import APIError, unavailable
from tools.serve.model import Model


@dataclass
class Service:
    """Which models there are, and who may ask.

    `models` and `batcher` are set once the weights are there. `hosts` are the names that a Host header may have; None
    is any. `log` takes a line a request, `fault` an exception of ours.
    """

    log: Callable[[str], None]
    fault: Callable[[Exception], None]
    key: str | None = None
    hosts: Collection[str] | None = None
    models: Mapping[str, Model] = field(default_factory=dict)
    batcher: Batcher | None = None

    @property
    def status(self) -> str:
        """Return loading, ok or stopping."""
        if self.batcher is None:
            return "loading"
        return "stopping" if self.batcher.stopping else "ok"

    def ready(self) -> Batcher:
        """Return the batcher. Raises APIError while the weights are read, and once the server ends."""
        if self.batcher is None or self.status != "ok":
            raise unavailable(self.status)
        return self.batcher

    def model(self, name: str | None) -> Model:
        """Return the model of a name; the first one where none is given. Raises APIError."""
        self.ready()
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            raise APIError(f"no model {name!r} here; served: {known}", "model", status=404, code="model_not_found")
        return self.models[name]
