"""Attentions of Flax and Equinox are found by type, proven by `check`, and clipped to τ in a jitted step."""

import subprocess
import sys
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from tiny_jax import HEAD, HEADS, WIDTH, compiled, dense_max_logits

from muonclip.optax import QKProjection, check, dot_product_attention, muonclip, plan, qk_clip, qk_projections_of

GROUPS = 1
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, WIDTH)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 4)
LOUDEST = dict(init_fn=lambda: jnp.float32(-jnp.inf), reduce_fn=jnp.maximum)


def of_nnx(query, key, value, mask=None, module=None, **_):
    y, maximum = dot_product_attention(query, key, value, mask=mask)
    module.sow(nnx.Intermediate, "max_logits", maximum, **LOUDEST)
    return y


def of_linen(query, key, value, mask=None, module=None):
    y, maximum = dot_product_attention(query, key, value, mask=mask)
    module.sow("max_logits", "max_logits", maximum, **LOUDEST)
    return y


SIZES = dict(qkv_features=HEADS * HEAD, bias_init=nnx.initializers.normal(0.3))


class NNXModel(nnx.Module):
    """Attentions side by side, all of the same input; one has fewer heads for keys."""

    def __init__(self, seed=0, **options):
        options = SIZES | dict(attention_fn=of_nnx, decode=False, rngs=nnx.Rngs(seed)) | options
        self.branches = nnx.List(
            [nnx.MultiHeadAttention(HEADS, WIDTH, num_kv_heads=groups, **options) for groups in (HEADS, GROUPS)]
        )

    def __call__(self, x):
        return sum(branch(x, sow_weights=True) for branch in self.branches)


class LinenModel(linen.Module):
    normalize_qk: bool = False

    @linen.compact
    def __call__(self, x, *, train):
        options = SIZES | dict(num_heads=HEADS, attention_fn=of_linen, normalize_qk=self.normalize_qk)
        y = 0
        if train:  # a Python value, which has to stay one
            y = linen.MultiHeadDotProductAttention(name="other", **options)(x, sow_weights=True)
        return y + linen.MultiHeadAttention(name="own", **options)(x, sow_weights=True)


class EquinoxModel(eqx.Module):
    branches: list

    def __init__(self, key):
        sizes = dict(qk_size=HEAD, vo_size=HEAD, use_query_bias=True, use_key_bias=True, dtype=jnp.float32)
        keys = jax.random.split(key, 2)
        self.branches = [eqx.nn.MultiheadAttention(HEADS, WIDTH, key=each, **sizes) for each in keys]

    def __call__(self, x):
        seen = []

        def observe(*heads):
            seen.append(dot_product_attention(*heads)[1])
            return heads

        return sum(branch(x, x, x, process_heads=observe) for branch in self.branches), seen


class Case(NamedTuple):
    projections: Any
    params: Any
    apply: Any
    """(params, x) → (output, maxima)"""
    heads: Any
    """(params, name) → the query and the key of an attention, (kernel [W, H, d], bias [H, d])"""


def flax_heads(tree, name):
    for part in name.split("/"):
        tree = tree[int(part) if part.isdigit() else part]
    return [
        tuple(np.repeat(tree[side][leaf], HEADS // tree[side][leaf].shape[-2], -2) for leaf in ("kernel", "bias"))
        for side in ("query", "key")
    ]


def nnx_case():
    model = NNXModel()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(params, x):
        y, seen = nnx.capture(nnx.merge(graph, params, rest), nnx.Intermediate)(x)
        return y, seen

    return Case(qk_projections_of(model), params, apply, lambda p, name: flax_heads(nnx.to_pure_dict(p), name))


def linen_case():
    model = LinenModel()
    params = model.init(jax.random.key(0), X, train=True)["params"]

    def apply(params, x):
        y, seen = model.apply({"params": params}, x, train=True, mutable=["max_logits"])
        return y, seen["max_logits"]

    return Case(qk_projections_of(model, X, train=True), params, apply, flax_heads)


def equinox_case():
    model = EquinoxModel(jax.random.key(0))
    projections = qk_projections_of(model)
    params, static = eqx.partition(model, eqx.is_array)

    def apply(params, x):
        y, seen = jax.vmap(eqx.combine(params, static))(x)
        return y, {name: maximum.max(0) for name, maximum in zip(projections, seen, strict=True)}

    def heads(params, name):
        branch = params.branches[int(name.split("/")[1])]
        weights = [(side.weight, side.bias) for side in (branch.query_proj, branch.key_proj)]
        return [
            (np.asarray(w).reshape(HEADS, HEAD, WIDTH).transpose(2, 0, 1), b.reshape(HEADS, HEAD)) for w, b in weights
        ]

    return Case(projections, params, apply, heads)


@pytest.mark.parametrize("make", [nnx_case, linen_case, equinox_case])
def test_what_is_found_is_proven_and_brought_to_tau_in_a_jitted_step(make):
    case = make()
    assert len(case.projections) == 2
    assert set(check(case.apply, case.params, X, case.projections)) == set(case.projections)
    before = {name: dense_of(case, case.params, name) for name in case.projections}
    tau = float(np.median(np.concatenate(list(before.values()))))
    tx = muonclip(0.0, qk_projections=case.projections, tau=tau, ns_steps=1)
    inputs = X

    @compiled
    def step(params, state):
        grads, maxima = jax.grad(lambda p: ((y := case.apply(p, inputs))[0].sum(), y[1]), has_aux=True)(params)
        updates, state = tx.update(grads, state, params, max_logits=maxima)
        return optax.apply_updates(params, updates), state

    after, state = step(case.params, tx.init(case.params))
    gamma = optax.tree.get(state, "QKClipState").gamma
    for name, S in before.items():
        np.testing.assert_allclose(dense_of(case, after, name), np.minimum(S, tau), rtol=1e-5)
        np.testing.assert_allclose(gamma[name], np.minimum(1, tau / S), rtol=1e-5)
    assert 0 < sum((tau < S).sum() for S in before.values()) < 2 * HEADS


def dense_of(case, params, name):
    """The maxima of an attention in float64, of its weights and the input alone."""
    return dense_max_logits(*case.heads(params, name), X, causal=False)


def rows(projection):
    """What a projection says of its first part on each side: path, heads, layer axis."""
    sides = [(projection.query or projection.query_facing_shared)[0], (projection.key or projection.shared_key)[0]]
    return [(side.path, side.num_heads, side.layer_axis) for side in sides]


def test_scanned_layers_grouped_keys_and_normalised_queries_are_told_apart():
    stacked = nnx.vmap(NNXModel)(KEYS)
    found = qk_projections_of(stacked)
    assert rows(found["branches/0"]) == [("branches/0/query", HEADS, 0), ("branches/0/key", HEADS, 0)]
    assert rows(found["branches/1"]) == [("branches/1/query", HEADS, 0), ("branches/1/key", GROUPS, 0)]
    behind = linen.vmap(
        linen.MultiHeadAttention, variable_axes={"params": 1}, split_rngs={"params": True}, in_axes=None, axis_size=4
    )(HEADS, qkv_features=HEADS * HEAD)
    (projection,) = qk_projections_of(behind, jax.eval_shape(lambda: X)).values()
    assert rows(projection) == [("query", HEADS, 1), ("key", HEADS, 1)]
    lifted = linen.remat(linen.MultiHeadAttention)(HEADS, qkv_features=HEADS * HEAD)
    assert rows(*qk_projections_of(lifted, X).values())[0] == ("query", HEADS, None)
    with pytest.warns(DeprecationWarning, match="SelfAttention"):
        assert list(qk_projections_of(linen.SelfAttention(HEADS, qkv_features=HEADS * HEAD), X)) == [""]
    layers = eqx.filter_eval_shape(eqx.filter_vmap(EquinoxModel), KEYS)
    assert rows(qk_projections_of(layers)["branches/1"])[0] == ("branches/1/query_proj", HEADS, 0)
    for normalised in (
        NNXModel(normalize_qk=True),
        nnx.vmap(lambda key: NNXModel(key, normalize_qk=True))(KEYS),
    ):
        found = qk_projections_of(normalised)
        assert {projection.reason for projection in found.values()} == {"QK-norm"}
    params = nnx.state(normalised, nnx.Param)
    tx = qk_clip(found, 1.0)
    maxima = {name: jnp.full((4, HEADS), 9.0) for name in found}
    updates, state = tx.update(params, tx.init(params), params, max_logits=maxima)
    assert all(map(np.array_equal, jax.tree.leaves(updates), jax.tree.leaves(params)))
    assert state.frozen == 0
    of_linen = qk_projections_of(LinenModel(normalize_qk=True), X, train=False)
    assert {name: projection.reason for name, projection in of_linen.items()} == {"own": "QK-norm"}


class Rotary(nnx.MultiHeadAttention):
    def __call__(self, x):
        return x


class Fused(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)


class PooledAttention(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)


class Owned(nnx.Module):
    def __init__(self, rngs):
        self.rotary, self.fused, self.pool = Rotary(HEADS, HEADS, rngs=rngs), Fused(rngs), PooledAttention(rngs)
        self.known = nnx.MultiHeadAttention(HEADS, HEADS, rngs=rngs)


class OwnEquinox(eqx.Module):
    q_proj: eqx.nn.Linear
    k_proj: eqx.nn.Linear


def test_attentions_of_own_classes_are_named_with_what_to_write():
    model = Owned(nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"not of\n  'fused' \(Fused\)\n  'rotary' \(Rotary\)\n  'pool' \(Pooled"
    ) as error:
        qk_projections_of(model)
    lines = (
        "'fused': QKProjection.fused('fused/qkv', num_heads=…, num_kv_heads=…, head_dim=…),",
        "'rotary': QKProjection.mha(q='rotary/query', k='rotary/key', num_heads=…),",
        "'pool': QKProjection.gqa(q='…', k='…', num_heads=…, num_kv_heads=…),",
    )
    assert "declare={\n  " + "\n  ".join(lines) + "\n})" in str(error.value)
    own = QKProjection.mha(q="rotary/query", k="rotary/key", num_heads=HEADS)
    found = qk_projections_of(model, declare={"fused": None, "pool": None, "rotary": own})
    assert set(found) == {"known", "rotary"}
    assert found["rotary"] is own
    linear = eqx.nn.Linear(WIDTH, WIDTH, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"not of\n  '0' \(OwnEquinox\)|not of\n  '' \(OwnEquinox\)"):
        qk_projections_of(OwnEquinox(linear, linear))
    with pytest.raises(ValueError, match="Linear has no attention of Flax's or Equinox's own"):
        qk_projections_of(linear)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: qk_projections_of(LinenModel()), ValueError, r"what model\.init takes after the key"),
        (lambda: qk_projections_of({"q": jnp.ones(3)}), TypeError, "model is a dict; give a module of Flax"),
        (lambda: qk_projections_of(None), TypeError, "model is a NoneType"),
        (lambda: qk_projections_of(NNXModel(), X), TypeError, "inputs are for Flax linen"),
        (lambda: qk_projections_of(NNXModel(), declare=3), TypeError, "declare=3 is a int"),
        (lambda: qk_projections_of(NNXModel(), declare={"a": "q"}), TypeError, r"declare\['a'\]='q'"),
    ],
)
def test_what_cannot_be_read_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_neither_framework_is_imported_for_those_who_have_none():
    code = "import sys, muonclip.optax; sys.exit(any(name in sys.modules for name in ('flax', 'equinox')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


BLOCKS = ("blocks/2", "blocks/10")  # as strings they sort otherwise than as numbers
ARRAYS = {f"{block}/{side}": jnp.ones((4, 2, 3)) for block in BLOCKS for side in ("query", "key")}
NAMED = {block: QKProjection.mha(q=f"{block}/query", k=f"{block}/key", num_heads=2) for block in BLOCKS}


@pytest.mark.parametrize(
    ("sown", "fits"),
    [
        ({"blocks": {2: {"max_logits": 4.0}, 10: {"max_logits": 8.0}}}, True),
        ({"blocks": {10: 8.0}, "blocks/2": 4.0}, True),
        ({"blocks": {2: 4.0}}, r"\. Missing: 'blocks/10'\. Name "),
        (
            {"blocks": {2: 4.0, 10: {"x": 8.0, "y": 8.0}}},
            "Several of one attention: 'blocks/10/x', 'blocks/10/y'. Hand",
        ),
        ({"blocks": {2: 4.0, 10: 8.0, 11: 1.0}}, r"Extra: 'blocks/11'\. Hand on .*nnx.capture\(model, MaxLogits\)"),
        ([4.0, 8.0], "Extra: '0', '1'; missing: 'blocks/10', 'blocks/2'"),
    ],
)
def test_maxima_are_taken_by_name_as_layers_sow_them(sown, fits):
    tx, maxima = qk_clip(NAMED, 1.0), jax.tree.map(lambda size: jnp.full(2, size), sown)
    if fits is not True:
        with pytest.raises(ValueError, match=fits):
            tx.update(ARRAYS, tx.init(ARRAYS), ARRAYS, max_logits=maxima)
        return
    _, state = tx.update(ARRAYS, tx.init(ARRAYS), ARRAYS, max_logits=maxima)
    np.testing.assert_allclose([state.gamma[name] for name in NAMED], [[1 / 4] * 2, [1 / 8] * 2])


def test_muon_alone_reads_the_kernels_of_flax_s_attentions_without_a_declaration():
    for model in (NNXModel(), nnx.vmap(NNXModel)(KEYS)):
        params = nnx.state(model, nnx.Param)
        assert plan(params) == plan(params, qk_projections=qk_projections_of(model))
        assert {line.use for line in plan(params).parameters if line.name.endswith("kernel")} == {"muon"}
    muonclip(0.1, qk_projections=None).init(params)
    shapes = {
        "query": (WIDTH, HEADS, HEAD),
        "key": (WIDTH, HEADS, HEAD),
        "value": (WIDTH, HEADS, 5),
        "out": (HEADS, 5, 9),
    }
    tree = {name: {"kernel": jnp.ones((2, *shape))} for name, shape in shapes.items()}
    layers = {"attention": tree, "mlp": {"kernel": jnp.ones((2, 9, 12))}}
    lines = {line.name: line for line in plan({"layers": layers}).parameters}
    assert lines["layers/mlp/kernel"].reason == "hidden matrix, stacked over 2 layers"
    assert lines["layers/attention/out/kernel"].layout.output_axis == 3
    tree["out"]["kernel"] = jnp.ones((2, HEADS + 1, 5, 9))  # of another module
    with pytest.raises(ValueError, match="not known"):
        plan({"layers": layers})


class GroupedOwn(nnx.Module):
    """An attention of one's own, fused or with two projections, that sows more than its maxima."""

    def __init__(self, fused, groups, rngs, variable=nnx.Intermediate):
        self.variable, self.groups = variable, groups
        if fused:
            self.qkv = nnx.Linear(WIDTH, (HEADS + 2 * groups) * HEAD, rngs=rngs)
        else:
            self.q = nnx.Linear(WIDTH, HEADS * HEAD, rngs=rngs)
            self.k, self.v = (nnx.Linear(WIDTH, groups * HEAD, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        made = jnp.concatenate([self.q(x), self.k(x), self.v(x)], -1) if hasattr(self, "q") else self.qkv(x)
        q, k, v = jnp.split(made.reshape(*x.shape[:2], -1, HEAD), [HEADS, HEADS + self.groups], 2)
        y, maximum = dot_product_attention(q, k, v, is_causal=True)
        self.sow(self.variable, "max_logits", maximum)
        self.sow(nnx.Intermediate, "mean", y.mean())
        return y


class MaxLogits(nnx.Variable):
    pass


class Two(nnx.Module):
    def __init__(self, *args):
        self.blocks = nnx.List([GroupedOwn(*args) for _ in range(2)])

    def __call__(self, x):
        return sum(block(x) for block in self.blocks)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("groups", [HEADS, 1])
def test_the_suggested_declaration_works_when_its_numbers_are_filled_in(fused, groups):
    model = Two(fused, groups, nnx.Rngs(0), MaxLogits)
    with pytest.raises(ValueError, match="declare=") as error:
        qk_projections_of(model)
    said = str(error.value)
    written = said[said.index("declare=") + len("declare=") : said.rindex("})") + 1]
    for name, number in (("num_heads", HEADS), ("num_kv_heads", groups), ("head_dim", HEAD)):
        written = written.replace(f"{name}=…", f"{name}={number}")
    projections = qk_projections_of(model, declare=eval(written, {"QKProjection": QKProjection}))
    assert list(projections) == ["blocks/0", "blocks/1"]

    def apply(model, x):
        return nnx.capture(model, MaxLogits)(x)

    assert check(apply, model, X, projections) == ("blocks/0", "blocks/1")


def test_what_else_a_model_sows_is_named_with_the_way_to_leave_it_out():
    tx = muonclip(0.1, qk_projections={"": QKProjection.mha(q="q", k="k", num_heads=HEADS)})
    for variable, fits in ((nnx.Intermediate, False), (MaxLogits, True)):
        model = GroupedOwn(False, HEADS, nnx.Rngs(0), variable)
        _, seen = nnx.capture(model, variable)(X)
        params = nnx.state(model, nnx.Param)
        if fits:
            tx.update(params, tx.init(params), params, max_logits=seen)
            continue
        with pytest.raises(ValueError, match=r"'max_logits/value/0', 'mean/value/0'.*class MaxLogits\(nnx.Variable\)"):
            tx.update(params, tx.init(params), params, max_logits=seen)


def test_attention_weights_in_place_of_maxima_are_called_that():
    model = nnx.MultiHeadAttention(HEADS, WIDTH, qkv_features=HEADS * HEAD, decode=False, rngs=nnx.Rngs(0))
    _, seen = nnx.capture(model, nnx.Intermediate)(X, sow_weights=True)
    params, tx = nnx.state(model, nnx.Param), muonclip(0.1, qk_projections=qk_projections_of(model))
    with pytest.raises(ValueError, match=r"seem to be attention weights.*attention_fn"):
        tx.update(params, tx.init(params), params, max_logits=seen)
