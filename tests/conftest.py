"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.cuda_host import host
from tests.ranks import RankPool
from tests.row_ops import DEVICE

if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
if host.VARIABLE in os.environ:
    host.register(os.environ[host.VARIABLE])


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Rank processes for distributed tests: `ranks.run(world_size, fn, *args)`, see tests/ranks.py."""
    with RankPool() as pool:
        yield pool
