"""A double of `ttml.common`."""
