"""What is left to the longest list, so that the ordinary one stays short."""

from __future__ import annotations

import pytest

# ZeRO-3 with offload takes longer than any other engine. It meets every family, schedule, embeddings policy and method in
# test_contracts, and what else is its own in test_resume and test_costs; beside these it is tested with the product.
SLOWEST = "zero3-offload"
WITHOUT_IT = ("test_cache", "test_language_models", "test_moving_state", "test_optimizers", "test_trials")


@pytest.hookimpl(tryfirst=True)  # before -m is asked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in WITHOUT_IT and SLOWEST in item.name:
            item.add_marker(pytest.mark.product)
