"""A recipe's configuration: its schema, its layers, and how they become one frozen `Config`."""

from common.config.load import Config, load, load_resolved

__all__ = ["Config", "load", "load_resolved"]
