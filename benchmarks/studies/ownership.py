"""The picture of docs/distributed.md: which ranks hold the matrices of one layer, and which rank iterates each.

python -m benchmarks ownership --out docs/who-owns-what.png
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch.distributed.tensor.placement_types import Replicate, Shard

from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch.distributed import Mesh, NewtonSchulzConfig, PlacedParameter, UpdatePlan, plan
from muonclip.torch.optimizer.plan import plan_module
from muonclip.torch.update.matrix_shards import matrix_shards

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # by rank; Okabe–Ito, colour-blind safe
SHARED = "#D9D9D9"
_WIDTH, _GAP = 620.0, 10.0  # of a row of matrices, in columns of a matrix


WAYS = {  # of sharding over four ranks: the shape of the mesh, and how parameters are placed along it
    "DDP, 4 replicas": ((4,), (Replicate(),)),
    "FSDP2, 4 shards": ((4,), (Shard(0),)),
    "HSDP, 2 replicas × 2 shards": ((2, 2), (Replicate(), Shard(0))),
}


def run(options: argparse.Namespace) -> None:
    """Draw the second layer of the small reference model, an expert layer."""
    with torch.device("meta"):
        lines = plan_module(MoE(MoEConfig.cpu()).layers[1], {}, per_head=False)
    iteration = NewtonSchulzConfig(torch.bfloat16, "jordan", None)
    figure = Figure(figsize=(11, 9), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(WAYS))
    for column, (title, (shape, placements)) in enumerate(WAYS.items()):
        own = iteration, Mesh(shape, (0, 1, 2, 3)), placements
        planned = plan([PlacedParameter(line.name, line.shape, line.layout, *own) for line in lines if line.layout])
        _draw(axes[0, column], planned, at_rest=True)
        _draw(axes[1, column], planned, at_rest=False)
        first = " (the first replica)" if len(shape) > 1 else ""
        axes[0, column].set_title(f"{title}\nwhere it is stored{first}", fontsize=11)
        axes[1, column].set_title("who iterates it", fontsize=11)
    legend = [Patch(facecolor=colour, label=f"rank {rank}") for rank, colour in enumerate(COLOURS)]
    legend.append(Patch(facecolor=SHARED, label="every replica"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    figure.savefig(options.out)


def _draw(axes: Axes, planned: UpdatePlan, *, at_rest: bool) -> None:
    """Draw every matrix as a rectangle of its shape, in lines; its rows in the colours of the ranks that have them."""
    x = y = highest = 0.0
    owners = planned.owners()
    for parameter in planned.parameters:
        matrices = list(_matrices(parameter))
        for (fan_out, fan_in, bands), owner in zip(matrices, owners[parameter.name], strict=True):
            if x + fan_in > _WIDTH:
                x, y, highest = 0.0, y - highest - _GAP, 0.0
            stripes = bands if at_rest else [(0, fan_out, COLOURS[owner[0]])]
            for start, stop, colour in stripes:
                axes.add_patch(Rectangle((x, y - stop), fan_in, stop - start, facecolor=colour, linewidth=0))
            axes.add_patch(Rectangle((x, y - fan_out), fan_in, fan_out, fill=False, edgecolor="#333333", linewidth=0.6))
            x, highest = x + fan_in + _GAP, max(highest, fan_out)
    axes.set_xlim(-_GAP, _WIDTH + _GAP)
    axes.set_ylim(y - highest - _GAP, _GAP)
    axes.set_aspect("equal")
    axes.axis("off")


def _matrices(parameter: PlacedParameter) -> Iterator[tuple[int, int, list[tuple[int, int, str]]]]:
    """Return fan_out, fan_in and the bands (first row, last row, colour) of each matrix, in the order of its owners."""
    numbered: dict[tuple[int, int, int], tuple[int, int, list[tuple[int, int, str]]]] = {}
    for shards in matrix_shards(parameter.shape, parameter.layout, parameter.placements, parameter.mesh.shape):
        ranks: Sequence[int] = parameter.mesh.ranks_along(shards.active, dict(shards.fixed))
        bands = [
            (start, stop, COLOURS[rank] if shards.active or shards.fixed else SHARED)
            for rank, runs in zip(ranks, shards.rows, strict=True)
            for start, stop in runs
        ]
        batches = (batch for start, stop in shards.batches for batch in range(start, stop))
        for batch, head in itertools.product(batches, shards.heads):
            numbered[shards.block, batch, head] = shards.fan_out, shards.fan_in, bands
    return (numbered[key] for key in sorted(numbered))
