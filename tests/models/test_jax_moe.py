"""The reference model in JAX: PyTorch's numbers, NumPy's numbers, PyTorch's names, and what an optimizer asks of it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_moe
import optax
import pytest
import torch
from small_moe import SMALL

from muonclip.models import MoEConfig
from muonclip.models import jax as jax_moe
from muonclip.models.torch import MoE
from muonclip.optax.qk_clip import qk_clip
from muonclip.torch import MuonClip

YARN = {"yarn_factor": 4.0, "yarn_original_seq_len": 64, "yarn_mscale": 0.7, "yarn_mscale_all_dim": 1.3}
DOCUMENTS = np.array([[0] * 4 + [1] * 7, [5] * 9 + [2] * 2])
CASES = {
    "mla": {},
    "mla-direct": {"q_lora_rank": None, "documents": True},
    "gqa": {"attention": "gqa", "documents": True},
    "mha": {"attention": "mha", "num_shared_experts": 0},
    "qk_norm-softcap": {"qk_norm": True, "softcap": 2.0},
    "gqa-qk_norm-softcap": {"attention": "gqa", "qk_norm": True, "softcap": 2.0, "documents": True},
    "yarn": {**YARN, "num_shared_experts": 2, "num_experts_per_tok": 3},
    "yarn-gqa": {**YARN, "attention": "gqa", "num_dense_layers": 0},
}
every_case = pytest.mark.parametrize("case", CASES)

loss_and_gradients = jax.jit(
    jax.value_and_grad(jax_moe.loss, has_aux=True), static_argnames=("config", "observe", "remat")
)
forward = jax.jit(jax_moe.forward, static_argnames=("config", "observe"))


def small_config(case="mla", **overrides):
    options = SMALL | CASES[case] | overrides
    return MoEConfig.cpu(**{name: value for name, value in options.items() if name != "documents"})


def documents(case):
    return DOCUMENTS if CASES[case].get("documents") else None


def random_parameters(config, seed=0):
    """NumPy float64: all of them random, gains and correction biases included, and large enough to matter."""
    rng = np.random.default_rng(seed)

    def values(shape):
        return rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.normal(0, 1.5 / math.sqrt(shape[-1]), shape)

    params = {name: values(shape) for name, shape in jax_moe.parameter_shapes(config).items()}
    buffers = {
        name: rng.uniform(-0.2, 0.2, each.shape).astype(np.float32)
        for name, each in jax_moe.init_buffers(config).items()
    }
    return params, buffers


def random_batch(config, length=11, seed=0):
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(config.vocab_size, size=(2, 2, length))
    targets[0, 3] = -100
    return tokens, targets


def torch_model(config, params, buffers):
    model = MoE(config).double()
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in {**params, **buffers}.items()})
    return model


def torch_maxima(model, tokens, document_ids):
    """{attention: [H]} in float64, from the dense logits of what each attention was given."""
    inputs, ids = {}, None if document_ids is None else torch.from_numpy(document_ids)
    for name, module in model.named_modules():
        if name.endswith(".attn"):
            module.register_forward_pre_hook(lambda attn, args, name=name: inputs.update({name: (attn, args)}))
    model(torch.from_numpy(tokens), ids)
    allowed = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    if ids is not None:
        allowed = allowed & (ids[:, :, None] == ids[:, None, :])[:, None]
    maxima = {}
    for name, (attn, (x, rotary, _)) in inputs.items():
        q, k, _ = attn.queries_keys_values(x, rotary)
        logits = attn.config.softmax_scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
        maxima[name] = logits.masked_fill(~allowed, -math.inf).amax((0, 2, 3)).detach().numpy()
    return maxima


def check_close(actual, expected, tolerance):
    """Names alike, and each array within tolerance of the largest element."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = np.abs(np.asarray(actual[name], np.float64) - value).max()
        assert error <= tolerance * np.abs(value).max(), (name, error)


# The same numbers


@every_case
def test_loss_gradients_maxima_and_loads_are_those_of_torch(case):
    config = small_config(case)
    params, buffers = random_parameters(config)
    tokens, targets = random_batch(config)
    (loss, aux), gradients = loss_and_gradients(params, buffers, tokens, targets, config, documents(case))
    model = torch_model(config, params, buffers)
    ids = None if documents(case) is None else torch.from_numpy(documents(case))
    expected = model.loss(torch.from_numpy(tokens), torch.from_numpy(targets), ids)
    expected.backward()
    assert loss.dtype == jnp.float64
    assert abs(loss - expected.item()) < 1e-10
    check_close(gradients, {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}, 1e-8)
    check_close(
        aux.loads,
        {
            n.removesuffix(".correction_bias"): model.get_submodule(n[: -len(".correction_bias")]).load.numpy()
            for n in buffers
        },
        0.0,
    )
    check_close(aux.max_logits, torch_maxima(model, tokens, documents(case)), 1e-10)


@pytest.mark.parametrize("case", ["mla", "gqa"])
def test_the_logits_are_those_of_torch(case):
    config = small_config(case)
    params, buffers = random_parameters(config)
    tokens, _ = random_batch(config)
    logits, _ = forward(params, buffers, tokens, config, documents(case))
    ids = None if documents(case) is None else torch.from_numpy(documents(case))
    expected = torch_model(config, params, buffers)(torch.from_numpy(tokens), ids)
    np.testing.assert_allclose(logits, expected.detach(), rtol=1e-9, atol=1e-10)


@every_case
def test_loss_gradients_maxima_and_loads_are_those_of_numpy(case):
    config = small_config(case)
    params, buffers = random_parameters(config, seed=1)
    tokens, targets = random_batch(config, seed=1)
    (loss, aux), gradients = loss_and_gradients(params, buffers, tokens, targets, config, documents(case))
    expected, expected_gradients, max_logits, loads = numpy_moe.loss_and_gradients(
        params, buffers, tokens, targets, config, documents(case)
    )
    assert abs(loss - expected) < 1e-10
    check_close(gradients, expected_gradients, 1e-8)
    check_close(aux.max_logits, max_logits, 1e-10)
    check_close(aux.loads, loads, 0.0)


@every_case
def test_the_gradients_of_numpy_are_its_central_differences(case):
    """For every parameter, along a random direction."""
    config = small_config(case)
    params, buffers = random_parameters(config, seed=2)
    tokens, targets = random_batch(config, seed=2)
    rng = np.random.default_rng(3)
    _, gradients, _, _ = numpy_moe.loss_and_gradients(params, buffers, tokens, targets, config, documents(case))

    def loss_at(name, value):
        moved = params | {name: value}
        return numpy_moe.loss_and_gradients(moved, buffers, tokens, targets, config, documents(case))[0]

    for name, value in params.items():
        direction = rng.normal(size=value.shape)
        direction /= np.linalg.norm(direction)
        slope = (gradients[name] * direction).sum()
        step = 3e-5
        difference = (loss_at(name, value + step * direction) - loss_at(name, value - step * direction)) / (2 * step)
        assert abs(difference - slope) < 1e-7 * np.linalg.norm(gradients[name]), (name, difference, slope)


def test_an_expert_that_no_token_chooses_gets_no_gradient():
    config = small_config()
    params, buffers = random_parameters(config)
    buffers["layers.1.mlp.router.correction_bias"][5] = -10.0
    (_, aux), gradients = loss_and_gradients(params, buffers, *random_batch(config), config)
    assert aux.loads["layers.1.mlp.router"][5] == 0
    assert aux.loads["layers.1.mlp.router"].sum() == 22 * config.num_experts_per_tok
    for part in ("gate_up_proj", "down_proj"):
        gradient = gradients[f"layers.1.mlp.experts.{part}"]
        assert not gradient[5].any()
        assert all(gradient[e].any() for e in range(8) if aux.loads["layers.1.mlp.router"][e])


# What a step needs


def test_balance_is_the_step_hook_of_torch():
    config = small_config(num_layers=3, router_bias_update_rate=0.01)
    params, buffers = random_parameters(config)
    model = torch_model(config, params, buffers)
    arrays = jax_moe.from_torch(model)[1]
    for seed in range(3):
        loads = {}
        for micro_batch in range(2):
            tokens, _ = random_batch(config, seed=10 * seed + micro_batch)
            model(torch.from_numpy(tokens))
            _, aux = forward(params, arrays, tokens, config, observe=False)
            loads = {name: loads.get(name, 0) + load for name, load in aux.loads.items()}
        model.step_hook()
        arrays = jax.jit(jax_moe.balance, static_argnames="config")(arrays, loads, config)
        expected = jax_moe.from_torch(model)[1]
        assert expected.keys() == arrays.keys()
        assert len(arrays) == 2
        for name, bias in expected.items():
            assert jnp.array_equal(arrays[name], bias), name
            assert arrays[name].dtype == jnp.float32
            assert not np.array_equal(bias, buffers[name])


def test_an_expert_with_the_mean_load_keeps_its_bias():
    config = small_config(router_bias_update_rate=0.5)
    buffers = {"layers.1.mlp.router.correction_bias": jnp.zeros(8), "other": jnp.ones(3)}
    moved = jax_moe.balance(buffers, {"layers.1.mlp.router": jnp.array([2.0, 2, 4, 0, 2, 1, 3, 2])}, config)
    assert moved["layers.1.mlp.router.correction_bias"].tolist() == [0, 0, -0.5, 0.5, 0, 0.5, -0.5, 0]
    assert moved["other"] is buffers["other"]


@pytest.mark.parametrize("per_head", [False, True, "pairs"])
@pytest.mark.parametrize("preset", ["cpu", "moonlight"])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"q_lora_rank": None}, {"attention": "gqa"}, {"attention": "mha", "num_shared_experts": 0}, {"qk_norm": True}],
    ids=lambda overrides: "-".join(map(str, overrides.values())) or "plain",
)
def test_muon_reads_the_same_matrices_as_in_torch(preset, overrides, per_head):
    config = getattr(MoEConfig, preset)(num_layers=2, **overrides)
    with torch.device("meta"):
        plan = MuonClip(MoE(config), lr=1e-3, per_head=per_head).plan
    layouts = jax_moe.matrix_layouts(config, per_head=per_head)
    assert layouts == {line.name: line.layout for line in plan.parameters}
    assert {name for name, layout in layouts.items() if layout is None} == {
        line.name for line in plan.parameters if line.use == "adamw"
    }


@pytest.mark.parametrize("case", ["mla", "mla-direct", "gqa", "mha", "yarn"])
def test_a_clipped_head_shows_tau_when_its_inputs_are_seen_again(case):
    config = small_config(case, num_layers=1)
    params, buffers = random_parameters(config)
    params, (tokens, _) = jax.tree.map(jnp.asarray, params), random_batch(config)

    def maxima(params):
        return forward(params, buffers, tokens, config, documents(case))[1].max_logits

    before = maxima(params)
    tau = np.sort(before["layers.0.attn"])[1:3].mean()
    assert tau > 0
    clip = qk_clip(jax_moe.qk_projections(config), tau=float(tau))
    updates, _ = clip.update(jax.tree.map(jnp.zeros_like, params), clip.init(params), params, max_logits=before)
    after = maxima(optax.apply_updates(params, updates))
    np.testing.assert_allclose(after["layers.0.attn"], np.minimum(before["layers.0.attn"], tau), rtol=1e-6)


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_with_qk_norm_the_attention_is_observed_only(attention):
    config = small_config(attention=attention, qk_norm=True)
    params, buffers = random_parameters(config)
    params = jax.tree.map(jnp.asarray, params)
    _, aux = forward(params, buffers, random_batch(config)[0], config)
    assert all((each > 0.1).any() for each in aux.max_logits.values())
    projections = jax_moe.qk_projections(config)
    assert all("QK-norm" in projection.reason for projection in projections.values())
    clip = qk_clip(projections, tau=0.1)
    updates, _ = clip.update(jax.tree.map(jnp.zeros_like, params), clip.init(params), params, max_logits=aux.max_logits)
    assert not any(update.any() for update in updates.values())


# Names, first values, converters


@pytest.mark.parametrize("attention", ["mla", "gqa", "mha"])
@pytest.mark.parametrize("preset", ["cpu", "gpu", "node", "moonlight", "k2"])
def test_names_shapes_and_dtypes_are_those_of_torch(preset, attention):
    check_names(getattr(MoEConfig, preset)(attention=attention))


@pytest.mark.parametrize(
    "overrides",
    [
        {"q_lora_rank": None},
        {"qk_norm": True},
        {"qk_norm": True, "attention": "gqa"},
        {"num_shared_experts": 0},
        {"num_shared_experts": 2},
        {"num_dense_layers": 0},
        {"num_dense_layers": 3},
    ],
)
def test_options_have_the_names_of_torch(overrides):
    check_names(MoEConfig.cpu(**overrides))


def check_names(config):
    with torch.device("meta"):
        model = MoE(config)
    params, buffers = jax.eval_shape(
        lambda key: (jax_moe.init(config, key), jax_moe.init_buffers(config)), jax.random.key(0)
    )
    assert {n: (x.shape, str(x.dtype)) for n, x in params.items()} == {
        n: (tuple(p.shape), str(p.dtype).removeprefix("torch.")) for n, p in model.named_parameters()
    }
    assert {n: (x.shape, str(x.dtype)) for n, x in buffers.items()} == {
        n: (tuple(b.shape), str(b.dtype).removeprefix("torch.")) for n, b in model.named_buffers()
    }
    assert {**params, **buffers}.keys() == model.state_dict().keys()


@pytest.mark.slow
def test_first_values_have_the_distribution_of_torch():
    config = MoEConfig.cpu(num_layers=2)
    for name, parameter in jax_moe.init(config, jax.random.key(0)).items():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
        std = config.init_std / (2.0 if residual else 1.0)
        assert parameter.std() == pytest.approx(std, rel=0.1), name
        assert abs(parameter.mean()) < 5 * std / math.sqrt(parameter.size), name
        assert 2.5 * std < abs(parameter).max() < 6 * std, name
    assert not any(bias.any() for bias in jax_moe.init_buffers(config).values())


@pytest.mark.slow
def test_first_values_depend_on_key_and_name_alone():
    config, more = small_config(), small_config(num_experts_per_tok=3, num_shared_experts=0, vocab_size=32)
    key = jax.random.key(3)
    params, others, again = jax_moe.init(config, key), jax_moe.init(more, key), jax_moe.init(config, jax.random.key(4))
    for name, parameter in others.items():
        assert jnp.array_equal(parameter, params[name]), name
        assert parameter.ndim == 1 or not jnp.array_equal(parameter, again[name]), name
    first, second = params["layers.0.attn.o_proj.weight"], params["layers.1.attn.o_proj.weight"]
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
    narrow = jax_moe.init(config, key, jnp.bfloat16)
    assert all(jnp.array_equal(narrow[name], parameter.astype(jnp.bfloat16)) for name, parameter in params.items())


def test_a_fresh_model_knows_nothing():
    config = MoEConfig.cpu()
    params, buffers = jax_moe.init(config, jax.random.key(0)), jax_moe.init_buffers(config)
    tokens, targets = np.random.default_rng(0).integers(256, size=(2, 8, 64))
    loss, _ = jax.jit(jax_moe.loss, static_argnames="config")(params, buffers, tokens, targets, config)
    assert loss == pytest.approx(math.log(256), abs=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_converters_keep_every_bit(dtype):
    config = small_config()
    torch.manual_seed(0)
    model = MoE(config).to(dtype)
    model.layers[1].mlp.router.correction_bias.uniform_(-1, 1)
    params, buffers = jax_moe.from_torch(model)
    assert {str(x.dtype) for x in params.values()} == {str(dtype).removeprefix("torch.")}
    assert {x.dtype for x in buffers.values()} == {jnp.dtype("float32")}
    assert params.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert np.array_equal(np.asarray(params[name], np.float64), parameter.detach().double().numpy()), name
    state = jax_moe.to_torch(params, buffers)
    other = MoE(config).to(dtype)
    assert other.load_state_dict(state, strict=True).missing_keys == []
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value), name
        assert torch.equal(other.state_dict()[name], value), name
    from_state = jax_moe.from_torch(model.state_dict())
    assert all(map(jnp.array_equal, jax.tree.leaves(from_state), jax.tree.leaves((params, buffers))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converters_make_copies(dtype):
    model = MoE(small_config()).to(dtype)
    params, buffers = jax_moe.from_torch(model)
    before = jax.tree.map(lambda x: np.array(x, np.float64), (params, buffers))
    state = jax_moe.to_torch(params, buffers)
    with torch.no_grad():
        for value in (*model.state_dict().values(), *state.values()):
            value.fill_(7.0)
    jax.tree.map(np.testing.assert_array_equal, (params, buffers), before)


# Precision, options, errors


@pytest.mark.slow
def test_float32_and_bfloat16_stay_near_float64():
    config = small_config()
    params, buffers = random_parameters(config)
    batch = random_batch(config)
    (exact, _), exact_gradients = loss_and_gradients(params, buffers, *batch, config)
    for dtype, loss_error, gradient_error in ((jnp.float32, 1e-5, 1e-3), (jnp.bfloat16, 0.03, 0.3)):
        narrow = {name: jnp.asarray(value, dtype) for name, value in params.items()}
        logits, _ = jax.eval_shape(functools.partial(jax_moe.forward, config=config), narrow, buffers, batch[0])
        assert logits.dtype == dtype
        (loss, aux), gradients = loss_and_gradients(narrow, buffers, *batch, config)
        assert loss.dtype == jnp.float32
        assert float(loss) == pytest.approx(float(exact), rel=loss_error)
        assert {x.dtype for x in (*aux.max_logits.values(), *aux.loads.values())} == {jnp.dtype("float32")}
        for name, gradient in gradients.items():
            assert gradient.dtype == dtype
            assert jnp.isfinite(gradient).all()
            routed = ".experts." in name or ".router." in name  # a token near a tie may change its expert
            if dtype == jnp.float32 or not routed:
                difference = np.asarray(gradient, np.float64) - exact_gradients[name]
                assert np.linalg.norm(difference) < gradient_error * np.linalg.norm(exact_gradients[name]), name


@pytest.mark.slow
def test_rematerialised_layers_give_the_same():
    config = small_config("gqa")
    params, buffers = random_parameters(config)
    batch = random_batch(config)
    (plain, aux), gradients = loss_and_gradients(params, buffers, *batch, config, DOCUMENTS)
    (loss, again), recomputed = loss_and_gradients(params, buffers, *batch, config, DOCUMENTS, remat=True)
    assert abs(loss - plain) < 1e-12
    check_close(recomputed, gradients, 1e-12)
    check_close(again.max_logits, aux.max_logits, 1e-12)
    check_close(again.loads, aux.loads, 0.0)
    jaxpr = jax.make_jaxpr(functools.partial(jax_moe.loss, config=config, remat=True))(params, buffers, *batch).jaxpr
    assert sum("prevent_cse" in equation.params for equation in jaxpr.eqns) == config.num_layers


@pytest.mark.slow
def test_an_evaluation_need_not_measure():
    config = small_config()
    params, buffers = random_parameters(config)
    batch = random_batch(config)
    loss, aux = jax_moe.loss(params, buffers, *batch, config, observe=False)
    assert aux.max_logits == {}
    assert abs(loss - jax_moe.loss(params, buffers, *batch, config)[0]) < 1e-12


def test_ignored_targets_do_not_count():
    config = small_config()
    params, buffers = random_parameters(config)
    tokens, targets = random_batch(config)
    logits, _ = forward(params, buffers, tokens, config)
    log_probabilities = np.asarray(logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    picked = [log_probabilities[b, t, targets[b, t]] for b, t in np.ndindex(targets.shape) if targets[b, t] >= 0]
    assert len(picked) == 21
    loss, _ = jax_moe.loss(params, buffers, tokens, targets, config)
    assert loss == pytest.approx(-np.mean(picked), rel=1e-12)


def test_too_long_a_sequence_is_refused():
    config = small_config()
    params, buffers = random_parameters(config)
    with pytest.raises(ValueError, match="tokens has 17 positions; max_seq_len=16"):
        forward(params, buffers, random_batch(config, length=17)[0], config)
