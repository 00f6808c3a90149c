"""A stand-in with the structure of xFormers 0.0.33."""
