"""A run as a program: signals, the watch over the other ranks, and how it ends, around `prepare` and `train`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from progscale.config import Config
from progscale.errors import AuditError, NonFiniteError, PreemptedError, ProgscaleError
from progscale.loop import train
from progscale.session import Session
from progscale.setup import Permissions, prepare
from progscale.signals import Signals, before_training
from progscale.trackers import mark_preempted
from progscale.watch import Watch

# The launcher tells one rank after the other: who leaves before the last is told looks to it like a crash.
TOGETHER_SECONDS = 1.0


def run(
    config: Config, *, resume: str = "never", dry_run: bool = False, allow_pickle: bool = False, trust_remote_code: bool = False
) -> int:
    """Prepares and trains, in a process that may be told to stop; returns the exit code 0.

    Raises:
        ProgscaleError: on every rank, with the exit code.
    """
    permissions = Permissions(allow_pickle, trust_remote_code)
    if dry_run:
        prepare(config, permissions, dry_run=True)
        return 0
    folder = Path(config.run.output_dir) / config.run_name
    signals = Signals()
    try:
        signals.install(lambda: mark_preempted(folder, None, signals.received))
        session = prepare(config, permissions, resume=resume, signals=signals)
        assert isinstance(session, Session)
        # From here on there is something to save: a signal is a flag that the ranks tell each other.
        signals.training = True
        run_session(session)
    except PreemptedError as error:
        if not signals.training:
            leave_at_once(signals, error)
        raise
    except Exception as error:
        if signals.received is None or signals.training:
            raise
        # What became of the interruption on its way: libraries wrap it, and a collective fails when a peer was quicker to leave.
        told = PreemptedError(before_training(signals.received))
        leave_at_once(signals, told)
        raise told from error
    finally:
        signals.uninstall()
    return 0


def run_session(session: Session) -> None:
    """Trains and closes the session, whatever happens."""
    engine, signals = session.engine, session.signals
    session.watch = Watch(
        engine.rank, engine.world_size, session.config.engine.timeout_seconds, stopping=lambda: signals.received is not None
    )
    session.watch.start()
    try:
        train(session)
    except PreemptedError:
        if session.folder is not None:
            mark_preempted(session.folder.path, session.steps_done, signals.received)
        # Whoever leaves first has its peers killed by the launcher: all are done here.
        engine.barrier()
        session.close()
        raise
    except BaseException as error:
        session.console.end()  # a live progress bar holds stderr
        if isinstance(error, NonFiniteError | AuditError):
            session.publish(wait=True)  # of a step before: all ranks are here, and it is whole
        # Every rank meets an error of ours; any other may have met this rank alone, and the others wait in a collective.
        if isinstance(error, ProgscaleError) or engine.world_size == 1:
            session.close()
        else:
            tell_the_others(session.watch, error)
        raise
    finally:
        session.watch.stop()
    session.close()


def tell_the_others(watch: Watch, error: BaseException) -> None:
    """Says which rank is gone, where that is why a collective failed here, and lets the others know."""
    gone = watch.gone()
    if gone:
        ranks = ", ".join(map(str, gone))
        print(f"progscale: [rank {watch.rank}] the run ends: rank {ranks} is gone (killed, or out of memory)", file=sys.stderr)
    watch.failed(f"rank {gone[0]} is gone" if gone else f"{type(error).__name__}: {error}")


def leave_at_once(signals: Signals, error: PreemptedError) -> None:
    """Ends a process that was told to stop before training; of several, the others may wait for it in a collective."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print(f"progscale: {error}", file=sys.stderr, flush=True)
        time.sleep(TOGETHER_SECONDS)
        signals.leave()
    signals.mark()
