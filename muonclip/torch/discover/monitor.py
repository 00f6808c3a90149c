"""The search for a model's attentions, and their observation from then on, for one `QKClip`.

There are three moments. At construction the model is traced on inputs that it names, or that are guessed, where that
works: the plan is complete then. At the first forward with gradients it is traced on the real inputs: that finds what
is still missing and checks what was declared. From then on observers fill the statistics.
"""

from __future__ import annotations

import copy
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from muonclip.torch.discover.dense_copy import TooLarge
from muonclip.torch.discover.search import Site, refusal, search
from muonclip.torch.discover.trace import Rehearsal, has_a_foreign_forward, is_rehearsing, rehearse
from muonclip.torch.heads.qk_projection import QKProjection
from muonclip.torch.logits.max_logits import is_unobserved
from muonclip.torch.observe.calls import (
    Hooks,
    Observer,
    Unclaimed,
    attach,
    begin_listening,
    end_listening,
    enter,
    observers,
)
from muonclip.torch.observe.patches import Doors

_MOST_REHEARSALS = 4  # of the model in its first step, whose micro-batches may differ in what they reach
_watched: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Watch]] = weakref.WeakKeyDictionary()


class Watch:
    """Finds and observes the attentions of one model, until it is removed.

    `projections`, shared with its owner, grows as attentions are found. `sites`: where each is called and how it is
    observed. `on_forward` is called inside each forward with gradients. `to_come`: why nothing was found yet, or "".
    `version` counts findings.
    """

    def __init__(
        self,
        model: nn.Module,
        projections: dict[str, QKProjection],
        on_forward: Callable[[], None],
        *,
        clip_gains: bool,
    ) -> None:
        self.model, self.projections, self.on_forward, self.clip_gains = model, projections, on_forward, clip_gains
        self.threshold = -math.inf  # of the statistics to come
        self.declared = dict(projections)
        self.sites: dict[str, Site] = {}
        self.to_come = "the first forward with gradients"
        self.removed = ""
        self.version = 0
        self._rehearsals: list[Rehearsal] = []
        self._rehearsed: dict[str, int] = {}  # how often, by the name of the module that a forward began with
        self._running = _Running()
        self._unclaimed = Unclaimed()
        self._replace_others()
        self._open()

    def _replace_others(self) -> None:
        others = {watch() for module in self.model.modules() if (watch := _watched.get(module)) is not None}
        for other in others:
            if other is not None:
                other.remove("another QKClip was made for the same model, and observes it now")
        for module in self.model.modules():
            _watched[module] = weakref.ref(self)

    def _open(self) -> None:
        """Put on the hooks: where a forward begins, and the observers' for the attentions found already."""
        entry = _Entry(self)
        self._observers = observers()
        self._root, self._entries = (Hooks(-1, entry.before, entry.after, with_kwargs=True) for _ in range(2))
        Doors.open(self.model)
        hooks = self._observers, self._root, self._entries
        self._end = weakref.finalize(self, _take_down, self._unclaimed, *hooks)
        self._root.put_on(self.model)
        for module in self.model.modules():
            if module is not self.model:
                self._entries.put_on(module)
        self._observe()

    def remove(self, why: str) -> None:
        """Take every hook away; the model is as before. `why`: for whoever goes on using the owner."""
        self.removed = why
        self._end()

    def look(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Trace the model on these inputs. Raises ValueError where an attention is not understood."""
        self._rehearse(self.model, "", args, kwargs)

    def look_ahead(self) -> None:
        """Trace the model on inputs that it names or that are guessed; where none fits, wait for the first forward.

        Raises ValueError where an attention is not understood, or where there is none.
        """
        for kwargs in _guesses(self.model):
            args = kwargs.pop("args", ())
            try:
                rehearsal = rehearse(self.model, args, kwargs)
            except TooLarge:
                raise
            except Exception as error:
                self.to_come = f"the first forward with gradients (no inputs could be guessed: {_first_line(error)})"
                continue
            self._take(rehearsal)
            if not self.projections:
                raise ValueError(NOTHING_FOUND)
            return

    def settle(self) -> str:
        """End the forwards of a step. Return what is wrong where attention ran that is not known, or ""."""
        unknown, self._unclaimed.calls = self._unclaimed.calls, 0
        if unknown:
            self._rehearsed.clear()  # the next forward shows what it was
            return (
                f"QK-Clip: attention was called {unknown} times in this step by modules that no rehearsal saw call it: "
                "its heads were neither observed nor clipped. Show the search inputs that reach it, QKClip(model, "
                "example_inputs=…). The next forward is rehearsed anew."
            )
        if self._rehearsed:
            self._entries.take_off()
        return ""

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module begins to run; trace it where that is due."""
        if module is self.model:
            end_listening(self._unclaimed, *self._observers.observers())  # of a forward that was interrupted
            self._running.modules = 0
        self._running.modules += 1
        if self._running.modules > 1 or not torch.is_grad_enabled():
            return
        self.on_forward()
        if module is self.model:
            begin_listening(self._unclaimed)
        name = next(name for name, each in self.model.named_modules() if each is module)
        # The model: each forward of the first step, up to a few. A part that is called by itself: once, if it holds no
        # attention that is known. (Recomputation under activation checkpointing calls parts, too.)
        done = self._rehearsed.get(name, 0)
        holds_a_site = any(f"{site}.".startswith(f"{name}.") for site in self.sites)
        if done >= (_MOST_REHEARSALS if module is self.model and self._entries.modules else 1):
            return
        if module is not self.model and holds_a_site:
            return
        self._rehearsed[name] = done + 1
        observed = module in self._observers.modules
        self._rehearse(module, name, args, kwargs)
        if module in self._observers.modules and not observed:  # its hooks came too late for this run
            enter(module, args)

    def end(self, module: nn.Module) -> None:
        """Note that a module has run, or has raised."""
        self._running.modules = 0 if module is self.model else max(self._running.modules - 1, 0)
        if module is self.model:
            end_listening(self._unclaimed)

    def _rehearse(self, module: nn.Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        prefix = f"{name}." if name else ""
        try:
            rehearsals = [rehearse(module, args, kwargs, prefix=prefix)]
        except Exception as error:
            if self.projections:
                self.to_come = f"not rehearsed: {_first_line(error)}"
                return
            if isinstance(error, TooLarge):
                raise
            raise RuntimeError(
                f"QK-Clip could not rehearse {name or 'the model'} to find its attention: {_first_line(error)}. Give "
                "inputs that a copy of it runs with, QKClip(model, example_inputs=…), or declare the attentions, "
                "QKClip(model, declare={name: QKProjection…})."
            ) from error
        if module.training:  # some attention may run in training only; what fails there was seen above
            with suppress(Exception):
                rehearsals.append(rehearse(module, args, kwargs, prefix=prefix, training=True))
        self._take(*rehearsals)

    def _take(self, *rehearsals: Rehearsal) -> None:
        """Search all traced forwards so far: what one attention shares with another may show only in a later one."""
        self._rehearsals += rehearsals
        findings = search(self.model, self._rehearsals, self.declared, clip_gains=self.clip_gains)
        if findings.problems:
            del self._rehearsals[-len(rehearsals) :]
            raise ValueError(refusal(self.model, findings.problems))
        found = self.declared | {
            name: _with_statistic_of(self.projections.get(name), projection)
            for name, projection in findings.projections.items()
        }
        order = {name: index for index, (name, _) in enumerate(self.model.named_modules())}
        found = dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))  # on all ranks
        names = {id(projection): name for name, projection in findings.projections.items()}
        sites: dict[str, Site] = {}
        for site in findings.sites:
            via = "declared" if self._fills_itself(site) else site.via
            sites[site.module] = replace(
                site, via=via, projections=tuple(found[names[id(p)]] for p in site.projections)
            )
        self.version += found.keys() != self.projections.keys() or sites.keys() != self.sites.keys()
        self.projections.clear()
        self.projections.update(found)
        self.sites = sites
        self.to_come = "" if self.projections else NOTHING_FOUND
        for projection in self.projections.values():
            projection.max_logits.threshold = self.threshold
        self._observe()

    def _fills_itself(self, site: Site) -> bool:
        """Tell whether the attention is declared, and hands its statistic to `muonclip.torch.attention`."""
        statistics = [id(projection.max_logits) for projection in site.projections]
        copies = [rehearsal.statistics.get(key) for rehearsal in self._rehearsals for key in statistics]
        return any(copied is not None and bool(copied.observed) for copied in copies)

    def _observe(self) -> None:
        """Let each site's observer fill the statistics of its attentions."""
        self._observers.take_off()
        for site in self.sites.values():
            if site.via != "declared":
                statistics = [projection.max_logits for projection in site.projections]
                observer = Observer(statistics, calls=site.calls, written_out=site.via == "written out")
                attach(self.model.get_submodule(site.module), observer, self._observers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """Copy it with the model and the owner: the copy observes the copy."""
        twin = object.__new__(Watch)
        memo[id(self)] = twin
        for name in ("projections", "declared", "sites", "model", "on_forward"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        for name in ("threshold", "clip_gains", "to_come", "removed", "version"):
            setattr(twin, name, getattr(self, name))
        twin._rehearsals, twin._rehearsed = [], dict(self._rehearsed)
        twin._running, twin._unclaimed = _Running(), Unclaimed()
        for module in twin.model.modules():
            _watched[module] = weakref.ref(twin)
        twin._open()
        return twin


class _Running(threading.local):
    """The number of modules of a model that the thread is inside of."""

    modules = 0


def _with_statistic_of(earlier: QKProjection | None, projection: QKProjection) -> QKProjection:
    """Keep the statistic of a projection that is read anew."""
    if earlier is None or earlier.num_heads != projection.num_heads:
        return projection
    return replace(projection, max_logits=earlier.max_logits)


class _Entry:
    """Hooks on every module: the outermost one that runs is where a forward begins.

    A module whose `forward` an engine has replaced for a while (Lightning) runs something else; what it calls begins
    there.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = weakref.ref(watch)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        watch = self.watch()
        if watch is None or _is_apart(module):
            return
        if torch.compiler.is_compiling():
            if watch.to_come:
                raise RuntimeError(
                    "QK-Clip has not seen this model's attention yet, and cannot find it while torch.compile traces. "
                    "Give inputs that the model runs with, QKClip(model, example_inputs=…), or run one forward with "
                    "gradients before you compile."
                )
            return
        _begin(watch, module, args, kwargs)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        watch = self.watch()
        if watch is None or _is_apart(module) or torch.compiler.is_compiling():
            return
        watch.end(module)

    def __deepcopy__(self, memo: object) -> _Entry:
        return _Nobody()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Nobody, ())


_begin: Any = torch.compiler.disable(Watch.begin)
"""`Watch.begin`, never compiled: a forward traced between two graphs is not."""


class _Nobody(_Entry):
    """The hooks in a copy of the model, which its own optimizer observes."""

    def __init__(self) -> None:
        self.watch = lambda: None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Nobody, ())


def _is_apart(module: nn.Module) -> bool:
    """Tell whether what runs is not a forward of the training, or not the module's own."""
    return is_rehearsing() or is_unobserved() or has_a_foreign_forward(module)


def _take_down(unclaimed: Unclaimed, *hooks: Hooks) -> None:
    end_listening(unclaimed)
    for each in hooks:
        each.take_off()
    Doors.close()


NOTHING_FOUND = (
    "QK-Clip: no attention was found. It sees torch's scaled_dot_product_attention, FlexAttention, the attention "
    "interface of Hugging Face models, and a product of queries and keys that reaches a softmax. Pass the model that "
    "has the attention; or declare it: give each attention module `self.max_logits = MaxLogits(num_heads)`, call "
    "`muonclip.torch.attention(q, k, v, max_logits=self.max_logits)`, and add a method `qk_projection()` that returns "
    "`QKProjection.mha(q=self.q_proj, k=self.k_proj, num_heads=…, max_logits=self.max_logits)` (or .gqa, .mla); or "
    "switch the clip off with qk_clip=None."
)


def _guesses(model: nn.Module) -> list[dict[str, Any]]:
    """Return keyword arguments to try, `args` being the positional ones.

    They are what a Hugging Face model names, else tokens for a model that begins with an embedding, else numbers of the
    width of its first module.
    """
    tensors = next(model.parameters(), None)
    if tensors is None:
        return []
    device = tensors.device
    named = getattr(model, "dummy_inputs", None)
    if isinstance(named, Mapping):
        inputs = {key: value.to(device) for key, value in named.items() if isinstance(value, Tensor)}
        guesses = [inputs]
        if "input_ids" in inputs:
            guesses.append({**inputs, "decoder_input_ids": inputs["input_ids"]})
        config = getattr(model, "config", None)
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
        if isinstance(size, int) and isinstance(channels, int):
            pixels = torch.zeros(2, channels, size, size, device=device, dtype=tensors.dtype)
            guesses.insert(0, {"pixel_values": pixels})
        return guesses
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            tokens = torch.arange(16, device=device).view(2, 8) % module.num_embeddings
            return [{"args": (tokens,)}]
        width = _input_shape(module)
        if width is not None:
            x = torch.randn(width, device=device, dtype=tensors.dtype, generator=_generator(device))
            return [{"args": (x,)}, {"args": (x, x)}]
    return []


def _generator(device: torch.device) -> torch.Generator | None:
    """Make a generator of its own, so that the random numbers of the model's run do not change."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(0)


def _input_shape(module: nn.Module) -> tuple[int, ...] | None:
    if isinstance(module, nn.Linear):
        return 2, 8, module.in_features
    if isinstance(module, nn.MultiheadAttention):
        return 2, 8, module.embed_dim
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return 2, 8, module.normalized_shape[-1]
    if isinstance(module, _ConvNd):
        return 2, module.in_channels, *(4 * size for size in module.kernel_size)
    return None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].removesuffix('.')}"
