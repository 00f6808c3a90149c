"""One step of Flax linen, Flax NNX, Equinox and Haiku models as their users write it, against a dense oracle."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equinox_environments import equinox, haiku
from flax import nnx
from flax_environments import LAYERS, MLP, linen, nnx_list
from tiny_jax import HEAD, HEADS, WIDTH, dense_max_logits, distance

from muonclip.optax import QKProjection, muonclip, plan, qk_clip
from muonclip.optax.array_layout import ArrayLayout

pytestmark = pytest.mark.slow  # compiles much

ENVIRONMENTS = pytest.mark.parametrize("environment", [linen, nnx_list, equinox, haiku])


@pytest.mark.slow
@ENVIRONMENTS
def test_a_step_brings_loud_heads_to_tau_and_leaves_the_others(environment):
    _, run = environment()
    free = run(0.05, 1e9)
    tau = float(np.median(np.concatenate(free.maxima)))
    still, moved = run(0.0, tau), run(0.05, tau)
    for i, (measured, x) in enumerate(zip(free.maxima, free.inputs, strict=True)):
        before, after = (attention[i] for attention in still.attentions)
        S = dense_max_logits(*before, x)
        np.testing.assert_allclose(measured, S, rtol=1e-5)
        np.testing.assert_allclose(dense_max_logits(*after, x), np.minimum(S, tau), rtol=1e-5)
        quiet, root = tau >= S, np.sqrt(np.minimum(1, tau / S))
        for old, new, unclipped, clipped in zip(
            *map(jax.tree.leaves, (before, after, free.attentions[1][i], moved.attentions[1][i])), strict=True
        ):
            assert np.array_equal(np.asarray(new)[..., quiet, :], np.asarray(old)[..., quiet, :])
            np.testing.assert_allclose(clipped, unclipped * root[:, None], rtol=1e-4, atol=1e-6)
    loud = np.concatenate(free.maxima) > tau
    assert 0 < loud.sum() < loud.size
    assert tau > 0
    others = [name for name in free.after if "query" not in name and "key" not in name]
    assert all(np.array_equal(still.after[name], still.before[name]) for name in others)
    assert distance(*({name: run.after[name] for name in others} for run in (moved, free))) < 1e-6
    assert all(np.any(free.after[name] != free.before[name]) for name in free.after)


@ENVIRONMENTS
def test_the_plan_sees_the_hidden_matrices_and_no_more(environment):
    lines = environment()[0].parameters
    stack = f"{LAYERS} × " if environment is linen else ""
    matrices = [(HEADS * HEAD, WIDTH)] * 3 + [(WIDTH, HEADS * HEAD)]
    matrices += [] if environment is haiku else [(MLP, WIDTH), (WIDTH, MLP)]
    expected = [f"{stack}({fan_out}×{fan_in})" for fan_out, fan_in in matrices] * (1 if stack else LAYERS)
    muon = [line for line in lines if line.use == "muon"]
    assert sorted(ArrayLayout.from_layout(line.layout, line.shape).describe(line.shape) for line in muon) == sorted(
        expected
    )
    for line in lines:
        vector = re.search(r"(bias|/b|scale)$", line.name) is not None
        assert (line.use == "adamw") == (vector or re.search("embed|lm_head", line.name) is not None), line.name
        assert line.decays != vector, line.name


def test_a_gamma_for_each_layer_of_a_scan_or_an_error():
    attention = QKProjection.mha(q="query", k="key", num_heads=HEADS, layer_axis=0)
    params = {name: {"kernel": jnp.ones((LAYERS, WIDTH, HEADS, HEAD))} for name in ("query", "key")}
    tx = qk_clip(attention, 1.0)
    with pytest.raises(ValueError, match=r"max_logits of the attention has shape \(3,\), not \(2, 3\)"):
        tx.update(params, tx.init(params), params, max_logits=jnp.ones(HEADS))


def test_an_nnx_optimizer_without_maxima_says_what_is_missing():
    class Model(nnx.Module):
        def __init__(self):
            self.query, self.key = (nnx.Linear(WIDTH, HEADS * HEAD, rngs=nnx.Rngs(0)) for _ in range(2))

    model = Model()
    attention = QKProjection.mha(q="query", k="key", num_heads=HEADS)
    optimizer = nnx.Optimizer(model, muonclip(0.1, qk_projections=attention), wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"needs the maximum logits of the step: .*max_logits=…"):
        optimizer.update(model, nnx.state(model, nnx.Param))


def test_a_field_called_value_keeps_its_name():
    """Flax's variables put `value` at the end of a path; an attention of one's own has a field of that name."""

    class Attention(eqx.Module):
        query: jax.Array
        key: jax.Array
        value: jax.Array
        out: jax.Array

    into, back = jnp.ones((WIDTH, HEADS, HEAD)), jnp.ones((HEADS, HEAD, WIDTH))
    attention = QKProjection.mha(q="attention/query", k="attention/key", num_heads=HEADS)
    lines = plan({"attention": Attention(into, into, into, back)}, None, attention).parameters
    assert [line.name for line in lines] == [f"attention/{name}" for name in ("query", "key", "value", "out")]
    assert {line.use for line in lines} == {"muon"}
