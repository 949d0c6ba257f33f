"""What a stage costs: arithmetic, bytes of state, bytes that wait for the backward pass. Pure functions of sizes and shapes."""

from progscale.cost.cluster import GPUS, Cluster, Gpu, StepTime, Traffic, step_time
from progscale.cost.state import StateBytes, state_bytes
from progscale.cost.work import Flops, Work, work_of

__all__ = ["GPUS", "Cluster", "Flops", "Gpu", "StateBytes", "StepTime", "Traffic", "Work", "state_bytes", "step_time", "work_of"]
