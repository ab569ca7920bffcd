"""TensorRT engines: from a bundle's graph to a plan with its sidecar, through a cache (docs/engines.md)."""
