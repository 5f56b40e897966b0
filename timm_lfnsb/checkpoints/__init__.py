"""Checkpoint files: pack, graft, convert."""
