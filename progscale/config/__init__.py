"""What a run is: validated sections, layers of JSON, `--set` options and DeepSpeed files. Imports no torch."""

from progscale.config.deepspeed import translate
from progscale.config.describe import Option, config_hash, decisive_values, describe_schema, is_decisive, micro_batch_size
from progscale.config.layers import DEMO_DEFAULTS, dump_config, load_config
from progscale.config.read import format_set, parse_set
from progscale.config.schema import (
    Cache,
    Checkpoint,
    Config,
    Engine,
    Method,
    Model,
    Optimizer,
    Run,
    Schedule,
    Section,
    Task,
    Trackers,
    Train,
)

__all__ = [
    "DEMO_DEFAULTS",
    "Cache",
    "Checkpoint",
    "Config",
    "Engine",
    "Method",
    "Model",
    "Optimizer",
    "Option",
    "Run",
    "Schedule",
    "Section",
    "Task",
    "Trackers",
    "Train",
    "config_hash",
    "decisive_values",
    "describe_schema",
    "dump_config",
    "format_set",
    "is_decisive",
    "load_config",
    "micro_batch_size",
    "parse_set",
    "translate",
]
