"""The ways in which the attentions of a model were proven, kept for later searches, which read all attentions anew."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from muonclip.torch.discover import Inputs, NotTraced, Refusal, Site, message
from muonclip.torch.heads import HeadRows, QKProjection
from muonclip.torch.prove.proof import confirm, prove
from muonclip.torch.prove.ways import AS_FOUND, Finding, Way


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
        training = model.get_submodule(inputs.module).training
        for mode in (True, False) if training else (False,):  # what runs in training is clipped; layers may be left out
            if not missing():
                break
            try:
                found = prove(model, inputs, missing(), sites, declared=declared, training=mode)
            except Exception as error:  # whatever the model raises
                if mode:
                    continue
                raise NotTraced.because(error) from error
            _raise(model, projections, found, declared)
            self._ways |= {keys[name]: way for name, way in found.items() if not isinstance(way, Finding)}
        if doubted:
            self._confirm(model, inputs, choices, sites, doubted)
        return {name: self._ways.get(keys[name], AS_FOUND).of(choices[name]) or p for name, p in projections.items()}

    def _confirm(
        self,
        model: nn.Module,
        inputs: Inputs,
        choices: Mapping[str, Sequence[QKProjection]],
        sites: Sequence[Site],
        ways: Mapping[str, Way],
    ) -> None:
        training = model.get_submodule(inputs.module).training
        try:
            found = confirm(model, inputs, choices, sites, ways, training=training)
        except Exception as error:  # whatever the model raises
            raise NotTraced.because(error) from error
        self._in_doubt -= found.keys()
        for name, finding in found.items():
            if finding is not None:
                raise ValueError(
                    f"QK-Clip: {name or 'the model'} was clipped several times, and its logits did not follow. Tried "
                    "again, its rows do not scale them any more as they did when the attention was found: something "
                    "between them was changed since. Undo that, or make the optimizer and its clip anew."
                )


def _raise(
    model: nn.Module,
    projections: Mapping[str, QKProjection],
    found: Mapping[str, Way | Finding],
    declared: Collection[str],
) -> None:
    failed = {name: each for name, each in found.items() if isinstance(each, Finding)}
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
