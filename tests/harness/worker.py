"""Two ranks that stay up and run one case after the other, so that a distributed case costs no launch.

Started by `TwoRanks` through torchrun. Each rank connects to the test process, takes `("module:function", kwargs)`,
and answers `("ok", result)` or `("error", traceback)`.
"""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import tempfile
import traceback
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from tests.harness.sending import packed, unpacked

REPOSITORY = Path(__file__).resolve().parents[2]
KEY = b"progscale-tests"


class RankError(AssertionError):
    """A case raised in one of the ranks."""


class TwoRanks:
    """The test process's side.

    Args:
        ranks: how many.
        timeout_seconds: for one case; a case that hangs ends the ranks, and the next case starts new ones.
    """

    def __init__(self, ranks: int = 2, timeout_seconds: float = 240) -> None:
        self.ranks = ranks
        self.timeout_seconds = timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connections: list[Connection] = []

    def run(self, function: str, **kwargs: Any) -> list[Any]:
        """Calls `function` ("module:name") with `kwargs` in every rank; the results in the order of ranks."""
        if self._process is None:
            self._start()
        for connection in self._connections:
            connection.send_bytes(packed((function, kwargs)))
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(self.timeout_seconds):
                # A rank that waits for one that raised: ask the others before giving up.
                errors = [unpacked(c.recv_bytes())[1] for c in self._connections[rank + 1 :] if c.poll(0)]
                self.close()
                raise RankError(f"rank {rank} gave no answer in {self.timeout_seconds} s\n" + "\n".join(errors))
            kind, value = unpacked(connection.recv_bytes())
            if kind == "error":
                self.close()
                raise RankError(f"rank {rank}:\n{value}")
            answers.append(value)
        return answers

    def _start(self) -> None:
        folder = tempfile.mkdtemp(prefix="progscale-ranks-")
        address = str(Path(folder) / "socket")
        with Listener(address, family="AF_UNIX", authkey=KEY) as listener:
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={self.ranks}"]
            command += ["--master_addr=127.0.0.1", "--master_port=0", "--rdzv_backend=c10d"]
            command += ["--rdzv_endpoint=127.0.0.1:0", __file__, address]
            environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, env=environment, cwd=REPOSITORY)
            by_rank = {}
            for _ in range(self.ranks):
                connection = listener.accept()
                by_rank[connection.recv()] = connection
        self._connections = [by_rank[rank] for rank in range(self.ranks)]

    def close(self) -> None:
        """Ends the ranks."""
        for connection in self._connections:
            connection.close()
        self._connections = []
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None


def serve(address: str) -> None:
    """One rank: answers cases until the test process goes away."""
    connection = Client(address, family="AF_UNIX", authkey=KEY)
    connection.send(int(os.environ["RANK"]))
    while True:
        try:
            function, kwargs = unpacked(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        module, name = function.split(":")
        try:
            answer = ("ok", getattr(importlib.import_module(module), name)(**kwargs))
        except BaseException:
            answer = ("error", traceback.format_exc())
        # What is left now stays. Else each collection, of which a stage switch makes one, would look through all that earlier
        # cases have imported.
        gc.collect()
        gc.freeze()
        connection.send_bytes(packed(answer))


if __name__ == "__main__":
    serve(sys.argv[1])
