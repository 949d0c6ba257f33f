"""progscale: exact progressive fine-tuning of Transformer encoders."""

__version__ = "0.1.0"
