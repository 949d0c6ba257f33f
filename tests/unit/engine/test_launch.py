"""What is refused before an engine is built, and the config that each DeepSpeed stage gets."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from progscale.engine.base import EngineSettings
from progscale.engine.deepspeed import check_release, stage_config
from progscale.engine.launch import check_precision, find_compiler, set_up_cpu, take_over_launcher_settings
from progscale.engine.local import LocalEngine
from progscale.errors import UserError
from progscale.models.lookup import hidden_size
from tests.harness.cases import make_engine
from tests.tiny import tiny_config, tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ZERO2 = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    }
}


@pytest.mark.parametrize(
    ("precision", "device", "deepspeed"),
    [("fp32", CPU, False), ("bf16", CPU, False), ("bf16_params", CPU, True), ("fp16", GPU, False), ("fp16", GPU, True)],
)
def test_precisions_that_work(precision: str, device: torch.device, deepspeed: bool) -> None:
    check_precision(precision, device, deepspeed)


def test_precisions_that_do_not() -> None:
    with pytest.raises(UserError, match=r"'bf16_params' keeps fp32 masters in DeepSpeed; without it take 'bf16'"):
        check_precision("bf16_params", GPU, deepspeed=False)
    with pytest.raises(UserError, match=r"'fp16' is not supported on this CPU; take 'bf16' or 'fp32'") as caught:
        check_precision("fp16", CPU, deepspeed=False)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("first_good", "too_old", "stage", "on_cpu", "checkpointing", "why"),
    [
        ("0.19.0", "0.18.9", 1, False, False, "accumulates gradients wrongly"),
        ("0.19.0", "0.18.9", 2, True, True, "accumulates gradients wrongly"),
        ("0.19.0", "0.18.9", 3, False, False, "accumulates gradients wrongly"),
        ("0.19.3", "0.19.2", 3, False, True, "non-reentrant gradient checkpointing"),
        ("0.19.8", "0.19.7", 3, True, False, "over gloo"),
        ("0.19.8", "0.19.7", 3, True, True, "over gloo"),
    ],
)
def test_releases(first_good: str, too_old: str, stage: int, on_cpu: bool, checkpointing: bool, why: str) -> None:
    check_release(first_good, stage, on_cpu=on_cpu, checkpointing=checkpointing)
    check_release("1.0.0", stage, on_cpu=on_cpu, checkpointing=checkpointing)
    with pytest.raises(UserError, match=rf"DeepSpeed {too_old} .*{why}.*upgrade to {first_good}.*deepspeed>={first_good}"):
        check_release(too_old, stage, on_cpu=on_cpu, checkpointing=checkpointing)


def config_for(deepspeed: dict[str, Any], world: int = 2, **settings: Any) -> dict[str, Any]:
    return stage_config(deepspeed, EngineSettings(**settings), world, hidden=32)


def test_auto_buckets_follow_the_hidden_size() -> None:
    assert config_for(ZERO3)["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 5_000_000,
        "stage3_prefetch_bucket_size": 921,
        "stage3_param_persistence_threshold": 320,
    }
    wide = stage_config(ZERO2, EngineSettings(), 2, hidden=4096)
    assert wide["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 4096 * 4096}
    literal = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}
    assert config_for(literal)["zero_optimization"] == literal["zero_optimization"]


def test_the_users_json_is_left_as_it_is() -> None:
    given = {"zero_optimization": dict(ZERO3["zero_optimization"]), "wall_clock_breakdown": True}
    made = config_for(given)
    assert given == {"zero_optimization": ZERO3["zero_optimization"], "wall_clock_breakdown": True}
    assert made["wall_clock_breakdown"] is True


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (2, 3), (8, 4)])
def test_batch_sizes_agree(world: int, micro: int) -> None:
    made = config_for(ZERO2, world, micro_batch_size=micro)
    assert made["train_micro_batch_size_per_gpu"] == micro
    assert made["train_batch_size"] == micro * world * made["gradient_accumulation_steps"]


@pytest.mark.parametrize("norm", [None, 0.5])
def test_clipping(norm: float | None) -> None:
    assert config_for(ZERO2, max_grad_norm=norm)["gradient_clipping"] == (norm or 0.0)


@pytest.mark.parametrize(
    ("precision", "bf16", "fp16", "autocast"),
    [
        ("fp32", False, False, False),
        ("bf16", False, False, True),
        ("bf16_params", True, False, False),
        ("fp16", False, True, False),
    ],
)
def test_one_precision_is_on(precision: Any, bf16: bool, fp16: bool, autocast: bool) -> None:
    made = config_for(ZERO2, precision=precision)
    assert (made["bf16"]["enabled"], made["fp16"]["enabled"]) == (bf16, fp16)
    # Without the empty list DeepSpeed would communicate the gradients in bf16.
    wanted = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert made.get("torch_autocast") == (wanted if autocast else None)


def test_loss_scale_options_pass() -> None:
    made = config_for({**ZERO2, "fp16": {"initial_scale_power": 8}}, precision="fp16")
    assert made["fp16"] == {"enabled": True, "initial_scale_power": 8}


@pytest.mark.parametrize(("family", "size"), [("bert", 16), ("distilbert", 16)])
def test_hidden_size(family: str, size: int) -> None:
    assert hidden_size(tiny_model(family, blocks=1)) == size
    assert tiny_config(family).hidden_size == size
    assert hidden_size(nn.Linear(1, 1)) == 0


def test_threads_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        assert set_up_cpu(3) == torch.get_num_threads() == 3
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
        assert set_up_cpu() == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("progscale.engine.launch.sys.executable", str(tmp_path / "python"))
    assert shutil.which("c++") is None
    with pytest.raises(UserError, match=r"needs c\+\+ and ninja; install .*configs/ddp\.json"):
        find_compiler()


def test_without_deepspeed_one_process_is_plain_torch() -> None:
    engine = make_engine(tiny_model("bert", blocks=1), "plain")
    assert isinstance(engine, LocalEngine)
    assert (engine.name, engine.rank, engine.world_size, engine.is_main) == ("plain", 0, 1, True)
    assert "RANK" not in os.environ, "no process group is started"


def launcher(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in ("CONFIG_DS_FIELDS", "DEEPSPEED_CONFIG_FILE", "MIXED_PRECISION", "USE_DEEPSPEED", "USE_FSDP", "USE_MEGATRON_LM"):
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)
    for name, value in values.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)


def test_what_the_launchers_own_file_asks_for_is_not_dropped_silently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher(monkeypatch, CONFIG_DS_FIELDS="zero_stage", USE_DEEPSPEED="true")
    with pytest.raises(UserError, match=r"engine.deepspeed: missing, while .*DEEPSPEED.*--config configs/zero2.json"):
        take_over_launcher_settings(deepspeed=False)
    launcher(monkeypatch, USE_FSDP="True")
    with pytest.raises(UserError, match=r"asks for FSDP.*--config configs/zero3.json"):
        take_over_launcher_settings(deepspeed=True)
    assert capsys.readouterr().out == ""
    launcher(monkeypatch, MIXED_PRECISION="bf16")
    take_over_launcher_settings(deepspeed=False)
    assert capsys.readouterr().out == "accelerate's mixed_precision 'bf16' is not used: train.precision decides\n"


def test_what_the_run_decides_itself_is_taken_out_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"CONFIG_DS_FIELDS": "zero_stage", "DEEPSPEED_CONFIG_FILE": "ds.json", "USE_DEEPSPEED": "true"}
    launcher(monkeypatch, MIXED_PRECISION="no", **fields)
    take_over_launcher_settings(deepspeed=True)
    left = {name for name in os.environ if name.startswith("ACCELERATE_")}
    assert not left & {"ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_MIXED_PRECISION"}
    # An earlier DeepSpeed run in this process, and no launcher: the next run may be without.
    launcher(monkeypatch, USE_DEEPSPEED="true")
    take_over_launcher_settings(deepspeed=False)
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    assert capsys.readouterr().out == ""
