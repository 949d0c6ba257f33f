"""A run as a program: signals, the watch over the other ranks, and how it ends, around `prepare` and `train`."""

from __future__ import annotations

import sys
from typing import Any

from progscale.config import Config
from progscale.errors import AuditError, NonFiniteError, PreemptedError, ProgscaleError, WriteError
from progscale.inputs import NO_PERMISSIONS, Permissions
from progscale.loop import train
from progscale.session import Session
from progscale.setup import prepare
from progscale.signals import Signals, mark_preempted
from progscale.watch import Watch


def run(config: Config, signals: Signals, *, resume: str = "never", permissions: Permissions = NO_PERMISSIONS) -> int:
    """Prepares and trains, in a process that may be told to stop; returns the exit code 0.

    Args:
        config: of the run.
        signals: listening.
        resume: as for `prepare`.
        permissions: of the command line.

    Raises:
        ProgscaleError: on every rank, with the exit code.
    """
    session = prepare(config, permissions, resume=resume, signals=signals)
    assert isinstance(session, Session)
    # From here on there is something to save: a signal is a flag that the ranks tell each other.
    signals.training = True
    run_session(session)
    return 0


def run_session(session: Session) -> dict[str, Any]:
    """Trains and closes the session, whatever happens; returns the summary."""
    engine, signals = session.engine, session.signals
    session.watch = Watch(
        engine.rank,
        engine.world_size,
        session.config.engine.timeout_seconds,
        stopping=lambda: session.stopping or signals.received is not None,
    )
    session.watch.start()
    try:
        summary = train(session)
    except PreemptedError:
        if session.folder is not None:
            mark_preempted(session.folder.path, session.steps_done, signals.received)
        # Whoever leaves first has its peers killed by the launcher: all are done here.
        engine.barrier()
        session.close()
        raise
    except BaseException as error:
        session.console.end()  # a live progress bar holds stderr
        if isinstance(error, NonFiniteError | AuditError | WriteError):
            # All ranks are here, and what is on its way is of a step before, and whole.
            session.finish_saving(ends_anyway=True)
        # Every rank meets an error of ours; any other may have met this rank alone, and the others wait in a collective.
        if isinstance(error, ProgscaleError) or engine.world_size == 1:
            session.close()
        else:
            tell_the_others(session.watch, error)
        raise
    finally:
        session.watch.stop()
    session.close()
    return summary


def tell_the_others(watch: Watch, error: BaseException) -> None:
    """Says which rank is gone, where that is why a collective failed here, and lets the others know."""
    gone = watch.gone()
    if gone:
        ranks = ", ".join(map(str, gone))
        print(f"progscale: [rank {watch.rank}] the run ends: rank {ranks} is gone (killed, or out of memory)", file=sys.stderr)
    watch.failed(f"rank {gone[0]} is gone" if gone else f"{type(error).__name__}: {error}")
