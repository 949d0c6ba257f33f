"""Hosts with addresses of their own on this machine: network namespaces on one bridge, each with a name that nobody can look up.

Needs root, ip (Debian: iproute2) and unshare. They share this machine's file system and process numbers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.harness.forks import LAUNCHER


def why_not() -> str:
    """Why no hosts can be made here; empty where they can."""
    missing = [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt-get install iproute2 util-linux)"
    if os.geteuid() != 0:
        return "network namespaces are made by root"
    name = f"try{uuid.uuid4().hex[:6]}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode == 0:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return tried.stderr.strip()


class Hosts:
    """Hosts on a network of their own, 10.77.0.1 and so on, as a context.

    Args:
        count: how many.
    """

    def __init__(self, count: int = 2) -> None:
        mark = uuid.uuid4().hex[:5]
        self.names = [f"ps{mark}-{index}" for index in range(count)]
        self.addresses = [f"10.77.0.{index + 1}" for index in range(count)]
        # Without a namespace of its own it could meet a network of this machine.
        self._switch = f"ps{mark}-sw"

    def __enter__(self) -> Hosts:
        try:
            ip("netns", "add", self._switch)
            ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self._switch, "link", "set", "bridge", "up")
            for index, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
                ip("netns", "add", name)
                port = f"port{index}"
                ip("-n", name, "link", "add", "eth7", "type", "veth", "peer", "name", port, "netns", self._switch)
                ip("-n", self._switch, "link", "set", port, "master", "bridge")
                ip("-n", self._switch, "link", "set", port, "up")
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth7")
                ip("-n", name, "link", "set", "eth7", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in (*self.names, self._switch):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)

    @contextlib.contextmanager
    def slow(self, index: int, rate: str) -> Iterator[None]:
        """Within, a host sends no faster ("20mbit")."""
        shaper = ("root", "tbf", "rate", rate, "burst", "64kbit", "latency", "400ms")
        run("tc", "-n", self.names[index], "qdisc", "add", "dev", "eth7", *shaper)
        try:
            yield
        finally:
            run("tc", "-n", self.names[index], "qdisc", "del", "dev", "eth7", "root")

    @contextlib.contextmanager
    def cut(self, index: int, other: int) -> Iterator[None]:
        """Within, what a host sends to another one is lost without a word, as behind a firewall."""
        nobody = ("lladdr", "02:00:00:00:00:99", "nud", "permanent")
        ip("-n", self.names[index], "neigh", "replace", self.addresses[other], "dev", "eth7", *nobody)
        try:
            yield
        finally:
            ip("-n", self.names[index], "neigh", "del", self.addresses[other], "dev", "eth7")

    def start(
        self, index: int, command: Sequence[str], *, folder: Path, log: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Starts a command on a host, in `folder`, with stdout and stderr in `log`."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
        name = f"host-{index}"
        inside = ["unshare", "--uts", "bash", "-c", f'hostname {name} && exec "$@"', "bash", *command]
        with log.open("wb") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[index], *inside],
                cwd=folder,
                env={**inherited, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def ip(*arguments: str) -> None:
    """`ip …`."""
    run("ip", *arguments)


def run(*command: str) -> None:
    """A command that must succeed."""
    subprocess.run(command, check=True, capture_output=True, timeout=30)
