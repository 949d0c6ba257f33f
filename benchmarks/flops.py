"""Operations of a step by the lowest live block: where the backward pass ends, with and without gradient checkpointing.

    python benchmarks/flops.py                                          BERT-base with LoRA
    python benchmarks/flops.py --model roberta-large --method adapter

Counted by torch's FlopCounterMode on the meta device: real models, no weights and no time. Matrix products alone are counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from common import show_table
from torch.utils.flop_counter import FlopCounterMode

from progscale.blocks import partition
from progscale.methods import METHODS, Subject, live_parameters, make_method
from progscale.models.family import Family, ModelRequest
from progscale.models.loading import build_meta, find_family
from progscale.schedule import Stage
from progscale.setup import enable_checkpointing


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-base-uncased", help="well-known architecture")
    parser.add_argument("--method", default="lora", choices=METHODS.names(), help="method, with its default options")
    parser.add_argument("--embeddings", action="store_true", help="train the embeddings, where the method can")
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=4, help="lowest live blocks to show, evenly spread")
    options = parser.parse_args(given)
    request = ModelRequest(options.model, "sequence_classification", random_weights=True)
    family = find_family(request, weights=False)
    blocks = sum(partition(build_meta(request, family), family).num_blocks.values())
    rows = []
    for first in sorted({blocks * step // options.steps for step in range(options.steps + 1)}):
        counts = [count(options, request, family, first, checkpointing) for checkpointing in (False, True)]
        (forward, backward), (_, recomputing) = counts
        rows.append([first, forward / 1e9, backward / 1e9, recomputing / 1e9])
    print(f"{options.model}, {options.method}, {options.rows} x {options.length} tokens, GFLOP; torch {torch.__version__}")
    show_table(["lowest live block", "forward", "backward", "backward with checkpointing"], rows)
    return 0


def count(options: argparse.Namespace, request: ModelRequest, family: Family, first: int, checkpointing: bool) -> tuple[int, int]:
    """Operations of the forward and of the backward pass with the blocks from `first` on live."""
    method = make_method(options.method, Subject(family, request.head))
    with torch.device("meta"):
        model = method.prepare(build_meta(request, family)).train()
        inputs = torch.zeros(options.rows, options.length, dtype=torch.long)
    if checkpointing:
        enable_checkpointing(model)
    parts = partition(model, family)
    stacks = {stack: tuple(range(first, number)) for stack, number in parts.num_blocks.items()}
    live = set(live_parameters(Stage(1, 0, 1, stacks, options.embeddings), parts, method))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in live)
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=inputs).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


if __name__ == "__main__":
    sys.exit(main())
