"""`recipe verify`: does a run hold together; can those checks fail."""
