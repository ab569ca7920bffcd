"""Data: one YAML a model, label lists, and the small weights that ship with the project."""
