"""The command line: `python -m muonclip` for what a bug report needs, `python -m muonclip check` for a self-test."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from muonclip.selftest import check, environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0 done, 1 something does not hold, 2 a wrong option."""
    options = make_parser().parse_args(arguments)
    if options.command == "check":
        return check(options.device)
    print(environment())
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m muonclip",
        description="Without a command: versions, processor, devices, what runs on them, attention kernels. Paste that "
        "into a bug report.",
    )
    commands = parser.add_subparsers(dest="command", metavar="check")
    test = commands.add_parser(
        "check", help="try what runs here, for a minute at most; exit status 1 if something fails"
    )
    test.add_argument("--device", choices=("cpu", "cuda", "mps", "xpu"), help="the best there is by default")
    return parser


if __name__ == "__main__":
    sys.exit(main())
