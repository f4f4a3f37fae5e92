"""The soak test of `make soak`, for a few seconds."""

from __future__ import annotations

import pytest
from soak import soak


@pytest.mark.slow
def test_a_short_soak_finds_nothing() -> None:
    outcome = soak(seconds=3, clients=100, patience=3)
    print(outcome)
    assert not outcome.figures.faults, str(outcome)
    assert outcome.reasons["done"] > 100
