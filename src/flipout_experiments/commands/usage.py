"""What the help of every command ends with: lines to try, and what the exit code says."""

from __future__ import annotations

__all__ = ["epilog"]

_EXIT_CODES = "Exit codes: 0 done; 1 refused or failed, a line says why; 2 wrong usage; 130 stopped by Ctrl-C."


def epilog(*examples: str) -> str:
    """The end of a command's help, a paragraph a line.

    Args:
        examples: whole command lines, which the tests parse.

    Example:
        >>> epilog("flipout demo --quick").splitlines()[2]
        'flipout demo --quick'
    """
    return "\n\n".join(("Example:" if len(examples) == 1 else "Examples:", *examples, _EXIT_CODES))
