"""What a stage costs: arithmetic, bytes of state, bytes between ranks. Pure functions of sizes."""

from progscale.cost.state import StateBytes, state_bytes
from progscale.cost.work import Flops, Work, work_of

__all__ = ["Flops", "StateBytes", "Work", "state_bytes", "work_of"]
