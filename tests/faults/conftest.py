"""Runs of coins that nothing disturbs."""

import pytest
import runs


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "coin"
    runs.toss(folder)
    return folder
