"""A run's model and optimizer in JAX and Optax, float32 on the CPU.

The whole step is one compiled function, made before the first step; rate and threshold are its arguments, so nothing is
compiled again. All arms have the clip in it, with an infinite threshold where they have none: so arms that differ in
the clip alone are the same program, and the same to the bit until it acts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax import Array

from benchmarks.experiment.arms import Arm
from benchmarks.experiment.experiment import Experiment
from benchmarks.training.learner import Learner, Windows
from benchmarks.training.torch_learner import first_model
from muonclip.core.adam_defaults import ADAM_EPS
from muonclip.models import jax as models
from muonclip.models.torch import MoE
from muonclip.optax import muonclip, qk_clip


class State(NamedTuple):
    """The arrays that a step changes."""

    params: models.Params
    buffers: models.Buffers
    optimizer: optax.OptState


class JaxLearner(Learner):
    """`now` is the state after the last step; a step uses its arrays up."""

    def __init__(self, experiment: Experiment, arm: Arm, seed: int) -> None:
        self.arm = arm
        self._reference = first_model(experiment, arm, seed)
        params, buffers = models.from_torch(self._reference)
        begin = jax.jit(transformation(arm, arm.lr, arm.training.tau).init)
        self.now = State(params, buffers, begin(params))
        windows = jax.ShapeDtypeStruct((arm.training.batch_size, arm.model.max_seq_len + 1), jnp.int32)
        number = jax.ShapeDtypeStruct((), jnp.float32)
        step = jax.jit(partial(_step, arm), donate_argnums=0)
        self.compiled = step.lower(self.now, windows, number, number).compile()
        self._validation_loss = jax.jit(partial(_loss, arm))

    def step(self, windows: Windows, done: int, lr: float) -> dict[str, Any]:
        tau = self.arm.tau(done)
        self.now, measured = self.compiled(self.now, windows.astype(np.int32), np.float32(lr), np.float32(tau))
        record = jax.tree.map(lambda array: array.tolist(), measured)
        finite = math.isfinite(record["loss"] + record["grad_norm"])
        return record if finite else record | {"max_logits": {}, "clipped_heads": 0}

    def loss(self, windows: Windows) -> float:
        return self._validation_loss(self.now.params, self.now.buffers, windows.astype(np.int32)).item()

    def reference(self) -> MoE:
        self._reference.load_state_dict(models.to_torch(self.now.params, self.now.buffers))
        return self._reference

    def state(self) -> dict[str, Any]:
        leaves = jax.tree.leaves_with_path(self.now.optimizer)
        optimizer = {jax.tree_util.keystr(path): _to_torch(leaf) for path, leaf in leaves}
        return {"model": models.to_torch(self.now.params, self.now.buffers), "optimizer": optimizer}

    def restore(self, state: dict[str, Any]) -> None:
        saved = state["optimizer"]
        optimizer = jax.tree.map_with_path(
            lambda path, _: _to_jax(saved[jax.tree_util.keystr(path)]), self.now.optimizer
        )
        self.now = State(*models.from_torch(state["model"]), optimizer)


def transformation(arm: Arm, lr: Any, tau: Any) -> optax.GradientTransformationExtraArgs:
    """Make what the arm does with gradients; `lr` and `tau` may be traced, and the state does not depend on them."""
    training = arm.training
    projections = models.qk_projections(arm.model)
    b1, b2 = training.betas
    if arm.optimizer == "muon":
        update = muonclip(
            lr,
            beta=training.momentum,
            qk_projections=projections,
            tau=tau,
            nesterov=training.nesterov,
            ns_dtype=jnp.float32,
            muon_weight_dimension_numbers=models.matrix_layouts(arm.model, per_head=arm.per_head),
            adamw={
                "learning_rate": lr * arm.adamw_share,
                "weight_decay": training.weight_decay,
                "b1": b1,
                "b2": b2,
                "eps": ADAM_EPS,
            },
            **{"weight_decay": training.weight_decay, **_in_optax(arm.options)},
        )
    else:
        adamw = optax.adamw(lr, b1, b2, eps=ADAM_EPS, weight_decay=training.weight_decay, mask=_matrices)
        update = optax.chain(adamw, qk_clip(projections, tau))
    return optax.chain(optax.clip_by_global_norm(training.grad_clip), update)


def _to_torch(array: Array) -> torch.Tensor:
    """Copy an array to PyTorch, which does not know NumPy's bfloat16."""
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _to_jax(tensor: torch.Tensor) -> Array:
    if tensor.dtype == torch.bfloat16:
        return jnp.array(tensor.view(torch.int16).numpy().view(jnp.bfloat16))
    return jnp.array(tensor.numpy())


def _in_optax(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an arm by the names that they have in Optax."""
    return {"mu_dtype" if name == "momentum_dtype" else name: value for name, value in options.items()}


def _step(arm: Arm, state: State, windows: Array, lr: Array, tau: Array) -> tuple[State, dict[str, Any]]:
    """Return the state after the step, and the step's part of the record: its norm is that before clipping."""
    (loss, aux), gradients = jax.value_and_grad(models.loss, has_aux=True)(
        state.params, state.buffers, windows[:, :-1], windows[:, 1:], arm.model
    )
    updates, optimizer = transformation(arm, lr, tau).update(
        gradients, state.optimizer, state.params, max_logits=aux.max_logits
    )
    clipped = sum(jnp.sum(gamma < 1, dtype=jnp.int32) for gamma in optax.tree.get(optimizer, "gamma").values())
    params: Any = optax.apply_updates(state.params, updates)
    state = State(params, models.balance(state.buffers, aux.loads, arm.model), optimizer)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(gradient)) for gradient in gradients.values()))
    return state, {"loss": loss, "grad_norm": norm, "max_logits": aux.max_logits, "clipped_heads": jnp.asarray(clipped)}


def _loss(arm: Arm, params: models.Params, buffers: models.Buffers, windows: Array) -> Array:
    return models.loss(params, buffers, windows[:, :-1], windows[:, 1:], arm.model, observe=False)[0]


def _matrices(params: models.Params) -> dict[str, bool]:
    return {name: array.ndim >= 2 for name, array in params.items()}
