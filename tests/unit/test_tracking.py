"""What trackers are told, read back from a real TensorBoard file and a real MLflow store; and that none of them stops a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from progscale import tracking
from progscale.config import Config, load_config
from progscale.errors import ConfigError
from progscale.tracking import Tracking, tracker_faults
from tests.harness.programs import Answer, in_process, records, settings, summary_of


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run folder of a small run with two trackers, and MLflow's store."""
    folder = tmp_path_factory.mktemp("tracked")
    store = f"sqlite:///{folder / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        patch.setenv("MLFLOW_ARTIFACT_ROOT", str(folder / "artifacts"))
        answer: Answer = in_process(
            "train", *settings(run__output_dir=str(folder), trackers__names=["tensorboard", "mlflow"], trackers__project="mine")
        )
    assert answer.code == 0, answer.err
    assert "tracker" not in answer.out
    return folder / "a", store


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What metrics.jsonl says, by the trackers' names."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records(folder, "step"):
        found.setdefault("train/loss", []).append((record["step"], record["loss"]))
        found.setdefault("train/learning_rate", []).append((record["step"], record["learning_rate"]))
    for record in records(folder, "evaluation"):
        found.setdefault("eval/accuracy", []).append((record["step"], record["accuracy"]))
    for stage in summary_of(folder)["stages"]:
        for key in ("updated_parameters", "peak_memory_bytes", "samples_per_second"):
            found.setdefault(f"stage/{key}", []).append((stage["end_step"], stage[key]))
    return found


def test_a_tensorboard_file(tracked: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = tracked
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name, values in expected(folder).items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in values
        ]
    # Options lie in a run of their own, where TensorBoard's table of them looks.
    assert list((folder / "tensorboard").glob("*/hparams.yml"))


def test_an_mlflow_store(tracked: tuple[Path, str]) -> None:
    from mlflow import MlflowClient

    folder, store = tracked
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("a", "FINISHED")
    assert json.loads((folder / "trackers.json").read_text()) == {"mlflow": run.info.run_id}
    for name, values in expected(folder).items():
        history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda metric: metric.step)
        assert [(metric.step, metric.value) for metric in history] == [(step, pytest.approx(value)) for step, value in values]
    assert run.data.params["schedule.name"] == "progtuning"
    assert run.data.params["optimizer.betas"] == "[0.9, 0.999]"


class Service:
    """A tracker that keeps what it is told, or does what a test wants instead."""

    def __init__(self, *, start: Any = None, log: Any = None) -> None:
        self.told: list[tuple[int | None, dict[str, Any]]] = []
        self.finished = False
        self._start, self._log = start, log

    @property
    def tracker(self) -> Any:
        return None

    def start(self) -> None:
        if self._start is not None:
            self._start()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.options = values

    def log(self, values: dict[str, Any], step: int | None) -> None:
        if self._log is not None:
            self._log()
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished = True


def tracked_by(service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tracking:
    monkeypatch.setattr(tracking, "make_tracker", lambda *args: service)
    return Tracking(load_config([], ['trackers.names=["tensorboard"]']), folder, 0)


def raising(error: Exception) -> Any:
    def act() -> None:
        raise error

    return act


def test_what_a_service_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    tracked = tracked_by(service, tmp_path, monkeypatch)
    tracked.record("step", {"step": 5, "stage": 2, "loss": 0.5, "grad_norm": float("nan"), "learning_rate": 1e-3})
    tracked.record("evaluation", {"step": 6, "accuracy": 0.75})
    tracked.record("stage", {"stage": 1, "start_step": 0, "end_step": 7, "updated_parameters": 10, "engine": "plain"})
    tracked.record("checkpoint", {"step": 7, "bytes": 3})
    assert tracked.close() == []
    assert service.told == [
        (5, {"train/loss": 0.5, "train/learning_rate": 1e-3, "train/stage": 2}),
        (6, {"eval/accuracy": 0.75}),
        (7, {"stage/updated_parameters": 10}),
    ]
    assert service.finished
    assert service.options["run.seed"] == 42


def test_a_service_that_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = tracked_by(Service(start=raising(ConnectionError("no route\nto host"))), tmp_path, monkeypatch)
    for step in range(20_000):
        tracked.record("step", {"step": step, "stage": 1, "loss": 0.5})
    said = [*tracked.failures(), *tracked.close()]
    assert said == ["tracker 'tensorboard': it could not begin (ConnectionError: no route); the run goes on"]


def test_a_service_that_fails_on_the_way_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = tracked_by(Service(log=raising(OSError("disk full"))), tmp_path, monkeypatch)
    said = []
    for step in range(5):
        tracked.record("step", {"step": step, "stage": 1, "loss": 0.5})
        time.sleep(0.05)
        said += tracked.failures()
    assert [*said, *tracked.close()] == ["tracker 'tensorboard': it failed (OSError: disk full); the run goes on"]


def test_a_service_that_hangs_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.2)
    tracked = tracked_by(Service(log=lambda: time.sleep(3600)), tmp_path, monkeypatch)
    begun = time.monotonic()
    for step in range(3):
        tracked.record("step", {"step": step, "stage": 1, "loss": 0.5})
    (said,) = tracked.close()
    assert time.monotonic() - begun < 5
    assert "has not taken all records" in said


def test_a_service_that_is_slow_loses_records_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.1)
    tracked = tracked_by(Service(log=lambda: time.sleep(1)), tmp_path, monkeypatch)
    begun = time.monotonic()
    for step in range(tracking.MOST_WAITING + 10):
        tracked.record("step", {"step": step, "stage": 1, "loss": 0.5})
    assert time.monotonic() - begun < 2
    assert tracked.failures() == ["tracker 'tensorboard': it does not keep up, and records are left out; the run goes on"]


def test_a_run_outlives_its_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "make_tracker", lambda *args: Service(start=raising(ConnectionError("refused"))))
    answer = in_process("train", *settings(run__output_dir=str(tmp_path), trackers__names=["mlflow"]))
    assert answer.code == 0
    assert "warning: tracker 'mlflow': it could not begin (ConnectionError: refused); the run goes on" in answer.out
    assert [record["message"] for record in records(tmp_path / "a", "tracker_failed")] == [
        "tracker 'mlflow': it could not begin (ConnectionError: refused); the run goes on"
    ]


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    answer = in_process("train", "--set", 'trackers.names=["wandb", "mlflow"]')
    assert answer.code == 2
    assert "trackers.names: 'wandb' needs the package wandb, which is not installed: pip install wandb" in answer.err
    assert tracker_faults(Config()) == []


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (['trackers.names=["mlflow", "mlflow"]'], "names a tracker twice"),
        (['trackers.options={"wandb": {}}'], r"'wandb' is none of trackers.names \(empty\)"),
        (['trackers.names=["wand"]'], "wand"),
    ],
)
def test_what_cannot_be_meant(sets: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config([], sets)


def test_a_run_that_goes_on_is_the_same_run_there() -> None:
    config = load_config([], ["run.name=x"])
    start = tracking.start_options
    assert start("mlflow", config, Path("f"), None, 0) == {"run_name": "x"}
    assert start("mlflow", config, Path("f"), "id1", 10) == {"run_id": "id1"}
    assert start("tensorboard", config, Path("f"), None, 10) == {"purge_step": 11}
    assert start("wandb", config, Path("f"), None, 0) == {"name": "x", "dir": "f"}
    assert start("wandb", config, Path("f"), "id2", 10) == {"name": "x", "resume": "allow", "dir": "f", "id": "id2"}
    assert start("trackio", config, Path("f"), None, 0) == {"name": "x", "resume": "never"}
    assert start("trackio", config, Path("f"), "x-1", 10) == {"name": "x-1", "resume": "allow"}


@pytest.mark.parametrize("content", ["", "{", "[]", None])
def test_names_that_cannot_be_read_are_new_ones(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "trackers.json").write_text(content)
    assert tracking.read_names(tmp_path) == {}


def test_a_service_that_cannot_be_reached_keeps_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackers.json").write_text('{"mlflow": "id1"}')
    service = Service(start=raising(ConnectionError("refused")))
    monkeypatch.setattr(tracking, "make_tracker", lambda *args: service)
    resumed = Tracking(load_config([], ['trackers.names=["mlflow"]']), tmp_path, 5)
    assert len(resumed.close()) == 1
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"mlflow": "id1"}


def test_a_run_that_goes_on_has_its_options_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow takes a run's options once; those that changed since would end the tracker."""
    (tmp_path / "trackers.json").write_text('{"tensorboard": "id1"}')
    service = Service()
    monkeypatch.setattr(tracking, "make_tracker", lambda *args: service)
    resumed = Tracking(load_config([], ['trackers.names=["tensorboard"]']), tmp_path, 5)
    resumed.record("step", {"step": 6, "stage": 1, "loss": 0.5})
    assert resumed.close() == []
    assert not hasattr(service, "options")
    assert len(service.told) == 1
