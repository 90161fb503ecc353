"""Rows, text, tokens and their order: everything between a source file and a batch."""
