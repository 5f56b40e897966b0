"""The weights inside the package, and where they come from."""
