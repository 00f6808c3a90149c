"""The environment of a bug report: versions, processor, devices, what runs on them, attention kernels.

Nothing is imported that is not installed, and whatever fails to say something is shown with its error.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import muonclip
from muonclip.core.cost_model import choose_form
from muonclip.selftest.processor import available_cores, cpu_model, instructions

_PACKAGES = (
    *("torch", "triton", "numpy", "jax", "jaxlib", "optax", "flax", "equinox"),
    *("transformers", "accelerate", "peft", "trl", "lightning", "torchtitan"),
)
_SHAPES = ((1024, 1024), (1024, 4096))


def environment() -> str:
    """Write the environment, a line for each fact."""
    return "\n".join(f"{name + ':':12} {value}" for name, value in _facts())


def _facts() -> Iterator[tuple[str, str]]:
    yield "muonclip", f"{muonclip.__version__} in {os.path.dirname(muonclip.__file__)}"
    yield "Python", f"{platform.python_version()}, {platform.platform()}"
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES if _version(name)) or "none"
    for name in ("torch", "jax"):
        if importlib.util.find_spec(name) is None:
            yield name, f"not installed: muonclip.{'optax' if name == 'jax' else name} needs it"
    units = [f"{name} {'yes' if there else 'no'}" for name, there in instructions().items()]
    yield "processor", ", ".join([cpu_model(), f"{available_cores()} cores", *units])
    if importlib.util.find_spec("torch") is not None:
        yield from _each("torch", _of_torch)
    if importlib.util.find_spec("jax") is not None:
        yield from _each("jax", _of_jax)


def _each(name: str, facts: Callable[[], Iterator[tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    """Yield facts; in place of those that cannot be had, why."""
    try:
        yield from facts()
    except Exception as error:  # of a broken installation, which is what a report is about
        yield name, f"{type(error).__name__}: {error}"


def _of_torch() -> Iterator[tuple[str, str]]:
    import torch

    built = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": getattr(torch.version, "xpu", None)}
    known = [f"{name} {version}" for name, version in built.items() if version] or ["neither CUDA nor ROCm nor XPU"]
    yield "torch", f"{torch.__version__}, built with {', '.join(known)}, {torch.get_num_threads()} threads"
    devices = torch_devices()
    yield "devices", "; ".join(_device(each) for each in devices)
    for each in devices:
        yield from _each(f"on {each}", lambda each=each: _what_runs(each))
    yield "attention", "; ".join(_kernels())


def torch_devices() -> list[str]:
    """Return the kinds of devices that torch sees, the best first."""
    import torch

    there = {
        "cuda": torch.cuda.is_available(),
        "xpu": hasattr(torch, "xpu") and torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    return [name for name, is_there in there.items() if is_there]


def _device(kind: str) -> str:
    import torch

    if kind == "cuda":
        properties: Any = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = [f"{each.name}, {each.major}.{each.minor}, {each.total_memory / 2**30:.0f} GiB" for each in properties]
        return f"cuda ({'; '.join(names)})"
    if kind == "xpu":
        return f"xpu ({torch.xpu.get_device_name()}, {torch.xpu.device_count()} of them)"
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})" if kind == "cpu" else kind


def _what_runs(device: str) -> Iterator[tuple[str, str]]:
    """Say in what precision, by which products and in which form the update of a device multiplies matrices."""
    import torch

    from muonclip.torch.update import PRODUCTS, choose_products, iteration_dtype

    dtype = str(iteration_dtype(device, torch.float32, None)).removeprefix("torch.")
    products = next(name for name, each in PRODUCTS.items() if each is choose_products(None, device))
    forms = [f"{m}×{n} {choose_form(m, n, dtype, device, 'jordan', None)}" for m, n in _SHAPES]
    half = ", half of each symmetric product" if PRODUCTS[products].symmetric_update else ""
    yield f"on {device}", f"{dtype}, {products}{half}; form of {', '.join(forms)}"


def _kernels() -> list[str]:
    from muonclip.torch.observe import KERNELS

    packages = importlib.metadata.packages_distributions()
    found: list[str] = []
    for kernel in KERNELS:
        package = kernel.home.partition(".")[0].partition(":")[0]
        if importlib.util.find_spec(package) is None:
            found.append(f"{kernel.name}: not installed")
        elif package == "torch":
            found.append(kernel.name)
        else:
            versions = [f"{each} {_version(each)}" for each in packages.get(package, ())]
            found.append(f"{kernel.name}: {', '.join(versions) or 'there'}")
    return list(dict.fromkeys(found))


def _of_jax() -> Iterator[tuple[str, str]]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # all of a GPU's memory, for a list of its names
    import jax

    yield "jax", f"{jax.__version__}, devices {', '.join(map(str, jax.devices()))}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
