"""The engines that the other tests of this folder need are there, in the versions that the pages name."""

from importlib.metadata import version

import pytest


@pytest.mark.parametrize("engine", ["torchtitan", "torchao", "deepspeed", "megatron-core"])
def test_the_pinned_engine_is_installed(engine):
    with open("constraints.txt", encoding="utf-8") as lines:
        pins = dict(line.strip().split("==") for line in lines if "==" in line)
    assert version(engine) == pins[engine]
