"""TRL's trainers on a Llama so small that a run takes seconds, and what their steps must be, found without the library.

The maxima of a step are those of the forwards that its gradients flow through. `GradientProbe` finds out which these
are by hooks on what the query projections return: what the reference model, generation or a pass without gradients
computes gets no gradient.
"""

import torch
from tiny_attention import dense_max_logits
from tiny_llama import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from muonclip.torch import MuonClip

WORDS = [f"w{number}" for number in range(61)]
OPTIONS = dict(lr=5e-3, weight_decay=0.1)


def tokenizer():
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def sentences(number, lengths=(3, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shortest, longest = lengths
    drawn = torch.randint(len(WORDS), (number, longest), generator=generator).tolist()
    return [" ".join(WORDS[word] for word in row[: shortest + i % (longest - shortest)]) for i, row in enumerate(drawn)]


class GradientProbe:
    """The largest logits of the forwards of a model that gradients have flowed through since the last `take`."""

    def __init__(self, model):
        self.attentions = [module for module in model.modules() if type(module).__name__ == "LlamaAttention"]
        self.config = model.config
        self.seen = [[] for _ in self.attentions]
        self.forwards = 0  # with and without gradients
        for attention, seen in zip(self.attentions, self.seen, strict=True):
            self._watch(attention, seen)

    def _watch(self, attention, seen):
        given = []

        def before(module, args, kwargs):
            if module is attention:  # and not of a copy
                given[:] = [(kwargs["hidden_states"].detach().clone(), kwargs["position_embeddings"])]
                given.append(kwargs.get("attention_mask"))
                self.forwards += 1

        def after(module, args, output):
            if module is attention.q_proj and output.requires_grad:
                inputs = tuple(given)
                output.register_hook(lambda gradient: seen.append(inputs) if gradient.any() else None)

        attention.register_forward_pre_hook(before, with_kwargs=True)
        attention.q_proj.register_forward_hook(after)

    def take(self):
        """fp64 [layers, heads], with the weights of now."""
        maxima = [self._maxima(*pair) for pair in zip(self.attentions, self.seen, strict=True)]
        for seen in self.seen:
            seen.clear()
        return torch.stack(maxima)

    @torch.no_grad()
    def _maxima(self, attention, seen):
        found = []
        for (x, (cos, sin)), mask in seen:
            q, k = (each(x).unflatten(-1, (-1, attention.head_dim)) for each in (attention.q_proj, attention.k_proj))
            q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            length = x.shape[1]
            allowed = torch.ones(length, length, dtype=torch.bool).tril().expand(len(x), -1, -1)
            if mask is not None:
                allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
            found.append(torch.from_numpy(dense_max_logits(q, k, allowed.numpy())))
        return torch.stack(found).amax(0)


class EachStep(TrainerCallback):
    """Compares each step with the probe, and its weights with those of the update alone times the factors.

    `shadow`: a model with the same parameters, which gets the same gradients and has no clip.
    """

    def __init__(self, model, shadow=None):
        self.probe, self.model, self.shadow = GradientProbe(model), model, shadow
        self.other = None if shadow is None else MuonClip(shadow, qk_clip=None, **OPTIONS)
        self.maxima, self.gammas, self.expected, self.forwards = [], [], [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.expected.append(self.probe.take())
        self.forwards.append(self.probe.forwards // len(self.probe.attentions))
        if self.shadow is not None:
            self.shadow.load_state_dict(self.model.state_dict())
            for one, other in zip(self.model.parameters(), self.shadow.parameters(), strict=True):
                other.grad = None if one.grad is None else one.grad.clone()
            self.other.step()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        report = optimizer.optimizer.qk_clip.report()
        self.steps = report.steps
        self.maxima.append(torch.stack([each.max_logits for each in report.layers.values()]).double())
        self.gammas.append(torch.stack([each.gamma for each in report.layers.values()]).double())
        if self.shadow is not None:
            self._compare_weights()

    def _compare_weights(self):
        rows = self.gammas[-1].float().repeat_interleave(self.probe.attentions[0].head_dim, 1)
        names = [name for name, module in self.shadow.named_modules() if type(module).__name__ == "LlamaAttention"]
        factors = {f"{name}.q_proj.weight": row[:, None] for name, row in zip(names, rows, strict=True)}
        alone = dict(self.shadow.named_parameters())
        for name, weight in self.model.named_parameters():
            expected = alone[name] * factors[name] if name in factors else alone[name]
            assert torch.equal(weight, expected), name

    def check(self, steps, tau):
        assert len(self.maxima) == self.steps == steps
        for maxima, gammas, expected in zip(self.maxima, self.gammas, self.expected, strict=True):
            torch.testing.assert_close(maxima, expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(gammas, (tau / expected).clamp(max=1), rtol=1e-5, atol=1e-6)
        assert any((gammas < 1).any() for gammas in self.gammas)


def llama(seed=0):
    model = tiny_llama(seed)
    model.config.pad_token_id = 0
    return model
