"""Run folders → pages, tables and comparisons. Reads files alone: no torch, no model."""

from progscale.report.compare_page import render_comparison
from progscale.report.comparison import Comparison, compare
from progscale.report.record import RunRecord, find_runs, read_run
from progscale.report.run_page import FILE, render_run, write_report

__all__ = [
    "FILE",
    "Comparison",
    "RunRecord",
    "compare",
    "find_runs",
    "read_run",
    "render_comparison",
    "render_run",
    "write_report",
]
