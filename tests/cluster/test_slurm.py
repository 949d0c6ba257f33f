"""launch/slurm/train.sbatch on a real SLURM: what a run computes there, and what becomes of one that is to end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster
from tests.harness.evidence import checkpoints, evidence, leftovers, step_of
from tests.harness.forks import REPOSITORY
from tests.harness.interrupted import STEPS, Runs, same, twelve
from tests.harness.launches import Launch
from tests.harness.programs import config_file, records

ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


# Time to interrupt a run.
def slowly(seconds: int, steps: int = STEPS) -> str:
    """As PROGSCALE_FAULT: every one of the first steps takes so much longer."""
    return ";".join(f"sleep@step={step},seconds={seconds}" for step in range(steps))


SLOWLY = slowly(1)


class Jobs:
    """Submits jobs from a folder of their own.

    Args:
        cluster: where they run.
        folder: they are submitted from; holds their logs.
        cache: of tokenised data.
    """

    def __init__(self, cluster: Cluster, folder: Path, cache: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self._cache = cache

    def submit(self, *arguments: str, options: tuple[str, ...] = ("-N2",), fault: str = "", **variables: str) -> str:
        """`sbatch options train.sbatch arguments`; returns the job's number."""
        environment = {"PYTHONPATH": str(REPOSITORY), "PROGSCALE_CACHE": str(self._cache), "PROGSCALE_FAULT": fault, **variables}
        plugin = ("--plugin", "tests.harness.inject") if fault else ()
        return self.cluster.submit(self.folder, options, [*arguments, *plugin], environment)

    def output(self, job: str) -> str:
        """All that a job has written: the script, and each node."""
        files = [self.folder / f"progscale-{job}.out", *sorted((self.folder / "logs" / job).glob("*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in files if path.exists())

    def ends(self, job: str, state: str = "COMPLETED", seconds: float = 240.0) -> str:
        """Waits for the end of a job, which must be `state`; returns what it has written."""
        found = self.cluster.wait(job, ENDS, seconds)
        assert found == state, self.output(job)
        return self.output(job)

    def wait_for_step(self, run: Path, step: int, job: str) -> None:
        """Waits until a run has logged an optimizer step."""

        def reached() -> bool:
            return (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in records(run, "step"))

        self.wait_until(reached, job)

    def wait_until(self, condition: Callable[[], bool], job: str, seconds: float = 120.0) -> None:
        """Waits for something to be so while a job is at work."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"waited in vain for {seconds} s\n{self.output(job)}"
            time.sleep(0.2)

    def restarts(self, job: str) -> int:
        """How often a job was queued again."""
        return int(self.cluster.show(job, "Restarts"))


@pytest.fixture
def jobs(cluster: Cluster, cache: Path, tmp_path: Path) -> Jobs:
    """Jobs of one test."""
    return Jobs(cluster, tmp_path, cache)


def finished_as_if_never_stopped(jobs: Jobs, job: str, runs: Runs, *, seconds: float = 240.0) -> str:
    """Sees that a job went on from its checkpoint, once, and computed what an uninterrupted run of one node does, to the bit."""
    run = jobs.folder / "a"
    out = jobs.ends(job, seconds=seconds)
    assert records(run, "resume"), f"it began anew\n{out}"
    same(evidence(run), runs.whole("zero2"))
    assert not leftovers(run)
    return out


def test_two_nodes_compute_what_one_does(jobs: Jobs, cache: Path, tmp_path: Path) -> None:
    """The demo under ZeRO-2, as `sbatch -N2` and as two ranks of one machine."""
    demo = [*config_file("demo"), *config_file("zero2"), "--set", "run.threads=1", "--set", "train.logging_steps=1"]
    job = jobs.submit(*demo, "--set", f"run.output_dir={tmp_path}/slurm")
    with Launch(tmp_path / "one", [*demo, "--set", f"run.output_dir={tmp_path}/one"], ranks=2, cache=cache) as launch:
        assert launch.finish(240).code == 0
    out = jobs.ends(job)
    name = "demo-progtuning-42"
    same(evidence(tmp_path / "slurm" / name), evidence(tmp_path / "one" / name))
    assert "node n1, ranks 1" in out and "node n2, ranks 1" in out
    assert jobs.restarts(job) == 0


@pytest.mark.parametrize("to", [["USR1"], ["USR1", "--batch"], ["TERM", "--batch"]], ids=["ranks", "script", "script by TERM"])
def test_a_signal_leads_to_a_checkpoint_and_a_restart(jobs: Jobs, runs: Runs, tmp_path: Path, to: list[str]) -> None:
    """`scancel --signal=USR1` reaches the processes of the step, with --batch the script alone."""
    name, *to = to
    job = jobs.submit(*twelve(tmp_path, "zero2"), fault=SLOWLY)
    run = tmp_path / "a"
    jobs.wait_for_step(run, 3, job)
    jobs.cluster.ask("scancel", f"--signal={name}", *to, job)
    jobs.wait_until(lambda: jobs.restarts(job) == 1, job)
    saved = [step_of(path) for path in checkpoints(run)]
    assert json.loads((run / "PREEMPTED").read_text())["step"] == saved[-1]
    out = finished_as_if_never_stopped(jobs, job, runs)
    # Nothing that was computed is computed again.
    assert [line["step"] for line in records(run, "resume")] == [saved[-1]]
    assert jobs.restarts(job) == 1
    assert "the job is queued again" in out


def test_a_time_limit_leads_to_a_restart(jobs: Jobs, runs: Runs, tmp_path: Path) -> None:
    """SLURM tells the script some time before; its clock has steps of half a minute."""
    # Told after two minutes to two and a half; without a limit it would take longer.
    options = ("-N2", "--time=3", "--signal=B:USR1@30")
    job = jobs.submit(*twelve(tmp_path, "zero2"), options=options, fault=slowly(12))
    out = finished_as_if_never_stopped(jobs, job, runs, seconds=600)
    assert 1 <= jobs.restarts(job) <= 3
    assert "SIGUSR1: the run saves and ends" in out


def test_a_node_that_dies_leads_to_a_restart(jobs: Jobs, runs: Runs, tmp_path: Path) -> None:
    """Its daemon and its processes are killed; the job waits for a node, and goes on from its last checkpoint."""
    # What is left is quick: the end of the first attempt, which n2 was not there to be told of, SLURM 22.05 tells it again three
    # quarters of a minute later, and the ranks there would take it for the second's.
    job = jobs.submit(*twelve(tmp_path, "zero2", checkpoint__every_steps=2), fault=slowly(1, steps=8))
    run = tmp_path / "a"
    jobs.wait_for_step(run, 7, job)
    jobs.cluster.kill_node("n2")
    try:
        jobs.wait_until(lambda: jobs.restarts(job) == 1, job, seconds=180)
        jobs.cluster.wait(job, ["PENDING"])
    finally:
        jobs.cluster.start_node("n2")
    finished_as_if_never_stopped(jobs, job, runs)
    assert records(run, "resume")[0]["step"] >= 4


def test_an_array_of_two_seeds_leaves_two_runs(jobs: Jobs, cache: Path, tmp_path: Path) -> None:
    """Both at once, on the same nodes; each is the run that the seed gives anywhere."""
    arguments = [*twelve(tmp_path, "zero2"), "--set", "run.name=null"]
    array = jobs.submit(*arguments, options=("-N2", "--array=3,7"))
    for seed in (3, 7):
        jobs.ends(f"{array}_{seed}")
        run = tmp_path / f"demo-progtuning-{seed}"
        assert not leftovers(run)
        assert json.loads((run / "config.json").read_text())["run"]["seed"] == seed
    found = [evidence(tmp_path / f"demo-progtuning-{seed}")["step"] for seed in (3, 7)]
    assert found[0] != found[1]
    alone = [*arguments, "--set", f"run.output_dir={tmp_path}/one", "--set", "run.seed=3"]
    with Launch(tmp_path / "one", alone, ranks=2, cache=cache) as launch:
        assert launch.finish(240).code == 0
    same(evidence(tmp_path / "demo-progtuning-3"), evidence(tmp_path / "one" / "demo-progtuning-3"))
    assert sorted(path.name for path in tmp_path.glob("demo-*")) == ["demo-progtuning-3", "demo-progtuning-7"]


def test_an_array_with_a_line_for_each_element(jobs: Jobs, tmp_path: Path) -> None:
    """What differs may be anything; one node here, and one rank. The nodes source a file that is not written for this script."""
    lines = ("'run.name=first of two'", "run.name=second --set run.seed=5", "run.name=it's")
    (tmp_path / "grid.txt").write_text("".join(f"--set {line}\n" for line in lines))
    (tmp_path / "env.sh").write_text('echo "given $# arguments"\necho "$NOBODY_HAS_SET_THIS"\nfalse\n')
    arguments = ["--each", "grid.txt", *twelve(tmp_path)]
    array = jobs.submit(*arguments, options=("-N1", "--array=1-4"), PROGSCALE_SETUP=str(tmp_path / "env.sh"))
    for element, name in ((1, "first of two"), (2, "second")):
        jobs.ends(f"{array}_{element}")
        assert not leftovers(tmp_path / name)
    assert json.loads((tmp_path / "second" / "config.json").read_text())["run"]["seed"] == 5
    assert "given 0 arguments" in jobs.output(jobs.cluster.show(f"{array}_1", "JobId"))
    for element, said in ((3, "quotes in line 3 of 'grid.txt' do not match"), (4, "'grid.txt' has no line 4; it has 3")):
        jobs.cluster.wait(f"{array}_{element}", ENDS)
        number = jobs.cluster.show(f"{array}_{element}", "JobId")
        # Of an array SLURM names the output by the array's number and the element's.
        assert said in jobs.output(number) + "".join(path.read_text() for path in tmp_path.glob("*.out"))


MISTAKES: dict[str, tuple[Mapping[str, str], list[str], str]] = {
    "config": ({}, ["--set", "train.epohcs=1"], "did you mean 'epochs'?"),
    # Its launcher ends the ranks of the other node, by a signal that looks like one of the cluster's.
    "one node": ({"fault": "exit:2@collective=1,rank=1;sleep@collective=1,rank=0,seconds=30"}, [], ""),
    "crash": ({"fault": "raise@step=4,rank=1"}, [], "injected"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_not_tried_again(jobs: Jobs, tmp_path: Path, name: str) -> None:
    """What would fail again is left to its owner."""
    variables, arguments, said = MISTAKES[name]
    fresh = {"PROGSCALE_CACHE": str(tmp_path / "cache")}
    job = jobs.submit(*twelve(tmp_path, "zero2"), *arguments, **{**fresh, **variables})
    out = jobs.ends(job, "FAILED")
    assert said in out and "the run failed with exit code" in out
    assert jobs.restarts(job) == 0


def test_a_job_is_not_queued_again_for_ever(jobs: Jobs, tmp_path: Path) -> None:
    """There is a bound; and one that its owner cancels stays cancelled."""
    job = jobs.submit(*twelve(tmp_path, "zero2"), fault=SLOWLY, PROGSCALE_MAX_RESTARTS="0")
    jobs.wait_for_step(tmp_path / "a", 2, job)
    jobs.cluster.ask("scancel", "--signal=USR1", job)
    assert "not queued again after 0 restarts (PROGSCALE_MAX_RESTARTS)" in jobs.ends(job, "FAILED")
    assert step_of(checkpoints(tmp_path / "a")[-1]) >= 2


def test_the_bound_holds_for_restarts_by_others_too(jobs: Jobs, tmp_path: Path) -> None:
    """SLURM queues a job again whose node is gone, whatever the script thinks of it."""
    job = jobs.submit(*twelve(tmp_path, "zero2"), fault=SLOWLY, PROGSCALE_MAX_RESTARTS="0")
    jobs.wait_for_step(tmp_path / "a", 1, job)
    jobs.cluster.ask("scontrol", "requeue", job)
    jobs.wait_until(lambda: jobs.restarts(job) == 1, job)
    assert "not begun again after 0 restarts (PROGSCALE_MAX_RESTARTS)" in jobs.ends(job, "FAILED")


def test_a_cancelled_job_stays_cancelled(jobs: Jobs, tmp_path: Path) -> None:
    """What it had reached is saved all the same."""
    job = jobs.submit(*twelve(tmp_path, "zero2"), fault=SLOWLY)
    jobs.wait_for_step(tmp_path / "a", 2, job)
    jobs.cluster.ask("scancel", job)
    out = jobs.ends(job, "CANCELLED")
    jobs.wait_until(lambda: bool(checkpoints(tmp_path / "a")), job)
    assert "queued again" not in out.replace("not queued again", "")
    assert jobs.restarts(job) == 0


def test_two_jobs_of_one_name_never_mix(jobs: Jobs, runs: Runs, tmp_path: Path) -> None:
    """The second is refused while the first is at work."""
    options = ("-N2", "--mem=1000")  # else a job takes all the memory, and the second waits
    first = jobs.submit(*twelve(tmp_path, "zero2"), options=options, fault=slowly(4))
    jobs.wait_for_step(tmp_path / "a", 1, first)
    second = jobs.submit(*twelve(tmp_path, "zero2"), options=options)
    assert "another process is at work in" in jobs.ends(second, "FAILED")
    jobs.ends(first)
    same(evidence(tmp_path / "a"), runs.whole("zero2"))


def test_the_doctor_looks_at_the_nodes(jobs: Jobs, tmp_path: Path) -> None:
    """With the same script and options: every node answers, and what was measured is kept."""
    save = str(tmp_path / "net.json")
    job = jobs.submit(*config_file("zero2"), "--save", save, PROGSCALE_DOCTOR="1")
    out = jobs.ends(job)
    assert out.count("no problems") == 2 and out.count("network: measured") == 2
    assert sorted(json.loads(Path(save).read_text())["nodes"]) == ["n1", "n2"]
