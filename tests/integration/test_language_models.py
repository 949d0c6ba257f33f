"""Decoders and encoder-decoders from a local folder and the user's own texts to the exported model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from progscale.blocks import partition
from progscale.export import load_exported, merge_exported
from progscale.methods import Subject, make_method
from progscale.models.family import FAMILIES
from tests.harness.language import model_folder, sentences, word_tokenizer, write_jsonl
from tests.harness.programs import Answer, in_process, records, settings, summary_of
from tests.integration.test_resume import Told, same_run
from tests.tiny import tiny_model

# Four steps in two stages.
COMMON: dict[str, Any] = {
    "train__epochs": 2,
    "train__global_batch_size": 8,
    "train__max_length": 24,
    "train__evaluate": "end",
    "schedule__stages": 2,
    "optimizer__lr": 1e-3,
    "task__max_train_examples": ...,
    "task__max_eval_examples": ...,
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Told]]:
    monkeypatch.setattr("progscale.setup.Session", Told)
    yield Told
    Told.stop_at = None


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROGSCALE_CACHE", str(tmp_path / "cache"))


def train(folder: Path, *more: str, **changes: Any) -> Answer:
    return in_process("train", *settings(run__output_dir=str(folder), **{**COMMON, **changes}), *more)


def summaries(folder: Path) -> dict[str, Any]:
    """Settings of a run on texts and their first words, which it writes."""
    sources = sentences(25)
    data = write_jsonl(folder / "data.jsonl", article=sources, summary=[" ".join(text.split()[:3]) for text in sources])
    return {
        **{"task__name": "summarization", "task__train_file": str(data), "task__validation_fraction": 0.2, "train__epochs": 1},
        **{"task__source_column": "article", "task__target_column": "summary"},
        **{"task__max_target_length": 6, "task__max_new_tokens": 5},
    }


def own_loss(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """What transformers' own loss says of texts: joined, cut into blocks, the mean over all tokens but each block's first."""
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = [torch.tensor([stream[begin : begin + 24]]) for begin in range(0, len(stream), 24)]
    blocks = [block for block in blocks if block.shape[1] > 1]
    with torch.no_grad():
        summed = sum(model(input_ids=block, labels=block).loss.item() * (block.shape[1] - 1) for block in blocks)
    return summed / sum(block.shape[1] - 1 for block in blocks)


def test_a_decoder_on_texts_stopped_and_resumed(told: type[Told], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_folder(tmp_path / "gpt2", "gpt2", "causal_lm", tokenizer=word_tokenizer(pad=False))
    texts, held_out = sentences(48, longest=10), sentences(9, seed=1)
    (tmp_path / "train.txt").write_text("\n\n".join(texts))
    (tmp_path / "dev.txt").write_text("\n".join(held_out))
    run = {"task__name": "causal_lm", "task__path": str(tmp_path), "model__name": str(model), "train__epochs": 1}
    with caplog.at_level("INFO", "progscale.data"):
        whole = train(tmp_path / "whole", **run)
    assert whole.code == 0, whole.err
    assert "the tokenizer has no pad token: it pads with its end token '</s>'" in caplog.text
    summary = summary_of(tmp_path / "whole" / "a")
    metrics = summary["metrics"]
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert [stage["first_block"] for stage in summary["stages"]] == [0, 2]
    assert all(stage["updated_parameters"] == stage["planned_updated_parameters"] for stage in summary["stages"])

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "a" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole" / "a" / "model")
    assert exported.config.use_cache is True
    assert (exported.config.pad_token_id, exported.generation_config.pad_token_id, tokenizer.pad_token) == (1, 1, "</s>")
    assert metrics["loss"] == pytest.approx(own_loss(exported, tokenizer, held_out), abs=1e-5)

    told.stop_at = 1
    assert train(tmp_path / "again", **run).code == 75
    told.stop_at = None
    answer = train(tmp_path / "again", "--resume", "auto", **run)
    assert answer.code == 0, answer.err
    same_run(tmp_path / "again" / "a", tmp_path / "whole" / "a")


@pytest.mark.parametrize(
    ("family", "method"), [("gpt2", "lora"), ("gpt2", "bitfit"), ("gpt2", "adapter"), ("llama", "lora"), ("llama", "qlora")]
)
def test_methods_on_a_decoder(tmp_path: Path, family: str, method: str) -> None:
    """The head was pretrained with the rest: it stays as it is, and what is exported loads on the base model."""
    model = model_folder(tmp_path / family, family, "causal_lm", tie_word_embeddings=False)
    texts, held_out = sentences(48, longest=10), sentences(9, seed=1)
    (tmp_path / "train.txt").write_text("\n\n".join(texts))
    (tmp_path / "dev.txt").write_text("\n".join(held_out))
    run = {"task__name": "causal_lm", "task__path": str(tmp_path), "model__name": str(model), "train__epochs": 1}
    answer = train(tmp_path, "--set", f"method.name={method}", **run)
    assert answer.code == 0, answer.err
    summary, folder = summary_of(tmp_path / "a"), tmp_path / "a" / "model"
    exported = load_exported(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert own_loss(exported, tokenizer, held_out) == pytest.approx(summary["metrics"]["loss"], abs=1e-5)
    assert summary["updated_parameters"] == summary["planned_updated_parameters"]
    before = AutoModelForCausalLM.from_pretrained(model).lm_head.weight
    heads = [value for name, value in exported.named_parameters() if name.endswith("lm_head.weight")]
    assert len(heads) == 1 and torch.equal(heads[0], before)
    if method == "lora":
        peft = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        assert own_loss(peft, tokenizer, held_out) == pytest.approx(summary["metrics"]["loss"], abs=1e-5)
        merge_exported(folder, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert own_loss(merged, tokenizer, held_out) == pytest.approx(summary["metrics"]["loss"], abs=1e-5)


@pytest.mark.parametrize("method", ["adapter", "lora", "qlora"])
def test_methods_on_an_encoder_decoder(tmp_path: Path, method: str) -> None:
    """Both stacks have what the method adds, and the model writes through it."""
    model = model_folder(tmp_path / "t5", "t5", "seq2seq_lm")
    answer = train(tmp_path, "--set", f"method.name={method}", **summaries(tmp_path), model__name=str(model))
    assert answer.code == 0, answer.err
    summary = summary_of(tmp_path / "a")
    assert {"rouge1", "loss", "perplexity"} <= summary["metrics"].keys()
    counts = [stage["trainable_parameters"] for stage in summary["stages"]]
    assert counts[0] == 2 * counts[1]
    assert all(stage["updated_parameters"] == stage["planned_updated_parameters"] for stage in summary["stages"])
    exported = load_exported(tmp_path / "a" / "model")
    added = [name for name, _ in exported.named_parameters() if ".adapter." in name or ".lora_" in name]
    assert {stack for stack in ("encoder", "decoder") if any(f"{stack}.block.3." in name for name in added)} == {
        "encoder",
        "decoder",
    }


@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_decoder_on_pairs_stopped_and_resumed(told: type[Told], tmp_path: Path, beams: int) -> None:
    """Whatever its published generation config asks for, one text is written for each row."""
    model = model_folder(tmp_path / "t5", "t5", "seq2seq_lm", tie_word_embeddings=False)
    published = json.loads((model / "generation_config.json").read_text())
    published |= {"return_dict_in_generate": True, "num_beams": 3, "num_return_sequences": 2}
    (model / "generation_config.json").write_text(json.dumps(published))
    run = {**summaries(tmp_path), "model__name": str(model), "task__source_prefix": "summarize : ", "task__num_beams": beams}
    whole = train(tmp_path / "whole", **run)
    assert whole.code == 0, whole.err
    summary = summary_of(tmp_path / "whole" / "a")
    metrics = summary["metrics"]
    assert {"rouge1", "rouge2", "rougeL", "loss", "perplexity"} <= metrics.keys()
    assert [stage["first_block"] for stage in summary["stages"]] == [{"encoder": 0, "decoder": 0}, {"encoder": 2, "decoder": 2}]
    exported = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "whole" / "a" / "model")
    assert not torch.equal(exported.lm_head.weight, exported.shared.weight)
    assert json.loads((tmp_path / "whole" / "a" / "model" / "config.json").read_text())["use_cache"] is True
    told.stop_at = 1
    assert train(tmp_path / "again", **run).code == 75
    told.stop_at = None
    answer = train(tmp_path / "again", "--resume", "auto", **run)
    assert answer.code == 0, answer.err
    same_run(tmp_path / "again" / "a", tmp_path / "whole" / "a")


def test_what_a_decoder_writes_is_scored(tmp_path: Path) -> None:
    """The text of the exported model, prompted alone and without padding, is what the run scored in padded batches."""
    from progscale.tasks.metrics.rouge import rouge_scores

    tokenizer = word_tokenizer(begins=True)
    model = model_folder(tmp_path / "llama", "llama", "causal_lm", tokenizer=tokenizer, initializer_range=0.3)
    prompts = sentences(16)
    targets = [" ".join(text.split()[-2:]) for text in prompts]
    train_file = write_jsonl(tmp_path / "train.jsonl", q=prompts, a=targets)
    asked = sentences(7, seed=1)
    answers = [text.split()[-1] for text in asked]
    dev_file = write_jsonl(tmp_path / "dev.jsonl", q=asked, a=answers)
    answer = train(
        tmp_path,
        **{"task__name": "causal_lm", "task__train_file": str(train_file), "task__validation_file": str(dev_file)},
        **{"task__source_column": "q", "task__target_column": "a", "task__generate": True, "task__max_target_length": 4},
        **{"task__max_new_tokens": 6, "model__name": str(model), "train__epochs": 1, "train__eval_batch_size": 4},
    )
    assert answer.code == 0, answer.err
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model").eval()
    written = []
    for prompt in asked:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = exported.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        written.append(tokenizer.decode(out, skip_special_tokens=True))
    scores = rouge_scores(written, answers)
    found = summary_of(tmp_path / "a")["metrics"]
    assert {kind: found[kind] for kind in scores} == pytest.approx(scores)
    assert len(records(tmp_path / "a", "evaluation")) == 1


@pytest.mark.parametrize(
    ("family", "method"),
    [*product(["gpt2", "llama", "qwen3", "t5"], ["full"]), ("gpt2", "lora"), ("llama", "adapter"), ("t5", "lora")],
)
def test_classification(tmp_path: Path, family: str, method: str) -> None:
    """A decoder takes the last token that is no padding, so an exported model must say the same about a text alone."""
    tokenizer = word_tokenizer(pad=family == "t5", ends=family == "t5")
    model = model_folder(
        tmp_path / family,
        family,
        "causal_lm" if family != "t5" else "seq2seq_lm",
        tokenizer=tokenizer,
        pad_token_id=0 if family == "t5" else None,
    )
    texts = sentences(40)
    data = write_jsonl(tmp_path / "data.jsonl", text=texts, label=[i % 2 for i in range(40)])
    answer = train(
        tmp_path,
        **{
            "task__name": "table",
            "task__train_file": str(data),
            "task__text_columns": ["text"],
            "task__validation_fraction": 0.2,
        },
        **{"model__name": str(model), "train__epochs": 1, "method__name": method},
    )
    assert answer.code == 0, answer.err
    exported: Any = load_exported(tmp_path / "a" / "model")
    if method == "full":
        exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a" / "model").eval()
    elif method == "lora":
        merge_exported(tmp_path / "a" / "model", tmp_path / "merged")
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert merged.config.pad_token_id == exported.config.pad_token_id
    own = AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    assert exported.config.pad_token_id == own.pad_token_id == (0 if family == "t5" else 1)
    with torch.no_grad():
        alone = torch.cat([exported(**own(text, return_tensors="pt")).logits for text in texts[:6]])
        together = exported(**own(texts[:6], return_tensors="pt", padding=True, padding_side="right")).logits
    assert torch.allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_answers_in_a_text_by_an_encoder_decoder(tmp_path: Path, method: str) -> None:
    """With this head the model is its own base: the spans' layer is new, the norms above the blocks are not."""
    model = tiny_model("t5", "question_answering")
    prepared = make_method(method, Subject(FAMILIES.get("t5"), "question_answering"), {}).prepare(model)
    parts = partition(prepared, FAMILIES.get("t5"))
    trained = make_method(method, Subject(FAMILIES.get("t5"), "question_answering"), {}).tensors(parts)
    head = {name.replace(".modules_to_save.default", "") for name in trained & set(parts.names("head"))}
    assert {name.removeprefix("base_model.model.") for name in head} == {"qa_outputs.weight", "qa_outputs.bias"}


def test_a_text_that_holds_the_end_token(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "t5", "t5", "seq2seq_lm", pad_token_id=0)
    end = AutoTokenizer.from_pretrained(model).eos_token
    texts = sentences(40)
    data = write_jsonl(tmp_path / "data.jsonl", text=[*texts[:7], f"w1 {end} w2", *texts[8:]], label=[i % 2 for i in range(40)])
    table = {"task__name": "table", "task__train_file": str(data), "task__text_columns": ["text"]}
    answer = train(tmp_path, **table, task__validation_file=str(data), model__name=str(model))
    assert answer.code == 2
    assert "train: row 7 has 2 end tokens" in answer.err and "(1 rows have another number)" in answer.err


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "gpt2",
            {"task__generate": True, "task__max_new_tokens": 50},
            "task.max_new_tokens: 50 beside train.max_length 24 are more than the 64 tokens that this model takes",
        ),
        ("gpt2", {"task__name": "summarization"}, "transformers has no seq2seq lm head for model type 'gpt2'"),
        ("t5", {"task__name": "causal_lm"}, "transformers has no causal lm head for model type 't5'"),
        (
            "t5",
            {"task__name": "summarization", "model__overrides": {"decoder_start_token_id": None}},
            "the model's config has no decoder_start_token_id",
        ),
        ("gpt2", {"task__metric": "rougeL"}, "task.metric: 'rougeL' is not a metric of this task (loss, perplexity)"),
        (
            "t5",
            {"task__name": "summarization", "schedule__name": "custom", "schedule__first_blocks": {"encoder": [0, 2]}},
            "schedule.first_blocks: given for encoder; the model's stacks of blocks are encoder, decoder",
        ),
    ],
)
def test_bad_inputs(tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    model = model_folder(tmp_path / family, family, "seq2seq_lm" if family == "t5" else "causal_lm")
    data = write_jsonl(tmp_path / "data.jsonl", q=sentences(20), a=sentences(20))
    common = {"task__name": "causal_lm", "task__train_file": str(data), "model__name": str(model), "task__max_target_length": 4}
    columns = {"task__source_column": "q", "task__target_column": "a", "task__validation_fraction": 0.2}
    answer = train(tmp_path / "runs", "--dry-run", **{**common, **columns, **changes})
    assert answer.code == 2
    assert message in " ".join(answer.err.split())
