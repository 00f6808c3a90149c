"""Sums that are weighed by products of queries and keys, seen below autograd, where nobody has recorded them.

    scores   Σ_d q_d k_d of two projections          weights   softmax, exp, sigmoid or ReLU of scores
    weighed  Σ_j weights_ij v_j                      without weights: linear attention, which has no logits

Operators are seen as they run, whatever called them: TorchScript, an autograd function, a library. Which of these a
tensor is, is remembered by its storage, and passes on through everything but products. A product with a parameter is a
projection, and what was known before it ends there; a norm leaves nothing of a scale. The tracer says which scores it
has recorded as attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

Modules = Sequence[tuple[str, int]]
"""The modules that run, the innermost last: the name of each, and the number of its run."""


@dataclass(slots=True)
class Sighting:
    """Something in the module of this name, and what was seen of it."""

    module: str
    what: str


class Product(NamedTuple):
    """An elementwise product of two activations on its way to a sum: the shapes of factors and result, and the scores
    whose weights one factor has."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    shape: tuple[int, ...]
    weights: frozenset[int] = frozenset()


class Mark(NamedTuple):
    """Says what is known of a storage.

    It `varies` with the inputs; it `is_number`, not a choice or an index among them; is or comes from a projection; is
    made of parameters alone; comes `from_nowhere` that was seen; is a product of two projections, element by element;
    is the softmax of a projection along another axis than that of its `features`.
    `scores`, `weights`: the numbers of the scores in it, before and behind a nonlinear function.
    """

    varies: bool = False
    is_number: bool = False
    projected: bool = False
    of_parameters: bool = False
    from_nowhere: bool = False
    bilinear: bool = False
    is_pooling: bool = False
    features: int = 0
    scores: frozenset[int] = frozenset()
    weights: frozenset[int] = frozenset()
    product: Product | None = None

    @property
    def is_value(self) -> bool:
        """Tell whether it can be what is weighed."""
        return (self.projected or self.is_number) and not self.scores and not self.weights


@dataclass(slots=True)
class _Scores:
    """A product of two projections: where it was made, by which operator, and what became of it. `claimed`: the tracer
    has recorded it. `by`: the function that made weights of it. `is_linear`: it weighs a third tensor without one."""

    made_in: Modules
    operator: str
    claimed: bool = False
    by: str = ""
    is_linear: bool = False


_CONSTANT, PROJECTED = Mark(), Mark(varies=True, is_number=True, projected=True)
_OF_PARAMETERS = Mark(of_parameters=True)
_CHOSEN = PROJECTED._replace(of_parameters=True)  # rows of a parameter, by an index among the inputs
NO_LOGITS = "no logits: nothing to clip"
_MIXED = "its heads mixed into others"
_FACTORS = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "convolution", "_convolution", "_sparse_mm"), 0),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation", "sparse_sampled_addmm"), 1),
}  # where the first of two factors is
_NONLINEAR = {
    *("_softmax", "_safe_softmax", "softmax", "_sparse_softmax", "exp", "exp_", "exp2", "exp2_", "special_exp2"),
    *("sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "relu", "relu_", "threshold", "threshold_"),
}
_CHOICES = {"index", "index_select", "gather"}
_CLAMPS = {"clamp", "clamp_", "clamp_min", "clamp_min_"}
_SCATTERS = {
    *("scatter_add", "scatter_add_", "index_add", "index_add_", "scatter_reduce", "scatter_reduce_", "index_reduce"),
    *("index_reduce_", "index_put", "index_put_", "_index_put_impl_", "segment_reduce", "_segment_reduce"),
    *("segment_sum_csr", "segment_sum_coo", "scatter_sum", "gather_coo"),
}
_SAME_PLACES = {
    *("view", "_unsafe_view", "alias", "detach", "clone", "_to_copy", "neg", "mul", "mul_", "div", "div_", "expand"),
    *("masked_fill", "masked_fill_", "where", "unsqueeze", "squeeze", "permute", "transpose", "copy_", "reshape"),
    *("native_dropout", "_reshape_alias", "index_select", "index", "slice", "contiguous"),
}  # what leaves an elementwise product one
_ATTENTION = ("scaled_dot_product", "_attention_forward", "multi_head_attention", "transformer_encoder_layer")
_NORMS = ("layer_norm", "group_norm", "batch_norm", "rms_norm")
TORCHS_OWN = frozenset(
    ("aten", "prims", "prim", "profiler", "c10d", "_c10d_functional", "_dtensor", "symm_mem", "inductor", "rngprims",
     "debugprims", "higher_order", "quantized", "mkldnn", "mkl")
)  # fmt: skip
"""Namespaces of operators whose insides are seen, or are known."""


class WeighedSums(TorchDispatchMode):
    """Sees every operator that `model` runs, and knows what tensors are; the tracer tells it what it has recorded.

    `inputs`: what it is called with. `running`: returns the modules that run now. `operators`: makes the calls of
    operators whose inside is not seen, and tells what their results are. `without_logits`: what these are.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, inputs: Sequence[Any], running: Callable[[], Modules]) -> None:
        super().__init__()
        self.running = running
        self.operators: Callable[[Any, Any, Any], Any] | None = None
        # By storage; the reference keeps its number from coming again.
        self._marks: dict[int, tuple[Mark, StorageWeakRef]] = {}
        self._scores: list[_Scores] = []
        self._weighed: list[tuple[str, frozenset[int]]] = []  # where, by weights of which scores
        self._seen: list[Sighting] = []
        self.without_logits: list[Sighting] = []
        self.operators_of_weights: set[tuple[str, str]] = set()  # of what may make weights of scores: where, and which
        self.looked_up: set[int] = set()  # the storages of what rows were looked up in
        self._is_paused = False
        self.left_to_steps: set[str] = set()  # modules of which they are told that their attention was not observed
        for each in model.parameters():
            self.put(each, _OF_PARAMETERS)
        for each in model.buffers():
            self.put(each, _CONSTANT)
        for each in inputs:
            if isinstance(each, Tensor):
                self.put(each, Mark(varies=True, is_number=each.is_floating_point()))

    # What the tracer says

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See nothing meanwhile."""
        count = torch._C._len_torch_dispatch_stack()
        modes = [torch._C._get_dispatch_stack_at(index) for index in range(count)]
        if not any(mode is self for mode in modes):  # it is so already
            yield
        elif modes[-1] is self:
            torch._C._pop_torch_dispatch_stack(None)
            try:
                yield
            finally:
                torch._C._push_on_torch_dispatch_stack(self)
        else:  # a model has a mode of its own, which hands on what it sees
            before, self._is_paused = self._is_paused, True
            try:
                yield
            finally:
                self._is_paused = before

    def project(self, result: Any, given: Any = ()) -> None:
        """Note that a result is a projection of what was given, or the output of an attention that was recorded."""
        mark = self._projection(joint_of([self.known(each) for each in tensors_in(given)]))
        for each in tensors_in(result):
            if each.is_floating_point():
                self.put(each, mark._replace(features=each.shape[-1] if each.ndim else 1))

    def claim(self, scores: Tensor) -> None:
        """Note that the scores in a tensor are recorded as those of an attention."""
        mark = self.mark(scores)
        for each in () if mark is None else mark.scores:
            self._scores[each].claimed = True

    def weights(self, result: Tensor, made_in: Modules, by: str) -> None:
        """Note that a function has made a result of scores that were mixed into those of another number of heads."""
        scores = self._new_scores(made_in, _MIXED, by=by)
        self.put(result, PROJECTED._replace(weights=scores))

    def found(self, module: str, what: str) -> None:
        """Note an attention that was not recorded."""
        self._seen.append(Sighting(module, what))

    @property
    def events(self) -> int:
        """Count how often something was weighed, or attention seen, by now."""
        return len(self._weighed) + len(self._seen)

    def unclaimed(self) -> list[Sighting]:
        """Return the attentions that nobody has recorded, in their order."""
        found = list(self._seen)
        for where, numbers in self._weighed:
            scores = [self._scores[each] for each in sorted(numbers)]
            if scores and not all(each.claimed for each in scores):
                first = next(each for each in scores if not each.claimed)
                module = _innermost(first.made_in, where)
                found.append(Sighting(module, f"weighs by {first.by} of a product of projections ({first.operator})"))
        return found

    def linear(self) -> list[Sighting]:
        """Return the modules whose products of activations meet no softmax."""
        weighed = frozenset[int]().union(*(numbers for _, numbers in self._weighed))
        found = [
            Sighting(each.made_in[-1][0], f"{NO_LOGITS} (products of activations, without a softmax)")
            for number, each in enumerate(self._scores)
            if each.is_linear and not each.claimed and number not in weighed and each.made_in
        ]
        return found + self.without_logits

    # Marks

    def mark(self, tensor: Tensor) -> Mark | None:
        """Return what is known of a tensor; None where nobody has seen it come."""
        storage = _storage(tensor)
        known = None if storage is None else self._marks.get(storage._cdata)
        return None if known is None else known[0]

    def is_projected(self, tensor: Tensor) -> bool:
        """Tell whether a tensor comes from a projection, other than rows of a parameter."""
        mark = self.mark(tensor)
        return mark is not None and mark.projected and not mark.of_parameters

    def is_looked_up(self, parameter: Tensor) -> bool:
        """Tell whether rows of a parameter were looked up."""
        storage = _storage(parameter)
        return storage is not None and storage._cdata in self.looked_up

    def put(self, tensor: Tensor, mark: Mark) -> None:
        """Remember what is known of a tensor."""
        storage = _storage(tensor)
        if storage is None:
            return
        known = self._marks.get(storage._cdata)
        self._marks[storage._cdata] = mark, StorageWeakRef(storage) if known is None else known[1]

    def _new_scores(self, made_in: Modules, operator: str, by: str = "") -> frozenset[int]:
        self._scores.append(_Scores(list(made_in), operator, by=by))
        return frozenset((len(self._scores) - 1,))

    # Operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if may_make_weights(func):
            self.operators_of_weights.add((self.innermost(), str(func)))
        if getattr(func, "namespace", "higher_order") not in TORCHS_OWN:
            return func(*args, **kwargs) if self.operators is None else self.operators(func, args, kwargs)
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self.follow(func, args, kwargs, result)
        return result

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Remember what the results of an operator are."""
        name, kind = _kind_of(func)
        made = list(tensors_in(result))
        if not made:
            return
        given = list(tensors_in(args))
        given += tensors_in(list(kwargs.values())) if kwargs else ()
        marks = [self.known(each) for each in given]
        mark = joint_of(marks) if kind != "new" else _CONSTANT
        if mark.varies:
            mark = self._after(name, kind, args, kwargs, given, marks, mark, made[0])
        for each in made:
            if each.is_floating_point() or each.is_complex():
                self.put(each, mark)
            else:
                self.put(each, Mark(varies=mark.varies, of_parameters=mark.of_parameters))

    def _after(
        self, name: str, kind: str, args: Any, kwargs: Any, given: list[Tensor], marks: list[Mark], joint: Mark,
        result: Tensor,
    ) -> Mark:  # fmt: skip
        if kind == "product":
            first = _FACTORS[name]
            if len(args) > first + 1 and isinstance(args[first + 1], Tensor):
                mark = self._product(name, args[first], args[first + 1], joint)
                return mark._replace(features=1 if "mv" in name else result.shape[-1], is_pooling=False)
        if kind == "embedding" or (name in _CHOICES and marks[0].of_parameters):
            self._note_look_up(args, marks[0])
            return _CHOSEN
        if kind == "attention" and joint.projected:
            if self.innermost() not in self.left_to_steps:
                self.found(self.innermost(), f"calls {name}")
            return PROJECTED
        if kind == "norm":
            return joint._replace(scores=frozenset(), weights=frozenset(), product=None)
        if "softmax" in name and joint.projected and not (joint.scores or joint.weights):
            return joint._replace(is_pooling=result.shape[args[1]] != joint.features)
        if kind == "nonlinear" or (kind == "clamp" and _least(args, kwargs) == 0):
            return self.nonlinear(name, joint)
        if kind == "mul" and len(given) == 2:
            return self._multiplied(given, marks, joint, result)
        if joint.product is None:
            return joint
        if kind == "sum":
            return self._summed(joint, given[0], args)
        if kind == "scatter" and joint.product.weights:
            return self._weigh(joint.product.weights)
        keeps = name in _SAME_PLACES and sum(mark.product is not None for mark in marks) == 1
        return joint if keeps else joint._replace(product=None)

    def _product(self, name: str, a: Tensor, b: Tensor, joint: Mark) -> Mark:
        first, second = self.known(a), self.known(b)
        if name not in ("convolution", "_convolution") and a.shape[-1:] == (1,):  # an elementwise product
            return joint._replace(product=None)
        if first.of_parameters != second.of_parameters:
            return self._projection(joint)
        if not (first.varies and second.varies):
            return joint._replace(scores=frozenset(), weights=frozenset(), product=None)
        if first.is_pooling != second.is_pooling:
            self.without_logits.append(Sighting(self.innermost(), f"{NO_LOGITS} (a softmax of no product weighs)"))
        for one, other in ((first, second), (second, first)):
            if one.weights:
                return self._weigh(one.weights) if other.is_value else PROJECTED
        scores = first.scores | second.scores
        if scores:
            if first.is_value or second.is_value:
                self._note_linear(scores)
            return PROJECTED
        if not (first.projected and second.projected):
            return joint._replace(product=None)
        scores = self._new_scores(self.running(), name)
        if first.bilinear or second.bilinear:
            self._note_linear(scores)
        return PROJECTED._replace(scores=scores)

    def _projection(self, given: Mark) -> Mark:
        """Return what a product with a parameter is: weights of heads that were mixed before may be mixed again."""
        mixed = [each for each in given.weights if self._scores[each].operator == _MIXED]
        return PROJECTED._replace(weights=frozenset(mixed)) if mixed else PROJECTED

    def nonlinear(self, name: str, joint: Mark) -> Mark:
        """Return what a function, by this name, that is not linear makes of scores."""
        for each in joint.scores:
            self._scores[each].by = self._scores[each].by or name.strip("_").replace("safe_softmax", "softmax")
        return joint._replace(scores=frozenset(), weights=joint.weights | joint.scores, product=None)

    def _multiplied(self, given: list[Tensor], marks: list[Mark], joint: Mark, result: Tensor) -> Mark:
        (a, b), (first, second) = given, marks
        if not (first.varies and second.varies):
            return joint
        shapes = tuple(a.shape), tuple(b.shape), tuple(result.shape)
        for one, other, tensor in ((first, second, a), (second, first, b)):
            if one.weights and other.is_value:
                is_weight = tensor.numel() < result.numel()
                factors = shapes if tensor is a else (shapes[1], shapes[0], shapes[2])
                return joint._replace(product=Product(*factors, one.weights) if is_weight else None)
        is_square = _place(a) == _place(b)
        if first.projected and second.projected and not is_square:
            may_be_scores = first.is_value and second.is_value
            return joint._replace(bilinear=True, product=Product(*shapes) if may_be_scores else None)
        return joint._replace(product=None)

    def _summed(self, joint: Mark, summed: Tensor, args: Any) -> Mark:
        product, axes = cast("Product", joint.product), args[1] if len(args) > 1 else None
        axes = [] if axes is None else [axis % summed.ndim - summed.ndim for axis in axes]
        where_it_was = tuple(summed.shape) == product.shape
        if product.weights:
            if all(_size(product.first, axis) > 1 for axis in axes) or not where_it_was:
                return self._weigh(product.weights)
        elif where_it_was and len(axes) == 1 and min(_size(each, axes[0]) for each in product[:2]) > 1:
            return PROJECTED._replace(scores=self._new_scores(self.running(), "mul and sum"))
        return joint._replace(product=None)

    def _weigh(self, weights: frozenset[int]) -> Mark:
        self._weighed.append((self.innermost(), weights))
        return PROJECTED

    def _note_linear(self, scores: frozenset[int]) -> None:
        for each in scores:
            self._scores[each].is_linear = True

    def _note_look_up(self, args: Any, of: Mark) -> None:
        """Remember of what rows were chosen, along its first axis."""
        index = args[1] if isinstance(args[1], Tensor | list | tuple) else args[2]
        first = index[0] if isinstance(index, list | tuple) else index
        is_along_first = args[1] == 0 if isinstance(args[1], int) else True
        is_choice = isinstance(first, Tensor) and first.dtype in (torch.int64, torch.int32)
        storage = _storage(args[0])
        if of.of_parameters and is_along_first and is_choice and storage is not None:
            self.looked_up.add(storage._cdata)

    def known(self, tensor: Tensor) -> Mark:
        """Return what is known of an argument. One that comes from nowhere is an input."""
        mark = self.mark(tensor)
        if mark is None:
            return Mark(varies=True, is_number=tensor.is_floating_point(), from_nowhere=True)
        return mark

    def innermost(self) -> str:
        """Return the name of the innermost module that runs."""
        running = self.running()
        return running[-1][0] if running else ""


@functools.cache
def may_make_weights(func: Any) -> bool:
    """Tell whether an operator may make weights of scores, or weigh by them: a function that is not linear, a scatter,
    an attention, or anything whose inside is not seen."""
    kinds = "nonlinear", "clamp", "scatter", "attention"
    return getattr(func, "namespace", "higher_order") not in TORCHS_OWN or _kind_of(func)[1] in kinds


@functools.cache
def _kind_of(func: Any) -> tuple[str, str]:
    """Return the name of an operator, and which kind of rule it has."""
    packet = getattr(func, "overloadpacket", func)
    name = getattr(packet, "__name__", str(packet))
    if name.endswith("_like") or name.startswith("new_"):
        return name, "new"
    kinds = {"product": _FACTORS, "nonlinear": _NONLINEAR, "clamp": _CLAMPS, "scatter": _SCATTERS}
    kinds |= {"mul": ("mul", "mul_"), "sum": ("sum",), "embedding": ("embedding", "embedding_bag")}
    kind = next((kind for kind, names in kinds.items() if name in names), "")
    if any(part in name for part in _ATTENTION):
        kind = "attention"
    return name, "norm" if any(part in name for part in _NORMS) else kind


def joint_of(marks: Sequence[Mark]) -> Mark:
    """Return what is known of what is made of several."""
    if not marks:
        return _CONSTANT
    if all(mark is marks[0] for mark in marks):
        return marks[0]
    varies = any(mark.varies for mark in marks)
    return Mark(
        varies,
        any(mark.is_number for mark in marks),
        any(mark.projected for mark in marks),
        not varies and any(mark.of_parameters for mark in marks),
        varies and all(mark.from_nowhere for mark in marks if mark.varies),
        any(mark.bilinear for mark in marks),
        any(mark.is_pooling for mark in marks),
        max(mark.features for mark in marks),
        frozenset[int]().union(*(mark.scores for mark in marks)),
        frozenset[int]().union(*(mark.weights for mark in marks)),
        next((mark.product for mark in marks if mark.product is not None), None),
    )


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        tensor = tensor.values()
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # of a kind that has none
        return None


def _place(tensor: Tensor) -> object:
    storage = _storage(tensor)
    return None if storage is None else storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among some values, and in lists of them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for each in values:
            yield from tensors_in(each)


def _least(args: Any, kwargs: Any) -> Any:
    least = kwargs.get("min", args[1] if len(args) > 1 else None)
    return least if isinstance(least, int | float) else None


def _size(shape: Sequence[int], axis: int) -> int:
    """Return the size of an axis that is counted from the last; 1 where it is of another tensor's axes."""
    return shape[axis] if -axis <= len(shape) else 1


def _innermost(made_in: Modules, weighed_in: str) -> str:
    """Return the innermost module that runs both the product and what it weighs."""
    names = [name for name, _ in made_in if f"{weighed_in}.".startswith(f"{name}.") or not name]
    return names[-1] if names else weighed_in
