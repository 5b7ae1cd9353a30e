def pytest_addoption(parser):
    parser.addoption(
        "--notebook", action="store_true", help="also run the notebook, which takes some minutes"
    )
