import pytest

from support.forked import forked, forked_ranks
from support.tiny_runs import everything, fit, fit_on_two, loaded_ddpo


@pytest.fixture(scope="session")
def policy(tiny_pipeline, tiny_classifiers):
    """A DDPO in memory, for forked runs: here it stays as it is."""
    return loaded_ddpo(tiny_pipeline, tiny_classifiers)


@pytest.fixture(scope="session")
def undisturbed(policy, tmp_path_factory):
    """All that a run leaves which nothing befell."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert forked(fit, folder, policy) == 0
    return everything(folder)


@pytest.fixture(scope="session")
def undisturbed_on_two(policy, tmp_path_factory):
    """The same of two processes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "two"
    assert forked_ranks(fit_on_two, folder, policy) == [0, 0]
    return everything(folder)
