"""The order of the tests."""


def pytest_collection_modifyitems(items):
    """Notebooks first: they share a kernel, so they are one process's work, and at the end others would wait for it."""
    items.sort(key=lambda item: "test_notebooks.py" not in item.nodeid)
