"""The statistic: the maximum attention logit of every head, its bounds, the masks it respects, the kernels that
compute it, and attention that observes it.

It knows queries and keys, no model and no weight.
"""
