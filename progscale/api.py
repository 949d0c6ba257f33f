"""A run as a function: what `progscale train` does, for a program or a notebook."""

from __future__ import annotations

from typing import Any

from progscale.config import Config
from progscale.inputs import Permissions
from progscale.run import run_session
from progscale.session import Session
from progscale.setup import prepare


def train(
    config: Config, *, resume: str = "never", allow_pickle: bool = False, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Trains a run in this process; under a launcher every rank calls it.

    Args:
        config: of the run, from `load_config` or built by hand.
        resume: "never", "auto", "must", or the path of a checkpoint or of a run's folder.
        allow_pickle: accept model weights that are no safetensors (they can run code).
        trust_remote_code: run Python code from the model's repository.

    Returns:
        What `summary.json` of the run folder holds: `metrics`, `updated_parameters`, `stages`, …

    Raises:
        UserError: config, data, schedule, model or checkpoint do not fit; nothing has been trained.
        NonFiniteError: a loss or gradient was not finite.
        AuditError: a frozen tensor changed its bits.
    """
    session = prepare(config, Permissions(allow_pickle, trust_remote_code), resume=resume)
    assert isinstance(session, Session)
    return run_session(session)
