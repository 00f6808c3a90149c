"""The execution of runs: in a process for each of them, or by all ranks of torchrun on one after the other.

Processes, locks, signals, progress and the checkpoints of many ranks belong here. What a step does is in
`benchmarks.training`.
"""
