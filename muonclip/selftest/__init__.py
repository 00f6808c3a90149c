"""The self-test of an installation, `python -m muonclip check`, and what a bug report needs, `python -m muonclip`.

What runs is tried on the device of whoever calls it, by experiments whose results are known: float64 on the processor,
dense logits. Each file holds parts of the test; none imports a framework before it runs. The tests of the repository
are elsewhere, and need none of this.
"""

from muonclip.selftest.environment import environment
from muonclip.selftest.processor import available_cores, cpu_model
from muonclip.selftest.run import check, results
from muonclip.selftest.steps import Trained, layer, unsynchronised

__all__ = ["Trained", "available_cores", "check", "cpu_model", "environment", "layer", "results", "unsynchronised"]
