"""The ring of torch's context parallelism with the kernel of the CPU, which torch registers for CUDA's kernels alone.

Only the kernel and its placements are given here: torch's own code makes the steps, sends the keys, and merges.
"""

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy, register_op_strategy
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def register():
    """Let `context_parallel` run on the CPU, in float64 too."""
    _place(FORWARD, outputs=2, inputs=3)
    _place(BACKWARD, outputs=3, inputs=6)
    ring.custom_ops |= {FORWARD: _run, BACKWARD: _run}
    ring._cp_options.convert_to_f32 = False


def _place(op, outputs, inputs):
    def strategy(schema):
        mesh = schema.get_mesh_from_args(validate=False)
        ways = [[each] * (outputs + inputs) for each in (Replicate(), Shard(2))]
        return expand_to_full_mesh_op_strategy(mesh, schema, ways, input_index=outputs)

    register_op_strategy(op)(strategy)


def _run(op, args, kwargs):
    info = DTensor._op_dispatcher.unwrap_to_op_info(op, args, kwargs)
    DTensor._op_dispatcher.sharding_propagator.propagate(info)
    group = info.compute_mesh.get_group()
    if op is FORWARD:
        q, k, v, dropout, causal = (*info.local_args, 0.0, False)[:5]
        options = dict(is_causal=causal, dropout_p=dropout, **info.local_kwargs)
        results = ring._templated_ring_attention(group, 2, op, q, k, v, **options)
    else:
        gradient, q, k, v, out, lse, dropout, causal = info.local_args
        results = ring._templated_ring_attention_backward(
            group, 2, op, gradient, "grad_out", q, k, v, out, lse, causal, dropout_p=dropout, **info.local_kwargs
        )
    return DTensor._op_dispatcher.wrap(results, info.output_sharding.output_spec)
