"""What the tests of several methods have in common."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the runs of a file share."""
    return tmp_path_factory.mktemp("cache")
