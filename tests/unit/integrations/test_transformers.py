"""make_progressive: what it refuses and leaves behind, and what a Trainer may bring along (PEFT, evaluation, accumulation)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from progscale.errors import AuditError, RegistryError, ScheduleError, UserError
from progscale.integrations.stages import rebind_scheduler
from progscale.integrations.transformers import make_progressive
from tests.tiny import tiny_model


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(5, 101, (8,), generator=torch.Generator().manual_seed(row))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[1] % 2}


def trainer_in(folder: Path, model: Any = None, **options: Any) -> Trainer:
    own = {
        key: options.pop(key) for key in ("optimizers", "model_init", "callbacks", "optimizer_cls_and_kwargs") if key in options
    }
    values = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True, **options}
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, save_strategy="no", **values)
    if "model_init" not in own and model is None:
        model = tiny_model("bert", blocks=6)
    return Trainer(model, args, train_dataset=Rows(), eval_dataset=Rows(), **own)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optim": "adafactor"}, r"args.optim: 'adafactor' has no stage switch here; take adamw_torch or adamw_torch_fused"),
        ({"optim": "adamw_bnb_8bit"}, "args.optim: 'adamw_bnb_8bit'"),
        ({"auto_find_batch_size": True}, "args.auto_find_batch_size"),
        ({"gradient_checkpointing": True}, "set gradient_checkpointing_kwargs={'use_reentrant': False}"),
        ({"torch_compile": True}, "args.torch_compile"),
        ({"model_init": lambda: tiny_model("bert", blocks=2)}, "model_init: stages are made for one model"),
    ],
)
def test_what_cannot_be_exact_is_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_progressive(trainer_in(tmp_path, **options))


def test_an_optimizer_or_a_curve_of_ones_own(tmp_path: Path) -> None:
    model = tiny_model("bert", blocks=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    curve = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(UserError, match=r"optimizers=: give args.optim .*; lr_scheduler: give args.lr_scheduler_type"):
        make_progressive(trainer_in(tmp_path, model, optimizers=(optimizer, curve)))


def test_twice_or_unknown(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    with pytest.raises(RegistryError, match="progtunning"):
        make_progressive(trainer, schedule="progtunning")
    make_progressive(trainer)
    with pytest.raises(UserError, match="it is progressive already"):
        make_progressive(trainer)


def test_stages_that_do_not_fit_say_so_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    make_progressive(trainer, stages=100)
    with pytest.raises(ScheduleError, match="100 stages for a run of 18 optimizer steps"):
        trainer.train()


def test_what_it_leaves_behind(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, logging_steps=1)
    progressive = make_progressive(trainer, embeddings="first_stage")
    trainer.train()
    assert [outcome.first_block for outcome in progressive.outcomes] == [{"blocks": 0}, {"blocks": 2}, {"blocks": 4}]
    assert [outcome.embeddings for outcome in progressive.outcomes] == [True, False, False]
    assert [(outcome.start_step, outcome.end_step) for outcome in progressive.outcomes] == [(0, 6), (6, 12), (12, 18)]
    written = json.loads((tmp_path / "progressive.json").read_text())
    assert (written["schedule"], written["outcomes"]) == ("progtuning", [outcome.to_json() for outcome in progressive.outcomes])
    assert [stage[:2] for stage in written["plan"]] == [[0, 6], [6, 12], [12, 18]]
    logged = [entry for entry in trainer.state.log_history if "progressive/stage" in entry]
    assert [entry["progressive/trainable_parameters"] for entry in logged] == [
        o.trainable_parameters for o in progressive.outcomes
    ]
    with pytest.raises(UserError, match="has trained already; make a new one"):
        trainer.train()


def test_evaluation_accumulation_and_callbacks_go_on_as_ever(tmp_path: Path) -> None:
    seen: list[int] = []

    class Looks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, *, optimizer: Any, lr_scheduler: Any, **kwargs: Any) -> None:
            seen.append(sum(p.numel() for group in optimizer.param_groups for p in group["params"]))
            assert lr_scheduler.optimizer is optimizer

    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
    trainer = trainer_in(tmp_path, callbacks=[Looks()], **options)
    progressive = make_progressive(trainer)
    trainer.train()
    sizes = [outcome.trainable_parameters for outcome in progressive.outcomes]
    assert seen == [size for size in sizes for _ in range(3)]
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 5
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([5e-5 * (9 - step) / 9 for step in range(9)])
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_peft_model_trains_its_own_tensors_alone(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("bert", blocks=6), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trainer_in(tmp_path, model, learning_rate=1e-2)
    progressive = make_progressive(trainer)
    trainer.train()
    assert progressive.stages is not None
    assert progressive.stages.builds[0].live == trained
    live = progressive.stages.builds[2].live
    assert {name for name in live if ".layer." in name} == {
        name for name in trained if ".layer.4." in name or ".layer.5." in name
    }
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained


def test_a_frozen_weight_that_changes_ends_the_run(tmp_path: Path) -> None:
    class Meddles(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
            if state.global_step == 8:
                with torch.no_grad():
                    model.bert.encoder.layer[0].output.dense.bias[0] += 1e-3

    trainer = trainer_in(tmp_path, callbacks=[Meddles()])
    make_progressive(trainer)
    with pytest.raises(AuditError, match="stage 2: 1 frozen tensors changed their bits"):
        trainer.train()


def test_groups_with_rates_of_their_own_are_refused() -> None:
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    old = torch.optim.AdamW([{"params": weights[:1], "lr": 1e-3}, {"params": weights[1:], "lr": 1e-4}])
    curve = torch.optim.lr_scheduler.LambdaLR(old, lambda step: 1.0)
    new = torch.optim.AdamW([{"params": [weight]} for weight in weights])
    with pytest.raises(ScheduleError, match=r"several values of lr \(0.0001, 0.001\)"):
        rebind_scheduler(curve, new, old.param_groups)


def test_a_curve_goes_on_over_other_groups() -> None:
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    old = torch.optim.AdamW([{"params": weights}], lr=1e-3)
    curve = torch.optim.lr_scheduler.LambdaLR(old, lambda step: 1 / (step + 1))
    old.step()
    curve.step()
    new = torch.optim.AdamW([{"params": [weight]} for weight in weights], lr=9.0)
    rebind_scheduler(curve, new, old.param_groups)
    assert [group["lr"] for group in new.param_groups] == [5e-4] * 3
    new.step()
    curve.step()
    assert [group["lr"] for group in new.param_groups] == pytest.approx([1e-3 / 3] * 3)
    assert curve.get_last_lr() == pytest.approx([1e-3 / 3] * 3)


def test_the_model_can_be_trained_again(tmp_path: Path) -> None:
    """In a notebook one makes a new Trainer over the same model; what a stage froze is no choice of the user's."""
    model = tiny_model("bert", blocks=6)
    sizes = []
    for number in range(2):
        trainer = trainer_in(tmp_path / str(number), model)
        progressive = make_progressive(trainer)
        trainer.train()
        sizes.append([outcome.trainable_parameters for outcome in progressive.outcomes])
    assert sizes[0] == sizes[1]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["create_optimizer", "create_scheduler"])
def test_an_optimizer_or_curve_of_a_subclass(tmp_path: Path, name: str) -> None:
    own = type("Own", (Trainer,), {name: lambda self, *args, **kwargs: None})
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(UserError, match=f"{name}: of a subclass"):
        make_progressive(own(tiny_model("bert", blocks=2), args, train_dataset=Rows()))


def test_the_best_model_at_the_end(tmp_path: Path) -> None:
    """It is of an earlier stage, and loaded after the last audit."""
    options = {"eval_strategy": "steps", "eval_steps": 6, "save_steps": 6, "load_best_model_at_end": True, "learning_rate": 1.0}
    model = tiny_model("bert", blocks=6)
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=4, **options
    )
    trainer = Trainer(model, args, train_dataset=Rows(), eval_dataset=Rows())
    progressive = make_progressive(trainer)
    trainer.train()
    assert len(progressive.outcomes) == 3
    assert trainer.state.best_model_checkpoint is not None


def test_what_callbacks_see_while_a_stage_is_logged(tmp_path: Path) -> None:
    seen = []

    class Logs(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, *, logs: Any, optimizer: Any, **kwargs: Any) -> None:
            if "progressive/stage" in logs:
                seen.append((logs["progressive/stage"], len(optimizer.param_groups), self.ended))

        ended = False

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ended = True

    trainer = trainer_in(tmp_path, callbacks=[Logs()])
    make_progressive(trainer)
    trainer.train()
    assert [entry[0] for entry in seen] == [1, 2, 3]
    assert all(groups > 0 and not ended for _, groups, ended in seen), (
        "each before its optimizer is gone, and before trackers close"
    )


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
        return control


def test_what_it_tells_after_a_resume(tmp_path: Path) -> None:
    first = trainer_in(tmp_path, callbacks=[StopAt(8)])
    made = make_progressive(first)
    first.train()
    assert [(outcome.start_step, outcome.end_step) for outcome in made.outcomes] == [(0, 6), (6, 8)]
    second = trainer_in(tmp_path)
    made = make_progressive(second)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert [(outcome.start_step, outcome.end_step) for outcome in made.outcomes] == [(0, 6), (6, 12), (12, 18)]
    for outcome in made.outcomes:
        assert outcome.measured_updates == outcome.planned_updates == 6 * outcome.trainable_parameters
    written = json.loads((tmp_path / "progressive.json").read_text())
    assert written["outcomes"] == [outcome.to_json() for outcome in made.outcomes]


def test_a_checkpoint_of_other_stages(tmp_path: Path) -> None:
    first = trainer_in(tmp_path, callbacks=[StopAt(8)])
    make_progressive(first)
    first.train()
    second = trainer_in(tmp_path)
    make_progressive(second, stages=2)
    with pytest.raises(
        UserError, match=r"saved in a run of other stages .*: they begin at \[0, 6, 12\] and end with step 18, these at \[0, 9\]"
    ):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    (tmp_path / "checkpoint-8" / "progressive.json").unlink()
    third = trainer_in(tmp_path)
    make_progressive(third)
    with pytest.raises(UserError, match=r"has no progressive\.json: a Trainer without stages has saved it"):
        third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_curves_inside_of_a_curve_go_on_too() -> None:
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    old = torch.optim.AdamW([{"params": weights}], lr=1e-3)
    parts = [torch.optim.lr_scheduler.LambdaLR(old, lambda step: 1 / (step + 1)) for _ in range(2)]
    curve = torch.optim.lr_scheduler.SequentialLR(old, parts, milestones=[3])
    new = torch.optim.AdamW([{"params": [weight]} for weight in weights], lr=9.0)
    rebind_scheduler(curve, new, old.param_groups)
    before = new.param_groups[0]["lr"]
    new.step()
    curve.step()
    assert [group["lr"] for group in new.param_groups] == pytest.approx([before / 2] * 3)
