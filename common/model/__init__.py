"""The Llama that is trained: its shapes, its weights, and the base they come from."""
