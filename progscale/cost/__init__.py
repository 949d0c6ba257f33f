"""What a stage costs: arithmetic, bytes of state, bytes that wait for the backward pass. Pure functions of sizes and shapes."""

from progscale.cost.state import StateBytes, state_bytes
from progscale.cost.work import Flops, Work, work_of

__all__ = ["Flops", "StateBytes", "Work", "state_bytes", "work_of"]
