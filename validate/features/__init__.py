"""Feature extractors: each file without a leading underscore is one, registered by its name (see `_base`)."""
