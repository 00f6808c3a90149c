"""Build the package as a release has it, and try it as a user would: nothing is published.

    python .ci/release.py [FOLDER]        the sdist and the wheel are left in FOLDER, dist by default

Builds, checks metadata and contents, installs the wheel into a new environment, and there, in an empty folder, runs the
README's blocks of Python and the self-test. TORCH_INDEX, as for make, says where PyTorch is from.
"""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUST_HAVE = ("muonclip/py.typed", "muonclip/__main__.py", "muonclip/torch/__init__.py", "muonclip/optax/__init__.py")
LARGEST_WHEEL, LARGEST_SDIST = 1_000_000, 2_000_000  # bytes


def main(folder: str = "dist") -> int:
    dist = Path(folder).resolve()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for words, step in steps(dist, Path(scratch)):
            start = time.monotonic()
            print(f"release: {words}", flush=True)
            try:
                faults = step() or []
            except subprocess.CalledProcessError as error:
                faults = [f"{' '.join(map(str, error.cmd))} ended with {error.returncode}"]
            for fault in faults:
                print(f"release: {fault}")
            print(f"release: {words}: {'failed' if faults else 'done'}, {time.monotonic() - start:.0f} s", flush=True)
            if faults:
                return 1
    built = ", ".join(f"{path.name} ({path.stat().st_size // 1000} kB)" for path in sorted(dist.iterdir()))
    print(f"release: {built} in {dist}, {time.monotonic() - begun:.0f} s in all. To publish, see RELEASING.md.")
    return 0


def steps(dist: Path, scratch: Path) -> Iterator[tuple[str, object]]:
    """Yield what is done, in words, and as a function that returns faults."""
    empty, python = scratch / "empty", scratch / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"

    def build() -> None:
        for old in dist.glob("muonclip-*"):
            old.unlink()
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ROOT)

    def metadata() -> list[str]:
        run(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.glob("muonclip-*")))
        return faults_of_wheel(one(dist, "*.whl")) + faults_of_sdist(one(dist, "*.tar.gz"))

    def install() -> None:
        venv.create(scratch / "venv", with_pip=True)
        pip = (python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
        if os.environ.get("TORCH_INDEX"):
            run(*pip, "--index-url", os.environ["TORCH_INDEX"], "torch")
        run(*pip, f"{one(dist, '*.whl')}[{extras(README)}]")

    def readme() -> None:
        empty.mkdir()
        (scratch / "readme.py").write_text("\n".join(blocks(README)), encoding="utf-8")
        run(python, scratch / "readme.py", cwd=empty)

    def selftest() -> None:
        run(python, "-m", "muonclip", cwd=empty)
        run(python, "-m", "muonclip", "check", cwd=empty)

    yield "build the sdist, and the wheel from it", build
    yield "check their metadata and contents", metadata
    yield "install the wheel into a new environment", install
    yield "run the README in an empty folder", readme
    yield "run the self-test there", selftest


README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """Return the blocks of Python, in order."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def extras(text: str) -> str:
    """Return the extras that the blocks need."""
    return "torch,jax" if any("muonclip.optax" in block for block in blocks(text)) else "torch"


def faults_of_wheel(wheel: Path) -> list[str]:
    """Say what is wrong with the contents and the description of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        description = email.message_from_bytes(archive.read(info)).get_payload()
    outside = [
        name for name in names if not re.match(r"muonclip/.+\.py$|muonclip/py\.typed$|muonclip-[^/]+\.dist-info/", name)
    ]
    faults = [f"{name} is in the wheel" for name in outside]
    faults += [f"{name} is not in the wheel" for name in (*MUST_HAVE, *sources()) if name not in names]
    faults += [f"the README links to {target}, which no index has" for target in dead_links(str(description))]
    return faults + too_large(wheel, LARGEST_WHEEL)


def faults_of_sdist(sdist: Path) -> list[str]:
    """Say what is wrong with the contents of an sdist: it builds the wheel, and needs no more."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", *sources())
    faults = [f"{name} is not in the sdist" for name in needed if name not in names]
    return faults + too_large(sdist, LARGEST_SDIST)


def dead_links(text: str) -> list[str]:
    """Return the targets in Markdown that are neither an address nor in the same page."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"[a-z]+:|#", target)]


def sources() -> list[str]:
    """Return the files of the package, by their names in the archives."""
    return [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "muonclip").rglob("*.py"))]


def too_large(archive: Path, most: int) -> list[str]:
    size = archive.stat().st_size
    return [f"{archive.name} has {size} bytes, more than {most}"] if size > most else []


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(f"muonclip-{pattern}")
    return found


def run(*command: object, cwd: Path | None = None) -> None:
    words = list(map(str, command))
    own = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }  # what is installed, not this tree
    subprocess.run(words, check=True, cwd=cwd, env=own)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
