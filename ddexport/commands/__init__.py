"""The sub-commands of `ddexport`: one file each, found by entry point."""
