"""What trains a stage: plain torch, DDP, DeepSpeed ZeRO. Accelerate and DeepSpeed are imported nowhere else."""
