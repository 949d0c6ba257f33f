"""Run folders → pages, tables and comparisons. Reads files alone: no torch, no model."""

from progscale.report.record import RunRecord, read_run
from progscale.report.run_page import FILE, render_run, write_report

__all__ = ["FILE", "RunRecord", "read_run", "render_run", "write_report"]
