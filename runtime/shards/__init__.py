"""Large sets of images, drawn by many processes into tar files (docs/scale.md)."""
