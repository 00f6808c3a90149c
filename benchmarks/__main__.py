"""The command line, `python -m benchmarks …`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.commands import COMMANDS, device_of
from benchmarks.execution import ranks
from benchmarks.experiment.errors import RunFailed, UsageError
from benchmarks.options import make_parser

ONLY_RANKS = (
    *("shards", "replicas", "experts", "tensor", "accumulate"),
    *("recompute", "store_activations", "offload_activations", "async_checkpoints"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0 done, 1 a run failed, 2 a wrong option, 130 interrupted."""
    parser, commands = make_parser()
    options = parser.parse_args(arguments)
    options.ranks = None  # of torchrun
    try:
        _run_command(options)
    except UsageError as error:
        if options.ranks is not None and not options.ranks.first:
            return 2  # the first rank says it
        commands[options.name].error(str(error))
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _run_command(options: argparse.Namespace) -> None:
    """Run it alone, or as one of the ranks that torchrun started; only then their modules are imported."""
    if not ranks.launched():
        if options.name == "explosion" and (given := [name for name in ONLY_RANKS if getattr(options, name)]):
            option = "--" + given[0].replace("_", "-")
            raise UsageError(option, f"is for several processes: torchrun --nproc-per-node N -m benchmarks … {option}.")
        COMMANDS[options.name](options)
        return
    if options.name not in ("explosion", "scaling"):
        raise UsageError("command", f"{options.name} runs alone; explosion and scaling run under torchrun.")
    if options.name == "explosion" and options.framework == "jax":
        raise UsageError("--framework", "jax runs alone; take torchrun away, or --framework torch.")
    with ranks.joined(device_of(options), options.collective_timeout) as options.ranks:
        COMMANDS[options.name](options)


if __name__ == "__main__":
    sys.exit(main())
