"""Bytes of a model's state by ZeRO stage, precision and what is frozen or quantised."""

from __future__ import annotations

import pytest

from progscale.cost import state_bytes


def test_state_bytes() -> None:
    mixed = state_bytes(1000, 1000, precision="bf16")
    assert (mixed.weights, mixed.gradients, mixed.optimizer, mixed.total) == (2000, 2000, 12000, 16000)
    # A frozen parameter frees 14 of 16 bytes.
    assert mixed.total - state_bytes(1000, 999, precision="bf16").total == 14
    assert state_bytes(1000, 1000).total == 16000
    assert state_bytes(1000, 1000, precision="bf16", autocast=True) == state_bytes(1000, 1000)
    split = [state_bytes(1000, 500, precision="fp16", zero_stage=zero, world_size=4).total for zero in range(4)]
    assert split == [9000, 2000 + 1000 + 1500, 2000 + 250 + 1500, 500 + 250 + 1500]
    assert state_bytes(10, 10, zero_stage=3, world_size=3).weights == 16
    assert state_bytes(1000, 0, zero_stage=3, world_size=4, four_bit=600).weights == 400 + 300
    with pytest.raises(ValueError, match=r"zero_stage 4; 0 to 3"):
        state_bytes(1, 1, zero_stage=4)
    with pytest.raises(ValueError, match=r"world_size 0; at least 1"):
        state_bytes(1, 1, world_size=0)
