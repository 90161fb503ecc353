"""Docker: images, and the container of a run."""
