"""The collectives of a jitted update of sharded matrices, and the bytes that they bring to each of eight devices.

They are read in the compiled programs: of ours, of Optax's own, and of the sharding-aware Muon of MaxText, which is
Optax's with all-to-alls along the axes that number matrices in an array, where its package can be imported.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from benchmarks.experiment.errors import UsageError
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment
from benchmarks.studies.templates import render
from muonclip.optax import scale_by_muon

DEVICES = 8


@dataclass(frozen=True)
class Case:
    """`arrays` arrays of one shape, whose last two axes are a matrix; its rows are spread over the devices."""

    name: str
    arrays: int
    shape: tuple[int, ...]


CASES = (
    Case("16 arrays 256×1024", 16, (256, 1024)),
    Case("13 arrays 256×1024", 13, (256, 1024)),
    Case("one array of 16 layers", 1, (16, 256, 1024)),
    Case("4 arrays of 13 layers", 4, (13, 256, 1024)),
)


def run(options: argparse.Namespace) -> None:
    """Compile and count. Writes collectives.json and, what it also prints, the table collectives.md."""
    with contextlib.suppress(RuntimeError):  # JAX has its devices already
        jax.config.update("jax_num_cpu_devices", DEVICES)
    if jax.device_count() < DEVICES:
        raise UsageError("optax-collectives", f"needs {DEVICES} devices; JAX has {jax.device_count()}.")
    cases = [{"name": case.name, "programs": dict(programs(case))} for case in CASES]
    result = {"environment": environment(framework="jax"), "cases": cases}
    options.out.mkdir(parents=True, exist_ok=True)
    atomic_files.write_json(options.out / "collectives.json", result)
    atomic_files.write_text(options.out / "collectives.md", table := read_collectives(result))
    print(table)


def read_collectives(result: Mapping[str, Any]) -> str:
    """Write a Markdown table, and what made it."""
    rows = [[case["name"], *map(_in_words, case["programs"].values())] for case in result["cases"]]
    return render("optax_collectives.md", implementations=list(IMPLEMENTATIONS), rows=rows, **result)


def programs(case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield by implementation the collectives of one update and the bytes that they bring to a device."""
    mesh = jax.make_mesh((DEVICES,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(*(None,) * (len(case.shape) - 2), "fsdp"))
    arrays = {str(at): jax.ShapeDtypeStruct(case.shape, "float32", sharding=sharding) for at in range(case.arrays)}
    for name, make in IMPLEMENTATIONS.items():
        try:
            tx = make(arrays, sharding)
        except ImportError as error:
            yield name, {"absent": str(error)}
            continue
        state = jax.eval_shape(tx.init, arrays)
        placed = jax.tree.map(lambda leaf: _placed(leaf, case.shape, sharding), state)
        text = jax.jit(tx.update).lower(arrays, placed).compile().as_text() or ""
        counts, received = collectives(text, DEVICES)
        yield name, {"collectives": dict(counts), "bytes": sum(received.values())}


def collectives(program: str, devices: int) -> tuple[Counter[str], Counter[str]]:
    """Count the collectives of a compiled program, and the bytes that each kind brings to a device.

    What is in a loop counts once for each of its rounds. Sums are counted as a ring sends them. Raises ValueError for a
    loop whose number of rounds the program does not say.
    """
    text = re.sub(r"/\*.*?\*/", "", program)  # comments in the shapes of several operands
    bodies: dict[str, str] = dict(re.findall(r"^(?:ENTRY )?%([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    times = _times_run(bodies)
    counts, received = Counter[str](), Counter[str]()
    for name, body in bodies.items():
        for shapes, kind in _COLLECTIVE.findall(body):
            counts[kind] += times[name]
            received[kind] += times[name] * round(_ARRIVING[kind](devices) * _bytes(shapes))
    return +counts, +received


_COLLECTIVE = re.compile(r"= (.*?) (all-to-all|all-gather|all-reduce|collective-permute|reduce-scatter)(?:-start)?\(")
_ARRIVING: Mapping[str, Callable[[int], float]] = {
    # of the bytes of its result on W devices
    "all-to-all": lambda w: (w - 1) / w,
    "all-gather": lambda w: (w - 1) / w,
    "all-reduce": lambda w: 2 * (w - 1) / w,
    "collective-permute": lambda w: 1,
    "reduce-scatter": lambda w: w - 1,
}


def _times_run(bodies: Mapping[str, str]) -> dict[str, int]:
    """Tell how often each computation runs, from those that call it and the rounds of their loops."""
    callers: dict[str, list[tuple[str, int]]] = {name: [] for name in bodies}
    for caller, body in bodies.items():
        for line in body.splitlines():
            rounds = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for called in re.findall(r"(?:body|to_apply|calls|true_computation|false_computation)=%([\w.-]+)", line):
                if " while(" in line and rounds is None:
                    raise ValueError(f"the rounds of a loop are not known: {line.strip()}")
                callers[called].append((caller, int(rounds[1]) if rounds else 1))

    @cache
    def times(name: str) -> int:
        return sum(times(caller) * rounds for caller, rounds in callers[name]) if callers[name] else 1

    return {name: times(name) for name in bodies}


def _bytes(shapes: str) -> int:
    """Count the bytes of the shapes of a result, such as `(f32[2,32], f32[2,32])`."""
    sizes = re.findall(r"[a-z]+(\d+)\w*\[([\d,]*)\]", shapes)
    return sum(int(bits) // 8 * math.prod(map(int, filter(None, dims.split(",")))) for bits, dims in sizes)


def _placed(leaf: Any, shape: tuple[int, ...], sharding: NamedSharding) -> Any:
    """Place a leaf of the state: the momentum as its array, all else on every device."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) if leaf.shape == shape else leaf


def _in_words(program: Mapping[str, Any]) -> str:
    if "absent" in program:
        return "not installed"
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(program["collectives"].items()))
    return f"{counts or 'nothing'}; {program['bytes'] / 2**20:.1f} MiB"


def _ours(arrays: Any, sharding: NamedSharding) -> Any:
    layouts = dict.fromkeys(arrays, MuonDimensionNumbers(-2, -1))
    return scale_by_muon(weight_dimension_numbers=layouts, shardings=dict.fromkeys(arrays, sharding))


def _optax(arrays: Any, sharding: NamedSharding) -> Any:
    del sharding  # it does not ask
    layouts = dict.fromkeys(arrays, MuonDimensionNumbers(-2, -1))
    return optax.contrib.scale_by_muon(weight_dimension_numbers=layouts)


def _maxtext(arrays: Any, sharding: NamedSharding) -> Any:
    muon = importlib.import_module("maxtext.optimizers.muon")
    layouts = dict.fromkeys(arrays, muon.MuonDimensionNumbers(-2, -1, sharding))
    return muon.scale_by_muon(weight_dimension_numbers=layouts)


IMPLEMENTATIONS: Mapping[str, Callable[[Any, NamedSharding], Any]] = {
    "muonclip.optax": _ours,
    "optax.contrib.muon": _optax,
    "MaxText": _maxtext,
}
