"""`recipe new`: a recipe for other data."""
