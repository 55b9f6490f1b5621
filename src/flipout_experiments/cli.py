"""The command ``flipout``, also ``python -m flipout``."""

from __future__ import annotations

import sys

from flipout.errors import FlipoutError, SaveError

__all__ = ["main"]

#: What the experiments need and the library does not.
_EXTRAS = frozenset({"matplotlib", "mlxtend", "rich", "typer"})


def main() -> None:
    """Runs the command line. Errors of the library are told in a line, without a traceback."""
    try:
        from flipout_experiments.commands.app import app

        app(prog_name="flipout")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        sys.exit(f"flipout: the command line needs {package}, which is not installed: pip install 'flipout[experiments]'")
    except SaveError as error:
        sys.exit(f"flipout: {error}; a run goes on with --resume, or anew in another folder with --out")
    except FlipoutError as error:
        sys.exit(f"flipout: {error}")
