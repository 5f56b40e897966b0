"""What needs nothing else of this package."""
