"""The stages of one update on this rank's part of the matrices, in place; the mathematics is `core.update_rule`'s."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.core import MatrixLayout, update_scale
from muonclip.core.index_ranges import length
from muonclip.core.update_rule import MatrixOperations, Momentum, Motion, MuonRule, agree
from muonclip.core.update_scale import AdjustLR
from muonclip.torch.mesh import RankPosition
from muonclip.torch.update.cost_model import rows_at_once
from muonclip.torch.update.host_copies import HostCopies
from muonclip.torch.update.matrix_shards import MatrixShards, matrix_shards
from muonclip.torch.update.matrix_views import editing, local_matrices, row_index, writable
from muonclip.torch.update.rounds import PlacedParameter, Segment
from muonclip.torch.update.split_weights import joined, split_into
from muonclip.torch.update.stored_states import Rounding, StoredStates, is_coded

MUON = MuonRule()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """The options of a parameter group that a step reads; see `Muon`."""

    lr: float | Tensor
    weight_decay: float
    momentum: float
    nesterov: bool
    adjust_lr_fn: AdjustLR = None
    freeze_unused: bool = False
    cautious_decay: bool = False


@dataclass(slots=True, eq=False)
class ParameterStep:
    """One parameter in one step: what this rank has of it and of its state, and the options of its group.

    Args:
        parameter: This rank's shard of the parameter.
        gradient: This rank's shard of the gradient. With None the shard stays as it is; if the matrices of the
            parameter are cut, its part of them counts as zero, and the ranks need not agree on who has a gradient;
            replicas must.
        state: This rank's shards of the state, by name.
        layout: How the parameter is read as matrices.
        options: The options of its group.
        rule: The rule that updates it.
        errors: This rank's shards of the errors that make a bf16 parameter a float32 master, see `split_weights`; none:
            the parameter is updated itself.
        rounding: By what its momentum is rounded stochastically; None: to the nearest.
        offloaded: Whether state and errors are in host memory, and come to the parameter's device for the step alone.
    """

    parameter: Tensor
    gradient: Tensor | None
    state: Mapping[str, Tensor]
    layout: MatrixLayout
    options: StepOptions
    rule: MuonRule = MUON
    errors: tuple[Tensor, ...] = ()
    rounding: Rounding | None = None
    offloaded: bool = False


class SegmentStep:
    """The step of the matrices of one segment, on this rank's part of them."""

    def __init__(self, step: ParameterStep, segment: Segment, position: int, cut: dist.ProcessGroup | None) -> None:
        self.step, self.segment, self.position, self.cut = step, segment, position, cut
        self.count, self.tall = segment.stop - segment.start, segment.shards.tall
        self.device = step.parameter.device
        self._used: Tensor | None = None
        self._fetched: dict[int, Tensor] = {}  # of what is offloaded, by `id`
        self._to_return: list[tuple[Tensor, Tensor, Callable[[], None] | None]] = []

    def fetch(self, copies: HostCopies) -> None:
        """Begin to copy what is offloaded of these matrices to the device."""
        step = self.step
        for held in (*step.state.values(), *step.errors):
            matrices, write_back = self.opened(held)
            working = copies.fetch(matrices)
            self._fetched[id(held)] = working
            self._to_return.append((working, matrices, write_back))

    def give_back(self, copies: HostCopies) -> None:
        """Begin to copy it back; the copies on the device are used no more."""
        self._fetched.clear()
        for working, matrices, write_back in self._to_return:
            copies.give_back(working, matrices)
            if write_back is not None:
                copies.finish()
                write_back()
        self._to_return.clear()

    def advance(self, start: int, stop: int, into: Tensor) -> None:
        """Let the gradient into the state; write what is orthogonalised of the matrices `start` to `stop`, of
        (stop - start, m, n) with m ≤ n."""
        if self.tall:
            upright = into.new_empty(len(into), into.shape[2], into.shape[1])
            self._advance(start, stop, upright)
            for wide, each in zip(into, upright, strict=True):  # two axes at a time: torch has a fast copy for these
                wide.copy_(each.mT)
        else:
            self._advance(start, stop, into)

    def _advance(self, start: int, stop: int, into: Tensor) -> None:
        step, options = self.step, self.step.options
        with self._state() as state:
            buffer = state["momentum_buffer"]
            gradient = self.gradient()
            if options.freeze_unused:
                self._used = self._find_used(torch.zeros_like(buffer) if gradient is None else gradient)
            if type(step.rule).pull_back is not MuonRule.pull_back:
                gradient = self._pull_back(gradient, as_numbers(state))
            stored = self._stored(buffer)
            dtype = buffer.dtype if stored is None else torch.promote_types(step.parameter.dtype, torch.float32)
            if gradient is None:
                into.zero_()
                if stored is not None and stored.are_shared:
                    self._write(stored, self._read(stored, state, dtype), state, slice(None))
                return
            used = None if self._used is None else self._used.to(dtype)
            momentum = Momentum(options.momentum, options.nesterov, used=used)
            by_piece = is_by_entry(step.rule) and not (stored is not None and stored.are_shared)
            for rows in _pieces(buffer) if by_piece else (None,):
                held = state if rows is None else {name: value[:, rows] for name, value in state.items()}
                part = held if stored is None else self._read(stored, held, dtype)
                new = (gradient if rows is None else gradient[:, rows]).to(dtype)
                _store(step.rule.advance(new, part, momentum, WHOLE), part)
                if stored is not None:
                    self._write(stored, part, held, rows or slice(None))
                if start == stop:
                    continue
                if stop - start < self.count:
                    part, new = {name: value[start:stop] for name, value in part.items()}, new[start:stop]
                direction = step.rule.direction(new, part, momentum, WHOLE)
                (into if rows is None else into[:, rows]).copy_(direction)

    def _stored(self, buffer: Tensor) -> StoredStates | None:
        """Return what reads and writes the momentum; None where it is stored as it moves."""
        step, shards, own = self.step, self.segment.shards, slice(self.segment.start, self.segment.stop)
        if step.rounding is None and not is_coded(buffer):
            return None
        return StoredStates(step.layout, shards, self.position, own, step.rounding, self.cut)

    def _read(self, stored: StoredStates, held: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        names = {each.name: each.dtype is None for each in self.step.rule.states}
        return {name: stored.read(held, name, dtype) if own else held[name] for name, own in names.items()}

    def _write(self, stored: StoredStates, new: Mapping[str, Tensor], held: Mapping[str, Tensor], rows: slice) -> None:
        for declared in self.step.rule.states:
            if declared.dtype is None:
                stored.write(new[declared.name], held, declared.name, rows, self._used)

    def apply(self, update: Tensor) -> None:
        """W ← W − η (U · scale + λ W), the scale by the shape of the whole matrix; U (matrices, m, n) with m ≤ n."""
        step = self.step
        if self.tall:
            wide, update = update, update.new_empty(len(update), update.shape[2], update.shape[1])
            for upright, each in zip(update, wide, strict=True):
                upright.copy_(each.mT)
        if type(step.rule).apply is not MuonRule.apply:
            update = self._apply_rule(update)
        if type(step.rule).move is not MuonRule.move:
            self._move_by_rule(update)
            return
        if step.gradient is None:
            return
        with self._editing_weight() as rows:
            for part in _pieces(rows):
                whole = part is None
                self._move(rows if whole else rows[:, part], update if whole else update[:, part], self.scale)

    @property
    def scale(self) -> float:
        """Return what orthogonalised matrices of this shape are multiplied by."""
        shards = self.segment.shards
        return update_scale(shards.fan_out, shards.fan_in, self.step.options.adjust_lr_fn)

    def _move(self, weight: Tensor, update: Tensor, scale: float) -> None:
        options = self.step.options
        kept = None if self._used is None else weight.clone()
        kept_share = 1 - options.lr * options.weight_decay
        if options.cautious_decay:
            weight.copy_(torch.where(agree(update, weight), weight * kept_share, weight))
        else:
            weight.mul_(kept_share)
        if isinstance(options.lr, Tensor):
            weight.sub_(update.to(weight.dtype) * (options.lr * scale))
        else:
            weight.add_(update, alpha=-options.lr * scale)
        if self._used is not None and kept is not None:
            weight.copy_(torch.where(self._used, weight, kept))

    def _apply_rule(self, update: Tensor) -> Tensor:
        """Let a rule change the update. Every rank that has a part joins in its sums, with or without a gradient."""
        with self._state() as held:
            state = as_numbers(held)
            update, new = self.step.rule.apply(update, state, self._operations())
            if self.step.gradient is not None:
                _store(self._of_used(new, state), state)
        return update

    def _pull_back(self, gradient: Tensor | None, state: Mapping[str, Tensor]) -> Tensor | None:
        """Let a rule change the gradient. Every rank that has a part joins in its sums, with or without a gradient."""
        weight, operations = self._weight(), self._operations()
        given = torch.zeros_like(weight) if gradient is None else gradient
        pulled, new = self.step.rule.pull_back(given, weight, state, operations)
        if gradient is None:
            return None
        _store(self._of_used(new, state), state)
        return pulled

    def _operations(self) -> MatrixOperations:
        return _operations(self.segment.shards, self.position, self.cut)

    def _of_used(self, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the new states of the matrices that are used, and the old ones of the others."""
        if self._used is None:
            return new
        return {name: torch.where(self._used, value, old[name]) for name, value in new.items()}

    def _move_by_rule(self, update: Tensor) -> None:
        """Let a rule move the weight. Every rank that has a part joins in its sums, with or without a gradient."""
        step, options = self.step, self.step.options
        motion = Motion(options.lr, options.weight_decay, self.scale)
        with self._state() as held, self._editing_weight() as weight:
            state = as_numbers(held)
            moved, new = step.rule.move(weight, update, state, motion, self._operations())
            if self._used is not None:
                moved = torch.where(self._used, moved, weight)
            if step.gradient is not None:
                _store(self._of_used(new, state), state)
                weight.copy_(moved)

    def gradient(self) -> Tensor | None:
        """Return the gradient of these matrices (matrices, rows, columns)."""
        if self.step.gradient is None:
            return None
        whole = local_matrices(self.step.gradient, self.step.layout, self.segment.shards, self.position)
        return whole if self.count == len(whole) else whole[self.segment.start : self.segment.stop]

    def _find_used(self, gradient: Tensor) -> Tensor:
        """Find the matrices of which some rank has a gradient other than zero: bool (count, 1, 1)."""
        used = (gradient != 0).any(-1, keepdim=True).any(-2, keepdim=True)
        if self.cut is None:
            return used
        flags = used.to(torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.cut)
        return flags.bool()

    @contextmanager
    def _state(self) -> Iterator[dict[str, Tensor]]:
        opened = {name: self.opened(value) for name, value in self.step.state.items()}
        yield {name: matrices for name, (matrices, _) in opened.items()}
        for _, write_back in opened.values():
            if write_back is not None:
                write_back()

    def _weight(self) -> Tensor:
        """Return the matrices that are updated, to read: the weights, or their masters."""
        weight, errors = self.opened(self.step.parameter)[0], self.step.errors
        return joined(weight, [self.opened(each)[0] for each in errors]) if errors else weight

    @contextmanager
    def _editing_weight(self) -> Iterator[Tensor]:
        """Give the matrices that are updated; masters become weights and errors again at the end."""
        opened = [self.opened(each) for each in (self.step.parameter, *self.step.errors)]
        weight, *errors = (matrices for matrices, _ in opened)
        master = joined(weight, errors) if errors else weight
        yield master
        if errors:
            split_into(master, weight, errors)
        for _, write_back in opened:
            if write_back is not None:
                write_back()

    def opened(self, tensor: Tensor) -> tuple[Tensor, Callable[[], None] | None]:
        """Return the matrices of this segment in a tensor, and, where they are not a view, what copies them back."""
        fetched = self._fetched.get(id(tensor))
        if fetched is not None:
            return fetched, None
        matrices, write_back = writable(tensor, self.step.layout, self.segment.shards, self.position)
        whole = self.count == len(matrices)
        return matrices if whole else matrices[self.segment.start : self.segment.stop], write_back


def as_numbers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the states that are stored as they are read: codes are for no stage but `advance`, which reads them."""
    return {name: value for name, value in state.items() if not is_coded(value)}


def is_by_entry(rule: MuonRule) -> bool:
    """Tell whether a rule lets the gradient in entry by entry, so that any part of a matrix can be taken alone."""
    return (type(rule).advance, type(rule).direction) == (MuonRule.advance, MuonRule.direction)


def rescale(
    rule: MuonRule, state: Mapping[str, Tensor], factors: Tensor, placed: PlacedParameter, here: RankPosition
) -> None:
    """Let this rank's part of a parameter's state follow rows that were multiplied by `factors`, stored like a state
    per row."""
    for shards in matrix_shards(placed.shape, placed.layout, placed.placements, placed.mesh.shape):
        if any(here.coordinate[dim] != at for dim, at in shards.fixed):
            continue
        position = here.index(shards.active)
        by_row = local_matrices(factors, placed.layout, shards, position)
        with ExitStack() as stack:
            matrices = {
                name: stack.enter_context(editing(value, placed.layout, shards, position))
                for name, value in state.items()
            }
            _store(rule.rescale(matrices, by_row), matrices)


def _pieces(matrices: Tensor) -> Iterator[slice | None]:
    """Divide the rows of (matrices, rows, columns) into pieces that stay in the cache; None: all rows at once."""
    count, rows, columns = matrices.shape
    size = rows_at_once(count, columns, matrices.device.type) or rows
    if size >= rows:
        yield None
    else:
        yield from (slice(start, start + size) for start in range(0, rows, size))


def _store(new: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, value in new.items():
        if value is not state[name]:
            state[name].copy_(value)


def _operations(shards: MatrixShards, position: int, cut: dist.ProcessGroup | None) -> MatrixOperations:
    """Make the operations on this rank's part of matrices that are cut over the ranks of a group."""
    if cut is None:
        return WHOLE
    are_whole = all(length(columns) == shards.fan_in for columns in shards.columns)

    def mean_columns(x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True) if are_whole else sum_columns(x) / shards.fan_in

    def sum_columns(x: Tensor) -> Tensor:
        if are_whole:
            return x.sum(-1, keepdim=True)
        index = row_index((shards.rows[position],), x.device)
        sums = x.new_zeros(len(x), shards.fan_out, 1).index_copy_(1, index, x.sum(-1, keepdim=True))
        dist.all_reduce(sums, group=cut)
        return sums.index_select(1, index)

    def total(x: Tensor) -> Tensor:
        x = x.sum((-2, -1), keepdim=True)
        dist.all_reduce(x, group=cut)
        return x

    return replace(WHOLE, mean_columns=mean_columns, sum_columns=sum_columns, sum=total)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


WHOLE = MatrixOperations(
    lerp=torch.lerp,
    average=Tensor.lerp_,
    wide=_wide,
    mean_columns=lambda x: x.mean(-1, keepdim=True),
    sum_columns=lambda x: x.sum(-1, keepdim=True),
    sum=lambda x: x.sum((-2, -1), keepdim=True),
    xp=torch,
)
