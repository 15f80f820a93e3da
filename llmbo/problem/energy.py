"""Joules that a device has used, from the counters that the vendor built in, read by Zeus (https://ml.energy/zeus)."""

from collections.abc import Callable
from typing import Any

import torch

from llmbo.errors import ConfigError, first_line

INSTALL = "pip install 'llmbo[energy]'"


def energy_counter(device: torch.device) -> Callable[[], float]:
    """A clock that shows joules: of a GPU by NVML or AMD SMI, of all CPU packages and their memory by RAPL.

    It waits for the device. Whatever else runs there is counted too.

    Raises:
        ConfigError: Zeus is not installed, or the counters cannot be read.
    """
    try:
        from zeus.device import get_cpus, get_gpus
        from zeus.device.exception import ZeusBaseCPUError, ZeusBaseGPUError
    except ImportError as error:
        raise ConfigError(f"The objective energy needs the package zeus: {INSTALL}.") from error
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        try:
            gpus = get_gpus()
            if not gpus.supports_get_total_energy_consumption(index):
                raise ConfigError(f"energy: {device} has no energy counter (NVIDIA GPUs have one from Volta on).")
        except ZeusBaseGPUError as error:
            raise ConfigError(f"energy: the counter of {device} cannot be read ({_reason(error)}).") from error

        def of_gpu() -> float:
            torch.cuda.synchronize(device)
            return gpus.get_total_energy_consumption(index) / 1000

        return of_gpu
    if device.type != "cpu":
        raise ConfigError(f"energy can be measured on a GPU or a CPU, not on '{device.type}'.")
    try:
        cpus = get_cpus()
        packages = range(len(cpus))
        for package in packages:
            cpus.get_total_energy_consumption(package)
    except (ZeusBaseCPUError, OSError) as error:
        raise ConfigError(
            f"energy: the CPU's counters (RAPL, /sys/class/powercap) cannot be read ({_reason(error)}): they need a real "
            "machine, not a virtual one, and root or Zeus's daemon. --latency-target cuda measures on a GPU."
        ) from error
    return lambda: sum(_joules(cpus.get_total_energy_consumption(package)) for package in packages)


def _reason(error: Exception) -> str:
    return first_line(error).rstrip(".")


def _joules(measured: Any) -> float:
    return (measured.cpu_mj + (measured.dram_mj or 0.0)) / 1000
