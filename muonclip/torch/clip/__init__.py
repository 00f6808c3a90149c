"""QK-Clip: measure the maximum logits, combine them over ranks, decide the factors, scale the heads, report.

Which attentions a model has is found in `discover`; which rows feed which heads is declared in `heads`; the statistic
is in `logits`.
"""
