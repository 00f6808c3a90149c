"""The records that a run leaves: its folder, its steps, their summary, and the environment they were made in.

Files are written whole or not at all, and read back here. Drawing and wording them is `benchmarks.report`'s.
"""
