"""Runs the core tests under the oldest and the newest release of torch that the project supports: ``make matrix``.

Each release has an environment of its own, below ``.matrix/``, with torch and numpy, with what the tests themselves import, and
nothing else: the core is what needs no more. torch's builds for CUDA, which pip takes by default on Linux, are
several GB each.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: The oldest that ``pyproject.toml`` allows, and the newest that was tried.
RELEASES = ("2.6.0", "2.13.0")

#: What the core tests import besides.
TOOLS = ("hypothesis", "pandas", "pytest", "scipy")

#: Tests of the library itself, in the order of its rooms.
CORE = (
    "noise", "estimators", "signs", "weight", "draw", "select", "perturb", "registry", "shapes", "statistics", "transforms",
    "missing_rules", "products", "attention", "recurrent", "routed", "laws",
)  # fmt: skip

#: And of the uses that need no more than the core.
USES = ("variance", "variance_curve", "bayes_kl", "bayes_elbo", "regularize", "evolution")


def python_of(release: str) -> Path:
    """The python of the environment of one release, made if it is not there."""
    folder = ROOT / ".matrix" / release
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", f"torch=={release}", "numpy", *TOOLS]
        subprocess.run(command, check=True)
        (folder / "ready").touch()
    return python


def core_tests(python: Path, chosen: list[str]) -> tuple[int, str]:
    """Exit code and last line of pytest on the core, or on the chosen part of it."""
    files = [f"tests/{'core' if name in CORE else 'uses'}/test_{name}.py" for name in chosen]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", *files]
    found = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        print(found.stdout)
    lines = [line for line in found.stdout.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    return found.returncode, lines[-1].strip("= ") if lines else f"pytest exited with {found.returncode}"


def main() -> int:
    """Runs them, prints a line for each release, and exits with 1 if any test failed under any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=RELEASES, help=f"of torch (default: {' '.join(RELEASES)})")
    parser.add_argument(
        "--tests", nargs="*", default=[*CORE, *USES], choices=[*CORE, *USES], metavar="NAME", help="a part of the core"
    )
    given = parser.parse_args()
    bad = 0
    for release in given.releases:
        begun = time.perf_counter()
        code, told = core_tests(python_of(release), given.tests)
        bad |= code != 0
        print(f"torch {release}: {told} ({time.perf_counter() - begun:.0f} s with set-up)", flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
