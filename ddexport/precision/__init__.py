"""Half precision: what stays float32 (`policy`), and how a module is cast (`cast`). docs/export.md."""
