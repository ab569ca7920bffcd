"""`ddexport serve`: images over HTTP, with batches across requests."""
