"""Proof by experiment: what the clip would do to an attention is done to a copy of the model, what moves is read."""

from muonclip.torch.prove.proven_ways import ProvenWays
from muonclip.torch.prove.reach import Reach, reached_beside_known

__all__ = ["ProvenWays", "Reach", "reached_beside_known"]
