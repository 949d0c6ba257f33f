"""The command line: exit codes, what it prints, and plug-ins; a mistake is one message and never a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from progscale.cli import SILENT_SECONDS, build_parser, main, quiet_libraries
from progscale.cli.training import run_train
from progscale.config import Config, load_config
from progscale.methods import METHODS
from progscale.schedule import SCHEDULES
from progscale.session import Session
from progscale.signals import Signals
from tests.harness.programs import REPOSITORY, Answer, in_process

Command = Callable[..., Answer]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return in_process


def test_without_a_command_it_helps(command: Command) -> None:
    answer = command()
    assert answer.code == 0
    assert "train" in answer.out
    assert "plan" in answer.out


MISTAKES = [
    (["trian"], "invalid choice: 'trian'"),
    (["train", "--epochs", "3"], "unrecognized arguments: --epochs 3"),
    (["train", "--conf", "a.json"], "unrecognized arguments: --conf"),
    (["train", "--config", "missing.json"], "missing.json"),
    (["train", "--set", "train.epoch=3"], "did you mean 'epochs'?"),
    (["train", "--set", "train.epochs=0", "--set", "optimizer.lr=-1"], "2 faults"),
    (["train", "--set", "task.name=dmo", "--set", "model.name=x"], "did you mean 'demo'?"),
    (["train", "--set", "method.name=ful"], "did you mean 'full'?"),
    (["train", "--set", "schedule.name=growin"], "did you mean 'growing'?"),
    (["train", "--set", "model.family=berd"], "did you mean 'bert'?"),
    (["train", "--set", "optimizer.name=adamv"], "did you mean 'adamw'?"),
    (["train", "--set", "task.name=dmo", "--set", "model.name=x", "--set", "train.epochs=0"], "2 faults"),
    (["plan", "--model", "bert-base-uncased", "--set", "train.max_steps=9"], "train.max_steps: 9 counts optimizer steps"),
    (["plan", "--model", "bert-base-uncased", "--set", "schedule.starts=[0,9,18]"], "progscale train --dry-run shows that plan"),
    (["train", "--plugin", "no_such_module"], "--plugin no_such_module: no such module"),
    (["train", "--plugin", "no.such.module"], "--plugin no.such.module: no such module"),
    (["train", "--set", "task.metric=evaluate:accuracy"], "allow it with --trust-remote-code"),
    (["plan"], "no model named; give --model NAME"),
    (["plan", "--model", "bert-lrge-uncased"], "did you mean 'bert-large-uncased'?"),
    (["plan", "--model", "bert-base-uncased", "--epochs", "0"], "train.epochs: 0"),
    (["plan", "--model", "bert-base-uncased", "--schedule", "progtunning"], "did you mean 'progtuning'?"),
    (["plan", "--model", "bert-base-uncased", "--embeddings", "never ever"], "'always', 'first_stage', 'never'"),
    (["plan", "--model", "bert-base-uncased", "--epochs", "three"], "invalid float value: 'three'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_mistakes(command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    # The hub's client reads its environment when it is imported, so the flag itself is set.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    answer = command(*arguments)
    assert answer.code == 2
    assert message in answer.err
    assert len(re.findall(r"^progscale[^:]*: ", answer.err, re.MULTILINE)) == 1
    assert "Traceback" not in answer.err
    assert answer.out == ""
    assert list(Path.cwd().iterdir()) == []


def test_print_config_is_a_config(command: Command) -> None:
    answer = command("train", "--set", "train.epochs=2", "--print-config")
    assert answer.code == 0
    Path("printed.json").write_text(answer.out)
    assert load_config(["printed.json"]) == load_config([], ["train.epochs=2"])


def test_list_options_has_those_of_a_plugin(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "its_methods.py").write_text(
        "from pydantic import Field\n"
        "from progscale.config import Section\n"
        "from progscale.methods import Method, register\n"
        "class Options(Section):\n"
        "    every: int = Field(default=2, description='each so many blocks')\n"
        "@register('its_own')\n"
        "class Own(Method[Options]):\n"
        "    name, Options = 'its_own', Options\n"
        "    def tensors(self, partition):\n"
        "        return frozenset()\n"
    )
    try:
        answer = command("train", "--plugin", "its_methods", "--list-options")
    finally:
        METHODS.remove("its_own")
    assert answer.code == 0
    assert "each so many blocks" in answer.out


def test_a_runs_own_config_is_a_layer(command: Command, tmp_path: Path) -> None:
    few = ["--set", "task.max_train_examples=64", "--set", "run.seed=3"]
    assert command("train", *few).code == 0
    recorded = tmp_path / "runs" / "demo-progtuning-3"
    assert command("train", "--config", str(recorded / "config.json"), "--set", "run.name=again").code == 0
    first, again = (json.loads((folder / "summary.json").read_text()) for folder in (recorded, tmp_path / "runs" / "again"))
    assert again["metrics"] == first["metrics"]


def test_list_options_names_every_key(command: Command) -> None:
    answer = command("train", "--list-options")
    assert answer.code == 0
    # Methods share names of options: "method.options.rank (lora)".
    keys = [line.split("  ")[0] for line in answer.out.splitlines()]
    assert {"run.seed", "model.name", "schedule.stages", "optimizer.lr", "train.nonfinite", "engine.deepspeed"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_dry_run_shows_the_plan_and_writes_nothing(command: Command) -> None:
    answer = command("train", "--dry-run", "--set", "task.max_train_examples=96", "--set", "train.epochs=2")
    assert answer.code == 0
    assert "demo encoder (bert) on demo: 96 training rows, 6 steps of 32 rows on 1 process (cpu), fp32" in answer.out
    assert "blocks 3-5" in answer.out or "3" in answer.out
    assert list(Path.cwd().iterdir()) == []


def test_plan_gives_the_papers_figures(command: Command) -> None:
    answer = command("plan", "--model", "bert-large-uncased", "--epochs", "3", "--format", "json")
    assert answer.code == 0
    plan = json.loads(answer.out)
    assert plan["baseline_updated_parameters"] / 1e6 == pytest.approx(1005.4, abs=0.05)
    assert plan["updated_parameters"] / 1e6 == pytest.approx(703.1, abs=0.05)
    assert [stage["first_block"] for stage in plan["stages"]] in ([0, 8, 16], [{"blocks": first} for first in (0, 8, 16)])


@pytest.mark.parametrize(
    ("model", "choice", "total"),
    [
        ("gpt2", ["--head", "causal_lm"], 124_439_808),
        ("google/flan-t5-base", ["--head", "seq2seq_lm"], 247_577_856),
        ("gpt2", ["--set", "task.name=causal_lm", "--set", "task.train_file=x.txt"], 124_439_808),
        (
            "t5-small",
            [f"--set=task.{key}" for key in ("name=summarization", "path=x", "source_column=a", "target_column=b")],
            60_506_624,
        ),
    ],
)
def test_plan_of_language_models(command: Command, model: str, choice: list[str], total: int) -> None:
    answer = command("plan", "--model", model, *choice, "--format", "json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["total_parameters"] == total


def test_plan_names_a_head_that_a_model_has_not(command: Command) -> None:
    answer = command("plan", "--model", "t5-small", "--head", "causal_lm")
    assert answer.code == 2
    assert "transformers has no causal lm head for model type 't5'" in answer.err


def test_plan_takes_the_head_from_the_task(command: Command) -> None:
    """The three heads' sizes: two logits over a pooler; one and three; two for each token, and no pooler."""
    hidden, counts = 768, {}
    for task in ("mrpc", "stsb", "mnli", "squad-v1"):
        layer = str(REPOSITORY / "configs" / "tasks" / f"{task}.json")
        options = ["--set", "schedule.stages=1", "--set", "train.epochs=1", "--format", "json"]
        answer = command("plan", "--model", "bert-base-uncased", "--config", layer, *options)
        assert answer.code == 0, answer.err
        counts[task] = json.loads(answer.out)["baseline_updated_parameters"]
    assert counts["mrpc"] - counts["stsb"] == counts["mnli"] - counts["mrpc"] == hidden + 1
    assert counts["mrpc"] - counts["squad-v1"] == hidden * hidden + hidden, "a span head has no pooler"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"progscale {version('progscale')}\n"


def test_plan_takes_short_forms_and_layers(command: Command) -> None:
    Path("layer.json").write_text('{"model": {"name": "bert-base-uncased"}, "train": {"epochs": 6}}')
    short = command("plan", "--model", "bert-base-uncased", "--epochs", "6", "--stages", "2", "--format", "json")
    layered = command("plan", "--config", "layer.json", "--set", "schedule.stages=2", "--format", "json")
    assert json.loads(short.out) == json.loads(layered.out)
    table = command("plan", "--config", "layer.json")
    assert table.code == 0
    assert "{" not in table.out


PLUGIN = '''
"""A schedule and a model family of a user's own."""
from types import SimpleNamespace

import torch
from torch import nn

from progscale.models.family import Family, register_family
from progscale.schedule import Request, register
from progscale.tasks.demo import demo_tokenizer


@register("alternating")
def alternating(request: Request):
    """Even blocks, then odd ones."""
    return [range(t % 2, request.num_blocks, 2) for t in range(request.stages)]


class Encoder(nn.Module):
    def __init__(self, request):
        super().__init__()
        width = request.overrides.get("width", 8)
        self.tokens = nn.Embedding(100, width)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 16, batch_first=True) for _ in range(4))
        self.out = nn.Linear(width, request.num_labels)

    def forward(self, input_ids, attention_mask, **_):
        hidden = self.tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=attention_mask == 0)
        return SimpleNamespace(logits=self.out(hidden[:, 0]))


register_family(
    Family(
        "mine", (), base="", embeddings=("tokens",), stacks={"blocks": "layers"}, head=("out",),
        load=Encoder, load_tokenizer=lambda name: demo_tokenizer(),
    )
)
'''


def test_a_users_own_schedule_and_family(tmp_path: Path) -> None:
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    command = [sys.executable, "-m", "progscale", "train", "--plugin", "my_plugin"]
    for value in (
        *("model.name=anything", "model.family=mine", "task.name=demo", "schedule.name=alternating", "schedule.stages=2"),
        *("train.epochs=1", "task.max_train_examples=64", "task.max_eval_examples=20", "run.name=a"),
    ):
        command += ["--set", value]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())
    assert [stage["first_block"] for stage in summary["stages"]] == [0, 1]
    assert [stage["frozen_changed"] for stage in summary["stages"]] == [0, 0]
    assert summary["updated_parameters"] == summary["planned_updated_parameters"]
    assert (tmp_path / "runs" / "a" / "model" / "model.safetensors").exists()


def test_a_misspelt_name_beside_a_plugin(command: Command) -> None:
    Path("my_schedule.py").write_text(
        "from progscale.schedule import register\n@register('odd_blocks')\ndef odd(request):\n    return [[1]] * request.stages\n"
    )
    answer = command("train", "--plugin", "my_schedule", "--set", "schedule.name=od_blocks", "--set", "method.name=ful")
    SCHEDULES.remove("odd_blocks")
    assert answer.code == 2
    assert "did you mean 'odd_blocks'?" in answer.err
    assert "did you mean 'full'?" in answer.err


def test_a_plugin_that_fails_shows_its_own_error(command: Command) -> None:
    """Not a mistake of the input: the author of the plug-in wants the traceback."""
    Path("my_broken_plugin.py").write_text("import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        command("train", "--plugin", "my_broken_plugin")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_crash_among_several_ranks_waits_for_nobody(tmp_path: Path, world_size: int) -> None:
    """Teardown would wait for ranks that hang in a collective; the traceback is shown all the same."""
    (tmp_path / "crash.py").write_text("import atexit\natexit.register(print, 'teardown')\nraise RuntimeError('gone')\n")
    environment = {**os.environ, "WORLD_SIZE": str(world_size), "RANK": str(world_size - 1), "LOCAL_RANK": str(world_size - 1)}
    command = [sys.executable, "-m", "progscale", "plan", "--plugin", "crash", "--model", "bert-base-uncased"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "RuntimeError: gone" in done.stderr
    assert ("teardown" in done.stdout) == (world_size == 1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_crashes_lets_go_of_stderr_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    done = []

    class Broken(Session):
        def __init__(self) -> None:
            engine, console = SimpleNamespace(rank=0, world_size=world_size), SimpleNamespace(end=lambda: done.append("console"))
            vars(self).update(engine=engine, console=console, signals=Signals(), config=Config())

        def close(self) -> None:
            done.append("session")

    def crash(session: Session) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("progscale.run.prepare", lambda *_, **__: Broken())
    monkeypatch.setattr("progscale.run.train", crash)
    monkeypatch.setattr("progscale.watch._connect", lambda _: None)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_train(build_parser().parse_args(["train"]))
    assert done == (["console", "session"] if world_size == 1 else ["console"])


def test_deepspeeds_notices_are_no_news(capfd: pytest.CaptureFixture[str]) -> None:
    """It sets its own level when it is imported, which a method's library may do late."""
    from deepspeed.utils.logging import LoggerFactory

    quiet_libraries()
    logger = LoggerFactory.create_logger("DeepSpeed")
    try:
        logger.warning("no news")
        logger.error("news")
    finally:
        logger.removeHandler(logger.handlers[-1])
    told = capfd.readouterr()
    assert "no news" not in told.out + told.err and "news" in told.out


def test_a_rank_that_says_nothing_lets_the_other_one_speak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher kills rank 0 when another rank leaves before it, and nobody would have said what is wrong."""
    stayed: list[float] = []
    monkeypatch.setattr("progscale.cli.time.sleep", stayed.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["plan"]) == 2
        said = capsys.readouterr().err
        assert (stayed, "no model named" in said) == (([], True) if rank == "0" else ([SILENT_SECONDS], False))
