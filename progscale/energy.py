"""What a GPU draws while training steps run, from the driver's own counter (NVML)."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

log = logging.getLogger("progscale")


class EnergyMeter:
    """Adds up the energy of this rank's GPU between `start` and `stop`.

    Attributes:
        joules: so far.
        tells: whether the device has a counter: NVIDIA GPUs from Volta on, whole ones (a MIG slice has none of its own).
    """

    def __init__(self, device: torch.device, library: Any = None) -> None:
        self.joules = 0.0
        self._read = (
            counter_of(device) if library is None else functools.partial(read_counter, library, handle_of(library, device))
        )
        self._since: int | None = None
        self._error: type[Exception] = getattr(library, "NVMLError", None) or nvml_error()

    @property
    def tells(self) -> bool:
        """Whether there is a counter to read."""
        return self._read is not None

    def start(self) -> None:
        """Counts from here."""
        self._since = self._now()

    def stop(self) -> None:
        """Counts up to here."""
        since, self._since = self._since, None
        now = None if since is None else self._now()
        if since is not None and now is not None:
            self.joules += (now - since) / 1000

    def _now(self) -> int | None:
        if self._read is None:
            return None
        try:
            return int(self._read())
        except self._error as error:
            # A driver that was updated, a card that is gone: the figure is left out, the run goes on.
            log.warning("the GPU's energy is not known from here on: %s", error)
            self._read = None
            return None


def nvml_error() -> type[Exception]:
    """What NVML raises."""
    import pynvml

    error: type[Exception] = pynvml.NVMLError
    return error


@functools.cache
def counter_of(device: torch.device) -> Any:
    """Reads the millijoules of a device since its driver was loaded; None where there is no such counter."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = handle_of(pynvml, device)
        read_counter(pynvml, handle)
    except pynvml.NVMLError:
        # No driver library, a MIG slice, a virtual GPU, or one that is older: the figure is left out.
        return None
    return functools.partial(read_counter, pynvml, handle)


def handle_of(library: Any, device: torch.device) -> Any:
    """NVML's handle: by the card's own id, for its numbers are not those of CUDA_VISIBLE_DEVICES."""
    return library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def read_counter(library: Any, handle: Any) -> int:
    """Millijoules since the driver was loaded."""
    return int(library.nvmlDeviceGetTotalEnergyConsumption(handle))
