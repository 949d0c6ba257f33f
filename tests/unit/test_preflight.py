"""Who is missing, cut off or stuck is put in words; the network itself is in tests/cluster/test_hosts.py."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from progscale import preflight
from progscale.errors import NetworkError
from progscale.preflight import _answer, _cut_off, _neighbours, _report, _wait_for_all, meet, own_address
from tests.harness.worker import TwoRanks


class Store:
    """The launcher's store, in memory."""

    def __init__(self, **values: Any) -> None:
        self.values = {key.replace("_", "/"): json.dumps(value).encode() for key, value in values.items()}

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key]

    def wait(self, keys: list[str], timeout: Any) -> None:
        if not self.check(keys):
            raise RuntimeError("timed out")


@pytest.mark.parametrize("count", range(1, 9))
def test_neighbours_are_a_ring_in_rounds(count: int) -> None:
    """Each node has two links (of two nodes: one), and those that can go on at the same time come one behind the other."""
    pairs = _neighbours(count)
    assert len(set(pairs)) == len(pairs) == (count if count > 2 else count - 1)
    assert {pair for pair in pairs if pair[1] == pair[0] + 1} == set(pairwise(range(count)))
    first = pairs[: count // 2]
    assert len({node for pair in first for node in pair}) == 2 * len(first)


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rank, and by node where another rank of it is here."""
    here = {f"here_{rank}": [f"node{rank // 4}", "10.0.0.1", rank % 4 == 0] for rank in (0, 1, 2, 3, 4, 6)}
    why = _wait_for_all(Store(**here), 16, 4, 0.05, print)
    expected = "rank 5 of node1, rank 7 of node1, ranks 8 to 11, ranks 12 to 15 did not come within 0 s"
    assert why.startswith(expected.replace("rank 5 of node1, rank 7 of node1", "ranks 5 to 7 of node1"))
    complete = {f"here_{rank}": ["a", "b", True] for rank in range(2)}
    assert _wait_for_all(Store(**complete), 2, 1, 0.0, print) == ""
    monkeypatch.setattr(preflight, "TELL_SECONDS", 0.0)
    told: list[str] = []
    _wait_for_all(Store(here_0=["a", "b", True]), 2, 1, 0.3, told.append)
    assert told and told[0].startswith("waiting for rank 1, 0 s so far")


def test_pairs_that_fail_in_words() -> None:
    names = dict(enumerate("abcd"))
    assert _cut_off([(2, 0), (2, 1), (3, 2)], names, "no connection").startswith(
        "no connection between c and a, b, d: a firewall"
    )
    assert _cut_off([(1, 0)], names, "no connection").startswith("no connection between b and a: ")
    both = _cut_off([(1, 0), (3, 2)], names, "nothing comes through")
    assert both.startswith("nothing comes through between b and a; nothing comes through between d and c: ")
    many = _cut_off([(rank, 0) for rank in range(1, 20)], {rank: f"n{rank}" for rank in range(20)}, "no connection")
    assert many.startswith("no connection between n0 and n1, n2, n3, n4, n5, n6, n7, n8 …: ")


def found(name: str, **changes: Any) -> dict[str, Any]:
    """What a rank has found."""
    return {"name": name, "links": {"0-1": 5e9}, "at": None, "within": 8e9, "all": 4e9, "latency": 1e-5, "flops": 1e12} | changes


def test_what_the_ranks_found_makes_a_whole() -> None:
    parts = [found("a"), found("a", all=3e9, flops=9e11), found("b", links={"0-1": 1e9}), found("b", latency=2e-5)]
    report = _report(Store(**{f"found_{rank}": part for rank, part in enumerate(parts)}), 4, 2, 1000, 1.0)
    assert report["nodes"] == ["a", "b"] and report["ranks_per_node"] == 2
    assert report["links"] == [[0, 1, 6e9]], "the ranks of a node send together; the slower side counts"
    assert report["all_reduce_bytes_per_second"] == 3e9 and report["latency_seconds"] == 2e-5
    assert report["within_bytes_per_second"] == 8e9 and report["flops_per_second"] == [9e11, 1e12]
    assert report["bytes"] == 4000


def test_who_is_stuck_is_named() -> None:
    parts = {"found_0": found("a", stuck="x", at=[0, 1]), "found_1": found("b", stuck="y", at=[0, 1]), "found_2": found("c")}
    why = _report(Store(**parts), 3, 1, 10, 1.0)["why"]
    assert why.startswith("nothing comes through between a and b: ")
    parts = {"found_0": found("a"), "found_1": found("b", stuck="not done after 30 s")}
    why = _report(Store(**parts), 2, 1, 10, 1.0)["why"]
    assert why == "an all-reduce of all ranks fails although neighbours reach each other: rank 1 of b, not done after 30 s"
    assert _report(Store(found_0=found("a")), 2, 1, 10, 0.01)["why"] == "node 1: no rank answers"


def test_an_answer_that_is_a_refusal() -> None:
    assert _answer(Store(all={"why": "", "leaders": {"0": "a"}}), "all", 1.0)["leaders"] == {"0": "a"}
    with pytest.raises(NetworkError, match="node 3 is off"):
        _answer(Store(all={"why": "node 3 is off"}), "all", 1.0)
    with pytest.raises(NetworkError, match="rank 0 did not answer within 1 s"):
        _answer(Store(), "all", 1.0)


def test_without_a_launchers_store_there_is_nothing_to_meet_at() -> None:
    meet({"RANK": "1", "WORLD_SIZE": "2"}, 0.0, print)


def test_a_node_without_gpus_among_others_is_named() -> None:
    """It would wait in gloo for ranks that wait in NCCL."""
    assert preflight._without_gpus([("a", 8), ("b", 8)]) == preflight._without_gpus([("a", 0), ("b", 0)]) == ""
    why = preflight._without_gpus([("a", 8), ("a", 8), ("b", 0), ("b", 0), ("c", 0)])
    assert why == "torch sees no GPU on b, c, and some on a: see nvidia-smi and progscale doctor there"


def test_what_hangs_within_a_call_is_told_too(two_ranks: TwoRanks) -> None:
    """NCCL sets its connections up there, for as long as it takes."""
    for answer in two_ranks.run("tests.harness.programs:measured_with_a_rank_that_hangs"):
        assert answer.startswith("an all-reduce of all ranks fails although neighbours reach each other: rank "), answer
        assert "not done after" in answer


def test_the_own_address_is_that_of_the_interface() -> None:
    assert own_address({"MASTER_ADDR": "127.0.0.1"}) == "127.0.0.1"
    assert own_address({"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "192.0.2.1"}) == "127.0.0.1"


def test_two_ranks_of_a_node_measure(two_ranks: TwoRanks) -> None:
    """One node: no links, and what is within is all."""
    first, again = (two_ranks.run("tests.harness.programs:measured_here") for _ in range(2))
    assert first[0] == first[1] != again[0] == again[1], "each time anew"
    for network in first:
        assert len(network["nodes"]) == 1 and network["ranks_per_node"] == 2 and network["links"] == ()
        assert network["within_bytes_per_second"] > 1e6 and network["all_reduce_bytes_per_second"] > 1e6
        assert 0 < network["latency_seconds"] < 1 and network["flops_per_second"][0] > 1e8


def test_other_data_on_a_rank_is_refused(two_ranks: TwoRanks) -> None:
    """Files of one name differ by machine; a model's shape too."""
    assert two_ranks.run("tests.harness.programs:same_input_on_all_ranks", data=["4 rows, x", "4 rows, x"]) == ["", ""]
    answers = two_ranks.run("tests.harness.programs:same_input_on_all_ranks", data=["4 rows, x", "4 rows, y"])
    for answer in answers:
        assert "the training data on rank 1 (" in answer and "is not that of rank 0" in answer and "copy them anew" in answer
