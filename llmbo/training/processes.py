"""Several processes that train one model, as torchrun starts them: each takes its part of every batch, the first one writes.

Data parallel: the gradient of a batch is the sum of its parts', so all hold the same weights after every step. Weights are not sharded
(FSDP): what is trained is small beside activations, and refits, heads and hooks read weights outside of a forward pass.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from llmbo.errors import ConfigError

Value = TypeVar("Value")
PATIENCE = timedelta(hours=6)  # of those who wait while the first asks the dense model


def started() -> int:
    """Processes that the environment says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_alone(command: str) -> None:
    """Raise ConfigError where torchrun has started several: each would train the same, into one folder."""
    if started() > 1:
        raise ConfigError(
            f"`llmbo {command}` trains in one process, and {started()} were started (WORLD_SIZE): leave out torchrun."
        )


def count() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def place() -> int:
    """Of this process among them, 0 for the first."""
    return distributed.get_rank() if count() > 1 else 0


@contextmanager
def together(device: str) -> Iterator[str]:
    """Meet the other processes, if the environment names some, for as long as the context lasts; gives this one's device.

    Args:
        device: As typed. Of CUDA devices each process takes its own.

    Raises:
        ConfigError: This process is one of several, and they cannot train on such a device.
    """
    if started() < 2:
        yield device
        return
    if device == "auto" and not torch.cuda.is_available():
        device = "cpu"
    if device in ("auto", "cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    elif device != "cpu":
        raise ConfigError(
            f"Several processes cannot train on --device {device}: take cuda, of which each has its own, or cpu."
        )
    distributed.init_process_group("gloo" if device == "cpu" else "nccl", timeout=PATIENCE)
    try:
        yield device
    finally:
        distributed.destroy_process_group()


@contextmanager
def in_turn() -> Iterator[None]:
    """The first process does it before all others, who then find on the disk what it has left."""
    if count() > 1 and place():
        distributed.barrier()
    yield
    if count() > 1 and not place():
        distributed.barrier()


def agreed(value: Value) -> Value:
    """The first process's value."""
    if count() == 1:
        return value
    held = [value]
    distributed.broadcast_object_list(held)
    return held[0]


def meet() -> None:
    """Wait for all others."""
    if count() > 1:
        distributed.barrier()


def agree_on(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values."""
    for tensor in tensors if count() > 1 else ():
        distributed.broadcast(tensor.detach(), 0)


def check_batch(windows: int) -> None:
    """Raise ConfigError unless every process gets a window of a batch."""
    if windows < count():
        raise ConfigError(f"--batch {windows} has no window for each of {count()} processes: take at least {count()}.")


def own_part(places: Tensor) -> Tensor:
    """What of a batch is this process's."""
    return places[place() :: count()]


def add_up(parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
    """Sum the gradients over all processes, in place, and return the sum of the losses."""
    if count() == 1:
        return loss
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([loss.view(1).float(), *(gradient.flatten().float() for gradient in gradients)])
    distributed.all_reduce(flat)
    first, *parts = flat.split([1, *(gradient.numel() for gradient in gradients)])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return first[0]
