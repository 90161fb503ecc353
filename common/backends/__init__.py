"""The engines a recipe can train on, behind one protocol."""
