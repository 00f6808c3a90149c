"""How every test runs: one thread, the CPU, float64 and eight devices in JAX; in CI the same examples each time, and no
skipped test.

A test may skip itself in CI only for want of a GPU: its reason then says "GPU" or "CUDA".

JAX's programs run for milliseconds and take seconds to compile, so they are compiled without optimization, by the
emitters that compile fastest, and once for all processes of a run.
"""

import gc
import os
import shutil
import sys
import tempfile

import hypothesis
import pytest

IN_CI = os.environ.get("CI") == "true"

# Read when a test imports torch or jax, and by the processes that tests start. Neither is imported here: the process
# that hands tests to workers needs neither.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false",
)
_own_cache = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="muonclip-jax-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_own_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
hypothesis.settings.register_profile("muonclip", deadline=None, derandomize=IN_CI)
hypothesis.settings.load_profile("muonclip")


def pytest_collection_finish() -> None:
    """The garbage collector passes over what was imported, in which each of its calls spent half a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Whatever ran before, a test that draws from torch's global generator draws the same."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_unconfigure() -> None:
    if _own_cache:
        shutil.rmtree(_own_cache, ignore_errors=True)


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
