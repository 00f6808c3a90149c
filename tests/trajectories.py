"""Print where short runs end, to the last bit, so that two versions of the library can be compared line by line.

    PYTHONPATH=OLD OMP_NUM_THREADS=1 python trajectories.py --save states > old.txt
    PYTHONPATH=NEW OMP_NUM_THREADS=1 python trajectories.py               > new.txt      # the same lines
    PYTHONPATH=NEW OMP_NUM_THREADS=1 python trajectories.py --load states > resumed.txt  # ends at the same hashes

Each run trains 20 steps with a τ low enough that heads are clipped. A line holds its name, the SHA-256 of all final
parameters (their bytes, in the order of their names), the loss of the last step and the number of heads clipped in all
steps. `--save` writes the state dicts of model and optimizer after 10 steps; `--load` starts from those, trains the 10
steps that are left, and counts the heads clipped before as well. Only public names are used.
"""

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from muonclip.models import MoEConfig
from muonclip.models.parallel import Parallelism, parallelize
from muonclip.models.torch import MoE
from muonclip.torch import Muon, MuonClip, QKClip

STEPS, SAVED = 20, 10
RATE, DECAY, TAU = 0.02, 0.1, 0.5
VOCABULARY, LENGTH, BATCH, RANKS = 24, 12, 8, 4
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_layers": 2,
    "max_seq_len": LENGTH,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "head_dim": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "init_std": 0.2,
}

Trained = tuple[nn.Module, torch.optim.Optimizer]
"""What is called on tokens, and its optimizer."""
Shared = tuple[nn.Module, torch.optim.Optimizer, int, int]
"""And which share of the batch this rank takes, of how many."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="train these runs only")
    parser.add_argument("--save", type=Path, metavar="DIR", help=f"write the state dicts after {SAVED} steps to DIR")
    parser.add_argument("--load", type=Path, metavar="DIR", help="start from the state dicts in DIR")
    options = parser.parse_args()
    names = [*ALONE, *OVER_RANKS, *IN_JAX]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"--only {' '.join(sorted(unknown))}: unknown; the runs are {' '.join(names)}")
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in names if options.only is None or name in options.only]
    torch.set_num_threads(1)
    for name in wanted:
        if name in ALONE:
            print(name, *train(f"{name}.pt", options.save, options.load, *ALONE[name]()), flush=True)
    if over_ranks := [name for name in wanted if name in OVER_RANKS]:
        train_over_ranks(over_ranks, options.save, options.load)
    for name in wanted:
        if name in IN_JAX and not options.load:  # states are torch's
            print(name, *train_in_jax(**IN_JAX[name]), flush=True)


def moe(**config: object) -> MoE:
    torch.manual_seed(0)
    return MoE(MoEConfig.cpu(**(SIZES | config)))


def moe_clipped(config: dict[str, object] | None = None, **options: object) -> Trained:
    model = moe(**(config or {}))
    return model, MuonClip(model, **(dict(lr=RATE, weight_decay=DECAY, tau=TAU, ns_dtype=torch.float32) | options))


def moe_always_observed(**config: object) -> Trained:
    model = moe(**config)
    clip = QKClip(model, tau=TAU, observe="always")
    return model, MuonClip(model, lr=RATE, weight_decay=DECAY, qk_clip=clip, ns_dtype=torch.float32)


def moe_matrices(**options: object) -> Trained:
    """Muon alone, of the hidden matrices and stacks; the other parameters stay."""
    model = moe()
    hidden = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and "embed" not in name and "head" not in name
    ]
    return model, Muon(hidden, lr=RATE, weight_decay=DECAY, ns_dtype=torch.float32, **options)


def moe_with_adamw(**config: object) -> Trained:
    """The clip alone, after torch's own optimizer."""
    model = moe(**config)
    clip = QKClip(model, tau=TAU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    optimizer.qk_clip = clip
    optimizer.register_step_post_hook(lambda *_: clip.step())
    return model, optimizer


class FusedBlock(nn.Module):
    """q, k and v in one projection, under scaled_dot_product_attention; gate and up in one projection."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.attn_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv_proj = nn.Linear(width, 3 * heads * head_dim)
        self.o_proj = nn.Linear(heads * head_dim, width)
        self.gate_up_proj = nn.Linear(width, 2 * 20, bias=False)
        self.down_proj = nn.Linear(20, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj(self.attn_norm(x)).unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        gate, up = self.gate_up_proj(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down_proj(F.silu(gate) * up)


class FusedGPT(nn.Module):
    """A model that the library does not know: its attention is to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 18)
        self.blocks = nn.Sequential(FusedBlock(18, 3, 8), FusedBlock(18, 3, 8))
        self.lm_head = nn.Linear(18, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.blocks(self.embed(tokens)))


def fused(**options: object) -> Trained:
    torch.manual_seed(0)
    model = FusedGPT()
    with torch.no_grad():
        for block in model.blocks:
            block.qkv_proj.weight.mul_(3)
    return model, MuonClip(model, lr=RATE, weight_decay=DECAY, tau=TAU, ns_dtype=torch.float32, **options)


def llama(attention: str) -> Trained:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        initializer_range=0.15,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    return model, MuonClip(model, lr=RATE, weight_decay=DECAY, tau=TAU, ns_dtype=torch.float32)


def ddp() -> Shared:
    model, optimizer = moe_clipped()
    # Without the option the buckets are ordered anew after the first backward pass, and with them the sums over ranks:
    # the first step of a resumed run would differ in the last bit.
    replica = DistributedDataParallel(model, find_unused_parameters=True)
    return replica, optimizer, dist.get_rank(), dist.get_world_size()


def parallel(config: dict[str, object] | None = None, **degrees: int) -> Shared:
    model = moe(**(config or {}))
    meshes = parallelize(model, Parallelism(**degrees))
    optimizer = MuonClip(model, lr=RATE, weight_decay=DECAY, tau=TAU, ns_dtype=torch.float32)
    return model, optimizer, meshes.data_rank, meshes.data_size


ALONE: dict[str, Callable[[], Trained]] = {
    "mla": moe_clipped,
    "gqa": lambda: moe_clipped({"attention": "gqa"}),
    "mha": lambda: moe_clipped({"attention": "mha"}),
    "mla-direct-queries": lambda: moe_clipped({"q_lora_rank": None}),
    "mla-always-observed": moe_always_observed,
    "gqa-always-observed": lambda: moe_always_observed(attention="gqa"),
    "mla-default-precision": lambda: moe_clipped(ns_dtype=None),
    "mla-per-head": lambda: moe_clipped(per_head=True),
    "mla-heavy-ball-gram": lambda: moe_clipped(nesterov=False, ns_form="gram", products="baddbmm"),
    "mla-qk-norm": lambda: moe_clipped({"qk_norm": True}),
    "gqa-adamw-and-clip": lambda: moe_with_adamw(attention="gqa"),
    "fused": fused,
    "fused-per-head": lambda: fused(per_head=True),
    "llama-sdpa": lambda: llama("sdpa"),
    "llama-eager": lambda: llama("eager"),
    "muon": moe_matrices,
    "muon-gram": lambda: moe_matrices(ns_form="gram"),
    "muon-heavy-ball": lambda: moe_matrices(nesterov=False),
    "muon-polar-express": lambda: moe_matrices(ns_coefficients="polar_express", ns_steps=6, freeze_unused=True),
}
OVER_RANKS: dict[str, Callable[[], Shared]] = {
    "ddp": ddp,
    "fsdp": lambda: parallel(shards=4),
    "fsdp-gqa": lambda: parallel({"attention": "gqa"}, shards=4),
    "hsdp-experts": lambda: parallel(replicas=2, shards=2, experts=2),
    "fsdp-tensor": lambda: parallel({"attention": "mha"}, shards=2, tensor=2),
}
IN_JAX: dict[str, dict[str, object]] = {
    "jax-mla": {},
    "jax-gqa": {"attention": "gqa"},
    "jax-mha": {"attention": "mha"},
    "jax-gram-heavy-ball": {"ns_form": "gram", "nesterov": False},
}


def batches() -> Iterator[tuple[int, torch.Tensor]]:
    """The steps from 1, and their tokens, int64 [BATCH, LENGTH + 1]."""
    for step in range(1, STEPS + 1):
        yield step, torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def train(
    file: str,
    save: Path | None,
    load: Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    part: int = 0,
    parts: int = 1,
) -> tuple[str, str, int]:
    """Train on one part of each batch: hash of the final parameters, mean last loss, clipped heads."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    clip = getattr(optimizer, "qk_clip", None)
    clipped, loss = 0, torch.tensor(float("nan"))
    for step, tokens in batches():
        if load and step == SAVED + 1:
            state = torch.load(load / file, weights_only=True)
            inner.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            clipped = state["clipped"]
        if load and step <= SAVED:
            continue
        share = tokens.chunk(parts)[part]
        logits = model(share[:, :-1])
        logits = getattr(logits, "logits", logits)
        loss = F.cross_entropy(logits.flatten(0, 1), share[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        if isinstance(inner, MoE):
            inner.step_hook()
        optimizer.zero_grad()
        clipped += clip.report().clipped_heads if clip else 0
        if save and step == SAVED:
            state = {"model": inner.state_dict(), "optimizer": optimizer.state_dict(), "clipped": clipped}
            torch.save(state, save / file)
    loss = loss.detach()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return digest(inner.named_parameters()), f"{loss.item():.17g}", clipped


def digest(named: Iterator[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of the bytes of all tensors, whole, in the order of their names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(named):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        sha.update(name.encode() + whole.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def train_over_ranks(names: list[str], save: Path | None, load: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"file://{folder}/store", names, save, load)
        torch.multiprocessing.start_processes(train_on_a_rank, arguments, nprocs=RANKS, start_method="spawn")


def train_on_a_rank(rank: int, store: str, names: list[str], save: Path | None, load: Path | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    for name in names:
        line = train(f"{name}.{rank}.pt", save, load, *OVER_RANKS[name]())
        if rank == 0:
            print(name, *line, flush=True)
    dist.barrier()
    dist.destroy_process_group()


def train_in_jax(**options: object) -> tuple[str, str, int]:
    """Train the reference model in JAX from the weights that it has in torch."""
    import jax
    import optax

    from muonclip.models import jax as jax_moe
    from muonclip.optax import muonclip

    attention = {"attention": options.pop("attention")} if "attention" in options else {}
    model = moe(**attention)
    config = model.config
    params, buffers = jax_moe.from_torch(model)
    tx = muonclip(
        RATE,
        DECAY,
        tau=TAU,
        qk_projections=jax_moe.qk_projections(config),
        muon_weight_dimension_numbers=jax_moe.matrix_layouts(config),
        **options,
    )

    @jax.jit
    def update(params, buffers, state, tokens, targets):
        (loss, aux), gradients = jax.value_and_grad(jax_moe.loss, has_aux=True)(
            params, buffers, tokens, targets, config
        )
        updates, state = tx.update(gradients, state, params, max_logits=aux.max_logits)
        return optax.apply_updates(params, updates), jax_moe.balance(buffers, aux.loads, config), state, loss

    state, clipped, loss = tx.init(params), 0, float("nan")
    for _, tokens in batches():
        tokens = tokens.numpy()
        params, buffers, state, loss = update(params, buffers, state, tokens[:, :-1], tokens[:, 1:])
        clipped += sum(int((gamma < 1).sum()) for gamma in optax.tree.get(state, "gamma").values())
    named = {name: torch.from_numpy(jax.device_get(array).copy()) for name, array in params.items()}
    return digest(iter(named.items())), f"{float(loss):.17g}", clipped


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
