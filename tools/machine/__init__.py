"""The machine under a run: its cards, their driver, and who has them."""
