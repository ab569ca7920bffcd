"""TensorRT engines: from a bundle's graph to a plan with its sidecar (docs/engines.md)."""
