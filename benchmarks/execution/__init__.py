"""Where runs are trained: a process for each of them, or all ranks of torchrun on one after the other.

Processes, locks, signals, progress and the checkpoints of many ranks live here. What a step does is in
`benchmarks.training`.
"""
