"""`recipe verify board`: does this board compute what it should."""
