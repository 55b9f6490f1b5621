"""Deprecated names give what the new ones give, and say which those are."""

import importlib
import re

import pytest

NAMES = [
    ("flipout.bayes", "draw_band", "plot_band"),
    ("flipout.bayes", "draw_reliability", "plot_reliability"),
    ("flipout.evolution", "Generation", "TokenReward"),
]


@pytest.mark.parametrize(("module", "old", "new"), NAMES)
def test_a_deprecated_name_warns_at_the_caller_and_works(module, old, new):
    found = importlib.import_module(module)
    told = re.escape(f"{module}.{old} is deprecated since 0.2 and goes in 0.4: use {module}.{new}")
    with pytest.warns(DeprecationWarning, match=told) as warned:
        value = getattr(found, old)
    assert value is getattr(found, new)
    assert warned[0].filename == __file__
    assert old not in found.__all__


@pytest.mark.parametrize("module", ["flipout.bayes", "flipout.evolution"])
def test_other_names_are_no_attributes(module):
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        importlib.import_module(module).nothing  # noqa: B018
