"""Optimizers by name, and what the engines must know of the state that each keeps."""

from progscale.optimizers.adamw import AdamW
from progscale.optimizers.base import BLOCK, OPTIMIZERS, Blockwise, Optimizer, Request, param_groups, register

__all__ = ["BLOCK", "OPTIMIZERS", "AdamW", "Blockwise", "Optimizer", "Request", "param_groups", "register"]
