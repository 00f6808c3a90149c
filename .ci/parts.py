"""Run the parts of a check one after the other and print at the end what each took, and all of them of their limit.

python .ci/parts.py WHOLE MINUTES NAME COMMAND [NAME COMMAND …]

A part whose name ends in "&" runs at the same time as those that follow it; its output is printed when they are done.
The first part that fails ends the check. The limit is printed and never enforced: machines differ.
"""

import shlex
import subprocess
import sys
import time


def main(whole: str, minutes: str, *words: str) -> int:
    began, took, background = time.monotonic(), {}, {}
    failed = 0
    for name, command in zip(words[::2], words[1::2], strict=True):
        start = time.monotonic()
        if name.endswith("&"):
            process = subprocess.Popen(
                shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            background[name.rstrip(" &")] = process, start
            continue
        failed = subprocess.run(shlex.split(command), check=False).returncode
        took[name] = time.monotonic() - start
        if failed:
            break
    for name, (process, start) in background.items():
        if failed:
            process.terminate()
        print(process.communicate()[0], end="", flush=True)
        took[name] = time.monotonic() - start
        failed = failed or process.returncode
    total = time.monotonic() - began
    print(f"{whole}: " + ", ".join(f"{name} {clock(seconds)}" for name, seconds in took.items()), end="")
    print(f"; in all {clock(total)} of {clock(60 * float(minutes))}" + " (failed)" * bool(failed), flush=True)
    return failed


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
