"""`recipe plan`: what a run would need, and what is odd about its config."""
