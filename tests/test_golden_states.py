"""Checkpoints of every release load and go on as they would have then; `tests/golden` has one folder for each."""

from pathlib import Path

import golden_states as golden
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch

import muonclip

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
RELEASES = sorted(golden.GOLDEN.iterdir())
releases = pytest.mark.parametrize("folder", RELEASES, ids=lambda folder: folder.name)


def test_this_release_has_a_state():
    assert muonclip.__version__ in {folder.name for folder in RELEASES}
    assert sum(file.stat().st_size for file in golden.GOLDEN.rglob("*") if file.is_file()) < 200_000 * len(RELEASES)


@releases
@pytest.mark.parametrize("how", ["torch", "dcp"])
def test_a_state_of_pytorch_goes_on_as_it_would_have(folder, how):
    model, optimizer = golden.torch_start()
    if how == "torch":
        saved = torch.load(folder / "torch.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    else:
        golden.dcp_load(folder / "dcp", model, optimizer)
    golden.torch_step(model, optimizer, 2)
    for name, after in torch.load(folder / "torch_after.pt", weights_only=True).items():
        torch.testing.assert_close(model.state_dict()[name], after, rtol=1e-6, atol=1e-7)


@releases
@pytest.mark.parametrize("how", ["leaves", "orbax"])
@pytest.mark.parametrize("ending", golden.OPTAX_STARTS)
def test_a_state_of_optax_goes_on_as_it_would_have(folder, ending, how):
    params, tx, state = golden.OPTAX_STARTS[ending]()
    if how == "orbax":
        target = jax.eval_shape(lambda: (params, tx.init(params)))
        with ocp.StandardCheckpointer() as checkpointer:
            params, state = checkpointer.restore(Path(folder / f"orbax{ending}").absolute(), target)
    else:
        saved = dict(np.load(folder / f"optax{ending}.npz"))
        assert saved.keys() == golden.by_path((params, state)).keys()
        params, state = jax.tree.unflatten(jax.tree.structure((params, state)), list(saved.values()))
    params, _ = golden.optax_step(params, tx, state, 2)
    for path, after in np.load(folder / f"optax{ending}_after.npz").items():
        np.testing.assert_allclose(golden.by_path(params)[path], after, rtol=1e-4, atol=1e-5)


def test_a_golden_state_is_what_the_script_saves(tmp_path):
    """So that the next release finds a script that works."""
    golden.main(tmp_path / "now")
    now = {file.relative_to(tmp_path / "now").as_posix() for file in (tmp_path / "now").glob("*")}
    then = {file.relative_to(RELEASES[-1]).as_posix() for file in RELEASES[-1].glob("*")}
    assert now == then
