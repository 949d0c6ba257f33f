"""A plan on a cluster: what fits, which engine, from how many nodes on communication takes over; and options that cannot be."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from progscale.config import Config, load_config
from progscale.errors import ConfigError, UserError
from progscale.estimate import rank_state
from progscale.plan import plan_for
from progscale.scale import USABLE, Scale, make_cluster, render_scale, scale_plan, with_rows
from tests.harness.programs import REPOSITORY, in_process

OPTIONS: dict[str, Any] = {
    "nodes": 2,
    "gpus": 4,
    "gpu": "a100-80gb",
    "between_gbits": 200.0,
    "efficiency": 0.4,
    "latency_microseconds": 20.0,
}
ZERO3 = str(REPOSITORY / "configs" / "zero3.json")


def scaled(*settings: str, files: tuple[str, ...] = (), model: str = "bert-base-uncased", **options: Any) -> Scale:
    """Of a plan over three stages."""
    config = load_config(files, list(settings))
    cluster = make_cluster(config, **{**OPTIONS, **options})
    config = with_rows(config, cluster.world_size)
    return scale_plan(plan_for(model), config, cluster, 8.0)


def test_a_gpu_computes_in_the_precision_of_the_run() -> None:
    assert make_cluster(Config(), **OPTIONS).flops == pytest.approx(19.5e12 * 0.4)
    assert make_cluster(load_config([], ["train.precision=bf16"]), **OPTIONS).flops == pytest.approx(312e12 * 0.4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"nodes": 0}, "--nodes: 0; 1 to 4096 are allowed"),
        ({"gpus": 5000}, "--gpus-per-node: 5000; 1 to 4096"),
        ({"gpu": "a100-80"}, "--gpu: 'a100-80' is not known; v100-32gb, .*; did you mean 'a100-80gb'"),
        ({"between_gbits": 0.0}, "--between-gbits: 0.0; more than 0"),
        ({"between_gbits": float("nan")}, "--between-gbits: nan; more than 0"),
        ({"efficiency": 1.5}, "--efficiency: 1.5; it is a share"),
        ({"efficiency": -1.0}, "--efficiency: -1.0; more than 0"),
        ({"latency_microseconds": -1.0}, "--latency-us: -1.0; 0 or more"),
        ({"network": "nowhere.json"}, "--network: 'nowhere.json' cannot be read"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_cluster(Config(), **{**OPTIONS, **changes})


def test_measured_figures_take_the_place_of_the_data_sheets(tmp_path: Path) -> None:
    network = {
        "nodes": ["a", "b"],
        "ranks_per_node": 4,
        "links": [[0, 1, 20e9]],
        "all_reduce_bytes_per_second": 9e9,
        "within_bytes_per_second": 100e9,
        "latency_seconds": 60e-6,
        "flops_per_second": [200e12, 180e12],
        "flops_of": "bf16",
        "bytes": 2**26,
    }
    path = tmp_path / "net.json"
    path.write_text(json.dumps(network))
    bf16 = load_config([], ["train.precision=bf16"])
    found = make_cluster(bf16, **{**OPTIONS, "network": str(path)})
    assert (found.between, found.latency) == (20e9, pytest.approx(20e-6)), "a message for each doubling of eight ranks"
    assert found.within == pytest.approx(150e9), "an all-reduce of four sends one and a half times the tensor"
    assert found.flops == pytest.approx(180e12 * 0.4)
    # Figures of other numbers say nothing.
    assert make_cluster(Config(), **{**OPTIONS, "network": str(path)}).flops == pytest.approx(19.5e12 * 0.4)
    path.write_text("{}")
    with pytest.raises(UserError, match="is not what progscale doctor --save writes"):
        make_cluster(bf16, **{**OPTIONS, "network": str(path)})
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        make_cluster(bf16, **{**OPTIONS, "network": str(path)})


def test_a_batch_that_nobody_asked_for_grows_with_the_ranks() -> None:
    assert with_rows(Config(), 8).train.global_batch_size == 32
    assert with_rows(Config(), 128).train.global_batch_size == 1024
    asked = load_config([], ["train.global_batch_size=32"])
    assert with_rows(asked, 128).train.global_batch_size == 32
    answer = in_process("plan", "--model", "bert-base-uncased", "--nodes", "16", "--set", "train.global_batch_size=32")
    assert answer.code == 2 and "32 rows cannot be shared equally by 128 processes; use 128" in answer.err


def test_later_stages_send_less_and_take_less() -> None:
    for found in (scaled(), scaled(files=(ZERO3,))):
        times = [stage.time for stage in found.stages]
        assert times[0].communicate > times[1].communicate > times[2].communicate
        assert times[0].compute > times[1].compute > times[2].compute
        assert [stage.bytes for stage in found.stages] == sorted((stage.bytes for stage in found.stages), reverse=True)
        assert all(stage.fits for stage in found.stages)


def test_every_engine_is_shown_and_the_runs_own_as_it_is() -> None:
    found = scaled("train.precision=bf16_params", files=(ZERO3,))
    assert list(found.engines) == ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    size, fits, time = found.engines["ZeRO-3"]
    assert (size, fits, time) == (found.stages[0].bytes, True, found.stages[0].time)


def test_communication_takes_over_where_the_rows_get_few() -> None:
    found = scaled("train.global_batch_size=512", between_gbits=50.0)
    assert found.takes_over is not None
    for nodes, time in found.sweep.items():
        assert (time.communicate > time.compute) == (nodes >= found.takes_over)
        assert 512 % (nodes * 4) == 0
    assert 2 in found.sweep and max(found.sweep) == 128
    # A quicker network puts it off, a quicker GPU brings it nearer.
    later = scaled("train.global_batch_size=512", between_gbits=400.0).takes_over
    assert later is None or later > found.takes_over
    sooner = scaled("train.global_batch_size=512", "train.precision=bf16", between_gbits=50.0).takes_over
    assert sooner is not None and sooner < found.takes_over


def test_the_largest_model_just_fits() -> None:
    found = scaled()
    plan = plan_for("bert-base-uncased")
    block = plan.block_parameters["blocks"] if "blocks" in plan.block_parameters else next(iter(plan.block_parameters.values()))
    activations = found.stages[0].cost.activation_bytes
    assert activations is not None

    def size(blocks: int) -> float:
        total = plan.total_parameters + (blocks - 12) * int(block)
        return rank_state(found.config, total, total, 0, 8, 8.0).device + activations * blocks / 12

    room = USABLE * 80e9
    assert size(found.most_blocks) <= room < size(found.most_blocks + 1)
    assert found.most_parameters == plan.total_parameters + (found.most_blocks - 12) * int(block)
    # Split over more ranks more fits; of what is split nowhere, no more.
    assert scaled(files=(ZERO3,), nodes=64).most_blocks > scaled(files=(ZERO3,)).most_blocks > found.most_blocks


def test_what_does_not_fit_is_told_with_what_does() -> None:
    from rich.console import Console

    found = scaled(model="xlm-roberta-xl")
    small = dataclasses.replace(found.cluster, memory=16e9)
    found = scale_plan(plan_for("xlm-roberta-xl"), found.config, small, 8.0)
    assert not found.stages[0].fits
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(render_scale(found, "a100-80gb"))
    assert "this one does not fit under DDP, it does under ZeRO-3" in console.export_text()


def test_the_command() -> None:
    answer = in_process("plan", "--nodes", "16", "--gpus-per-node", "8", "--model", "bert-large-uncased", "--format", "json")
    assert answer.code == 0, answer.err
    content = json.loads(answer.out)
    scale = content["scale"]
    assert content["world_size"] == 128 and scale["global_batch_size"] == 1024
    assert [stage["stage"] for stage in scale["stages"]] == [1, 2, 3]
    assert all(stage["seconds"]["longest"] > stage["seconds"]["shortest"] > 0 for stage in scale["stages"])
    assert scale["largest_model"]["parameters"] > content["total_parameters"]
    assert set(scale["by_nodes"]) == {"1", "2", "4", "8", "16", "32", "64", "128"}
    answer = in_process("plan", "--nodes", "2", "--world-size", "3", "--model", "bert-base-uncased")
    assert answer.code == 2 and "--world-size: 3, but --nodes and --gpus-per-node make 16" in answer.err


def test_second_copies_spare_the_network_between_nodes() -> None:
    """Of a slow one; and groups that the ranks cannot be cut into are refused, or left out of what else is shown."""
    group = "engine.deepspeed.zero_optimization.zero_hpz_partition_size={}"
    # Each micro-batch's backward pass gathers again.
    again = "engine.deepspeed.zero_optimization.stage3_max_reuse_distance=0"
    slow: dict[str, Any] = {"files": (ZERO3,), "between_gbits": 1.0, "nodes": 4}
    plain, copied = scaled(again, **slow), scaled(again, group.format(4), **slow)
    assert copied.stages[0].time.communicate < plain.stages[0].time.communicate
    assert copied.stages[-1].time.communicate < 0.7 * plain.stages[-1].time.communicate, "what is frozen stays within the node"
    assert all(copied.stages[index].bytes > plain.stages[index].bytes for index in range(3))
    with pytest.raises(ConfigError, match="zero_hpz_partition_size: 5 ranks in a group do not divide the 16 of this run"):
        scaled(group.format(5), **slow)
    wide = scaled(group.format(16), **slow)
    assert min(wide.sweep) == 4, "fewer nodes have no 16 ranks"


def test_what_offload_moves() -> None:
    zero = "engine.deepspeed.zero_optimization."
    kept = scaled(files=(ZERO3,))
    optimizer = scaled(zero + 'offload_optimizer={"device": "cpu"}', files=(ZERO3,))
    both = scaled(zero + 'offload_optimizer={"device": "cpu"}', zero + 'offload_param={"device": "cpu"}', files=(ZERO3,))
    weights = scaled(zero + 'offload_param={"device": "cpu"}', files=(ZERO3,))
    first = [found.stages[0].time.update for found in (kept, weights, optimizer, both)]
    assert first == sorted(first) and len(set(first)) == 4
    assert first[1] - first[0] == pytest.approx(first[3] - first[2]), "weights cost the same wherever the optimizer is"
