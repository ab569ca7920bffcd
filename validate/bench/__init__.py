"""`ddexport bench`: how fast a bundle is in every engine, beside whether what was timed is right."""
