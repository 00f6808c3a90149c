"""One rank of `test_megatron.py`: a GPTModel of Megatron-core's own modules, on the CPU."""

import re
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_attention import dense_max_logits

warnings.simplefilter("ignore")  # of Megatron's imports
torch.cuda.current_device = lambda: torch.device("cpu")  # the one function of CUDA that the model needs
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.tensor_parallel.random import initialize_rng_tracker  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from muonclip.core import MatrixLayout  # noqa: E402
from muonclip.torch import MuonClip, QKClip  # noqa: E402

WIDTH, HEADS, GROUPS, HEAD, FFN, VOCABULARY, LENGTH = 40, 8, 4, 6, 56, 64, 12
TAU = 4.0
OPTIONS = dict(lr=0.02, weight_decay=0.1)
LAYERS = 2


def gpt():
    """The same model whatever the number of ranks, in float64."""
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD,
        ffn_hidden_size=FFN,
        tensor_model_parallel_size=dist.get_world_size(),
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gated_linear_unit=True,
        activation_func=F.silu,
        init_method_std=0.3,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
    )
    torch.manual_seed(0)
    spec = get_gpt_layer_local_spec()
    model = GPTModel(config, spec, vocab_size=VOCABULARY, max_sequence_length=LENGTH, position_embedding_type="rope")
    return model.double()


def loss_of(model, step):
    tokens = torch.randint(VOCABULARY, (3, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    positions = torch.arange(LENGTH).expand(3, -1)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()


class Probe:
    """The largest logits of this rank's heads, of the queries and keys that Megatron's attention is given."""

    def __init__(self, model):
        self.model = model
        self.seen = [[] for _ in model.decoder.layers]
        for layer, seen in zip(model.decoder.layers, self.seen, strict=True):
            layer.self_attention.core_attention.register_forward_pre_hook(self._keeper(layer, seen))

    @staticmethod
    def _keeper(layer, seen):
        def keep(module, args):
            if module is layer.self_attention.core_attention:  # and not of a copy
                q, k = (each.detach().permute(1, 2, 0, 3) for each in args[:2])
                seen.append(torch.from_numpy(dense_max_logits(q, k)))

        return keep

    def take(self):
        """fp64 [layers, heads]."""
        maxima = torch.stack([torch.stack(seen).amax(0) for seen in self.seen])
        for seen in self.seen:
            seen.clear()
        return maxima


def recipe():
    """`megatron_muonclip`, as the page has it."""
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
    block = re.search(
        r"^    import torch\n    from megatron.*?^    +return optimizer.*?\n", page, re.DOTALL | re.MULTILINE
    )
    names = {}
    exec(re.sub("^    ", "", block[0], flags=re.MULTILINE), names)
    return names["megatron_muonclip"]


def adamw(model, *, tau):
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    clip = QKClip(model, tau=tau, observe="always")
    clip.attach(optimizer)
    optimizer.qk_clip = clip
    return optimizer


def plain(model, *, tau):
    gate_and_up = {"*.linear_fc1.weight": MatrixLayout(blocks=(FFN, FFN))}
    return MuonClip(model, qk_clip=QKClip(model, tau=tau, observe="always"), layouts=gate_and_up, **OPTIONS)


def by_recipe(model, *, tau):
    return recipe()(model, QKClip(model, tau=tau, observe="always"), **OPTIONS)


MAKES = {"adamw": adamw, "plain": plain, "recipe": by_recipe}


def whole(model):
    """The parameters as one process has them."""
    ranks, whole = dist.get_world_size(), {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().clone()
        if getattr(parameter, "tensor_model_parallel", False) and ranks > 1:
            parts = [torch.empty_like(value) for _ in range(ranks)]
            dist.all_gather(parts, value.contiguous())
            pieces = [part.chunk(parameter.partition_stride, parameter.partition_dim) for part in parts]
            value = torch.cat(
                [piece for stride in zip(*pieces, strict=True) for piece in stride], parameter.partition_dim
            )
        whole[name] = value
    return whole


def train(make, tau, steps):
    model = gpt()
    probe = Probe(model)
    optimizer = MAKES[make](model, tau=tau)
    run = {"weights": [whole(model)], "seen": [], "expected": [], "losses": [], "gradients": []}
    for step in range(steps):
        loss = loss_of(model, step)
        loss.backward()
        run["gradients"].append({name: each.grad.clone() for name, each in model.named_parameters()})
        optimizer.step()
        model.zero_grad()
        layers = optimizer.qk_clip.report().layers
        own = [torch.stack([getattr(each, name) for each in layers.values()]) for name in ("max_logits", "gamma")]
        expected = probe.take()
        gathered = []
        for each in (own[0].double(), own[1].double(), expected):
            parts = [torch.empty_like(each) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, each)
            gathered.append(torch.cat(parts, 1))
        run["seen"].append(gathered[:2])
        run["expected"].append(gathered[2])
        run["weights"].append(whole(model))
        run["losses"].append(loss.item())
    return run


def refusal():
    model = gpt()
    optimizer = MuonClip(model, **OPTIONS)
    loss_of(model, 0).backward()
    before = whole(model)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error), all(torch.equal(before[name], each) for name, each in whole(model).items())


def main():
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    initialize_rng_tracker(inference_rng_tracker=True)  # Megatron's, which asks no GPU for its state
    folder, *makes = sys.argv[1:]
    for each in makes:
        if each == "refusal":
            result = refusal()
        else:
            make, tau, steps = each.split(",")
            result = train(make, float(tau), int(steps))
        if dist.get_rank() == 0:
            torch.save(result, f"{folder}/{each}-{dist.get_world_size()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
