"""The engines a recipe can train on, behind the protocol of common/engine.py."""
