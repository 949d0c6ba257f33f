"""DeepSpeed JSON as a layer: what is translated, what stays literal, what is refused and why."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from progscale.config import deepspeed_keys as keys
from progscale.config import dump_config, load_config
from progscale.errors import ConfigError

ZERO2 = {"zero_optimization": {"stage": 2}}

# The shape of the files in transformers' own documentation.
AUTO: dict[str, Any] = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def changed(**entries: Any) -> dict[str, Any]:
    return {**copy.deepcopy(ZERO2), **entries}


def zero(**entries: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **entries}}


def test_bare_file_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ZERO2))
    assert load_config([path]).engine.deepspeed == ZERO2


def test_auto_file() -> None:
    config = load_config([AUTO])
    plain = load_config()
    assert config.optimizer.lr == plain.optimizer.lr
    assert config.optimizer.lr_schedule == "constant"
    assert config.train == plain.train
    assert config.engine.deepspeed == {
        "fp16": {name: value for name, value in AUTO["fp16"].items() if name != "enabled"},
        "zero_optimization": AUTO["zero_optimization"],
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }


@pytest.mark.parametrize("nested", [False, True])
def test_translation(nested: bool) -> None:
    block = changed(
        optimizer={"type": "Adam", "params": {"lr": 3e-5, "betas": [0.8, 0.99], "eps": 1e-7, "weight_decay": 0.2}},
        scheduler={"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 7}},
        bf16={"enabled": True},
        fp16={"enabled": False},
        gradient_clipping=0.5,
        train_batch_size=64,
        train_micro_batch_size_per_gpu=8,
        gradient_accumulation_steps=4,
    )
    config = load_config([{"engine": {"deepspeed": block}} if nested else block])
    optimizer, train = config.optimizer, config.train
    assert (optimizer.name, optimizer.lr, optimizer.betas) == ("adamw", 3e-5, [0.8, 0.99])
    assert (optimizer.eps, optimizer.weight_decay) == (1e-7, 0.2)
    assert (optimizer.lr_schedule, optimizer.warmup_steps) == ("linear", 7)
    assert (train.precision, train.max_grad_norm) == ("bf16_params", 0.5)
    assert (train.global_batch_size, train.micro_batch_size, train.gradient_accumulation_steps) == (64, 8, 4)
    assert config.engine.deepspeed == ZERO2
    assert load_config([dump_config(config)]) == config


def test_lion() -> None:
    """With betas of its own, where the file gives none; it has no eps."""
    optimizer = load_config([changed(optimizer={"type": "lion", "params": {"lr": 3e-6, "weight_decay": 0.1}})]).optimizer
    assert (optimizer.name, optimizer.lr, optimizer.betas, optimizer.weight_decay) == ("lion", 3e-6, [0.9, 0.99], 0.1)


def test_cosine_fp16_and_no_clipping() -> None:
    config = load_config(
        [
            changed(
                scheduler={"type": "WarmupCosineLR", "params": {"warmup_num_steps": 3, "cos_min_ratio": 0.1}},
                fp16={"enabled": True, "initial_scale_power": 12},
                gradient_clipping=0,
            )
        ]
    )
    assert (config.optimizer.lr_schedule, config.optimizer.final_lr_fraction) == ("cosine", 0.1)
    assert config.train.precision == "fp16"
    assert config.train.max_grad_norm is None
    assert config.engine.deepspeed == {**ZERO2, "fp16": {"initial_scale_power": 12}}
    assert load_config([dump_config(config)]) == config


REFUSED = [
    ({"zero_optimisation": {"stage": 2}, "train_batch_size": 8}, r"zero_optimisation: is not a key .*'zero_optimization'"),
    ({"steps_per_print": 1}, r"engine\.deepspeed\.zero_optimization: missing; give a stage of 1, 2 or 3"),
    ({"zero_optimization": {"stage": 7}}, r"zero_optimization\.stage: 7 \(from a mapping\) must be 1, 2 or 3"),
    ({"zero_optimization": {"stage": 0}}, r"stage: 0 .*must be 1, 2 or 3: without ZeRO .*engine\.name = ddp"),
    ({"zero_optimization": {"stage": "2"}}, r"stage: \"2\" .*must be 1, 2 or 3"),
    ({"zero_optimization": {"stage": True}}, r"stage: true .*must be 1, 2 or 3"),
    ({"zero_optimization": {"stage": "auto"}}, r"stage: \"auto\" .*must be 1, 2 or 3"),
    ({"zero_optimization": {}}, r"stage: missing"),
    ({"zero_optimization": True}, r"zero_optimization: true .*must be an object"),
    (zero(reduce_bucketsize=1), r"reduce_bucketsize: is not a key of DeepSpeed's ZeRO.*'reduce_bucket_size'"),
    (zero(cpu_offload=True), r"cpu_offload: not supported .*use offload_optimizer"),
    (zero(zenflow={}), r"zenflow: not supported"),
    (zero(allgather_bucket_size="auto"), r"allgather_bucket_size: \"auto\" .*is not filled by anything"),
    (zero(overlap_comm="yes"), r'overlap_comm: "yes" .*must be true or false'),
    (zero(reduce_bucket_size="big"), r'reduce_bucket_size: "big" .*must be a number of elements'),
    (zero(parameter_alignment=16), r"parameter_alignment: 16 .*must be true or false"),
    (zero(compute_grad_norm=False), r"compute_grad_norm: false .*every step's gradient is checked"),
    (zero() | {"wandb": {"enabled": True}}, r"wandb: not supported .*begin anew at each stage"),
    (zero(reduce_bucket_size=None), r"reduce_bucket_size: null .*must be a number of elements"),
    (zero() | {"data_types": {"param_dtype": "bf16"}}, r'param_dtype: "bf16" .*use train.precision'),
    (zero() | {"prescale_gradients": True}, r"prescale_gradients: true .*is not supported"),
    (zero() | {"gradient_predivide_factor": 2}, r"gradient_predivide_factor: 2 .*is not supported"),
    (zero() | {"zero_force_ds_cpu_optimizer": True}, r"zero_force_ds_cpu_optimizer: true .*torch's or bitsandbytes'"),
    (zero() | {"zero_allow_untested_optimizer": False}, r"zero_allow_untested_optimizer: false .*torch's or bitsandbytes'"),
    (zero(offload_param={"device": "cpu"}), r"offload_param: needs ZeRO stage 3, not 2"),
    (zero() | {"aio": {"block_size": 1048576}}, r"aio: .*the kernel reads"),
    (zero(offload_param={"device": "nvme", "nvme_path": "/scratch"}), r"offload_param: needs ZeRO stage 3, not 2"),
    (zero(offload_param={"device": "disk"}), r'"disk" .*must be "cpu", "nvme" or "none"'),
    (zero(offload_optimizer={"device": "nvme"}), r"offload_optimizer\.device: \"nvme\" .*use \"cpu\""),
    (zero(offload_optimizer={"device": "gpu"}), r"\"gpu\" .*must be \"cpu\" or \"none\""),
    (zero(offload_optimizer={"devise": "cpu"}), r"devise: is not a key .*'device'"),
    (zero(offload_optimizer="cpu"), r"offload_optimizer: \"cpu\" .*must be an object"),
    (
        {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
        r"grad_accum_dtype: fp32 at ZeRO stage 1 .*BF16_Optimizer",
    ),
    (changed(data_types={"grad_acum_dtype": "fp32"}), r"grad_acum_dtype: is not a key .*'grad_accum_dtype'"),
    (changed(data_types=3), r"data_types: 3 .*must be an object"),
    (changed(gradient_allreduce_op="sum"), r"gradient_allreduce_op: \"sum\" .*scale the gradient"),
    (changed(communication_data_type="auto"), r"communication_data_type: \"auto\" .*not filled"),
    (changed(optimizer={"type": "OneBitAdam"}), r"optimizer\.type: \"OneBitAdam\" .*allowed: Adam and AdamW"),
    (changed(optimizer={"type": "Muon"}), r"optimizer\.type: \"Muon\""),
    (changed(optimizer={"type": "AdamW8bit"}), r"optimizer\.type: \"AdamW8bit\" .*others, optimizer\.name has"),
    (
        changed(optimizer={"type": "Lion", "params": {"eps": 1e-6}}),
        r"params\.eps: not supported .*allowed: lr, betas, weight_decay",
    ),
    (changed(optimizer={"type": "Adam", "params": {"adam_w_mode": False}}), r"params\.adam_w_mode: not supported"),
    (changed(optimizer={"type": ["Adam"]}), r"optimizer\.type"),
    (changed(optimizer={"params": 3}), r"optimizer\.params: 3 .*must be an object"),
    (changed(optimizer={"params": {"lr": -1}}), r"optimizer\.lr: -1 \(from optimizer\.params\.lr in a mapping\) must be above 0"),
    (changed(scheduler={"type": "OneCycle"}), r"scheduler\.type: \"OneCycle\" .*allowed: WarmupLR"),
    (changed(scheduler={"type": "WarmupLr"}), r"did you mean 'WarmupLR'"),
    (changed(scheduler={"type": "WarmupLR", "params": {"warmup_type": "log"}}), r"warmup_type: \"log\" .*use \"linear\""),
    (changed(scheduler={"type": "WarmupLR", "params": {"warmup_min_lr": 1e-6}}), r"warmup_min_lr: 1e-06 .*starts at 0"),
    (
        changed(scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": 100}}),
        r"total_num_steps: 100 .*the curve ends with the run",
    ),
    (changed(scheduler={"type": "WarmupLR", "params": {"cos_min_ratio": 1}}), r"cos_min_ratio: not supported"),
    (changed(scheduler=3), r"scheduler: 3 .*must be an object"),
    (changed(bf16={"enabled": True}, fp16={"enabled": True}), r"contradicts .*\.enabled, .*keep one"),
    (changed(bf16={"enabled": "yes"}), r"bf16\.enabled: \"yes\" .*must be true, false or \"auto\""),
    (changed(bf16={"bf16_master_weights_and_grads": True}), r"bf16_master_weights_and_grads: not supported"),
    (changed(bf16=True), r"bf16: true .*must be an object"),
    (changed(fp16={"initial_scale": 1}), r"fp16\.initial_scale: unknown key .*'initial_scale_power'"),
    (changed(fp16={"fp16_master_weights_and_grads": True}), r"master weights are always fp32"),
    (changed(train_batch_size=0), r"train\.global_batch_size: 0 \(from train_batch_size in a mapping\) must be at least 1"),
    (changed(train_batch_size=2.5), r"train\.global_batch_size: 2\.5"),
    (changed(gradient_clipping="1"), r"train\.max_grad_norm: \"1\" \(from gradient_clipping in a mapping\)"),
    (
        changed(train_batch_size=32, train_micro_batch_size_per_gpu=5, gradient_accumulation_steps=2),
        r"global_batch_size: 32 \(from train_batch_size .*is not a multiple of train\.micro_batch_size = 5",
    ),
    (changed(train_micro_batch_size_per_gpu=4), r"train\.global_batch_size: missing beside train\.micro_batch_size = 4"),
    (
        changed(optimizer={"params": {"lr": 1e-4}}, scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 2e-4}}),
        r"warmup_max_lr: 0\.0002 contradicts optimizer\.params\.lr, 0\.0001",
    ),
]


@pytest.mark.parametrize(("layer", "message"), REFUSED)
def test_refused(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([layer])


@pytest.mark.parametrize("key", sorted(keys.REFUSED_KEYS))
def test_refused_with_its_reason(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.deepspeed\.{key}: not supported \(from a mapping\): ") as caught:
        load_config([changed(**{key: {"enabled": "auto"}})])
    assert keys.REFUSED_KEYS[key] in str(caught.value)
    assert len(caught.value.faults) == 1


def test_both_precisions_contradict_also_with_ours() -> None:
    with pytest.raises(
        ConfigError, match=r'precision: "bf16" \(from a mapping\) contradicts "bf16_params" \(from .*bf16\.enabled'
    ):
        load_config([{"train": {"precision": "bf16"}, "engine": {"deepspeed": changed(bf16={"enabled": True})}}])
    with pytest.raises(ConfigError, match=r"is switched off by fp16\.enabled in a mapping"):
        load_config([changed(fp16={"enabled": False}), {"train": {"precision": "fp16"}}])


def test_mixture_of_ours_and_theirs() -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization: a DeepSpeed key beside the progscale section 'train'") as caught:
        load_config([{"train": {"epochs": 3}, "zero_optimization": {"stage": 2}, "bf16": {}}])
    assert "put it under engine.deepspeed" in str(caught.value)
    with pytest.raises(ConfigError, match="beside the progscale section 'optimizer'"):
        load_config([{"optimizer": {"lr": 1}, "zero_optimization": {"stage": 2}}])
    with pytest.raises(ConfigError, match="optimizer: a DeepSpeed key beside"):
        load_config([{"train": {}, "optimizer": {"type": "Adam"}}])


@pytest.mark.parametrize("order", [1, -1])
def test_files_that_contradict(order: int) -> None:
    layers = [{"optimizer": {"lr": 2e-5}}, changed(optimizer={"type": "AdamW", "params": {"lr": 3e-5}})]
    with pytest.raises(ConfigError, match=r"optimizer\.lr: .* contradicts .*keep one, or choose with --set") as caught:
        load_config(layers[::order])
    assert "2e-05" in str(caught.value)
    assert "3e-05 (from optimizer.params.lr in a mapping)" in str(caught.value)
    # The command line decides without a word.
    assert load_config(layers[::order], ["optimizer.lr=4e-5"]).optimizer.lr == 4e-5
    # Equal values do not contradict.
    layers[0]["optimizer"]["lr"] = 3e-5
    assert load_config(layers[::order]).optimizer.lr == 3e-5


def test_same_file_contradicts_itself() -> None:
    block = changed(gradient_clipping=2.0)
    with pytest.raises(ConfigError, match=r"max_grad_norm: 1\.0 .* contradicts 2\.0 \(from engine\.deepspeed\.gradient_clipping"):
        load_config([{"train": {"max_grad_norm": 1.0}, "engine": {"deepspeed": block}}])


def test_later_deepspeed_files_and_sets_win() -> None:
    assert load_config([changed(train_batch_size=16), changed(train_batch_size=64)]).train.global_batch_size == 64
    assert load_config([changed(bf16={"enabled": True}), changed(fp16={"enabled": True})]).train.precision == "fp16"
    assert load_config([changed(bf16={"enabled": True}), {"bf16": {"enabled": False}}]).train.precision == "fp32"
    config = load_config([ZERO2], ["engine.deepspeed.zero_optimization.stage=3", "engine.deepspeed.bf16.enabled=true"])
    assert config.engine.deepspeed == {"zero_optimization": {"stage": 3}}
    assert config.train.precision == "bf16_params"
    config = load_config([{"train": {"precision": "fp16"}}, ZERO2], ["engine.deepspeed.bf16.enabled=true"])
    assert config.train.precision == "bf16_params"
    assert load_config([ZERO2], ["engine.deepspeed=null"]).engine.deepspeed is None


def test_keys_match_the_installed_deepspeed() -> None:
    runtime = pytest.importorskip("deepspeed.runtime.config")
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    looked_up: set[str] = set()

    class Recording(dict):
        def __contains__(self, key):
            looked_up.add(key)
            return super().__contains__(key)

        def get(self, key, default=None):
            looked_up.add(key)
            return super().get(key, default)

    runtime.DeepSpeedConfig(Recording(train_batch_size=1, zero_optimization={"stage": 2}))
    assert looked_up <= keys.TOP_LEVEL_KEYS

    def names(model):
        return {field.alias or name for name, field in model.model_fields.items()}

    # Older releases have fewer; a new one must be looked at.
    assert names(DeepSpeedZeroConfig) <= keys.ZERO_KEYS | set(keys.REFUSED_ZERO_KEYS)
    assert names(DeepSpeedZeroOffloadOptimizerConfig) <= keys.OFFLOAD_OPTIMIZER_KEYS
    assert names(DeepSpeedZeroOffloadParamConfig) <= keys.OFFLOAD_PARAM_KEYS
    assert names(DeepSpeedFP16Config) <= keys.FP16_KEYS
    assert not keys.LITERAL_KEYS & set(keys.REFUSED_KEYS)
    assert not keys.ZERO_KEYS & set(keys.REFUSED_ZERO_KEYS)


@pytest.mark.parametrize(
    ("zero", "key"),
    [
        ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights: true.*multiples of 8 values"),
        ({"stage": 3, "zero_quantized_gradients": True}, "zero_quantized_gradients: true.*as if they were fp16"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, "nontrainable_weights: true.*lose bits for good"),
        (
            {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            "offload_optimizer.ratio: 0.5.*no stage switch was shown to be exact",
        ),
        ({"stage": 3, "mics_shard_size": 2}, "mics_shard_size: not supported.*removed it"),
        ({"stage": 3, "zero_hpz_partition_size": 0}, "zero_hpz_partition_size: 0.*1 or more, that divides all ranks"),
        ({"stage": 3, "zero_hpz_partition_size": True}, "zero_hpz_partition_size: true.*must be a number of ranks"),
        ({"stage": 3, "zero_hpz_partition_size": "auto"}, 'zero_hpz_partition_size: "auto".*is not filled'),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "nvme_path: missing.*a folder on a local disk"),
        ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": 3}}, "nvme_path: 3.*must name a folder"),
        (
            {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/scratch", "buffer_count": 5}},
            "buffer_count: 5.*has no effect.*remove it",
        ),
        ({"stage": 2, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size: 2.*needs ZeRO stage 3, not 2"),
    ],
)
def test_what_is_not_shown_to_be_exact_is_refused(zero: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load_config([{"engine": {"deepspeed": {"zero_optimization": zero}}}])


def test_parameters_on_nvme_are_the_same_in_all_stages() -> None:
    block = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/scratch"}}}
    assert load_config([block]).engine.deepspeed == block
    by_stage = {"2-": {"zero_optimization": {"offload_param": {"device": "cpu"}}}}
    with pytest.raises(ConfigError, match=r"by_stage\.2-\.zero_optimization\.offload_param: is one for all stages"):
        load_config([{"engine": {"deepspeed": block, "by_stage": by_stage}}])


def test_second_copies_are_handed_on_and_the_same_in_all_stages() -> None:
    block = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}
    assert load_config([block]).engine.deepspeed == block
    by_stage = {"2-": {"zero_optimization": {"zero_hpz_partition_size": 2}}}
    with pytest.raises(ConfigError, match=r"by_stage\.2-\.zero_optimization\.zero_hpz_partition_size: is one for all stages"):
        load_config([{"engine": {"deepspeed": block, "by_stage": by_stage}}])
