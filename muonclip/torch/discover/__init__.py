"""From a model to its attentions: one forward of a copy is traced, and each query and key attributed to rows.

Nothing here scales a weight or fills a statistic; how an attention kernel is seen is `observe`'s.
"""
