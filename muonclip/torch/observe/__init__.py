"""Seeing the attention calls of a running model: one file for each kind of attention kernel, the patches that lead
there, and the hooks that say which module is running.

What is done with a call (recording it in a trace, filling a statistic) is its handler's.
"""
