"""Settings of the test runs; they hold for the processes that tests start, too."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a process forked beside a second thread hangs
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a mistyped name must not wait for the Hub


def pytest_addoption(parser):
    parser.addoption("--notebook", action="store_true", help="also run the notebook: some minutes")
