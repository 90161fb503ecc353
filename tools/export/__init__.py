"""A run as Hugging Face folders, and the proof that they are the model that was trained."""
