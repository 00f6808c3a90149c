"""What the library imports, and when: each case is a process of its own, of which the imports are known."""

import subprocess
import sys

import pytest

HEAVY = (
    *("torch._dynamo", "torch._inductor", "triton", "sympy", "torch.distributed.tensor", "torch.distributed.fsdp"),
    *("torch.distributed.pipelining", "torch.distributed.checkpoint", "torch.nn.attention.flex_attention"),
    *("jax", "optax", "transformers"),
)
MODEL = """
import torch, torch.nn.functional as F
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def heads(self, x):
        return [each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.q, self.k, self.v)]

    def forward(self, x):
        return self.attend(*self.heads(x)).transpose(1, 2).flatten(2)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

torch.manual_seed(0)
model, x = Attention(), torch.randn(2, 5, 8)
"""
OBSERVED = """
import sys, warnings
warnings.filterwarnings("ignore", "flex_attention called without torch.compile")

def allow_gradients():
    # It refuses them on the CPU, though they are right.
    sys.modules["torch.nn.attention.flex_attention"]._validate_device = lambda *_: None

def observed(model, clip):
    q, k, _ = model.heads(x)
    expected = (q @ k.mT).detach().amax((0, 2, 3)) / 2
    model(x).square().mean().backward()
    clip.step()
    (layer,) = clip.report().layers.values()
    torch.testing.assert_close(layer.max_logits, expected, rtol=1e-5, atol=0)
    assert layer.exact.all()
"""


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_not_used_is_not_imported():
    """torch's own optimizers import its compiler when they are made; a step of ours imports no more."""
    python(
        f"""import sys
HEAVY = set({HEAVY!r})
import torch
before = set(sys.modules)
import muonclip.torch
own = {{"muonclip", *sys.stdlib_module_names}}
others = {{name for name in set(sys.modules) - before if name.partition(".")[0] not in own}}
assert not others, f"not even a light module of torch: {{others}}"
{MODEL}
optimizer = torch.optim.AdamW(model.parameters())
model(x).sum().backward()
optimizer.step()
before = set(sys.modules)
optimizer = muonclip.torch.MuonClip(model)
model(x).sum().backward()
optimizer.step()
assert optimizer.qk_clip.report().layers
assert not HEAVY & (set(sys.modules) - before), HEAVY & (set(sys.modules) - before)
"""
    )


def test_optax_does_not_import_torch():
    python("import sys, muonclip.optax; assert 'torch' not in sys.modules")


@pytest.mark.slow
def test_modules_that_are_imported_after_the_clip_was_made_are_patched(tmp_path):
    """FlexAttention, bound by name in a file; the stages of pipelines; loads of checkpoints."""
    (tmp_path / "late_attention.py").write_text(
        "from torch.nn.attention.flex_attention import flex_attention\ndef attend(*qkv): return flex_attention(*qkv)\n"
    )
    python(
        f"""{MODEL}{OBSERVED}
import sys
from muonclip.torch import QKClip
sys.path.insert(0, {str(tmp_path)!r})

class Flex(Attention):
    imports = False

    def attend(self, *qkv):
        if not self.imports:
            return super().attend(*qkv)
        import late_attention

        allow_gradients()
        return late_attention.attend(*qkv)

model = Flex()
clip = QKClip(model, tau=1e-3, observe="always")
model(x).square().mean().backward()
clip.step()
late = ("torch.nn.attention.flex_attention", "torch.distributed.pipelining", "torch.distributed.checkpoint")
assert not sys.modules.keys() & set(late)
model.imports = True
observed(model, clip)
assert hasattr(sys.modules[late[0]].flex_attention, "_qk_host")

from torch.distributed.pipelining.stage import PipelineStage
assert hasattr(vars(PipelineStage)["_compute_outputs"], "__wrapped__")

import torch.distributed.checkpoint as dcp
model(x).square().mean().backward()
dcp.save(model.state_dict(), checkpoint_id={str(tmp_path / "saved")!r}, no_dist=True)
dcp.load(model.state_dict(), checkpoint_id={str(tmp_path / "saved")!r}, no_dist=True)
try:
    clip.step()
except RuntimeError as error:
    assert "observed" in str(error), error
else:
    raise AssertionError("it used what it had seen with the weights before")

clip.remove()
assert not hasattr(sys.modules[late[0]].flex_attention, "_qk_host")
assert not hasattr(vars(PipelineStage)["_compute_outputs"], "__wrapped__")
assert not any(type(each).__module__.startswith("muonclip") for each in sys.meta_path)
"""
    )


@pytest.mark.slow
def test_flex_attention_bound_before_the_library_was_imported_is_observed():
    python(
        f"""from torch.nn.attention.flex_attention import flex_attention
{MODEL}{OBSERVED}
allow_gradients()
from muonclip.torch import QKClip

class Flex(Attention):
    def attend(self, *qkv):
        return flex_attention(*qkv)

model = Flex()
observed(model, QKClip(model, tau=1e-3, observe="always"))
"""
    )
