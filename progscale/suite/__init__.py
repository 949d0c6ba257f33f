"""Many runs from one file: models × tasks × methods × schedules × seeds, what is missing of them, and what they come to."""

from progscale.suite.grid import AXES, Cell, Suite, read_suite
from progscale.suite.local import run_cells
from progscale.suite.state import State, state_of

__all__ = ["AXES", "Cell", "State", "Suite", "read_suite", "run_cells", "state_of"]
