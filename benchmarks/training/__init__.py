"""The training of one run: one loop for one process and for many, and a learner per framework.

Which runs there are, and in which processes they run, is decided in `benchmarks.execution`.
"""
