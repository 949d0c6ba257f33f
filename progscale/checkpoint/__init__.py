"""Checkpoints that load under any engine and world size: safetensors by parameter name and flat range, and a manifest."""
