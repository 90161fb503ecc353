"""A recipe's configuration: its schema, its layers, and how they become one frozen `Config`."""

from common.config.load import Config, json_schema, load, load_resolved

__all__ = ["Config", "json_schema", "load", "load_resolved"]
