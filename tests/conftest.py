"""Settings of the test runs; they hold for the processes that tests start, too."""

import functools
import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # a process forked beside a second thread hangs
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a mistyped name must not wait for the Hub


def pytest_addoption(parser):
    parser.addoption("--notebook", action="store_true", help="also run the notebook: some minutes")


@pytest.fixture(autouse=True, scope="session")
def built_in_sentences_are_made_once():
    """For the hundreds of short runs inside this process; tests of the sentences call the function itself."""
    import transfer  # not before the settings above

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "reviews", functools.cache(transfer.reviews))
        yield
