"""The ranks of a run: they meet, are measured where they are on several machines, and must want the same."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from progscale.cache import nodes_of
from progscale.checks import Check
from progscale.config import Config, dump_config, micro_batch_size
from progscale.config.deepspeed import check_groups, nvme_folder
from progscale.engine import ranks
from progscale.engine.deepspeed import check_release
from progscale.engine.launch import check_precision, choose_interface, make_accelerator
from progscale.engine.mapped import check_folder
from progscale.errors import ConfigError, Fault, NetworkError, UserError
from progscale.estimate import partition_bytes
from progscale.launcher import read_ranks
from progscale.network import measured_checks
from progscale.preflight import SLOW_CPU, SLOW_GPU, Network, measure, meet, node_name
from progscale.resume import DATA, EPOCH, MODEL
from progscale.trackers import RunConsole

# How much longer a collective waits than the watch.
WATCH_FIRST_SECONDS = 30


def join_ranks(config: Config, options: Mapping[str, Any]) -> tuple[Any, Network | None]:
    """The Accelerator of this run, once all ranks are there and want the same; and the network, where they are on several nodes.

    Args:
        config: of this rank.
        options: of its command line, beside the config.

    Raises:
        UserError: ranks, device or precision do not fit the config, or the ranks' configs differ.
        NetworkError: some rank does not come, or nothing comes through between some.
    """
    deepspeed = config.engine.deepspeed
    accelerator, local = meet_ranks(config, deepspeed)
    # Before any other collective, in which all would wait without a name.
    network = _measured(accelerator, local) if _looks_first(config) else None
    check_precision(config.train.precision, torch.device(accelerator.device), deepspeed is not None)
    check_same_on_all_ranks(config, options)
    check_engine(config, int(accelerator.num_processes))
    micro_batch_size(config, int(accelerator.num_processes))
    if deepspeed is not None:
        zero_stage, on_cpu = int(deepspeed["zero_optimization"]["stage"]), torch.device(accelerator.device).type == "cpu"
        check_release(version("deepspeed"), zero_stage, on_cpu=on_cpu, checkpointing=config.train.gradient_checkpointing)
    return accelerator, network


def meet_ranks(config: Config, deepspeed: Mapping[str, Any] | None) -> tuple[Any, int]:
    """The Accelerator of this process, in the group of all ranks; and the ranks of a node, 0 where they were not asked for.

    Raises:
        UserError: ranks or device do not fit the config.
        NetworkError: some rank does not come, or cannot be reached.
    """
    local = 0
    if _looks_first(config):
        choose_interface()
        local = meet(
            os.environ, config.engine.timeout_seconds, lambda line: print(f"progscale: {line}", file=sys.stderr, flush=True)
        )
    # The watch says which rank hangs; a collective that gives up first knows only that one does.
    accelerator = make_accelerator(deepspeed=deepspeed, timeout_seconds=config.engine.timeout_seconds + WATCH_FIRST_SECONDS)
    return accelerator, local


def _looks_first(config: Config) -> bool:
    return config.engine.preflight == "auto" and read_ranks(os.environ).machines_are_several


def _measured(accelerator: Any, local: int) -> Network:
    """With the ranks of a node as `meet_ranks` gives them."""
    return measure(torch.device(accelerator.device), local or nodes_of(accelerator).local, os.environ)


def measure_ranks(config: Config, save: str | None) -> list[Check]:
    """What the ranks of a launch find when they meet and measure, told on each node. A collective, without a run.

    Args:
        config: of the run that is to come.
        save: file in which the first rank writes what was measured.

    Raises:
        UserError: the file cannot be written.
        NetworkError: they cannot meet.
    """
    accelerator, local = meet_ranks(config, None)
    try:
        network = _measured(accelerator, local)
        ranks.on_main(lambda: write_network(network, save) if save is not None else None)
    except NetworkError:
        raise  # the process group's own end would wait for what is stuck
    except BaseException:
        accelerator.end_training()
        raise
    accelerator.end_training()
    on_gpu = torch.device(accelerator.device).type == "cuda"
    return measured_checks(network, SLOW_GPU if on_gpu else SLOW_CPU)


def write_network(network: Network, path: str) -> None:
    """Writes what was measured.

    Raises:
        UserError: it cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(network.to_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--save: '{path}' cannot be written ({error.strerror})") from error


def show_network(network: Network, console: RunConsole, *, on_gpu: bool) -> None:
    """What was measured between the nodes, and who is slow."""
    console.show(str(network))
    for line in network.slow(SLOW_GPU if on_gpu else SLOW_CPU):
        console.show(f"slow: {line}; progscale doctor on that node may tell why")


def check_engine(config: Config, world_size: int) -> None:
    """Refuses an engine that the number of processes contradicts.

    Raises:
        ConfigError: `plain` on several processes (`ddp` on one process is plain training, as everywhere), or second copies of the
            parameters that the ranks cannot share equally.
    """
    check_groups(config.engine.deepspeed, world_size)
    if config.engine.name == "plain" and world_size > 1:
        raise ConfigError(Fault("engine.name", f"'plain' is one process, but {world_size} were started; take 'ddp' or 'auto'"))


def check_disk(config: Config, elements: int, world_size: int) -> None:
    """Looks on every machine whether its ranks can put their partitions where the config offloads them to. A collective.

    Args:
        config: of the run.
        elements: of the model.
        world_size: ranks.

    Raises:
        UserError: naming the machines on which they cannot.
    """
    folder = nvme_folder(config.engine.deepspeed)
    if folder is None:
        return
    problem = None
    try:
        check_folder(folder, partition_bytes(config, elements, world_size) * read_ranks(os.environ).local)
    except UserError as error:
        problem = str(error)
    # Of every machine that has one, where `on_all` would tell the first alone.
    hosts: dict[str, list[str]] = {}
    for host, told in dict.fromkeys(ranks.gather_objects((node_name(os.environ), problem))):
        if told is not None:
            hosts.setdefault(told, []).append(host)
    if hosts:
        raise UserError("\n".join(f"on {', '.join(names)}: {told}" for told, names in hosts.items()))


def check_same_on_all_ranks(config: Config, options: Mapping[str, Any] | None = None) -> None:
    """Refuses a run whose processes were started with different configs, options, or versions of what it computes with.

    Raises:
        ConfigError: naming the ranks that differ from rank 0, and their machines.
    """
    packages = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes")
    things = {
        "config": json.dumps(dump_config(config), sort_keys=True),
        "code of progscale": code_hash(),
        "command line (--resume and what it allows)": json.dumps(options),
        **{f"release of {package}": _release(package) for package in packages},
    }
    _refuse_different(things, "start all alike")


def _release(package: str) -> str:
    """The installed release; what is missing on one machine must not keep the others waiting for its answer."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def check_same_input(identity: Mapping[str, Any]) -> None:
    """Refuses a run whose processes have read different data, or another model: files of one name may differ by machine.

    Raises:
        ConfigError: naming the ranks that differ from rank 0, and their machines.
    """
    things = {key: json.dumps(identity[key]) for key in (DATA, EPOCH, MODEL)}
    _refuse_different(things, "the files of that machine are others; copy them anew, or use a folder that all machines share")


def _refuse_different(things: Mapping[str, str], remedy: str) -> None:
    """Refuses what is not the same text on all ranks. A collective."""
    # Of a config that would be long: nothing but whether it is the same is asked.
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in things.items()}
    everywhere = ranks.gather_objects((node_name(os.environ), hashes))
    for name in things:
        differ = {rank: host for rank, (host, found) in enumerate(everywhere) if found[name] != everywhere[0][1][name]}
        if differ:
            hosts = ", ".join(dict.fromkeys(differ.values()))
            who = f"rank {', '.join(map(str, differ))} ({hosts})"
            raise ConfigError(f"the {name} on {who} is not that of rank 0 ({everywhere[0][0]}); {remedy}")


def code_hash() -> str:
    """A hash of the package's sources."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
