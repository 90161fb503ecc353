"""An unrelated package that happens to be called ttml: it imports, and has nothing of the API."""

__version__ = "1.0.0"
