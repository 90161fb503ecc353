"""`recipe generate`: talk to a run or to any folder with a model."""
