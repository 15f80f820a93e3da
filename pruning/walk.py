"""The decoder one layer at a time: all windows pass a layer before the next one is touched, forward and backward.

So a pass needs one layer on the device, and of that layer's sums and activations one batch's, however large the model: hidden
states between layers lie on the host. Backward, each layer runs again from its stored input and is differentiated alone
(gradient checkpointing at every layer, Chen et al. 2016, arXiv:1604.06174), so no graph ever spans the model. A model that
stays on its device walks as well: what it costs is one forward pass more for each backward pass.

L: decoder layers.   B: windows of a batch.   T: tokens of a window.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.anatomy import family_of
from pruning.likelihood import last_hidden

FEW = 4  # windows of a batch
TOKENS = 3072  # of a batch on a GPU, if that is more: all that a candidate is judged on by default


@dataclass(frozen=True)
class Call:
    """What the decoder hands a layer besides the hidden states: masks, positions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    """Stands for a layer: keeps its call and passes the hidden states on, or gives those that lie behind the last layer."""

    def __init__(self, layer: nn.Module, calls: list[Call], given: Tensor | None = None) -> None:
        super().__init__()
        self._calls, self._given = calls, given
        self._stands_for = (layer,)  # in a tuple, or it would become a submodule

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._calls.append(Call(args, kwargs))
        return hidden_states if self._given is None else self._given

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # a decoder may ask its layers what kind of attention they have
            return getattr(self.__dict__["_stands_for"][0], name)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model computes: where its embeddings are, wherever its layers wait."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight.device


def windows_at_once(device: torch.device, length: int, few: int = FEW) -> int:
    """Windows of so many tokens in a batch: `few`, whose activations a CPU's caches hold in part, or as many as keep a GPU busy."""
    return max(few, TOKENS // length) if device.type == "cuda" else few


@contextmanager
def brought(layer: nn.Module, device: torch.device, copy: bool = False) -> Iterator[nn.Module]:
    """The layer with its weights on the device for as long as the context lasts; those that are there already stay.

    Memory: the weights that are brought. Where they waited nothing is written.

    Args:
        copy: Bring copies even of what is there, for those who change them.
    """
    waiting = {parameter: parameter.data for parameter in layer.parameters()}
    try:
        for parameter, data in waiting.items():
            # A CPU would read what is not there yet.
            parameter.data = data.to(device, non_blocking=device.type != "cpu", copy=copy)
        yield layer
    finally:
        for parameter, data in waiting.items():
            parameter.data = data


def enter(model: PreTrainedModel, batch: Tensor) -> tuple[Tensor, list[Call]]:
    """Hidden states before the first layer, `B x T x hidden_size`, and how the decoder would call each of its layers."""
    calls: list[Call] = []
    given: list[Tensor] = []

    def first(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        given.append(args[0])

    layers = _layers_of(model)
    recorders = nn.ModuleList(_Recorder(layer, calls) for layer in layers)
    recorders[0].register_forward_pre_hook(first)
    with _running(model, recorders), torch.no_grad():
        last_hidden(model, batch)
    return given[0], calls


def leave(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """What the head reads, from the hidden states behind the last layer, `B x T x hidden_size` both."""
    layers = _layers_of(model)
    with _running(model, nn.ModuleList([_Recorder(layers[0], [], hidden)])):
        return last_hidden(model, torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device))


def _layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return getattr(model.get_decoder(), family_of(model.config).layers)


@contextmanager
def _running(model: PreTrainedModel, layers: nn.ModuleList) -> Iterator[None]:
    name, decoder = family_of(model.config).layers, model.get_decoder()
    own = getattr(decoder, name)
    setattr(decoder, name, layers)
    try:
        yield
    finally:
        setattr(decoder, name, own)


class Walk:
    """Hidden states of some windows on their way through the decoder of a model, in eval mode.

        walk = Walk(model, windows.split(2), keep=len(windows))
        for index, layer in enumerate(layers):
            walk.forward(index, layer)
        gradients = [walk.last_gradient(batch, gradient_of) for batch in range(walk.num_batches)]
        for index, layer in reversed(list(enumerate(layers))):
            walk.backward(index, layer, gradients)

    Memory: `num_windows x T x hidden_size` values, on the device if the model stays there and on the host if not; with `keep` so
    many for every layer passed, on the host. On the device a batch's activations in one layer, backward with their graph.

    Args:
        batches: Token ids, `B x T` each.
        keep: Of so many batches the inputs of every layer are kept, so that they can be walked back: the first ones.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Tensor], keep: int = 0) -> None:
        self._model = model
        self._device = device_of(model)
        stays = all(parameter.device == self._device for parameter in _layers_of(model).parameters())
        self._home = self._device if stays else torch.device("cpu")
        self._keep = keep
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._inputs: dict[int, list[Tensor]] = {}
        self.hidden = [self._entered(batch) for batch in batches]

    @property
    def num_batches(self) -> int:
        return len(self.hidden)

    @torch.no_grad()
    def forward(self, position: int, layer: nn.Module) -> None:
        """Let all batches pass a layer that is on the device.

        Args:
            position: Of the layer among those the model runs.
        """
        if self._keep:
            self._inputs[position] = [hidden.cpu() for hidden in self.hidden[: self._keep]]
        for batch, hidden in enumerate(self.hidden):
            self.hidden[batch] = self._home_again(self.through(position, layer, hidden))

    def through(self, position: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        """What a layer makes of one batch's hidden states, `B x T x hidden_size`, on the device."""
        call = self._calls[hidden.shape[:2]][position]
        return layer(hidden.to(self._device, non_blocking=True), *call.args, **call.kwargs)

    def last_hidden(self, batch: int, leaf: bool = False) -> tuple[Tensor, Tensor]:
        """Behind the last layer: a batch's hidden states, and what the head reads (`B x T x hidden_size` both).

        Args:
            leaf: Record how the second follows from the first.
        """
        hidden = self.hidden[batch].to(self._device).requires_grad_(leaf)
        with torch.set_grad_enabled(leaf):
            return hidden, leave(self._model, hidden)

    def last_gradient(self, batch: int, gradient_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient by a batch's hidden states behind the last layer, from that by what the head reads."""
        hidden, read = self.last_hidden(batch, leaf=True)
        read.backward(gradient_of(read.detach()))
        return self._home_again(hidden.grad)  # type: ignore[arg-type]

    @torch.enable_grad()
    def backward(
        self,
        position: int,
        layer: nn.Module,
        *gradients: list[Tensor],
        on_pass: Callable[[int], None] = lambda number: None,
    ) -> None:
        """Take gradients by a layer's output, one for each kept batch, to those by its input.

        Args:
            gradients: Lists that are changed in place. Several are taken through one recomputation, in their order.
            on_pass: Told before each of them which it is.
        """
        for batch, hidden in enumerate(self._inputs.pop(position)):
            hidden = hidden.to(self._device, copy=True).requires_grad_()
            output = self.through(position, layer, hidden)
            for number, own in enumerate(gradients):
                hidden.grad = None
                on_pass(number)
                output.backward(own[batch].to(self._device), retain_graph=number + 1 < len(gradients))
                own[batch] = self._home_again(hidden.grad)  # type: ignore[arg-type]

    def _entered(self, batch: Tensor) -> Tensor:
        hidden, calls = enter(self._model, batch.to(self._device))
        self._calls.setdefault(tuple(batch.shape), calls)
        return self._home_again(hidden)

    def _home_again(self, hidden: Tensor) -> Tensor:
        return hidden.detach().to(self._home)
