"""The report page of a bundle: what was measured, on one page that needs nothing else."""
