"""`validate fid`: features of images on disk, and the figures that are computed from them."""

from ddexport.validate.fid.command import Options, command, run_fid

__all__ = ["Options", "command", "run_fid"]
