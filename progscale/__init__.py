"""progscale: exact progressive fine-tuning of Transformer encoders."""
