"""`recipe base`: pin a model of the Hub for a recipe, list what is pinned, check it, remove it."""
