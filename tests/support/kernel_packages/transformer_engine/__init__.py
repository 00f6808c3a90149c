"""A stand-in with the structure of TransformerEngine, August 2026."""
