"""The shim that counts and breaks changes of files, on small programs whose changes are known."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import faultfs
from tests.harness.faultfs import ERRORS, Operation, build_shim, file_faults, read_log

pytestmark = pytest.mark.skipif(not faultfs.SUPPORTED, reason="the shim knows x86-64 Linux alone")

WRITE_AND_RENAME = """
with open("a.partial", "wb") as file:
    file.write(b"x" * 1000)
    file.flush()
    os.fsync(file.fileno())
os.replace("a.partial", "a")
"""


def run(
    folder: Path,
    program: str,
    *,
    fault: str | None = None,
    rank: int | None = None,
    environment: dict[str, str] | None = None,
    root: str = "root",
) -> tuple[subprocess.CompletedProcess[str], list[Operation]]:
    """A Python program in `folder`/root, and what the shim logged."""
    (folder / "root").mkdir(exist_ok=True)
    log = folder / "log"
    log.unlink(missing_ok=True)
    added = file_faults().environment(folder / root, log=log, fault=fault, rank=rank) | (environment or {})
    # -S -E: nothing of the environment's own is imported that the program did not ask for.
    flags = [] if "torch" in program else ["-I", "-S"]
    command = [sys.executable, *flags, "-c", "import os\n" + program]
    done = subprocess.run(command, cwd=folder / "root", env={**os.environ, **added}, capture_output=True, text=True, timeout=60)
    return done, read_log(log) if log.exists() else []


def short(operations: list[Operation], folder: Path) -> list[tuple[str, str, int]]:
    """(kind, path below the root, bytes) of operations that are numbered from 1."""
    assert [operation.k for operation in operations] == list(range(1, len(operations) + 1))
    return [(o.kind, o.path.removeprefix(f"{folder / 'root'}").removeprefix("/"), o.bytes) for o in operations]


def test_what_python_does(tmp_path: Path) -> None:
    program = f"""{WRITE_AND_RENAME}
os.mkdir("d")
os.rename("a", "d/b c")
os.symlink("b c", "d/s"); os.link("d/b c", "d/l"); os.unlink("d/s")
folder = os.open("d", os.O_RDONLY)
os.fsync(folder)
file = os.open("d/b c", os.O_RDWR)
os.pwrite(file, b"abc", 5)
os.writev(file, [b"ab", b"cde"]); os.pwritev(file, [b"ab", b"c"], 4)
os.ftruncate(file, 10); os.truncate("d/l", 9); os.posix_fallocate(file, 0, 64); os.fdatasync(file); os.chmod("d/l", 0o600)
import mmap, shutil
mmap.mmap(file, 0).close()
mmap.mmap(file, 0, access=mmap.ACCESS_READ).close()
shutil.copyfile("d/b c", "copy")
shutil.rmtree("d")
"""
    done, operations = run(tmp_path, program)
    assert done.returncode == 0, done.stderr
    found = short(operations, tmp_path)
    assert found[:20] == [
        ("open", "a.partial", 0),
        ("write", "a.partial", 1000),
        ("fsync", "a.partial", 0),
        ("rename", "a", 0),
        ("mkdir", "d", 0),
        ("rename", "d/b c", 0),
        ("symlink", "d/s", 0),
        ("link", "d/l", 0),
        ("unlink", "d/s", 0),
        ("fsync", "d", 0),
        ("write", "d/b c", 3),
        ("write", "d/b c", 5),
        ("write", "d/b c", 3),
        ("truncate", "d/b c", 10),
        ("truncate", "d/l", 9),
        ("allocate", "d/b c", 64),
        ("fsync", "d/b c", 0),
        ("chmod", "d/l", 0),
        ("mmap", "d/b c", 64),
        ("open", "copy", 0),
    ]
    # sendfile is asked again until it has nothing to give.
    assert found[20:22] == [("write", "copy", 64), ("write", "copy", 0)]
    assert sorted(found[22:24]) == [("unlink", "d/b c", 0), ("unlink", "d/l", 0)]
    assert found[24:] == [("rmdir", "d", 0)]


def test_what_safetensors_does(tmp_path: Path) -> None:
    program = """
import torch
from safetensors.torch import save_file
save_file({"a": torch.arange(300_000.0), "b": torch.zeros(2000)}, "x.safetensors")
"""
    done, operations = run(tmp_path, program)
    assert done.returncode == 0, done.stderr
    found = short(operations, tmp_path)
    size = (tmp_path / "root" / "x.safetensors").stat().st_size
    assert [(kind, count) for kind, _, count in found[:2]] == [("open", 0), ("truncate", size)]
    assert {kind for kind, _, _ in found[2:-1]} == {"write"}
    assert sum(count for kind, _, count in found if kind == "write") == size
    assert len({path for _, path, _ in found[:-1]}) == 1, "all goes into one temporary file"
    assert found[-1] == ("rename", "x.safetensors", 0)
    (tmp_path / "root" / "x.safetensors").unlink()
    done, _ = run(tmp_path, program, fault=f"errno:ENOSPC@{len(found)}")
    assert "No space left on device" in done.stderr
    assert not (tmp_path / "root" / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("fault", "files"),
    [
        ("kill@1", {}),
        ("killafter@1", {"a.partial": 0}),
        ("kill@2", {"a.partial": 0}),
        ("tear@2", {"a.partial": 500}),
        ("killafter@2", {"a.partial": 1000}),
        ("tear@3", {"a.partial": 1000}),
        ("kill@4", {"a.partial": 1000}),
        ("killafter@4", {"a": 1000}),
    ],
)
def test_killed_at_an_operation(tmp_path: Path, fault: str, files: dict[str, int]) -> None:
    done, operations = run(tmp_path, WRITE_AND_RENAME, fault=fault)
    assert done.returncode == -9
    assert {path.name: path.stat().st_size for path in (tmp_path / "root").iterdir()} == files
    assert len(operations) == int(fault[-1])


@pytest.mark.parametrize(
    ("write", "torn"),
    [
        ("os.pwrite(file, b'x' * 9, 4)", 8),
        ("os.writev(file, [b'abc', b'defgh'])", 4),
        ("os.pwritev(file, [b'abc', b'defgh'], 10)", 14),
        ("os.sendfile(file, os.open('source', os.O_RDONLY), 0, 1 << 20)", 50),
        ("os.copy_file_range(os.open('source', os.O_RDONLY), file, 1 << 20, offset_src=20)", 40),
    ],
)
def test_half_of_every_kind_of_write(tmp_path: Path, write: str, torn: int) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "source").write_bytes(b"s" * 100)
    done, _ = run(tmp_path, f"file = os.open('a', os.O_WRONLY | os.O_CREAT)\n{write}", fault="tear@2")
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "root" / "a").stat().st_size == torn


@pytest.mark.parametrize("name", ERRORS)
def test_errors(tmp_path: Path, name: str) -> None:
    program = """
file = os.open("a", os.O_WRONLY | os.O_CREAT)
for action in (lambda: os.write(file, b"12"), lambda: os.write(file, b"345"), lambda: os.mkdir("d")):
    try:
        action()
        print("ok")
    except OSError as error:
        print(error.errno)
"""
    number = str(getattr(errno, name))
    done, _ = run(tmp_path, program, fault=f"errno:{name}@2")
    assert done.stdout.split() == [number, "ok", "ok"], done.stderr
    assert (tmp_path / "root" / "a").read_bytes() == b"345"
    (tmp_path / "root" / "d").rmdir()
    done, operations = run(tmp_path, program, fault=f"errno:{name}@3+")
    assert done.stdout.split() == ["ok", number, number]
    assert (tmp_path / "root" / "a").read_bytes() == b"12" + b"5", "the file was not emptied, and the second write failed"
    assert len(operations) == 4


@pytest.mark.parametrize("name", ERRORS)
def test_a_full_disk_lets_files_be_deleted(tmp_path: Path, name: str) -> None:
    program = """
os.mkdir("d"); open("a", "w").close()
for action in (lambda: os.mkdir("e"), lambda: os.unlink("a"), lambda: os.rmdir("d")):
    try:
        action()
    except OSError:
        pass
"""
    run(tmp_path, program, fault=f"errno:{name}@3+")
    left = {path.name for path in (tmp_path / "root").iterdir()}
    assert left == (set() if name in ("ENOSPC", "EDQUOT") else {"a", "d"})


def test_sleep(tmp_path: Path) -> None:
    program = """
import time
start = time.monotonic()
os.mkdir("d")
print(time.monotonic() - start)
"""
    done, _ = run(tmp_path, program, fault="sleep:0.3@1")
    assert 0.3 <= float(done.stdout) < 5


def test_a_signal_while_an_operation_waits(tmp_path: Path) -> None:
    """Its handler writes too, and the operation is done all the same."""
    program = """
import signal
signal.signal(signal.SIGALRM, lambda *_: print("alarm", flush=True))
there, here = os.pipe()
os.set_blocking(here, False)
signal.set_wakeup_fd(here)
signal.setitimer(signal.ITIMER_REAL, 0.1)
os.mkdir("d")
print(os.path.isdir("d"), len(os.read(there, 9)))
"""
    done, _ = run(tmp_path, program, fault="sleep:0.4@1")
    assert done.stdout.split() == ["alarm", "True", "1"], done.stderr


def test_what_lies_outside_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "rootless").mkdir()
    program = """
with open("../rootless/a", "w") as file:
    file.write("x")
os.mkdir("../b"); os.rename("../b", "../c"); print("said")
os.symlink("../rootless", "out")
open("out/b", "w").close()
open(os.path.join("..", "root", ".", "in"), "w").close()
os.rename("in", "../moved")
open("/dev/null", "w").write("x")
"""
    done, operations = run(tmp_path, program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "said\n"
    found = [(o.kind, os.path.relpath(o.path, tmp_path)) for o in operations]
    assert found == [("symlink", "root/out"), ("open", "root/in"), ("rename", "moved")]
    done, _ = run(tmp_path, "os.mkdir('../after')", fault="errno:EIO@1+")
    assert done.returncode == 0, done.stderr


def test_the_root_may_be_named_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "link").symlink_to("root")
    _, operations = run(tmp_path, "os.mkdir('d')", root="link")
    assert short(operations, tmp_path) == [("mkdir", "d", 0)]


def test_threads_share_a_counter(tmp_path: Path) -> None:
    program = """
import threading
def work(index):
    for number in range(50):
        os.mkdir(f"{index}-{number}")
threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    done, operations = run(tmp_path, program)
    assert done.returncode == 0, done.stderr
    assert sorted(operation.k for operation in operations) == list(range(1, 201))
    assert len({operation.path for operation in operations}) == 200


def test_a_thread_that_blocks_all_signals(tmp_path: Path) -> None:
    """As faulthandler's watchdog does, which then writes its report."""
    program = """
import faulthandler, signal, time
faulthandler.dump_traceback_later(0.1)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
time.sleep(0.3)
os.mkdir("d")
"""
    done, operations = run(tmp_path, program)
    assert done.returncode == 0, done.stderr
    assert "Timeout" in done.stderr
    assert short(operations, tmp_path) == [("mkdir", "d", 0)]


def test_child_processes(tmp_path: Path) -> None:
    """Forked or started anew, also by one that was itself started; each of the latter counts for itself."""
    program = """
import subprocess, sys
inner = "import os; os.mkdir('inner')"
command = [sys.executable, "-I", "-S", "-c"]
outer = f"import os, subprocess; os.mkdir('outer'); subprocess.run({[*command, inner]}, check=True)"
os.mkdir("first")
subprocess.run([*command, outer], check=True)
subprocess.run("echo hello > shell", shell=True, check=True)
try:
    subprocess.run(["/no/such/program"])
except FileNotFoundError:
    print("none such")
"""
    done, operations = run(tmp_path, program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "none such\n"
    found = [(o.k, o.kind, Path(o.path).name) for o in operations]
    assert found == [(1, "mkdir", name) for name in ("first", "outer", "inner")] + [(1, "open", "shell"), (2, "write", "shell")]


def test_one_rank_alone_is_met(tmp_path: Path) -> None:
    program = "os.mkdir('d')"
    log = str(tmp_path / "log.{rank}")
    for rank, code in ((0, 0), (1, -9)):
        done, _ = run(tmp_path, program, fault="kill@1", rank=1, environment={"RANK": str(rank), "FAULTFS_LOG": log})
        assert done.returncode == code
        assert len(read_log(tmp_path / f"log.{rank}")) == 1
    (tmp_path / "root" / "d").rmdir()
    done, _ = run(tmp_path, program, fault="kill@1", rank=0)
    assert done.returncode == -9, "a process without a launcher is rank 0"


@pytest.mark.parametrize(
    "text", ["", "kill", "kill@0", "kill@x", "errno@1", "errno:EPERM@1", "sleep@1", "maim@3", "kill@1;kill@2", "kill@1+-"]
)
def test_faults_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="is no file fault: kill@K"):
        file_faults().environment(tmp_path, fault=text)
    done, _ = run(tmp_path, "", environment={"FAULTFS_FAULT": text})
    assert done.returncode == 127
    assert done.stderr.startswith(f"faultfs: {text}: ")


def test_no_compiler_and_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match="need a C compiler"):
        build_shim(tmp_path)
    monkeypatch.delenv("CC")
    monkeypatch.setattr(faultfs, "SOURCE", tmp_path / "missing.c")
    with pytest.raises(RuntimeError, match=r"missing\.c"):
        build_shim(tmp_path)
