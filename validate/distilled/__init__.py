"""`validate distilled`: a model that was trained with `ddexport distill`, in figures, times and pictures."""

from ddexport.validate.distilled.command import command as command
