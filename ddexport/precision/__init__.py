"""Half precision: what stays float32 (`policy`), how a module is cast (`cast`), where error enters
(`layers`). docs/precision.md."""
