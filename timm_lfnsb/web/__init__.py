"""A model as a page for browsers."""
