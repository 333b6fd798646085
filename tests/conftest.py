"""The order of the tests, and which of them run."""

import pytest


def pytest_addoption(parser):
    """``--slow`` runs the tests marked as slow too."""
    parser.addoption("--slow", action="store_true", help="run the tests marked as slow too")


def pytest_collection_modifyitems(config, items):
    """Notebooks run first: they share a kernel, so one process runs them all, and at the end the other would wait."""
    items.sort(key=lambda item: "test_notebooks.py" not in item.nodeid)
    if not config.getoption("--slow"):
        skipped = pytest.mark.skip(reason="takes long; scripts/test and pytest --slow run it")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skipped)
