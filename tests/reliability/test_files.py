"""Runs whose frozen partitions lie in files: killed, they leave none and go on to the same end; a wrong folder is named."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

from tests.harness.interrupted import Runs, same, twelve

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


def test_the_folder_is_looked_at_before_time_is_spent(runs: Runs, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    ended = runs.train(tmp_path, ENGINE, **on_disk(missing))
    assert [rank.code for rank in ended] == [2, 2]
    host = socket.gethostname()
    told = (
        f"on {host}: engine.deepspeed.zero_optimization.offload_param.nvme_path: '{missing}' is not a folder; make one on a disk"
    )
    assert told in ended[0].err
    assert not (tmp_path / "a").exists()
    for folder, says in ((missing, f"'{missing}' is not a folder"), (tmp_path, "MiB for partitions of the parameters, of ")):
        (told,) = (
            rank.out for rank in runs.forks.run(["doctor", "--format", "json", *twelve(tmp_path, ENGINE, **on_disk(folder))])
        )
        assert says in told
