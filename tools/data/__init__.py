"""`recipe data`: check, convert and fetch."""
