import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for networks this small a second thread costs more than it brings
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a mistyped name must not wait for the hub


def pytest_addoption(parser):
    parser.addoption("--notebook", action="store_true", help="also run the notebook, which takes some minutes")
