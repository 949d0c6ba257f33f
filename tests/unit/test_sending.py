"""What the tests' ranks send arrives to the last bit: a comparison of two runs could not see what both of them lost."""

from __future__ import annotations

import pytest
import torch

from tests.harness.sending import packed, unpacked

BITS = torch.tensor([0, 1, 127, 128, 192, 255, 63, 128], dtype=torch.uint8)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.int8]
)
def test_bits(dtype: torch.dtype) -> None:
    """Negative zero and what is no number too."""
    values = BITS.view(dtype)
    for tensor in (values, values[0], values[:0], values.repeat(6).view(2, -1).t(), torch.empty(3, 0, dtype=dtype)):
        found = unpacked(packed({"a": [tensor]}))["a"][0]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        as_bytes = [each.contiguous().view(-1).view(torch.uint8) for each in (found, tensor)]
        assert torch.equal(*as_bytes)


def test_truth_values() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    assert torch.equal(unpacked(packed(mask)), mask)


def test_parameters_stay_parameters() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    found = unpacked(packed(parameter))
    assert isinstance(found, torch.nn.Parameter)
    assert found.requires_grad


def test_what_comes_can_be_written_to() -> None:
    sent = torch.zeros(2)
    first, second = unpacked(packed((sent, sent[:1])))
    first += 1
    assert (sent.tolist(), first.tolist(), second.tolist()) == ([0, 0], [1, 1], [0])
