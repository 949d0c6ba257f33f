"""Energy between start and stop, from the driver's counter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from progscale.energy import EnergyMeter


class Driver:
    """What NVML gives: a handle for a card's id, and millijoules that only grow."""

    def __init__(self, readings: list[int]) -> None:
        self.readings = readings
        self.asked: list[str] = []

    def nvmlDeviceGetHandleByUUID(self, card: str) -> str:
        self.asked.append(card)
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        return self.readings.pop(0)


def test_a_cpu_tells_nothing() -> None:
    meter = EnergyMeter(torch.device("cpu"))
    meter.start()
    meter.stop()
    assert (meter.tells, meter.joules) == (False, 0.0)


def test_what_is_drawn_between_start_and_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12ab"))
    driver = Driver([1000, 4000, 50_000, 50_500])
    meter = EnergyMeter(torch.device("cuda", 1), driver)
    meter.start()
    meter.stop()
    meter.stop()
    meter.start()
    meter.stop()
    assert (meter.tells, meter.joules, driver.asked) == (True, 3.5, ["GPU-12ab"])


def test_a_driver_that_fails_on_the_way_costs_the_figure_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12ab"))

    class Lost(Driver):
        NVMLError = LookupError

        def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
            if len(self.readings) == 1:
                raise LookupError("GPU is lost")
            return super().nvmlDeviceGetTotalEnergyConsumption(handle)

    meter = EnergyMeter(torch.device("cuda", 0), Lost([1000, 2000]))
    meter.start()
    meter.stop()
    assert meter.tells is False
    meter.start()
    meter.stop()
