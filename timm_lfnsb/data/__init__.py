"""Data sets as folders that timm reads."""
