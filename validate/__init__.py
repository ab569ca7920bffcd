"""Holds a bundle against the PyTorch reference it was exported from."""
