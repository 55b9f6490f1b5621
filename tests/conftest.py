"""One thread, fixed shapes from Hypothesis, and a global random state that no test depends on."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("laws", derandomize=True, deadline=None, database=None, max_examples=50)
hypothesis.settings.load_profile("laws")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """From the first fixture on, of whatever scope: sums are rounded as the number of threads cuts them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def signs_as_bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test asks for the estimator "flipout_bits": no number of signs is too small to be packed."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("estimator") == "flipout_bits":
        monkeypatch.setattr("flipout.estimators._FEW_SIGNS", 0)
