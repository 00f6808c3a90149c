"""Reports of finished runs: verdicts as typed facts, tables, pictures, the HTML page, events for TensorBoard.

Everything here reads `benchmarks.records` and trains nothing.
"""
