"""The command `progscale`. Nothing heavy is imported before a command's own work begins."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence

from progscale import __version__
from progscale.cli import machines, planning, results, suites, training
from progscale.cli.common import quiet_libraries, read_config
from progscale.cli.training import EXAMPLES
from progscale.errors import DataError, LaunchError, ModelError, NetworkError, ProgscaleError, UserError

# How long a rank that leaves the message to another one stays. The launcher ends it as soon as that one has left.
SILENT_SECONDS = 5.0

__all__ = ["SILENT_SECONDS", "build_parser", "main", "quiet_libraries", "read_config"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 for a rank that is gone or files that cannot be written, 2 for a mistake in the
    input, 3 for a run stopped by its own checks, 75 for one that was told to stop and can be resumed.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return int(options.run(options))
    except ProgscaleError as error:
        rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
        # All ranks meet the same mistake, and one of them says it; but files may be missing on one node alone.
        is_own = isinstance(error, LaunchError) or (
            local_rank == "0" and isinstance(error, DataError | ModelError | NetworkError)
        )
        if rank == "0" or is_own:
            print(f"progscale: {'' if rank == '0' else f'[rank {rank}] '}{error}", file=sys.stderr)
        elif isinstance(error, UserError | NetworkError):
            # The launcher kills the others when the first one leaves; that should not be one that has said nothing.
            time.sleep(SILENT_SECONDS)
        if isinstance(error, NetworkError):
            # Leaving the ordinary way would wait for what is stuck.
            sys.stderr.flush()
            os._exit(error.exit_code)
        return error.exit_code
    except Exception:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        # Leaving the ordinary way would wait for the other ranks in NCCL's teardown; the launcher ends them.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="progscale",
        description="Fine-tunes Transformer encoders in stages that train fewer blocks each, exactly, under DDP and ZeRO.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"progscale {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in (training, planning, machines, results, suites):
        module.add_commands(commands)
    return parser
