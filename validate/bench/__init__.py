"""`ddexport bench`: how fast a bundle is in every engine, and whether what was timed is right."""
