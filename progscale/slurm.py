"""What SLURM says of its partitions, what of a job they cannot give, and the submission itself. Imports no torch.

`sinfo` is asked by format and not for JSON, whose keys change from release to release.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from progscale.errors import Fault, UserError, nearest

# A line for each partition and node of it. Gres stands last: it is the one that another package may name.
FORMAT = "%R|%P|%a|%l|%L|%s|%B|%N|%T|%c|%m|%G"
# A busy controller answers late.
ANSWER_SECONDS = 60
GONE = ("down", "drain", "fail", "inval", "unknown", "error", "future", "blocked")
MEGABYTES = {"": 1.0, "k": 1 / 1024, "m": 1.0, "g": 1024.0, "t": 1024.0**2}
# What a job's processes need of the session that submits it; the rest tells of the job that the session itself may be in.
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
ARRAY_LIMIT = 10_000


@dataclass(frozen=True)
class Gpus:
    """GPUs of a node that are asked for.

    Attributes:
        count: from 1.
        type: as the cluster names it ("a100"); None: any.
    """

    count: int
    type: str | None = None

    def __str__(self) -> str:
        return f"{self.type}:{self.count}" if self.type else str(self.count)


@dataclass(frozen=True)
class Node:
    """A node as sinfo describes it.

    Attributes:
        name: SLURM's own.
        state: "idle", "mixed", "down*", …
        cpus: that SLURM deals out.
        megabytes: of memory.
        gpus: type ("" where it has none) → how many.
    """

    name: str
    state: str
    cpus: int
    megabytes: int
    gpus: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_up(self) -> bool:
        """Whether jobs may come to run there: one that sleeps is woken, and one that has just not answered ("idle*") may soon."""
        return not self.state.lower().startswith(GONE)

    def gpus_of(self, kind: str | None) -> int:
        """GPUs of a type, or of all types."""
        return sum(self.gpus.values()) if kind is None else self.gpus.get(kind, 0)


@dataclass(frozen=True)
class Partition:
    """A partition as sinfo describes it.

    Attributes:
        name: SLURM's own.
        is_default: where jobs go that name none.
        state: "up", "down" (jobs wait), "drain" or "inact" (no job is taken).
        most_seconds: a job's time limit at most; infinite where there is none.
        default_seconds: of a job that names no time limit.
        most_nodes: of a job; infinite where there is no limit.
        most_cpus: of a job on a node; infinite where there is no limit.
        nodes: all that belong to it.
    """

    name: str
    is_default: bool = False
    state: str = "up"
    most_seconds: float = math.inf
    default_seconds: float = math.inf
    most_nodes: float = math.inf
    most_cpus: float = math.inf
    nodes: tuple[Node, ...] = ()

    @property
    def up(self) -> tuple[Node, ...]:
        """Nodes on which jobs may come to run."""
        return tuple(node for node in self.nodes if node.is_up)


@dataclass(frozen=True)
class Wanted:
    """What a job asks of the cluster.

    Attributes:
        nodes: how many.
        ranks: on each node.
        cpus_per_rank: None: the cluster's default.
        megabytes: of memory on each node; 0: all of it; None: the cluster's default.
        gpus: on each node.
        seconds: time limit; None: the partition's default.
        signal_seconds: before the time limit the job is told.
        partitions: any of these; none: the cluster's default.
    """

    nodes: int = 1
    ranks: int = 1
    cpus_per_rank: int | None = None
    megabytes: float | None = None
    gpus: Gpus | None = None
    seconds: float | None = None
    signal_seconds: int = 0
    partitions: tuple[str, ...] = ()


# -- amounts as SLURM writes them -------------------------------------------------------------------------------------


def parse_time(text: str) -> float:
    """Seconds of a time limit: "90" (minutes), "12:00:00", "1-12", "infinite"; 0 is no limit.

    Source: sbatch(1), --time.

    >>> parse_time("90"), parse_time("10:00"), parse_time("1-12:30"), parse_time("UNLIMITED")
    (5400.0, 600.0, 131400.0, inf)

    Raises:
        ValueError: it is none of these.
    """
    if text.lower() in ("infinite", "unlimited", "n/a", "none"):
        return math.inf
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", text, re.ASCII):
        raise ValueError(text)
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, *(*parts, 0)[:2]
    total = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
    return float(total) if total else math.inf


def format_time(seconds: float) -> str:
    """As sinfo shows a time limit.

    >>> format_time(600), format_time(131400), format_time(math.inf)
    ('10:00', '1-12:30:00', 'infinite')
    """
    if math.isinf(seconds):
        return "infinite"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = (
        f"{hours:02}:{minutes:02}:{rest:02}" if days else f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    )
    return f"{days}-{clock}" if days else clock


def parse_memory(text: str) -> float:
    """Megabytes of an amount of memory: "9000", "200G", "1T".

    Source: sbatch(1), --mem.

    >>> parse_memory("9000"), parse_memory("200G")
    (9000.0, 204800.0)

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+)([kmgt]?)", text, re.IGNORECASE | re.ASCII)
    if found is None:
        raise ValueError(text)
    return int(found[1]) * MEGABYTES[found[2].lower()]


def parse_gpus(text: str) -> Gpus:
    """GPUs that are asked for: "8", "a100:8".

    Source: sbatch(1), --gpus-per-node.

    Raises:
        ValueError: it is none, or 0.
    """
    found = re.fullmatch(r"(?:([^\s:,|]+):)?(\d+)", text, re.ASCII)
    if found is None or int(found[2]) == 0:
        raise ValueError(text)
    return Gpus(int(found[2]), found[1])


def parse_array(text: str) -> list[int]:
    """The elements of a job array: "1-3,7", "0-10:5%2".

    Source: sbatch(1), --array.

    >>> parse_array("1-3,7"), parse_array("0-10:5%2")
    ([1, 2, 3, 7], [0, 5, 10])

    Raises:
        ValueError: it is none, it has no element, or more than ARRAY_LIMIT.
    """
    one = r"\d+(-\d+(:\d+)?)?"
    if not re.fullmatch(rf"{one}(,{one})*(%\d+)?", text, re.ASCII):
        raise ValueError(text)
    found: list[int] = []
    for part in text.partition("%")[0].split(","):
        ends, _, step = part.partition(":")
        first, _, last = ends.partition("-")
        elements = range(int(first), int(last or first) + 1, int(step or 1))
        if not elements or len(found) + len(elements) > ARRAY_LIMIT:
            raise ValueError(text)
        found.extend(elements)
    return list(dict.fromkeys(found))


def parse_gres(text: str) -> dict[str, int]:
    """Type → count of the GPUs in sinfo's Gres.

    >>> parse_gres("gpu:a100:4(S:0-1),gpu:v100:2,nvme:1"), parse_gres("gpu:8"), parse_gres("(null)")
    ({'a100': 4, 'v100': 2}, {'': 8}, {})
    """
    found: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)(?=[(,]|$)", text):
        found[kind] = found.get(kind, 0) + int(count)
    return found


def parse_sinfo(text: str) -> list[Partition]:
    """The partitions in what `sinfo --Node` prints in FORMAT; one without nodes is not there."""
    found: dict[str, Partition] = {}
    nodes: dict[str, list[Node]] = {}
    for line in text.splitlines():
        cells = line.strip().split("|", FORMAT.count("|"))
        if len(cells) <= FORMAT.count("|"):
            continue
        name, marked, state, most, default, size, cpus, node, is_now, own, memory, gres = cells
        limit = parse_time(most)
        standard = parse_time(default)
        found[name] = Partition(
            name,
            is_default=marked.endswith("*"),
            state=state,
            most_seconds=limit,
            default_seconds=limit if math.isinf(standard) else standard,
            most_nodes=number(size.rpartition("-")[2]),
            most_cpus=number(cpus),
        )
        made = Node(node, is_now, int(number(own, 0)), int(number(memory, 0)), parse_gres(gres))
        nodes.setdefault(name, []).append(made)
    return [Partition(**{**vars(partition), "nodes": tuple(nodes[name])}) for name, partition in found.items()]


def number(text: str, otherwise: float = math.inf) -> float:
    """A number of sinfo's, "8+" where several differ; what is none, like UNLIMITED, is something else."""
    digits = text.rstrip("+")
    return float(digits) if digits.isdecimal() else otherwise


# -- what the cluster cannot give -------------------------------------------------------------------------------------


def refusals(wanted: Wanted, partitions: Sequence[Partition]) -> list[Fault]:
    """Everything that a job asks for and that no partition it may go to has, each fault under the option's name.

    Args:
        wanted: by the job.
        partitions: of the cluster.
    """
    # In an order of their own: that of sinfo varies from call to call.
    names = sorted(partition.name for partition in partitions)
    allowed = [partition for partition in partitions if partition.name in wanted.partitions]
    if unknown := [name for name in wanted.partitions if name not in names]:
        has = f"this cluster has {', '.join(names) or 'none with nodes'}"
        return [Fault("--partition", f"'{name}' is unknown; {has}{nearest(name, names)}") for name in unknown]
    if not wanted.partitions:
        allowed = [partition for partition in partitions if partition.is_default]
    if not allowed:
        return [Fault("--partition", f"missing; this cluster has no default among {', '.join(names) or 'its partitions'}")]
    found = [refusals_of(wanted, partition) for partition in allowed]
    if not all(found):
        return []
    faults = [fault for part in found for fault in part]
    others = [one.name for one in partitions if one not in allowed and one.up and not refusals_of(wanted, one)]
    if others:
        faults[-1] = Fault(faults[-1].key, f"{faults[-1].message}; --partition {others[0]} has all that is asked for")
    return faults


def refusals_of(wanted: Wanted, partition: Partition) -> list[Fault]:
    """What one partition cannot give."""
    where = f"partition '{partition.name}'"
    if partition.state in ("drain", "inact"):
        return [Fault("--partition", f"'{partition.name}' takes no jobs now ({partition.state})")]
    faults = []
    limit = partition.most_seconds
    if wanted.seconds is not None and wanted.seconds > limit:
        faults.append(Fault("--time", f"{format_time(wanted.seconds)} asked for; {where} has at most {format_time(limit)}"))
    if wanted.seconds is None and wanted.signal_seconds >= partition.default_seconds:
        message = f"{wanted.signal_seconds} s before the end of a job of {format_time(partition.default_seconds)} ({where}) is "
        message += "before its begin; lower it, or give --time"
        faults.append(Fault("--signal-seconds", message))
    if wanted.nodes > min(len(partition.nodes), partition.most_nodes):
        most = f"gives a job at most {partition.most_nodes:g}" if partition.most_nodes < len(partition.nodes) else None
        faults.append(Fault("--nodes", f"{wanted.nodes} asked for; {where} {most or f'has {len(partition.nodes)}'}"))
    elif wanted.nodes > len(partition.up):
        gone = ", ".join(f"{node.name} {node.state}" for node in partition.nodes if not node.is_up)
        faults.append(Fault("--nodes", f"{wanted.nodes} asked for; {where} has {len(partition.up)} that are up ({gone})"))
    # Nodes that are down tell what there is too: they come back.
    poor = poor_nodes(wanted, partition)
    faults += poor
    if not faults and len(able := [node for node in partition.up if suits(wanted, node)]) < wanted.nodes:
        faults.append(Fault("--nodes", f"{wanted.nodes} asked for; {len(able)} in {where} are up and have what is asked of each"))
    return faults


def poor_nodes(wanted: Wanted, partition: Partition) -> list[Fault]:
    """What no node of a partition has."""
    faults, nodes = [], partition.nodes
    where = f"those of partition '{partition.name}' have"
    gpus = max((node.gpus_of(wanted.gpus.type if wanted.gpus else None) for node in nodes), default=0)
    if wanted.gpus is not None and wanted.gpus.count > gpus:
        types = sorted({Gpus(count, kind or None) for node in nodes for kind, count in node.gpus.items()}, key=str)
        known = ", ".join(map(str, types))
        has = f"at most {known}" if known else "no GPUs that SLURM knows of"
        faults.append(Fault("--gpus-per-node", f"{wanted.gpus} asked for on each node; {where} {has}"))
    most = min(max((node.cpus for node in nodes), default=0), partition.most_cpus)
    cpus = (wanted.cpus_per_rank or 1) * wanted.ranks
    # Ranks that are there for GPUs in vain are no second mistake.
    if cpus > most and not (faults and wanted.cpus_per_rank is None):
        ranks = f" for each of {wanted.ranks} ranks are {cpus}" if wanted.ranks > 1 else ""
        option = "--cpus-per-rank" if wanted.cpus_per_rank is not None else "--ranks-per-node"
        each = wanted.cpus_per_rank or 1
        faults.append(Fault(option, f"{each} {plural(each, 'CPU')}{ranks} on a node; {where} at most {most:g}"))
    memory = max((node.megabytes for node in nodes), default=0)
    if wanted.megabytes is not None and wanted.megabytes > memory:
        faults.append(Fault("--mem", f"{wanted.megabytes:g}M asked for on each node; {where} at most {memory}M"))
    return faults


def suits(wanted: Wanted, node: Node) -> bool:
    """Whether a node has all that is asked of each."""
    gpus = wanted.gpus is None or wanted.gpus.count <= node.gpus_of(wanted.gpus.type)
    cpus = (wanted.cpus_per_rank or 1) * wanted.ranks <= node.cpus
    return gpus and cpus and (wanted.megabytes or 0) <= node.megabytes


def share_of_cpus(wanted: Wanted, partitions: Iterable[Partition]) -> int | None:
    """CPUs for each rank, in proportion to a node's GPUs that are asked for: SLURM's own default is one for all of them.

    Returns:
        None where no GPUs are asked for, or no node has them.
    """
    if wanted.gpus is None:
        return None
    shares = [
        min(node.cpus * wanted.gpus.count // node.gpus_of(None), partition.most_cpus) // wanted.ranks
        for partition in partitions
        if partition.name in wanted.partitions or (partition.is_default and not wanted.partitions)
        for node in partition.up
        if suits(wanted, node)
    ]
    return max(1, int(min(shares))) if shares else None


def plural(count: int, word: str) -> str:
    """The word for so many.

    >>> plural(1, "rank"), plural(2, "rank")
    ('rank', 'ranks')
    """
    return word if count == 1 else f"{word}s"


# -- SLURM's commands -------------------------------------------------------------------------------------------------


def missing_command() -> str | None:
    """The first of SLURM's commands that this machine lacks."""
    return next((name for name in ("sbatch", "sinfo") if shutil.which(name) is None), None)


def ask_partitions() -> list[Partition]:
    """All partitions with their nodes, hidden ones too.

    Raises:
        UserError: SLURM does not answer.
    """
    return parse_sinfo(ask(["sinfo", "--noheader", "--all", "--Node", "--format", FORMAT], os.environ)[0])


def try_script(script: str, environment: Mapping[str, str]) -> str:
    """When and where SLURM would start a script; nothing is queued.

    Raises:
        UserError: it would refuse it, in its own words.
    """
    told = ask(["sbatch", "--test-only"], environment, given=script)[1]
    return re.sub(r"^Job \d+ to start", "SLURM would start it", plain(told))


def submit_script(path: Path, environment: Mapping[str, str]) -> str:
    """Submits a script; returns the job's number.

    Raises:
        UserError: SLURM refuses it, in its own words.
    """
    return ask(["sbatch", "--parsable", str(path)], environment)[0].strip().partition(";")[0]


def ask(command: Sequence[str], environment: Mapping[str, str], given: str = "") -> tuple[str, str]:
    """What one of SLURM's commands writes to its two outputs.

    Raises:
        UserError: it fails, is not there, or does not answer in time.
    """
    try:
        done = subprocess.run(
            command,
            env=dict(environment),
            input=given,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]}: no answer from SLURM in {ANSWER_SECONDS} s") from error
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be run ({error.strerror})") from error
    if done.returncode != 0:
        raise UserError(f"{command[0]}: {plain(done.stderr) or f'exit code {done.returncode}'}")
    return done.stdout, done.stderr


def plain(said: str) -> str:
    r"""A message of SLURM's as one line without the names of its programs.

    >>> plain("sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition")
    'invalid partition specified: x; Batch job submission failed: Invalid partition'
    """
    lines = [re.sub(r"^\w+: ((error|fatal): )?", "", line).strip() for line in said.splitlines()]
    return "; ".join(line for line in lines if line)


def clean_environment(environment: Mapping[str, str], given: Iterable[str] = ()) -> dict[str, str]:
    """The environment of a submission.

    A session may itself be a job, whose variables would be taken for the new one's; and those by which sbatch's options can be
    given would win over the script's.

    Args:
        environment: of this process.
        given: names of sbatch's variables that the script answers.
    """
    is_job = "SLURM_JOB_ID" in environment
    return {
        key: value
        for key, value in environment.items()
        if key not in given and not (is_job and key.startswith(("SLURM_", "SLURMD_")) and key not in KEPT)
    }
