"""What the laws are put to: small modules with inputs, one list a family of rules.

A rule joins the suite by adding a :class:`Case` to a list here; it gets every law of ``test_laws.py`` for free.
"""

from cases import attention, conv, embedding, linear, normalization, pointwise, recurrent, structure
from cases.base import Case

CASES: list[Case] = [
    *linear.CASES,
    *conv.CASES,
    *embedding.CASES,
    *normalization.CASES,
    *pointwise.CASES,
    *structure.CASES,
    *attention.CASES,
    *recurrent.CASES,
]

BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "two cases share a name"

__all__ = ["BY_NAME", "CASES", "Case"]
