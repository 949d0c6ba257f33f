"""The doctor: what is missing, too small, too old or taken is a problem with a remedy, and looking leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from progscale import doctor
from progscale.config import Checkpoint, Config, Engine, Run, Task, Train, load_config
from progscale.doctor import Check, Elements, Gpu, Ranks
from progscale.errors import ConfigError
from progscale.estimate import rank_state
from progscale.inputs import NO_PERMISSIONS
from progscale.memory import memory_of
from progscale.plan import plan_for
from progscale.tasks.demo import DEMO_MODEL
from tests.harness.programs import REPOSITORY, Answer, in_process

GIB = 2**30
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
LAUNCHED |= {"MASTER_PORT": "29511", "TORCHELASTIC_RUN_ID": "x"}
H200, V100 = Gpu("NVIDIA H200", 140 * GIB, 130 * GIB, 9, 0), Gpu("Tesla V100", 16 * GIB, 15 * GIB, 7, 0)
MOUNTS = "/dev/vda / ext4 rw 0 0\nnode:/home /home nfs4 rw 0 0\noverlay /data overlay rw 0 0\n/dev/vdb /data xfs rw 0 0\n"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Runs the command line in this process, in an empty folder, as if no launcher had started it."""
    monkeypatch.chdir(tmp_path)
    for name in (*LAUNCHED, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    return in_process


def zero(stage: int, *, precision: Any = "fp32", types: dict[str, str] | None = None, **offload: str) -> Config:
    block = {"stage": stage, **{f"offload_{what}": {"device": device} for what, device in offload.items()}}
    deepspeed = {"zero_optimization": block, **({"data_types": types} if types else {})}
    return Config(train=Train(precision=precision), engine=Engine(name="deepspeed", deepspeed=deepspeed))


def named(checks: list[Check]) -> dict[str, Check]:
    assert len({check.name for check in checks}) == len(checks)
    return {check.name.partition(": ")[2]: check for check in checks}


# -- versions ---------------------------------------------------------------------------------------------------------


def versions(needed: list[str], python: str = "3.11.7", **installed: str) -> dict[str, Check]:
    def find(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    return named(doctor.version_checks(needed, python, find))


def test_versions_against_what_is_required() -> None:
    needed = ["python>=3.11", "torch>=2.10", "deepspeed>=0.18", "scipy>=1.13", "tqdm>=4.66", 'pytest>=8; extra == "dev"']
    found = versions(needed, torch="2.9.1+cpu", scipy="1.14", tqdm="4.0")
    assert found["torch"] == Check("versions: torch", "problem", "2.9.1+cpu; needed: >=2.10", "pip install 'torch>=2.10'")
    assert found["deepspeed"] == Check(
        "versions: deepspeed", "problem", "missing; needed: >=0.18", "pip install 'deepspeed>=0.18'"
    )
    assert found["python"].status == found["progscale"].status == "ok"
    assert found["tqdm"].status == "problem"
    assert "scipy" not in found and "pytest" not in found, "what is met has a line only where it matters, and extras have none"
    assert versions(["torch>=2.10"], torch="2.13.0+cu128")["torch"] == Check("versions: torch", "ok", "2.13.0+cu128")
    assert versions(["python>=3.11"], "3.10.2")["python"].status == "problem"


def test_a_checkout_that_nobody_installed() -> None:
    found = versions([])
    assert list(found) == ["progscale"]
    assert found["progscale"].status == "note"
    assert found["progscale"].remedy == "pip install -e ."


def test_what_the_project_asks_for_is_here() -> None:
    """The packages with a line of their own are among those that pyproject.toml names."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    checks = doctor.version_checks([f"python{project['requires-python']}", *project["dependencies"]], "3.11.0")
    assert [check for check in checks if check.status == "problem"] == []
    assert {check.name for check in checks} == {f"versions: {name}" for name in ("progscale", *doctor.SHOWN)}


def test_without_what_it_imports_the_doctor_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "progscale.setup", None)
    checks = doctor.examine(Config())
    assert (checks[-1].name, checks[-1].status) == ("versions: imports", "problem")
    assert "progscale.setup" in checks[-1].found
    assert checks[0].name == "versions: progscale"


# -- machine ----------------------------------------------------------------------------------------------------------

MEMINFO = "MemTotal:       16777216 kB\nMemFree:  100 kB\nMemAvailable:   12582912 kB\nSwapTotal: 9 kB\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("", {}, (16, 12)),
        ("0::/job/step\n", {"job/memory.max": 8 * GIB, "job/step/memory.max": "max"}, (8, 8)),
        ("0::/job/step\n", {"job/step/memory.max": 14 * GIB}, (14, 12)),
        ("0::/of/the/host\n", {"memory.max": 2 * GIB}, (2, 2)),
        ("0::/job\n", {"job/memory.max": "max\n"}, (16, 12)),
        ("4:memory:/job\n3:cpu:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": f"{4 * GIB}\n"}, (4, 4)),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": 2**63 - 4096}, (16, 12)),
        ("3:cpu:/job\n", {"cpu/job/memory.limit_in_bytes": GIB}, (16, 12)),
    ],
)
def test_memory_is_what_the_cgroups_leave(tmp_path: Path, own: str, files: dict[str, Any], expected: tuple[int, int]) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(content))
    total, available = memory_of(MEMINFO, tmp_path, own)
    assert (total / GIB, available / GIB) == expected


def test_a_system_that_tells_nothing_of_its_memory(tmp_path: Path) -> None:
    assert memory_of("", tmp_path, "") == (0, 0)
    assert doctor.memory_checks(Config(), Elements(10**9, 10**9), Ranks(), [], available=0) == []


@pytest.mark.parametrize(("shared", "workers", "status"), [(GIB - 1, 1, "note"), (GIB, 1, "ok"), (2**26, 0, "ok")])
def test_shared_memory_matters_to_data_loader_processes(shared: int, workers: int, status: str) -> None:
    config = Config(train=Train(num_workers=workers))
    check = named(doctor.machine_checks(config, "flags : fpu amx_bf16 amx_tile avx512_bf16 avx2", (2 * GIB, GIB), shared))
    assert check["/dev/shm"].status == status
    assert bool(check["/dev/shm"].remedy) == (status == "note")
    assert check["memory"].found == "1.0 GiB of 2.0 GiB available"
    assert check["CPU"].found.endswith("for bf16 they have amx_bf16, avx512_bf16")


def test_gpus() -> None:
    fp32, bf16 = Config(), Config(train=Train(precision="bf16"))
    found = "NVIDIA H200, 130.0 GiB of 140.0 GiB free; compute capability 9.0, bf16; torch is built for CUDA 12.8"
    assert doctor.gpu_checks(bf16, [H200], "12.8", True) == [Check("machine: GPU 0", "ok", found)]
    old = doctor.gpu_checks(bf16, [H200, V100], "12.8", True)[1]
    assert old.status == "note" and "7.0, no bf16" in old.found and "train.precision=fp16" in old.remedy
    assert doctor.gpu_checks(fp32, [V100], "12.8", True)[0].status == "ok"
    (none,) = doctor.gpu_checks(fp32, [], None, has_driver=False)
    assert none == Check("machine: GPU", "ok", "none: runs on the CPU; torch is built without CUDA")
    (hidden,) = doctor.gpu_checks(fp32, [], None, has_driver=True)
    assert hidden.status == "note" and "CUDA build of torch" in hidden.remedy


# -- the run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "gpus", "engine", "ranks", "status", "says"),
    [
        (None, 0, "auto", Ranks(), "ok", "1; no launcher here"),
        (None, 4, "auto", Ranks(4, 4), "ok", "4, one on each GPU, by accelerate launch; 1 by progscale train"),
        (None, 4, "plain", Ranks(), "ok", "1; no launcher here"),
        ({}, 0, "auto", Ranks(4, 2, 0), "ok", "4, of which 2 on this machine"),
        ({"LOCAL_WORLD_SIZE": None}, 0, "auto", Ranks(4, 1, 0), "ok", "4, of which 1 on this machine"),
        ({}, 1, "auto", Ranks(4, 2, 0), "problem", "4, of which 2 on this machine; GPUs here: 1"),
        ({"MASTER_PORT": None}, 0, "auto", Ranks(), "problem", "but not MASTER_PORT"),
        ({"RANK": None, "LOCAL_RANK": None}, 0, "auto", Ranks(), "problem", "but not RANK, LOCAL_RANK"),
        ({"WORLD_SIZE": "four"}, 0, "auto", Ranks(), "problem", "WORLD_SIZE: 'four' is no number"),
        ({"WORLD_SIZE": "0"}, 0, "auto", Ranks(), "problem", "RANK: 0 is not below WORLD_SIZE, 0"),
    ],
)
def test_processes(changes: dict[str, str | None] | None, gpus: int, engine: str, ranks: Ranks, status: str, says: str) -> None:
    environment = {} if changes is None else {**LAUNCHED, **changes}
    given = {key: value for key, value in environment.items() if value is not None}
    check, found = doctor.ranks_of(given, gpus, engine)
    assert (found, check.status) == (ranks, status)
    assert says in check.found
    assert bool(check.remedy) == (status == "problem")


def test_a_run_on_one_process_has_nothing_to_refuse() -> None:
    found = named(doctor.run_checks(Config(), Ranks(), on_gpu=False))
    assert {name: (check.status, check.found) for name, check in found.items()} == {
        "rows": ("ok", "32 a step, 32 of each rank, at most 32 at once"),
        "engine": ("ok", "plain, no process group"),
        "precision": ("ok", "fp32"),
    }


def test_what_a_run_refuses_is_a_problem() -> None:
    config = Config(train=Train(precision="bf16_params"), engine=Engine(name="plain"))
    found = named(doctor.run_checks(config, Ranks(3, 3, 0), on_gpu=False))
    rows = "train.global_batch_size: 32 rows cannot be shared equally by 3 processes"
    assert found["rows"] == Check("ranks: rows", "problem", rows, "use 30 or 33")
    assert found["engine"].status == "problem" and found["engine"].remedy == "take 'ddp' or 'auto'"
    assert found["precision"].status == "problem" and "'bf16_params' keeps fp32 masters" in found["precision"].found
    assert named(doctor.run_checks(Config(), Ranks(2, 2, 0), on_gpu=True))["engine"].found == "ddp, nccl"


@pytest.mark.parametrize("count", [4, 6])
def test_groups_for_second_copies_divide_the_ranks(count: int) -> None:
    deepspeed = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}
    config = Config(train=Train(global_batch_size=24), engine=Engine(name="deepspeed", deepspeed=deepspeed))
    found = named(doctor.run_checks(config, Ranks(count, count, 0), on_gpu=True))["engine"]
    assert found.status == ("ok" if count == 4 else "problem")
    if count == 6:
        says = f"{found.found}; {found.remedy}"
        assert "zero_hpz_partition_size: 4 ranks in a group do not divide the 6 of this run; allowed: 1, 2, 3, 6" in says


def test_the_release_of_deepspeed_and_its_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("progscale.engine.launch.sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr(doctor, "version", lambda name: "0.19.7")
    assert shutil.which("c++") is None
    found = named(doctor.run_checks(zero(3, param="cpu"), Ranks(2, 2, 0), on_gpu=False))
    assert found["engine"].found == "zero3-offload, gloo"
    assert found["DeepSpeed"].status == "problem" and "upgrade to 0.19.8" in found["DeepSpeed"].remedy
    assert (
        found["DeepSpeed on a CPU"].status == "problem"
        and "apt-get install g++ ninja-build" in found["DeepSpeed on a CPU"].remedy
    )
    for tool in ("c++", "ninja"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    found = named(doctor.run_checks(zero(2), Ranks(), on_gpu=False))
    assert (found["DeepSpeed"].status, found["DeepSpeed"].found) == ("ok", "its release is right for ZeRO-2")
    assert found["DeepSpeed on a CPU"].found == "the first run compiles its collectives, 25 to 90 s"
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    found = named(doctor.run_checks(zero(2), Ranks(), on_gpu=False))
    assert (found["DeepSpeed on a CPU"].status, found["DeepSpeed on a CPU"].found) == ("ok", "its collectives are compiled")
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.touch()
    assert named(doctor.run_checks(zero(2), Ranks(), on_gpu=False))["DeepSpeed on a CPU"].status == "ok", "somebody builds"
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    stale = named(doctor.run_checks(zero(2), Ranks(), on_gpu=False))["DeepSpeed on a CPU"]
    assert (stale.status, stale.remedy) == ("problem", f"rm {lock}") and "a build was killed 60 min ago" in stale.found
    lock.unlink()
    assert "DeepSpeed on a CPU" not in named(doctor.run_checks(zero(2), Ranks(), on_gpu=True)), "on a GPU nothing is compiled"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("options", [{}, {"schedule": "growing"}, {"embeddings": "never"}, {"stages": 2}])
def test_the_model_is_counted_as_the_plan_counts_it(options: dict[str, Any]) -> None:
    settings = [f"schedule.{'name' if key == 'schedule' else key}={json.dumps(value)}" for key, value in options.items()]
    check, (total, live, _) = doctor.model_check(load_config([], settings), NO_PERMISSIONS)
    plan = plan_for("bert-base-uncased", overrides=DEMO_MODEL, **options)
    by_stage = [stage.trainable_parameters for stage in plan.stages]
    assert (total, live) == (plan.total_parameters, max(by_stage))
    shown = ", ".join(f"{count / 1e6:.2f}" for count in by_stage)
    assert check.found == f"demo encoder on demo: {total / 1e6:.2f} M parameters, live by stage {shown} M"


def test_quantised_weights_are_half_a_byte(tmp_path: Path) -> None:
    _, elements = doctor.model_check(load_config([], ["method.name=qlora"]), NO_PERMISSIONS)
    blocks, width, inner = DEMO_MODEL["num_hidden_layers"], DEMO_MODEL["hidden_size"], DEMO_MODEL["intermediate_size"]
    assert elements.four_bit == blocks * (4 * width**2 + 2 * width * inner)
    assert doctor.state_of(zero(2), Elements(1000, 0, 900), 1) == (100 * 4 + 450, 0)
    config, need = Config(checkpoint=Checkpoint(keep=2)), 3 * (100 * 4 + 450) * 1000
    assert disk(tmp_path, config, live=0, four_bit=900_000, free=need)["room"].status == "ok"
    assert disk(tmp_path, config, live=0, four_bit=900_000, free=need - 1)["room"].status == "problem"


def test_stages_that_begin_late_or_are_many() -> None:
    late = doctor.model_check(load_config([], ["schedule.starts=[0, 9000, 18000]"]), NO_PERMISSIONS)
    assert late == doctor.model_check(load_config([], []), NO_PERMISSIONS)
    check, _ = doctor.model_check(load_config([], ["schedule.name=none", "schedule.stages=9"]), NO_PERMISSIONS)
    assert check.found.count("0.47") == 1 + 8 and check.found.endswith(" … M")


def test_data_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    task = Task(name="mrpc", path=str(tmp_path / "nowhere"))
    config = load_config([], [f"task.name={task.name}", f'task.path="{task.path}"', "model.name=bert-base-uncased"])
    check, elements = doctor.model_check(config, NO_PERMISSIONS)
    assert (check.status, elements) == ("problem", Elements())
    assert "nowhere" in check.found and check.remedy


# -- memory and disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "world_size", "device", "host"),
    [
        (Config(), 1, 800 * 16 + 200 * 4, 0),
        (Config(), 4, 800 * 16 + 200 * 4, 0),
        (Config(train=Train(precision="bf16")), 1, 800 * 16 + 200 * 4, 0),
        (Config(train=Train(precision="fp16")), 1, 800 * 16 + 200 * 4, 0),
        (zero(1), 4, 1000 * 4 + 800 * 4 + 200 * 12, 0),
        (zero(2), 4, 1000 * 4 + 200 * 4 + 200 * 12, 0),
        (zero(3), 4, 250 * 4 + 200 * 4 + 200 * 12, 0),
        (zero(2, precision="bf16_params"), 4, 1000 * 2 + 200 * 2 + 200 * 12, 0),
        (zero(2, precision="bf16_params", types={"grad_accum_dtype": "fp32"}), 4, 1000 * 2 + 200 * 4 + 200 * 12, 0),
        (zero(3, precision="fp16"), 4, 250 * 2 + 200 * 2 + 200 * 12, 0),
        (zero(2, optimizer="cpu"), 4, 1000 * 4, 200 * 4 + 200 * 12),
        (zero(2, optimizer="none"), 4, 1000 * 4 + 200 * 4 + 200 * 12, 0),
        (zero(3, optimizer="cpu", param="cpu"), 4, 0, 250 * 4 + 200 * 4 + 200 * 12),
        (zero(3, precision="bf16_params", optimizer="cpu"), 4, 250 * 2, 200 * 2 + 200 * 12),
    ],
)
def test_bytes_of_a_rank(config: Config, world_size: int, device: int, host: int) -> None:
    """1000 parameters, of which 800 are trained."""
    assert doctor.state_of(config, Elements(1000, 800), world_size) == (device, host)


def test_parameters_on_a_disk(tmp_path: Path) -> None:
    """What is frozen takes no memory, and the folder is looked at."""
    config, blocks = zero(3, optimizer="cpu", param="nvme"), Elements(1000, 800)
    assert config.engine.deepspeed is not None
    config.engine.deepspeed["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path)
    assert doctor.state_of(config, blocks, 4) == (0, 200 * 4 + 200 * 4 + 200 * 12)
    assert rank_state(config, 1000, 800, 0, 4, 8).disk == 50 * 4
    (check,) = doctor.offload_checks(config, Elements(2**20, 0), Ranks(4, 2, 0))
    assert check.status == "ok" and check.found.startswith("2.0 MiB for partitions of the parameters, of ")
    config.engine.deepspeed["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path / "none")
    (check,) = doctor.offload_checks(config, blocks, Ranks())
    assert check == Check(
        "memory: parameters on disk",
        "problem",
        f"engine.deepspeed.zero_optimization.offload_param.nvme_path: '{tmp_path / 'none'}' is not a folder",
        "make one on a disk of this machine",
    )
    assert doctor.offload_checks(zero(3, param="cpu"), blocks, Ranks()) == []


def test_memory_that_is_short() -> None:
    million = 10**6
    need = 16 * million

    def of(config: Config, ranks: Ranks, gpus: list[Gpu], available: int) -> dict[str, str]:
        checks = doctor.memory_checks(config, Elements(million, million), ranks, gpus, available)
        assert all(bool(check.remedy) == (check.status == "problem") for check in checks)
        assert all("activations are not counted" in check.found for check in checks)
        return {name: check.status for name, check in named([c._replace(name=": " + c.name) for c in checks]).items()}

    assert of(Config(), Ranks(), [], need) == {"memory: the CPU": "ok"}
    assert of(Config(), Ranks(), [], need - 1) == {"memory: the CPU": "problem"}
    assert of(Config(), Ranks(4, 2, 0), [], 2 * need - 1) == {"memory: the CPU": "problem"}, "two ranks share the machine"
    # The GPU with least room decides, and the machine's memory plays no part.
    full = H200._replace(free=need - 1)
    assert of(Config(), Ranks(2, 2, 0), [H200, full], 1) == {"memory: a GPU": "problem"}
    assert of(Config(), Ranks(2, 2, 0), [H200, H200], 1) == {"memory: a GPU": "ok"}
    offloaded = of(zero(2, optimizer="cpu"), Ranks(2, 2, 0), [full, full], need - 1)
    assert offloaded == {"memory: a GPU": "ok", "memory: the CPU": "problem"}


def disk(
    folder: Path, config: Config | None = None, *, total: int = 10**6, live: int = 10**6, four_bit: int = 0, **changes: Any
) -> dict[str, Check]:
    given = {"free": 10**12, "mounts": MOUNTS, "file_limit": -1, **changes}
    return named(doctor.disk_checks(config or Config(), Elements(total, live, four_bit), folder, **given))


def test_room_for_one_more_checkpoint_than_is_kept(tmp_path: Path) -> None:
    config = Config(checkpoint=Checkpoint(keep=3))
    need = 4 * (12 * 600_000 + 4 * 400_000)
    assert disk(tmp_path, config, live=600_000, free=need)["room"].status == "ok"
    short = disk(tmp_path, config, live=600_000, free=need - 1)["room"]
    assert short.status == "problem" and "a smaller checkpoint.keep" in short.remedy
    assert "8.4 MiB each, 3 kept" in short.found
    half = 3 * (12 * 600_000 + 2 * 400_000)
    assert disk(tmp_path, zero(2, precision="bf16_params"), live=600_000, free=half)["room"].status == "ok"
    assert disk(tmp_path, zero(2, precision="bf16_params"), live=600_000, free=half - 1)["room"].status == "problem"
    assert "room" not in disk(tmp_path, total=0, live=0)


@pytest.mark.parametrize(
    ("total", "megabytes", "limit", "status"),
    [
        (10**9, 256, -1, "ok"),
        (10**9, 256, 256 * 2**20, "ok"),
        (10**9, 256, 256 * 2**20 - 1, "problem"),
        (10**9, 16, 256 * 2**20 - 1, "ok"),
        (10**6, 256, 12 * 10**6, "ok"),
        (10**6, 256, 12 * 10**6 - 1, "problem"),
        (0, 256, 2**20, "problem"),
    ],
)
def test_the_largest_file(tmp_path: Path, total: int, megabytes: int, limit: int, status: str) -> None:
    """A shard, or all of a checkpoint that is smaller."""
    config = Config(checkpoint=Checkpoint(shard_megabytes=megabytes))
    check = disk(tmp_path, config, total=total, live=total, file_limit=limit)["size of a file"]
    assert check.status == status
    assert ("ulimit -f" in check.remedy) == (status == "problem")


@pytest.mark.parametrize(
    ("folder", "kind", "status"),
    [
        ("/scratch", "ext4", "ok"),
        ("/home/me", "nfs4", "note"),
        ("/homes", "ext4", "ok"),
        ("/data", "xfs", "ok"),
        ("/run/x", "tmpfs", "note"),
    ],
)
def test_the_kind_of_file_system(folder: str, kind: str, status: str) -> None:
    check = disk(Path(folder), mounts=MOUNTS + "tmpfs /run tmpfs rw 0 0\n")["file system"]
    assert (check.found, check.status, bool(check.remedy)) == (kind, status, status == "note")
    assert disk(Path(folder), mounts="")["file system"].found == "not known"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file stands where a folder is needed; permissions do not stop the user root."""
    (tmp_path / "file").write_text("")
    folder = doctor.existing(tmp_path / "file" / "runs")
    assert folder == tmp_path / "file"
    assert disk(folder)["folder"] == Check(
        "checkpoints: folder", "problem", f"{folder}: Not a directory", "choose another with --set run.output_dir=…"
    )


def test_trying_a_folder_leaves_nothing(tmp_path: Path) -> None:
    folder = doctor.existing(tmp_path / "runs" / "of" / "mine")
    assert folder == tmp_path
    assert disk(folder)["folder"] == Check("checkpoints: folder", "ok", f"{tmp_path} is writable")
    assert list(tmp_path.iterdir()) == []


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_what_a_check_says() -> None:
    def refuse(text: str) -> None:
        raise ConfigError(text)

    assert doctor.told("a", "x is {}", lambda: 3) == Check("a", "ok", "x is 3")
    assert doctor.told("a", "x", refuse, "no y; take z; or w") == Check("a", "problem", "no y", "take z; or w")
    assert doctor.told("a", "x", refuse, "no y").remedy, "a problem without a remedy"
    assert doctor.told("a", "x", refuse, "no y; or so", remedy="r", status="note") == Check("a", "note", "no y", "r")
    with pytest.raises(KeyError):
        doctor.told("a", "x", dict().__getitem__, "a fault of ours")


def test_the_table() -> None:
    console = Console(width=100)
    for problems, caption in ((0, "no problems"), (1, "1 problem"), (2, "2 problems")):
        checks = [Check("a: [x]", "ok", "fine"), *(Check("b: y", "problem", "[red]broken", "mend it") for _ in range(problems))]
        with console.capture() as shown:
            console.print(doctor.render_checks(checks))
        lines = shown.get().splitlines()
        assert lines[-1].strip() == caption
        assert any("a: [x]" in line and "fine" in line for line in lines)
        assert sum("[red]broken" in line for line in lines) == sum("→ mend it" in line for line in lines) == problems


@pytest.mark.parametrize(("count", "text"), [(0, "0.0 KiB"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (3 * 2**40, "3.0 TiB")])
def test_sizes(count: int, text: str) -> None:
    assert doctor.size(count) == text


def test_the_command(command: Callable[..., Answer], tmp_path: Path) -> None:
    answer = command("doctor", "--format", "json")
    checks = [Check(**entry) for entry in json.loads(answer.out)]
    sections = list(dict.fromkeys(check.name.split(":")[0] for check in checks))
    assert sections == ["versions", "machine", "ranks", "model", "memory", "checkpoints", "network", "signals", "cache"]
    problems = [check for check in checks if check.status == "problem"]
    assert problems == []
    assert answer.code == 0
    assert list(tmp_path.iterdir()) == []
    assert not torch.distributed.is_initialized()


def test_a_problem_is_exit_code_2(command: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = Config(run=Run(output_dir="file/runs"))
    answer = command(
        "doctor", "--config", str(REPOSITORY / "configs" / "demo.json"), "--set", f"run.output_dir={config.run.output_dir}"
    )
    assert answer.code == 2
    assert "1 problem" in answer.out
    assert "--set run.output_dir=…" in answer.out
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_one_answer_for_each_machine(command: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert command("doctor") == Answer(0, "", "")


def test_a_mistake_in_the_config_needs_no_torch(tmp_path: Path) -> None:
    program = """
import sys
from progscale.cli import main
code = main(["doctor", "--set", "train.epoch=3"])
sys.exit(code if "torch" not in sys.modules else 99)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "did you mean 'epochs'?" in done.stderr
