"""Runs on several nodes: under a real SLURM, and on hosts with addresses of their own."""
