"""Whether ZeRO-3 loads a checkpoint without any rank holding the whole model.

    python benchmarks/zero3_loading.py                          about 1 GB in shards of 200 MB, two ranks

Writes a sharded safetensors checkpoint of random weights (BERT-large's width, as many blocks as it takes) to a temporary folder,
loads it in fresh processes with `progscale.engine.loading.load_module`, and compares every gathered parameter with the file, bit
by bit.

How to read it: `share` is a rank's peak resident memory during loading, above that just before it, over the model's bytes. Two
ranks hold half of the parameters each: 0.5 and about one module more; below 0.7 is wanted, 1.0 or more means that a rank held the
whole model. `different` must be 0. Pages of the file that are mapped at the time count as resident too. A much smaller model
(--gigabytes) proves nothing: its word embeddings alone are a large share of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import ZERO, machine, show_machine, show_table, torchrun, write_json


def make_checkpoint(folder: Path, gigabytes: float, hidden: int, shard: str) -> None:
    """A BERT of about that size in float32."""
    from transformers import BertConfig, BertForSequenceClassification

    block = 12 * hidden * hidden + 13 * hidden
    embeddings = (30522 + 512 + 2) * hidden
    blocks = max(2, round((gigabytes * 1e9 / 4 - embeddings) / block))
    config = BertConfig(
        hidden_size=hidden, num_hidden_layers=blocks, num_attention_heads=max(1, hidden // 64), intermediate_size=4 * hidden
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder, max_shard_size=shard)


def load(folder: Path, output: Path) -> None:
    """One rank: loads, measures, compares."""
    from safetensors import safe_open

    from progscale.cli import quiet_libraries
    from progscale.engine import ranks
    from progscale.engine.base import EngineSettings
    from progscale.engine.launch import create_engine, make_accelerator, set_up_cpu
    from progscale.engine.loading import load_module
    from progscale.meters import MemoryMeter
    from progscale.models.family import ModelRequest
    from progscale.models.loading import auto_class, build_meta, find_family, load_config
    from progscale.models.weights import checkpoint_keys

    quiet_libraries()
    set_up_cpu()
    accelerator = make_accelerator(deepspeed=ZERO["zero3"])
    request = ModelRequest(name=str(folder), head="sequence_classification", num_labels=2)
    family = find_family(request, None)
    # What any run has imported and built before it loads weights.
    build_meta(request, family)
    auto_class(request, load_config(request))
    import deepspeed  # noqa: F401

    ranks.barrier()
    memory = MemoryMeter(torch.device(accelerator.device))
    start = time.perf_counter()
    module = load_module(request, family, ZERO["zero3"])
    seconds = time.perf_counter() - start
    peak = memory.peak()
    engine = create_engine(module, EngineSettings(), accelerator, ZERO["zero3"])
    parts: list[torch.Tensor] = [vars(parameter)["ds_tensor"] for parameter in engine.parameters.values()]
    held = sum(part.numel() * part.element_size() for part in parts)
    everyone = ranks.gather_objects(
        {"rank": engine.rank, "baseline": memory.baseline_bytes, "seconds": seconds, "partition": held, **peak}
    )
    names = checkpoint_keys(sorted(folder.glob("*.safetensors")))
    different, compared, size = [], 0, 0
    for name, value in engine.full_parameters():
        if value is None:
            continue
        compared += 1
        size += value.numel() * value.element_size()
        with safe_open(names[name], framework="pt") as file:
            if not torch.equal(value, file.get_tensor(name)):
                different.append(name)
    if engine.is_main:
        found: dict[str, Any] = {"model_bytes": size, "compared": compared, "different": different, "ranks": everyone}
        output.write_text(json.dumps(found))
    engine.barrier()


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the checkpoint")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size")
    parser.add_argument("--shard", default="200MB", help="largest shard")
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--bar", type=float, default=0.7, help="share that no rank may reach")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.load:
        load(options.load, options.output)
        return 0
    assert "RANK" not in os.environ, "this script starts the ranks itself"
    with tempfile.TemporaryDirectory() as folder:
        model, found = Path(folder) / "model", Path(folder) / "found.json"
        make_checkpoint(model, options.gigabytes, options.hidden, options.shard)
        torchrun(options.ranks, __file__, "--load", str(model), "--output", str(found))
        result = json.loads(found.read_text())
        shards = len(list(model.glob("*.safetensors")))
    show_machine()
    print(f"model of {result['model_bytes'] / 1e9:.3f} GB in {shards} shards, {options.ranks} ranks, seed 0")
    rows = []
    for rank in result["ranks"]:
        rank["share"] = rank["peak_memory_bytes"] / result["model_bytes"]
        megabytes = [round(rank[key] / 1e6) for key in ("baseline", "partition", "peak_memory_bytes")]
        rows.append([rank["rank"], *megabytes, rank["share"], rank["seconds"]])
    show_table(["rank", "baseline MB", "partition MB", "peak above MB", "share", "seconds"], rows)
    print(
        f"compared {result['compared']} parameters with the file, different: {len(result['different'])} {result['different'][:3]}"
    )
    write_json(options.output, {"machine": machine(), **result})
    good = not result["different"] and all(rank["share"] < options.bar for rank in result["ranks"])
    print("passed" if good else f"FAILED: every share must be below {options.bar} and nothing different")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
