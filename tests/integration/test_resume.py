"""Stopped and resumed by the command line: what is found, refused, kept and said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from progscale.checkpoint import shards
from progscale.owner import hold
from progscale.session import Session
from progscale.tasks.demo import DemoTask
from tests.harness.programs import REPOSITORY, Answer, in_process, launched, records, settings, summary_of

VARYING = ("train_seconds", "switch_seconds", "audit_seconds", "evaluation_seconds", "saving_seconds", "total_seconds", "stages")


class Told(Session):
    """A session whose rank is told to stop when a step is done, or in the middle of an evaluation."""

    stop_at: int | None = None
    stop_in_evaluation: int | None = None

    def notice(self) -> int:
        if self.stop_at is not None and self._done == self.stop_at:
            self.signals.received = "SIGTERM"
        self._done += 1
        return super().notice()

    def ask_to_stop(self) -> bool:
        self._evaluated += 1
        if self._evaluated == self.stop_in_evaluation:
            self.signals.received = "SIGUSR1"
        return super().ask_to_stop()

    _done = 1
    _evaluated = 0


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Told]]:
    """Sessions are told to stop where the class says so."""
    monkeypatch.setattr("progscale.setup.Session", Told)
    yield Told
    Told.stop_at = Told.stop_in_evaluation = None


def train(folder: Path, *more: str, **changes: Any) -> Answer:
    return in_process("train", *settings(run__output_dir=str(folder), train__evaluate="stage", **changes), *more)


def unwrapped(answer: Answer) -> str:
    """What was said, without line breaks."""
    return " ".join(answer.out.split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    answer = train(folder)
    assert answer.code == 0, answer.err
    return folder / "a"


def same_run(folder: Path, whole: Path) -> None:
    for kind in ("step", "evaluation"):
        found, wanted = ([{**line, "time": 0} for line in records(run, kind)] for run in (folder, whole))
        assert found == wanted
    summary, expected = summary_of(folder), summary_of(whole)
    assert {key: summary[key] for key in summary if key not in VARYING} == {
        key: expected[key] for key in expected if key not in VARYING
    }
    for stage, wanted_stage in zip(summary["stages"], expected["stages"], strict=True):
        for key in ("stage", "first_block", "start_step", "end_step", "updated_parameters", "skipped_steps", "frozen_changed"):
            assert stage[key] == wanted_stage[key]
    tensors, wanted_tensors = (load_file(run / "model" / "model.safetensors") for run in (folder, whole))
    assert all(torch.equal(tensors[name], value) for name, value in wanted_tensors.items())


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_told_to_stop(told: type[Told], whole: Path, tmp_path: Path, step: int, background: bool) -> None:
    told.stop_at = step
    stopped = train(tmp_path, checkpoint__background=background)
    assert stopped.code == 75
    assert f"told to stop: saved after step {step} of 6" in stopped.err
    assert json.loads((tmp_path / "a" / "PREEMPTED").read_text())["step"] == step
    assert not (tmp_path / "a" / "summary.json").exists()
    told.stop_at = None
    answer = train(tmp_path, "--resume", "auto", checkpoint__background=background)
    assert answer.code == 0, answer.err
    said = unwrapped(answer)
    assert f"step {step} of 6, saved by plain on 1 process" in said, said[said.find("resum") : said.find("resum") + 400]
    same_run(tmp_path / "a", whole)
    assert not (tmp_path / "a" / "PREEMPTED").exists()
    (record,) = records(tmp_path / "a", "resume")
    assert record["step"] == step


def test_state_in_8_bits_goes_on_under_another_engine(told: type[Told], tmp_path: Path) -> None:
    """Flat shards have other blocks than parameters: the user is told, and so is whoever reads the records."""
    told.stop_at = 1
    changes = {"optimizer__name": "paged_adamw_8bit"}
    stopped = train(tmp_path, **changes)
    assert stopped.code == 75, stopped.err
    assert "on this cpu it is adamw_8bit" in unwrapped(stopped)
    told.stop_at = None
    alike = train(tmp_path, "--resume", str(tmp_path / "a"), run__name="alike", **changes)
    assert alike.code == 0, alike.err
    assert "quantised anew" not in unwrapped(alike)
    config = str(REPOSITORY / "configs" / "zero2.json")
    options = settings(run__output_dir=str(tmp_path), train__evaluate="stage", **changes)
    answer = launched(tmp_path, ["--config", config, *options, "--resume", "must"])
    assert answer.code == 0, answer.err
    (record,) = records(tmp_path / "a", "requantized")
    assert record["stage"] == 1
    assert f"stage 1: {record['values']} values of the optimizer's 8-bit state were quantised anew" in unwrapped(answer)
    losses = [[line["loss"] for line in records(tmp_path / run, "step")] for run in ("a", "alike")]
    assert losses[0][-5:] == pytest.approx(losses[1], abs=0.02)


def test_a_script_is_told_when_there_is_something_to_go_on_from(
    told: type[Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before that it must start the run as its owner wanted: from another run's checkpoint, or anew."""
    begun = tmp_path / "begun"
    monkeypatch.setenv("PROGSCALE_BEGUN", str(begun))
    told.stop_at = 2
    assert train(tmp_path / "first").code == 75
    assert begun.exists()
    begun.unlink()
    source = str(tmp_path / "first" / "a")

    class Crash(RuntimeError):
        pass

    def crash(self: Session, *args: Any, **options: Any) -> None:
        raise Crash

    with monkeypatch.context() as broken:
        broken.setattr(Told, "begin_stage", crash)
        with pytest.raises(Crash):
            train(tmp_path / "second", "--resume", source)
        assert not begun.exists(), "it has nothing of its own yet"
        with pytest.raises(Crash):
            train(tmp_path / "third", "--resume", "never")
        assert begun.exists(), "--resume never would throw away what it does from now on"
        begun.unlink()
    told.stop_at = 3
    assert train(tmp_path / "second", "--resume", source).code == 75
    assert begun.exists()


def test_told_to_stop_while_evaluating(told: type[Told], whole: Path, tmp_path: Path) -> None:
    """The evaluation of that step is made up for, also when it is that of the last step."""
    for evaluation in (1, 2, 2):
        told.stop_in_evaluation = evaluation
        assert train(tmp_path, "--resume", "auto").code == 75
    told.stop_in_evaluation = None
    assert train(tmp_path, "--resume", "auto").code == 0
    same_run(tmp_path / "a", whole)


def test_again_and_again(told: type[Told], whole: Path, tmp_path: Path) -> None:
    """Stopped after each of the first steps, also right after a resume: nothing adds up."""
    told.stop_at = 1
    for _ in range(4):
        assert train(tmp_path, "--resume", "auto").code == 75
    told.stop_at = None
    assert train(tmp_path, "--resume", "must").code == 0
    same_run(tmp_path / "a", whole)


def stopped_at(told: type[Told], folder: Path, step: int) -> Path:
    told.stop_at = step
    assert train(folder).code == 75
    told.stop_at = None
    return folder / "a"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was told to stop after its third step."""
    root = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("progscale.setup.Session", Told)
        stopped_at(Told, root, 3)
    return root


@pytest.mark.parametrize(
    ("change", "told_values"),
    [
        ({"schedule__name": "none"}, 'schedule.name: the checkpoint has "progtuning", this run "none"'),
        ({"schedule__stages": 2}, "schedule.stages: the checkpoint has 3, this run 2"),
        ({"task__max_train_examples": 160}, "task.max_train_examples: the checkpoint has 192, this run 160"),
        (
            {"model__overrides": {"num_hidden_layers": 3}},
            'model.overrides: the checkpoint has {}, this run {"num_hidden_layers": 3}',
        ),
        ({"optimizer__lr": 1e-3}, "optimizer.lr: the checkpoint has 0.0005, this run 0.001"),
    ],
)
@pytest.mark.parametrize("policy", ["auto", "must"])
def test_another_run_is_refused(stopped: Path, tmp_path: Path, policy: str, change: dict[str, Any], told_values: str) -> None:
    folder = Path(shutil.copytree(stopped / "a", tmp_path / "a"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    answer = train(tmp_path, "--resume", policy, **change)
    assert answer.code == 2
    assert told_values in answer.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_how_it_is_run_may_change(told: type[Told], whole: Path, tmp_path: Path) -> None:
    stopped_at(told, tmp_path, 3)
    answer = train(tmp_path, "--resume", "must", train__num_workers=2, checkpoint__every_steps=1, checkpoint__keep=3)
    assert answer.code == 0, answer.err
    same_run(tmp_path / "a", whole)
    assert len(list((tmp_path / "a" / "checkpoints").glob("step-*"))) == 3


def test_nothing_to_resume(told: type[Told], whole: Path, tmp_path: Path) -> None:
    answer = train(tmp_path, "--resume", "must")
    assert answer.code == 2
    assert "--resume must needs a valid checkpoint, and there is none there" in answer.err
    assert not (tmp_path / "a").exists()
    answer = train(tmp_path, "--resume", "auto")
    assert answer.code == 0
    assert "starting fresh" in answer.out
    same_run(tmp_path / "a", whole)
    ended = train(tmp_path, "--resume", "auto")
    assert ended.code == 0
    assert "has ended" in ended.err
    assert not (tmp_path / "a.1").exists()
    # The same command without it: what was there is kept.
    assert train(tmp_path).code == 0
    same_run(tmp_path / "a", whole)
    same_run(tmp_path / "a.1", whole)


def test_never_keeps_what_was_there(told: type[Told], whole: Path, tmp_path: Path) -> None:
    stopped_at(told, tmp_path, 3)
    answer = train(tmp_path)
    assert answer.code == 0
    assert "with --resume auto it would have gone on" in unwrapped(answer)
    assert (tmp_path / "a.1" / "checkpoints" / "step-00000003").exists()
    same_run(tmp_path / "a", whole)


def test_from_another_folder(told: type[Told], whole: Path, tmp_path: Path) -> None:
    """A checkpoint of elsewhere begins a folder of its own, whose records begin there."""
    checkpoint = stopped_at(told, tmp_path / "first", 3) / "checkpoints" / "step-00000003"
    answer = train(tmp_path / "second", "--resume", str(checkpoint))
    assert answer.code == 0, answer.err
    assert [line["step"] for line in records(tmp_path / "second" / "a", "step")] == [4, 5, 6]
    wanted = records(whole, "step")[3:]
    assert [line["loss"] for line in records(tmp_path / "second" / "a", "step")] == [line["loss"] for line in wanted]
    inside = train(checkpoint, "--resume", str(checkpoint))
    assert inside.code == 2
    assert "lies inside the checkpoint" in inside.err


def test_an_older_one_by_path(told: type[Told], whole: Path, tmp_path: Path) -> None:
    """What lies beyond it is put aside, or it would count as newer than what is written next."""
    told.stop_at = 5
    assert train(tmp_path, checkpoint__every_steps=1, checkpoint__keep=5).code == 75
    told.stop_at = None
    checkpoints = tmp_path / "a" / "checkpoints"
    answer = train(tmp_path, "--resume", str(checkpoints / "step-00000003"), checkpoint__every_steps=1)
    assert answer.code == 0, answer.err
    same_run(tmp_path / "a", whole)
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["latest.json", "rejected-step-00000004", "rejected-step-00000005", "step-00000005", "step-00000006"]
    discarded = (tmp_path / "a" / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded if '"step"' in line and '"kind": "step"' in line] == [4, 5]


def test_the_best_model_is_the_one_that_is_told(told: type[Told], tmp_path: Path) -> None:
    """Its folder was lost: no score of before counts."""
    folder = stopped_at(told, tmp_path, 5)
    shutil.rmtree(folder / "model")
    assert train(tmp_path, "--resume", "auto").code == 0
    assert summary_of(folder)["best_step"] == 6
    assert json.loads((folder / "model" / "progscale.json").read_text())["step"] == 6


def test_one_process_at_a_time(told: type[Told], tmp_path: Path) -> None:
    held = hold(stopped_at(told, tmp_path, 3))
    for policy in ("auto", "never"):
        answer = train(tmp_path, "--resume", policy)
        assert answer.code == 2
        assert "another process is at work" in answer.err
    held.release()
    assert train(tmp_path, "--resume", "auto").code == 0


def test_what_was_on_its_way_is_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A loss that is not finite ends the run; the background save of the step before is whole, and stays."""

    def loss(self: DemoTask, outputs: Any, labels: Any) -> torch.Tensor:
        value = original(self, outputs, labels)
        calls.extend([1] * torch.is_grad_enabled())
        return value * float("nan") if len(calls) == 3 else value

    original, calls = DemoTask.loss, list[int]()
    monkeypatch.setattr(DemoTask, "loss", loss)
    monkeypatch.setattr("progscale.session.Session.publish_due", property(lambda self: False))
    answer = train(tmp_path, checkpoint__background=True, checkpoint__every_steps=2, checkpoint__at_stages=False)
    assert answer.code == 3
    assert [path.name for path in (tmp_path / "a" / "checkpoints").glob("*-*")] == ["step-00000002"]


@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_told_to_stop_when_the_save_before_has_failed(
    told: type[Told], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_error: str
) -> None:
    """The one that was on its way is lost; the step that is done is saved all the same."""
    original, failed = shards.write_shard, list[str]()

    def write_shard(path: Path, *arguments: Any) -> Any:
        if not failed:
            failed.append(path.name)
            raise OSError(28, "No space left on device", str(path))
        return original(path, *arguments)

    monkeypatch.setattr(shards, "write_shard", write_shard)
    monkeypatch.setattr("progscale.session.Session.publish_due", property(lambda self: False))
    told.stop_at = 3
    saving = {"checkpoint__background": True, "checkpoint__every_steps": 2, "checkpoint__at_stages": False}
    answer = train(tmp_path, checkpoint__on_error=on_error, **saving)
    assert answer.code == 75, answer.err
    assert "warning: a checkpoint could not be written" in unwrapped(answer)
    assert [path.name for path in (tmp_path / "a" / "checkpoints").glob("*-*")] == ["step-00000003"]


def test_no_memory_for_the_copy_of_a_background_save(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is written in place."""

    def refuse(size: int, device: torch.device) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("progscale.checkpoint.saver._buffer", refuse)
    answer = train(tmp_path, checkpoint__background=True, checkpoint__every_steps=2)
    assert answer.code == 0, answer.err
    assert {record["step"] for record in records(tmp_path / "a", "checkpoint")} == {2, 4, 6}
    assert "no memory for the copy of a background save" in caplog.text


def test_verify(told: type[Told], tmp_path: Path) -> None:
    folder = stopped_at(told, tmp_path, 3)
    answer = in_process("checkpoint", "verify", str(folder), "--format", "json")
    assert answer.code == 0
    newest, *_ = json.loads(answer.out)
    assert (newest["valid"], newest["step"], newest["stage"], newest["engine"]) == (True, 3, 2, "plain")
    (shard,) = (folder / "checkpoints" / "step-00000003").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    answer = in_process("checkpoint", "verify", str(folder))
    assert answer.code == 2
    assert "rejected:" in answer.out
    assert in_process("checkpoint", "verify", str(tmp_path / "nowhere")).code == 2
