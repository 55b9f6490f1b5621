"""Builds the wheel and the sdist and meets them as a stranger would: ``make release-check``, or ``python tools/release.py``.

In a fresh environment pip resolves what the wheel depends on; then the first example of the README runs there, and the command line
says which extra it wants. ``tests/test_package.py`` asks the same of an environment that needs no network.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: What a person who unpacks the sdist needs: to build, to test, to read.
IN_SDIST = {
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md", "constraints.txt",
    "pyproject.toml", "src/flipout/py.typed", "tests/conftest.py", "tests/api.txt", "docs/index.md", "examples/es_cartpole.py",
    "benchmarks/__main__.py",
}  # fmt: skip

#: What none of them may hold: data sets, results of runs, caches.
_FOREIGN = re.compile(r"(^|/)(runs|shared|\.venv|__pycache__|dist)/|\.(pyc|pt|npz|npy|gz|zip|idx\d?-ubyte|safetensors)$")


def build(source: Path, folder: Path, *what: str) -> None:
    """Builds into ``folder``: the sdist, and from what is in it the wheel; or only what the options say. Without network."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), *what, str(source)]
    run(command)


def run(command: list[str], *, code: int = 0) -> str:
    """What a command prints, in an environment that knows nothing of this one.

    Raises:
        SystemExit: if it exits with another code.
    """
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if found.returncode != code:
        raise SystemExit(f"{' '.join(command)[:300]}\nexited with {found.returncode}, not {code}:\n{found.stdout}\n{found.stderr}")
    return found.stdout + found.stderr


def in_wheel(wheel: Path) -> set[str]:
    """The names in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def in_sdist(sdist: Path) -> set[str]:
    """The names in an sdist, below its one folder."""
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def problems(wheel: Path, sdist: Path) -> list[str]:
    """What is wrong with the contents; nothing, if all is well."""
    inside, source = in_wheel(wheel), in_sdist(sdist)
    code = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*") if path.is_file()}
    code = {name for name in code if "__pycache__" not in name and ".egg-info/" not in name}
    info = {name for name in inside if ".dist-info/" in name}
    found = [f"not in the wheel: {name}" for name in sorted(code - inside)]
    found += [f"has no business in the wheel: {name}" for name in sorted(inside - code - info)]
    if not any(name.endswith("/licenses/LICENSE") for name in info):
        found.append("not in the wheel: LICENSE")
    found += [f"not in the sdist: {name}" for name in sorted((IN_SDIST | {f"src/{name}" for name in code}) - source)]
    return found + [f"neither source nor text: {name}" for name in sorted(inside | source) if _FOREIGN.search(name)]


def first_example() -> str:
    """The first python block of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert match is not None
    return match.group(1)


def meet(python: Path) -> None:
    """Runs the first example in an environment that has the wheel and what it depends on, and nothing else.

    Raises:
        SystemExit: if it does not run, comes from elsewhere than that environment, or the command line does not say what it lacks.
    """
    where = "import sys, pathlib; assert pathlib.Path(flipout.__file__).is_relative_to(sys.prefix), flipout.__file__"
    run([str(python), "-I", "-c", f"{first_example()}\n{where}"])
    told = run([str(python), "-I", "-m", "flipout", "--help"], code=1)
    if "pip install 'flipout[experiments]'" not in told or "Traceback" in told:
        raise SystemExit(f"flipout --help without its extra said:\n{told}")


def main() -> None:
    """Builds, checks the contents, installs the wheel with its dependencies into a fresh environment, and tries it there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--torch", default="2.13.0", help="release of torch to install with it (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheel and the sdist (default: dist)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        build(ROOT, Path(folder))
        wheel, sdist = next(Path(folder).glob("*.whl")), next(Path(folder).glob("*.tar.gz"))
        wrong = problems(wheel, sdist)
        if wrong:
            raise SystemExit("\n".join(wrong))
        print(f"built {wheel.name} and {sdist.name}: {time.perf_counter() - begun:.0f} s")
        begun = time.perf_counter()
        venv.create(Path(folder) / "venv", with_pip=True)
        python = Path(folder) / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        run([str(python), "-m", "pip", "install", "--quiet", f"torch=={given.torch}", str(wheel)])
        print(f"installed with torch {given.torch} into a fresh environment: {time.perf_counter() - begun:.0f} s")
        begun = time.perf_counter()
        meet(python)
        print(f"the first example of the README ran there: {time.perf_counter() - begun:.0f} s")
        given.out.mkdir(parents=True, exist_ok=True)
        for path in (wheel, sdist):
            shutil.copy(path, given.out)
    print(f"saved into {given.out}")


if __name__ == "__main__":
    main()
