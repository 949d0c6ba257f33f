"""DeepSpeed's own keys (0.19), and which of them cannot be used here. DeepSpeed takes unknown top-level keys silently.

A test compares the lists with the installed release.
"""

from __future__ import annotations

BATCH_KEYS = {
    "train_batch_size": ("train", "global_batch_size"),
    "train_micro_batch_size_per_gpu": ("train", "micro_batch_size"),
    "gradient_accumulation_steps": ("train", "gradient_accumulation_steps"),
}

# Read from the file into our sections; nothing of them reaches DeepSpeed, except fp16's loss scale.
TRANSLATED_KEYS = frozenset({*BATCH_KEYS, "gradient_clipping", "optimizer", "scheduler", "fp16", "bf16", "bfloat16"})

# Handed on as they are.
LITERAL_KEYS = frozenset(
    {
        "comms_logger",
        "communication_data_type",
        "data_types",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "gradient_allreduce_op",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "seq_parallel_communication_data_type",
        "steps_per_print",
        "timers",
        "vocabulary_size",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)

_GONE = "DeepSpeed itself has removed it"
_DATA = "progscale forms the batches itself, the same at any number of processes"
_CHECKPOINT = "progscale writes its own checkpoints"
_PARALLEL = "only data parallelism with ZeRO is supported"

_MONITOR = "DeepSpeed's monitors begin anew at each stage; a run's metrics.jsonl has the whole of it"

NO_NVME_OPTIMIZER = "between steps its tensors are empty, so that a stage switch or a checkpoint finds no state"

# Of `offload_param`.
NOT_BESIDE_NVME = ("buffer_count", "buffer_size", "max_in_cpu")
NVME_IS_MAPPED = "with device nvme what is frozen lies in mapped files, which the kernel reads, and what is live in CPU memory"

REFUSED_KEYS = {
    "activation_checkpointing": "it has no effect on transformers models; use train.gradient_checkpointing",
    "aio": "DeepSpeed's own reads and writes of files; offload_param to nvme maps its files, which the kernel reads",
    "amp": f"{_GONE}; use train.precision",
    "autotuning": "it starts runs of its own; choose the batch sizes in the train section",
    "check_overflow": "the engine checks every gradient before the step; see train.nonfinite",
    "checkpoint": _CHECKPOINT,
    "comet": _MONITOR,
    "compile": "a compiled engine cannot be rebuilt at a stage switch; train.compile compiles the blocks anew in each stage",
    "compression_training": _GONE,
    "csv_monitor": _MONITOR,
    "curriculum_learning": f"{_GONE}; {_DATA}",
    "data_efficiency": _DATA,
    "dataloader_drop_last": _DATA,
    "datastates_ckpt": _CHECKPOINT,
    "eigenvalue": _GONE,
    "elasticity": f"{_GONE}; {_DATA}",
    "expert_parallel": _PARALLEL,
    "graph_harvesting": _GONE,
    "hybrid_engine": "it is made for generation, not for fine-tuning an encoder",
    "managed_gradient_accumulation": "progscale sets the accumulation boundary itself",
    "nebula": f"{_GONE}; {_CHECKPOINT}",
    "pipeline": _PARALLEL,
    "progressive_layer_drop": _GONE,
    "quantize_training": _GONE,
    "sparse_attention": _GONE,
    "sparse_gradients": _GONE,
    "tensor_parallel": _PARALLEL,
    "tensorboard": _MONITOR,
    "torch_autocast": "use train.precision = bf16",
    "use_data_before_expert_parallelism": _PARALLEL,
    "wandb": _MONITOR,
    "weight_quantization": "it trains quantised weights, which no stage could carry over exactly",
    "zenflow": "its delayed updates are not those of plain fine-tuning",
}

TOP_LEVEL_KEYS = frozenset(TRANSLATED_KEYS | LITERAL_KEYS | set(REFUSED_KEYS))

ZERO_BOOLEANS = frozenset(
    {
        "allgather_partitions",
        "compute_grad_norm",
        "contiguous_gradients",
        "enable_sanity_checks",
        "ignore_unused_parameters",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "overlap_comm",
        "override_module_apply",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "reduce_scatter",
        "round_robin_gradients",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
    }
)

ZERO_NUMBERS = frozenset(
    {
        "allgather_bucket_size",
        "reduce_bucket_size",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
    }
)

ZERO_KEYS = (
    ZERO_BOOLEANS
    | ZERO_NUMBERS
    | {
        "leaf_module",
        "offload_optimizer",
        "offload_param",
        "stage",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    }
)

REFUSED_ZERO_KEYS = {
    "cpu_offload": "deprecated; use offload_optimizer",
    "cpu_offload_param": "deprecated; use offload_param",
    "cpu_offload_use_pin_memory": "deprecated; use pin_memory in offload_optimizer or offload_param",
    "elastic_checkpoint": _CHECKPOINT,
    "mics_hierarchical_params_gather": _GONE,
    "mics_shard_size": _GONE,
    "save_muon_momentum_buffer_in_memory": "Muon is not supported",
    "stage3_gather_fp16_weights_on_model_save": "deprecated; use stage3_gather_16bit_weights_on_model_save",
    "zenflow": "its delayed updates are not those of plain fine-tuning",
    "zeropp_loco_param": _GONE,
}

_UNPROVEN = "no stage switch was shown to be exact with it"

# Refused unless they have the value that a run has anyway: path → (that value, why).
FIXED: dict[tuple[str, ...], tuple[object, str]] = {
    ("data_types", "param_dtype"): (None, "use train.precision"),
    ("fp16", "fp16_master_weights_and_grads"): (False, "master weights are always fp32"),
    ("gradient_allreduce_op",): ("mean", "another would scale the gradient by the number of ranks"),
    ("gradient_predivide_factor",): (1.0, "ZeRO has no such scaling"),
    ("prescale_gradients",): (False, "ZeRO has no such scaling"),
    ("zero_optimization", "compute_grad_norm"): (True, "every step's gradient is checked before it changes a weight"),
    ("zero_optimization", "offload_optimizer", "ratio"): (1.0, _UNPROVEN),
    ("zero_optimization", "offload_optimizer", "super_offload"): (False, _UNPROVEN),
    ("zero_optimization", "zero_quantized_gradients"): (
        False,
        "its kernel, for CUDA alone, reads fp32 and bf16 gradients as if they were fp16, and within a node nothing is quantised",
    ),
    ("zero_optimization", "zero_quantized_nontrainable_weights"): (
        False,
        "frozen weights would lose bits for good, and stay 8-bit codes in a stage that thaws them; its kernel is for CUDA alone",
    ),
    ("zero_optimization", "zero_quantized_weights"): (
        False,
        "its kernel, for CUDA alone, takes multiples of 8 values, which a head of a few labels has not; zero_hpz_partition_size "
        "loses nothing",
    ),
    ("zero_allow_untested_optimizer",): (True, "the optimizer is torch's or bitsandbytes', in DeepSpeed's words an untested one"),
    ("zero_force_ds_cpu_optimizer",): (False, "the optimizer is torch's or bitsandbytes', torch's fused on a CPU too"),
}

OFFLOAD_OPTIMIZER_KEYS = frozenset(
    {
        "buffer_count",
        "cpuadam_cores_perc",
        "device",
        "fast_init",
        "nvme_path",
        "pin_memory",
        "pipeline_read",
        "pipeline_write",
        "ratio",
        "super_offload",
    }
)
OFFLOAD_PARAM_KEYS = frozenset({"buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory"})

FP16_KEYS = frozenset(
    {
        "auto_cast",
        "consecutive_hysteresis",
        "enabled",
        "fp16_master_weights_and_grads",
        "hysteresis",
        "initial_scale_power",
        "loss_scale",
        "loss_scale_window",
        "min_loss_scale",
    }
)
DATA_TYPES_KEYS = frozenset({"buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules", "param_dtype"})

# Where "auto" may be left: the engine fills these from the model's hidden size; the last is a value of DeepSpeed's own.
AUTO_PATHS = frozenset(
    {
        ("zero_optimization", "reduce_bucket_size"),
        ("zero_optimization", "stage3_prefetch_bucket_size"),
        ("zero_optimization", "stage3_param_persistence_threshold"),
        ("data_types", "keep_in_fp32_modules"),
    }
)
