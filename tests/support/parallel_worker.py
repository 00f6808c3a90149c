"""One rank of the tests of `test_parallel.py`: the reference model over ranks against itself whole.

python parallel_worker.py FOLDER CASES       CASES: JSON, name → `degrees` of Parallelism, `kind`, and its arguments

Every rank computes the whole model on the whole batch too. What is found goes to FOLDER/RANK.json, by case.
"""

import copy
import json
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from muonclip.models import MoEConfig
from muonclip.models.parallel import Parallelism, parallelize
from muonclip.models.torch import MixtureOfExperts, MoE

SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_layers": 2,
    "max_seq_len": 16,
    "q_lora_rank": 12,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "router_bias_update_rate": 0.01,
}
ROWS, LENGTH, STEPS, RATE = 2, 12, 3, 0.1


def make_model(config, dtype=torch.float64):
    torch.manual_seed(0)
    model = MoE(MoEConfig.cpu(**(SMALL | config))).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def windows(ranks):
    return torch.randint(48, (ROWS * ranks, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def routers(model):
    return [layer.mlp.router for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts)]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def backward(model, batch):
    model.zero_grad()
    loss = model.loss(batch[:, :-1], batch[:, 1:])
    loss.backward()
    return loss.detach()


def gradients(model):
    return {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}


def descend(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= RATE * parameter.grad
    model.step_hook()


def distance(a, b):
    """Of b from a by name, relative to the largest element of a, the worst."""
    assert a.keys() == b.keys()
    return max(((b[name] - a[name]).abs().max() / a[name].abs().max().clamp_min(1e-30)).item() for name in a)


def angle(a, b):
    """|b − a| / |a| of all together."""
    difference, size = (
        sum(tensor.double().square().sum().item() for tensor in tensors)
        for tensors in ((b[name] - a[name] for name in a), a.values())
    )
    return (difference / size) ** 0.5


def same_everywhere(tensors):
    check = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    first = check.clone()
    dist.broadcast(first, src=0)
    return torch.equal(first, check)


class Counted(TorchDispatchMode):
    """How often operations run, by name."""

    def __enter__(self):
        self.calls = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def compare(parallelism, *, config=None, dtype="float64", one_expert=False, **options):
    """The same steps of gradient descent on the whole model, and on the model over ranks."""
    reference = make_model(config or {}, getattr(torch, dtype))
    if one_expert:  # and its neighbour: other ranks have nothing to do
        for router in routers(reference):
            router.correction_bias[:2] += 10
    model = copy.deepcopy(reference)
    meshes = parallelize(model, parallelism, **options)
    assert (meshes.data_size, meshes.world_mesh.size()) == (parallelism.data, dist.get_world_size())
    if parallelism.tensor > 1:
        for layer in (*model.layers, *reference.layers):
            layer.attn.max_logits = None
    before, after = ({name: whole(p.detach()) for name, p in m.named_parameters()} for m in (reference, model))
    result = {
        "weights": distance(before, after),
        "names": [list(reference.state_dict()), list(model.state_dict())],
        "placements": {
            name: [
                [repr(placement) for placement in p.placements],
                dict(zip(p.device_mesh.mesh_dim_names, p.device_mesh.shape, strict=True)),
            ]
            for name, p in model.named_parameters()
        },
        **{key: [] for key in ("losses", "expected_losses", "gradients", "all_gradients")},
        "alike": True,
    }
    batch = windows(meshes.data_size)
    for _ in range(STEPS):
        result["expected_losses"].append(backward(reference, batch).item())
        loss = backward(model, batch.chunk(meshes.data_size)[meshes.data_rank])
        if meshes.data_group is not None:
            dist.all_reduce(loss, group=meshes.data_group)
        result["losses"].append(loss.item() / meshes.data_size)
        assert {p.grad.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        expected, found = gradients(reference), gradients(model)
        result["gradients"].append(distance(expected, found))
        result["all_gradients"].append(angle(expected, found))
        descend(reference)
        descend(model)
        result["alike"] &= same_everywhere([whole(parameter) for parameter in model.parameters()])
        result["alike"] &= same_everywhere([router.correction_bias for router in routers(model)])
    pairs = zip(routers(reference), routers(model), strict=True)
    result["bias"] = [torch.equal(a.correction_bias, b.correction_bias) for a, b in pairs]
    return result


def compare_recompute(parallelism, *, config=None, options=None):
    """With and without, in fp32: gradients, statistics, and how often operations run. `options`: of recomputation."""
    found, angles = {}, []
    for recompute in (False, True):
        model = make_model(config or {}, torch.float32)
        meshes = parallelize(model, parallelism, recompute=recompute, **(options or {} if recompute else {}))
        if parallelism.tensor > 1:
            for layer in model.layers:
                layer.attn.max_logits = None
        with Counted() as counted:
            loss = backward(model, windows(meshes.data_size).chunk(meshes.data_size)[meshes.data_rank])
        maxima = [layer.attn.max_logits.packed for layer in model.layers if layer.attn.max_logits is not None]
        found[recompute] = [loss, *gradients(model).values(), *maxima], counted.calls
        angles.append(gradients(model))
    (without, once), (again, twice) = found[False], found[True]
    names = "mm", "_scaled_dot_product_flash_attention_for_cpu", "silu", "topk", "rsqrt"
    return {
        "equal": all(torch.equal(a, b) for a, b in zip(without, again, strict=True)),
        "same_loss": torch.equal(without[0], again[0]),
        "angle": angle(*angles),
        "calls": {name: [once[name], twice[name]] for name in names},
    }


def fill(parallelism, *, config=None):
    """A model that was built on the meta device."""
    torch.manual_seed(5)
    with torch.device("meta"):
        model = MoE(MoEConfig.cpu(**(SMALL | {"hidden_size": 64, "vocab_size": 96} | (config or {}))))
    meshes = parallelize(model, parallelism)
    model.to_empty(device="cpu")
    model.reset_parameters()
    tensors = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    flat = torch.cat([tensor.flatten() for tensor in tensors.values() if tensor.ndim > 1])
    if parallelism.tensor > 1:
        for layer in model.layers:
            layer.attn.max_logits = None
    batch = windows(meshes.data_size).chunk(meshes.data_size)[meshes.data_rank]
    return {
        "alike": same_everywhere(list(tensors.values())),
        "deviations": {name: tensor.std().item() for name, tensor in tensors.items() if tensor.ndim > 1},
        "elements": {name: tensor.numel() for name, tensor in tensors.items() if tensor.ndim > 1},
        "gains": all((tensor == 1).all().item() for tensor in tensors.values() if tensor.ndim == 1),
        "repeated": flat.numel() - flat.unique().numel(),
        "loss": backward(model, batch).item(),
    }


def checkpoint(parallelism, *, config=None):
    """Written by all ranks, read whole."""
    model = make_model(config or {})
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parallelize(model, parallelism)
    folder = f"{sys.argv[1]}/checkpoint"
    dcp.save(dict(model.named_parameters()), checkpoint_id=folder)
    read = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    dcp.load(read, checkpoint_id=folder)
    return {"equal": {name: torch.equal(tensor, read[name]) for name, tensor in whole.items()}}


torch.set_num_threads(1)
warnings.simplefilter("error")
dist.init_process_group("gloo")
results = {}
for name, case in json.loads(sys.argv[2]).items():
    run = {
        "compare": compare,
        "recompute": compare_recompute,
        "stored": compare_recompute,
        "fill": fill,
        "checkpoint": checkpoint,
    }[case.pop("kind", "compare")]
    results[name] = run(Parallelism(**case.pop("degrees")), **case)
(Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(results))
dist.barrier()
dist.destroy_process_group()
