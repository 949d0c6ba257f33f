"""`progscale submit` on a real SLURM: what it submits runs, and what the cluster cannot give is not queued."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cluster.test_slurm import ENDS
from tests.harness.cluster import Cluster
from tests.harness.evidence import evidence, leftovers
from tests.harness.forks import LAUNCHER, REPOSITORY
from tests.harness.interrupted import same, twelve
from tests.harness.programs import Answer


class Login:
    """The login node: a shell in a folder.

    Args:
        cluster: where jobs run.
        folder: working directory.
        cache: of tokenised data.
    """

    def __init__(self, cluster: Cluster, folder: Path, cache: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        kept = {key: value for key, value in cluster.environment.items() if not key.startswith(LAUNCHER)}
        self._environment = {**kept, "PYTHONPATH": str(REPOSITORY), "PROGSCALE_CACHE": str(cache)}

    def run(self, *command: str, folder: Path | None = None, **variables: str) -> Answer:
        """A command until it ends, perhaps from another folder."""
        environment = {**self._environment, **variables}
        done = subprocess.run(
            command, cwd=folder or self.folder, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        return Answer(done.returncode, done.stderr, done.stdout)

    def submit(self, *arguments: str) -> Answer:
        """`progscale submit …`."""
        return self.run(sys.executable, "-m", "progscale", "submit", *arguments)

    def submitted(self, *arguments: str) -> tuple[str, Path]:
        """As `submit`, which must succeed; returns the job's number and the script."""
        before = self.scripts()
        answer = self.submit(*arguments)
        assert answer.code == 0, answer.err
        (script,) = self.scripts() - before
        number = next(line.split()[1] for line in answer.out.splitlines() if line.endswith("is queued"))
        return number, script

    def scripts(self) -> set[Path]:
        """All that were submitted."""
        return set(self.folder.glob("logs/submitted/*.sbatch"))

    def ends(self, job: str) -> str:
        """Waits until a job has completed; returns what it has written."""
        found = self.cluster.wait(job, ENDS)
        out = "\n".join(f"--- {path}\n{path.read_text(errors='replace')}" for path in self.outputs())
        assert found == "COMPLETED", out
        return out

    def outputs(self) -> Sequence[Path]:
        """What jobs and nodes write."""
        return sorted([*self.folder.glob("*.out"), *self.folder.glob("logs/*/*.log")])

    def queue(self) -> str:
        """All jobs that wait or run."""
        return self.cluster.ask("squeue", "--noheader")


@pytest.fixture
def login(cluster: Cluster, cache: Path, tmp_path: Path) -> Login:
    """A shell of one test."""
    folder = tmp_path / "my work"  # a name that has to be quoted
    folder.mkdir()
    return Login(cluster, folder, cache)


def test_a_submitted_run_completes_on_two_nodes(login: Login) -> None:
    """And again when sbatch gets the script from another folder, by a shell that has no accelerate on its path."""
    job, script = login.submitted(*twelve(Path("runs")), "--nodes", "2", "--time", "10", "--signal-seconds", "60")
    assert login.cluster.show(job, "TimeLimit") == "00:10:00"
    out = login.ends(job)
    assert "node n1, ranks 1" in out and "node n2, ranks 1" in out
    again = login.run("sbatch", "--parsable", str(script), "--set", "run.name=again", folder=Path("/"), PATH=os.defpath)
    assert again.code == 0, again.err
    login.ends(again.out.strip())
    runs = login.folder / "runs"
    same(evidence(runs / "again"), evidence(runs / "a"))
    assert not leftovers(runs / "a") and not leftovers(runs / "again")


def test_two_seeds_leave_two_runs(login: Login) -> None:
    """Elements of one array, whose lines lie beside the script."""
    data = ["--set", "run.name=null", "--set", "task.name=demo"]
    job, script = login.submitted(*twelve(Path("runs")), *data, "--seeds", "1", "2", "--mem", "1000")
    assert script.with_suffix(".txt").read_text() == "--set run.seed=1\n--set run.seed=2\n"
    for element in (1, 2):
        login.ends(f"{job}_{element}")
        run = login.folder / "runs" / f"demo-progtuning-{element}"
        assert json.loads((run / "config.json").read_text())["run"]["seed"] == element
        assert not leftovers(run)
    assert sorted(path.name for path in (login.folder / "runs").iterdir()) == ["demo-progtuning-1", "demo-progtuning-2"]
    # As it was announced.
    assert (login.folder / f"demo-progtuning-{job}_1.out").exists()


REFUSED = {
    "nodes": (["--nodes", "3", "--set", "train.global_batch_size=33"], "--nodes: 3 asked for; partition 'debug' has 2"),
    "gpus": (["--gpus-per-node", "1"], "--gpus-per-node: 1 asked for on each node; those of partition 'debug' have no GPUs"),
    "memory": (["--mem", "9000"], "--mem: 9000M asked for on each node; those of partition 'debug' have at most 8000M"),
    "cpus": (["--cpus-per-rank", "3"], "--cpus-per-rank: 3 CPUs on a node; those of partition 'debug' have at most 2"),
    "partition": (
        ["--partition", "shrt"],
        "--partition: 'shrt' is unknown; this cluster has debug, short; did you mean 'short'?",
    ),
    "time": (["--partition", "short", "--time", "20"], "--time: 20:00 asked for; partition 'short' has at most 10:00"),
    "narrow": (["--partition", "short", "--nodes", "2"], "--nodes: 2 asked for; partition 'short' has 1; --partition debug has"),
    # Which only SLURM can know.
    "feature": (["--sbatch", "constraint=a100"], "sbatch: allocation failure: Invalid feature specification"),
    "option": (["--sbatch", "nonsense=a100"], "sbatch: unrecognized option '--nonsense=a100'"),
    "config": (["--set", "train.epohcs=1"], "did you mean 'epochs'?"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_cluster_cannot_give_is_not_queued(login: Login, name: str) -> None:
    arguments, message = REFUSED[name]
    before = login.queue()
    answer = login.submit(*arguments)
    assert answer.code == 2
    assert message in answer.err
    assert answer.out == ""
    assert login.queue() == before == ""
    assert list(login.folder.iterdir()) == []


def test_a_node_that_is_down_is_not_counted(login: Login) -> None:
    login.cluster.ask("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    try:
        answer = login.submit("--nodes", "2")
    finally:
        login.cluster.ask("scontrol", "update", "NodeName=n2", "State=RESUME")
        login.cluster.wait_for_nodes("idle")
    assert answer.code == 2
    assert "--nodes: 2 asked for; partition 'debug' has 1 that are up (n2 drain" in answer.err
    assert login.queue() == ""


def test_a_dry_run_asks_and_queues_nothing(login: Login) -> None:
    answer = login.submit("--nodes", "2", "--job-name", "it's mine", "--dry-run")
    assert answer.code == 0, answer.err
    assert answer.out.startswith("#!/usr/bin/env bash\n")
    assert "SLURM would start it at " in answer.err and "on nodes n[1-2] in partition debug; nothing was submitted" in answer.err
    assert login.queue() == ""
    assert list(login.folder.iterdir()) == []


def test_a_suite_is_an_array_of_its_runs(login: Login) -> None:
    """What is missing is queued, each run with its own config; when all are done, the same command compares them."""
    content = {
        "set": {"task.max_train_examples": 64, "task.max_eval_examples": 32, "train.epochs": 2},
        "schedules": {"none": {"schedule": {"name": "none"}}, "progtuning": {}},
        "seeds": [1, 2],
    }
    (login.folder / "small.json").write_text(json.dumps(content))
    suite = (sys.executable, "-m", "progscale", "suite", "small.json")
    answer = login.run(*suite, "--slurm", "--yes", "--time", "10")
    assert answer.code == 0, answer.err
    assert "when the runs are done: progscale suite small.json --compare-only" in answer.out
    job = next(line.split()[1] for line in answer.out.splitlines() if line.endswith("is queued"))
    login.ends(job)
    (lines,) = login.folder.glob("logs/submitted/*.txt")
    assert [line.split()[1] for line in lines.read_text().splitlines()] == [
        f"runs/suites/small/configs/{name}-s{seed}.json" for seed in (1, 2) for name in ("none", "progtuning")
    ]
    compared = login.run(*suite, "--compare-only")
    assert compared.code == 0, compared.err
    assert "4 finished" in compared.out
    content = json.loads((login.folder / "runs" / "suites" / "small" / "compare.json").read_text())
    assert [sorted(arm["scores"]) for arm in content["groups"][0]["arms"]] == [["1", "2"]] * 2
