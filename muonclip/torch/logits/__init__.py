"""The statistic of QK-Clip: the maximum attention logit of every head.

Here are its bounds, the masks it respects, the kernels that compute it, and attention that observes it. This package
knows queries and keys, but no model and no weight.
"""
