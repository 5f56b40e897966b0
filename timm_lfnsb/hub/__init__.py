"""Weights on their way out: model cards, the Hugging Face Hub, files of this package."""
