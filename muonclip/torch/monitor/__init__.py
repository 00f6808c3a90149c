"""Watching a training without changing it: the logits of heads, and what each step does to every weight matrix.

What is observed comes from the clip; nothing here scales a weight.
"""

from muonclip.torch.monitor.matrix_statistics import MatrixStatistics
from muonclip.torch.monitor.monitor import Monitor, check_options

__all__ = ["MatrixStatistics", "Monitor", "check_options"]
