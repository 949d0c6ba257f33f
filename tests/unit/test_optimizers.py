"""Optimizers by name: what they build, what their state is, and which settings they have."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from progscale.config import Config, load_config
from progscale.cost import state_bytes
from progscale.doctor import Elements, state_of
from progscale.errors import ConfigError, Fault, UserError
from progscale.names import name_faults
from progscale.optim import GroupSpec
from progscale.optimizers import OPTIMIZERS, Optimizer, Request, param_groups, register
from progscale.setup import optimizer_of

CPU = torch.device("cpu")
SIZES = {"small": 300, "large": 5000}


def made(name: str) -> Optimizer:
    return OPTIMIZERS.get(name).of(Request())


def stepped(optimizer: Optimizer) -> tuple[torch.optim.Optimizer, dict[str, torch.nn.Parameter]]:
    """After one step on a small tensor and a large one."""
    parameters = {name: torch.nn.Parameter(torch.ones(size)) for name, size in SIZES.items()}
    groups = [GroupSpec("head", 0.1, ("small",)), GroupSpec("blocks 0-1", 0.0, ("large",))]
    built = optimizer.build(parameters, groups)
    assert [group["weight_decay"] for group in built.param_groups] == [0.1, 0.0]
    assert {group["lr"] for group in built.param_groups} == {0.0}
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    built.step()
    return built, parameters


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_what_is_said_of_the_state_is_so(name: str) -> None:
    """Entries, their kinds and sizes are those of the optimizer itself, before and after a step."""
    optimizer = made(name)
    built, parameters = stepped(optimizer)
    for parameter in parameters.values():
        state = built.state[parameter]
        begun = optimizer.start(parameter)
        tables = {entry.table for entry in optimizer.blockwise.values()}
        assert set(begun) == set(state)
        assert set(optimizer.moments) <= set(state)
        for key, value in begun.items():
            assert type(value) is type(state[key]), key
            if isinstance(value, torch.Tensor):
                assert (value.dtype, value.shape, value.device) == (state[key].dtype, state[key].shape, state[key].device), key
                if key in tables:
                    assert torch.equal(value, state[key]), key
        quantized = optimizer.is_blockwise(parameter.numel())
        for key in optimizer.moments:
            assert state[key].dtype == (torch.uint8 if quantized and key in optimizer.blockwise else torch.float32)
        kept = [value for key, value in state.items() if isinstance(value, torch.Tensor) and key not in {*tables, "step"}]
        assert sorted(value.numel() * value.element_size() for value in kept) == sorted(optimizer.moment_bytes(parameter.numel()))
        assert all(float(begun[key].float().abs().sum()) == 0 for key in optimizer.moments)
        assert int(begun["step"]) == 0
        assert int(state["step"]) == 1


def test_bytes_of_an_element() -> None:
    bytes_of = {name: made(name).state_bytes_per_element for name in OPTIMIZERS.names()}
    scale = 4 / 256
    assert bytes_of == {
        **{"adamw": 8, "paged_adamw": 8, "lion": 4},
        **{"adamw_8bit": 2 * (1 + scale), "paged_adamw_8bit": 2 * (1 + scale), "lion_8bit": 1 + scale},
    }
    assert state_bytes(1000, 1000, moment_bytes=2.03125).optimizer == 2032
    assert state_bytes(1000, 1000, precision="bf16", moment_bytes=2.03125).optimizer == 6032


@pytest.mark.parametrize(("name", "bytes_each"), [("adamw", 16), ("adamw_8bit", 10.03125), ("lion", 12), ("lion_8bit", 9.015625)])
def test_the_doctor_counts_it(name: str, bytes_each: float) -> None:
    config = load_config([], [f"optimizer.name={name}"])
    assert state_of(config, Elements(64_000, 64_000), 1) == (64_000 * bytes_each, 0)


def test_settings_reach_the_optimizer() -> None:
    for name in OPTIMIZERS.names():
        optimizer = optimizer_of(load_config([{"optimizer": {"name": name, "betas": [0.8, 0.95]}}]))
        built, _ = stepped(optimizer)
        assert tuple(built.defaults["betas"]) == (0.8, 0.95)
    built, _ = stepped(optimizer_of(load_config([{"optimizer": {"name": "adamw_8bit", "eps": 1e-6}}])))
    assert built.defaults["eps"] == 1e-6


def test_lion_has_betas_of_its_own() -> None:
    assert load_config([{"optimizer": {"name": "lion_8bit"}}]).optimizer.betas == [0.9, 0.99]
    assert load_config([{"optimizer": {"name": "lion", "betas": [0.9, 0.999]}}]).optimizer.betas == [0.9, 0.999]
    assert load_config([], ["optimizer.name=adamw_8bit"]).optimizer.betas == [0.9, 0.999] == Config().optimizer.betas


def zero2(offload: str = "none") -> dict[str, Any]:
    return {"engine": {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": offload}}}}}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"optimizer": {"name": "lion", "eps": 1e-6}}], r"optimizer\.eps: 1e-06 .*not used by optimizer\.name = \"lion\""),
        ([{"optimizer": {"name": "lion", "eps": 1e-6}}], r"remove it or set it to 1e-08"),
        (
            [{"optimizer": {"name": "adamw_8bit"}, "train": {"fused_optimizer": True}}],
            r"train\.fused_optimizer: true .*not used by optimizer\.name = \"adamw_8bit\" .*set it to null",
        ),
        ([{"optimizer": {"options": {"x": 1}}}], r"optimizer\.options: no options for optimizer\.name = \"adamw\""),
        (
            [{"optimizer": {"name": "paged_adamw_8bit"}}, zero2("cpu")],
            r"optimizer\.name: \"paged_adamw_8bit\" .*offload_optimizer .*take \"adamw_8bit\", or no offload",
        ),
    ],
)
def test_what_an_optimizer_has_not_is_refused(layers: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(layers)


def test_what_is_no_fault() -> None:
    load_config([{"optimizer": {"name": "lion", "eps": 1e-8}, "train": {"fused_optimizer": None}}])
    load_config([{"optimizer": {"name": "paged_adamw_8bit"}}, zero2()])
    load_config([{"optimizer": {"name": "adamw_8bit"}}, zero2("cpu")])


def test_names() -> None:
    (fault,) = name_faults(load_config([{"optimizer": {"name": "adamw_8bits"}}]))
    assert fault.key == "optimizer.name"
    assert "did you mean 'adamw_8bit'?" in fault.message


def test_a_cpu_pages_nothing() -> None:
    assert made("adamw").check(CPU) is None
    assert made("adamw_8bit").check(CPU) is None
    notice = made("paged_adamw_8bit").check(CPU)
    assert notice == "optimizer.name: paged_adamw_8bit pages its state out of a GPU's memory; on this cpu it is adamw_8bit"


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"optimizer\.name: 'lion' needs bitsandbytes.*or take 'adamw'"):
        made("lion").check(CPU)
    made("adamw").check(CPU)


def test_one_of_somebody_elses() -> None:
    """A registered class is all that it takes; its options are its own to check."""

    @register("sgd_momentum")
    class Momentum(Optimizer):
        name = "sgd_momentum"
        moments = ("momentum_buffer",)

        def __init__(self, momentum: float) -> None:
            self.momentum = momentum

        @classmethod
        def of(cls, request: Request) -> Momentum:
            unknown = set(request.options) - {"momentum"}
            if unknown:
                raise ConfigError(Fault(f"optimizer.options.{min(unknown)}", "unknown; allowed: momentum"))
            return cls(float(request.options.get("momentum", 0.9)))

        def build(self, parameters: Mapping[str, torch.nn.Parameter], groups: Sequence[GroupSpec]) -> torch.optim.Optimizer:
            return torch.optim.SGD(param_groups(parameters, groups), lr=0.0, momentum=self.momentum)

    try:
        config = load_config([{"optimizer": {"name": "sgd_momentum", "options": {"momentum": 0.5}}}])
        assert name_faults(config) == []
        optimizer = optimizer_of(config)
        assert stepped(optimizer)[0].defaults["momentum"] == 0.5
        assert optimizer.state_bytes_per_element == 4
        with pytest.raises(ConfigError, match=r"optimizer\.options\.nesterov: unknown"):
            optimizer_of(load_config([{"optimizer": {"name": "sgd_momentum", "options": {"nesterov": True}}}]))
    finally:
        OPTIMIZERS.remove("sgd_momentum")
