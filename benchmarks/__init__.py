"""The evidence: reproductions on real text, each one command. `python -m benchmarks --help` lists them."""
