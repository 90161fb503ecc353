"""The `recipe` command: parses words and calls the packages beside it. Nothing imports this one."""
