"""Runs whose frozen partitions lie in files: killed, they leave none and go on to the same end; a wrong folder is named."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from tests.harness.interrupted import Runs, same, twelve
from tests.harness.programs import in_process

ENGINE = "zero3-offload"
# Wide enough for a partition of a feed-forward matrix to be worth a file.
WIDE = {"model__overrides": {"hidden_size": 128, "intermediate_size": 512, "hidden_dropout_prob": 0.1}}
BLOCK = "engine__deepspeed__zero_optimization__offload_param__"


def on_disk(folder: Path) -> dict[str, Any]:
    return {**WIDE, f"{BLOCK}device": "nvme", f"{BLOCK}nvme_path": str(folder)}


def test_killed_and_resumed(runs: Runs, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    changes = on_disk(disk)
    ended = runs.train(tmp_path, ENGINE, fault="kill@step=8", **changes)
    assert -signal.SIGKILL in [rank.code for rank in ended]
    assert list(disk.iterdir()) == [], "what is left would fill the disk"
    runs.finish(tmp_path, ENGINE, **changes)
    # Where the weights lie does not show in what is computed.
    same(runs.whole(ENGINE, **changes), runs.whole(ENGINE, **WIDE))
    assert list(disk.iterdir()) == []


def test_the_folder_is_looked_at_before_time_is_spent(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    changes = {**on_disk(missing), "train__global_batch_size": 32}
    answer = in_process("train", *twelve(tmp_path, ENGINE, **changes))
    assert answer.code == 2
    assert f"offload_param.nvme_path: '{missing}' is not a folder; make one on a disk of this machine" in answer.err
    assert not (tmp_path / "a").exists()
    told = in_process("doctor", "--format", "json", *twelve(tmp_path, ENGINE, **changes))
    assert f"'{missing}' is not a folder" in told.out
    (tmp_path / "disk").mkdir()
    told = in_process("doctor", "--format", "json", *twelve(tmp_path, ENGINE, **on_disk(tmp_path / "disk")))
    assert "MiB for partitions of the parameters, of " in told.out
