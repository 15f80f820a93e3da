"""Cut a pretrained decoder: score its units, choose widths, refit what is left, save the smaller model.

    statistics = collect_statistics(model, windows)
    ranking = surgeon_ranking(model, statistics)
    table = CompensationTable(model, statistics, ranking)
    full = Architecture.full(anatomy_of(model))
    architecture = Architecture(full.kv_groups, tuple(width // 2 for width in full.neurons))
    with Supernet(model, ranking, table) as supernet:  # measures any sub-network without copying it
        measured = supernet.quality(architecture, windows)
    small = shrink(model, PruningMask.from_architecture(architecture, ranking), table)

`model` is a Hugging Face model of a family in `pruning.families`, `windows` are `num_windows x length` token ids (`cut_windows`).
Names are looked up on first use (PEP 562): importing this package loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pruning.anatomy import Anatomy as Anatomy
    from pruning.anatomy import anatomy_of as anatomy_of
    from pruning.architecture import Architecture as Architecture
    from pruning.block import Block as Block
    from pruning.calibration import TokenWindows as TokenWindows
    from pruning.calibration import cut_windows as cut_windows
    from pruning.compensation import CompensationTable as CompensationTable
    from pruning.cost import Cost as Cost
    from pruning.cost import Serving as Serving
    from pruning.cost import cost_of as cost_of
    from pruning.errors import DamagedTensors as DamagedTensors
    from pruning.errors import ExportFailed as ExportFailed
    from pruning.errors import InvalidArchitecture as InvalidArchitecture
    from pruning.errors import InvalidFamily as InvalidFamily
    from pruning.errors import InvalidMask as InvalidMask
    from pruning.errors import NotEnoughText as NotEnoughText
    from pruning.errors import PruningError as PruningError
    from pruning.errors import UnreadableItems as UnreadableItems
    from pruning.errors import UnreadableText as UnreadableText
    from pruning.errors import UnsupportedExport as UnsupportedExport
    from pruning.errors import UnsupportedModel as UnsupportedModel
    from pruning.export import Pruned as Pruned
    from pruning.export import load_pruned as load_pruned
    from pruning.export import save_gguf as save_gguf
    from pruning.export import save_hf as save_hf
    from pruning.export import save_padded as save_padded
    from pruning.export import save_vllm as save_vllm
    from pruning.family import Family as Family
    from pruning.family import Places as Places
    from pruning.importance import Importance as Importance
    from pruning.importance import activation as activation
    from pruning.importance import block_influence as block_influence
    from pruning.importance import fisher as fisher
    from pruning.importance import fluctuation as fluctuation
    from pruning.importance import layer_scores as layer_scores
    from pruning.importance import magnitude as magnitude
    from pruning.importance import taylor as taylor
    from pruning.likelihood import DenseDistribution as DenseDistribution
    from pruning.likelihood import Quality as Quality
    from pruning.likelihood import dense_distribution as dense_distribution
    from pruning.likelihood import quality as quality
    from pruning.masks import PruningMask as PruningMask
    from pruning.masks import Ranking as Ranking
    from pruning.masks import masked as masked
    from pruning.sampling import sample_windows as sample_windows
    from pruning.shrinking import shrink as shrink
    from pruning.statistics import Statistics as Statistics
    from pruning.statistics import collect_statistics as collect_statistics
    from pruning.supernet import Supernet as Supernet
    from pruning.surgeon import surgeon_ranking as surgeon_ranking
    from pruning.text import read_mix as read_mix
    from pruning.text import read_text as read_text

_HOME = {
    "anatomy": ("Anatomy", "anatomy_of"),
    "architecture": ("Architecture",),
    "block": ("Block",),
    "calibration": ("TokenWindows", "cut_windows"),
    "compensation": ("CompensationTable",),
    "cost": ("Cost", "Serving", "cost_of"),
    "errors": (
        "DamagedTensors",
        "ExportFailed",
        "InvalidArchitecture",
        "InvalidFamily",
        "InvalidMask",
        "NotEnoughText",
        "PruningError",
        "UnreadableItems",
        "UnreadableText",
        "UnsupportedExport",
        "UnsupportedModel",
    ),
    "export": ("Pruned", "load_pruned", "save_gguf", "save_hf", "save_padded", "save_vllm"),
    "family": ("Family", "Places"),
    "importance": (
        "Importance",
        "activation",
        "block_influence",
        "fisher",
        "fluctuation",
        "layer_scores",
        "magnitude",
        "taylor",
    ),
    "likelihood": ("DenseDistribution", "Quality", "dense_distribution", "quality"),
    "masks": ("PruningMask", "Ranking", "masked"),
    "sampling": ("sample_windows",),
    "shrinking": ("shrink",),
    "statistics": ("Statistics", "collect_statistics"),
    "supernet": ("Supernet",),
    "surgeon": ("surgeon_ranking",),
    "text": ("read_mix", "read_text"),
}
__all__ = [name for names in _HOME.values() for name in names]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # a checker would take every name for one that is there

    def __getattr__(name: str) -> Any:
        for module, names in _HOME.items():
            if name in names:
                return getattr(import_module(f"pruning.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
