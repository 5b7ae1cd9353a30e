"""Settings of the test runs; they hold for the processes that tests start, too."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a network loses more than it gains by a second
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a mistyped name must not wait for the hub


def pytest_addoption(parser):
    parser.addoption("--notebook", action="store_true", help="also run the notebook: some minutes")
