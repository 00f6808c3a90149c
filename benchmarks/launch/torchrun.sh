#!/usr/bin/env bash
# One node's part of a run on 1, 4 or 32 nodes of 8 GPUs. Start it once on every node, at any time; it waits for the
# others. README.md says what each variable is for.
#
#     NODES=4 HEAD=node-1 DATA=/shared/tokens.u32 OUT=/shared/runs/moonlight bash benchmarks/launch/torchrun.sh
set -euo pipefail

NODES=${NODES:-1}
HEAD=${HEAD:-localhost}   # name or address of one of the nodes, the same everywhere
PORT=${PORT:-29400}
RUN_ID=${RUN_ID:-muonclip}
RESTARTS=${RESTARTS:-20}
DATA=${DATA:?a token file (.u32) or folder that all nodes see}
OUT=${OUT:?a folder that all nodes see: results and checkpoints}

case $NODES in
    1) preset=cluster-moonlight parallelism="--shards 8 --experts 8 --accumulate 256" ;;
    4) preset=cluster-moonlight parallelism="--replicas 4 --shards 8 --experts 8 --accumulate 64" ;;
    32) preset=cluster parallelism="--shards 256 --experts 32 --accumulate 64" ;;
    *) echo "NODES=$NODES: sizes are worked out for 1, 4 and 32 nodes; add yours to this list." >&2; exit 2 ;;
esac

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
export NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-7}
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}

# shellcheck disable=SC2086 # the words of $parallelism are options
exec torchrun \
    --nnodes "$NODES" --nproc-per-node 8 --max-restarts "$RESTARTS" --shutdown-timeout 900 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$RUN_ID" \
    -m benchmarks explosion --preset "$preset" $parallelism --arms muonclip --seeds 0 \
    --recompute --precision bf16 --async-checkpoints --checkpoint-seconds 900 --collective-timeout 600 \
    --data "$DATA" --out "$OUT" "$@"
