"""Where a model computes, in which numbers, and where its layers wait."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from llmbo.errors import ConfigError, first_line
from pruning.anatomy import anatomy_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOADS = ("none", "gpu", "cpu", "disk")
MAPPED = ("gpu", "disk")  # places that layers go to from mapped files, or stay in them
SPARE = 0.9  # of what is free is filled with what need not be there


def choose_device(device: str, option: str = "--device") -> str:
    """`device` itself, or the best one for "auto". `option` is where the user names it."""
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"The device '{device}' cannot be used here ({first_line(error)}): try {option} auto."
        ) from error
    return device


def check_dtype(dtype: str, flag: str = "--dtype") -> None:
    """Raise ConfigError unless `dtype` is "auto" or a key of `DTYPES`."""
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"{flag} must be auto, {', '.join(DTYPES)}, got '{dtype}'.")


def choose_dtype(
    dtype: str, device: str, config: PretrainedConfig, clock: Callable[[], float] = time.perf_counter
) -> str:
    """`dtype` itself, or for "auto" the faster of float32 and bfloat16 on a matrix product of the model's size here."""
    if dtype != "auto":
        return dtype
    seconds, hidden = {}, config.hidden_size
    rows = 256 if device == "cpu" else 8192  # a GPU takes longer to start a small product than to compute it
    for name in ("float32", "bfloat16"):
        try:
            tokens = torch.ones(rows, hidden, dtype=DTYPES[name], device=device)
        except (TypeError, RuntimeError):  # Apple's GPUs have no bfloat16 before macOS 14
            continue
        weight = torch.ones(4 * hidden, hidden, dtype=DTYPES[name], device=device)  # about the size of an MLP's
        times = []
        for _ in range(6):
            start = clock()
            F.linear(tokens, weight).sum().item()  # waits for the device
            times.append(clock() - start)
        seconds[name] = min(times[1:])  # the first call warms up
    return min(seconds, key=lambda name: seconds[name])


def other_cards(device: str) -> dict[str, int]:
    """Free bytes of the CUDA devices that are not `device`, by name. To be asked takes some hundred megabytes of each."""
    cards, own = range(torch.cuda.device_count()), torch.device(device)
    if cards and own.type == "cuda":
        index = torch.cuda.current_device() if own.index is None else own.index
        return {f"cuda:{card}": torch.cuda.mem_get_info(card)[0] for card in cards if card != index}
    return {f"cuda:{card}": torch.cuda.mem_get_info(card)[0] for card in cards}


def spread(number: int, size: int, free: Mapping[str, int]) -> list[str]:
    """On which card each of `number` layers of `size` bytes waits; of fewer layers where there is no room for more.

    On as few cards as hold them, those with most room first: they may be other people's.

    Args:
        free: Bytes of each card.
    """
    roomiest_first = sorted(free, key=lambda card: -free[card])
    return [card for card in roomiest_first for _ in range(int(SPARE * free[card] / size))][:number]


def cards_for(name: str, model: PreTrainedModel, device: str) -> list[str]:
    """The card that each layer waits on.

    Raises:
        ConfigError: There is no room for all of them.
    """
    anatomy = anatomy_of(model)
    layers, size, free = anatomy.num_hidden_layers, anatomy.layer_parameters * model.dtype.itemsize, other_cards(device)
    cards = spread(layers, size, free)
    if len(cards) < layers:
        raise ConfigError(
            f"'{name}' has {layers} layers, and GPUs beside {device} have room for {len(cards)}: try --offload auto."
        )
    return cards


def leave_layers(model: PreTrainedModel, device: str, pinned: bool = False, cards: Sequence[str] = ()) -> None:
    """Bring a model to the device, but for the parameters of its decoder layers, which wait where they are.

    What a layer brought to the device alone would miss, its buffers, goes there too.

    Args:
        pinned: Move them, one at a time, into memory that a CUDA device copies from directly. Its blocks are powers of two.
        cards: Move those of each layer to a device of its own, where they wait.

    Raises:
        UnsupportedModel: Its layers are not known.
    """
    anatomy = anatomy_of(model)
    layers = anatomy.layers_of(model)
    anatomy.set_layers(model, nn.ModuleList())
    model.to(device)  # type: ignore[arg-type]  # its wrapper hides what it takes
    anatomy.set_layers(model, layers)
    for module in layers.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    for parameter in layers.parameters() if pinned else ():
        parameter.data = parameter.data.pin_memory()
    for layer, card in zip(layers, cards, strict=bool(cards)):
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(card)
