"""The numbers of the AdamW half where the user gives none, for both adapters."""

ADAM_BETAS = (0.9, 0.95)
"""Kimi K2's second β (arXiv 2507.20534); Adam's own is 0.999."""
ADAM_EPS = 1e-8
