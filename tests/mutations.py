"""Break the product on purpose, one fault at a time, and tell whether the tests see it.

    python tests/mutations.py                 all; about half an hour on one core
    python tests/mutations.py --only NAME …   some
    python tests/mutations.py --list          names, files and tests; nothing is run

Each mutation is a fault that was found in public code or in ours, or that breaks one rule of the clip, of the sharding
or of the resume. Its snippet is searched in all of `muonclip`, then of `benchmarks`, so it does not depend on where the
code is; it must occur there exactly once. A copy of the tracked files is changed, never the tree itself. A mutation is
killed when a test of its selection fails or raises, and survives when they all pass. Anything else is an error: the
selection does not pass without the mutation, nothing was collected, or the changed file cannot be imported. Those with
tests in `tests/engines` are left out where no engine is installed: run them by `.venv-engines/bin/python`. A run that
takes longer than the limit counts as killed: without the mutation the same tests came to their end.

Each run of pytest is a fork of this process, which has imported the frameworks, but nothing of the library, once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("muonclip", "benchmarks", "tests", "docs", "pyproject.toml", "README.md", "CHANGELOG.md", "mkdocs.yml")
ROOMS = ("muonclip", "benchmarks")
PYTEST = (
    *("-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-p", "no:randomly"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # of what is imported beforehand
)
PRELOADED = (
    "optax",
    "optax.contrib",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "torch.nn.attention.flex_attention",
    "transformers.models.llama",
)


Tests = tuple[str, ...]
"""Arguments of pytest: node ids, and perhaps -k."""


@dataclass(frozen=True)
class Mutation:
    """One fault: `old` becomes `new`, and one of `tests` (arguments of pytest) should fail."""

    name: str
    wrong: str
    old: str
    new: str
    tests: Tests


@dataclass(frozen=True)
class Outcome:
    """What pytest said of a selection: "killed", "SURVIVED" or "error", and why."""

    verdict: str
    why: str


def tests_of(file: str, *names: str) -> Tests:
    """Node ids of a test file; all of it without names."""
    return tuple(f"tests/{file}::{name}" for name in names) or (f"tests/{file}",)


# The numbers are those of a list of faults found in public optimizers. Not among the mutations, because this library
# has no code that could be wrong in that way: 17 and 18 (nothing is hooked into gradient reduction), 23 (no method is
# replaced by a compiled one), 31 (no control of norms), 34 (no tuning of baselines); or because no test on the CPU
# could see it: the graph replay of 14 and the offsets of 24. Of 25, 29, 36, 37 and 39 to 42 there is what the library
# does about them; what it does not do cannot be broken.
MUTATIONS = (
    # torchao's linears that round: run by .venv-engines/bin/python
    Mutation(
        "the-copy-rounds-too",
        "Linears that round do so in the copy in which heads are found.",
        "return UnroundedLinear if rounds else kind",
        "return kind",
        tests_of("engines/test_torchao_qat.py"),
    ),
    Mutation(
        "fixed-scales-are-clipped",
        "Weights that are rounded by fixed or learned scales are scaled, and their grid is not.",
        "projection = with_fixed_scales(projection) or projection",
        "with_fixed_scales(projection)",
        tests_of("engines/test_torchao_qat.py", "test_weights_with_fixed_scales_are_refused"),
    ),
    Mutation(
        "a-copy-of-the-gathered-weight-is-scaled",
        "What is scaled is a copy of the weight that FSDP2 gathers in float8.",
        "return tensor._tensor  # pyright",
        "return tensor._tensor.clone()  # pyright",
        tests_of("engines/test_torchao_fsdp2.py"),
    ),
    Mutation(
        "stale-float8-scale",
        "A scale that was computed before the clip is used by the next gathering.",
        "        drop_kept_scale(parameter)\n",
        "",
        tests_of("engines/test_torchao_fsdp2.py", "test_a_scale_that_was_kept_from_before_the_clip_is_dropped"),
    ),
    # Engines that compute forwards of their own, and products in functions of their own
    Mutation(
        "the-reference-pass-counts",
        "The pass of a policy without its adapter, without gradients, counts for the step.",
        "run = ObserverRun(observer, observes=trains and reason is None)",
        "run = ObserverRun(observer, observes=reason is None)",
        tests_of("torch/test_trl.py", "test_dpo_with_an_adapter_leaves_the_pass_without_it_out"),
    ),
    Mutation(
        "generation-counts",
        "What a policy generates, and its old log-probabilities, count for the step.",
        "run = ObserverRun(observer, observes=trains and reason is None)",
        "run = ObserverRun(observer, observes=reason is None)",
        tests_of("torch/test_trl.py", "test_grpo_clips_once_in_each_inner_epoch"),
    ),
    Mutation(
        "products-in-functions-are-not-seen",
        "A projection whose product is in an autograd function is taken for what its backward returns.",
        "        if tracer.takes_matrix(function, args):\n",
        "        if not args:\n",
        tests_of(
            "torch/test_projections_in_functions.py",
            "test_the_rows_of_heads_are_found_behind_a_product_in_a_function",
        ),
    ),
    Mutation(
        "given-outputs-are-differentiated",
        "A function that writes into a given tensor is traced with gradients, which torch refuses.",
        'if isinstance(kwargs.get("out"), Tensor):',
        'if isinstance(kwargs.get("nothing"), Tensor):',
        tests_of(
            "torch/test_projections_in_functions.py",
            "test_the_rows_of_heads_are_found_behind_a_product_in_a_function",
        ),
    ),
    Mutation(
        "a-shard-of-megatron-is-a-matrix",
        "Muon takes a shard of Megatron's tensor parallelism for a whole matrix.",
        "ranks = 1 if ranks_of is None else ranks_of()",
        "ranks = 1",
        tests_of("engines/test_megatron.py", "test_a_shard_is_refused_where_it_would_be_taken_for_a_matrix"),
    ),
    Mutation(
        "half-made-copies-stay",
        "A copy that was given up half-made is what the next module with the same object gets.",
        "        while len(memo) > known:  #",
        "        while not memo:  #",
        tests_of(
            "torch/test_projections_in_functions.py",
            "test_what_cannot_be_copied_is_shared_by_all_modules_that_have_it",
        ),
    ),
    # The cluster on paper
    Mutation(
        "queries-projected-last",
        "The reference model projects queries after keys: gradients of x are added in another order.",
        "return q, torch.cat((k_nope, k_rope), -1), v",
        "return self.project_queries(x), torch.cat((k_nope, k_rope), -1), v",
        tests_of("models/test_gradient_bits.py"),
    ),
    Mutation(
        "one-scale-for-a-row",
        "Activations in FP8 have one scale for a whole row.",
        "scales = blocks.abs().amax(-1) / _LARGEST",
        "scales = blocks.abs().amax((-2, -1), keepdim=True)[..., 0].expand(blocks.shape[:-1]) / _LARGEST",
        tests_of("models/test_recompute.py", "test_a_block_of_128_has_its_own_scale"),
    ),
    Mutation(
        "one-int4-scale-for-a-row",
        "INT4 weights have one scale for a whole row.",
        "scales = xp.amax(xp.abs(groups), axis=-1, keepdims=True) / LARGEST",
        "scales = xp.amax(xp.abs(groups), axis=(-2, -1), keepdims=True) / LARGEST",
        tests_of("models/test_int4.py", "test_a_group_of_32_inputs_has_its_own_scale_and_15_values"),
    ),
    Mutation(
        "int4-of-16-values",
        "The scale of INT4 weights is that of compressed-tensors: the largest weight is not kept.",
        "LARGEST = 7\n",
        "LARGEST = 7.5\n",
        tests_of("models/test_int4.py", "test_a_group_of_32_inputs_has_its_own_scale_and_15_values"),
    ),
    Mutation(
        "int4-codes-not-cut-off",
        "INT4 codes of subnormal weights exceed 7.",
        "codes = xp.clip(codes, -LARGEST, LARGEST)",
        "codes = xp.clip(codes, -99, 99)",
        tests_of("models/test_int4.py", "test_the_smallest_weights_stay_within_seven_steps"),
    ),
    Mutation(
        "int4-gradient-of-the-rounding",
        "The gradient of INT4 weights is that of the rounding, nothing.",
        "return gradients[0]\n\n\nclass SwiGLU",
        "return gradients[0] * 0\n\n\nclass SwiGLU",
        tests_of("models/test_int4.py", "test_loss_and_gradients_are_those_of_rounded_weights_to_the_bit"),
    ),
    Mutation(
        "int4-down-projection-left",
        "Of the experts the down-projection is not rounded.",
        "grouped_linear(swiglu(gate_up), self.rounded(local(self.down_proj)), ends)",
        "grouped_linear(swiglu(gate_up), local(self.down_proj), ends)",
        tests_of("models/test_int4.py", "test_loss_and_gradients_are_those_of_rounded_weights_to_the_bit"),
    ),
    Mutation(
        "int4-weights-kept",
        "Rounded weights are made outside of what is computed again, and kept for the backward pass.",
        "gate_up = self.keep(lambda rows: grouped_linear(rows, self.rounded(gate_up_proj), ends), rows)",
        "made = self.rounded(gate_up_proj)\n"
        "        gate_up = self.keep(lambda rows: grouped_linear(rows, made, ends), rows)",
        tests_of("models/test_int4.py", "test_the_rounded_weights_are_not_kept_where_inputs_alone_are"),
    ),
    Mutation(
        "int4-groups-cut-by-ranks",
        "Tensor parallelism cuts groups of INT4 weights.",
        "GROUP if config.expert_weight_bits else 8",
        "8",
        tests_of("models/test_int4.py", "test_tensor_parallelism_cuts_no_group"),
    ),
    Mutation(
        "int4-jax-gradient",
        "In JAX the gradient of INT4 weights is not passed on.",
        "lambda _, gradient: (gradient,)",
        "lambda _, gradient: (0 * gradient,)",
        tests_of("models/test_int4.py", "test_the_experts_of_jax_are_those_of_torch"),
    ),
    Mutation(
        "a-copy-computes-its-original",
        "A copied layer that computes activations again computes those of the layer it was copied from.",
        "layer.attend, layer.transform = MethodType(attend, layer), MethodType(transform, layer)",
        "layer.attend, layer.transform = (lambda *of: attend(layer, *of)), (lambda *of: transform(layer, *of))",
        tests_of("models/test_recompute.py", "test_the_clip_finds_and_scales_what_is_computed_again"),
    ),
    Mutation(
        "two-ways-with-one-momentum",
        "The way that rounds late shares its momentum with the way that it goes on from.",
        "rounding.restore(copy.deepcopy(plain.state()))",
        "rounding.restore(plain.state())",
        tests_of(
            "benchmarks/test_k2_training.py",
            "test_ways_share_weights_and_batches_and_rounding_late_goes_on_from_the_state",
        ),
    ),
    Mutation(
        "long-context-without-yarn",
        "The long stage does not have YaRN's frequencies and temperature.",
        "replace(longer, yarn_factor=FACTOR,",
        "replace(longer, yarn_factor=1.0,",
        tests_of(
            "benchmarks/test_long_context.py",
            "test_the_observed_maximum_is_that_of_a_probe_before_and_after_the_switch",
        ),
    ),
    Mutation(
        "observed-without-yarns-temperature",
        "The reference model's attention leaves YaRN's mscale² out of its logits.",
        "scale=self.config.softmax_scale,\n            is_causal=True",
        "scale=self.config.qk_head_dim**-0.5,\n            is_causal=True",
        tests_of(
            "benchmarks/test_long_context.py",
            "test_the_observed_maximum_is_that_of_a_probe_before_and_after_the_switch",
        ),
    ),
    Mutation(
        "long-stage-forgets-the-momentum",
        "The long stage begins with the weights of the short one alone.",
        "long.restore(copy.deepcopy(short.state()))",
        "long.model.load_state_dict(short.model.state_dict())",
        tests_of(
            "benchmarks/test_long_context.py",
            "test_a_checkpoint_of_the_short_stage_loads_with_the_state_of_the_optimizer",
        ),
    ),
    Mutation(
        "parameters-go-to-the-host",
        "What is kept in host memory has the parameters among it.",
        "stays = any(_storage(each) == _storage(tensor) for each in parameters())",
        "stays = False",
        tests_of("models/test_recompute.py", "test_no_parameter_is_moved"),
    ),
    Mutation(
        "embedding-counted-twice",
        "The head has the embedding's weights, too.",
        'Unit("head", tuple(found["head"]))',
        'Unit("head", tuple(found["head"] + found["embedding"]))',
        tests_of("benchmarks/test_cluster.py", "test_k2_has_the_parameters_that_its_sizes_make"),
    ),
    Mutation(
        "zero-1-forgotten",
        "Every rank has the whole of masters and moments.",
        "return experts / self.expert_data + others / self.data",
        "return experts + others",
        tests_of(
            "benchmarks/test_cluster.py",
            "test_the_ranks_together_have_each_state_once_and_attention_on_all_data_ranks",
        ),
    ),
    Mutation(
        "expert-parallelism-divides-attention",
        "The ranks that share experts also share attention, as if it were tensor parallelism.",
        "return experts, sum(unit.numel(experts=False) for unit in stage) / layout.tensor",
        "return experts, sum(unit.numel(experts=False) for unit in stage) / layout.tensor / layout.expert",
        tests_of("benchmarks/test_cluster.py", "test_the_published_figures_of_k2_come_out"),
    ),
    Mutation(
        "bubble-without-virtual-stages",
        "The bubble is that of 1F1B without interleaving.",
        "(layout.pipeline - 1) / (layout.virtual * micro_batches)",
        "(layout.pipeline - 1) / micro_batches",
        tests_of("benchmarks/test_cluster.py", "test_a_schedule_that_is_played_waits_as_long_and_holds_as_much[16-4]"),
    ),
    Mutation(
        "all-positions-attend",
        "Causal attention is counted over all pairs of positions.",
        "return products + (length or config.max_seq_len)",
        "return products + 2 * (length or config.max_seq_len)",
        tests_of("benchmarks/test_cluster.py", "test_the_operations_are_those_that_torch_counts[mla]"),
    ),
    Mutation(
        "all-experts-are-active",
        "A token meets all experts.",
        "active = config.num_experts_per_tok / config.num_experts",
        "active = 1",
        tests_of("benchmarks/test_cluster.py", "test_the_operations_are_those_that_torch_counts[mla]"),
    ),
    Mutation(
        "gigabytes-of-two-to-the-thirty",
        "A GB is taken for a GiB.",
        'f"{step.memory[name] / 1e9:.1f}"',
        'f"{step.memory[name] / 2**30:.1f}"',
        tests_of("benchmarks/test_cluster.py", "test_one_step_is_printed_in_decimal_gigabytes"),
    ),
    Mutation(
        "neighbours-on-the-network",
        "What an owner sends back to its neighbours passes the network.",
        "owned[at] * (sum(sizes) - elements) * back",
        "owned[at] * sum(sizes) * back",
        tests_of("benchmarks/test_cluster.py", "test_the_links_share_out_what_the_plan_sends"),
    ),
    Mutation(
        "one-rate-for-all-shapes",
        "One rate of products serves matrices of all shapes.",
        "return sorted(kept, key=_size, reverse=True)",
        "return sorted(kept, key=_size, reverse=True)[-1:]",
        tests_of(
            "benchmarks/test_cluster.py",
            "test_ranks_are_predicted_by_the_rates_of_their_shapes_and_the_size_of_their_shards",
        ),
    ),
    Mutation(
        "shards-cost-nothing",
        "What is done for each element of a rank counts as the same in every step.",
        'lambda row: [row["elements"] / 1e6, 1.0]',
        "lambda row: [0.0, 1.0]",
        tests_of(
            "benchmarks/test_cluster.py",
            "test_ranks_are_predicted_by_the_rates_of_their_shapes_and_the_size_of_their_shards",
        ),
    ),
    Mutation(
        "eight-ranks-are-fitted",
        "The constants are fitted to what they are to predict.",
        'few = [row for row in rows if row["processes"] in FITTED_ON]',
        "few = rows",
        tests_of("benchmarks/test_cluster.py", "test_what_is_predicted_is_never_fitted"),
    ),
    Mutation(
        "the-most-of-the-times",
        "Steps that others disturbed most count.",
        "{name: min(min(row[name]) for row in same) for name in TIMES}",
        "{name: max(max(row[name]) for row in same) for name in TIMES}",
        tests_of("benchmarks/test_cluster.py", "test_each_repeat_is_predicted_by_itself"),
    ),
    Mutation(
        "all-operations-are-products",
        "Passes over memory count as matrix products.",
        "if func._overloadpacket not in flop_registry:",
        "if False:",
        tests_of("benchmarks/test_cluster.py", "test_products_alone_are_timed"),
    ),
    Mutation(
        "all-ranks-do-the-iteration",
        "A rank is said to do the operations of all.",
        "by_shape.get(shape, 0) + each.flops().get(rank, 0)",
        "by_shape.get(shape, 0) + sum(each.flops().values())",
        tests_of("benchmarks/test_cluster.py", "test_operations_by_shape_are_those_of_the_plan"),
    ),
    # Weights for ranks that infer
    Mutation(
        "chunks-without-a-limit",
        "A chunk takes more than it has room for.",
        "if at + math.prod(size) * dtype.itemsize > chunk_bytes:",
        "if False:",
        tests_of("benchmarks/test_weight_broadcast.py", "test_pieces_of_chunks_make_the_weights_again"),
    ),
    Mutation(
        "pieces-are-not-aligned",
        "A number begins where its dtype cannot be read.",
        "at = -(-end // ALIGNED) * ALIGNED",
        "at = end",
        tests_of("benchmarks/test_weight_broadcast.py", "test_pieces_of_chunks_make_the_weights_again"),
    ),
    Mutation(
        "boxes-begin-at-the-first-entry",
        "All boxes of a weight arrive where its first one belongs.",
        "return _box(weight, [a + b for a, b in zip(begins, self.inside, strict=True)], self.size)",
        "return _box(weight, begins, self.size)",
        tests_of("benchmarks/test_weight_broadcast.py", "test_pieces_of_chunks_make_the_weights_again"),
    ),
    Mutation(
        "shards-begin-at-the-first-row",
        "The shard of every trainer arrives where the first one belongs.",
        "begins = self.item.tensor_data.chunk.offsets",
        "begins = [0] * len(self.size)",
        tests_of(
            "benchmarks/test_weight_broadcast.py", "test_weights_arrive_to_the_bit_in_chunks_and_answer_the_same_logits"
        ),
    ),
    Mutation(
        "replicas-are-sent-twice",
        "Each trainer that has a weight sends it.",
        "DefaultSavePlanner(flatten_state_dict=False).create_global_plan(",
        "(lambda every: (every, None))(",
        tests_of(
            "benchmarks/test_weight_broadcast.py", "test_weights_arrive_to_the_bit_in_chunks_and_answer_the_same_logits"
        ),
    ),
    # Momentum in int8, stochastic rounding
    Mutation(
        "codes-are-cut-off",
        "Stochastic rounding to int8 rounds down.",
        "xp.floor(ratio + (noise * 2.0**-16 + 2.0**-17))",
        "xp.floor(ratio)",
        tests_of("core/test_state_storage.py", "test_stochastic_rounding_has_no_bias[int8_stochastic]"),
    ),
    Mutation(
        "bfloat16-is-cut-off",
        "Stochastic rounding to bfloat16 rounds towards zero.",
        "(bits + noise) & _UPPER",
        "bits & _UPPER",
        tests_of("core/test_state_storage.py", "test_stochastic_rounding_has_no_bias[bfloat16_stochastic]"),
    ),
    Mutation(
        "codes-pass-127",
        "The largest entry of a block becomes 128, which int8 reads as -128.",
        "return xp.clip(xp.floor(",
        "return (lambda x, *_: x)(xp.floor(",
        tests_of("core/test_state_storage.py", "test_the_largest_of_a_block_is_127_whatever_the_noise"),
    ),
    Mutation(
        "noise-of-every-step-is-one",
        "A parameter draws the same noise in each step.",
        "key = _mixed(_mixed(step) + stream)",
        "key = _mixed(_mixed(step * 0) + stream)",
        tests_of(
            "torch/test_stored_momentum.py", "test_parameters_and_steps_have_noise_of_their_own_and_a_name_has_one"
        ),
    ),
    Mutation(
        "noise-by-the-wrapper-s-name",
        "A model draws other noise under DDP than without it.",
        "name = plain_name(name_of(group, matrix.group, matrix.position))",
        "name = name_of(group, matrix.group, matrix.position)",
        tests_of(
            "torch/test_stored_momentum.py", "test_parameters_and_steps_have_noise_of_their_own_and_a_name_has_one"
        ),
    ),
    Mutation(
        "steps-of-noise-are-not-counted",
        "The step of the noise stays where it is.",
        "group[ROUNDING_STEP] = group.get(ROUNDING_STEP, 0) + 1",
        "group[ROUNDING_STEP] = group.get(ROUNDING_STEP, 0)",
        tests_of(
            "torch/test_stored_momentum.py",
            "test_a_trajectory_is_numpy_s_on_every_logical_matrix[int8_stochastic-muon]",
        ),
    ),
    Mutation(
        "infinite-blocks-are-hidden",
        "A block with infinity is read as other numbers than NaN.",
        "return xp.where(largest < xp.inf, largest, xp.nan)",
        "return xp.where(largest < xp.inf, largest, 0.0)",
        tests_of("torch/test_stored_momentum.py", "test_a_gradient_that_is_not_finite_diverges_as_in_float32"),
    ),
    Mutation(
        "blocks-begin-where-a-shard-does",
        "The blocks of a shard of columns are counted from its first column.",
        "stop = min(last, start - start % BLOCK + BLOCK)",
        "stop = min(last, start + BLOCK)",
        tests_of("core/test_state_storage.py", "test_blocks_are_of_the_whole_matrix"),
    ),
    Mutation(
        "sizes-of-cut-blocks-are-each-rank-s",
        "Ranks that divide the columns of a matrix have sizes of their own for one block.",
        "self._rounding, self._cut = rounding, cut if has_cut_columns(shards) else None",
        "self._rounding, self._cut = rounding, None",
        tests_of("torch/test_row_state.py", "test_sharded_equals_whole_and_every_row_is_kept_by_those_who_have_it"),
    ),
    Mutation(
        "unused-experts-are-stored-anew",
        "The codes of an expert without a gradient are rounded again in each step.",
        "held.copy_(value if used is None else torch.where(used, value, held))",
        "held.copy_(value)",
        tests_of("torch/test_stored_momentum.py", "test_unused_experts_keep_their_codes"),
    ),
    Mutation(
        "codes-without-sizes-are-loaded",
        "A checkpoint whose codes have lost the sizes of their blocks is taken, and fails later.",
        "        if absmax_of(part) not in saved:",
        "        if False:",
        tests_of("torch/test_stored_momentum.py", "test_a_damaged_state_is_refused_before_anything_is_loaded"),
    ),
    Mutation(
        "sizes-of-blocks-are-not-looked-at",
        "Sizes that are NaN or negative are loaded.",
        'for part in {"muon": of_muon | absmax',
        'for part in {"muon": of_muon',
        tests_of("torch/test_stored_momentum.py", "test_a_damaged_state_is_refused_before_anything_is_loaded"),
    ),
    Mutation(
        "codes-are-taken-for-numbers",
        "Codes that torch.distributed.checkpoint has read into float32 become the momentum.",
        "if options.storage.has_codes and value.numel() and bool(value.any())",
        "if False and value.numel() and bool(value.any())",
        tests_of("torch/test_stored_momentum.py", "test_codes_that_were_read_as_numbers_are_refused"),
    ),
    Mutation(
        "sizes-stay-behind",
        "Momentum that is read back from codes keeps the sizes of blocks in its state.",
        "                del own[name]",
        "                own.get(name)",
        tests_of(
            "torch/test_stored_momentum.py",
            "test_a_checkpoint_in_float32_becomes_codes_and_back_where_its_groups_say_so",
        ),
    ),
    Mutation(
        "jax-reads-all-blocks-by-the-first",
        "Columns after the first 2048 are read by the size of the first block.",
        "jax.lax.slice_in_dim(of_block, number, number + 1, axis=axis), result)",
        "jax.lax.slice_in_dim(of_block, 0, 1, axis=axis), result)",
        tests_of(
            "optax/test_stored_momentum.py", "test_blocks_are_along_the_columns_wherever_these_are_and_as_torch_s"
        ),
    ),
    Mutation(
        "pairs-of-heads-are-single-in-jax",
        'per_head="pairs" makes a matrix of each head in the layouts of the reference model in JAX.',
        "return count // together\n\n    def layout",
        "return count\n\n    def layout",
        tests_of("models/test_jax_moe.py", "test_muon_reads_the_same_matrices_as_in_torch"),
    ),
    # The benchmarks: a probe, and runs that are disturbed
    Mutation(
        "probe-learns",
        "The loss of the probe is taken with gradients enabled, and so the clip observes the probe's logits.",
        "    @torch.no_grad()\n    def loss(self, windows: Windows) -> float:\n        self.model.eval()\n        loss",
        "    def loss(self, windows: Windows) -> float:\n        self.model.eval()\n        loss",
        tests_of("benchmarks/test_spikes.py", "test_the_probe_changes_nothing_of_the_training"),
    ),
    Mutation(
        "probe-moves",
        "The probe's windows change with the steps.",
        "self._validation_windows(0, rows, training.probe_windows)",
        "self._validation_windows(self.done, rows, training.probe_windows)",
        tests_of("benchmarks/test_spikes.py", "test_the_probe_has_the_same_windows_in_every_arm_and_seed"),
    ),
    Mutation(
        "disturbance-one-step-longer",
        "A disturbance acts for a step more than it says.",
        "self.after <= done < self.after + self.steps",
        "self.after <= done <= self.after + self.steps",
        tests_of(
            "benchmarks/test_spikes.py",
            "test_a_disturbed_rate_is_multiplied_for_its_steps_alone",
            "test_random_batches_take_the_place_of_the_texts",
        ),
    ),
    Mutation(
        "random-tokens-of-no-seed",
        "Every seed is disturbed by the same random tokens.",
        'f"random/{seed}/{step}/{row}"',
        'f"random/{step}/{row}"',
        tests_of("benchmarks/test_spikes.py", "test_random_tokens_are_even_and_depend_on_seed_and_step"),
    ),
    Mutation(
        "left-right-after",
        "What is left of a disturbance is read where it ends.",
        "left=loss.tail(LEVEL).mean(skipna=False)",
        "left=loss.iloc[first : first + LEVEL].mean(skipna=False)",
        tests_of("benchmarks/test_spikes.py", "test_what_is_left_is_read_at_the_end"),
    ),
    Mutation(
        "diverged-counts-as-recovered",
        "Of a run that diverged, the steps before count as what is left.",
        ".mean(skipna=False),\n        rise",
        ".mean(),\n        rise",
        tests_of("benchmarks/test_spikes.py", "test_what_is_left_is_read_at_the_end"),
    ),
    Mutation(
        "arms-not-paired-by-seed",
        "Arms are compared on seeds that the other lacks.",
        "if seeds := [seed for seed in runs.get(one, {}) if seed in runs.get(other, {})]:",
        "if seeds := list(runs.get(one, {})):",
        tests_of("benchmarks/test_spikes.py", "test_arms_are_compared_on_the_same_seeds"),
    ),
    # Schedulers, the plan
    Mutation(
        "cycled-momentum-of-one-half",
        "OneCycleLR cycles Muon's momentum alone.",
        'if group["use"] == "muon" or "max_momentum" not in group',
        'if group["use"] == "muon" or "max_momentum" in group',
        tests_of("torch/test_cycled_momentum.py"),
    ),
    Mutation(
        "self-test-takes-nan-for-small",
        "An error that is NaN counts as one within its tolerance.",
        "error <= tolerance",
        "not error > tolerance",
        tests_of("test_selftest.py", "test_nan_is_no_small_error"),
    ),
    Mutation(
        "replicas-gather-by-the-old-name",
        "torch warns at each step of replicas that it gives up a name.",
        'getattr(dist, "all_gather_single", None) or dist',
        "dist",
        tests_of("torch/test_distributed.py", "test_sharded_equals_whole[2]"),
    ),
    Mutation(
        "targets-are-not-guessed",
        "A forward that asks for targets is called without them, and the plan is not complete.",
        "others = asked[1:]",
        "others = asked[:0]",
        tests_of("torch/test_guessed_inputs.py"),
    ),
    Mutation(
        "folded-by-the-last-number-alone",
        "Rows are folded by what follows a number, whatever is before it.",
        "key = (pieces[:at], pieces[at + 1 :], cells) if at > 0 else index",
        "key = (pieces[at + 1 :], cells) if at > 0 else index",
        tests_of("core/test_folded_rows.py"),
    ),
    # Another optimizer for the rest
    Mutation(
        "rest-has-its-own-rate",
        "A class of the user's begins with its own rate, and not with the optimizer's.",
        'self._options = {"lr": lr, **self._options}',
        "self._options = {**self._options}",
        tests_of("torch/test_rest.py", "test_the_rate_is_ours_or_the_partial_s_and_the_decay_the_class_s"),
    ),
    Mutation(
        "rest-runs-hooks-twice",
        "Hooks of steps run for the rest, too.",
        'step = getattr(step, "__wrapped__", step)',
        "step = step",
        tests_of("torch/test_rest.py", "test_one_step_runs_hooks_once_and_evaluates_a_closure_once"),
    ),
    Mutation(
        "rest-that-failed-stays-added",
        "A group that was refused is stepped by the rest.",
        "added_later.share(self.param_groups, self.state)",
        "pass",
        tests_of("torch/test_rest.py", "test_groups_may_be_given_and_added_and_are_taken_back_by_an_error"),
    ),
    Mutation(
        "rest-counts-are-cast",
        "Counts and products of a rest are loaded in the dtype of a bf16 parameter.",
        "value.numel() == held.numel() == 1",
        "value.numel() == held.numel() == 0",
        tests_of("torch/test_rest.py", "test_a_run_that_is_saved_or_copied_goes_on_to_the_bit"),
    ),
    Mutation(
        "rest-of-another-class-is-loaded",
        "A checkpoint of another class is taken.",
        'saved = group.get("rest", self.name)',
        "saved = self.name",
        tests_of("torch/test_rest.py", "test_a_checkpoint_of_another_class_or_of_adamw_is_refused"),
    ),
    Mutation(
        "optax-rest-is-adamw",
        "A transformation for the rest is not used.",
        'if rest is None else {"rest": rest}',
        'if rest is None else {"rest": optax.adamw(**options)}',
        tests_of("optax/test_rest.py", "test_each_half_is_what_its_transformation_does_alone"),
    ),
    # QK-Clip: a model without attention
    Mutation(
        "nothing-to-clip-by-products",
        "A model that mixes tokens by products without a softmax counts as one that has nothing to clip.",
        "not (self.projections or self.required or by_products)",
        "not (self.projections or self.required)",
        tests_of("torch/test_nothing_to_clip.py"),
    ),
    Mutation(
        "state-space-is-an-error",
        "A state space, which has no logits, is refused as an attention that nobody found.",
        "if not holds_a_state_space(self.model.get_submodule(name))",
        "if name is not None",
        tests_of("torch/test_nothing_to_clip.py"),
    ),
    Mutation(
        "head-as-wide-as-the-stream",
        "The last projection of a backbone without a head counts as an output head.",
        "of_all[0] not in _widths(matrices, id(part.parameter))",
        "True",
        tests_of("torch/test_shown_roles.py"),
    ),
    Mutation(
        "gate-is-a-scale",
        "A product of two projections that the model returns counts as an output head and its scale.",
        "found is not None and _is_alone(found, following)",
        "found is not None",
        tests_of("torch/test_shown_roles.py"),
    ),
    Mutation(
        "names-alone-without-a-clip",
        "With the clip off no forward is traced: an output head is Muon's for want of a known name.",
        "        shown = guessed_uses(inner)\n",
        "        shown = {}\n",
        tests_of("torch/test_shown_roles.py"),
    ),
    Mutation(
        "head-under-a-wrapper",
        "What a forward shows is not found under the names of DistributedDataParallel and torch.compile.",
        "shown.get(plain_name(name)))",
        "shown.get(name))",
        tests_of("torch/test_shown_roles.py"),
    ),
    Mutation(
        "head-by-name-in-the-middle",
        "fc and score in the middle of a model are AdamW's, though a forward shows another head.",
        "elif returned and id(parameter) in tracer.matrices:",
        "elif False:",
        tests_of("torch/test_shown_roles.py"),
    ),
    Mutation(
        "stage-without-attention-compares-nothing",
        "A stage without attention does not take part where the others compare theirs: they wait for ever.",
        "if not projections and searched_on is None:",
        "if not projections:",
        tests_of("torch/test_ranks_alike.py"),
    ),
    # QK-Clip: the factors (core)
    Mutation(
        "negative-maximum-divided",  # 1
        "A head whose maximum is negative gets a factor: a root of a negative number.",
        "quiet = max_logits <= tau",
        "quiet = (max_logits <= tau) & (max_logits > 0)",
        tests_of("core/test_clip_factors.py"),
    ),
    Mutation(
        "head-at-tau-multiplied",
        "A head exactly at τ is multiplied by τ/τ, which need not be 1 in floating point.",
        "quiet = max_logits <= tau",
        "quiet = max_logits < tau",
        tests_of("core/test_clip_factors.py"),
    ),
    Mutation(
        "infinite-maximum-zeroes-weights",  # 1
        "A maximum of +inf gives the factor 0.",
        "xp.where(max_logits < math.inf, max_logits, math.nan)",
        "max_logits",
        tests_of("core/test_clip_factors.py"),
    ),
    Mutation(
        "same-root-on-both-sides",  # 13
        "The query takes γ^(1−α) as the key does, so that for α ≠ ½ their product is not γ.",
        "query=xp.where(quiet, one, gamma / key)",
        "query=key",
        tests_of("core/test_clip_factors.py"),
    ),
    Mutation(
        "alpha-on-the-wrong-side",
        "The key takes γ^α and the query the rest.",
        "gamma ** (1 - alpha)",
        "gamma**alpha",
        tests_of("torch/test_qk_clip.py", "test_query_and_key_take_their_shares_of_gamma"),
    ),
    Mutation(
        "tau-of-zero-accepted",
        "τ = 0 and NaN pass the check.",
        'POSITIVE: Rule = ("positive", lambda x: x > 0)',
        'POSITIVE: Rule = ("positive", lambda x: not x < 0)',
        tests_of("core/test_clip_factors.py"),
    ),
    # QK-Clip: which rows (torch)
    Mutation(
        "heads-along-the-wrong-axis",  # 2
        "The factors of the heads scale the in axis of the weight.",
        "yield getattr(self.module, self.weight), self.axis",
        "yield getattr(self.module, self.weight), 1 - self.axis",
        tests_of("torch/test_qk_clip.py", "test_every_head_ends_at_the_smaller_of_its_maximum_and_tau"),
    ),
    Mutation(
        "bias-not-scaled",  # 8
        "The biases of the projections keep their size.",
        "if isinstance(bias, Tensor):\n            yield bias, 0",
        "if False:\n            yield bias, 0",
        tests_of("torch/test_qk_clip.py", "test_every_head_ends_at_the_smaller_of_its_maximum_and_tau"),
    ),
    Mutation(
        "master-not-scaled",  # 8
        "The fp32 master copy keeps its size, so the next copy undoes the clip.",
        "copies = [] if given is None else [given]",
        "copies = list[Tensor]()",
        tests_of("torch/test_qk_clip.py", "test_masters_are_scaled_with_their_copies"),
    ),
    Mutation(
        "shared-key-faced-with-the-root",  # 3, 4
        "A query that faces a shared key takes √γ instead of γ.",
        '"query_facing_shared": "gamma",',
        '"query_facing_shared": "query",',
        tests_of("torch/test_qk_clip.py", "test_every_head_ends_at_the_smaller_of_its_maximum_and_tau"),
    ),
    Mutation(
        "group-maximum-for-all-queries",  # 3
        "All query heads take the factor of the loudest one, so healthy heads shrink.",
        "((rows, getattr(factor, own)) for rows in getattr(projection, part))",
        "((rows, getattr(factor, own).min().expand(len(factor.gamma))) for rows in getattr(projection, part))",
        tests_of("torch/test_qk_clip.py", "test_one_loud_query_head_does_not_shrink_the_others_of_its_group"),
    ),
    Mutation(
        "key-not-scaled",
        "Only the query side is scaled, by √γ.",
        '    "key": "key",\n    "query_facing_shared": "gamma",',
        '    "query_facing_shared": "gamma",',
        tests_of("torch/test_qk_clip.py", "test_every_head_ends_at_the_smaller_of_its_maximum_and_tau"),
    ),
    Mutation(
        "value-rows-of-mla-scaled",  # 4
        "The key part of W_ukv reaches over the rows of the values.",
        'HeadPart("key", "kv", num_heads, qk_nope_head_dim, 0, kv)',
        'HeadPart("key", "kv", num_heads, kv, 0, kv)',
        tests_of("torch/test_qk_clip.py", "test_quiet_heads_keep_their_bits_and_nothing_else_moves"),
    ),
    Mutation(
        "rotary-query-of-mla-starts-too-early",  # 4
        "The rotary part of the query begins at the head's first row.",
        'HeadPart("query_facing_shared", "q", num_heads, qk_rope_head_dim, qk_nope_head_dim, q)',
        'HeadPart("query_facing_shared", "q", num_heads, qk_rope_head_dim, 0, q)',
        tests_of("torch/test_qk_clip.py", "test_every_head_ends_at_the_smaller_of_its_maximum_and_tau"),
    ),
    Mutation(
        "direct-queries-of-mla-never-clipped",  # 4
        "With q_lora_rank=None the reference model declares its attention as observed only.",
        "if not self.config.qk_norm:\n            return self.declare()",
        "if not self.config.qk_norm and self.config.q_lora_rank is not None:\n            return self.declare()",
        tests_of("models/test_torch_moe.py", "test_a_clipped_head_shows_tau_when_its_inputs_are_seen_again"),
    ),
    Mutation(
        "only-observed-attention-scaled",  # 9
        "An attention with a reason (QK-norm) is scaled nevertheless.",
        "        if self.reason:\n            return ()\n        return tuple(rows for part",
        "        return tuple(rows for part",
        tests_of("torch/test_qk_clip.py", "test_an_attention_with_a_reason_is_observed_and_never_scaled"),
    ),
    # QK-Clip: the proof by experiment
    Mutation(
        "proof-takes-everything",
        "Attentions are clipped as they were found, whatever the experiment shows.",
        "if not any(findings.values()):\n            return",
        "if True:\n            return",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "proof-rounds-like-masks",
        "A finite mask counts among the logits, and whatever moves with queries and keys is below its rounding.",
        "counts = away.isfinite() & (before > MASKED)",
        "counts = away.isfinite()",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "proof-lets-the-results-move",
        "In the experiment attentions return new results, so that all that is behind them moves.",
        "if index < len(self._earlier.calls):",
        "if False:",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "proof-with-zeros",
        "Parameters that are zero stay so in the experiment: what is behind a new gate is not seen to move.",
        "if not values.numel() or bool(values.any()):",
        "if values.numel() >= 0:",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "proof-behind-zeros",
        "In the experiment a kernel that does not run there returns zeros: a gate behind them is not seen to move.",
        "return torch.randn_like(value) if is_zero else value",
        "return value",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "proof-of-the-first-rows-alone",
        "Where gradients find several sets of rows, only the first one is tried.",
        "range(len(self._choices[name]))",
        "range(1)",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "proof-wants-bits-of-halves",
        "Attention in half precision is refused where a factor makes its numbers inexact.",
        "if dtype != torch.float16:",
        "if True:",
        tests_of("torch/test_proof.py", "test_half_precision_is_no_reason_to_refuse"),
    ),
    Mutation(
        "one-finding-for-all-of-a-make",
        "A layer is only observed because another one of its class is normalised.",
        "make = findings[name], self._make_of(each)",
        "make = self._make_of(each)",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "replayed-kernels-draw-no-numbers",
        "Dropout behind a kernel that has one draws other numbers in the experiment, which looks like a leak.",
        "_set_random_state(seen.result, seen.random_state)  # as",
        "pass  # as",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "proof-ends-at-a-cap",
        "What is added behind a cap of the logits may depend on the queries unseen.",
        "if before.is_capped and differ(before.others, after.others):",
        "if False:",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "proof-without-what-a-score-mod-holds",
        "A score_mod may hold a tensor of the queries unseen.",
        "added = call.score_mod.effects(",
        "_ = call.score_mod.effects(",
        tests_of("torch/test_score_mod.py", "test_what_it_holds_of_the_queries_is_refused"),
    ),
    Mutation(
        "proof-of-returned-tensors-alone",
        "What moves between attention and loss is lost in the rounding of the loss.",
        "if name in self._around:",
        "if False:",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "proof-in-evaluation-mode-alone",
        "A gate that is for training alone is scaled.",
        "for mode in (True, False) if training else (False,):",
        "for mode in (False,):",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "copies-wait-for-the-garbage-collector",
        "The copies of experiments stay in memory after them.",
        'vars(module).pop("_compiled_call_impl", None)',
        "pass",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "proof-asks-for-logits-alone",
        "Rows that also feed a gate are scaled.",
        "if not any(findings.values()) and self._moved(outcome)",
        "if False and self._moved(outcome)",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "proof-trusts-masks",
        "What a kernel adds to the logits may depend on the queries unseen.",
        "if differ(before.added, after.added):",
        "if False:",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "proof-by-keys-in-spite-of-positions",
        "The keys are scaled though positions that depend on the query stay.",
        "if finding is None and way.change is by_keys_alone:",
        "if False:",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "proof-without-the-gauge",
        "A declaration of attention that is out of sight is taken as it is.",
        "if gauge and self._moved(self._experiments.run(gauge)):",
        "if False:",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "stuck-heads-stay",
        "A head whose logits do not follow its clips is scaled for ever.",
        "            self.attentions.prove_again(stuck)",
        "            pass",
        tests_of("torch/test_stuck_heads.py"),
    ),
    Mutation(
        "positions-of-the-query-not-counted",
        "The maximum of attention with relative positions is that of q · k alone.",
        "        if is_whole:",
        "        if False:",
        tests_of("torch/test_proof.py"),
    ),
    Mutation(
        "frozen-attention-scaled",
        "An attention that is not trained at all is scaled where frozen weights may be.",
        "if projection.reason or not projection.trains():\n        return {}",
        "if projection.reason:\n        return {}",
        tests_of("torch/test_frozen.py", "test_a_wholly_frozen_attention_stays_with_clip_frozen"),
    ),
    Mutation(
        "frozen-weights-scaled",
        "The frozen base below an adapter is scaled, so the adapter alone is not the model that was trained.",
        "frozen: list[Part] = [] if clip_frozen else [part for part in parts if not _is_trained(projection, part)]",
        "frozen: list[Part] = []",
        tests_of("torch/test_frozen.py", "test_a_lora_adapter_is_all_that_has_to_be_saved"),
    ),
    Mutation(
        "adapter-of-a-frozen-base-scaled",
        "A side of which any weight is trained is scaled.",
        "return all(parameter.requires_grad for rows in getattr(projection, part)",
        "return any(parameter.requires_grad for rows in getattr(projection, part)",
        tests_of("torch/test_frozen.py", "test_where_no_side_can_be_scaled_nothing_is_and_the_report_says_so"),
    ),
    Mutation(
        "other-side-of-a-frozen-one-keeps-its-share",
        "Where one side is frozen, the other takes its share of γ only.",
        'factors[other] = "gamma"',
        "pass",
        tests_of("torch/test_frozen.py", "test_the_side_that_is_trained_takes_all_of_gamma"),
    ),
    Mutation(
        "query-of-a-shared-key-frozen-and-the-rest-scaled",
        "Where the query that meets a shared key is frozen, the private parts are scaled all the same.",
        'if "query_facing_shared" in fixed or {"query", "key"} <= {*fixed}:',
        'if {"query", "key"} <= {*fixed}:',
        tests_of("core/test_head_parts.py", "test_what_is_scaled_where_parts_are_fixed"),
    ),
    Mutation(
        "computed-weight-scaled-later",
        "A weight that is computed since it was found is scaled where it is computed, which changes nothing.",
        "projections[name] = followed(found)",
        "projections[name] = found",
        tests_of("torch/test_reparametrised.py", "test_a_computed_weight_is_followed_to_what_it_is_computed_from"),
    ),
    Mutation(
        "computed-weight-not-noticed",
        "What a computed weight depends on is not looked at again.",
        'yield module._modules, "parametrizations"\n    if _is_parametrized(module, attribute):',
        "if False:",
        tests_of("torch/test_reparametrised.py", "test_a_parametrization_added_to_one_that_was_followed_is_seen"),
    ),
    Mutation(
        "parametrization-taken-for-proportional",
        "A parametrization is followed without the trial whether its rows scale with those of the original.",
        "return torch.equal(trial(), before * factors)",
        "return True",
        tests_of("torch/test_reparametrised.py", "test_a_computed_weight_that_no_rows_scale_is_an_error_by_name"),
    ),
    Mutation(
        "spectral-norm-taken-for-pruning",
        "The original below a legacy spectral norm is scaled, whose norm follows the rows.",
        'and entry(module._buffers, f"{attribute}_mask") is not None',
        "and True",
        tests_of("torch/test_reparametrised.py", "test_a_computed_weight_that_no_rows_scale_is_an_error_by_name"),
    ),
    Mutation(
        "gain-of-columns-scaled",
        "The g of a weight norm along another axis, or of the whole weight, is taken for that of rows.",
        "list(g.shape) != _shape_of_rows(v.shape, axis):",
        "False:",
        tests_of("torch/test_reparametrised.py", "test_a_computed_weight_that_no_rows_scale_is_an_error_by_name"),
    ),
    Mutation(
        "replaced-projection-missed",
        "A projection that was replaced by another module is scaled where nobody calls it.",
        "if parent in modules and not step.leads_to_the_same_parameters():",
        "if False:",
        tests_of("torch/test_reparametrised.py", "test_a_replaced_projection_is_an_error_by_name"),
    ),
    Mutation(
        "tied-before-the-first-forward",
        "What was found before the first forward is kept though weights were tied, added to or replaced since.",
        "if replaced or self._names_at_guess != parameter_names(self.model):",
        "if False:",
        tests_of("torch/test_reparametrised.py", "test_what_changes_the_queries_before_the_first_forward_is_refused"),
    ),
    Mutation(
        "given-projections-scale-twice",
        "A weight that two given projections scale gets the factors of both.",
        "if owners.setdefault(row, name) != name:",
        "if False:",
        tests_of("torch/test_reparametrised.py", "test_given_projections_that_scale_one_weight_twice_are_refused"),
    ),
    Mutation(
        "judged-by-an-empty-batch",
        "A declaration is judged by a batch of nothing, whose logits do not move with the rows.",
        "if first is None or first.numel():",
        "if True:",
        tests_of("torch/test_observation.py", "test_an_empty_batch_shows_nothing_and_the_next_one_is_clipped"),
    ),
    Mutation(
        "weights-tied-later-scaled-twice",
        "A weight that was tied to another one since it was found is scaled for both.",
        "            if gained:\n",
        "            if False:\n",
        tests_of("torch/test_reparametrised.py", "test_weights_tied_later_are_an_error_by_name"),
    ),
    Mutation(
        "weights-untied-later-missed",
        "Of weights that were one when they were found only the first is scaled.",
        "if own[0] in modules and lost and lost != [own]:",
        "if False:",
        tests_of("torch/test_reparametrised.py", "test_weights_untied_later_are_an_error_by_name"),
    ),
    Mutation(
        "computed-weight-accepted",  # 36
        "The weight of a parametrization, which is computed anew at each use, is taken for a parameter.",
        "if not isinstance(weight, nn.Parameter):",
        "if False:",
        tests_of("torch/test_qk_clip.py", "test_a_computed_weight_is_refused"),
    ),
    Mutation(
        "two-attentions-share-a-statistic",
        "Two attentions that fill one MaxLogits are accepted.",
        'raise ValueError(f"{called} and {name} share one MaxLogits; give each attention its own.")',
        "found[name] = projection",
        tests_of("torch/test_qk_clip.py", "test_attentions_that_share_a_statistic_are_refused"),
    ),
    # QK-Clip: the step (torch)
    Mutation(
        "clip-before-the-update",
        "The heads are scaled before the weights are updated.",
        "super()._update()\n        self.qk_clip.after_update(factors)",
        "self.qk_clip.after_update(factors)\n        super()._update()",
        tests_of("torch/test_muonclip.py", "test_a_step_is_muon_and_adamw_and_then_the_clip"),
    ),
    Mutation(
        "measured-after-the-update",
        "What is wrong with the observation is raised when the weights have moved.",
        "factors = self.qk_clip.before_update("
        "idle=is_idle(self), options=lambda: options_in_words(self.param_groups))\n"
        "        self._take_findings(self.qk_clip.attentions)\n        super()._update()",
        "super()._update()\n        factors = self.qk_clip.before_update(idle=is_idle(self))\n"
        "        self._take_findings(self.qk_clip.attentions)",
        tests_of(
            "torch/test_muonclip.py",
            "test_a_missing_observation_is_an_error_before_anything_moves",
            "test_a_non_finite_maximum_is_an_error_before_anything_moves",
        ),
    ),
    Mutation(
        "observation-not-forgotten",  # 37
        "A step leaves its maxima for the next one.",
        "            try:\n                self.reset()\n            except BaseException:  #",
        "            try:\n                pass\n            except BaseException:  #",
        tests_of("torch/test_qk_clip.py", "test_gamma_uses_the_maximum_of_all_forwards_since_the_last_step"),
    ),
    Mutation(
        "loaded-weights-judged-by-old-maxima",
        "After a spike and a rollback the heads are scaled by the maxima of the spike.",
        "if statistic is not None:\n                statistic.reset()",
        "if statistic is not None:\n                pass",
        tests_of("torch/test_loaded_weights.py", "test_after_a_spike_the_last_good_weights_train_on"),
    ),
    Mutation(
        "loads-in-place-missed",
        "A load by torch.distributed.checkpoint into the tensors of a state dict keeps the maxima.",
        "hooks.loaded_in_place(storages)",
        "pass",
        tests_of("torch/test_loaded_weights.py", "test_a_checkpoint_loaded_in_place_is_a_load"),
    ),
    Mutation(
        "any-load-in-place-forgets",
        "A checkpoint that is loaded into another model resets the maxima of this one.",
        "if storages & {_storage(each) for each in module.parameters(recurse=False)}:",
        "if storages:",
        tests_of("torch/test_loaded_weights.py", "test_a_checkpoint_of_another_model_is_none"),
    ),
    Mutation(
        "load-of-the-optimizer-keeps-observations",
        "MuonClip.load_state_dict keeps the maxima of the run before.",
        "super().load_state_dict(state_dict)\n        if self.qk_clip is not None:",
        "super().load_state_dict(state_dict)\n        if False:",
        tests_of("torch/test_loaded_weights.py", "test_the_optimizer_s_load_is_enough[False]"),
    ),
    Mutation(
        "load-of-an-optimizer-with-a-clip-attached-keeps-observations",
        "load_state_dict of the optimizer that a clip is attached to keeps the maxima.",
        "self._clip.reset()  # what",
        "pass  # what",
        tests_of("torch/test_loaded_weights.py", "test_the_optimizer_s_load_is_enough[True]"),
    ),
    Mutation(
        "missing-observation-ignored",  # 11
        "An attention that was not observed counts as quiet.",
        "missing = ~observed & constant(tuple(trains), torch.bool, observed.device)",
        "missing = torch.zeros_like(observed)",
        tests_of("torch/test_qk_clip.py", "test_missing_observation_is_an_error_that_names_the_layer"),
    ),
    Mutation(
        "attention-without-gradient-required",
        "An attention that has no gradient in this step must be observed nevertheless.",
        "missing &= unknown | (self.notes >= FINITE_GRADIENT)",
        "pass",
        tests_of("torch/test_muonclip.py", "test_an_attention_without_gradient_may_be_unobserved"),
    ),
    Mutation(
        "attention-with-a-zero-gradient-required",
        "A layer that was dropped must be observed, where gradients are set to zero and not to None.",
        "torch.where(zero, ZERO_GRADIENT, FINITE_GRADIENT)",
        "torch.where(zero, FINITE_GRADIENT, FINITE_GRADIENT)",
        tests_of("torch/test_layerdrop.py", "test_a_step_need_not_reach_every_attention"),
    ),
    Mutation(
        "unobserved-gradients-accepted",
        "An attention that has a gradient and was not observed counts as quiet.",
        "missing &= unknown | (self.notes >= FINITE_GRADIENT)",
        "missing &= unknown",
        tests_of("torch/test_layerdrop.py", "test_a_gradient_without_an_observation_is_an_error"),
    ),
    Mutation(
        "all-attentions-dropped-is-an-error",
        "A step that runs the model and reaches none of its attentions fails.",
        "self.ran = True",
        "self.ran = False",
        tests_of("torch/test_layerdrop.py", "test_a_step_need_not_reach_every_attention"),
    ),
    Mutation(
        "nothing-observed-is-fine-without-gradients",  # 11
        "Where no query has a gradient, a step without any forward is accepted.",
        "missing &= unknown | (self.notes >= FINITE_GRADIENT)",
        "missing &= self.notes >= FINITE_GRADIENT",
        tests_of(
            "torch/test_muonclip.py",
            "test_a_step_without_any_observation_is_an_error_though_no_query_has_a_gradient",
        ),
    ),
    Mutation(
        "skipped-step-fails-the-next",  # 7
        "A non-finite maximum that is left from a step which the scaler skipped fails the next one.",
        "(self._any_of_each(self.nonfinite > 0) > 0) & is_of_this_step",
        "self._any_of_each(self.nonfinite > 0) > 0",
        tests_of("torch/test_muonclip.py", "test_a_non_finite_maximum_of_a_skipped_step_does_not_fail_the_next"),
    ),
    Mutation(
        "skipped-step-fails-the-next-that-drops-the-layer",
        "A non-finite maximum that is left from a skipped step fails the next one, where that drops the layer.",
        "(self.notes != ZERO_GRADIENT) & (self.notes != FINITE_GRADIENT)",
        "self.notes != FINITE_GRADIENT",
        tests_of("torch/test_layerdrop.py", "test_what_a_skipped_step_left_does_not_fail_one_that_drops_the_layer"),
    ),
    Mutation(
        "rate-zero-clips-nothing",
        "At rate 0 the heads above τ are left as they are.",
        "if idle and not self.attentions.removed and not self._has_work():",
        "if idle:",
        tests_of("torch/test_muonclip.py", "test_at_rate_zero_only_the_clip_acts"),
    ),
    Mutation(
        "one-group-at-rate-zero-is-no-step",
        "One group at rate 0 makes the step an initialising one, which needs no observation.",
        'return all(not isinstance(group["lr"], Tensor) and group["lr"] == 0',
        'return any(not isinstance(group["lr"], Tensor) and group["lr"] == 0',
        tests_of("torch/test_muonclip.py", "test_one_group_at_rate_zero_is_not_an_initialising_step"),
    ),
    Mutation(
        "checkpoint-written-over-a-deferred-error",
        "state_dict() does not raise what the accelerator's step could not.",
        "self.qk_clip.raise_deferred()\n        return super().state_dict()",
        "return super().state_dict()",
        tests_of("torch/test_muonclip.py", "test_a_deferred_error_is_raised_before_a_checkpoint_is_written"),
    ),
    Mutation(
        "deferred-error-overwritten",
        "A clean step erases the error of the one before that has not reached the host.",
        "self._counts.add_(errors != 0)",
        "self._counts.copy_(errors != 0)",
        tests_of("torch/test_qk_clip.py", "test_an_error_that_is_waiting_survives_a_clean_step"),
    ),
    Mutation(
        "deferred-error-raised-again",
        "An error that was raised comes back with a copy that arrives late.",
        "self._taken = counts",
        "pass",
        tests_of(
            "torch/test_qk_clip.py",
            "test_an_error_comes_once_however_late_its_copies_arrive",
            "test_an_accelerator_is_not_waited_for",
        ),
    ),
    Mutation(
        "lowered-tau-leaves-heads-unclipped",
        "τ lowered behind a forward lets through what was certified for the larger one.",
        "Error.TAU_LOWERED: self._any_of_each(self._left_open(tau)) > 0,",
        "Error.TAU_LOWERED: torch.zeros_like(missing),",
        tests_of("torch/test_qk_clip.py", "test_a_lower_tau_after_a_forward_is_an_error_everywhere")
        + tests_of(
            "torch/test_observation.py", "test_tau_lowered_behind_a_forward_is_an_error_and_not_a_head_unclipped"
        ),
    ),
    Mutation(
        "bound-used-as-the-maximum",  # 10
        "The bound of a head that was only certified is reported as its maximum.",
        "seen = torch.where(exact, maxima.maximum, math.nan)",
        "seen = bound",
        tests_of(
            "torch/test_observation.py",
            "test_needed_certifies_quiet_heads_and_clips_as_always_does",
            "test_a_certificate_is_never_used_as_a_maximum",
        ),
    ),
    Mutation(
        "report-without-the-clipped-heads-of-a-step",
        "A step that clips does not count as the last one that did.",
        "last.copy_(torch.where(clipped, taken, last))",
        "pass",
        tests_of(
            "torch/test_observation.py",
            "test_the_report_as_table_dictionary_and_scalars",
            "test_a_step_without_a_look_at_the_report_still_counts",
        ),
    ),
    Mutation(
        "second-copies-kept",  # 37
        "Schedule-free's z, slow weights and masters keep the rows that were scaled, and undo the clip.",
        "weights = copies.of(parameter)",
        "weights = []",
        tests_of("torch/test_second_copies.py", "test_a_known_copy_is_clipped_with_the_weights"),
    ),
    Mutation(
        "masters-in-groups-not-clipped",
        "Masters that an engine has put into the groups keep the rows that were scaled, and undo the clip.",
        "kept += OPTIMIZER_STEPS.in_place_of(parameter)",
        "kept += []",
        tests_of("torch/test_masters_in_groups.py", "test_masters_end_where_the_parameters_alone_do"),
    ),
    Mutation(
        "masters-by-place-alone",
        "Where an engine has left parameters out of a group, what has moved up is scaled in the place of another.",
        "return parameters[self.position] if len(parameters) == self.length else None",
        "return parameters[self.position] if self.position < len(parameters) else None",
        tests_of("torch/test_masters_in_groups.py", "test_groups_whose_parameters_are_fewer_are_not_taken_for_masters"),
    ),
    Mutation(
        "fused-masters-one-matrix",
        "A master of fused q, k, v stays one matrix when the first forward has shown its heads.",
        "known[id(each)] = known[id(weight)]",
        "pass",
        tests_of("torch/test_masters_in_groups.py", "test_masters_end_where_the_parameters_alone_do"),
    ),
    Mutation(
        "state-of-a-master-not-told",
        "The state of a master is not told which of its rows the clip has scaled.",
        "for each in (weight, *OPTIMIZER_STEPS.in_place_of(weight)):",
        "for each in (weight,):",
        tests_of("torch/test_masters_in_groups.py", "test_a_rule_s_state_follows_the_rows_that_are_scaled"),
    ),
    Mutation(
        "masters-of-deepspeed-s-wrapper-not-clipped",
        "Masters in DeepSpeed's wrapper, to which a clip was attached, undo the clip.",
        "pairs += zip(halves, wholes, strict=False)",
        "pass",
        tests_of("engines/test_deepspeed.py", "test_a_clip_that_is_attached_to_deepspeed_s_wrapper_clips_the_masters"),
    ),
    Mutation(
        "slices-of-zero-clipped",
        "Under ZeRO's stages 1 and 2 the clip scales parameters that are overwritten by their flat masters.",
        'if getattr(parameter, "_hp_mapping", None) is not None:',
        "if False:",
        tests_of("engines/test_deepspeed.py", "test_zero_is_refused_before_a_weight_moves[2-with_an_attached_clip]"),
    ),
    Mutation(
        "flat-groups-not-explained",
        "Where ZeRO has put flat tensors into the groups, the error counts groups and names neither it nor a way out.",
        "    check_groups_not_flattened(groups, [len(own) for own in layouts])\n",
        "",
        tests_of("engines/test_deepspeed.py", "test_zero_is_refused_before_a_weight_moves"),
    ),
    Mutation(
        "original-parameters-of-fsdp1-taken",
        "The slices that FSDP1 leaves in the original parameters are updated, or traced, as if they were matrices.",
        'if getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False):',
        'if getattr(parameter, "_is_flat_param", False):',
        tests_of("torch/test_fsdp1.py", "test_flattened_matrices_are_refused_before_a_weight_moves"),
    ),
    Mutation(
        "model-flattened-behind-its-optimizer",
        "A model that FSDP1 has flattened after its optimizer was made is not trained, and nothing is said.",
        "    check_engine(model)\n    named = dict(model.named_parameters())\n",
        "    named = dict(model.named_parameters())\n",
        tests_of("torch/test_fsdp1.py", "test_flattened_matrices_are_refused_before_a_weight_moves"),
    ),
    Mutation(
        "step-traced-by-the-compiler",
        "torch.compile traces what a step decides from the values of this step.",
        "    @_disable_dynamo\n    def _step_uncompiled",
        "    def _step_uncompiled",
        tests_of("torch/test_compiled_step.py"),
    ),
    Mutation(
        "every-z-is-a-weight",  # 37
        "What FTRL calls z is scaled as schedule-free's z is.",
        "return _KNOWN | _SCHEDULE_FREE if averages else _KNOWN",
        "return _KNOWN | _SCHEDULE_FREE",
        tests_of("torch/test_second_copies.py", "test_moments_and_averages_are_not_scaled"),
    ),
    Mutation(
        "views-of-the-weights-scaled-twice",  # 37
        "A state that is the parameter itself is taken for a copy of it: its rows are scaled by the square.",
        "by_address.pop(local_part(parameter).data_ptr(), None)",
        "pass",
        tests_of("torch/test_second_copies.py", "test_moments_and_averages_are_not_scaled"),
    ),
    Mutation(
        "unhooked-steps-attached-to",  # 37
        "The clip is attached to a wrapper whose steps run no hooks, and never acts.",
        'return hasattr(optimizer, "_optimizer_step_pre_hooks") and getattr(type(optimizer).step, "hooked", False)',
        'return hasattr(optimizer, "_optimizer_step_pre_hooks")',
        tests_of("torch/test_second_copies.py", "test_a_known_copy_is_clipped_with_the_weights"),
    ),
    Mutation(
        "explosion-taken-for-a-copy",  # 37
        "Weights that grow back along themselves within a step are said to be written over.",
        "weights.times += _TIMES * (moved & weights.are_kept(self._copies_of))",
        "weights.times += _TIMES * moved",
        tests_of("torch/test_second_copies.py", "test_an_explosion_is_not_taken_for_a_copy"),
    ),
    Mutation(
        "returned-weights-of-an-engine-missed",  # 37
        "What is written over the weights between two steps is taken as it is.",
        "            weights.times += weights.moved_back(now)\n",
        "",
        tests_of("torch/test_second_copies.py", "test_masters_of_which_an_engine_knows_alone_are_noticed"),
    ),
    Mutation(
        "loaded-weights-came-back",  # 37
        "Weights that were loaded are compared with those that the clip left.",
        "        if not self.attentions.are_as_left:\n            self._returned.forget()\n",
        "        if not self.attentions.are_as_left:\n",
        tests_of("torch/test_second_copies.py", "test_weights_that_are_loaded_or_copied_back_once_are_silent"),
    ),
    Mutation(
        "parameters-left-on-meta",  # 22
        "An optimizer made of a model on the meta device keeps the parameters that to_empty replaces, and trains none.",
        "                parameters[position] = filled\n",
        "",
        tests_of("torch/test_observation.py", "test_a_model_on_the_meta_device_is_found_and_filled_later"),
    ),
    Mutation(
        "stepped-on-meta",  # 22
        "A step of parameters on the meta device is taken, and nothing is trained.",
        "if parameter.is_meta and parameter.requires_grad:",
        "if False:",
        tests_of(
            "torch/test_observation.py", "test_parameters_that_stay_on_the_meta_device_are_not_trained_in_silence"
        ),
    ),
    Mutation(
        "searched-on-meta",  # 22
        "A forward on the meta device is searched for attention, and raises where numbers are needed.",
        "waits = bool(parameters) and all(each.is_meta for each in parameters)",
        "waits = False",
        tests_of("torch/test_observation.py", "test_a_model_on_the_meta_device_is_found_and_filled_later"),
    ),
    Mutation(
        "copy-writes-into-buffers-of-a-mesh",
        "A copy has the memory of whole buffers of a mesh: its forwards count tokens for the model.",
        "copies.dense(tensor).clone()",
        "copies.dense(tensor)",
        tests_of(
            "torch/test_fsdp2.py",
            "test_what_a_forward_writes_into_whole_tensors_of_a_mesh_is_not_written_by_the_search",
        ),
    ),
    Mutation(
        "copy-has-the-experts-of-all-ranks",
        "A copy that does not run with all experts is not tried with the rank's own.",
        "if not take_own(model, own=True):",
        "if True:",
        tests_of("engines/test_torchtitan.py", "test_kimi_is_trained_with_its_experts_on_two_ranks"),
    ),
    Mutation(
        "torchtitan-logs-one-stage",
        "TorchTitan's metrics have what the clip saw in the stage of the rank that logs.",
        "if stages is not None and stages.size() > 1:",
        "if False:",
        tests_of("engines/test_torchtitan.py", "test_the_metrics_have_what_the_clip_saw_in_all_stages"),
    ),
    Mutation(
        "copy-in-its-own-dtypes",  # 24
        "The copy of a model under mixed precision has shards in float32 next to whole weights in bf16.",
        "DenseCopies(compute_dtypes(model))",
        "DenseCopies()",
        tests_of("torch/test_fsdp2.py", "test_the_first_forward_is_traced_in_the_dtypes_it_computes_in"),
    ),
    Mutation(
        "parts-of-a-copy-do-not-cast",  # 24
        "The parts of a copy are called with the dtypes of the parts before them.",
        "        cast_as_sharded(model, replica)\n",
        "",
        tests_of("torch/test_fsdp2.py", "test_a_copy_casts_as_the_policies_of_its_parts_say"),
    ),
    Mutation(
        "untraced-for-ever",  # 24
        "A forward that is not traced leaves a plan that waits for the first step, without a warning.",
        'self.to_come, self.unchecked = "", str(error)',
        "self.to_come = str(error)",
        tests_of("torch/test_fsdp2.py", "test_a_forward_that_cannot_be_traced_is_said_once_and_in_the_plan"),
    ),
    Mutation(
        "steps-of-another-s-parameters",  # 24
        "An optimizer made before the model was sharded steps parameters that nothing uses.",
        "                check_is_of_model(self.param_groups, model, self._given[1])\n",
        "                pass\n",
        tests_of("torch/test_fsdp2.py", "test_parameters_that_are_not_the_model_s_any_more_are_an_error"),
    ),
    Mutation(
        "whole-weights-are-others",  # 24
        "Weights that FSDP2 has left whole after a forward count as another model's.",
        "    if lost:  # FSDP2 may",
        "    if False:  # FSDP2 may",
        tests_of(
            "torch/test_fsdp2.py", "test_what_an_engine_has_put_into_the_groups_or_a_forward_has_left_whole_is_no_error"
        ),
    ),
    Mutation(
        "masters-are-others",  # 24
        "Full-precision copies that an engine steps count as another model's parameters.",
        "if id(parameter) not in own and id(parameter) in given and name in named",
        "if id(parameter) not in own and name in named",
        tests_of(
            "torch/test_fsdp2.py", "test_what_an_engine_has_put_into_the_groups_or_a_forward_has_left_whole_is_no_error"
        ),
    ),
    Mutation(
        "ranks-do-not-agree",  # 24
        "Ranks with other rates, and another tau, go on.",
        "    if largest != -smallest:\n",
        "    if False:\n",
        tests_of("torch/test_fsdp2.py", "TestOnTwoRanks::test_ranks_that_disagree_are_told_so"),
    ),
    Mutation(
        "unfilled-not-suspected",  # 24
        "Memory that nobody has filled is taken for an attention that is not understood.",
        "    names = list(_unfilled(model))\n",
        "    names: list[str] = []\n",
        tests_of("torch/test_fsdp2.py", "test_weights_that_were_not_filled_are_suspected_first"),
    ),
    Mutation(
        "two-taus",  # 24
        "A tau next to a QKClip of another one is dropped in silence.",
        "if qk_clip is not None and tau not in (DEFAULT_TAU, qk_clip.tau):",
        "if False:",
        tests_of("torch/test_fsdp2.py", "test_tau_is_said_once"),
    ),
    Mutation(
        "no-hints",  # 24
        "Arguments of AdamW end in Python's bare TypeError.",
        "            if instead:\n",
        "            if False:\n",
        tests_of("torch/test_fsdp2.py", "test_arguments_of_other_optimizers_get_a_hint"),
    ),
    Mutation(
        "stand-ins-stay-whole",  # 22
        "The copy of a sharded model keeps every part whole that has run.",
        "        if not self._held:\n            self.parameter.data = self._thin\n",
        "",
        tests_of("torch/test_sharded_clip.py", "test_a_sharded_model_is_copied_and_tried_block_by_block"),
    ),
    Mutation(
        "stand-ins-not-scaled",  # 22
        "A part of the copy that is written out anew has the rows that the proof scaled as they were.",
        "            for change in self._changes:\n                change()\n",
        "",
        tests_of("torch/test_sharded_clip.py", "test_a_sharded_model_is_copied_and_tried_block_by_block"),
    ),
    Mutation(
        "attention-of-all-layers-kept",  # 22
        "The proof holds the probabilities of every layer until its end.",
        "or value.shape[-2] <= MOST_POSITIONS or",
        "or True or",
        tests_of(
            "torch/test_proof_memory.py", "test_a_run_keeps_a_few_positions_of_every_attention_and_only_for_later_ones"
        ),
    ),
    Mutation(
        "results-kept-by-every-run",  # 22
        "Runs that nobody replays hold what attention returned.",
        "        if not self._keeps_results:\n            seen.result = None\n",
        "",
        tests_of(
            "torch/test_proof_memory.py", "test_a_run_keeps_a_few_positions_of_every_attention_and_only_for_later_ones"
        ),
    ),
    Mutation(
        "proof-waits-for-the-collector",  # 22
        "What a proof has kept is freed when the garbage collector comes by.",
        "        self.base = Recording()\n",
        "        pass\n",
        tests_of("torch/test_proof_memory.py", "test_nothing_of_a_proof_waits_for_the_garbage_collector"),
    ),
    Mutation(
        "strides-of-a-kernel-lost",  # 22
        "What attention returns in an experiment has other strides than the kernel's, and a view of it raises.",
        "if positions.stride() == self.strides:",
        "if True:",
        tests_of("torch/test_proof_memory.py", "test_what_is_proven_of_long_sequences_is_what_holds"),
    ),
    # The statistic (torch)
    Mutation(
        "micro-batches-summed",  # 5
        "The maxima of micro-batches are added up.",
        "own.copy_(torch.maximum(own, value))",
        "own.copy_(torch.where(own > -math.inf, own + value, value))",
        tests_of("torch/test_max_logits.py", "test_micro_batches_take_the_maximum_not_the_sum_and_not_the_last"),
    ),
    Mutation(
        "last-micro-batch-kept",  # 5
        "Each forward overwrites the maximum of the one before.",
        "torch.maximum(maximum, seen, out=maximum)",
        "maximum.copy_(seen)",
        tests_of("torch/test_max_logits.py", "test_micro_batches_take_the_maximum_not_the_sum_and_not_the_last")
        + tests_of("torch/test_exact_maxima.py", "test_forwards_accumulate"),
    ),
    Mutation(
        "evaluation-observed",  # 7
        "Forwards without gradients feed the statistic.",
        "if max_logits is not None and torch.is_grad_enabled() and not q.is_meta:",
        "if max_logits is not None and not q.is_meta:",
        tests_of("torch/test_max_logits.py", "test_evaluation_is_not_observed"),
    ),
    Mutation(
        "evaluation-observed-in-a-found-attention",  # 7
        "Forwards without gradients of an attention that was found feed its statistic.",
        "run = ObserverRun(observer, observes=trains and reason is None)",
        "run = ObserverRun(observer, observes=reason is None)",
        tests_of("torch/test_observation.py", "test_the_maximum_of_all_forwards_with_gradients_and_of_no_other"),
    ),
    Mutation(
        "logits-divided-by-d",  # 12
        "The default scale of `attention` is 1/d.",
        "_check_shapes(q, k, v, max_logits)\n    scale = 1 / math.sqrt(q.shape[-1])",
        "_check_shapes(q, k, v, max_logits)\n    scale = 1 / q.shape[-1]",
        tests_of("torch/test_max_logits.py", "test_every_kind_of_attention_is_measured"),
    ),
    Mutation(
        "found-logits-divided-by-d",  # 12
        "The default scale of an attention that was found is taken to be 1/d.",
        "return 1 / math.sqrt(self.q.shape[-1]) if self.scale is None",
        "return 1 / self.q.shape[-1] if self.scale is None",
        tests_of("torch/test_observation.py", "test_a_function_imported_by_name_is_observed_and_given_back"),
    ),
    Mutation(
        "interface-scaling-ignored",  # 12
        "The scaling that the attention interface of Hugging Face is given is not looked at.",
        "scale = query.shape[-1] ** -0.5 if scaling is None else scaling",
        "scale = 1.0",
        tests_of("torch/test_observation.py", "test_every_implementation_of_the_interface_gives_the_same"),
    ),
    Mutation(
        "maximum-before-the-mask",  # 12
        "The tiles take the maximum over forbidden pairs, too.",
        "scores = scores.masked_fill_(~allowed, -math.inf)\n            maxima",
        "pass\n            maxima",
        tests_of("torch/test_max_logits.py", "test_is_the_exact_masked_maximum_whatever_the_tiles"),
    ),
    Mutation(
        "best-rows-before-the-mask",  # 12
        "The rows of the largest bounds are computed without their mask.",
        "allowed = self.mask.allowed_to_rows(rows)",
        "allowed = None",
        tests_of("torch/test_exact_maxima.py", "test_what_matters_is_exact_and_the_rest_is_bounded"),
    ),
    Mutation(
        "few-rows-before-the-mask",  # 12
        "The few rows that are still open are computed without their mask.",
        "allowed = self.mask.allowed_to(b, head, rows)",
        "allowed = None",
        tests_of("torch/test_exact_maxima.py", "test_what_matters_is_exact_and_the_rest_is_bounded"),
    ),
    Mutation(
        "absolute-logits",
        "The tiles take the maximum of |S|.",
        "(queries @ k[:, :, columns].mT).view(batch, count, length, -1)",
        "(queries @ k[:, :, columns].mT).view(batch, count, length, -1).abs()",
        tests_of("torch/test_max_logits.py", "test_is_the_exact_masked_maximum_whatever_the_tiles"),
    ),
    Mutation(
        "statistic-under-autocast",
        "The products of the statistic run in bf16 under autocast.",
        'with torch.autocast("cpu", enabled=False):',
        'with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu")):',
        tests_of("torch/test_max_logits.py", "test_autocast_does_not_reach_the_statistic"),
    ),
    Mutation(
        "keys-of-the-wrong-group",  # 3
        "A query head is bounded by the norms of another group's keys.",
        "norm_k.repeat_interleave(q.shape[1] // k.shape[1], 1)",
        "norm_k.repeat(1, q.shape[1] // k.shape[1], 1)",
        tests_of("torch/test_exact_maxima.py", "test_what_matters_is_exact_and_the_rest_is_bounded"),
    ),
    Mutation(
        "certificate-without-a-sign",  # 10
        "The norm bound is negative for a negative scale.",
        "(abs(scale) * (1 + 1e-5))",
        "(scale * (1 + 1e-5))",
        tests_of("torch/test_exact_maxima.py", "test_what_matters_is_exact_and_the_rest_is_bounded"),
    ),
    Mutation(
        "certificate-without-a-margin",  # 10
        "The log-sum-exp of a kernel is believed to its last bit.",
        "return lse + (1e-3 if q.dtype in (torch.bfloat16, torch.float16) else 1e-4) * (1 + lse.abs())",
        "return lse",
        tests_of("torch/test_exact_maxima.py", "test_a_log_sum_exp_below_its_maximum_does_not_certify"),
    ),
    Mutation(
        "nan-certified-by-the-lse",
        "A row of NaN, to which a kernel gives the log-sum-exp 0, is certified.",
        "return torch.full_like(lse, math.nan, dtype=dtype)",
        "pass",
        tests_of("torch/test_exact_maxima.py", "test_a_non_finite_logit_is_seen_whatever_the_bounds_say"),
    ),
    Mutation(
        "statistic-not-in-place",  # 14
        "A reset puts another tensor in the place of the one that a CUDA graph writes to.",
        "self.packed.zero_()\n",
        "self.packed = torch.zeros_like(self.packed)\n",
        tests_of("torch/test_max_logits.py", "test_is_written_in_place_and_is_no_buffer"),
    ),
    Mutation(
        "nonfinite-hides-the-maximum",
        "A NaN takes the place of the maximum of its head for good.",
        "bad = maxima.isnan() | (maxima == math.inf)\n        maxima = maxima.masked_fill(bad, -math.inf)",
        "bad = maxima.isnan() | (maxima == math.inf)",
        tests_of("torch/test_max_logits.py", "test_a_non_finite_logit_is_kept_apart_from_the_maximum"),
    ),
    # Masks (torch)
    Mutation(
        "lowest-number-of-a-mask-allows",  # 27
        "Only −inf masks; finfo.min, −1e9 and −1e4 do not.",
        "return part if self.highest_masked is None else ~(part <= self.highest_masked)",
        "return part if self.highest_masked is None else part > -torch.inf",
        tests_of("torch/test_max_logits.py", "test_the_lowest_number_of_a_float_mask_masks")
        + tests_of("torch/test_observation_edges.py", "test_what_is_as_good_as_minus_infinity_masks"),
    ),
    Mutation(
        "score-mod-fills-allow",
        "A pair whose score a score_mod replaces counts with its product.",
        "return replace(one, filled=~condition if one.filled is None else ~condition | one.filled)",
        "return one",
        tests_of("torch/test_score_mod.py", "test_the_statistic_is_of_what_the_softmax_sees_of_the_score"),
    ),
    Mutation(
        "score-mod-biases-forbid",
        "What a score_mod adds forbids pairs by its size alone, as ALiBi's far away.",
        "filled = filled | (each <= highest)",
        "filled = filled | (each <= -9984.0)",
        tests_of("torch/test_score_mod.py", "test_the_statistic_is_of_what_the_softmax_sees_of_the_score"),
    ),
    Mutation(
        "score-mod-factors-of-keys",
        "A score_mod's factor of each key multiplies the queries.",
        "elif self._slope.shape[3] == 1:",
        "elif self._slope.shape[3] >= 1:",
        tests_of("torch/test_score_mod.py", "test_the_statistic_is_of_what_the_softmax_sees_of_the_score"),
    ),
    Mutation(
        "score-mod-with-other-queries-and-keys",
        "A product of other queries and keys in a score_mod is a bias, whatever it grows to.",
        "kind = self._kind = reader.reading(result).with_problem(reader.problem)",
        "kind = self._kind = reader.reading(result)",
        tests_of("torch/test_score_mod.py", "test_what_is_not_known_to_be_proportional_is_refused"),
    ),
    Mutation(
        "score-mod-read-once",
        "What a score_mod masks and scales is what it did in the first forward.",
        "_slopes(self, *of_axes: Tensor) -> Tensor:",
        "_slopes(self, *of_axes: Tensor, known: dict[str, Tensor] = {}) -> Tensor:  # noqa: B006\n"
        '        return known.setdefault("", once(at_pairs(self._read, *indices(*of_axes))[0]))',
        tests_of("torch/test_score_mod.py", "test_heads_are_clipped_by_what_a_forward_reads_anew"),
    ),
    Mutation(
        "condition-of-other-heads",
        "A condition on pairs is that of the first heads, whichever are still open.",
        "None if self.condition is None else self.condition.of_heads(heads)",
        "self.condition",
        tests_of("torch/test_score_mod.py", "test_long_sequences_are_read_in_tiles"),
    ),
    Mutation(
        "rearranged-scores-are-rescaled",
        "A factor of a tensor in which it is not known where each pair is, such as Mamba's states, meets its queries.",
        "if self.problem:\n            return self\n        blocks = []",
        "blocks = []",
        tests_of(
            "torch/test_model_zoo.py", "test_every_head_ends_at_the_smaller_of_its_maximum_and_tau[BambaForCausalLM]"
        ),
    ),
    Mutation(
        "windows-judged-by-their-range",
        "A tensor in which no value is as low as −1e4 is no sum of a mask and a bias either.",
        "return lowest > MASKED and not _has_sequences(shape)",
        "return lowest > MASKED",
        tests_of("core/test_attention_mask.py", "test_the_whole_tensor_says_which_of_its_values_forbid"),
    ),
    Mutation(
        "names-bound-in-files-of-functions",
        "A kernel that the file of a function has bound by name is not observed there.",
        "waiting |= {each.__module__ for each in functions if not _is_library(each)} - files.keys()",
        "del functions",
        tests_of(
            "torch/test_attention_kernels.py", "test_a_name_in_the_file_of_a_base_class_or_of_its_functions_is_patched"
        ),
    ),
    Mutation(
        "kernels-imported-late",
        "A kernel whose package is imported after the clip was made is not patched.",
        "        self._then(module.__name__)\n",
        "",
        tests_of("torch/test_attention_kernels.py", "test_a_kernel_imported_while_the_model_runs_is_observed"),
    ),
    Mutation(
        "compiler-imported-with-the-library",
        "Marking a function for torch's compiler imports it, with triton, when the library is imported.",
        "_flash_is_allowed._dynamo_marked_constant = True  #",
        "torch.compiler.assume_constant_result(_flash_is_allowed)  #",
        tests_of("torch/test_imports.py", "test_what_is_not_used_is_not_imported"),
    ),
    Mutation(
        "flex-attention-by-another-way",
        "FlexAttention that is called by a reference that no patch reaches is missed.",
        "{host_sdpa: SDPA, flex_attention: FLEX}",
        "{host_sdpa: SDPA}",
        tests_of("torch/test_attention_kernels.py", "test_a_kernel_that_no_patch_reaches_is_refused_by_name"),
    ),
    Mutation(
        "lowest-number-added-to-scores-allows",  # 27
        "Where attention is written out, only −inf masks.",
        "is_masked(added.detach() if alpha == 1",
        "torch.isneginf(added.detach() if alpha == 1",
        tests_of("torch/test_observation_edges.py", "test_what_is_as_good_as_minus_infinity_masks"),
    ),
    Mutation(
        "number-filled-into-scores-allows",  # 27
        "Where attention is written out, what is filled in for a forbidden pair counts as its logit.",
        "forbids = replaces(value.detach() if isinstance(value, Tensor) else value)\n    return",
        "forbids = False\n    return",
        tests_of("torch/test_observation_edges.py", "test_pairs_are_forbidden_by_what_is_filled_in_or_added"),
    ),
    Mutation(
        "minus-1e4-in-bf16-allows",  # 27
        "−1e4 as bfloat16 stores it is no mask.",
        "MASKED = -9984.0",
        "MASKED = -10048.0",
        tests_of("torch/test_exact_maxima.py", "test_whatever_forbids_a_pair_does_so_for_every_source"),
    ),
    Mutation(
        "number-alone-forbids",
        "ALiBi's far pairs are masked at 30000 positions.",
        "are_two_groups & (neg_lowest >= -MASKED)",
        "(neg_lowest >= -MASKED)",
        tests_of("core/test_attention_mask.py", "test_the_whole_tensor_says_which_of_its_values_forbid")
        + tests_of("torch/test_exact_maxima.py", "test_the_far_pairs_of_alibi_count_at_30000_positions")
        + tests_of("optax/test_max_logits.py", "test_the_far_pairs_of_alibi_count_at_30000_positions"),
    ),
    Mutation(
        "two-values-are-a-bias",
        "−100 and −1000 forbid nothing.",
        "return xp.where(is_mask, highest_far, number)",
        "return number",
        tests_of("core/test_attention_mask.py", "test_the_whole_tensor_says_which_of_its_values_forbid"),
    ),
    Mutation(
        "two-values-are-a-bias-on-the-host",
        "A mask of two values is not known at a look.",
        "        return lowest\n    return MASKED if",
        "        return MASKED\n    return MASKED if",
        tests_of("torch/test_exact_maxima.py", "test_the_whole_mask_says_which_of_its_values_forbid")
        + tests_of("torch/test_observation_edges.py", "test_the_whole_of_what_is_added_says_which_values_forbid"),
    ),
    Mutation(
        "any-lowest-value-is-a-mask",
        "The lowest of many values forbids, where the highest is 0.",
        "(neg_lowest >= -TWO_VALUED) & (highest_far == -neg_lowest)",
        "(neg_lowest >= -TWO_VALUED)",
        tests_of("core/test_attention_mask.py", "test_the_whole_tensor_says_which_of_its_values_forbid"),
    ),
    Mutation(
        "windows-see-each-other",
        "Swin's −100, added to a bias, forbids nothing.",
        "number = xp.where(is_sum, highest_masked, number)",
        "pass",
        tests_of("core/test_attention_mask.py", "test_the_whole_tensor_says_which_of_its_values_forbid")
        + tests_of("torch/test_observation_edges.py", "test_the_windows_of_swin_do_not_see_each_other"),
    ),
    Mutation(
        "mask-of-some-heads-judged-by-them",
        "What forbids in a mask is said again by the heads that are still open.",
        "mask = self._allows(mask[:, heads])",
        "mask = mask[:, heads]",
        tests_of("torch/test_exact_maxima.py", "test_what_forbids_is_said_by_all_heads"),
    ),
    Mutation(
        "mask-read-by-the-host",
        "The host waits for a device to read a mask.",
        'elif added.device.type == "cpu" and has_values:',
        "else:",
        tests_of("core/test_attention_mask.py", "test_a_device_is_not_waited_for"),
    ),
    Mutation(
        "highest-of-the-last-sequence",
        "The kernel that reads a mask compares sequences with the last of them.",
        "highest = tl.where(x > highest, x, highest)",
        "highest = x",
        tests_of("torch/test_mask_levels.py", "test_the_kernel_says_what_the_definition_does"),
    ),
    Mutation(
        "small-value-filled-in-allows",
        "A value that takes the place of a logit forbids only where it is low.",
        "return value <= 0",
        "return value <= MASKED",
        tests_of("torch/test_observation_edges.py", "test_pairs_are_forbidden_by_what_is_filled_in_or_added"),
    ),
    Mutation(
        "cap-filled-in-forbids",
        "A cap that is filled in for loud logits hides them.",
        "return value <= 0",
        "return value < math.inf",
        tests_of("torch/test_observation_edges.py", "test_an_exploded_logit_is_not_taken_for_a_mask"),
    ),
    Mutation(
        "future-seen-in-tiles-on-the-diagonal",
        "The tiles on the diagonal are not masked.",
        "is_right_open=columns.stop - 1 <= last",
        "is_right_open=columns.start <= last",
        tests_of("torch/test_max_logits.py", "test_is_the_exact_masked_maximum_whatever_the_tiles"),
    ),
    Mutation(
        "window-begins-too-late",
        "The tiles leave out the first key of a window.",
        "start = max(start, rows.start + self.query_offset - left)",
        "start = max(start, rows.start + self.query_offset - left + 1)",
        tests_of("torch/test_max_logits.py", "test_is_the_exact_masked_maximum_whatever_the_tiles"),
    ),
    Mutation(
        "documents-see-each-other-in-the-best-rows",
        "The rows of the largest bounds see the keys of other documents.",
        "conditions.append(own[..., None] == self._documents_of_keys()[:, None, :])",
        "conditions.append(own[..., None] >= self._documents_of_keys()[:, None, :])",
        tests_of("torch/test_exact_maxima.py", "test_what_matters_is_exact_and_the_rest_is_bounded"),
    ),
    Mutation(
        "lowest-number-of-a-mask-allows-in-the-kernel",  # 27
        "The kernel for CUDA takes finfo.min in a float mask for a bias.",
        "~(values.to(forbids.dtype) <= forbids)",
        '~(values == float("-inf"))',
        tests_of("torch/test_head_maxima.py", "test_whatever_forbids_a_pair_does_so"),
    ),
    Mutation(
        "nan-lost-in-the-kernel",
        "The kernel's own maximum drops NaN.",
        'return tl.where(tl.max(is_nan.to(tl.int32)) > 0, float("nan"), maximum)',
        "return maximum",
        tests_of("torch/test_head_maxima.py", "test_non_finite_logits_are_kept"),
    ),
    Mutation(
        "keys-of-the-wrong-group-in-the-kernel",  # 3
        "The kernel reads the key head by the number of the query head.",
        "keys = k + b * k_batch + h // queries_per_key * k_head",
        "keys = k + b * k_batch + h % queries_per_key * k_head",
        tests_of("torch/test_head_maxima.py", "test_is_exact_under_every_mask"),
    ),
    Mutation(
        "packed-documents-see-each-other",  # 42
        "Sequences packed by their positions count as one document.",
        '{"document_ids": (positions == 0).cumsum(-1)}',
        '{"document_ids": torch.zeros_like(positions)}',
        tests_of("torch/test_observation.py", "test_what_flash_attention_is_told_is_understood"),
    ),
    Mutation(
        "ends-of-documents-off-by-one",  # 42
        "The first token of a packed sequence counts as the last of the one before.",
        "device=starts.device), right=True)",
        "device=starts.device), right=False)",
        tests_of("torch/test_observation.py", "test_what_flash_attention_is_told_is_understood"),
    ),
    Mutation(
        "causality-aligned-at-the-first-position",
        "A function of flash-attn with more keys than queries counts as aligned at the first position.",
        'pairs["query_offset"] = k.shape[-3] - q.shape[-3]',
        'pairs["query_offset"] = 0',
        tests_of("torch/test_flash_attn.py", "test_loud_heads_end_at_tau_and_others_stay"),
    ),
    Mutation(
        "packed-causality-aligned-at-the-first-position",
        "In packed sequences, too.",
        "of_sequences = shifts[1:] if bottom_right else shifts[:-1]",
        "of_sequences = shifts[:-1]",
        tests_of("torch/test_flash_attn.py", "test_packed_sequences_do_not_see_each_other"),
    ),
    Mutation(
        "rest-of-a-packed-row-counts",
        "What is behind the last packed sequence sees itself.",
        "keys.masked_fill(keys == sequences, -1)[None]",
        "keys[None]",
        tests_of("torch/test_flash_attn.py", "test_nobody_sees_what_is_behind_the_last_sequence"),
    ),
    Mutation(
        "cached-keys-of-an-interface-lost",
        "In the attention interface of Hugging Face, too.",
        '"query_offset": key.shape[-2] - query.shape[-2],',
        '"query_offset": 0,',
        tests_of("torch/test_observation.py", "test_flash_attention_aligns_at_the_last_position"),
    ),
    Mutation(
        "kernel-held-by-its-class-missed",
        "Who has imported the autograd function of a kernel calls it unobserved.",
        'patches = (".apply", _patch_apply), ("", _patch_function)',
        'patches = (("", _patch_function),)',
        tests_of("torch/test_flash_attn.py", "test_who_holds_the_autograd_function_is_observed_too"),
    ),
    Mutation(
        "kernel-under-the-compiler-missed",
        "torch.compile calls the autograd function of a kernel past the patch.",
        'patches = (".apply", _patch_apply), ("", _patch_function)',
        'patches = ((".apply", _patch_apply),)',
        tests_of("torch/test_flash_attn.py", "test_under_the_compiler_the_functions_are_observed_too"),
    ),
    Mutation(
        "log-sum-exp-of-capped-logits-bounds",
        "The log-sum-exp of logits with a soft cap or a bias is taken for that of S.",
        'return not arguments.get("softcap") and arguments.get("alibi_slopes") is None and',
        "return",
        tests_of("torch/test_flash_attn.py", "test_a_soft_cap_or_a_bias_keeps_the_log_sum_exp_from_being_a_bound"),
    ),
    Mutation(
        "unknown-argument-of-a-kernel-ignored",
        "An argument of a kernel that is not understood is not seen.",
        "if is_given and name not in _READ and name not in _OF_NO_LOGIT:",
        "if False:",
        tests_of("torch/test_flash_attn.py", "test_an_argument_that_is_not_understood_is_named"),
    ),
    Mutation(
        "problem-of-a-later-call-ignored",
        "A call that is not understood is observed as if it were, if it first comes after the first step.",
        "if call.problem and not call.kernel.written_out:",
        "if False:",
        tests_of("torch/test_flash_attn.py", "test_an_argument_that_is_not_understood_is_named"),
    ),
    Mutation(
        "blocks-of-xformers-aligned-at-the-last-position",
        "Causal blocks of xFormers, which are aligned at the first position, count as flash-attn's.",
        "packed_pairs(of_queries, of_keys, lengths, bottom_right=kind.bottom_right)",
        "packed_pairs(of_queries, of_keys, lengths)",
        tests_of("torch/test_xformers.py", "test_loud_heads_end_at_tau_and_others_stay"),
    ),
    Mutation(
        "window-of-xformers-one-key-wider",
        "The window of xFormers counts keys, the query's own included.",
        'pairs["window"] = (getattr(bias, kind.windows[0]) - 1, None)',
        'pairs["window"] = (getattr(bias, kind.windows[0]), None)',
        tests_of("torch/test_xformers.py", "test_loud_heads_end_at_tau_and_others_stay"),
    ),
    Mutation(
        "heads-among-sequences-read-as-one-head",
        "The heads of xFormers' queries [B · heads, T, d] count as sequences of one head.",
        "has_one_head = query.shape[-2] == query.shape[2] == 1",
        "has_one_head = False",
        tests_of("torch/test_xformers.py", "test_heads_may_be_among_the_sequences_or_in_groups"),
    ),
    Mutation(
        "log-sum-exp-with-a-bias-bounds",
        "The log-sum-exp of logits with a bias is taken for that of S, in xFormers.",
        'run_with_lse=None if pairs.get("attn_mask") is not None else',
        "run_with_lse=",
        tests_of("torch/test_xformers.py", "test_a_bias_keeps_the_log_sum_exp_from_being_a_bound"),
    ),
    Mutation(
        "causality-of-transformer-engine-aligned-at-the-last-position",
        "TransformerEngine aligns causality at the first position, unless its mask says otherwise.",
        'pairs | {"query_offset": lengths[1] - lengths[0] if bottom_right else 0}',
        'pairs | {"query_offset": lengths[1] - lengths[0]}',
        tests_of("torch/test_transformer_engine.py", "test_loud_heads_end_at_tau_and_others_stay"),
    ),
    Mutation(
        "gaps-between-sequences-count",
        "What is between two packed sequences of TransformerEngine is seen.",
        "ids.append((inside, owner.masked_fill(~is_used, -1 - side)))",
        "ids.append((inside, owner))",
        tests_of("torch/test_transformer_engine.py", "test_loud_heads_end_at_tau_and_others_stay"),
    ),
    Mutation(
        "maxima-of-transformer-engine-with-a-bias",
        "The maxima that TransformerEngine returns have the bias in them.",
        'if getattr(module, "return_max_logit", False) and not has_bias and not problem',
        'if getattr(module, "return_max_logit", False) and not problem',
        tests_of("torch/test_transformer_engine.py", "test_its_own_maxima_are_not_taken_with_a_bias"),
    ),
    Mutation(
        "row-bounds-not-used-in-the-kernel",
        "The kernel for CUDA computes what a log-sum-exp certifies.",
        "row_bounds = torch.minimum(row_bounds, bounds)",
        "pass",
        tests_of("torch/test_head_maxima.py", "test_a_row_block_is_left_out_where_its_log_sum_exp_certifies_it"),
    ),
    Mutation(
        "overload-of-a-patched-operator-lost",
        "Policies of checkpointing do not find an operator that is observed.",
        '_OF_OPERATORS = ("default", "op", "op_overloads", "overloads", "_qualified_op_name", "_schemas")',
        "_OF_OPERATORS = ()",
        tests_of("torch/test_varlen_attn.py", "test_the_operator_keeps_what_others_know_it_by"),
    ),
    Mutation(
        "mask-for-each-window-lost",
        "The heads of [B, windows, heads, t, d] are matched with masks in the wrong order.",
        "mask = mask.expand(*in_front, *lengths).reshape(-1, heads, *lengths)",
        "mask = mask.expand(*in_front, *lengths).reshape(heads, -1, *lengths).transpose(0, 1)",
        tests_of("torch/test_observation_edges.py", "test_windows_with_masks_of_their_own"),
    ),
    # Finding attention (torch)
    Mutation(
        "qk-norm-not-recognised",  # 9
        "Queries that are normalised behind their projection are not seen to be.",
        "gains=gains, normalised=True)",
        "gains=gains, normalised=False)",
        tests_of("torch/test_attention_search.py", "test_qk_norm_is_recognised_and_left_alone"),
    ),
    Mutation(
        "declared-projection-behind-a-norm-accepted",  # 9
        "A declaration of rows behind a QK-norm is trained with, and the weights shrink for ever.",
        "if call.query.normalised and not _are_gains(projection, call, paths):",
        "if False:",
        tests_of("torch/test_attention_search.py", "test_a_declared_projection_behind_a_norm_is_caught"),
    ),
    Mutation(
        "wrong-declaration-accepted",
        "Declared rows are not compared with those that were seen.",
        "if wrong is not None:",
        "if False:",
        tests_of("torch/test_attention_search.py", "test_a_wrong_declaration_is_caught_before_it_is_trained_with"),
    ),
    Mutation(
        "weight-not-proportional-accepted",  # 25
        "A weight that is computed from its parameter, but not in proportion, is clipped by it.",
        "self.is_proportional &= bool(sets)",
        "pass",
        tests_of("torch/test_observation_edges.py", "test_a_weight_that_is_not_is_refused"),
    ),
    Mutation(
        "adapter-left-out",  # 26
        "What contributes less than most to the query (an adapter, a bias) is not scaled with it.",
        "for rows in found.of(each) if rows.masks.any()",
        "for rows in found.of(each[:1]) if rows.masks.any()",
        tests_of("torch/test_attention_search.py", "test_lora_scales_base_and_adapter_together"),
    ),
    Mutation(
        "small-share-left-out",
        "What adds so little that the sum is right without it, a zero adapter after one step, is not scaled.",
        "for dropped in _subsets(with_share):",
        "for dropped in reversed(list(_subsets(with_share))):",
        tests_of("torch/test_rows_by_structure.py"),
    ),
    Mutation(
        "share-that-cancels-taken-for-a-norm",
        "A share that is zero by chance, in a narrow dtype, is taken for that of something behind a norm.",
        "if not doubtful or len(doubtful) == len(products):",
        "if True:",
        tests_of("torch/test_rows_by_structure.py", "test_a_small_contribution_is_seen_in_bfloat16_whatever_the_seed"),
    ),
    Mutation(
        "nothing-seen-through-a-zero-gate",
        "A matrix of zeros is traced as it is, and what is behind it has no path.",
        "return values if values.any() else 0.02 * torch.randn_like(values)",
        "return values",
        tests_of(
            "torch/test_rows_by_structure.py", "test_what_is_behind_a_gate_that_is_still_zero_belongs_to_the_rows"
        ),
    ),
    Mutation(
        "row-of-two-heads-taken-for-one",
        "Gradients in which two colours are mixed are read as one.",
        "is_one = (mantissas == mantissas[0]).all(0) & (digits",
        "is_one = (digits",
        tests_of("torch/test_attention_search.py", "test_every_layout_is_found_and_clipped_exactly"),
    ),
    Mutation(
        "frozen-projection-before-its-trained-factor",
        "Of two sets of rows the first is scaled, though it is frozen and the other is not.",
        "candidates.sort(key=lambda rows: (_is_shared(rows), not _is_trained(rows)))",
        "candidates.sort(key=_is_shared)",
        tests_of("torch/test_rows_by_structure.py", "test_a_trained_factor_of_a_frozen_projection_is_what_is_scaled"),
    ),
    Mutation(
        "projections-of-a-core-cut-off",
        "Whatever enters a module with several matrices is taken for the stream.",
        "if not made_in or not made_in <= around.products_of:",
        "if True:",
        tests_of(
            "torch/test_rows_by_structure.py", "test_a_core_that_has_matrices_and_receives_queries_is_transparent"
        ),
    ),
    Mutation(
        "stream-not-cut-off",
        "The graph of the stream goes through all blocks and grows with the depth.",
        "if not made_in or not made_in <= around.products_of:",
        "if not made_in:",
        tests_of("torch/test_rows_by_structure.py", "test_the_graph_does_not_grow_with_depth"),
    ),
    Mutation(
        "stream-of-one-product-taken-for-keys",
        "What enters a block and is projected there is also taken for keys that a core receives.",
        "product.projected_in.add(block.run)",
        "pass",
        tests_of("torch/test_rows_by_structure.py", "test_the_stream_is_no_projection_of_keys"),
    ),
    Mutation(
        "rows-of-a-view-counted-along-one-axis",
        "The rows of w[1] of a stacked weight are taken for those of w[0].",
        "rows += place * math.prod(dims[later][0] for later in axes if later > each)",
        "rows += place * (each == axes[-1])",
        tests_of("torch/test_rows_by_structure.py", "test_weights_stacked_on_axes_of_their_own"),
    ),
    Mutation(
        "rows-of-heads-counted-along-one-axis",
        "A row of a weight with several axes of rows is scaled by the factor of another.",
        "row = row[..., None] * size + torch.cat(",
        "row = row[..., None] + torch.cat(",
        tests_of("torch/test_rows_by_structure.py", "test_weights_stacked_on_axes_of_their_own"),
    ),
    Mutation(
        "stacked-weight-divided-by-heads",
        "A weight [3, heads, width, in] is 3 · heads matrices without per_head.",
        "return MatrixLayout(batch, transposed, heads=equal, out_ndim=out_ndim)",
        "return MatrixLayout(weight.ndim - 2)",
        tests_of("torch/test_rows_by_structure.py", "test_the_matrices_of_a_stacked_weight"),
    ),
    Mutation(
        "fused-convolution-taken-for-one-matrix",
        "A convolution that makes queries, keys and values is one matrix.",
        "is_convolution = isinstance(first.module, _ConvNd) and first.module.groups == 1",
        "is_convolution = False",
        tests_of("torch/test_rows_by_structure.py", "test_a_fused_convolution_is_several_matrices"),
    ),
    Mutation(
        "linearity-not-asked-for",  # 25
        "Any function of a projection counts as proportional to it.",
        "if abs(sum(values[i] for i in chosen) - total) > own + sum(noise[i] for i in chosen):",
        "if False:",
        tests_of(
            "torch/test_attention_search.py", "test_what_is_not_understood_is_refused_with_the_declaration_to_write"
        ),
    ),
    Mutation(
        "sum-of-two-products-read-as-one",  # 35
        "The logits of q·k + q·v are read from one of the products.",
        'return summed(score, other) or score.with_problem("are a sum of two products")',
        "return score",
        tests_of("torch/test_terms_of_logits.py", "test_all_terms_of_the_logits_are_held_at_tau"),
    ),
    Mutation(
        "sink-in-front-shifts-the-mask",
        "A sink in front of the scores shifts their mask by a key.",
        "return tensor[..., block.start : block.start + block.k.shape[-2]]",
        "return tensor[..., 0 : block.k.shape[-2]]",
        tests_of("torch/test_written_out_attention.py", "test_a_sink_in_front_of_the_keys"),
    ),
    Mutation(
        "mask-in-a-view-unseen",
        "A mask that is filled into a part of the scores in place does not reach the whole.",
        "tracked.score = _carried(target, before, now, other, tracked.score)",
        "pass",
        tests_of("torch/test_written_out_attention.py", "test_masks_written_in_place"),
    ),
    Mutation(
        "one-softmax-ends-all-scores",
        "The first softmax of a module ends the other scores, as of differential attention.",
        "self.on_attention(score.call(tensor, dimension, kernel))",
        "self.on_attention(score.call(tensor, dimension, kernel)), self._scores.clear()",
        tests_of("torch/test_written_out_attention.py", "test_each_softmax_has_heads_of_its_own"),
    ),
    Mutation(
        "windows-taken-for-heads",
        "Of queries [B, heads, windows, T, d] the windows are taken for heads.",
        "call = call.with_heads_from(self.observer.head_axis)",
        "pass",
        tests_of("torch/test_head_axis.py"),
    ),
    Mutation(
        "four-axes-read-as-five",
        "A call with four axes, beside one with windows, has its heads where those of the other are.",
        "if axis == -3 or self.q.ndim < 5:",
        "if axis == -3 or self.q.ndim < -axis:",
        tests_of("torch/test_head_axis.py"),
    ),
    Mutation(
        "mask-of-windows-is-of-heads",
        "A mask of each window [windows, T, T] is taken for one of each head where heads are before the windows.",
        "tensor.movedim(axis, -3) if tensor.ndim >= -axis else tensor.unsqueeze(-3)",
        "tensor.movedim(axis, -3) if tensor.ndim >= -axis else tensor",
        tests_of("torch/test_head_axis.py"),
    ),
    Mutation(
        "mask-of-their-dtype-is-logits",
        "A mask in the dtype of logits, `mask.type_as(s)`, is followed as if it were logits.",
        "args[:1] if func in OF_THE_FIRST else args",
        "args",
        tests_of("torch/test_terms_of_logits.py", "test_all_terms_of_the_logits_are_held_at_tau"),
    ),
    Mutation(
        "factor-of-pairs-unseen",
        "Logits times a factor of each pair count as products, and later ones are taken in as such.",
        "if call.by_pair:",
        "if False:",
        tests_of(
            "torch/test_terms_of_logits.py", "test_a_factor_that_was_not_there_when_the_attention_was_found_is_an_error"
        ),
    ),
    Mutation(
        "difference-of-products-is-a-sum",
        "q₁·k₁ − q₂·k₂ is followed as their sum.",
        "other if alpha == 1 else other.rescaled(functools.partial(operator.mul, alpha))",
        "other",
        tests_of("torch/test_terms_of_logits.py", "test_a_sum_of_products_is_read_from_queries_and_keys"),
    ),
    Mutation(
        "scale-of-the-second-product-lost",
        "Of two products with other scales the first one's scale counts for both.",
        "queries, scale = (a.q.to(wide) * a.scale, b.q.to(wide) * b.scale), 1.0",
        "queries = (a.q.to(wide), b.q.to(wide))",
        tests_of("torch/test_terms_of_logits.py", "test_a_sum_of_products_is_read_from_queries_and_keys"),
    ),
    Mutation(
        "queries-of-the-first-term-only",
        "Of (q + u)·k + (q + v)·r the vector v is not scaled.",
        "for one, other in call.terms:",
        "for one, other in ():",
        tests_of("torch/test_terms_of_logits.py", "test_all_terms_of_the_logits_are_held_at_tau"),
    ),
    Mutation(
        "positions-of-a-mask-forgotten",
        "The products in an `attn_mask` are not looked at for rows of the queries.",
        "call if added is None else replace(call, terms=added.terms_of_a_bias())",
        "call",
        tests_of("torch/test_terms_of_logits.py", "test_all_terms_of_the_logits_are_held_at_tau"),
    ),
    Mutation(
        "rows-in-other-axes-scaled",
        "Factors of a tensor in other axes are taken for those of heads or queries.",
        "factor.shape[-1] == 1 and not score.away",
        "factor.shape[-1] == 1",
        tests_of("torch/test_terms_of_logits.py", "test_what_is_not_held_is_refused_by_name"),
    ),
    Mutation(
        "gauge-of-shared-keys-omitted",
        "Queries that feed something else, too, are not tried where a key is shared.",
        "for pair in (*_gauge(each, index), *_gauge_of_groups(each, index))",
        "for pair in _gauge(each, index)",
        tests_of("torch/test_proof.py", "test_another_use_beside_logits_that_are_returned_is_seen"),
    ),
    Mutation(
        "parts-of-scores-lost",
        "Scores that are divided before the softmax are lost.",
        "for each, part in zip(results, divided(use, results), strict=True):",
        "for each, part in ():",
        tests_of(
            "torch/test_written_out_attention.py",
            "test_each_softmax_has_heads_of_its_own",
            "test_parts_that_are_not_heads_are_refused_by_name",
        ),
    ),
    Mutation(
        "removed-module-is-a-keyerror",
        "A module that left the model and is called by itself is looked up in it.",
        "name = self._names.get(module)\n        return name",
        "name = self._names[module]\n        return name",
        tests_of("torch/test_observation_edges.py", "test_a_part_that_was_removed_and_is_called_by_itself_is_nobodys"),
    ),
    Mutation(
        "scale-of-written-scores-ignored",  # 12
        "The number that multiplies a product of queries and keys is not part of the scale.",
        "return score.rescaled(lambda scale: scale * factor if times else scale / factor)",
        "return score",
        tests_of("torch/test_written_out_attention.py"),
    ),
    Mutation(
        "unknown-attention-ignored",  # 28
        "Attention that runs beside the ones that are known is neither observed nor an error.",
        "unknown, unclaimed.calls = unclaimed.calls, 0",
        "unknown = unclaimed.calls = 0",
        tests_of(
            "torch/test_observation_edges.py",
            "test_attention_that_a_trace_does_not_reach_is_an_error_and_then_known",
        ),
    ),
    Mutation(
        "number-of-calls-not-checked",  # 36
        "A module that calls attention more often than it was seen to is observed all the same.",
        "if self.calls > self.observer.most_calls:",
        "if False:",
        tests_of(
            "torch/test_new_reach.py",
            "test_more_or_fewer_calls_of_several_attentions_in_the_same_order",
        ),
    ),
    Mutation(
        "fewer-calls-not-checked",
        "A module that calls fewer attentions than it was seen to is observed as if they were the first ones.",
        "self._search_while(lambda: bool(self.observer.calls) and self.calls not in self.observer.calls)",
        "pass",
        tests_of(
            "torch/test_new_reach.py",
            "test_other_attentions_than_before_are_an_error_of_the_step_which_changes_nothing",
        ),
    ),
    Mutation(
        "new-modules-not-watched",
        "Attention that is written out in a module that runs for the first time after the first step is missed.",
        "            if not self._is_known(module):\n                self._new.put_on(module)",
        "            pass",
        tests_of("torch/test_new_reach.py", "test_a_tower_that_the_first_batches_did_not_reach"),
    ),
    Mutation(
        "added-modules-not-watched",
        "Attention that is written out in a layer that was added in training is missed.",
        "if searcher is None or not self._children or self._sum == self._sum_of_modules():",
        "if True:",
        tests_of("torch/test_new_reach.py", "test_layers_that_are_added_while_it_trains"),
    ),
    Mutation(
        "sigmoid-attention-is-not-observed",
        "Attention by a sigmoid in the softmax's place is refused, though its logits are the same.",
        "                    self._weights.enter(result, Weights(tensor.detach(), score))\n",
        "                    pass\n",
        tests_of("torch/test_sigmoid_attention.py", "test_sigmoid_attention_is_clipped_by_the_logits_of_a_softmax"),
    ),
    Mutation(
        "pairs-masked-behind-a-sigmoid-count",
        "Pairs whose weight is set to zero behind the sigmoid count.",
        "return replace(self, score=self.score.forbid(pairs))",
        "return self",
        tests_of("torch/test_sigmoid_attention.py", "test_pairs_without_a_weight_do_not_count"),
    ),
    Mutation(
        "sigmoid-blind-to-what-a-query-s-logits-share",
        "What is subtracted from all logits of a query is taken for nothing in front of a sigmoid.",
        "up_to_queries=before.of_softmax and not before.is_capped",
        "up_to_queries=not before.is_capped",
        tests_of("torch/test_sigmoid_attention.py", "test_what_all_logits_of_a_query_have_in_common_is_a_part_of_them"),
    ),
    Mutation(
        "new-branch-not-traced",
        "Attention that is written out in a new branch of a module that has run before is missed.",
        "if forward.untried is None and self._may_make_queries(module):",
        "if False:",
        tests_of("torch/test_new_reach.py", "test_a_branch_of_a_module_that_has_run_without_it"),
    ),
    Mutation(
        "operators-beyond-the-guess-are-not-looked-at",
        "A first forward like the guess is not traced, though it weighs by an operator that the guess did not reach.",
        "return reach.operators_of_weights <= traced",
        "return True",
        tests_of("torch/test_new_reach.py", "test_what_it_weighs_unseen_is_an_error_by_name"),
    ),
    Mutation(
        "matrices-that-come-into-use-are-not-watched",
        "Attention written out on parameters that a module has held all along is missed where they come into use.",
        "            self._idle.update(still)\n",
        "",
        tests_of("torch/test_new_reach.py", "test_matrices_of_a_module_that_has_run_without_them"),
    ),
    Mutation(
        "gradients-of-what-has-not-run-are-not-noticed",
        "Attention written out with the weights of layers that are not called is missed where it first runs later.",
        "        self._trace_after_unseen()\n",
        "",
        tests_of(
            "torch/test_new_reach.py", "test_weights_of_layers_that_are_not_called_are_noticed_by_their_gradients"
        ),
    ),
    Mutation(
        "compiled-model-is-not-counted",
        "Attention that a model compiled as a whole reaches first is missed.",
        "                monitor.begin_compiled()\n",
        "                pass\n",
        tests_of("torch/test_new_reach.py", "test_what_a_model_compiled_as_a_whole_reaches_first_is_an_error"),
    ),
    Mutation(
        "gate-by-queries-that-is-returned",
        "A product with the queries that the model returns passes for queries in a cache.",
        "not exactly and index not in base.firsts",
        "not exactly",
        (*tests_of("torch/test_proof.py"), "-k", "GateThatIsReturned"),
    ),
    Mutation(
        "writes-to-the-copy-count-as-changes",
        "What a proof writes to its copy amid a forward keeps the model's backward from running.",
        "is_dtensor(parameter) else unwrapped(parameter).data\n",
        "is_dtensor(parameter) else unwrapped(parameter).detach()\n",
        tests_of("torch/test_new_reach.py", "test_a_tower_that_the_first_batches_did_not_reach"),
    ),
    Mutation(
        "heads-of-one-sequence-for-ever",
        "Heads found on a single sequence, in one axis with it, are taken for the same ones in a larger batch.",
        "if self.observer.of_one_sequence and not self._is_of_one_sequence(call):",
        "if False:",
        tests_of("torch/test_new_reach.py", "test_heads_that_were_found_on_a_single_sequence"),
    ),
    Mutation(
        "heads-in-front-taken-for-sequences",
        "Heads in an axis in front of a batch of one sequence are taken for the sequences of one head.",
        "if not (query.are_private and heads > 1)",
        "if not (query.are_private and (heads > 1 or given.ndim == 4))",
        tests_of("torch/test_new_reach.py", "test_heads_in_an_axis_in_front_of_a_single_sequence_are_refused"),
    ),
    Mutation(
        "generators-advanced",
        "The search uses random numbers of a generator that the model's code holds.",
        "            generator.set_state(state)",
        "            pass",
        tests_of(
            "torch/test_new_reach.py",
            "test_attention_in_training_alone_is_found_ahead_and_no_random_number_is_used",
        ),
    ),
    Mutation(
        "error-amid-a-forward",
        "What a later forward shows is raised amid it, and not by the step.",
        "            self.unclaimed.note(str(error))\n\n    def run_of",
        "            raise\n\n    def run_of",
        tests_of("torch/test_new_reach.py", "test_new_attention_that_is_not_understood_is_an_error_of_the_step"),
    ),
    Mutation(
        "function-bound-early-unseen",  # 42
        "A module that imported scaled_dot_product_attention by name is not observed.",
        "if id(original) in self._patches:",
        "if False:",
        tests_of("torch/test_observation.py", "test_a_function_imported_by_name_is_observed_and_given_back"),
    ),
    Mutation(
        "attention-of-another-thread-observed",
        "Who listens is one for all threads, so the attention of another model is taken for this one's.",
        "self.handlers: list[AttentionCallHandler | None] = []",
        'self.handlers: list[AttentionCallHandler | None] = globals().setdefault("_everybody", [])',
        tests_of("torch/test_threads.py", "test_attention_of_an_unrelated_thread_is_not_the_models"),
    ),
    Mutation(
        "key-of-two-attentions-scaled",
        "A key that two attentions share is scaled for one of them.",
        "shared[place] = count > 1",
        "shared[place] = count > 2",
        tests_of("torch/test_attention_search.py", "test_a_key_that_two_attentions_share_is_left_alone"),
    ),
    Mutation(
        "grouped-keys-taken-for-private",  # 3
        "A key that several query heads meet counts as private to each.",
        "many = feeds(each.masks, heads).sum(0) > 1",
        "many = feeds(each.masks, heads).sum(0) > heads",
        tests_of("torch/test_attention_search.py", "test_every_layout_is_found_and_clipped_exactly"),
    ),
    Mutation(
        "values-made-of-queries-accepted",
        "Rows that make queries and values at once are scaled.",
        'return "its queries and values are made of the same rows"',
        "pass",
        tests_of("torch/test_attention_search.py", "test_rows_that_play_two_parts_are_refused"),
    ),
    Mutation(
        "random-numbers-of-the-model-moved",
        "Finding the attention draws from the generators of the training.",
        "with torch.random.fork_rng(devices=devices):\n            yield",
        "yield",
        tests_of("torch/test_observation.py", "test_tracing_leaves_the_model_as_it_was"),
    ),
    # Muon: the iteration (core)
    Mutation(
        "input-normalised-in-place",  # 15
        "The iteration writes into the tensor that it was given.",
        "x = x / scale\n",
        "x /= scale\n",
        tests_of("core/test_newton_schulz.py", "test_the_input_is_never_written_to"),
    ),
    Mutation(
        "cast-before-normalisation",  # 16
        "The matrix is cast to the narrow dtype first, where its norm overflows.",
        "wide = normalize(x.mT if tall else x, products, xp=xp, eps=eps)",
        "x = x if dtype is None else xp.asarray(x, dtype=dtype)\n"
        "    wide = normalize(x.mT if tall else x, products, xp=xp, eps=eps)",
        tests_of(
            "core/test_newton_schulz.py",
            "test_float16_is_normalised_before_it_is_narrowed",
            "test_narrow_products_come_after_the_normalisation",
        ),
    ),
    Mutation(
        "small-gradients-swallowed",  # 16
        "Squares of small numbers underflow, because nothing is divided by Σ|x| first.",
        "scale = xp.where(total > 0, total, 1.0)",
        "scale = xp.ones_like(total)",
        tests_of("core/test_newton_schulz.py", "test_tiny_and_huge_float32_inputs_get_a_full_size_update"),
    ),
    Mutation(
        "explicit-eps-ignored",
        "A floor of the norm that is asked for is not kept.",
        "norm = xp.where(norm * scale > eps, norm, eps / scale)",
        "norm = xp.where(norm > 0, norm, eps / scale)",
        tests_of("core/test_newton_schulz.py", "test_an_explicit_eps_is_a_floor_of_the_norm"),
    ),
    Mutation(
        "zero-matrix-becomes-nan",
        "A zero matrix is divided by its norm.",
        "return x / xp.where(norm > 0, norm, 1.0)",
        "return x / norm",
        tests_of("core/test_newton_schulz.py", "test_zero_stays_zero_and_does_not_disturb_its_batch"),
    ),
    Mutation(
        "polynomial-with-the-wrong-sign",
        "The polynomial is bA − cA².",
        "gram=lambda x: x @ x.mT,\n        polynomial=lambda gram, b, c: b * gram + c",
        "gram=lambda x: x @ x.mT,\n        polynomial=lambda gram, b, c: b * gram - c",
        tests_of("core/test_newton_schulz.py", "test_equals_the_polynomial_of_the_singular_values"),
    ),
    Mutation(
        "safety-factor-forgotten",  # 38
        "polar_express runs with its numbers as published, which overshoot in bf16.",
        "published = tuple((a / s, b / s**3, c / s**5) for a, b, c in self.steps[:count])",
        "published = self.steps[:count]",
        tests_of("core/test_coefficients.py"),
    ),
    Mutation(
        "polar-express-without-cushion",  # 38
        "Polar Express is minimax on [l, u] from the first step on, and magnifies rounding errors.",
        "_minimax(max(low, CUSHION * high), high)",
        "_minimax(low, high)",
        tests_of("core/test_polar_express.py", "test_equals_the_published_table"),
    ),
    Mutation(
        "polar-express-centred-on-the-cushion",
        "Polar Express is centred on the ends of the cushioned interval, where it is centred already.",
        "centre = 2 / (_value(p, low) + _value(p, high))",
        "centre = 2 / (_value(p, max(low, CUSHION * high)) + _value(p, high))",
        tests_of("core/test_polar_express.py", "test_equals_the_published_table"),
    ),
    Mutation(
        "jax-rounds-each-term",  # 38
        "In JAX the terms of a product's sum are rounded to bf16 one by one.",
        "dtype = wide(addend.dtype)",
        "dtype = addend.dtype",
        tests_of("core/test_no_explosion.py", "test_jax_rounds_each_product_once"),
    ),
    Mutation(
        "gram-form-without-restarts",  # 38
        "The Gram form never starts afresh and loses its accuracy.",
        "pairwise((0, *restarts, len(coefficients)))",
        "pairwise((0, len(coefficients)))",
        tests_of("core/test_newton_schulz.py", "test_the_gram_form_is_as_accurate_in_narrow_products"),
    ),
    Mutation(
        "gram-restarts-of-the-default-length",  # 38
        "The Gram form restarts as for the set's default number of steps, whatever their number.",
        "restarts = checked_gram_restarts(ns_coefficients, ns_steps, wide=wide) if",
        "restarts = checked_gram_restarts(ns_coefficients, wide=wide) if",
        tests_of("core/test_no_explosion.py", "test_a_gradient_of_low_rank_does_not_blow_up_a_weight"),
    ),
    Mutation(
        "gram-restarts-too-rare",  # 38
        "The Gram form restarts half as often as its error on momenta allows.",
        "GRAM_GROWTH = 150.0",
        "GRAM_GROWTH = 1800.0",
        tests_of("benchmarks/test_gram_accuracy.py", "test_the_restarts_keep_the_rule"),
    ),
    Mutation(
        "gram-restarts-too-rare-in-float32",
        "The Gram form in float32 restarts less often than its error on momenta allows.",
        "GRAM_GROWTH_WIDE = 1e5",
        "GRAM_GROWTH_WIDE = 1e7",
        tests_of("benchmarks/test_gram_accuracy.py", "test_the_restarts_keep_the_rule"),
    ),
    Mutation(
        "gram-restarts-of-float32-in-bf16",
        "The Gram form in bf16 restarts as seldom as float32 may.",
        "wide = xp.finfo(x.dtype).eps < 1e-4",
        "wide = True",
        tests_of("core/test_no_explosion.py", "test_small_matrices_stay_within_the_polynomials_bound"),
    ),
    Mutation(
        "gram-form-with-two-steps-first",  # 38
        "The Gram form's first step is not alone, and small singular values are lost in the rounding of R.",
        "if (first_alone and step == 1) or (step and growth",
        "if step and (growth",
        tests_of("benchmarks/test_gram_accuracy.py", "test_the_restarts_keep_the_rule"),
    ),
    Mutation(
        "gram-form-rounds-its-identity",  # 38
        "A step between two restarts of the Gram form rounds aI + P, and loses what is small in P.",
        "if len(steps) == 1:  # a in",
        "if False:  # a in",
        tests_of("benchmarks/test_gram_accuracy.py", "test_the_restarts_keep_the_rule"),
    ),
    Mutation(
        "gram-form-at-any-length",  # 38
        "The Gram form runs with more steps than those at which its error was judged.",
        "if len(polynomials) in known.gram_steps and known",
        "if known.gram_steps and known",
        tests_of("core/test_coefficients.py", "test_the_gram_form_is_refused_for_polynomials_that_were_not_judged"),
    ),
    Mutation(
        "list-known-by-its-first-step",  # 38
        "A list of coefficients that begins like a known set is taken for it.",
        "known.begins_with(polynomials)",
        "known.begins_with(polynomials[:1])",
        tests_of("core/test_coefficients.py", "test_the_gram_form_is_refused_for_polynomials_that_were_not_judged"),
    ),
    Mutation(
        "gram-form-of-cans-accepted",  # 38
        "A polynomial that loses its accuracy in the Gram form is accepted for it.",
        "            safety=1.01,  # without it 1.001 becomes",
        "            gram_steps=range(1, 6),\n            safety=1.01,  # without it 1.001 becomes",
        tests_of("core/test_newton_schulz.py", "test_the_gram_form_is_refused_where_it_loses_its_accuracy"),
    ),
    Mutation(
        "cans-without-a-safety-factor",  # 38
        "cans runs with its numbers as published, which send 1.001 to 2e23.",
        "            safety=1.01,  # without it",
        "            # without it",
        tests_of("core/test_no_explosion.py", "test_the_bound_itself_is_near_one"),
    ),
    Mutation(
        "root-of-the-wrong-thing",  # 13
        "The scale is √(0.2 · max) for 0.2 · √max.",
        "return MOONLIGHT_RMS * math.sqrt(max(fan_out, fan_in))",
        "return math.sqrt(MOONLIGHT_RMS * max(fan_out, fan_in))",
        tests_of("core/test_schedules_and_scale.py", "test_update_scales"),
    ),
    Mutation(
        "original-scale-upside-down",
        "The original scale is √max(1, fan_in/fan_out).",
        "return math.sqrt(max(1.0, fan_out / fan_in))",
        "return math.sqrt(max(1.0, fan_in / fan_out))",
        tests_of("core/test_schedules_and_scale.py", "test_update_scales"),
    ),
    Mutation(
        "forwards-observed-for-the-tau-of-the-step-before",
        "Where τ is a function, forwards are observed for the τ of the step before them.",
        "self.attentions.set_thresholds(following)",
        "self.attentions.set_thresholds(self._thresholds)",
        tests_of(
            "torch/test_tau_rules.py", "test_a_function_gets_the_number_of_the_step_and_forwards_are_observed_for_it"
        ),
    ),
    Mutation(
        "step-of-tau-never-grows",
        "A τ that is a function gets the number of the first step at each.",
        "return replace(self, step=self.step + 1)",
        "return self",
        tests_of(
            "torch/test_tau_rules.py", "test_a_function_gets_the_number_of_the_step_and_forwards_are_observed_for_it"
        ),
    ),
    Mutation(
        "step-of-tau-not-saved",
        "A checkpoint does not keep the step of a τ that is a function.",
        'group["clip_step"] = self.qk_clip.state_dict()["step"]',
        "pass",
        tests_of("torch/test_tau_rules.py", "test_a_resumed_run_goes_on_at_its_step"),
    ),
    Mutation(
        "tau-of-another-attention",
        "Each attention has the τ of the first.",
        "taus = [self.of(name) for name in names]",
        "taus = [self.of(names[0]) for name in names]",
        tests_of("torch/test_tau_rules.py", "test_each_attention_ends_at_its_own_tau"),
    ),
    Mutation(
        "pattern-of-tau-that-fits-nothing",
        "A misspelt pattern of τ is taken, and another one counts.",
        "if not any(fnmatch.fnmatchcase(name, pattern) for name in names):",
        "if not names:",
        tests_of("core/test_tau_rules.py", "test_a_pattern_that_fits_nothing_is_refused"),
    ),
    Mutation(
        "tau-by-name-of-the-first-in-optax",
        "In Optax each attention has the τ of the first.",
        "now = [by_rule[id(rule)] for rule in rules]",
        "now = [by_rule[id(rules[0])] for rule in rules]",
        tests_of("optax/test_qk_clip.py", "test_each_attention_has_its_own_tau"),
    ),
    Mutation(
        "both-halves-clipped-for-one",
        "Clipping AdamW's gradients alone clips Muon's, too.",
        'if only is None or (group["use"] == "muon") == (only == "muon")]',
        "]",
        tests_of("torch/test_clip_grad_norm.py", "test_one_half_is_clipped_by_its_own_norm_and_the_other_stays"),
    ),
    Mutation(
        "recipe-over-what-was-given",
        "A recipe's values win over those given by hand.",
        "return {name: value for name, value in values.items() if name not in given}",
        "return dict(values)",
        tests_of("core/test_recipes.py", "test_what_is_given_wins_even_where_it_is_the_default"),
    ),
    Mutation(
        "given-polynomial-as-long-as-the-recipe-s",
        "A polynomial given by hand runs for the recipe's sixteen steps.",
        'if "ns_coefficients" in given:\n            values.pop("ns_steps", None)',
        'if "ns_coefficients" in ():\n            values.pop("ns_steps", None)',
        tests_of("core/test_recipes.py", "test_a_given_polynomial_has_its_own_length"),
    ),
    Mutation(
        "recipe-without-a-clip-over-a-given-tau",
        "A τ given next to a recipe without a clip is dropped.",
        'elif "tau" not in given:',
        'elif "tau" not in ():',
        tests_of("core/test_recipes.py", "test_a_given_tau_or_clip_switches_on_what_a_recipe_leaves_off"),
    ),
    Mutation(
        "recipe-lost-in-the-checkpoint",
        "A checkpoint does not say by which recipe it was trained.",
        'group["recipe"] = self.plan.recipe.as_saved()',
        "pass",
        tests_of("torch/test_recipes.py", "test_recipe_and_given_values_survive_a_checkpoint"),
    ),
    Mutation(
        "recipe-of-nvidia-with-the-common-momentum",
        "The nvidia recipe has the momentum of the others.",
        "momentum=0.9,",
        "momentum=0.95,",
        tests_of("torch/test_recipes.py", "test_a_recipe_is_its_arguments_to_the_bit"),
    ),
    Mutation(
        "recipe-s-heads-not-asked-for",
        "Optax takes a recipe of heads and leaves them in one matrix.",
        "if recipe.per_head and numbers is None:",
        "if False:",
        tests_of("optax/test_recipes.py", "test_what_a_recipe_has_to_be_told_is_asked_for"),
    ),
    Mutation(
        "unclamped-scale-clamped",
        "The unclamped spectral scale is 1 for wide matrices.",
        "            return math.sqrt(fan_out / fan_in)\n",
        "            return math.sqrt(max(1.0, fan_out / fan_in) * 1)\n",
        tests_of("core/test_schedules_and_scale.py", "test_update_scales"),
    ),
    Mutation(
        "rms-of-the-wrong-beta",
        "The RMS of AdamW's updates has its two sums exchanged.",
        "return math.sqrt((1 - beta1) / (1 + beta1))",
        "return math.sqrt((1 + beta1) / (1 - beta1))",
        tests_of("core/test_schedules_and_scale.py", "test_the_closed_form_is_the_rms_of_adamw_under_noise"),
    ),
    Mutation(
        "repeats-of-blocks-not-gathered",
        "Head-interleaved q|k|v is split as if each came in one piece.",
        "repeated = xp.reshape(rows, (batch, self.repeats, fan_out // self.repeats, fan_in))",
        "repeated = xp.reshape(rows, (batch, fan_out // self.repeats, self.repeats, fan_in)).swapaxes(1, 2)",
        tests_of("core/test_matrix_layout.py"),
    ),
    # Muon: groups and layouts (torch)
    Mutation(
        "stacked-biases-taken-for-matrices",  # 20
        "Biases [layers, d] go to Muon.",
        "if _BIAS.fullmatch(parts[-1]):",
        "if False:",
        tests_of("torch/test_param_groups.py", "test_stacked_biases_and_norms_are_no_matrices"),
    ),
    Mutation(
        "embedding-by-substring",  # 30
        "A matrix whose name contains `emb` (time_emb_proj) counts as an embedding.",
        "return _has_word(part, _EMBEDDING)",
        'return "emb" in part',
        tests_of("core/test_parameter_roles.py", "test_names_of_models"),
    ),
    Mutation(
        "projection-of-an-embedding-on-adamw",  # 30
        "A projection that is named after what it projects (time_emb_proj, attn_gated_norm) counts as that.",
        "bool(words) and words[-1] not in _PROJECTIONS and any(map(pattern.fullmatch, words))",
        "any(map(pattern.fullmatch, words))",
        tests_of("core/test_parameter_roles.py", "test_names_of_models"),
    ),
    Mutation(
        "score-inside-a-layer-taken-for-the-head",  # 30
        "A matrix of a layer whose name a head may have (score, proj_out) goes to AdamW.",
        "return modules[-1] in _HEADS_OUTSIDE_OF_LAYERS and len(modules) <= 2 and not _in_a_layer(modules)",
        "return modules[-1] in _HEADS_OUTSIDE_OF_LAYERS",
        tests_of("core/test_parameter_roles.py"),
    ),
    Mutation(
        "tied-head-on-muon",  # 20, 30
        "An embedding that a head shares belongs to whoever comes last.",
        "if not isinstance(owners.get(id(parameter)), nn.Embedding):",
        "if True:",
        tests_of(
            "torch/test_param_groups.py",
            "test_a_tied_head_is_planned_once",
            "test_a_head_tied_to_an_embedding_is_an_embedding_whoever_owns_it",
        ),
    ),
    Mutation(
        "head-by-shape-on-muon",  # 20
        "An output head with a name of its own goes to Muon.",
        'if like and shown != "inner" and not _in_a_layer(modules):',
        "if False:",
        tests_of("torch/test_param_groups.py", "test_a_head_is_known_by_its_name_or_by_the_shape_of_the_embedding"),
    ),
    Mutation(
        "gate-and-up-as-one-matrix",
        "A fused gate|up is orthogonalised as one matrix.",
        "if rows % 2:\n        return default_layout(shape)",
        "if True:\n        return default_layout(shape)",
        tests_of(
            "torch/test_param_groups.py",
            "test_fused_gate_up_experts_are_split_whichever_way_they_are_stored",
            "test_fused_gate_up_linear",
        ),
    ),
    Mutation(
        "heads-split-without-being-asked",
        "Without per_head=True, q, k and v are matrices per head.",
        "heads=tuple(divided) if per_head else (),",
        "heads=tuple(divided),",
        tests_of("torch/test_param_groups.py", "test_declared_fused_attention_is_split"),
    ),
    Mutation(
        "norms-decay",
        "Weight decay applies to norms and biases.",
        'group["weight_decay"] = 0.0',
        "pass",
        tests_of("torch/test_muonclip.py", "test_a_step_is_muon_and_adamw_and_then_the_clip"),
    ),
    Mutation(
        "unknown-adamw-option-dropped",  # 40
        "An option that the AdamW half does not have is dropped in silence.",
        "unknown = sorted(map(str, set(options) - set(known)))",
        "unknown, options = [], {name: options[name] for name in known if name in options}",
        tests_of("torch/test_muonclip.py", "test_wrong_arguments_are_named", "test_adamw_options"),
    ),
    Mutation(
        "unknown-keys-of-groups-kept",
        "A misspelt option of a parameter group is kept, and nothing reads it.",
        "        check_keys(group, use)\n",
        "",
        tests_of("torch/test_wrong_arguments.py", "test_a_key_that_nothing_would_read_is_refused_with_the_word_for_it"),
    ),
    Mutation(
        "bools-are-numbers",
        "A rate of True is the rate 1.",
        "real = not isinstance(value, bool) and isinstance(value, numbers.Real)",
        "real = isinstance(value, numbers.Real)",
        tests_of("torch/test_wrong_arguments.py", "test_a_wrong_argument_is_named"),
    ),
    Mutation(
        "form-unknown-to-jax",
        "A misspelt ns_form runs the standard form in JAX.",
        'check_choice("ns_form", self.form, "standard", "gram", None)',
        "pass",
        tests_of("optax/test_wrong_arguments.py", "test_a_wrong_argument_is_named"),
    ),
    Mutation(
        "tall-and-wide-in-turn",
        "Matrices that are tall and wide in turn, as the layers of most models are, step one by one.",
        "segments.sort(key=lambda segment: (segment.tall, id(segment.step.options)))",
        "pass",
        tests_of("torch/test_update_pieces.py", "test_tall_and_wide_matrices_in_turn_step_in_two_lists"),
    ),
    Mutation(
        "quack-on-any-device",
        "products='quack' on a device that it has no kernels for fails in the middle of a step.",
        "check_products_on(parameter.device, self.products, dtype)",
        "pass",
        tests_of("torch/test_quack_products.py", "test_a_device_that_cannot_run_them_is_named_before_anything_moves"),
    ),
    Mutation(
        "quack-with-the-wrong-factors",
        "The polynomial of the iteration has its two factors exchanged, with quack-kernels alone.",
        "C=gram, alpha=c, beta=b",
        "C=gram, alpha=b, beta=c",
        tests_of(
            "torch/test_quack_products.py", "test_the_iteration_is_the_same_and_asks_for_symmetric_products_alone"
        ),
    ),
    Mutation(
        "form-chosen-in-torch-alone",
        "JAX iterates wide matrices in the standard form, which takes longer.",
        "return self.form or choose_form(m, n, name, jax.default_backend(), polynomials, None)",
        'return self.form or "standard"',
        tests_of("optax/test_forms.py", "test_the_update_has_the_chosen_form"),
    ),
    Mutation(
        "form-chosen-for-float64",
        "Matrices in float64, which ask for accuracy, are iterated in the Gram form.",
        'dtype not in ("bfloat16", "float32")',
        'dtype not in ("bfloat16", "float32", "float64")',
        tests_of("optax/test_forms.py", "test_the_form_is_chosen_by_the_shape_and_the_polynomials"),
    ),
    Mutation(
        "maximize-dropped",  # 40
        "A group that says maximize=True is minimised in silence.",
        'OFF = ("amsgrad", "maximize", "differentiable", "dampening")',
        'OFF = ("amsgrad", "differentiable", "dampening")',
        tests_of("torch/test_muonclip.py", "test_wrong_arguments_are_named", "test_a_refused_group_adds_nothing")
        + tests_of("torch/test_muon.py", "test_wrong_groups_are_named"),
    ),
    Mutation(
        "wrong-betas",
        "The AdamW half has torch's β₂ = 0.999.",
        "ADAM_BETAS = (0.9, 0.95)",
        "ADAM_BETAS = (0.9, 0.999)",
        tests_of("torch/test_muonclip.py", "test_defaults"),
    ),
    # Muon: the step (torch)
    Mutation(
        "gradient-overwritten",  # 15
        "Nesterov's mean is written into the gradient.",
        "    lerp=torch.lerp,\n    average",
        "    lerp=Tensor.lerp_,\n    average",
        tests_of("torch/test_muon.py", "test_gradient_and_momentum_are_not_normalised_in_place"),
    ),
    Mutation(
        "nesterov-by-the-wrong-weight",  # 21
        "Nesterov's mean weighs gradient and momentum the other way round.",
        "return operations.lerp(gradient, buffer, momentum.beta)",
        "return operations.lerp(gradient, buffer, 1 - momentum.beta)",
        tests_of("torch/test_muon.py", "test_a_float64_trajectory_is_the_oracle_s"),
    ),
    Mutation(
        "decay-without-the-rate",
        "Weight decay is not multiplied by the rate.",
        "kept_share = 1 - options.lr * options.weight_decay",
        "kept_share = 1 - options.weight_decay",
        tests_of("torch/test_muon.py", "test_a_float64_trajectory_is_the_oracle_s"),
    ),
    Mutation(
        "scale-of-the-whole-parameter",  # 20
        "The scale of a fused block is that of the parameter that stores it.",
        "return update_scale(shards.fan_out, shards.fan_in, ",
        "return update_scale(self.step.parameter.shape[0], shards.fan_in, ",
        tests_of("torch/test_muon.py", "test_each_block_is_updated_as_a_matrix_of_its_own_shape"),
    ),
    Mutation(
        "eps-of-torch-as-a-floor",  # 16, 32
        "torch's default eps of 1e-7 swallows small gradients.",
        "self.eps or 0.0,",
        "TORCH_EPS if self.eps is None else self.eps,",
        tests_of("torch/test_muon.py", "test_gradients_that_torch_swallows_get_a_full_size_update"),
    ),
    Mutation(
        "given-eps-ignored",
        "An eps that is passed is no floor.",
        "self.eps or 0.0,",
        "0.0,",
        tests_of("torch/test_muon.py", "test_torch_s_own_numbers_given_do_what_they_do_there"),
    ),
    Mutation(
        "unused-experts-not-frozen",
        "freeze_unused=True moves experts that got no token.",
        "if options.freeze_unused:",
        "if False:",
        tests_of("torch/test_muon.py", "test_an_unused_expert_moves_on_its_momentum_unless_frozen"),
    ),
    Mutation(
        "tensor-rate-shared-by-groups",  # 33
        "A rate that is a tensor is one for all groups, so a scheduler scales it three times.",
        'group["lr"] = group["lr"].clone()',
        "pass",
        tests_of("torch/test_muonclip.py", "test_a_tensor_rate_is_each_group_s_own"),
    ),
    Mutation(
        "momentum-hidden-from-schedulers",  # 33
        "Schedulers that cycle momentum do not find it among the defaults.",
        'else ("lr", "weight_decay", "momentum")',
        'else ("lr", "weight_decay")',
        tests_of("torch/test_muonclip.py", "test_schedulers_that_cycle_momentum_work"),
    ),
    Mutation(
        "parameters-checked-after-the-update",  # 29
        "What cannot be updated is found when half of the step is done.",
        "check_gradients(self.param_groups)\n        self._update()",
        "self._update()\n        check_gradients(self.param_groups)",
        tests_of("torch/test_muon.py", "test_what_cannot_be_updated_shard_by_shard_is_refused_before_anything_moves"),
    ),
    Mutation(
        "capturable-noticed-after-the-update",  # 29
        "The parameters are checked when the plan of the update is made, and the plan when the update is over.",
        "        if changed:\n            check_parameters(self.param_groups, offload=self._offload)\n",
        "",
        tests_of("torch/test_muonclip.py", "test_capturable_is_refused_on_the_cpu_before_anything_moves"),
    ),
    Mutation(
        "plan-kept-when-its-inputs-change",  # 19
        "The plan of the first step is used for parameters that an engine has put in the place of those.",
        "changed = inputs != self._inputs",
        "changed = self._inputs is None",
        tests_of("torch/test_plan_refresh.py", "test_a_change_is_seen_by_the_next_step"),
    ),
    Mutation(
        "steps-counted-in-the-default-dtype",  # 39
        "AdamW's count of steps has torch's default dtype: in bfloat16 it stops at 256.",
        "step = torch.zeros((), dtype=torch.float32, device=device)",
        "step = torch.zeros((), device=device)",
        tests_of("torch/test_defaults.py", "test_the_count_of_steps_goes_on_as_torch_s_does"),
    ),
    Mutation(
        "orthogonalised-on-the-default-device",
        "A matrix is orthogonalised on torch's default device, not on its own.",
        "return xp.asarray(x, dtype=dtype) if to is None else to(dtype)",
        "return xp.asarray(x, dtype=dtype)",
        tests_of("torch/test_defaults.py", "test_a_matrix_is_orthogonalised_on_its_own_device"),
    ),
    # Resume (torch)
    Mutation(
        "state-only-with-gradients",  # 19
        "A parameter without a gradient (an idle expert) is missing from the state dict.",
        "    return parameter.requires_grad or parameter.grad is not None",
        "    return parameter.grad is not None",
        tests_of("torch/test_muon.py", "test_a_matrix_without_a_gradient_has_a_state"),
    ),
    Mutation(
        "momentum-cast-when-loaded",  # 19
        "A float32 momentum of a bf16 parameter comes back in bf16.",
        "if dtype != parameter.dtype:",
        "if False:",
        tests_of("torch/test_muon.py", "test_resumes_bit_for_bit"),
    ),
    Mutation(
        "loaded-momentum-shared",
        "The loaded momentum is the checkpoint's own tensor.",
        "dtype=dtype, copy=True)",
        "dtype=dtype, copy=False)",
        tests_of("torch/test_muon.py", "test_loading_shares_no_memory_with_the_checkpoint"),
    ),
    Mutation(
        "checkpoint-of-the-other-half-accepted",
        "A group of AdamW takes the state of a Muon group.",
        'if not (isinstance(use, str) and use == ours["use"]):',
        "if False:",
        tests_of("torch/test_muonclip.py", "test_a_checkpoint_with_other_groups_is_refused"),
    ),
    Mutation(
        "checkpoint-of-another-group-accepted-by-position",
        "A parameter that was sorted otherwise when it was saved takes the state of the one at its position.",
        "if places[index] != other:",
        "if False:",
        tests_of("torch/test_muonclip.py", "test_a_checkpoint_that_sorted_a_parameter_otherwise_is_refused_by_name"),
    ),
    Mutation(
        "state-of-the-other-half-accepted-by-name",
        "torch.distributed.checkpoint gives a parameter the state that the other half of the optimizer saved for it.",
        'if not isinstance(saved.get(part), Tensor | (int | float if part == "step" else Tensor)):',
        "if False:",
        tests_of("torch/test_muonclip.py", "test_a_checkpoint_that_sorted_a_parameter_otherwise_is_refused_by_name"),
    ),
    Mutation(
        "interrupted-clip-scales-twice",
        "What was observed is kept when the clip is interrupted, so that scaled heads get their factor once more.",
        "        finally:\n            try:\n                self.reset()\n",
        "        finally:\n            pass\n        if True:\n            try:\n                self.reset()\n",
        tests_of("torch/test_stages.py", "test_a_clip_that_is_interrupted_gives_no_head_its_factor_twice"),
    ),
    Mutation(
        "nothing-to-clip-breaks-the-log",
        "The Trainer's callback takes the extremes of no attention, and the training of a model without any ends.",
        " or not self._clip.last_layers:",
        ":",
        tests_of(
            "torch/test_trainer_arguments.py", "test_a_log_of_a_model_with_nothing_to_clip_has_nothing_of_the_clip"
        ),
    ),
    Mutation(
        "masks-of-other-batches",
        "Parts of a mask that are of another number of sequences or heads fail in an operator.",
        "    mask.check_batch(q.shape[0], q.shape[1])\n    if lse",
        "    if lse",
        tests_of("torch/test_wrong_tensors.py"),
    ),
    Mutation(
        "interrupted-in-forgetting",
        "An interrupt while the clip forgets leaves what some attentions observed, whose heads are scaled already.",
        "            except BaseException:  # in this, too",
        "            except ZeroDivisionError:  # in this, too",
        tests_of("torch/test_interrupts.py", "test_an_interrupt_at_every_second_operator_leaves_what_the_page_says[1]"),
    ),
    Mutation(
        "averages-half-made",
        "An interrupt between the states of a parameter in AdamW's half leaves one of them, and no step is made again.",
        "state.update(step=step, exp_avg",
        'state["step"] = step\n        state.update(exp_avg',
        tests_of("torch/test_interrupts.py", "test_an_interrupt_at_every_second_operator_leaves_what_the_page_says[0]"),
    ),
    Mutation(
        "counts-of-heads-half-made",
        "An interrupt leaves counts of no heads under the names of all, and no step is made again.",
        "            tensors = torch.full_like(maxima, torch.inf), ",
        "            self._names, self._sizes = names, sizes\n"
        "            tensors = torch.full_like(maxima, torch.inf), ",
        tests_of("torch/test_interrupts.py", "test_an_interrupt_at_every_second_operator_leaves_what_the_page_says[1]"),
    ),
    Mutation(
        "a-diverged-checkpoint-is-loaded",
        "NaN or infinity in the states of a checkpoint is loaded, and the next step makes weights NaN.",
        "if not (math.isfinite(low) and math.isfinite(high)):",
        "if False:",
        tests_of(
            "torch/test_all_or_nothing.py", "test_a_checkpoint_that_is_wrong_is_refused_before_anything_is_replaced"
        ),
    ),
    Mutation(
        "negative-squares-are-loaded",
        "A mean of squares below zero is loaded, of which the next step takes the root.",
        'if part == "exp_avg_sq" and low < 0:',
        "if False:",
        tests_of(
            "torch/test_all_or_nothing.py", "test_a_checkpoint_that_is_wrong_is_refused_before_anything_is_replaced"
        ),
    ),
    Mutation(
        "graphs-on-the-cpu",
        "A checkpoint for CUDA graphs is loaded on the CPU, and the step refuses it.",
        'own.capturable and each.parameter.device.type == "cpu"',
        "False",
        tests_of(
            "torch/test_all_or_nothing.py", "test_a_checkpoint_that_is_wrong_is_refused_before_anything_is_replaced"
        ),
    ),
    Mutation(
        "half-made-keeps-its-hooks",
        "The hooks of an optimizer that was not made stay on the model, as long as the error does.",
        "                self.qk_clip.attentions.withdraw()",
        "                pass",
        tests_of("torch/test_all_or_nothing.py", "test_a_construction_that_fails_leaves_the_model_as_it_was"),
    ),
    Mutation(
        "half-made-ends-the-clip-before",
        "A construction that fails ends the clip that was on the model.",
        'other.__setstate__(other.__getstate__() | {"removed": ""})',
        "pass",
        tests_of("torch/test_all_or_nothing.py", "test_a_construction_that_fails_leaves_the_model_as_it_was"),
    ),
    Mutation(
        "groups-changed-by-hand",
        "A group that somebody has made ascend, or given a misspelt option, descends as before.",
        "            check_off(group)\n            check_held_keys(group, str(use))\n",
        "            pass\n",
        tests_of(
            "torch/test_all_or_nothing.py", "test_groups_that_were_changed_by_hand_are_checked_before_anything_moves"
        ),
    ),
    Mutation(
        "parameters-taken-out-by-hand",
        "A parameter that is taken out of a group shifts the layouts of those behind it.",
        "not isinstance(parameters, list) or len(parameters) != len(own)",
        "not isinstance(parameters, list)",
        tests_of(
            "torch/test_all_or_nothing.py", "test_groups_that_were_changed_by_hand_are_checked_before_anything_moves"
        ),
    ),
    Mutation(
        "a-state-lost-in-silence",
        "A parameter without a state in a checkpoint begins anew, and nobody is told.",
        "if names and any(each.state for each in saved):",
        "if False:",
        tests_of("torch/test_all_or_nothing.py", "test_a_state_that_is_missing_is_said_and_begins_anew"),
    ),
    Mutation(
        "narrow-count-of-steps",
        "A count of AdamW's steps in bfloat16 is taken, and stops at 256.",
        "value.dtype.is_complex or value.dtype.itemsize < 4",
        "value.dtype.is_complex",
        tests_of(
            "torch/test_all_or_nothing.py",
            "test_a_count_of_steps_that_was_replaced_by_hand_is_checked_before_anything_moves",
        ),
    ),
    Mutation(
        "rows-from-an-iterator",
        "Parts of a QKProjection that are given as an iterator are checked, and are empty when the clip scales them.",
        'check_kind(part, given, (tuple, list), "a tuple of HeadRows")',
        "pass",
        tests_of("torch/test_wrong_arguments.py", "test_rows_from_an_iterator_are_refused"),
    ),
    Mutation(
        "integers-orthogonalised",
        "An integer matrix is orthogonalised, and its factor rounded to zeros.",
        'if "float" not in str(value.dtype):',
        "if False:",
        tests_of("torch/test_wrong_arguments.py", "test_integers_and_complex_numbers_are_not_orthogonalised"),
    ),
    Mutation(
        "checkpoint-read-in-the-order-it-has",
        "Parameters in another order than saved take each other's states where their shapes are the same.",
        'keys = [saved[places[index]]["params"][theirs[plain_name(name)][1]] for name in group["param_names"]]',
        'keys = list(saved[places[index]]["params"])',
        tests_of("torch/test_all_or_nothing.py", "test_groups_and_parameters_in_another_order_are_found_by_name"),
    ),
    Mutation(
        "wrappers-part-of-the-name",
        "What DistributedDataParallel puts before a name makes it another, so that the order as saved is taken.",
        "if part not in _WRAPPERS)",
        "if part)",
        tests_of("torch/test_all_or_nothing.py", "test_groups_and_parameters_in_another_order_are_found_by_name"),
    ),
    Mutation(
        "options-of-a-checkpoint-not-checked",
        "A checkpoint brings a rate of NaN or a momentum of 2.",
        "options.append(defaults(use).updated(theirs))",
        "options.append(defaults(use).from_mapping({**defaults(use).as_group(), **theirs}))",
        tests_of(
            "torch/test_all_or_nothing.py", "test_an_option_that_does_not_fit_is_refused_by_the_step_and_by_the_load"
        ),
    ),
    Mutation(
        "options-of-a-group-not-checked-by-the-step",
        "A rate that became NaN reaches all weights.",
        "if new != known:",
        "if False:",
        tests_of(
            "torch/test_all_or_nothing.py", "test_an_option_that_does_not_fit_is_refused_by_the_step_and_by_the_load"
        ),
    ),
    Mutation(
        "states-of-a-cast-model-not-checked",
        "A model that was cast after its first step fails in the middle of the next one.",
        "check_states(self.param_groups, self._layouts, self.state, [*map(self._rule, self._options)], self._offload)",
        "pass",
        tests_of(
            "torch/test_all_or_nothing.py",
            "test_a_model_that_was_cast_after_its_first_step_is_refused_before_anything_moves",
        ),
    ),
    Mutation(
        "states-replaced-by-hand-not-checked",
        "A state that somebody has replaced fails in the middle of a step.",
        "if changed or states != self._states:",
        "if changed:",
        tests_of(
            "torch/test_all_or_nothing.py", "test_a_state_that_was_replaced_by_hand_is_checked_before_anything_moves"
        ),
    ),
    Mutation(
        "later-formats-are-read",
        "A checkpoint of a later release is loaded as if it were of this one.",
        "if type(version) is not int or version > FORMAT:",
        "if False:",
        tests_of(
            "torch/test_all_or_nothing.py", "test_a_checkpoint_that_is_wrong_is_refused_before_anything_is_replaced"
        ),
    ),
    Mutation(
        "state-of-another-mesh-accepted",
        "A saved shard of another mesh is loaded as if it were this rank's.",
        "if found != expected:",
        "if False:",
        tests_of("torch/test_ranks_alike.py", "test_a_state_that_lies_otherwise_is_refused_before_anything_is_loaded"),
    ),
    Mutation(
        "resumed-optimizer-has-a-floor",
        "An optimizer that resumes reads torch's default eps as one that was given.",
        'group["eps_given"] = self.eps is not None',
        'group["eps_given"] = True',
        tests_of("torch/test_muon.py", "test_a_resumed_optimizer_still_has_no_floor"),
    ),
    Mutation(
        "state-of-torch-loses-its-floor",
        "A state dict of torch.optim.Muon is resumed without torch's floor of the norm.",
        'group.setdefault("eps_given", True)',
        'group.setdefault("eps_given", False)',
        tests_of("torch/test_muon.py", "test_torch_s_state_brings_torch_s_floor"),
    ),
    Mutation(
        "state-of-rows-not-told-of-the-clip",
        "A state that follows the norm of its rows does not learn that the clip has scaled them.",
        "if any(type(self._rule(each)).rescale is not MuonRule.rescale for each in self._options):",
        "if False:",
        tests_of("torch/test_row_state.py", "test_the_clip_tells_a_state_which_rows_it_has_scaled"),
    ),
    # Masters of bf16 parameters
    Mutation(
        "master-not-scaled-by-the-clip",
        "The clip scales the rounded weights, and the error of before makes another master of them.",
        "errors = copies.errors_of(parameter)",
        "errors = ()",
        tests_of("torch/test_master_weights.py", "test_the_clip_scales_the_master_and_the_parameter_is_its_rounding"),
    ),
    Mutation(
        "master-of-a-truncated-weight",
        "The parameter is the upper half of its master, and not the nearest number.",
        "upper = (bits + (1 << (kept - 1))) >> kept",
        "upper = bits >> kept",
        tests_of("torch/test_split_weights.py"),
    ),
    Mutation(
        "master-cut-to-24-bits",
        "Masters of 24 bits are cut, so that small updates in one direction are lost.",
        "bits = (bits + (1 << (shift - 1)) - 1 + ((bits >> shift) & 1)) >> shift",
        "bits = bits >> shift",
        tests_of("torch/test_split_weights.py", "test_of_24_bits_is_kept_what_rounding_leaves_and_no_more"),
    ),
    Mutation(
        "pruned-weight-becomes-nan",
        "A weight that was set to zero has the error of the one before.",
        "given = torch.where(weight == 0, given.clamp(min=0), given)",
        "given = given + 0",
        tests_of(
            "torch/test_split_weights.py",
            "test_a_weight_that_was_set_by_hand_is_the_weight_whatever_error_was_left",
        ),
    ),
    Mutation(
        "masters-with-moments-of-bf16",
        "Muon's momentum of a parameter with a master has the parameter's dtype.",
        "return _dtype(storage.dtype) or master_dtype(parameter, self.master_weight_bits)",
        "return _dtype(storage.dtype) or parameter.dtype",
        tests_of("torch/test_master_weights.py", "test_a_step_of_muon_is_that_of_float32_weights[muon-32]"),
    ),
    Mutation(
        "masters-not-resumed",
        "What a checkpoint holds of masters is lost: they begin again at the parameters.",
        "errors = dict(restored_errors(each, own.master_weight_bits))",
        "errors = {}",
        tests_of("torch/test_master_weights.py", "test_resumes_to_the_bit"),
    ),
    Mutation(
        "master-s-last-bits-with-a-sign",
        "The last 8 bits of an error are cut with their sign, and the upper ones do not go with them.",
        "        error = error >> 8",
        "        error = (error + 128) >> 8",
        tests_of("torch/test_split_weights.py", "test_all_bits_of_a_number_come_back_and_its_weight_is_the_nearest"),
    ),
    Mutation(
        "masters-of-32-bits-cut-in-silence",
        "A checkpoint of masters of 32 bits loses their last 8 where there are 24.",
        "if len(held) > len(error_dtypes(bits)):",
        "if False:",
        tests_of(
            "torch/test_master_weights.py",
            "test_masters_of_32_bits_are_refused_by_24_and_those_of_float32_weights_are_left_out",
        ),
    ),
    Mutation(
        "masters-of-24-bits-begin-anew-with-32",
        "Masters of 24 bits lose their error where there are 32.",
        "error = each.state[name] if name in held else",
        "error = each.state[name] if name in held and len(held) > 1 else",
        tests_of("torch/test_master_weights.py", "test_masters_of_24_bits_go_on_with_32_as_they_are"),
    ),
    Mutation(
        "masters-for-one-half-alone",
        "AdamW updates the rounded weights.",
        "capturable=capturable, master_weight_bits=muon.master_weight_bits)",
        "capturable=capturable)",
        tests_of("torch/test_master_weights.py", "test_a_step_of_adamw_is_that_of_float32_weights"),
    ),
    # States in host memory
    Mutation(
        "offloaded-states-not-returned",
        "What a step made of a state is lost with its copy on the device.",
        "segment.give_back(copies_to(segment.device))",
        "pass",
        tests_of("torch/test_offload.py", "test_every_step_is_to_the_bit_what_it_is_without[muon]"),
    ),
    Mutation(
        "offloaded-states-fetched-when-needed",
        "A round waits for its states, which could have come during the one before.",
        "        if ahead is not None:\n            yield ahead\n        ahead = following",
        "        yield following",
        tests_of("torch/test_offload.py", "test_states_are_fetched_a_round_ahead_and_returned_once"),
    ),
    Mutation(
        "offloaded-states-strided-as-the-parameter",
        "A part of a state that is no view is written back with the rest of it, over what another round returned.",
        'held = torch.empty(value.shape, dtype=value.dtype, pin_memory=torch.cuda.is_available(), device="cpu")',
        "held = torch.empty_like(value)",
        tests_of("torch/test_offload.py", "test_states_on_the_host_are_contiguous_whatever_the_parameter_is"),
    ),
    # Variants of the update
    Mutation(
        "hyperball-of-the-parameter",
        "Norms are those of the parameter and not of each matrix in it.",
        "sum=lambda x: x.sum((-2, -1), keepdim=True),",
        "sum=lambda x: x.sum(),",
        tests_of("torch/test_variants.py", "test_a_trajectory_is_numpy_s_on_every_logical_matrix[hyperball]"),
    ),
    Mutation(
        "hyperball-of-the-array-in-optax",
        "Norms are those of the array and not of each block in it.",
        "jnp.broadcast_to(jnp.sum(block, axis=-2, keepdims=True), block.shape)",
        "jnp.broadcast_to(jnp.sum(rows), block.shape)",
        tests_of("optax/test_variants.py", "test_a_trajectory_is_numpy_s_on_every_logical_matrix[hyperball]"),
    ),
    Mutation(
        "norms-of-the-shard",
        "Norms are those of this rank's part of a matrix.",
        "        x = x.sum((-2, -1), keepdim=True)\n        dist.all_reduce(x, group=cut)",
        "        x = x.sum((-2, -1), keepdim=True)",
        tests_of("torch/test_row_state.py", "test_sharded_equals_whole_and_every_row_is_kept_by_those_who_have_it"),
    ),
    Mutation(
        "hyperball-undoes-the-clip",
        "The radius is that of the first step, whatever the clip has done since.",
        "where, radius = operations.xp.where, _norm(weight, operations)",
        "where, radius = operations.xp.where, self.__dict__.setdefault(\n"
        "            weight.data_ptr(), _norm(weight, operations) + 0\n        )",
        tests_of("torch/test_variants.py", "test_the_next_step_goes_on_from_what_the_clip_has_scaled"),
    ),
    Mutation(
        "hyperball-scaled-twice-in-optax",
        "A decay and a rate are applied to what has moved the weight already.",
        "    if not _moves(update):\n        decay =",
        "    if True:\n        decay =",
        tests_of("optax/test_variants.py", "test_a_trajectory_is_numpy_s_on_every_logical_matrix[hyperball]"),
    ),
    Mutation(
        "hyperball-decays",
        "A decay that would be undone is accepted.",
        "if weight_decay is not None and decay != 0:",
        "if False:",
        tests_of("torch/test_variants.py", "test_what_does_not_exist_or_makes_no_sense_is_refused"),
    ),
    Mutation(
        "normuon-without-its-norm",
        "Rows are divided, and the update has another size than Muon's.",
        "return scaled * size, {",
        "return scaled, {",
        tests_of("torch/test_variants.py", "test_a_trajectory_is_numpy_s_on_every_logical_matrix[normuon]"),
    ),
    Mutation(
        "cautious-decay-the-wrong-way",
        "Entries that grow decay, and those that shrink do not.",
        "torch.where(agree(update, weight), weight * kept_share, weight)",
        "torch.where(agree(update, weight), weight, weight * kept_share)",
        tests_of("torch/test_variants.py", "test_cautious_decay_leaves_entries_alone_that_grow"),
    ),
    Mutation(
        "cautious-decay-by-products",
        "The product of two small numbers is zero.",
        "return ((update > 0) & (weight > 0)) | ((update < 0) & (weight < 0))",
        "return update * weight > 0",
        tests_of("torch/test_variants.py", "test_signs_decide_where_a_product_would_be_zero"),
    ),
    Mutation(
        "cautious-decay-not-in-lists",
        "Matrices that step together decay plainly.",
        "if not is_by_entry(rule) or not is_plain or options.cautious_decay:",
        "if not is_by_entry(rule) or not is_plain:",
        tests_of("torch/test_variants.py", "test_matrices_of_one_group_step_as_each_alone[cautious]"),
    ),
    Mutation(
        "cautious-decay-not-in-optax",
        "The decay is added everywhere.",
        "decay = _cautiously(decay) if cautious_decay else decay",
        "decay = decay if cautious_decay else decay",
        tests_of("optax/test_variants.py", "test_a_trajectory_is_numpy_s_on_every_logical_matrix[cautious]"),
    ),
    Mutation(
        "update-of-a-group-ignored",
        "A group's own update is not read.",
        "return UPDATES[update] if known else self.rule",
        "return self.rule",
        tests_of("torch/test_variants.py", "test_groups_have_updates_of_their_own"),
    ),
    Mutation(
        "later-options-in-every-group",
        "Groups have keys that checkpoints of before do not have, and DCP refuses them.",
        "for name, value in group.items() if name not in _LATER or value != _LATER[name]}",
        "for name, value in group.items()}",
        tests_of("test_golden_states.py", "test_a_state_of_pytorch_goes_on_as_it_would_have"),
    ),
    Mutation(
        "heads-together-that-are-no-neighbours",
        "Pairs of heads are as many matrices as there are heads.",
        "return heads // together",
        "return heads",
        tests_of("torch/test_param_groups.py", "test_some_heads_together"),
    ),
    Mutation(
        "heads-that-do-not-divide",
        "Matrices are cut through the heads.",
        "if heads % together:",
        "if False:",
        tests_of("torch/test_param_groups.py", "test_heads_that_do_not_divide_are_refused"),
    ),
    Mutation(
        "muown-moves-directions-along-themselves",
        "The gradient of a row's magnitude is left in that of its direction.",
        "return ratio * (gradient - unit * of_magnitude), {",
        "return ratio * gradient, {",
        tests_of("torch/test_variants.py", "test_a_trajectory_is_numpy_s_on_every_logical_matrix[muown]"),
    ),
    Mutation(
        "muown-forgets-the-sign",
        "A magnitude that has become negative goes on as a positive one.",
        '"direction_norms": where(magnitude < 0, -norms, norms)',
        '"direction_norms": norms',
        tests_of("torch/test_variants.py", "test_magnitudes_of_muown_may_pass_through_zero"),
    ),
    Mutation(
        "muown-has-one-magnitude",
        "The magnitudes are those of matrices and not of rows.",
        "of_magnitude = operations.sum_columns(gradient * unit)",
        "of_magnitude = operations.sum(gradient * unit) + operations.sum_columns(0 * unit)",
        tests_of("torch/test_variants.py", "test_a_trajectory_is_numpy_s_on_every_logical_matrix[muown]"),
    ),
    Mutation(
        "rows-of-the-shard",
        "Sums over columns are those of this rank's columns.",
        "dist.all_reduce(sums, group=cut)",
        "pass",
        tests_of("torch/test_row_state.py", "test_sharded_equals_whole_and_every_row_is_kept_by_those_who_have_it"),
    ),
    # Sharding: the plan
    Mutation(
        "orientation-of-the-shard",  # 22
        "Which side is the small one is decided on the rows and columns of a shard.",
        "return self.fan_out > self.fan_in",
        "return length(self.rows[0]) > length(self.columns[0])",
        tests_of("torch/test_distributed.py", "test_every_matrix_has_its_owner_in_every_chunking"),
    ),
    Mutation(
        "scale-of-the-shard",  # 20
        "The scale of the update is taken from the rows and columns that this rank has.",
        "return update_scale(shards.fan_out, shards.fan_in, ",
        "return update_scale(*(self.step.parameter.shape[-2:]), ",
        tests_of("torch/test_distributed.py", "test_sharded_equals_whole[2]"),
    ),
    Mutation(
        "strided-shards-in-plain-order",
        "The order of FSDP over tensor parallelism is ignored.",
        "placement.split_factor if is_strided_shard(placement) else 1",
        "1",
        tests_of("torch/test_sharded_clip.py", "test_indices_are_those_of_dtensor"),
    ),
    Mutation(
        "uneven-shards-rounded-down",
        "Uneven shards are as long as their size rounded down, where torch rounds up.",
        "size = -(-(stop - start) // count)",
        "size = (stop - start) // count",
        tests_of("torch/test_sharded_clip.py", "test_indices_are_those_of_chunk"),
    ),
    Mutation(
        "rest-to-the-first-ranks",
        "What is left over always goes to the first ranks, which then do the most.",
        "idlest = sorted(range(len(owners)), key=lambda owner: load[owners[owner][0]])[:rest]",
        "idlest = list(range(rest))",
        tests_of("torch/test_distributed.py", "test_what_is_left_over_goes_to_those_with_the_least_to_do"),
    ),
    Mutation(
        "gram-matrices-never-summed",
        "Long matrices are moved where summing their Gram matrices would be cheaper.",
        'return "gram" if summed < moved else "owner"',
        'return "owner"',
        tests_of("torch/test_distributed.py", "test_the_gram_matrices_are_summed_only_where_that_moves_less"),
    ),
    Mutation(
        "shared-rounds-behind-own",
        "Rounds that ranks share may come behind those that one has alone, so they meet in another order.",
        "return not (bucket.active or bucket.replicas), -bucket",
        "return False, -bucket",
        tests_of("torch/test_ranks_alike.py", "test_what_one_rank_has_alone_stands_behind_what_is_shared"),
    ),
    Mutation(
        "bytes-of-the-way-back-not-counted",
        "The plan shows the way to the owners only.",
        'add("all-to-all back", rank, owned[at] * (sum(sizes) - sizes[at]) * back)',
        "pass",
        tests_of("torch/test_distributed.py", "test_the_bytes_are_the_plan_s_and_at_the_floor[2]"),
    ),
    # Sharding: the execution
    Mutation(
        "norm-of-the-shard",
        "A matrix whose Gram matrices are summed is normalised by what this rank has of it.",
        "total = _sum(wide.abs().sum((-2, -1), keepdim=True), cut)",
        "total = wide.abs().sum((-2, -1), keepdim=True)",
        tests_of("torch/test_distributed.py", "test_sharded_equals_whole[2]"),
    ),
    Mutation(
        "gram-matrix-of-the-shard",
        "Gram matrices of columns that are divided over ranks are not summed.",
        "gram=lambda x: _sum(products.gram(x), cut)",
        "gram=products.gram",
        tests_of("torch/test_distributed.py", "test_sharded_equals_whole[2]"),
    ),
    Mutation(
        "half-of-the-wire-too-narrow",  # 16
        "Small gradients travel to their owner in float16, where they vanish.",
        "return torch.float32 if self.dtype == torch.float16 else self.dtype",
        "return self.dtype",
        tests_of("torch/test_muon.py", "test_small_gradients_survive_products_in_float16"),
    ),
    Mutation(
        "one-process-rounds-elsewhere",
        "Without a wire the momentum is normalised unrounded, so one rank and two end at different bits.",
        "torch.empty(size, dtype=bucket.iteration.sent, ",
        "torch.empty(size, dtype=bucket.iteration.sent if cut else torch.float64, ",
        tests_of("torch/test_distributed.py", "test_sharded_equals_whole[2]"),
    ),
    Mutation(
        "tiny-matrix-swallowed",
        "The norm of a whole matrix is taken as one pass finds it, where its squares vanish or overflow.",
        "sure = [_SURE[0] < norm < _SURE[1] for norm in norms]",
        "sure = [True for norm in norms]",
        tests_of("torch/test_update_pieces.py", "test_matrices_of_every_size_share_a_batch"),
    ),
    Mutation(
        "copy-runs-the-original",
        "A copy keeps a forward whose closure has methods of the model, and runs the model's own weights.",
        'or _holds_modules(state["forward"])',
        "or False",
        tests_of("torch/test_host_modes.py", "test_a_wrapper_around_the_forward_of_every_module"),
    ),
    Mutation(
        "monitor-after-the-fact",
        "A monitor compares weights with themselves: what it keeps before a step is no copy.",
        "parameter, local_part(parameter.detach()).clone()",
        "parameter, local_part(parameter.detach())",
        tests_of("torch/test_monitor.py", "test_matrices_are_those_of_linear_algebra"),
    ),
    Mutation(
        "monitor-of-one-shard",
        "A monitor shows of a matrix that ranks share what one rank has of it.",
        "    dist.all_reduce(together, group=group)\n    sums = together",
        "    sums = together",
        tests_of("torch/test_monitor.py", "test_matrices_that_ranks_share_are_seen_whole"),
    ),
    Mutation(
        "lightning-logs-every-step",
        "Lightning's callback waits for the device in every step, not in those that the Trainer logs.",
        "or every == 0 or step % every:",
        "or every == 0:",
        tests_of("torch/test_engines.py", "test_lightning_logs_what_a_monitor_sees"),
    ),
    Mutation(
        "evaluation-clips",
        "What a monitor sees in an evaluation counts for the next step of the training.",
        "clip.reset()  # the next step",
        "pass  # the next step",
        tests_of("torch/test_monitor.py", "test_an_evaluation_is_no_forward_of_the_training"),
    ),
    Mutation(
        "half-precision-gauge",
        "Powers of two are tried in float16, where small numbers lose bits.",
        "self._keeps_graph, self._widens = False, _is_half(model)",
        "self._keeps_graph, self._widens = False, False",
        tests_of("torch/test_proof.py", "test_a_declaration_is_tried_with_the_range_that_half_precision_lacks"),
    ),
    Mutation(
        "everything-at-once",
        "A processor takes all matrices of one shape from stage to stage, out of its cache.",
        'min(threads * PIECE_BYTES, workspace_bytes) if device_type == "cpu" else workspace_bytes',
        "workspace_bytes",
        tests_of("torch/test_update_pieces.py", "test_a_processor_takes_few_matrices_at_once"),
    ),
    Mutation(
        "neighbours-options-taken",
        "Matrices that step together have the decay of the first one's group.",
        "ours.step.options is theirs.step.options",
        "True",
        tests_of("torch/test_update_pieces.py", "test_matrices_that_step_together_move_as_they_do_alone"),
    ),
    Mutation(
        "factor-rounded-to-bf16",
        "Weights in bf16 that step together decay by a factor rounded to bf16.",
        "if weights[0].dtype in (torch.float32, torch.float64):",
        "if True:",
        tests_of("torch/test_update_pieces.py", "test_matrices_that_step_together_move_as_they_do_alone"),
    ),
    Mutation(
        "copies-updated-for-views",
        "Matrices that are no views of their parameter step together as copies, and are not written back.",
        "if any(write_back is not None for _, write_back in opened):",
        "if False:",
        tests_of("torch/test_update_pieces.py", "test_matrices_that_step_together_move_as_they_do_alone"),
    ),
    Mutation(
        "form-chosen-for-unjudged-polynomials",
        "Any polynomials run in the Gram form where it is cheaper.",
        'if gram_restarts(ns_coefficients, ns_steps) is None:\n        return "standard"',
        "if False:\n        pass",
        tests_of("torch/test_update_pieces.py", "test_the_form_is_chosen_by_the_shape_and_the_polynomials"),
    ),
    Mutation(
        "half-of-a-product-not-mirrored",
        "The block above the diagonal of a symmetric product is that below it, not turned.",
        "result[:half, half:].copy_(below.mT)",
        "result[:half, half:].copy_(below[:, : len(a) - half])",
        tests_of("torch/test_update_pieces.py", "test_symmetric_products_by_halves_are_the_whole_ones"),
    ),
    Mutation(
        "replica-keeps-its-own-update",
        "Where replicas divide an uneven number of matrices, each is given the first one's.",
        "dist.broadcast(updates, group_src=source, group=replicas, async_op=True)",
        "dist.broadcast(updates, group_src=0, group=replicas, async_op=True)",
        tests_of("torch/test_distributed.py", "test_sharded_equals_whole[2]"),
    ),
    Mutation(
        "unused-experts-judged-by-the-shard",
        "Whether an expert got a token is decided by the rows that this rank has.",
        "dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.cut)",
        "pass",
        tests_of("torch/test_distributed.py", "test_sharded_equals_whole[2]"),
    ),
    Mutation(
        "gradient-gathered-in-silence",  # 24
        "A gradient that would have to be gathered whole is gathered instead of refused.",
        "if any(have != want and not (is_partial(have) or is_replicate(have)) for have, want in pairs):",
        "if False:",
        tests_of("torch/test_muon.py", "test_what_cannot_be_updated_shard_by_shard_is_refused_before_anything_moves"),
    ),
    Mutation(
        "norm-without-ranks-that-have-no-gradient",  # 24
        "A rank without gradients leaves out the sum over ranks, for which the others wait.",
        "parts = by_sharding.setdefault(key, [])\n        if parameter.grad is not None:\n"
        "            parts.append(local_part(parameter.grad))",
        "if parameter.grad is not None:\n"
        "            by_sharding.setdefault(key, []).append(local_part(parameter.grad))",
        tests_of("torch/test_ranks_alike.py", "test_the_norm_of_gradients_takes_the_same_sums_on_every_rank"),
    ),
    # Sharding: the clip
    Mutation(
        "rows-between-the-heads-scaled",  # 4
        "On a shard the rows between the parts of two heads are scaled as well.",
        "inside = (offset >= 0) & (head < rows.num_heads) & (offset % rows.step < rows.size)",
        "inside = (offset >= 0) & (head < rows.num_heads)",
        tests_of("torch/test_sharded_clip.py", "test_each_rank_scales_its_own_rows_and_no_others"),
    ),
    Mutation(
        "heads-of-the-first-rank",
        "Under tensor parallelism every rank's maxima go to the first heads.",
        "return held[0]\n",
        "return 0\n",
        tests_of("torch/test_sharded_clip.py", "test_heads_of_a_tensor_parallel_forward_go_to_their_places"),
    ),
    Mutation(
        "own-step-of-the-ring-alone",
        "Of a ring the first step is observed: this rank's own keys.",
        "        steps += 1\n        take(step)\n",
        "        steps += 1\n        if steps == 1:\n            take(step)\n",
        tests_of("torch/test_context_parallel.py", "test_steps_are_shown_to_whoever_runs_the_ring_alone"),
    ),
    Mutation(
        "masked-pairs-of-the-ring",
        "The pairs that causality forbids in a step of the ring are observed, too.",
        "take(RingStep(query, key, bool(is_causal), ranks))",
        "take(RingStep(query, key, False, ranks))",
        tests_of("torch/test_context_parallel.py", "test_steps_are_shown_to_whoever_runs_the_ring_alone"),
    ),
    Mutation(
        "unseen-rings-pass",
        "A ring of which no step was seen counts as observed.",
        "        raise ValueError(UNSEEN_RING)\n",
        "        pass\n",
        tests_of("torch/test_context_parallel.py", "test_a_ring_of_which_no_step_is_seen_is_an_error"),
    ),
    Mutation(
        "ring-left-out-of-the-group",
        "Ranks that share sequences may clip each by its own part.",
        "        if not ranks <= together:\n",
        "        if not ranks & together:\n",
        tests_of("torch/test_context_parallel.py", "test_ranks_that_share_sequences_have_to_clip_together"),
    ),
    Mutation(
        "divided-heads-of-the-first-rank",
        "Every rank's part of the heads that Ulysses divides is taken for the first.",
        "self.first_of(count * divided.size, seen) + divided.rank * count",
        "self.first_of(count * divided.size, seen)",
        tests_of("torch/test_context_parallel.py", "test_divided_heads_fill_their_own_part_of_the_statistic"),
    ),
    Mutation(
        "sequences-taken-for-heads",
        "Two sequences of half of the heads are taken for one of all.",
        "        if q.ndim == 4:\n            return q.shape[1]\n        count = None",
        "        count = None",
        tests_of(
            "torch/test_context_parallel.py", "test_heads_that_nobody_says_are_divided_are_not_taken_for_sequences"
        ),
    ),
    Mutation(
        "group-of-the-smallest-mesh",  # 6
        "The maxima are joined over the smallest mesh, and replicas drift apart.",
        "largest = max(sets, key=len)",
        "largest = min(sets, key=len)",
        tests_of("torch/test_sharded_clip.py", "test_the_group_is_that_of_the_largest_mesh"),
    ),
    Mutation(
        "no-maximum-over-ranks",  # 6
        "Each rank clips by the maxima of its own micro-batch.",
        "dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=group)\n",
        "pass\n",
        tests_of("torch/test_sharded_clip.py", "TestOnRanks::test_a_rank_that_saw_nothing_takes_part[2]"),
    ),
    Mutation(
        "maxima-summed-over-ranks",  # 5, 6
        "The maxima of the ranks are added up.",
        "dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=group)\n",
        "dist.all_reduce(packed, op=dist.ReduceOp.SUM, group=group)\n",
        tests_of("torch/test_sharded_clip.py", "TestOnRanks::test_shards_are_clipped_as_the_whole_model_is[2]"),
    ),
    Mutation(
        "two-collectives-a-step",  # 6
        "The maxima are reduced twice.",
        "dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=group)\n",
        "dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=group)\n"
        "        dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=group)\n",
        tests_of("torch/test_sharded_clip.py", "TestOnRanks::test_one_collective_and_nothing_else[2]"),
    ),
    Mutation(
        "idle-on-one-rank-only",
        "Whether there is something to do is decided by each rank for itself.",
        "dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)",
        "pass",
        tests_of(
            "torch/test_sharded_clip.py", "TestOnRanks::test_all_ranks_know_alike_whether_there_is_something_to_do[2]"
        ),
    ),
    # Optax: the clip
    Mutation(
        "sown-extras-ignored",
        "What else a model sows is left out in silence.",
        "if extra or any(len(leaves) != 1 for leaves in found.values()):",
        "if any(len(leaves) < 1 for leaves in found.values()):",
        tests_of("optax/test_known_attention.py", "test_maxima_are_taken_by_name_as_layers_sow_them"),
    ),
    Mutation(
        "fused-keys-behind-too-few-queries",
        "The keys of a fused array start a head too early.",
        'starts = {"q": 0, "k": num_heads * head_dim}',
        'starts = {"q": 0, "k": groups * head_dim}',
        tests_of("optax/test_declarations.py", "test_one_call_declares_a_fused_array"),
    ),
    Mutation(
        "suggestion-cannot-be-followed",
        "Projections of different widths are suggested as multi-head attention.",
        '    if one == other:\n        return f"QKProjection.mha',
        '    if one:\n        return f"QKProjection.mha',
        tests_of(
            "optax/test_known_attention.py", "test_the_suggested_declaration_works_when_its_numbers_are_filled_in"
        ),
    ),
    Mutation(
        "check-takes-any-maxima",
        "Maxima that follow their queries pass, whatever their scale and mask.",
        "<= rounding * np.abs([maxima, each]).max()",
        "<= np.inf * np.abs([maxima, each]).max()",
        tests_of("optax/test_check_maxima.py", "test_wrong_maxima_are_named_with_their_likely_cause"),
    ),
    Mutation(
        "check-blames-what-it-does-not-see",
        "Maxima count as too large where the larger logits are in a branch.",
        "if not is_whole and (maxima >= largest).all():",
        "if (maxima > np.inf).all():",
        tests_of("optax/test_check_maxima.py", "test_a_softmax_half_of_which_is_out_of_sight_raises_no_false_alarm"),
    ),
    Mutation(
        "check-without-the-shapes",
        "What init refuses passes check.",
        "    scaled_rows(projections, arrays)\n    shapes = shapes_of(arrays)",
        "    shapes = shapes_of(arrays)",
        tests_of("optax/test_check_maxima.py", "test_what_init_refuses_is_refused_before_anything_runs"),
    ),
    Mutation(
        "optax-missing-maxima-ignored",  # 11
        "An update without maxima clips nothing.",
        'raise TypeError(\n                "qk_clip needs the maximum logits',
        'return updates, state\n            raise TypeError(\n                "qk_clip needs the maximum logits',
        tests_of("optax/test_qk_clip.py", "test_a_missing_maximum_is_a_type_error"),
    ),
    Mutation(
        "optax-clips-the-old-weights",
        "The parameters are scaled and the update is not.",
        "target = factor * (old + update.astype(dtype))",
        "target = factor * old + update.astype(dtype)",
        tests_of("optax/test_qk_clip.py", "test_it_corrects_the_sum_of_parameters_and_updates"),
    ),
    Mutation(
        "optax-difference-in-bf16",  # 41
        "γ·(w + u) − w is computed in the dtype of the parameters.",
        "dtype = wide(weight.dtype)\n    factor, old",
        "dtype = weight.dtype\n    factor, old",
        tests_of("optax/test_qk_clip.py", "test_a_strong_clip_of_narrow_weights_takes_as_many_steps_as_halves"),
    ),
    Mutation(
        "optax-only-observed-attention-scaled",  # 9
        "An attention with a reason is scaled.",
        "if projection.reason:\n            continue",
        "if False:\n            continue",
        tests_of("optax/test_qk_clip.py", "test_a_reason_only_observes"),
    ),
    Mutation(
        "optax-one-factor-for-all-layers",  # 5
        "All scanned layers take the smallest factor of a head.",
        "rows = rows.at[..., self.index.ravel()].set(",
        "factors = jnp.broadcast_to(factors.min(tuple(range(len(lead)))), factors.shape)\n"
        "        rows = rows.at[..., self.index.ravel()].set(",
        tests_of("optax/test_qk_clip.py", "test_scanned_layers_have_a_factor_per_layer_and_head"),
    ),
    Mutation(
        "optax-bias-not-scaled",  # 8
        "The bias beside a kernel keeps its size.",
        "            made.append(RowsOfArray(name, index, self.layer_axis, shape, None))\n",
        "            pass\n",
        tests_of("optax/test_qk_clip.py", "test_every_head_ends_at_min_of_maximum_and_tau"),
    ),
    Mutation(
        "optax-strong-clip-of-bf16-at-once",
        "A factor below ½ is applied to bf16 weights in one step, whose rounding it does not survive.",
        "if not wide_updates:",
        "if False:",
        tests_of("optax/test_qk_clip.py", "test_a_strong_clip_of_narrow_weights_takes_as_many_steps_as_halves"),
    ),
    Mutation(
        "optax-sizes-of-heads-unchecked",
        "Queries and keys of a head may differ in size.",
        "if sizes[0] != sizes[1] and len(query) == len(key):",
        "if False:",
        tests_of("optax/test_declarations.py", "test_a_declaration_that_the_shapes_contradict_is_an_error_at_init"),
    ),
    Mutation(
        "optax-adamw-half-unchecked",
        "Keys and values of the AdamW half are handed on as they come.",
        "    _check_adamw(options)\n",
        "",
        tests_of("optax/test_wrong_arguments.py", "test_a_wrong_argument_of_the_adamw_half_is_named"),
    ),
    Mutation(
        "optax-heads-last-as-heads-first",
        "Rows of heads that run fastest are taken for rows of heads that follow one another.",
        "return self.num_heads * of_head + heads if self.heads_last else stride * heads + of_head",
        "return stride * heads + of_head",
        tests_of("optax/test_declarations.py", "test_the_rows_of_the_loud_head_are_scaled_and_no_others"),
    ),
    Mutation(
        "optax-normalised-queries-found-as-plain",
        "Modules that normalise queries and keys are clipped, which changes nothing but their weights.",
        'return replace(projection, reason="QK-norm") if attention.normalized else projection',
        "return projection",
        tests_of(
            "optax/test_known_attention.py", "test_scanned_layers_grouped_keys_and_normalised_queries_are_told_apart"
        ),
    ),
    Mutation(
        "optax-overridden-attention-found-as-known",
        "A class of the user's own that derives from Flax's attention counts as one whose computation is known.",
        'return calls.__module__.partition(".")[0] == known.__module__.partition(".")[0]',
        "return True",
        tests_of("optax/test_known_attention.py", "test_attentions_of_own_classes_are_named_with_what_to_write"),
    ),
    Mutation(
        "optax-sown-maxima-by-order",
        "Maxima that layers have sown go to the attentions in their order, not by their names.",
        "return [named[leaves[0]] for leaves in found.values()]",
        "return given",
        tests_of("optax/test_known_attention.py", "test_maxima_are_taken_by_name_as_layers_sow_them"),
    ),
    Mutation(
        "optax-check-without-scale",
        "The proof does not scale queries alone, and takes wrongly grouped heads.",
        "if _same([before * powers], [after], tolerance):",
        "if True:",
        tests_of("optax/test_check.py", "test_a_wrong_one_is_named"),
    ),
    Mutation(
        "optax-adapter-left-behind",
        "The base is scaled and the adapter is not.",
        'if _adapter_part(name) == "b":',
        "if False:",
        tests_of("optax/test_declarations.py", "test_base_and_adapter_are_scaled_together"),
    ),
    Mutation(
        "optax-tau-below-zero-scales",
        "A traced τ that is not positive multiplies queries.",
        "jnp.logical_and(tau > 0, jnp",
        "jnp.logical_and(True, jnp",
        tests_of("optax/test_qk_clip.py", "test_a_traced_setting_that_cannot_be_used_scales_nothing_and_is_counted"),
    ),
    Mutation(
        "optax-accumulated-maxima-broadcast",
        "Accumulation takes maxima of any shape that broadcasts.",
        "            check_shape(name, maximum, old.shape)\n",
        "            pass\n",
        tests_of("optax/test_accumulation.py", "test_maxima_of_another_shape_are_refused_before_they_are_broadcast"),
    ),
    Mutation(
        "optax-nonfinite-maximum-scales",
        "A NaN among the maxima reaches the weights.",
        "return jnp.where(bad, -jnp.inf, maximum), bad",
        "return maximum, bad",
        tests_of("optax/test_qk_clip.py", "test_a_maximum_that_is_not_finite"),
    ),
    Mutation(
        "optax-overlapping-declarations-accepted",  # 41
        "Two declarations scale the same rows.",
        "if overlapping(parts):",
        "if False:",
        tests_of("optax/test_qk_clip.py", "test_what_does_not_fit_is_an_error"),
    ),
    Mutation(
        "optax-rope-of-mla-takes-the-root",  # 4
        "The rotary queries of MLA take √γ.",
        "for part, side in factors_of(declared, fixed).items():",
        "for part, side in ((p, 'query' if f == 'gamma' else f) for p, f in factors_of(declared, fixed).items()):",
        tests_of("optax/test_qk_clip.py", "test_multi_head_latent_attention"),
    ),
    Mutation(
        "optax-last-micro-step-kept",  # 5
        "Accumulation keeps the maxima of the last micro-step.",
        "jnp.maximum(old, new).astype(old.dtype)",
        "new.astype(old.dtype)",
        tests_of(
            "optax/test_accumulation.py",
            "test_a_maximum_of_the_first_micro_step_alone_decides_and_optax_multisteps_loses_it",
        ),
    ),
    Mutation(
        "optax-accumulation-keeps-old-maxima",
        "The maxima of a step count in the next one.",
        "max_logits=jax.tree.map(lambda maximum: jnp.full_like(maximum, -jnp.inf), maxima),",
        "max_logits=maxima,",
        tests_of("optax/test_accumulation.py"),
    ),
    # Optax: the statistic
    Mutation(
        "optax-scale-ignores-the-root",  # 12
        "The default scale is 1/d.",
        "1 / math.sqrt(query.shape[-1]) if scale is None else scale)",
        "1 / query.shape[-1] if scale is None else scale)",
        tests_of(
            "optax/test_max_logits.py", "test_negative_maxima_stay_negative", "test_the_output_is_the_hosts_bit_for_bit"
        ),
    ),
    Mutation(
        "optax-maximum-before-the-mask",  # 12
        "Forbidden pairs count.",
        "logits = jnp.where(allowed, logits, -math.inf)\n        return _max",
        "pass\n        return _max",
        tests_of("optax/test_max_logits.py", "test_the_pairs_are_those_to_which_the_host_gives_weight"),
    ),
    Mutation(
        "optax-bias-of-minus-1e4-allows",  # 27
        "Only −inf in a bias masks.",
        "permitted = ~is_masked(bias, xp=jnp)",
        "permitted = ~(bias == -jnp.inf)",
        tests_of("optax/test_max_logits.py", "test_a_bias_that_forbids_is_a_mask_and_one_that_does_not_is_no_part"),
    ),
    Mutation(
        "optax-nan-hidden",
        "XLA's own maximum loses a NaN.",
        "return jnp.where(jnp.isnan(x).any(axis), math.nan, x.max(axis, initial=initial))",
        "return x.max(axis, initial=initial)",
        tests_of("optax/test_max_logits.py", "test_nan_is_not_hidden_by_larger_logits"),
    ),
    Mutation(
        "optax-default-precision",
        "The products of the statistic have the accelerator's default precision.",
        "precision=jax.lax.Precision.HIGHEST",
        "precision=None",
        tests_of("optax/test_max_logits.py", "test_the_products_ask_for_the_highest_precision"),
    ),
    Mutation(
        "optax-certificate-of-rounded-products",  # 10
        "The log-sum-exp of a kernel that rounds its products certifies.",
        "return top + norm_bounds / 128",
        "return top",
        tests_of("optax/test_max_logits.py", "test_products_rounded_down_by_a_kernel_certify_nothing_above_tau"),
    ),
    Mutation(
        "optax-gradient-through-the-statistic",
        "The maxima have a gradient.",
        "jax.lax.stop_gradient((_batched(query), _batched(key)))\n    dtype = _statistic_dtype(query, key)\n    batch",
        "_batched(query), _batched(key)\n    dtype = _statistic_dtype(query, key)\n    batch",
        tests_of("optax/test_max_logits.py", "test_no_gradient_passes_through_a_maximum"),
    ),
    # Optax: Muon and its plan
    Mutation(
        "optax-nesterov-bias-corrected-by-default",  # 21
        "Nesterov's terms are corrected as optax does it, where torch's convention was asked for.",
        'if momentum.nesterov == "bias_corrected":',
        "if momentum.nesterov:",
        tests_of("optax/test_muon.py", "test_torch_s_nesterov_differs_from_optax_s_in_the_first_steps_only")
        + tests_of("optax/test_muon.py", "test_trajectory_is_that_of_numpy_with_an_svd"),
    ),
    Mutation(
        "optax-momentum-in-bf16",
        "The momentum is averaged in its own dtype.",
        "summed = wide(dtype)\n\n    def lerp",
        "summed = dtype\n\n    def lerp",
        tests_of("optax/test_muon.py", "test_momentum_has_its_own_dtype"),
    ),
    Mutation(
        "optax-fused-gate-up-as-one-matrix",
        "A fused gate|up of experts is orthogonalised as one matrix.",
        "if module_of(name) not in GATE_UP_NAMES or shape[out] % 2:",
        "if True:",
        tests_of("optax/test_plan.py", "test_fused_gate_and_up_of_experts_are_two_matrices_each"),
    ),
    Mutation(
        "optax-hidden-sharding-accepted",  # 24
        "Arrays whose sharding a jitted update cannot see are gathered in silence.",
        "if hidden & {name for axes in sharding.spec for name in _names(axes)}:",
        "if False:",
        tests_of("optax/test_sharding.py", "test_a_sharding_that_a_jitted_update_cannot_see_is_an_error"),
    ),
    Mutation(
        "optax-way-back-in-the-wrong-order",
        "What was brought together over two axes goes back in the same order.",
        "for axis, names in reversed(moves):",
        "for axis, names in moves:",
        tests_of("optax/test_sharding.py", "test_sharded_is_whole"),
    ),
    # What a host has around a model
    Mutation(
        "observers-in-selective-checkpointing",
        "The modes of the host see what observes.",
        "if torch.compiler.is_compiling() or not is_seen():\n            return function",
        "if True:\n            return function",
        tests_of("torch/test_host_modes.py", "test_selective_checkpointing_keeps_nothing_of_the_observers"),
    ),
    Mutation(
        "reading-of-traces-seen",
        "The modes of the host see how traces are read.",
        "with outside_modes():\n        return _read(",
        "if True:\n        return _read(",
        tests_of("torch/test_host_modes.py", "test_who_sees_what_runs_sees_what_runs_without_a_clip"),
    ),
    Mutation(
        "trace-counted",
        "The modes of the host see the traced forward.",
        "for context in (outside_modes(), PATCHES.used(model)",
        "for context in (PATCHES.used(model)",
        tests_of("torch/test_host_modes.py", "test_who_sees_what_runs_sees_what_runs_without_a_clip"),
    ),
    Mutation(
        "hooks-on-all-modules-run-in-a-trace",
        "The host's hooks on all modules of the process run for the copy, too.",
        '| {name: {} for name in vars(sys.modules[nn.Module.__module__]) if name.startswith("_global_")}',
        "| {}",
        tests_of("torch/test_host_modes.py", "test_who_sees_what_runs_sees_what_runs_without_a_clip"),
    ),
    Mutation(
        "score-tracker-in-front-of-modes",
        "The observer of attention that is written out takes torch's own apart before the host's modes have seen it.",
        "_replace_function_modes([*modes[:outer], self, *modes[outer:]])",
        "_replace_function_modes([*modes, self])",
        tests_of("torch/test_host_modes.py", "test_who_sees_what_runs_sees_what_runs_without_a_clip[Functions-Torchs]"),
    ),
    Mutation(
        "checkpoints-in-a-trace",
        "Re-entrant checkpoints forbid gradients by some tensors in a traced forward.",
        "return run(*args) if is_experiment() else apply(run, preserve, *args)",
        "return apply(run, preserve, *args)",
        tests_of("torch/test_host_modes.py", "test_reentrant_checkpoints_before_the_attention"),
    ),
    Mutation(
        "anomalies-of-the-search",
        "Anomaly detection judges the derivatives of the search.",
        "torch.set_anomaly_enabled(False)",
        "pass",
        tests_of("torch/test_host_modes.py", "test_a_nan_on_a_side_that_does_not_matter_is_no_anomaly_of_the_search"),
    ),
    Mutation(
        "unclaimed-attention-is-silent",
        "What weighs values by products that nobody has recorded is no error.",
        "return self._weigh(one.weights) if other.is_value else PROJECTED",
        "return PROJECTED",
        tests_of(
            "torch/test_unclaimed_attention.py",
            "test_attention_that_nobody_observes_is_an_error_by_name_unless_it_is_ignored[ByHand]",
        ),
    ),
    Mutation(
        "recorded-attention-is-unclaimed",
        "Attention that the tracer has recorded is said not to be observed.",
        "self._scores[each].claimed = True",
        "pass",
        tests_of("torch/test_unclaimed_attention.py", "test_attention_that_is_written_out_and_found_is_no_error"),
    ),
    Mutation(
        "weighing-by-scatter-is-not-seen",
        "Values that are weighed and scattered to their nodes are not seen.",
        'if kind == "scatter" and joint.product.weights:',
        "if False:",
        tests_of(
            "torch/test_unclaimed_attention.py",
            "test_attention_that_nobody_observes_is_an_error_by_name_unless_it_is_ignored[Scattered]",
        ),
    ),
    Mutation(
        "a-norm-leaves-scores",
        "A product behind a norm counts as logits, whose size it does not have.",
        '"norm" if any(part in name for part in _NORMS) else kind',
        '"" if any(part in name for part in _NORMS) else kind',
        tests_of("torch/test_unclaimed_attention.py", "test_what_is_no_attention_is_no_error[Dynamic]"),
    ),
    Mutation(
        "a-router-pools",
        "A router of experts is listed as a softmax that weighs along the tokens.",
        "return joint._replace(is_pooling=result.shape[args[1]] != joint.features)",
        "return joint._replace(is_pooling=True)",
        tests_of("torch/test_unclaimed_attention.py", "test_what_is_no_attention_is_no_error[Experts]"),
    ),
    Mutation(
        "affine-is-not-linear",
        "An operation that adds something to what is linear passes for attention.",
        "wanted, found = 8 * (self._base[0] - zero), eightfold - zero",
        "wanted, found = 8 * self._base[0], eightfold",
        tests_of("torch/test_unclaimed_attention.py", "test_what_has_no_logits_is_left_alone_and_listed"),
    ),
    Mutation(
        "a-loss-weighs-something",
        "A fused contrastive loss passes for attention.",
        "weighs = factor != 1 or any(self._moves(each, 8.0) for each in others)",
        "weighs = True",
        tests_of("torch/test_unclaimed_attention.py", "test_what_is_no_attention_is_no_error[FusedContrast]"),
    ),
    Mutation(
        "an-apply-kept-early",
        "Autograd functions are seen only by those who look `apply` up in the class.",
        "self._apply.__code__ = _replacement().__code__",
        "pass",
        tests_of(
            "torch/test_unclaimed_attention.py",
            "test_attention_that_nobody_observes_is_an_error_by_name_unless_it_is_ignored[Applied]",
        ),
    ),
    Mutation(
        "ignore-lost-in-a-copy",
        "A copy of model and clip does not ignore what it was told to.",
        '"_traced", "ignored", "without_logits"),',
        '"_traced", "without_logits"),',
        tests_of("torch/test_unclaimed_attention.py", "test_ignore_is_kept_in_copies"),
    ),
    Mutation(
        "autocast-keeps-casts-of-a-copy",
        "The cache of autocast holds casts of the copy's weights.",
        "torch.set_autocast_cache_enabled(False)",
        "torch.set_autocast_cache_enabled(True)",
        tests_of("torch/test_host_modes.py", "test_the_cache_of_autocast_gets_no_weight_of_a_copy"),
    ),
    Mutation(
        "attention-in-a-backward-is-the-modules",
        "Attention that a backward within a forward runs is taken for a call of the module.",
        " and handler.graph_task == graph_task() else None",
        " else None",
        tests_of("torch/test_host_modes.py", "test_attention_in_a_backward_within_a_forward_is_nobodys"),
    ),
    Mutation(
        "process-state-never-put-back",
        "A trace that could not begin counts as running for ever.",
        "            if not self._users:\n                with",
        "            self._users += 1\n            if self._users == 1:\n                with",
        tests_of("torch/test_host_modes.py", "test_what_a_trace_could_not_change_leaves_the_next_one_undisturbed"),
    ),
    Mutation(
        "wrapped-forwards-are-foreign",
        "A module with a wrapper around its forward, such as accelerate's, counts as one that runs something else.",
        "around += [each for each in _inside_of(forward) if id(each) not in seen]",
        "around += []",
        tests_of("torch/test_host_modes.py", "test_a_wrapper_around_the_forward_of_every_module"),
    ),
    Mutation(
        "weights-of-torchscript-not-shared",
        "A copy of a module in TorchScript has weights of its own, which are nobody's.",
        "setattr(functools.reduce(getattr, inner, replica), attribute, memo[id(parameter)])",
        "pass",
        tests_of("torch/test_host_modes.py", "test_projections_of_torchscript_are_clipped_as_others"),
    ),
    Mutation(
        "jagged-sequences-meet",
        "Queries of one jagged sequence count with the keys of another.",
        "return replace(call, q=q[None], k=k[None], v=v[None], **pairs)",
        "return replace(call, q=q[None], k=k[None], v=v[None])",
        tests_of("torch/test_host_modes.py", "test_jagged_sequences"),
    ),
    Mutation(
        "cached-positions-are-no-projection",
        "Keys of which some are from a cache count as keys of no projection.",
        "        if not own.all():  # the others are from a cache",
        "        if False:",
        tests_of("torch/test_host_modes.py", "test_with_and_without_a_cache_it_is_the_same_attention"),
    ),
    Mutation(
        "cached-keys-are-another-attention",
        "An attention whose keys are all from a cache is another one.",
        "if call.query.rows and call.key.problem == CONSTANT else None",
        "if False else None",
        tests_of("torch/test_host_modes.py", "test_keys_that_are_all_cached_are_those_of_another_forward"),
    ),
    Mutation(
        "other-parameters-observed",
        "What a model shows with the parameters of another one counts.",
        "with nullcontext() if reason is None else unobserved(reason):",
        "with nullcontext():",
        tests_of("torch/test_host_modes.py", "test_functional_call_with_other_parameters_is_not_observed"),
    ),
    Mutation(
        "observed-inside-transforms",
        "Inside a transform of torch.func the observers do not stand aside.",
        "if peek_interpreter_stack() is not None:",
        "if False:",
        tests_of(
            "torch/test_host_modes.py",
            "test_gradients_of_torch_func_are_those_without_a_clip_and_the_step_says_that_nothing_was_observed",
        ),
    ),
    Mutation(
        "exported-observers",
        "An exported program has the observers in it.",
        "return _EXPORT if is_exporting() else _of_thread.unobservable",
        "return _of_thread.unobservable",
        tests_of("torch/test_host_modes.py", "test_an_export_is_that_without_a_clip"),
    ),
    Mutation(
        "transform-next-to-training-unsaid",
        "Nothing is said where an attention was observed and also ran inside a transform.",
        "            if reason.trains and any(p.grad is not None",
        "            if False and any(p.grad is not None",
        tests_of("torch/test_host_modes.py", "test_a_transform_of_the_model_itself_next_to_the_training_is_said_once"),
    ),
    Mutation(
        "spectral-scale-by-the-longer-side",
        "The spectral scale grows with a matrix, as that of AdamW's RMS does.",
        "return math.sqrt(fan_out / fan_in)",
        "return math.sqrt(max(fan_out, fan_in) / 16)",
        tests_of(
            "benchmarks/test_coordinate_check.py", "test_changes_are_the_same_at_every_width_but_for_the_rms_of_adamw"
        ),
    ),
    # Heads that are declared by pattern
    Mutation(
        "last-pattern-counts",
        "Of several patterns of layouts= that fit, the last counts.",
        "next((p for p in layouts if any(fnmatch",
        "next((p for p in reversed(layouts) if any(fnmatch",
        tests_of("core/test_declared_layouts.py", "test_a_pattern_fits_a_parameter_or_its_module_and_the_first_counts"),
    ),
    Mutation(
        "declared-heads-of-one-row",
        "layouts= may leave single rows, whose update is their gradient's direction.",
        "if is_one_row(matrices):\n        raise",
        "if False:\n        raise",
        tests_of("core/test_declared_layouts.py", "test_what_does_not_fit_is_refused_with_pattern_and_parameter"),
    ),
    Mutation(
        "declared-heads-not-in-the-plan-of-a-module",
        "MuonClip takes layouts= and does not pass it to its plan.",
        "return with_layouts(planned, layouts, plain_name=plain_name)",
        "return planned",
        tests_of("torch/test_declared_layouts.py", "test_the_plan_prints_the_heads_and_what_is_not_named_stays"),
    ),
    Mutation(
        "declared-heads-in-optax-not-in-the-update",
        "Optax's muonclip takes layouts= and updates whole matrices.",
        "plan(params, muon_weight_dimension_numbers, qk_projections, layouts=layouts, rest=rest)",
        "plan(params, muon_weight_dimension_numbers, qk_projections, rest=rest)",
        tests_of("optax/test_declared_layouts.py", "test_a_trajectory_is_numpy_s_head_by_head"),
    ),
    # The reference model
    Mutation(
        "yarn-scale-not-squared",  # 12
        "The softmax scale has YaRN's mscale once.",
        "return yarn_mscale(self.yarn_factor, self.yarn_mscale_all_dim) ** 2 / math.sqrt(self.qk_head_dim)",
        "return yarn_mscale(self.yarn_factor, self.yarn_mscale_all_dim) / math.sqrt(self.qk_head_dim)",
        tests_of("models/test_config.py", "test_the_temperature_of_yarn_reaches_the_logits"),
    ),
    Mutation(
        "qk-norm-model-declared-as-scaled",  # 9
        "With QK-norm the reference model in JAX declares its projections to be scaled.",
        "if config.qk_norm:\n            reason",
        "if False:\n            reason",
        tests_of("models/test_jax_moe.py", "test_with_qk_norm_the_attention_is_observed_only"),
    ),
    Mutation(
        "latents-decoded-without-the-inverse-rms",
        "The keys' RMS is left out where QK-normed latent attention is decoded from its latents.",
        "logits = logits * cache.inverse_rms.transpose(1, 2)[:, :, None]",
        "pass",
        tests_of("models/test_latent_decoding.py", "test_decoding_from_latents_is_the_forward_to_rounding"),
    ),
    Mutation(
        "rms-of-latent-keys-without-the-shared-part",
        "The RMS of a key that is decoded from a latent is of the head's own part alone.",
        "squares = nope.square().sum(-1) + at_least_float32(shared).square().sum(-1, keepdim=True)",
        "squares = nope.square().sum(-1)",
        tests_of("models/test_latent_decoding.py", "test_decoding_from_latents_is_the_forward_to_rounding"),
    ),
    Mutation(
        "gain-of-latent-keys-not-absorbed",
        "The query that meets latents does not take the gain of the keys.",
        "nope = nope * attn.k_norm.weight[: config.qk_nope_head_dim]",
        "pass",
        tests_of("models/test_latent_decoding.py", "test_decoding_from_latents_is_the_forward_to_rounding"),
    ),
    Mutation(
        "correction-bias-weighs",
        "The bias that balances the experts weighs their outputs, too.",
        "weights = scores.gather(1, chosen)",
        "weights = (scores + self.correction_bias).gather(1, chosen)",
        tests_of("models/test_torch_moe.py", "test_the_correction_bias_chooses_but_does_not_weigh"),
    ),
    Mutation(
        "load-of-one-rank",  # 6
        "Each rank balances the experts by its own tokens.",
        "dist.all_reduce(loads)",
        "pass",
        tests_of("models/test_torch_moe.py", "test_the_load_is_summed_over_ranks"),
    ),
    Mutation(
        "balance-away-from-the-mean",
        "Busy experts become busier.",
        "(loads.mean(1, keepdim=True) - loads).sign()",
        "(loads - loads.mean(1, keepdim=True)).sign()",
        tests_of("models/test_torch_moe.py", "test_the_step_hook_balances_the_experts"),
    ),
    Mutation(
        "up-before-gate",
        "The first half of the rows is up, the second gate.",
        "return F.silu(gate) * up",
        "return F.silu(up) * gate",
        tests_of("models/test_torch_moe.py", "test_gate_rows_come_first"),
    ),
    Mutation(
        "gradient-of-a-divided-layer-not-summed",
        "What enters a layer that is divided over ranks has the gradient of this rank's part.",
        "run_check=False).to_local(grad_placements=[Partial()])",
        "run_check=False).to_local(grad_placements=[Replicate()])",
        tests_of(
            "models/test_parallel.py",
            "test_losses_and_every_gradient_are_those_of_the_whole_model[2 ranks: tensor 2, mha, none shared]",
        ),
    ),
    Mutation(
        "gate-of-another-rank",
        "Under tensor parallelism a rank keeps the rows of gate and up that it stores.",
        "if isinstance(placement, Shard) and placement.dim == parameter.ndim - 2:",
        "if False:",
        tests_of(
            "models/test_parallel.py",
            "test_losses_and_every_gradient_are_those_of_the_whole_model[2 ranks: tensor 2, mha, none shared]",
        ),
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these mutations")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="how many to run at once (1)")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="of one run of pytest (600)")
    parser.add_argument("--list", action="store_true", help="show names, files and tests; run nothing")
    options = parser.parse_args()
    assert len({each.name for each in MUTATIONS}) == len(MUTATIONS), "two mutations have the same name"
    wanted = [each for each in MUTATIONS if options.only is None or each.name in options.only]
    if missing := set(options.only or ()) - {each.name for each in wanted}:
        parser.error(f"--only {' '.join(sorted(missing))}: unknown")
    if not options.list and importlib.util.find_spec("torchao") is None:
        wanted = [each for each in wanted if not any(test.startswith("tests/engines/") for test in each.tests)]
    sources = [{path: path.read_text() for path in sorted((ROOT / room).rglob("*.py"))} for room in ROOMS]
    places = {each: located(each, next((of for of in sources if holds(of, each)), sources[0])) for each in wanted}
    counts = Counter[str]()

    def show(mutation: Mutation, outcome: Outcome) -> None:
        counts[outcome.verdict] += 1
        print(f"{outcome.verdict:9} {mutation.name}: {outcome.why}", flush=True)

    for each, file in places.items():
        if isinstance(file, str):
            show(each, Outcome("error", file))
    files = {each: file for each, file in places.items() if isinstance(file, Path)}
    if options.list:
        for each, file in files.items():
            print(f"{each.name}  ({file})\n    {each.wrong}\n    {' '.join(each.tests)}")
        print(f"{len(wanted)} mutations, {counts['error']} that do not resolve")
        return int(counts["error"] > 0)
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        preload(Path(folder) / "jax-cache")
        tree = copied_tree(Path(folder))
        unbroken = unmutated(tree, [each.tests for each in files], options.jobs, options.limit)
        runs: list[Run] = []
        for each, file in files.items():
            if unbroken[each.tests].verdict == "SURVIVED":
                runs.append(Run(tree, each.tests, each, file))
            else:
                show(each, Outcome("error", f"without it: {unbroken[each.tests].why}"))
        for run, outcome in outcomes(runs, options.jobs, options.limit):
            assert run.mutation is not None
            show(run.mutation, outcome)
    print(
        f"{len(wanted)} mutations: {counts['killed']} killed, {counts['SURVIVED']} survived, {counts['error']} errors"
    )
    return int(counts["killed"] < len(wanted))


def holds(sources: Mapping[Path, str], mutation: Mutation) -> bool:
    return any(mutation.old in text for text in sources.values())


def located(mutation: Mutation, sources: Mapping[Path, str]) -> Path | str:
    """The one file, from the root, that holds the snippet once; or what is wrong."""
    found = [path for path, text in sources.items() for _ in range(text.count(mutation.old))]
    if len(found) != 1:
        where = ", ".join(str(path.relative_to(ROOT)) for path in found)
        return f"its snippet occurs {len(found)} times{': ' * bool(where)}{where}"
    try:
        compile(sources[found[0]].replace(mutation.old, mutation.new), str(found[0]), "exec")
    except SyntaxError as error:
        return f"what it makes does not compile: {error}"
    return found[0].relative_to(ROOT)


def copied_tree(folder: Path) -> Path:
    """A copy of the tracked files, as they are in the tree now."""
    command = ["git", "ls-files", "-z", "--", *COPIED]
    for name in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / "original" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "original" / name)
    return folder / "original"


def unmutated(tree: Path, selections: Iterable[Tests], jobs: int, limit: float) -> dict[Tests, Outcome]:
    """What the selections give without a mutation: those of one file in one run, and alone where that fails."""
    by_file: dict[object, list[Tests]] = {}
    for tests in dict.fromkeys(selections):
        files = tests if "-k" in tests else tuple(dict.fromkeys(test.partition("::")[0] for test in tests))
        by_file.setdefault(files, []).append(tests)
    groups = {tuple(dict.fromkeys(itertools.chain(*group))): group for group in by_file.values()}
    found: dict[Tests, Outcome] = {}
    for run, outcome in outcomes([Run(tree, tests) for tests in groups], jobs, limit):
        if outcome.verdict == "SURVIVED" or groups[run.tests] == [run.tests]:
            found.update(dict.fromkeys(groups[run.tests], outcome))
    alone = [Run(tree, tests) for group in groups.values() for tests in group if tests not in found]
    return found | {run.tests: outcome for run, outcome in outcomes(alone, jobs, limit)}


@dataclass(eq=False)
class Run:
    """One run of pytest, in a copy of `tree` with the mutation in `file`, or without one."""

    tree: Path
    tests: Tests
    mutation: Mutation | None = None
    file: Path = Path()

    def start(self) -> None:
        self.copy = Path(tempfile.mkdtemp(prefix="run-", dir=self.tree.parent))
        shutil.copytree(self.tree, self.copy, dirs_exist_ok=True)
        if self.mutation is not None:
            changed = self.copy / self.file
            changed.write_text(changed.read_text().replace(self.mutation.old, self.mutation.new))
        self.process = multiprocessing.get_context("fork").Process(target=run_pytest, args=(self.copy, self.tests))
        self.began = time.monotonic()
        self.process.start()

    def outcome(self, limit: float) -> Outcome | None:
        """None while it runs."""
        seconds = time.monotonic() - self.began
        if self.process.is_alive() and seconds < limit:
            return None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)  # with the processes that it has started
        self.process.join()
        output, code = (self.copy / "output.txt").read_text(errors="replace"), self.process.exitcode
        shutil.rmtree(self.copy)
        failed = re.findall(r"^(?:FAILED|ERROR) \S*?([^/\s]+::.*?)(?: - |$)", output, re.MULTILINE)
        if code == 1 and failed:
            return Outcome("killed", f"{failed[0]}, {seconds:.0f} s")
        if code == 0:
            return Outcome("SURVIVED", f"{' '.join(self.tests)}, {seconds:.0f} s")
        if code == -signal.SIGKILL and seconds >= limit:
            return Outcome("killed" if self.mutation else "error", f"not at its end after {seconds:.0f} s")
        return Outcome("error", f"pytest ended with {code}: {' / '.join(output.strip().splitlines()[-3:])}")


def outcomes(runs: Iterable[Run], jobs: int, limit: float) -> Iterator[tuple[Run, Outcome]]:
    """Run so many at once, and give what they found as they end."""
    waiting, running = iter(runs), list[Run]()
    while True:
        while len(running) < jobs and (run := next(waiting, None)) is not None:
            run.start()
            running.append(run)
        if not running:
            return
        time.sleep(0.05)
        for run in list(running):
            if (outcome := run.outcome(limit)) is not None:
                running.remove(run)
                yield run, outcome


def preload(jax_cache: Path) -> None:
    """Import what the tests import, but for the library. What JAX compiles is kept in a folder, for all runs."""
    os.environ |= {  # as the tests set it, but too late for what is imported here
        "OMP_NUM_THREADS": "1",
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in PRELOADED:
            importlib.import_module(name)
    assert not any(name.partition(".")[0] == "muonclip" for name in sys.modules)
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # JAX has no thread before its first computation


class SameExamples:
    """A plugin: the examples of Hypothesis are the same in each run, and one that fails is not made smaller."""

    def pytest_sessionstart(self) -> None:
        from hypothesis import Phase, settings

        phases = Phase.explicit, Phase.generate
        settings.register_profile("mutations", deadline=None, derandomize=True, database=None, phases=phases)
        settings.load_profile("mutations")


def run_pytest(tree: Path, tests: Tests) -> None:
    """Run pytest in a tree, in a process and session of its own, whose exit code is pytest's."""
    os.setsid()
    os.chdir(tree)
    with open("output.txt", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "tests"))]
    sys.dont_write_bytecode = True
    code = int(pytest.main([*PYTEST, *tests], plugins=[SameExamples()]))
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
