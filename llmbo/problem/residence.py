"""Where a model's weights are while it is prepared and searched: all on the device, or one layer at a time."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import psutil
import torch

from llmbo.config import RunConfig
from llmbo.errors import ConfigError
from llmbo.models.loading import Found
from llmbo.models.placement import DTYPES, MAPPED, SPARE, choose_device, choose_dtype, other_cards, spread
from llmbo.models.stored import anatomy_of_config
from llmbo.problem.hardware import KIND_OF
from llmbo.problem.method import DEFAULT
from llmbo.problem.space import space_of
from pruning.anatomy import Anatomy
from pruning.compensation import CACHE_BYTES, solved_values
from pruning.footprint import Footprint, Workload, footprint
from pruning.likelihood import rows_at_once
from pruning.refits import RefitCache
from pruning.transfers import CHUNK_BYTES
from pruning.walk import windows_at_once

SMALLEST_WINDOW = 64  # that is worth proposing
WAITING = 0.5  # of the host's memory that is left over is for refits that wait there


def readable(size: float) -> str:
    """Bytes, as they are told."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


@dataclass(frozen=True)
class Machine:
    """What is free.

    Args:
        device: As torch calls it.
        free: Bytes on the device.
        host: Bytes of the host's memory; on a CPU the same.
        cards: Bytes on each other CUDA device, by name; None for what they say once they are asked, see `others`.
    """

    device: str
    free: int
    host: int
    cards: Mapping[str, int] | None = None

    @classmethod
    def of(cls, device: str) -> "Machine":
        host = psutil.virtual_memory().available
        kind = torch.device(device).type
        if kind == "cuda":
            there = torch.device(device)  # a model that lies there already is among the bytes that are needed
            return cls(device, torch.cuda.mem_get_info(there)[0] + torch.cuda.memory_reserved(there), host)
        if kind == "mps":
            return cls(device, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(), host)
        return cls(device, host, host)

    @cached_property
    def others(self) -> Mapping[str, int]:
        """Free bytes of the other CUDA devices, which are left alone until somebody wants to know."""
        return other_cards(self.device) if self.cards is None else self.cards

    def among(self, devices: Sequence[str]) -> "Machine":
        """What one of several processes may count on that begin at once, a process on each of `devices`."""
        host = self.host // max(1, len(devices))
        return replace(self, free=host if self.shared else self.free, host=host)

    @property
    def shared(self) -> bool:
        """Host and device are one memory."""
        return torch.device(self.device).type in ("cpu", "mps")


@dataclass(frozen=True)
class Residence:
    """Where the decoder layers wait, and what that takes.

    Args:
        offload: "none", "gpu", "cpu" or "disk", as `load_model` takes it.
        needed: Bytes on the device at the peak; where it is the host too, with what waits there.
        host: Bytes that wait in the host's memory, layers among them; files that are mapped do not count.
        limit, host_limit: Bytes that may be taken on the device, and on the host.
        cards: Bytes of layers that wait on each other CUDA device.
        homeless: Bytes of layers that should wait there and find no room.
    """

    offload: str
    footprint: Footprint
    needed: int
    host: int
    limit: int
    host_limit: int
    cards: Mapping[str, int] = field(default_factory=dict)
    homeless: int = 0

    @property
    def fits(self) -> bool:
        return self.needed <= self.limit and self.host <= self.host_limit and not self.homeless


def workload_of(config: RunConfig, device: str) -> Workload:
    """What a run sends through the model."""
    tokens = max(windows * config.window for windows in config.windows.values())
    scored = min(config.windows["calibration"] * config.window, DEFAULT.scored_tokens)
    there = torch.device(device)
    at_once = windows_at_once(there, config.window), rows_at_once(there)
    return Workload(tokens, scored, config.window, config.refit_anchors or 0, *at_once)


def refit_bytes(config: RunConfig, anatomy: Anatomy, itemsize: int) -> int:
    """Of all widths of the grid, in the model's dtype, of the dense model and of every pruned member that has its own."""
    tables = (1 + (config.refit_anchors or 0)) * config.compensation
    return solved_values(anatomy, space_of(config, anatomy).widths) * itemsize * tables


def residence_of(config: RunConfig, anatomy: Anatomy, itemsize: int, machine: Machine, offload: str) -> Residence:
    """What it takes to let the layers wait there."""
    # On a CPU those that were kept are views of mapped files, which the kernel may drop.
    refits = None if not config.compensation else 0 if machine.shared else refit_bytes(config, anatomy, itemsize)
    found = footprint(anatomy, itemsize, workload_of(config, machine.device), offload == "none", refits)
    number, layer = anatomy.num_hidden_layers, anatomy.layer_parameters * itemsize
    host = found.host + (number * layer if offload == "cpu" else 0)
    limit = min(machine.free, config.memory_bytes or machine.free)
    needed = found.peak + host * machine.shared
    if offload != "gpu":
        return Residence(offload, found, needed, host, limit, machine.host)
    placed = Counter(spread(number, layer, machine.others))
    cards = {card: layer * layers for card, layers in placed.items()}
    return Residence(offload, found, needed, host, limit, machine.host, cards, layer * (number - placed.total()))


def refit_cache(config: RunConfig, anatomy: Anatomy, itemsize: int, machine: Machine, offload: str) -> RefitCache:
    """Room for refits on the device: what is counted as needed, and most of what is left over. Where that does not hold all of them, a
    share of the host's memory is for the others: from files they would come more slowly than candidates are computed. As much again stays
    free, whoever else takes from it: on a machine with several devices each has a process of its own.
    """
    if machine.shared or not config.compensation:
        return RefitCache()
    found = residence_of(config, anatomy, itemsize, machine, offload)
    most, needed = (
        CACHE_BYTES + max(0, round(SPARE * found.limit) - found.needed),
        refit_bytes(config, anatomy, itemsize),
    )
    left = max(0, found.host_limit - found.host)
    share = int(WAITING * left)
    return RefitCache(most, min(needed + CHUNK_BYTES, share) if most < needed else 0, left - share)


def residences(config: RunConfig, anatomy: Anatomy, itemsize: int, machine: Machine) -> Iterator[Residence]:
    """Those that the settings allow, the fastest first; of one memory the CPU is no place beside the device."""
    wanted = "none" if machine.shared and config.offload == "cpu" else config.offload
    for offload in places_of(machine) if wanted == "auto" else (wanted,):
        yield residence_of(config, anatomy, itemsize, machine, offload)


def places_of(machine: Machine) -> tuple[str, ...]:
    """Where layers may wait without being told to, the fastest place first; other GPUs may be other people's."""
    return ("none", "disk") if machine.shared else ("none", "cpu", "disk")


def on_cards(config: RunConfig, anatomy: Anatomy, itemsize: int, machine: Machine) -> Residence | None:
    """The layers on the machine's other GPUs, which nobody asked for; None where they do not fit there."""
    found = None if machine.shared else residence_of(config, anatomy, itemsize, machine, "gpu")
    return found if found and _usable(config, found) else None


def choose_residence(config: RunConfig, anatomy: Anatomy, itemsize: int, machine: Machine) -> Residence:
    """The first of `residences` that fits the device, `--memory` and the host.

    Raises:
        ConfigError: None does, or the settings need the whole model where it does not fit; what is missing, and what would fit.
    """
    found = list(residences(config, anatomy, itemsize, machine))
    for residence in found:
        if residence.fits:
            if not _usable(config, residence):
                waiting = {"disk": "in the files", "cpu": "in the host", "gpu": "on other GPUs"}[residence.offload]
                raise ConfigError(
                    f"{_whole(config)[0]} runs the model as a whole, but its layers wait {waiting}: "
                    "leave it out, or make room for --offload none."
                )
            return residence
    last = found[-1]
    if last.homeless:
        raise ConfigError(
            f"'{config.model}' has {readable(last.homeless + sum(last.cards.values()))} of layers, and {_room(machine)}: "
            f"{_remedy(config, anatomy, itemsize, machine)}."
        )
    if last.needed <= last.limit:
        raise ConfigError(
            f"'{config.model}' needs {readable(last.host)} of the host's memory, {readable(machine.host)} are free: "
            f"{_remedy(config, anatomy, itemsize, machine)}."
        )
    where = "with all layers on it" if last.offload == "none" else "even one layer at a time"
    allowed = "--memory allows" if last.limit < machine.free else "are free"
    raise ConfigError(
        f"'{config.model}' needs {readable(last.needed)} on {machine.device} {where}, {readable(last.limit)} {allowed}: "
        f"{_remedy(config, anatomy, itemsize, machine)}."
    )


def placed(config: RunConfig, found: Found, dtype: str, device: str) -> tuple[str, str, str]:
    """Dtype, device and offload of a run's model, in the order that `load_model` takes them.

    Args:
        dtype, device: The run's own where it is continued, else what the settings say.

    Raises:
        ConfigError: The device is not there, or the model fits nowhere.
    """
    device = choose_device(device)
    measured = choose_dtype(dtype, device, found.config.get_text_config())
    dtype, residence = housed(config, found, anatomy_of_config(found), dtype, measured, Machine.of(device))
    return dtype, device, residence.offload


def housed(
    config: RunConfig, found: Found, anatomy: Anatomy, dtype: str, measured: str, machine: Machine
) -> tuple[str, Residence]:
    """The dtype of a run's model, and where its layers wait.

    Args:
        dtype: As for `placed`.
        measured: What "auto" is where nothing is mapped.

    Raises:
        ConfigError: As `choose_residence`.
    """
    expected = dtype_in(config.offload, found, dtype, measured)
    residence = choose_residence(config, anatomy, DTYPES[expected].itemsize, machine)
    taken = dtype_in(residence.offload, found, dtype, measured)
    if taken != expected:
        there = replace(config, offload=residence.offload)
        residence = choose_residence(there, anatomy, DTYPES[taken].itemsize, machine)
    return taken, residence


def dtype_in(offload: str, found: Found, dtype: str, measured: str) -> str:
    """Of a model whose layers wait there: "auto" is what files are stored in where these are mapped, elsewhere what was measured."""
    stored = str(found.config.dtype).removeprefix("torch.")
    return stored if dtype == "auto" and offload in MAPPED and stored in DTYPES else measured


def placed_to_cut(config: RunConfig, found: Found, dtype: str, device: str) -> tuple[str, str, str]:
    """As `placed`, for a finished run's model: trials are cut from it, one layer after the other, and nothing is prepared or measured, so
    what may not fit as it did is not refused.

    Raises:
        ConfigError: The device is not there.
    """
    device = choose_device(device)
    there = anatomy_of_config(found), DTYPES[dtype].itemsize, Machine.of(device)
    places = list(residences(config, *there))
    if places[-1].homeless:  # the other GPUs are gone, or busy
        places = list(residences(replace(config, offload="auto"), *there))
    fits = next((place for place in places if place.fits), places[-1])
    return dtype, device, "none" if _whole(config) else fits.offload


def _whole(config: RunConfig) -> list[str]:
    """What of the settings runs models as a whole, which cannot be where layers are brought one at a time."""
    measured = [name for name in (*config.objectives, *config.limits) if name in KIND_OF]
    asked = {"--racing": config.racing, "--text self": config.text == "self", "--items": bool(config.items)}
    asked |= {"--elastic": bool(config.elastic)}
    return [flag for flag, wanted in asked.items() if wanted] + measured


def _usable(config: RunConfig, residence: Residence) -> bool:
    return residence.fits and (residence.offload == "none" or not _whole(config))


def _room(machine: Machine) -> str:
    """What the other GPUs have."""
    if not machine.others:
        return f"there is no GPU beside {machine.device} for them to wait on"
    each = ", ".join(f"{readable(SPARE * free)} on {card}" for card, free in machine.others.items())
    return f"GPUs beside {machine.device} have room for {each}"


def _remedy(config: RunConfig, anatomy: Anatomy, itemsize: int, machine: Machine) -> str:
    """The smallest change that would fit: of where layers wait, of the dtype, of the window, of the tokens, or of the memory."""
    auto, also = replace(config, offload="auto"), "" if config.offload == "auto" else "--offload auto "
    changes = [("--offload auto", auto, itemsize)]
    if itemsize > 2:
        changes.append((f"{also}--dtype bfloat16", replace(auto, dtype="bfloat16"), 2))
    window = config.window // 2
    while window >= SMALLEST_WINDOW:
        changes.append((f"{also}--window {window}", replace(auto, window=window), itemsize))
        window //= 2
    fewer = max(config.window, DEFAULT.scored_tokens // 4)
    if fewer < config.calibration_tokens:
        changes.append((f"{also}--calibration-tokens {fewer}", replace(auto, calibration_tokens=fewer), itemsize))
    for named, changed, size in changes:
        if any(_usable(config, residence) for residence in residences(changed, anatomy, size, machine)):
            cards = on_cards(config, anatomy, size, machine) if changed == auto and config.offload != "gpu" else None
            return f"{named} fits" + (f", and so does --offload gpu, on {' and '.join(cards.cards)}" if cards else "")
    possible = [
        one
        for one in residences(auto, anatomy, itemsize, machine)
        if _usable(config, replace(one, limit=one.needed, host_limit=one.host))
    ]
    least = min(possible, key=lambda residence: residence.needed)
    if least.needed <= machine.free and least.host <= machine.host:
        return f"{also}--memory {-(-least.needed // 10**6)}MB fits"
    return f"nothing below {readable(least.needed)} would do, so take a smaller model or another --device"
