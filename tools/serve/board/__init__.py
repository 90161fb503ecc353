"""`recipe serve RUN --hw BOARD`: what would serve a run's export on a Tenstorrent board, checked, staged, and started.

Needs neither numpy nor torch, as a board's host has none. Nothing here was tried on a board: what upstream demands is
read in its sources, which stand by each number.
"""
