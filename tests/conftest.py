"""Fixtures shared by all tests."""

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Rank processes for distributed tests: `ranks.run(world_size, fn, *args)`, see tests/ranks.py."""
    with RankPool() as pool:
        yield pool
