"""Fixtures shared by all tests."""

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import RankPool
from tests.row_ops import DEVICE

if DEVICE != "cpu":
    torch.set_default_device(DEVICE)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Rank processes for distributed tests: `ranks.run(world_size, fn, *args)`, see tests/ranks.py."""
    with RankPool() as pool:
        yield pool
