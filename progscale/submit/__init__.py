"""`progscale submit`: launch/slurm/train.sbatch filled in for a config, and SLURM asked before the job is queued. No torch."""
