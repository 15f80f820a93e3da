"""What a run will take, before anything is loaded: a model's config and the sizes of its files say all that is needed."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from llmbo.advisor.assemble import check_advisor
from llmbo.advisor.client import Price
from llmbo.advisor.render import token_limit
from llmbo.config import RunConfig
from llmbo.config.advisor import parse_spec
from llmbo.config.formats import FORMATS
from llmbo.errors import ConfigError
from llmbo.models.aliases import cache_dir
from llmbo.models.loading import find_prunable, load_tokenizer
from llmbo.models.placement import DTYPES, MAPPED, choose_device, choose_dtype
from llmbo.models.stored import StoredWeights, anatomy_of_config, model_of_config, stored_weights
from llmbo.problem.engines import check_engines
from llmbo.problem.kept import prepared_dir
from llmbo.problem.residence import (
    Machine,
    Residence,
    dtype_in,
    housed,
    on_cards,
    places_of,
    readable,
    refit_bytes,
    residence_of,
    workload_of,
)
from llmbo.problem.sequence import PHASE, check_refits
from llmbo.problem.space import SearchSpace, space_of
from llmbo.report.files import RUNS
from llmbo.run.assemble import check_window, item_files
from llmbo.run.disk import WRITTEN, Disk, missing
from llmbo.run.duration import Rates, seconds_by_phase
from llmbo.run.recipes import recipe_named
from llmbo.run.tokens import settled
from pruning.anatomy import Anatomy
from pruning.block import BlockKind
from pruning.cost import dense_block_parameters
from pruning.text import read_mix

WIDTH = 70  # of a line behind its name
HEADERS = 0.05  # of a file, so much may be something else than weights
PAGE_BYTES = 1_000_000  # the report's page, with its script, and pictures
TRIAL_BYTES, TRIAL_BLOCK_BYTES = 2_000, 250  # of a trial in database, report and page, and for each of its blocks


@dataclass(frozen=True)
class AdviceCost:
    """What the advisor's caps let it cost, at most.

    Args:
        dollars: None where its price is not known.
    """

    calls: int
    tokens: int
    dollars: float | None


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Args:
        dtype, device: As the run would choose them here.
        devices: Of the processes that evaluate, where there are several; `machine` is then what one of them may count on.
        parameters, block_parameters: Of the dense model, and of its decoder layers.
        stored: Its files; None where only the config is known.
        levels: Widths that the search knows for each kind of block, none and all of it among them.
        smallest_share: Of the decoder layers' parameters, in the smallest legal model.
        recipe: Of the allocation path, in words.
        machine: Memory that is free.
        residences: By where layers wait: "none", "cpu", "disk"; "gpu" where that was asked for, or would spare the host.
        chosen: The one that the run would take; None where none fits.
        refused: What is missing and what would fit, in a line; empty where the run fits.
        disk: What will be written, some of `WRITTEN`.
        rates: This machine's, measured for the plan.
        seconds: By phase; of the layer-by-layer way where nothing fits.
    """

    config: RunConfig
    dtype: str
    device: str
    devices: Sequence[str]
    anatomy: Anatomy
    parameters: int
    block_parameters: int
    stored: StoredWeights | None
    levels: Mapping[BlockKind, int]
    smallest_share: float
    recipe: str
    machine: Machine
    residences: Mapping[str, Residence]
    chosen: Residence | None
    refused: str
    disk: Mapping[str, Disk]
    rates: Rates
    seconds: Mapping[str, float]
    advice: AdviceCost | None

    @property
    def fits(self) -> bool:
        return not self.refused

    def __str__(self) -> str:
        return "\n".join(f"{name:9} {line}" for name, line in self._lines())

    def _lines(self) -> Iterator[tuple[str, str]]:
        """A screen of 80 columns."""
        a, itemsize = self.anatomy, DTYPES[self.dtype].itemsize
        yield "model", f"{self.config.model}: {_count(self.parameters)} parameters, {self.dtype} on {self.device}"
        yield "", f"{a.num_hidden_layers} layers of {a.num_key_value_heads} KV groups and {a.intermediate_size} neurons"
        files = "no weights here, sizes from the config"
        if self.stored:
            files = f"{readable(self.stored.bytes)} in {_some(self.stored.files, 'file')}"
            files += "" if self.stored.here else ", to be downloaded"
        yield "", f"weights {readable(self.parameters * itemsize)}; {files}"
        points = a.num_hidden_layers * sum(math.log10(number) for number in self.levels.values())
        yield (
            "shapes",
            f"{self.levels['attention']} levels of attention, {self.levels['mlp']} of an MLP in each layer: 10^{points:.0f}",
        )
        share = self.smallest_share
        smallest = self.parameters - (1 - share) * self.block_parameters
        yield "", f"smallest legal {share:.1%} of the layers, {_count(smallest)} parameters"
        for index, line in enumerate(textwrap.wrap(self.recipe, WIDTH)):
            yield "" if index else "recipe", line
        if self.devices:
            yield "devices", f"{', '.join(self.devices)}: a process and a model on each; what follows is of the first"
        limit = self.residences["none"].limit
        yield "memory", f"{readable(limit)} may be taken on {self.device}"
        for offload, residence in self.residences.items():
            mark = "  <- chosen" if residence == self.chosen else ""
            host = f", {readable(residence.host)} on the host" if residence.host and not self.machine.shared else ""
            yield (
                "",
                f"{WAITING[offload]}: peak {readable(residence.needed)} ({residence.footprint.largest}){host}{mark}",
            )
            if offload == "gpu":
                yield "", _on_cards(residence, residence == self.chosen or bool(residence.homeless))
        for index, (name, disk) in enumerate(self.disk.items()):
            told = f"{WRITTEN[name]} {readable(disk.needed)}; {readable(disk.free)} free in {disk.place}"
            yield "" if index else "disk", told
        search, heldout, refits = (self.seconds.get(name, 0.0) for name in ("search", "held-out windows", PHASE))
        total = sum(self.seconds.values())
        yield "time", f"{_time(total)}, at {self.rates.matmul / 1e12:.3g} TFLOP/s in {self.dtype} measured here:"
        yield (
            "",
            f"preparation {_time(total - search - heldout - refits)}, search {_time(search)}, held-out windows {_time(heldout)}",
        )
        if refits:
            yield "", f"{PHASE} of {_some(self.config.refit_front, 'model')} {_time(refits)}"
        if self.config.advisor != "none":
            most = int(self.config.advisor_share * self.config.budget + 1e-9)
            yield "advice", f"in at most {most} of {self.config.budget} trials (--advisor-share)"
        if self.advice:
            cost = (
                "price unknown, see --advisor-price" if self.advice.dollars is None else f"${self.advice.dollars:.3f}"
            )
            yield "", f"at most {self.advice.calls} calls, {self.advice.tokens} tokens, {cost}"
        yield "fits", "no" if self.refused else "yes"


WAITING = {
    "none": "all layers on the device",
    "gpu": "one layer at a time from other GPUs",
    "cpu": "one layer at a time from the host",
    "disk": "one layer at a time from mapped files",
}


def plan_of(
    config: RunConfig, rates: Rates | None = None, machine: Machine | None = None, devices: Sequence[str] = ()
) -> Plan:
    """Work out what a run takes; of the model only its config is read.

    Args:
        rates, machine: Instead of this machine's.
        devices: Of all processes that evaluate; the settings name the first.

    Raises:
        LlmboError, PruningError: What a run would refuse before it loads anything.
    """
    check_advisor(config, RUNS / config.name)
    found = find_prunable(config.model)
    check_window(config, found.config)
    for text in (config.text, config.heldout_text):
        if "text:" in text and "hf:" not in text:  # others would be downloaded, or take their time
            read_mix(text)
    item_files(config)
    _, recipe = recipe_named(config.recipe)
    device = choose_device(config.device)
    measured = choose_dtype(config.dtype, device, found.config.get_text_config())
    anatomy = anatomy_of_config(found)
    if config.deploy:
        check_engines(config, model_of_config(found), load_tokenizer(found))
    space = space_of(config, anatomy)
    machine = (machine or Machine.of(device)).among(devices)
    config = settled(config, anatomy, measured, device, rates)  # as a run does, before it knows where layers wait
    check_refits(config, anatomy)
    dtype, chosen, refused = dtype_in(config.offload, found, config.dtype, measured), None, ""
    try:
        dtype, chosen = housed(config, found, anatomy, config.dtype, measured, machine)
    except ConfigError as error:
        refused = str(error)
    itemsize = DTYPES[dtype].itemsize
    source = next(iter(machine.others), "") if config.offload == "gpu" else ""
    rates = rates or Rates.measure(anatomy, DTYPES[dtype], device, workload_of(config, device).batch_tokens, source)
    stored = stored_weights(found.source)
    parameters = anatomy.other_parameters + dense_block_parameters(anatomy)
    disk = _disk(config, space, itemsize, parameters, stored)
    copied = stored is None or abs(stored.bytes / (itemsize * parameters) - 1) > HEADERS
    if chosen and chosen.offload in MAPPED and copied:
        disk["copy"] = Disk.at(cache_dir(), itemsize * parameters)
    if chosen:
        spare = machine.host - (chosen.needed if machine.shared else chosen.host)
        refused = next(filter(None, (missing(name, needed, spare) for name, needed in disk.items())), "")
    residences = {place: residence_of(config, anatomy, itemsize, machine, place) for place in places_of(machine)}
    if config.offload == "gpu":
        residences["gpu"] = residence_of(config, anatomy, itemsize, machine, "gpu")
    elif (not chosen or chosen.offload != "none") and (beside := on_cards(config, anatomy, itemsize, machine)):
        residences["gpu"] = beside
    seconds = seconds_by_phase(config, space, itemsize, chosen is None or chosen.offload != "none", rates)
    seconds["search"] /= max(1, len(set(devices)))  # several on one device halve its rate between them
    return Plan(
        config,
        dtype,
        device,
        devices,
        anatomy,
        parameters,
        dense_block_parameters(anatomy),
        stored,
        levels={kind: len(widths) for kind, widths in space.widths.items()},
        smallest_share=_smallest_share(space),
        recipe=recipe,
        machine=machine,
        residences=residences,
        chosen=chosen,
        refused=refused,
        disk=disk,
        rates=rates,
        seconds=seconds,
        advice=_advice(config, anatomy),
    )


def _smallest_share(space: SearchSpace) -> float:
    """What is left when blocks are narrowed one after the other as far as they may be."""
    x = torch.tensor([space.max_levels], dtype=torch.float64)
    for index, most in enumerate(space.max_levels):
        tried = x.repeat(most + 1, 1)
        tried[:, index] = torch.arange(most + 1)
        groups = tried[:, : space.num_layers]
        x = tried[(space.share(tried) >= space.min_share) & (groups > 0).any(-1)][:1]
    if tuple(x[0].int().tolist()) == space.max_levels:
        raise ConfigError(f"--min-share {space.min_share} leaves no model smaller than the dense one: lower it.")
    return float(space.share(x))


def _disk(
    config: RunConfig, space: SearchSpace, itemsize: int, parameters: int, stored: StoredWeights | None
) -> dict[str, Disk]:
    refits = refit_bytes(config, space.anatomy, itemsize)
    trials = config.budget * (TRIAL_BYTES + TRIAL_BLOCK_BYTES * space.d)
    export = max(row.bytes_on_disk(next(iter(row.dtypes)), parameters, parameters) for row in FORMATS.values())
    found = {} if stored is None or stored.here else {"download": Disk.at(Path(HF_HUB_CACHE), stored.bytes)}
    if refits:
        found["refits"] = Disk.at(prepared_dir(), refits)
    found["run"] = Disk.at(RUNS / config.name, PAGE_BYTES + trials)
    if refits and not found["refits"].shares(found["run"]):
        found["run"] = Disk.at(RUNS / config.name, PAGE_BYTES + trials + refits)  # a copy where files cannot be linked
    found["export"] = Disk.at(Path("exports"), export)
    return found


def _advice(config: RunConfig, anatomy: Anatomy) -> AdviceCost | None:
    kind = parse_spec(config.advisor).kind
    if kind not in ("openai", "transformers", "mail"):
        return None
    prompt, reply = token_limit(anatomy.num_hidden_layers), config.advisor_reply_tokens
    calls = config.advisor_max_calls
    tokens = min(config.advisor_max_tokens, calls * (prompt + reply))
    price = (
        Price(0.0, 0.0) if kind == "transformers" else Price(*config.advisor_price) if config.advisor_price else None
    )
    if price is None:
        return AdviceCost(calls, tokens, None)
    dollars = price.of(tokens * prompt // (prompt + reply), tokens * reply // (prompt + reply))
    return AdviceCost(calls, tokens, min(dollars, config.advisor_max_cost or dollars))


def _on_cards(residence: Residence, asked: bool) -> str:
    each = [f"{readable(size)} on {card}" for card, size in residence.cards.items()]
    if residence.homeless:
        each.append(f"no room for {readable(residence.homeless)}")
    return f"  {', '.join(each)}" + ("" if asked else "; --offload gpu would do, faster than the host")


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _some(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _time(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 2 * 3600
        else f"{seconds / 60:.1f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )
