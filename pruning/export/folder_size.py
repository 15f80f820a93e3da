"""How many bytes the safetensors files of a sub-network have, to the byte, by arithmetic alone.

A file is the length of its header (8 bytes), the header (JSON, padded to a multiple of 8) and the tensors by name. Of each the header
tells shape, beginning and end, so that its length follows from how many digits these have.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.errors import UnsupportedExport
from pruning.export.hf import Pruned
from pruning.export.rebuild import is_uniform, stock_config
from pruning.shrinking import shrink_to
from pruning.widths import lacking_of, units_of

HEADER = '{"__metadata__":{"format":"pt"}}'  # and an entry for each tensor
ENTRY = ',"{name}":{{"dtype":"{dtype}","shape":[{commas}],"data_offsets":[,]}}'  # and numbers
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in this order
POWERS = 10 ** torch.arange(1, 19)
LARGEST = 5 * 10**9  # `MAX_SHARD_SIZE`
AT_ONCE = 1024  # models


class FolderSize:
    """Bytes of the safetensors files of any sub-network of one model.

    Args:
        model: The dense one, wherever its weights are: only shapes and config are looked at.
        dtype: Of the weights in the folder; buffers keep their own.
        held: What the folder holds of a pruned model, in other words than the model itself: `pruning.export.vllm.decilm`.
        max_shard_size: Bytes of the largest file.
        stock: Count what a stock class is written as, under the names of old that some have, and not what holds unequal layers.

    Raises:
        UnsupportedExport: The format cannot hold the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype,
        held: Callable[[Pruned], PreTrainedModel] = lambda pruned: pruned.model,
        max_shard_size: int = LARGEST,
        stock: bool = False,
    ) -> None:
        self.anatomy, self.max_shard_size = anatomy_of(model), max_shard_size
        layers, groups, neurons = self._dense
        config: Any = copy.deepcopy(model.config)
        with torch.device("meta"):
            self.empty = type(model)(config)

        def holds(kv_groups: tuple[int, ...], neurons: tuple[int, ...], lacking: int = 0) -> PreTrainedModel:
            architecture = Architecture(kv_groups, neurons, (lacking,) * layers)
            return held(Pruned(shrink_to(self.empty, architecture), self.anatomy, architecture))

        every, all_neurons, none = (groups,) * layers, (neurons,) * layers, (0,) * (layers - 1)
        whole = holds(every, all_neurons)
        dense = fewer = lacking = _shapes(whole)
        with suppress(UnsupportedExport):  # a format that keeps all heads or none
            fewer = _shapes(holds((1,) * layers, all_neurons))
            if self.anatomy.attention.queries > 1:
                lacking = _shapes(holds(every, all_neurons, 1))
        thinner, no_mlp = (_shapes(holds(every, (kept,) * layers)) for kept in (1, 0))
        first, last = (
            _shapes(holds(kept, all_neurons)) for kept in ((groups, *none), (*none, groups))
        )  # alone attends
        # The layer of each tensor, `num_layers` for none, and whether it is there in layers with neither block, with attention alone,
        # with an MLP alone, and with both.
        places = {name: int(next((part for part in name.split(".") if part.isdigit()), layers)) for name in dense}
        self.place = torch.tensor(list(places.values()))
        self.there = torch.tensor(
            [
                (False, name in no_mlp, name in (first if at == layers - 1 else last), True)
                for name, at in places.items()
            ]
        )
        self.shape, of_fewer, of_lacking, of_thinner = (
            _padded(own[name] for name in dense) for own in (dense, fewer, lacking, thinner)
        )
        self.per_group = (self.shape - of_fewer) // max(1, groups - 1)
        self.per_query = (self.shape - of_lacking) // groups
        self.per_neuron = (self.shape - of_thinner) // max(1, neurons - 1)
        self.dims = torch.arange(self.shape.shape[1]) < torch.tensor([len(shape) for shape in dense.values()])[:, None]

        buffers, state = dict(model.named_buffers()), whole.state_dict()
        dtypes = [buffers[name].dtype if name in buffers else dtype for name in dense]
        old = [next(iter(revert_weight_conversion(whole, {name: state[name]}))) for name in dense]
        names, tensors = old if stock else list(dense), range(len(dense))
        self.itemsize = torch.tensor([own.itemsize for own in dtypes])
        self.told = torch.tensor(
            [
                len(ENTRY.format(name=name, dtype=DTYPES[own], commas="," * (len(shape) - 1)))
                for name, own, shape in zip(names, dtypes, dense.values(), strict=True)
            ]
        )
        kinds, natural = list(DTYPES), [dot_natural_key(name) for name in dense]
        self.by_name = torch.tensor(sorted(tensors, key=lambda index: (kinds.index(dtypes[index]), names[index])))
        self.dealt = torch.tensor(sorted(tensors, key=natural.__getitem__) if stock else tensors)  # to the files
        self.of_stock = None if stock or old == names else FolderSize(model, dtype, held, max_shard_size, stock=True)

    @property
    def _dense(self) -> tuple[int, int, int]:
        return self.anatomy.num_hidden_layers, self.anatomy.num_key_value_heads, self.anatomy.intermediate_size

    def __call__(self, kv_groups: Tensor, neurons: Tensor) -> Tensor:
        """`batch_shape x num_layers` widths -> `batch_shape` bytes, int64."""
        groups, neurons = (units.reshape(-1, units.shape[-1]).long() for units in (kv_groups, neurons))
        found = torch.cat(
            [self._bytes(*parts) for parts in zip(groups.split(AT_ONCE), neurons.split(AT_ONCE), strict=True)]
        )
        if self.of_stock is not None:
            for index, own in enumerate(zip(groups.tolist(), neurons.tolist(), strict=True)):
                architecture = Architecture.of(*own)
                equal = is_uniform(architecture)
                if equal and stock_config(self.empty, self.anatomy, max(own[0]), max(own[1])) is not None:
                    found[index] = self.of_stock(groups[index], neurons[index])
        return found.view(kv_groups.shape[:-1])

    def _bytes(self, groups: Tensor, neurons: Tensor) -> Tensor:
        """`n x num_layers` -> `n`."""
        order = ((groups == 0) & (neurons == 0)).int().argsort(dim=1, stable=True)  # what is left moves up
        _, *most = self._dense
        groups, neurons = (  # of each tensor's layer; all of them outside of layers
            torch.cat([units.gather(1, order), units.new_full((len(units), 1), full)], 1)[:, self.place]
            for units, full in zip((groups, neurons), most, strict=True)
        )
        there = self.there[torch.arange(len(self.place)), (groups > 0) + 2 * (neurons > 0).long()]
        kept, lacking = units_of(groups)[..., None], lacking_of(groups)[..., None]
        shape = self.shape - self.per_group * (most[0] - kept) - self.per_query * kept * lacking
        shape = shape - self.per_neuron * (most[1] - neurons)[..., None]
        sizes = self.itemsize * shape.prod(-1) * there
        told = self.told + (_digits(shape) * self.dims).sum(-1)
        files, total = self._files(sizes), torch.zeros(len(sizes), dtype=torch.int64)
        for file in range(int(files.max()) + 1):
            own = (there & (files == file))[:, self.by_name]
            held = sizes[:, self.by_name] * own
            ends = held.cumsum(1)
            header = len(HEADER) + ((told[:, self.by_name] + _digits(ends - held) + _digits(ends)) * own).sum(1)
            total += (8 + -(-header // 8) * 8 + ends[:, -1]) * own.any(1)
        return total

    def _files(self, sizes: Tensor) -> Tensor:
        """The file of every tensor, as huggingface_hub deals them out: `n x tensors` bytes -> numbers from 0."""
        files = torch.zeros_like(sizes)
        if bool((sizes.sum(1) <= self.max_shard_size).all()):
            return files
        current, last, filled = torch.zeros(3, len(sizes), dtype=torch.int64)
        for index in self.dealt.tolist():
            size = sizes[:, index]
            alone = size > self.max_shard_size
            full = ~alone & (filled + size > self.max_shard_size)
            last = last + (alone | full)
            current, filled = torch.where(full, last, current), torch.where(full, 0, filled) + size * ~alone
            files[:, index] = torch.where(alone, last, current)
        return files


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Of all that is stored, in its order; of tied weights the first."""
    state = model.state_dict(keep_vars=True)
    once = {id(values): name for name, values in reversed(state.items())}
    return {name: tuple(values.shape) for name, values in state.items() if once[id(values)] == name}


def _padded(shapes: Iterable[tuple[int, ...]]) -> Tensor:
    return pad_sequence([torch.tensor(shape, dtype=torch.int64) for shape in shapes], batch_first=True, padding_value=1)


def _digits(numbers: Tensor) -> Tensor:
    """Of whole numbers from 0."""
    return 1 + torch.searchsorted(POWERS, numbers.contiguous(), right=True)
