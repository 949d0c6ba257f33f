"""`progscale submit`: what SLURM says is read and held against what is asked for; the filled script is whole, correct shell."""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import math
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from progscale import slurm
from progscale.errors import ConfigError
from progscale.slurm import Gpus, Node, Partition, Wanted, clean_environment, parse_sinfo, refusals, share_of_cpus
from progscale.submit.request import TEMPLATE, Request, check
from progscale.submit.script import arguments_of, exports_of, fill, fill_for, text_of
from tests.harness.programs import REPOSITORY, Answer, in_process

# As SLURM 22.05 prints it; the last partition has a default time limit and limits on nodes and CPUs.
SINFO = """\
debug|debug*|up|infinite|n/a|1-infinite|UNLIMITED|n1|idle|2|8000|(null)
debug|debug*|up|infinite|n/a|1-infinite|UNLIMITED|n2|mixed*|2|8000|(null)
short|short|up|10:00|n/a|1-infinite|UNLIMITED|n1|idle|2|8000|(null)
gpu|gpu|up|1-00:00:00|n/a|1-infinite|UNLIMITED|g1|idle~|96|515000|gpu:a100:8(S:0-1)
gpu|gpu|up|1-00:00:00|n/a|1-infinite|UNLIMITED|g2|allocated|64|515000|gpu:a100:4,gpu:v100:2,nvme:1
gpu|gpu|up|1-00:00:00|n/a|1-infinite|UNLIMITED|g3|down*|96|515000|gpu:a100:8(S:0-1)
shut|shut|drain|infinite|n/a|1-infinite|UNLIMITED|n1|idle|2|8000|(null)
narrow|narrow|up|1-00:00:00|30:00|1-2|1|n1|idle|2|8000|(null)
narrow|narrow|up|1-00:00:00|30:00|1-2|1|n2|draining|2|8000|(null)
narrow|narrow|up|1-00:00:00|30:00|1-2|1|n3|down~|2|8000|(null)
"""
PARTITIONS = parse_sinfo(SINFO)
GPU = ("gpu",)

Command = Callable[..., Answer]


# -- what SLURM says --------------------------------------------------------------------------------------------------


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(slurm).failed == 0


def test_partitions_are_read() -> None:
    found = {partition.name: partition for partition in PARTITIONS}
    assert list(found) == ["debug", "short", "gpu", "shut", "narrow"]
    assert [name for name, partition in found.items() if partition.is_default] == ["debug"]
    assert found["short"].most_seconds == found["short"].default_seconds == 600
    assert found["debug"].most_seconds == math.inf
    assert (found["narrow"].default_seconds, found["narrow"].most_nodes, found["narrow"].most_cpus) == (1800, 2, 1)
    assert [node.name for node in found["gpu"].up] == ["g1", "g2"]
    assert [node.name for node in found["narrow"].up] == ["n1"]
    assert found["gpu"].nodes[1] == Node("g2", "allocated", 64, 515000, {"a100": 4, "v100": 2})
    assert parse_sinfo("\n") == []


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4", "1-", "-1", "1.5", "1-1:1:1:1"])
def test_no_time(text: str) -> None:
    with pytest.raises(ValueError):
        slurm.parse_time(text)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((slurm.parse_memory, text) for text in ("", "G", "-1", "1.5G", "10GB")),
        *((slurm.parse_gpus, text) for text in ("", "0", "a100", "a100:0", "a b:1", "8,2")),
        *((slurm.parse_array, text) for text in ("", "3-1", "a", "1,", "1-3:0", "0-99999", "1%")),
    ],
)
def test_no_amount(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


POSSIBLE = [
    Wanted(nodes=2, megabytes=8000, cpus_per_rank=2),
    Wanted(megabytes=0, partitions=("short",), seconds=600),
    Wanted(nodes=2, gpus=Gpus(4, "a100"), ranks=4, cpus_per_rank=16, partitions=GPU),
    Wanted(gpus=Gpus(8), ranks=8, partitions=GPU),
    # Any of them may take it.
    Wanted(seconds=1200, partitions=("short", "debug")),
]


@pytest.mark.parametrize("wanted", POSSIBLE, ids=str)
def test_what_the_cluster_has_is_not_refused(wanted: Wanted) -> None:
    assert refusals(wanted, PARTITIONS) == []


REFUSED = [
    (Wanted(nodes=3), "--nodes: 3 asked for; partition 'debug' has 2"),
    (Wanted(nodes=3, partitions=GPU), "--nodes: 3 asked for; partition 'gpu' has 2 that are up (g3 down*)"),
    (Wanted(nodes=3, partitions=("narrow",)), "--nodes: 3 asked for; partition 'narrow' gives a job at most 2"),
    (
        Wanted(partitions=("gpus",)),
        "--partition: 'gpus' is unknown; this cluster has debug, gpu, narrow, short, shut; did you mean",
    ),
    (Wanted(partitions=("shut",)), "--partition: 'shut' takes no jobs now (drain)"),
    (
        Wanted(gpus=Gpus(1)),
        "--gpus-per-node: 1 asked for on each node; those of partition 'debug' have no GPUs that SLURM knows of",
    ),
    (Wanted(gpus=Gpus(1)), "--partition gpu has all that is asked for"),
    (Wanted(gpus=Gpus(8), ranks=8), "--gpus-per-node: 8 asked for"),
    (Wanted(gpus=Gpus(9), partitions=GPU), "those of partition 'gpu' have at most a100:4, a100:8, v100:2"),
    (Wanted(gpus=Gpus(1, "h100"), partitions=GPU), "--gpus-per-node: h100:1 asked for on each node"),
    (
        Wanted(nodes=2, gpus=Gpus(8), partitions=GPU),
        "--nodes: 2 asked for; 1 in partition 'gpu' are up and have what is asked of each",
    ),
    (Wanted(megabytes=9000), "--mem: 9000M asked for on each node; those of partition 'debug' have at most 8000M"),
    (Wanted(cpus_per_rank=3), "--cpus-per-rank: 3 CPUs on a node; those of partition 'debug' have at most 2"),
    (Wanted(ranks=2, cpus_per_rank=2), "--cpus-per-rank: 2 CPUs for each of 2 ranks are 4 on a node"),
    (Wanted(ranks=3), "--ranks-per-node: 1 CPU for each of 3 ranks are 3 on a node"),
    (Wanted(cpus_per_rank=2, partitions=("narrow",)), "have at most 1"),
    (Wanted(seconds=601, partitions=("short",)), "--time: 10:01 asked for; partition 'short' has at most 10:00"),
    (Wanted(seconds=math.inf, partitions=("short",)), "--time: infinite asked for"),
    (Wanted(signal_seconds=600, partitions=("short",)), "--signal-seconds: 600 s before the end of a job of 10:00"),
]


@pytest.mark.parametrize(("wanted", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_the_cluster_cannot_give_is_refused(wanted: Wanted, message: str) -> None:
    faults = refusals(wanted, PARTITIONS)
    assert len(faults) == 1
    assert message in str(faults[0])


def test_all_refusals_at_once() -> None:
    wanted = Wanted(nodes=9, gpus=Gpus(2), megabytes=9e9, seconds=9e9, cpus_per_rank=999, partitions=("short",))
    assert [fault.key for fault in refusals(wanted, PARTITIONS)] == [
        *("--time", "--nodes", "--gpus-per-node", "--cpus-per-rank", "--mem")
    ]


def test_no_default_partition() -> None:
    assert "--partition: missing" in str(refusals(Wanted(), [Partition("a"), Partition("b")])[0])
    assert "'x' is unknown; this cluster has none" in str(refusals(Wanted(partitions=("x",)), [])[0])


def test_ranks_get_their_gpus_share_of_the_cpus() -> None:
    assert share_of_cpus(Wanted(gpus=Gpus(8), ranks=8, partitions=GPU), PARTITIONS) == 12
    # On either node: 96 CPUs for 8 GPUs, 64 for 6.
    assert share_of_cpus(Wanted(gpus=Gpus(4), ranks=4, partitions=GPU), PARTITIONS) == 10
    assert share_of_cpus(Wanted(gpus=Gpus(4), ranks=2, partitions=GPU), PARTITIONS) == 21
    assert share_of_cpus(Wanted(partitions=GPU), PARTITIONS) is None


def test_a_session_that_is_a_job_keeps_its_own_variables() -> None:
    shell = {"SLURM_CONF": "c", "SLURM_CPUS_PER_TASK": "1", "SBATCH_PARTITION": "p", "HOME": "h"}
    assert clean_environment(shell) == shell
    assert clean_environment({**shell, "SLURM_JOB_ID": "7"}, ["SBATCH_PARTITION"]) == {"SLURM_CONF": "c", "HOME": "h"}


# -- the script -------------------------------------------------------------------------------------------------------

ODD = [
    "task.path=/a b/it's",
    'model.overrides={"x": "$HOME `id` \\"y\\""}',
    "description=two\nlines\n#SBATCH --nodes=9",
    "--",
    "",
]


def script_of(request: Request) -> str:
    job = check(request)
    return text_of(fill_for(request, job, Path("logs", "submitted", "x.sbatch")))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; nothing of SLURM's or of ours is in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "SLURM_", "PROGSCALE_"))]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize(
    "request_",
    [
        Request(),
        Request(nodes=2, gpus_per_node="a100:8", seeds=[1, 2], set=["description=a 'b' \"c\"\nd"], sbatch=["exclusive"]),
        Request(tasks=["demo"], ranks_per_node=2, cpus_per_rank=3, max_restarts=0, apptainer="img:1", resume="must"),
    ],
    ids=["plain", "seeds", "apptainer"],
)
def test_the_filled_script_is_clean_shell(folder: Path, request_: Request) -> None:
    (folder / "x.sbatch").write_text(script_of(request_))
    checked = subprocess.run(["shellcheck", "x.sbatch"], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout


def test_arguments_survive_the_shell(folder: Path) -> None:
    """As sbatch gives them: the script's own first, then what stands behind the file's name."""
    template = "#!/usr/bin/env bash\n# usage\n#SBATCH --job-name=x\nset -euo pipefail\nprintf '%s\\0' \"$@\"\n"
    job = check(Request())
    request = Request(config=["my conf.json"], set=ODD, plugin=["a.b"], resume="auto", trust_remote_code=True)
    text = text_of(fill(template, ["# head"], {}, exports_of(request, job), arguments_of(request, job, Path("x.sbatch"))))
    (folder / "x.sbatch").write_text(text)
    done = subprocess.run(["bash", "x.sbatch", "--set", "more=1"], capture_output=True, text=True, timeout=60, check=True)
    sets = [word for value in ODD for word in ("--set", value)]
    wanted = ["--config", "my conf.json", *sets, "--plugin", "a.b", "--resume", "auto", "--trust-remote-code", "--set", "more=1"]
    assert done.stdout.split("\0")[:-1] == wanted
    assert "# usage" not in text


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_options_of_sbatch_are_replaced_and_added(folder: Path) -> None:
    options = {"nodes": 2, "gpus_per_node": "8", "cpus_per_rank": 12, "time": "12:00:00", "mem": "200G", "partition": "gpu"}
    found = directives(script_of(Request(**options, account="a b", signal_seconds=60, sbatch=["constraint=a100", "--exclusive"])))
    own = [line for line in (REPOSITORY / TEMPLATE).read_text().splitlines() if line.startswith("#SBATCH")]
    kept = [line.removeprefix("#SBATCH --") for line in own if "job-name" not in line and "signal" not in line]
    assert found == [
        *("job-name=demo-progtuning-42", *kept, "signal=B:USR1@60", "nodes=2", "gpus-per-node=8", "cpus-per-task=96"),
        *("mem=200G", "time=12:00:00", "partition=gpu", "account='a b'", f"chdir={folder}", "constraint=a100", "exclusive"),
    ]


def exports(text: str) -> list[str]:
    return [line.removeprefix("export ") for line in text.splitlines() if line.startswith("export PROGSCALE") and "=" in line]


def test_what_the_nodes_need_stands_in_the_script(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "setup.sh").touch()
    monkeypatch.setenv("PROGSCALE_LOGS", "my logs")
    monkeypatch.setenv("PROGSCALE_CONTAINER", "image")
    assert exports(script_of(Request(setup="setup.sh", max_restarts=3, ranks_per_node=1))) == [
        *(f"PROGSCALE_HOME={REPOSITORY}", "PROGSCALE_CONTAINER=image", "PROGSCALE_LOGS='my logs'"),
        *(f"PROGSCALE_SETUP={folder}/setup.sh", "PROGSCALE_RANKS_PER_NODE=1", "PROGSCALE_MAX_RESTARTS=3"),
    ]
    # One image; and the environment of this one is no use in it.
    text = script_of(Request(apptainer="docker://x"))
    assert {"PROGSCALE_CONTAINER=''", "PROGSCALE_APPTAINER=docker://x"} <= set(exports(text))
    assert "export PATH" not in text
    monkeypatch.delenv("PROGSCALE_CONTAINER")
    assert "export PATH" in script_of(Request())


def test_the_checkout_must_have_the_script(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROGSCALE_HOME", str(folder))
    assert f"PROGSCALE_HOME: '{folder}' has no launch/slurm/train.sbatch" in in_process("submit").err


# -- several runs -----------------------------------------------------------------------------------------------------


def test_each_task_and_seed_is_a_run_of_its_own(folder: Path) -> None:
    job = check(Request(set=["model.name=m"], tasks=["mrpc", "demo", "rte"], seeds=[3, 5]))
    assert [run.config.run_name for run in job.runs] == [
        f"{task}-progtuning-{seed}" for task in ("mrpc", "demo", "rte") for seed in (3, 5)
    ]
    tasks = REPOSITORY / "configs" / "tasks"
    assert job.lines.splitlines()[1:4] == [
        f"--config {tasks}/mrpc.json --set run.seed=5",
        "--set task.name=demo --set run.seed=3",
        "--set task.name=demo --set run.seed=5",
    ]
    assert job.name == "3-tasks-progtuning"
    text = text_of(fill_for(Request(tasks=["mrpc"]), job, Path("logs/submitted/x.sbatch")))
    assert {"array=1-6", "output=%x-%A_%a.out"} <= set(directives(text))
    assert f"--each {folder}/logs/submitted/x.txt" in text


def test_an_arrays_elements_are_seeds(folder: Path) -> None:
    job = check(Request(array="42-44%2"))
    assert [run.config.run_name for run in job.runs] == [f"demo-progtuning-{seed}" for seed in (42, 43, 44)]
    assert job.lines == ""
    assert job.name == "demo-progtuning"
    assert "#SBATCH --array=42-44%2" in script_of(Request(array="42-44%2"))


@pytest.mark.parametrize("several", [{"seeds": [1, 2]}, {"array": "1-2"}, {"tasks": ["mrpc", "rte"]}], ids=str)
def test_runs_never_share_a_name(folder: Path, several: dict) -> None:
    named = ["run.name=a", *(["model.name=m"] if "tasks" in several else [])]
    with pytest.raises(ConfigError, match=f"run.name: 'a' would name all 2 runs of --{next(iter(several))}; set it to null"):
        check(Request(set=named, **several))
    assert check(Request(set=["run.name=a"], seeds=[1])).name == "a"


def test_two_layers_of_one_task_are_no_two_runs(folder: Path) -> None:
    (folder / "one.json").write_text('{"train": {"epochs": 1}}')
    (folder / "two.json").write_text('{"train": {"epochs": 2}}')
    with pytest.raises(ConfigError, match="--tasks: two of the runs would be 'runs/demo-progtuning-42'"):
        check(Request(tasks=["one.json", "./two.json"]))


def test_the_config_is_checked_as_train_does(folder: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        check(Request(set=["train.epohcs=1", "task.metric=evaluate:x", "schedule.name=x"], tasks=["colla", "mrpc"], seeds=[1, 1]))
    found = {fault.key: fault.message for fault in raised.value.faults}
    assert len(found) == len(raised.value.faults) == 6
    # What is the same in all of them is said once.
    assert "did you mean 'epochs'?" in found["train.epohcs"] and "--tasks" not in found["train.epohcs"]
    assert "did you mean 'cola'?" in found["task.name"] and "(--tasks colla)" in found["task.name"]
    assert "(--tasks mrpc)" in found["model.name"]
    assert "allow it with --trust-remote-code" in found["task.metric"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(nodes=3), "32 rows cannot be shared equally by 3 processes; use 30 or 33 (3 nodes × 1 rank, as neither"),
        (Request(nodes=3, gpus_per_node="8"), "by 24 processes; use 24 or 48 (3 nodes × 8 ranks)"),
        (Request(nodes=2, ranks_per_node=3), "by 6 processes; use 30 or 36 (2 nodes × 3 ranks)"),
        (Request(gpus_per_node="8", ranks_per_node=3), "by 3 processes; use 30 or 33 (1 node × 3 ranks)"),
        (
            Request(nodes=2, set=["train.micro_batch_size=8", "train.gradient_accumulation_steps=4"]),
            "train.gradient_accumulation_steps: 32 rows",
        ),
    ],
    ids=str,
)
def test_what_only_the_ranks_decide(folder: Path, request_: Request, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(request_)
    assert message in str(raised.value)


MISTAKES = [
    (["--nodes", "0"], "--nodes: 0 is no number of them, from 1"),
    (["--time", "soon"], "--time: 'soon' is no time limit; e.g. 90 (minutes), 12:00:00 or 2-12:00:00"),
    (["--time", "5"], "--signal-seconds: 300 s before the end is before the begin of a job of --time 5:00"),
    (["--signal-seconds", "99999"], "--signal-seconds: 99999 is not between 0 and 65535"),
    (["--mem", "lots"], "--mem: 'lots' is no amount of memory; e.g. 200G"),
    (["--gpus-per-node", "a100"], "--gpus-per-node: 'a100' is no number of GPUs; e.g. 8 or a100:8"),
    (["--gpus-per-node", "2", "--ranks-per-node", "4"], "--ranks-per-node: 4 ranks on 2 GPUs of a node"),
    (["--max-restarts", "-1"], "--max-restarts: -1 is no number of restarts"),
    (["--array", "3-1"], "--array: '3-1' are no elements of a job array"),
    (["--array", "1-2", "--seeds", "1"], "--array: given beside --seeds or --tasks"),
    (["--seeds", "1", "1"], "--seeds: 1 1 names a seed twice"),
    (["--seeds", "1", "-1"], "--seeds: -1 is no seed"),
    (["--seeds", "one"], "invalid int value: 'one'"),
    (["--seeds", "1", "2", "--set", "run.name=a"], "run.name: 'a' would name all 2 runs of --seeds"),
    (["--tasks", "demo", "demo"], "--tasks: demo demo names a task twice"),
    (["--tasks", "a b.json"], "splits an element's options at spaces"),
    (["--setup", "missing.sh"], "--setup: 'missing.sh' cannot be read"),
    (["--apptainer", "missing.sif"], "--apptainer: 'missing.sif' cannot be read"),
    (["--apptainer", "a", "--container", "b"], "--container: given beside --apptainer; keep one"),
    (["--resume", "allways"], "--resume: 'allways' is none of auto, never, must"),
    (["--job-name", "a/b"], "--job-name: 'a/b' names the files of the job too"),
    (["--partition", ""], "--partition: '' is no name"),
    (["--sbatch", "nodes=3"], "--sbatch: 'nodes=3': give --nodes"),
    (["--sbatch=--gres=gpu:8"], "--sbatch: '--gres=gpu:8': give --gpus-per-node"),
    (["--sbatch", "x y"], "--sbatch: 'x y' is no long option of sbatch's"),
    (["--config", "missing.json"], "missing.json: no such file"),
    (["--set", "description=\udcff"], "'description=\\udcff' is no text"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_mistakes_are_one_message(folder: Path, arguments: list[str], message: str) -> None:
    answer = in_process("submit", *arguments)
    assert answer.code == 2
    assert message in answer.err
    # --tasks with a path also says that there is no such file.
    assert "faults" not in answer.err or arguments[0] == "--tasks"
    assert "Traceback" not in answer.err
    assert list(folder.iterdir()) == []


# -- submitting -------------------------------------------------------------------------------------------------------

SBATCH = """#!/bin/sh
echo "$@" "${SBATCH_PARTITION-no partition}" >>calls
case $1 in
  --test-only) cat >tried; echo "sbatch: Job 76 to start at noon on nodes n[1-2]" >&2; exit "${TEST_CODE:-0}" ;;
  *) [ -z "$REFUSE" ] || { echo "sbatch: error: Batch job submission failed: $REFUSE" >&2; exit 1; } ;;
esac
echo "77;cluster"
"""


@pytest.fixture
def slurm_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sinfo that knows the partitions above, and an sbatch that takes everything; an empty working directory."""
    programs = folder / "programs"
    programs.mkdir()
    (programs / "sinfo").write_text(f"#!/bin/sh\ncat <<'END'\n{SINFO}END\n")
    (programs / "sbatch").write_text(SBATCH)
    for program in programs.iterdir():
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    return folder / "here"


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def test_a_job_is_tried_written_submitted_and_told(slurm_commands: Path) -> None:
    answer = in_process("submit", "--nodes", "2", "--seeds", "1", "2", "--time", "12:00:00")
    assert answer.code == 0, answer.err
    script, lines = sorted((slurm_commands / "logs" / "submitted").iterdir())
    assert lines.suffix == ".txt" and lines.read_text() == "--set run.seed=1\n--set run.seed=2\n"
    # What was tried is what was submitted.
    assert script.read_text() == (slurm_commands / "tried").read_text()
    assert calls(slurm_commands) == [
        "--test-only no partition",
        f"--parsable {script.relative_to(slurm_commands)} no partition",
    ]
    for said in (
        *("#SBATCH --nodes=2", "set -- \\", f"--each {lines}", "  1: --set run.seed=1"),
        *("SLURM would start it at noon on nodes n[1-2]", "job 77 is queued", "scancel --signal=USR1 77"),
        *("runs/demo-progtuning-1, runs/demo-progtuning-2", "tail -F demo-progtuning-77_*.out"),
    ):
        assert said in answer.out, answer.out


def test_files_are_never_overwritten(slurm_commands: Path) -> None:
    for _ in range(3):
        assert in_process("submit").code == 0
    assert len(list((slurm_commands / "logs" / "submitted").iterdir())) == 3


def test_what_the_cluster_cannot_give_is_not_submitted(slurm_commands: Path) -> None:
    answer = in_process("submit", "--nodes", "4", "--mem", "9000", "--partition", "debug")
    assert answer.code == 2
    assert "2 faults" in answer.err and "--nodes: 4 asked for" in answer.err and "--mem: 9000M" in answer.err
    assert list(slurm_commands.iterdir()) == []


def test_sbatch_has_the_last_word(slurm_commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSE", "Invalid account")
    answer = in_process("submit", "--seeds", "1")
    assert answer.code == 2
    assert "progscale: sbatch: Batch job submission failed: Invalid account" in answer.err
    assert list((slurm_commands / "logs" / "submitted").iterdir()) == []
    monkeypatch.setenv("TEST_CODE", "1")
    answer = in_process("submit", "--gpus-per-node", "8", "--partition", "gpu")
    assert answer.code == 2
    assert "--cpus-per-rank 12 was chosen for you, a node's share: fewer may do" in answer.err


def test_gpus_bring_their_share_of_cpus(slurm_commands: Path) -> None:
    assert in_process("submit", "--gpus-per-node", "8", "--partition", "gpu").code == 0
    assert "#SBATCH --cpus-per-task=96" in (slurm_commands / "tried").read_text()


def test_sbatchs_variables_are_options(slurm_commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "short")
    answer = in_process("submit", "--nodes", "2")
    assert "--nodes: 2 asked for; partition 'short' has 1" in answer.err
    assert in_process("submit", "--partition", "debug").code == 0
    assert "#SBATCH --partition=debug" in (slurm_commands / "tried").read_text()
    # It would win over the script.
    assert all(line.endswith("no partition") for line in calls(slurm_commands))


@pytest.mark.parametrize(("said", "number"), [("y\n", 2), ("\n", 1), ("\x04", 1)], ids=["yes", "return", "end"])
def test_a_person_is_asked(slurm_commands: Path, said: str, number: int) -> None:
    """At a terminal; everywhere else nobody could answer."""
    terminal, end = os.openpty()
    command = [sys.executable, "-m", "progscale", "submit"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdin=end, stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    shown = b""
    try:
        while b"[y/N]" not in shown:
            shown += os.read(terminal, 4096)
        os.write(terminal, said.encode())
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while more := os.read(terminal, 4096):
                shown += more
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert len(calls(slurm_commands)) == number
    assert (b"nothing was submitted" in shown) == (number == 1)
    assert (slurm_commands / "logs").exists() == (number == 2)


def test_a_dry_run_shows_the_script_and_asks_the_cluster(slurm_commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = in_process("submit", "--dry-run", "--nodes", "2", "--seeds", "1", "2")
    assert answer.code == 0
    assert answer.out == (slurm_commands / "tried").read_text()
    assert "--set run.seed=2" in answer.err and "SLURM would start it at noon" in answer.err
    answer = in_process("submit", "--dry-run", "--mem", "9000")
    assert answer.code == 2
    assert answer.out.startswith("#!/usr/bin/env bash\n") and "--mem: 9000M asked for" in answer.err
    assert not (slurm_commands / "logs").exists()


def test_without_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    answer = in_process("submit")
    assert answer.code == 2
    assert "submit: no sbatch on this machine" in answer.err and f"{REPOSITORY}/launch/launch.sh" in answer.err
    answer = in_process("submit", "--dry-run")
    assert answer.code == 0
    assert answer.out.startswith("#!/usr/bin/env bash\n")
    assert "the cluster was not asked: no sbatch on this machine; nothing was submitted" in answer.err
    assert list(folder.iterdir()) == []


def test_a_cluster_that_does_not_answer(slurm_commands: Path) -> None:
    sinfo = slurm_commands.parent / "programs" / "sinfo"
    sinfo.write_text("#!/bin/sh\necho 'slurm_load_partitions: Unable to contact slurm controller' >&2\nexit 1\n")
    answer = in_process("submit")
    assert answer.code == 2
    assert "progscale: sinfo: Unable to contact slurm controller" in answer.err
    answer = in_process("submit", "--dry-run")
    assert answer.code == 0
    assert "the cluster was not asked: sinfo: Unable to contact slurm controller" in answer.err


def test_the_command_line_has_every_field(folder: Path) -> None:
    """A field without an option would be one that nobody can set."""
    helped = in_process("submit", "--help").out
    missing = [field.name for field in dataclasses.fields(Request) if f"--{field.name.replace('_', '-')}" not in helped]
    assert missing == []
