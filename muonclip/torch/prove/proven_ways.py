"""The ways in which the attentions of a model were proven, kept for later searches, which read all attentions anew."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from torch import nn

from muonclip.torch.discover import Inputs, NotTraced, Refusal, Site, message
from muonclip.torch.heads import HeadRows, QKProjection
from muonclip.torch.prove.proof import confirm, prove
from muonclip.torch.prove.ways import AS_FOUND, Finding, Way


class NoLonger(ValueError):
    """An attention cannot be clipped any more in the way in which it was proven."""


class ProvenWays:
    """Proves each attention once."""

    def __init__(self) -> None:
        self._ways: dict[object, Way] = {}  # by the rows of the attention
        self._keys: dict[str, object] = {}
        self._in_doubt: set[str] = set()

    def prove_again(self, names: Collection[str]) -> None:
        """Prove these again with the next inputs; then it is an error where they cannot be clipped as they were."""
        self._in_doubt |= {name for name in names if self._keys.get(name) in self._ways}

    def proven(
        self,
        model: nn.Module,
        inputs: Inputs,
        projections: Mapping[str, QKProjection],
        others: Mapping[str, Sequence[QKProjection]],
        sites: Sequence[Site],
        *,
        declared: Collection[str],
    ) -> dict[str, QKProjection]:
        """Return attentions, by name, as they can be clipped; those that were not reached so far as they are. `others`:
        with other rows that may be the right ones.

        Raises ValueError where one cannot be clipped, and NotTraced where a copy of the model does not run.
        """
        keys = self._keys = {name: _key_of(each) for name, each in projections.items()}

        choices = {name: (each, *others.get(name, ())) for name, each in projections.items()}

        def missing() -> dict[str, Sequence[QKProjection]]:
            return {name: c for name, c in choices.items() if c[0].scaled_parts() and keys[name] not in self._ways}

        doubted = {name: self._ways[keys[name]] for name in self._in_doubt if keys.get(name) in self._ways}
        found: dict[str, Way | Finding] = {}
        try:
            if missing():
                found = prove(model, inputs, missing(), sites, declared=declared)
            if doubted:
                self._confirm(confirm(model, inputs, choices, sites, doubted, declared=declared))
        except NoLonger:
            raise
        except Exception as error:  # whatever the model raises
            raise NotTraced.because(error) from error
        self._keep(found, keys)
        if missing() and model.get_submodule(inputs.module).training and not _failed(found):
            with suppress(Exception):  # what does not run in training mode has run in evaluation mode
                found |= prove(model, inputs, missing(), sites, declared=declared, training=True)
            self._keep(found, keys)
        _raise(model, projections, _failed(found), declared)
        return {name: self._ways.get(keys[name], AS_FOUND).of(choices[name]) or p for name, p in projections.items()}

    def _confirm(self, found: Mapping[str, Finding | None]) -> None:
        self._in_doubt -= found.keys()
        for name, finding in found.items():
            if finding is not None:
                raise NoLonger(
                    f"QK-Clip: {name or 'the model'} was clipped several times, and its logits did not follow. Tried "
                    "again, its rows do not scale them any more as they did when the attention was found: something "
                    "between them was changed since. Undo that, or make the optimizer and its clip anew."
                )

    def _keep(self, found: Mapping[str, Way | Finding], keys: Mapping[str, object]) -> None:
        self._ways |= {keys[name]: way for name, way in found.items() if not isinstance(way, Finding)}


def _failed(found: Mapping[str, Way | Finding]) -> dict[str, Finding]:
    return {name: each for name, each in found.items() if isinstance(each, Finding)}


def _raise(
    model: nn.Module, projections: Mapping[str, QKProjection], failed: Mapping[str, Finding], declared: Collection[str]
) -> None:
    for name, finding in failed.items():
        if name in declared:
            raise ValueError(
                f"QK-Clip: the declaration of {name or 'the model'} does not hold: {finding.value}. Correct it, or "
                'give it a reason, QKProjection(…, reason="…"), and it is observed only.'
            )
    if failed:
        raise ValueError(
            message(model, {name: Refusal(projections[name].num_heads, each.value) for name, each in failed.items()})
        )


def _key_of(projection: QKProjection) -> object:
    return projection.num_heads, frozenset(_key_of_rows(side, rows) for side, rows in projection.parts())


def _key_of_rows(side: str, rows: HeadRows) -> object:
    index = None if rows.index is None else tuple(rows.index.flatten().tolist())
    return side, id(rows.module), rows.weight, rows.axis, rows.num_heads, rows.size, rows.start, rows.step, index
