"""Tenstorrent boards: ttml (tt-train) over ttnn."""
