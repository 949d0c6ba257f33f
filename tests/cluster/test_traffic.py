"""What a plan says of traffic is what hosts put on the wire: 2, 3 and 4 of them, counted by the network interface of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.test_hosts import Started, by_hand
from tests.harness.hosts import Hosts, why_not

ENGINES = ("ddp", "zero1", "zero2", "zero3")
# Headers, and what the ranks tell each other: losses, norms, that they live.
MORE = 1.02


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_wire_carries_what_was_planned(cache: Path, tmp_path: Path, count: int, engine: str) -> None:
    """The bytes handed to collectives, to a part in a hundred; and those of a ring, on the wire."""
    if reason := why_not():
        pytest.skip(reason)
    with (
        Hosts(count) as hosts,
        Started(hosts, tmp_path, cache, by_hand(hosts, "-m", "tests.harness.wire", engine, "eth7", str(tmp_path))) as started,
    ):
        codes, out = started.wait(240)
    assert codes == [0] * count, out
    found = [json.loads((tmp_path / f"wire-{rank}.json").read_text()) for rank in range(count)]
    for rank in found:
        assert rank["planned"] <= rank["counted"] <= 1.01 * rank["planned"]
    mean = sum(rank["wire"] for rank in found) / count
    assert found[0]["ring"] <= mean <= MORE * found[0]["ring"]
