import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from muonclip.core import WarmupConstantCosine, adamw_update_rms, update_scale


def test_warms_up_stays_and_decays():
    schedule = WarmupConstantCosine(warmup=4, constant=3, decay=2, final=0.1)
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.55, 0.1, 0.1]
    assert [schedule(step) for step in range(11)] == pytest.approx(expected)
    assert schedule.total_steps == 9


def test_is_the_same_when_traced():
    schedule = WarmupConstantCosine(warmup=4, constant=3, decay=2, final=0.1)
    traced = jax.jit(lambda step: schedule(step, xp=jnp))
    assert [float(traced(step)) for step in range(11)] == pytest.approx([schedule(step) for step in range(11)])


def test_k2_preset_reads_as_the_report():
    """Peak for 10T tokens including 500 warm-up steps, then a cosine to a tenth over 5.5T, 67M tokens a step."""
    k2 = WarmupConstantCosine.k2()
    assert k2.warmup == 500
    assert (k2.warmup + k2.constant) * 67e6 == pytest.approx(10e12, rel=1e-5)
    assert k2.decay * 67e6 == pytest.approx(5.5e12, rel=1e-5)
    assert k2(499) == k2(100_000) == 1
    assert 2e-4 * k2(k2.total_steps) == pytest.approx(2e-5)


def test_drives_a_torch_scheduler():
    def scheduler():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, WarmupConstantCosine(warmup=4, decay=3))

    first = scheduler()
    assert first.get_last_lr() == [0.5]
    first.optimizer.step()
    first.step()
    second = scheduler()
    second.load_state_dict(first.state_dict())
    assert second.get_last_lr() == first.get_last_lr() == [1.0]
    assert second.lr_lambdas == [WarmupConstantCosine(warmup=4, decay=3)]


@pytest.mark.parametrize("wrong", [dict(warmup=-1), dict(decay=-2), dict(final=1.5)])
def test_wrong_schedules_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WarmupConstantCosine(**wrong)


def test_update_scales():
    assert update_scale(3, 12, None) == update_scale(3, 12, "original") == 1.0
    assert update_scale(12, 3, "original") == 2.0
    assert update_scale(9, 4, "match_rms_adamw") == update_scale(4, 9, "match_rms_adamw") == pytest.approx(0.6)
    assert update_scale(9, 4, 0.3) == 0.3
    assert (update_scale(12, 3, "spectral_unclamped"), update_scale(3, 12, "spectral_unclamped")) == (2.0, 0.5)
    assert update_scale(9, 4, ("match_rms_adamw", 0.18)) == update_scale(9, 4, ["match_rms_adamw", 0.18]) == 0.18 * 3
    assert update_scale(4, 9, "match_rms_adamw_closed_form") == adamw_update_rms(0.9) * 3


def test_the_closed_form_is_the_rms_of_adamw_under_noise():
    """AdamW's two moments, on gradients that are noise alone."""
    rng, first, second, squares = np.random.default_rng(0), np.zeros(200), np.ones(200), []
    for step in range(4000):
        gradient = rng.normal(size=200)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        if step > 1000:
            squares.append((first**2 / second).mean())
    assert np.mean(squares) ** 0.5 == pytest.approx(adamw_update_rms(), rel=0.02)
    assert adamw_update_rms() == pytest.approx(0.2294, abs=1e-4)
    with pytest.raises(ValueError, match=r"beta1=1\.0 must be in"):
        adamw_update_rms(1.0)


@pytest.mark.parametrize("wrong", ["match_rms", 0, -1.0, math.inf, math.nan, ("original", 0.2), ("match_rms_adamw", 0)])
def test_unknown_scales_are_refused(wrong):
    with pytest.raises(ValueError, match="adjust_lr_fn="):
        update_scale(2, 2, wrong)
