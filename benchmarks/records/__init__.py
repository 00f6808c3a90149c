"""What a run leaves behind: its folder, its records, their summary, and what they were made with.

Files are written whole or not at all, and read back here. What draws or words them is in `benchmarks.report`.
"""
