"""results.yaml: the recorded figures of a recipe, and runs held against them."""
