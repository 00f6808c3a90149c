"""A Llama of two layers with logits of several units, tokens for it, and a dense probe of its attentions."""

import torch
from tiny_attention import dense_max_logits
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

WIDTH, LAYERS, HEADS, GROUPS, HEAD, VOCABULARY = 48, 2, 4, 2, 10, 64


def tiny_llama(seed=0):
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        initializer_range=0.15,
        use_cache=False,  # as the Trainer has it; a cache lays keys out otherwise, which shows in the last bit
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def tiny_tokens(number, seed=0, length=9):
    return torch.randint(VOCABULARY, (number, length), generator=torch.Generator().manual_seed(seed))


def attentions_of(model):
    return [layer.self_attn for layer in model.model.layers]


class Probe:
    """Keeps what the attentions of this very model are given in forwards with gradients, until `take`."""

    def __init__(self, model):
        self.attentions = attentions_of(model)
        self.inputs = [[] for _ in self.attentions]
        for attention, inputs in zip(self.attentions, self.inputs, strict=True):
            attention.register_forward_pre_hook(self._keeper(attention, inputs), with_kwargs=True)

    @staticmethod
    def _keeper(attention, inputs):
        def keep(module, args, kwargs):
            if module is attention and torch.is_grad_enabled():
                inputs.append((kwargs["hidden_states"].detach().clone(), kwargs["position_embeddings"]))

        return keep

    def take(self):
        """The inputs since the last call: for each attention, one pair for each forward."""
        taken = [list(inputs) for inputs in self.inputs]
        for inputs in self.inputs:
            inputs.clear()
        return taken

    def maxima(self, inputs):
        """fp64 [layers, heads]: the largest logit on these inputs, with the weights of now."""
        return torch.stack([_maxima(*pair) for pair in zip(self.attentions, inputs, strict=True)])


@torch.no_grad()
def _maxima(attention, inputs):
    seen = []
    for x, (cos, sin) in inputs:
        q = attention.q_proj(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        k = attention.k_proj(x).unflatten(-1, (GROUPS, HEAD)).transpose(1, 2)
        seen.append(torch.from_numpy(dense_max_logits(*apply_rotary_pos_emb(q, k, cos, sin))))
    return torch.stack(seen).amax(0)
