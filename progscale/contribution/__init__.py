"""What each block contributes: the score with embeddings, head and one block trained, block by block (the paper's figure 1)."""

from progscale.contribution.cells import Target, cells_for, targets_of
from progscale.contribution.page import render_contribution
from progscale.contribution.result import Contribution, Proxies, contribution_of, contribution_table

__all__ = [
    "Contribution",
    "Proxies",
    "Target",
    "cells_for",
    "contribution_of",
    "contribution_table",
    "render_contribution",
    "targets_of",
]
