"""A real run that is killed at random moments and resumed each time, beside the same run left alone: is anything different?

    python benchmarks/kill_and_resume.py --data DATA                     MRPC, real encoder, two ranks, ZeRO-2, bf16, ten kills
    python benchmarks/kill_and_resume.py --data DATA --kills 2 --max-train-examples 320        a smoke run

The script starts the documented command (launch/launch.sh, --resume auto) and kills every process of it with SIGKILL after a
random time, wherever it is then: starting, loading, training, evaluating, saving. Half of the lives write their checkpoints in
the background. The last life runs to its end.

How to read it: `equal` must be yes in each row. Losses, gradient norms and learning rates are those of every optimizer step,
scores those of every evaluation; the ledger is updated, planned and skipped parameters by stage; the model is the SHA-256 of its
exported weights.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from common import (
    DATA,
    REPOSITORY,
    config_options,
    fetch_encoder,
    machine,
    quiet_environment,
    show_machine,
    show_table,
    write_json,
)

LEDGER = ("stage", "first_block", "start_step", "end_step", "updated_parameters", "planned_updated_parameters", "skipped_steps")


def command(options: argparse.Namespace, output: Path, *, background: bool) -> list[str]:
    """The documented command, through the launch script."""
    launcher = ["bash", "launch/launch.sh", "--config_file", "configs/accelerate/cpu2.yaml", "launch/train.py"]
    values: dict[str, Any] = {
        "model.name": str(options.encoder or fetch_encoder()),
        "task.path": str(options.data / "glue" / "MRPC"),
        "run.output_dir": str(output),
        "run.name": "run",
        "run.seed": options.seed,
        "train.precision": "bf16",
        "train.logging_steps": 1,
        "optimizer.lr": 5e-5,
        "checkpoint.every_steps": options.every_steps,
        "checkpoint.background": background,
        "task.max_train_examples": options.max_train_examples,
    }
    return [*launcher, *config_options(["configs/zero2.json", "configs/tasks/mrpc.json"], values), "--resume", "auto"]


def live(options: argparse.Namespace, output: Path, log: Path, seconds: float | None, *, background: bool) -> bool:
    """One life of the run: until its end, or killed after `seconds`. Returns whether it came to its end."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with log.open("ab") as file:
        process = subprocess.Popen(
            command(options, output, background=background),
            cwd=REPOSITORY,
            env={**quiet_environment(), "PATH": path},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill_all(process.pid)
            process.wait()
            return False
    if code:
        raise SystemExit(f"the run failed with exit code {code}; see {log}")
    return True


def kill_all(pid: int) -> None:
    """SIGKILL to a process and all below it; the launcher's workers have sessions of their own."""
    launcher = psutil.Process(pid)
    # Stopped first: it can neither start another one meanwhile, nor pass anything on.
    launcher.suspend()
    for process in [*launcher.children(recursive=True), launcher]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def reached(output: Path) -> tuple[int, int]:
    """The last step in the records, and that of the newest checkpoint."""
    records, latest = output / "run" / "metrics.jsonl", output / "run" / "checkpoints" / "latest.json"
    steps = [line["step"] for line in lines(records) if line["kind"] == "step"]
    return max(steps, default=0), int(json.loads(latest.read_text())["step"]) if latest.exists() else 0


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file."""
    found = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in found]


def shown(output: Path) -> dict[str, Any]:
    """What two runs must have in common."""
    folder = output / "run"
    summary, records = json.loads((folder / "summary.json").read_text()), lines(folder / "metrics.jsonl")

    def of(kind: str, leave_out: Sequence[str] = ("time", "kind")) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key not in leave_out} for line in records if line["kind"] == kind]

    return {
        "losses, gradient norms, learning rates": of("step"),
        "scores": of("evaluation"),
        "final scores": summary["metrics"],
        "best scores": [summary["best_metrics"], summary["best_step"]],
        "ledger": [[stage[key] for key in LEDGER] for stage in summary["stages"]],
        "updated parameters": [summary["updated_parameters"], summary["planned_updated_parameters"]],
        "model": hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest(),
    }


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="how often the run is killed")
    parser.add_argument("--seed", type=int, default=1, help="of the run, and of the moments")
    parser.add_argument("--every-steps", type=int, default=10, help="checkpoint.every_steps")
    parser.add_argument("--encoder", type=Path, help="folder of the encoder; default: MiniLM from the package index")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with glue/")
    parser.add_argument("--max-train-examples", type=int, help="for a smoke run")
    parser.add_argument("--work-dir", type=Path, default=REPOSITORY / "runs" / "kill_and_resume", help="emptied first")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args(given)
    options.data = options.data.resolve()
    shutil.rmtree(options.work_dir, ignore_errors=True)
    whole, killed, log = options.work_dir / "whole", options.work_dir / "killed", options.work_dir / "log.txt"
    for folder in (whole, killed):
        folder.mkdir(parents=True)
    begin, clock = time.time(), time.perf_counter()
    live(options, whole, log, None, background=False)
    seconds = time.perf_counter() - clock
    first = next(line["time"] for line in lines(whole / "run" / "metrics.jsonl") if line["kind"] == "step")
    starting = first - begin
    print(f"left alone it takes {seconds:.0f} s, {starting:.0f} of them to the first step", flush=True)
    chance = random.Random(options.seed)
    rows = []
    for kill in range(options.kills):
        # About as much work in each life as lets the run outlive all kills but the last.
        moment = chance.uniform(0.3 * starting, starting + 1.6 * (seconds - starting) / (options.kills + 1))
        done = live(options, killed, log, moment, background=kill % 2 == 1)
        step, saved = reached(killed)
        rows.append([kill + 1, moment, step, saved, step - saved])
        print(f"kill {kill + 1} after {moment:.1f} s: step {step}, newest checkpoint {saved}", flush=True)
        if done:
            raise SystemExit(f"the run ended before kill {kill + 1}: choose fewer kills or another seed")
    live(options, killed, log, None, background=False)
    one, other = shown(whole), shown(killed)
    show_machine()
    show_table(["kill", "after s", "step reached", "checkpoint", "steps lost"], rows)
    verdicts = {name: one[name] == other[name] for name in one}
    show_table(["what", "equal"], [[name, "yes" if equal else "NO"] for name, equal in verdicts.items()])
    print(f"final scores: {one['final scores']}")
    result = {"machine": machine(), "kills": rows, "equal": verdicts, "scores": one["final scores"]}
    write_json(options.output, result)
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
