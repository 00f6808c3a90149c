"""How every test runs: one thread, the CPU, float64 and eight devices in JAX; in CI the same examples each time, and no
skipped test.

A test may skip itself in CI only for want of a GPU: its reason then says "GPU" or "CUDA".
"""

import os

import hypothesis
import pytest
import torch

IN_CI = os.environ.get("CI") == "true"

os.environ.setdefault("JAX_ENABLE_X64", "1")  # read when a test imports jax
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
torch.set_num_threads(1)
hypothesis.settings.register_profile("muonclip", deadline=None, derandomize=IN_CI)
hypothesis.settings.load_profile("muonclip")


def refused_skips(config: pytest.Config) -> dict[str, str]:
    """Test or module -> why it was skipped, for the skips that CI does not allow."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if not IN_CI or reporter is None:
        return {}
    reasons = {report.nodeid: report.longrepr[2] for report in reporter.stats.get("skipped", ())}
    return {test: reason for test, reason in reasons.items() if "GPU" not in reason and "CUDA" not in reason}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == pytest.ExitCode.OK and refused_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for test, reason in refused_skips(config).items():
        terminalreporter.write_line(f"CI refuses this skip: {test}: {reason}", red=True)
