"""These tests need a GPU: MEGAPAR_TEST_DEVICE=cuda, as make gpu-check sets it."""

from pathlib import Path

import pytest

from tests.row_ops import DEVICE

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if DEVICE != "cuda" and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: MEGAPAR_TEST_DEVICE=cuda"))
