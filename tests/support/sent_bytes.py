"""The counter of what collectives send, for scripts of the tests: see `benchmarks.studies.sent_bytes`."""

from benchmarks.studies.sent_bytes import SentBytes

__all__ = ["SentBytes"]
