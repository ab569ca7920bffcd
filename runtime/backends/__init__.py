"""Inference engines: one file an engine, its name is the file's name."""
