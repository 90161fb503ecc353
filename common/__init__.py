"""Training recipes for Tenstorrent hardware and their CPU twin."""
