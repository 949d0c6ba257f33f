"""The paper's table: every number to two decimals."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from progscale.paper import paper_table, render_paper

# task, method, epochs → baseline and progtuning in millions, and whether the paper's values are met.
GOLDEN = {
    ("GLUE", "bert-base-uncased", "full", 3): (328.45, 243.40, None),
    ("GLUE", "bert-large-uncased", "full", 3): (1005.43, 703.12, True),
    ("SQuAD v1.1", "bert-base-uncased", "full", 3): (326.68, 241.63, True),
    ("SQuAD v2.0", "bert-base-uncased", "full", 2): (217.79, 175.26, True),
    ("GLUE", "bert-base-uncased", "bitfit", 8): (0.829, 0.492, True),
    ("GLUE", "bert-base-uncased", "bitfit", 10): (1.037, 0.614, True),
    ("GLUE", "roberta-base", "lora", 25): (22.18, 18.93, True),
    ("GLUE", "roberta-base", "lora", 30): (26.61, 22.63, True),
    ("GLUE, 3 labels", "roberta-base", "lora", 30): (26.63, 22.65, True),
    ("GLUE, regression", "roberta-base", "lora", 40): (35.45, 30.14, True),
    ("GLUE", "roberta-base", "lora", 60): (53.22, 45.11, True),
    ("GLUE", "roberta-base", "lora", 80): (70.96, 60.25, True),
    ("GLUE", "bert-base-uncased", "adapter", 16): (28.65, 16.13, False),
    ("GLUE", "bert-base-uncased", "adapter", 20): (35.81, 20.01, False),
}


def test_every_row() -> None:
    table = paper_table()
    assert table == json.loads(json.dumps(table))
    found = {(row["task"], row["model"], row["method"], row["epochs"]): row for row in table}
    assert found.keys() == GOLDEN.keys()
    for key, (baseline, updated, reproduced) in GOLDEN.items():
        digits = 3 if baseline < 10 else 2
        assert round(found[key]["baseline_millions"], digits) == baseline, key
        assert round(found[key]["updated_millions"], digits) == updated, key
        assert found[key]["reproduced"] is reproduced, key
        assert bool(found[key]["note"]) == (reproduced is False), key


def test_what_is_not_reproduced_says_so_and_shows_both_values() -> None:
    console = Console(width=130, file=io.StringIO())
    console.print(render_paper())
    text = console.file.getvalue()
    assert "28.6 → 9.9" in text
    assert "28.65 → 16.13" in text
    assert "no [1]" in text
    assert "cannot go below half" in text
    assert "1005.4 → 703.1" in text


@pytest.mark.parametrize(("method", "paper"), [("adapter", 9.9)])
def test_the_rule_cannot_reach_the_papers_adapter_value(method: str, paper: float) -> None:
    row = next(row for row in paper_table() if row["method"] == method)
    assert row["updated_millions"] > row["baseline_millions"] / 2 > paper
