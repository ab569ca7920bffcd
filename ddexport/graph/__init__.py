"""Torch modules to ONNX graphs: what a graph must look like, how it is traced, and proof that it computes
the same."""
