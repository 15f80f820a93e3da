"""How coarsely a GGUF file stores each tensor: llama.cpp's mixtures by the names of its file types, or a recipe of the user's.

A file type is a type for matrices, with more bits where llama.cpp's `llama_model_quantize` (src/llama-quant.cpp) gives more: the head
(the embeddings, where they are the head) has at least `q6_k`, and mixtures "_m" have it for values and for the MLP's output in the first
and last eighth of the layers and every third between. Where rows are no multiple of a type's block a fatter type takes its place, as
there. Two things are not llama.cpp's: rows that no block of 32 divides are f16 under q8_0, q5_0 and q4_0 too, which it refuses to
quantise, and values of Llamas with 80 layers have no more bits than others.
"""

import ctypes
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from pruning.errors import UnsupportedExport
from pruning.export.gguf_tensors import Array

Shape = tuple[int, ...]
# What `--dtype` and `--quantize` may say -> the type of matrices, and what the file says it is.
FILE_TYPES = {
    "f32": (Type.F32, LlamaFileType.ALL_F32),
    "f16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": (Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": (Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q5_0": (Type.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_k_m": (Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q4_0": (Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
PLAIN = (Type.F32, Type.F16, Type.BF16)
RECIPE, SEARCHED = "recipe:", "searched:"
# A type whose blocks are 256 wide -> what llama.cpp takes where they do not fit, which has blocks of 32. What then does not fit is f16.
FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
BLOCKS = (Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0)
TYPES = {kind.name.lower(): kind for kind in (*PLAIN, *BLOCKS, *FALLBACKS)}


@dataclass(frozen=True)
class Mixture:
    """Which type each tensor should have.

    Args:
        name: A key of `FILE_TYPES`, or a recipe's file without its ending.
        kind: Of matrices that nothing else is said of.
        file_type: What the file says it is; None leaves llama.cpp to tell by what most tensors are.
        patterns: Regular expressions of tensors' names, the first that is found in a name counts, and types. They take the place of
            llama.cpp's rules.
        size: Of the file in bytes, at most, where types are still to be searched (`pruning.export.searched`).
    """

    name: str
    kind: Type
    file_type: LlamaFileType | None = None
    patterns: tuple[tuple[str, Type], ...] = ()
    size: int = 0

    @classmethod
    def of(cls, said: str) -> "Mixture":
        """From a key of `FILE_TYPES`, `recipe:FILE` with a JSON object of patterns and types (what no pattern finds is f16), or
        `searched:BYTES`.

        Raises:
            UnsupportedExport: None of them, or the file is no such object.
        """
        if said in FILE_TYPES:
            return cls(said, *FILE_TYPES[said])
        if said.startswith(SEARCHED) and (size := said.removeprefix(SEARCHED)).isdecimal():
            return cls(SEARCHED[:-1], Type.Q8_0, size=int(size))
        if not said.startswith(RECIPE):
            raise UnsupportedExport(
                f"Unknown GGUF type '{said}': expected one of {', '.join(FILE_TYPES)}, {RECIPE}FILE or {SEARCHED}BYTES."
            )
        path = Path(said.removeprefix(RECIPE)).expanduser()
        try:
            patterns = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(patterns, dict) or not patterns:
                raise ValueError('it needs an object such as {"ffn_down": "q8_0", ".": "q4_0"}')
            for pattern, kind in patterns.items():
                re.compile(pattern)
                if kind not in TYPES:
                    raise ValueError(
                        f"unknown type {json.dumps(kind)} of '{pattern}': expected one of {', '.join(TYPES)}"
                    )
        except (OSError, ValueError, re.error) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UnsupportedExport(f"The recipe '{path}' cannot be used: {reason}.") from error
        return cls(path.stem, Type.F16, None, tuple((pattern, TYPES[kind]) for pattern, kind in patterns.items()))

    def check_library(self, hidden_size: int) -> None:
        """Refuse early what `quantised` would refuse of a model's layers or head.

        Raises:
            UnsupportedExport: Some are K-quants, and llama.cpp's library is not there.
        """
        if self.size:
            return check_library(searched_kinds(hidden_size))
        head = fitting(self.wanted("output.weight", hidden_size, head=True, more=False), hidden_size)
        check_library([self.kind, head, *(kind for _, kind in self.patterns)])

    def wanted(self, name: str, columns: int, head: bool, more: bool) -> Type:
        """What llama.cpp's rules say of a matrix, whether its rows fit or not.

        Args:
            head: Whether it is what logits are made with.
            more: Whether `more_bits` says so of its layer.
        """
        if self.kind in PLAIN:
            return self.kind
        if name == "position_embd.weight":
            return Type.F16
        if head and self.kind != Type.Q8_0:
            return Type.Q6_K if columns % gguf.GGML_QUANT_SIZES[self.kind][0] == 0 else Type.Q8_0
        return Type.Q6_K if more and self.name.endswith("_m") and (is_value(name) or is_down(name)) else self.kind


def searched_kinds(hidden_size: int) -> tuple[Type, ...]:
    """Types that a search tries, from fine to coarse: K-quants where their blocks divide the hidden size."""
    divides = hidden_size % gguf.GGML_QUANT_SIZES[Type.Q4_K][0] == 0
    return (Type.Q8_0, Type.Q6_K, Type.Q5_K, Type.Q4_K) if divides else (Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_0)


@dataclass(frozen=True)
class Stored:
    """What a tensor is stored as.

    Args:
        wanted: What it would be if its rows fitted.
    """

    kind: Type
    wanted: Type
    shape: Shape

    @classmethod
    def of(cls, wanted: Type, shape: Shape) -> "Stored":
        return cls(fitting(wanted, shape[-1]), wanted, shape)

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape, dtype=np.int64)) // block * size

    @property
    def padded(self) -> int:
        """Bytes in a file, where every tensor begins at a multiple."""
        return -(-self.nbytes // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT


def storage(shapes: Mapping[str, Shape], mixture: Mixture) -> dict[str, Stored]:
    """What each tensor of a file is stored as. Vectors are float32.

    Args:
        shapes: Of all tensors, by GGUF's names.

    Raises:
        UnsupportedExport: A pattern of a recipe finds no matrix.
    """
    matrices = sorted((name for name, shape in shapes.items() if len(shape) > 1), key=_place)
    said = (_recipe if mixture.patterns else _mixed)(matrices, shapes, mixture)
    wanted = dict.fromkeys(shapes, Type.F32) | dict(said)
    return {name: Stored.of(wanted[name], shape) for name, shape in shapes.items()}


def told(plan: Mapping[str, Stored]) -> tuple[str, ...]:
    """What a file's tensors are stored as, and which would have been something else if their rows fitted, a line each."""
    kinds: dict[Type, list[Stored]] = {}
    fallen: dict[tuple[Type, Type], dict[str, Stored]] = {}
    for name, stored in plan.items():
        kinds.setdefault(stored.kind, []).append(stored)
        if stored.kind != stored.wanted:
            fallen.setdefault((stored.wanted, stored.kind), {})[name] = stored
    sizes = {kind: sum(stored.nbytes for stored in some) / 1e6 for kind, some in kinds.items()}
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)
    parts = [f"{len(kinds[kind])} {kind.name.lower()} ({sizes[kind]:.1f} MB)" for kind in largest]
    lines = [f"Tensors: {', '.join(parts)}."]
    for (wanted, kind), some in fallen.items():
        rows = sorted({stored.shape[-1] for stored in some.values()})
        block, _ = gguf.GGML_QUANT_SIZES[wanted]
        lines.append(
            f"{kind.name.lower()} instead of {wanted.name.lower()}, whose blocks of {block} do not divide rows of "
            f"{', '.join(map(str, rows))}: {len(some)} tensors ({', '.join(dict.fromkeys(map(without_layer, some)))})."
        )
    return tuple(lines)


def without_layer(name: str) -> str:
    return re.sub(r"^blk\.\d+\.", "blk.N.", name)


def fitting(kind: Type, columns: int) -> Type:
    """The type, or what takes its place in rows of `columns` that its blocks do not divide."""
    for found in (kind, FALLBACKS.get(kind, kind)):
        if columns % gguf.GGML_QUANT_SIZES[found][0] == 0:
            return found
    return Type.F16


def _place(name: str) -> tuple[int, str]:
    """Layers as they follow one another, which is how llama.cpp counts them."""
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name)


def _recipe(names: Sequence[str], shapes: Mapping[str, Shape], mixture: Mixture) -> Iterator[tuple[str, Type]]:
    for pattern, _ in mixture.patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UnsupportedExport(
                f"The recipe '{mixture.name}' has the pattern '{pattern}', which no matrix of this model matches; "
                f"there are {', '.join(dict.fromkeys(map(without_layer, names)))}."
            )
    for name in names:
        kinds = (kind for pattern, kind in mixture.patterns if re.search(pattern, name))
        yield name, next(kinds, mixture.kind)


def _mixed(names: Sequence[str], shapes: Mapping[str, Shape], mixture: Mixture) -> Iterator[tuple[str, Type]]:
    """llama.cpp's rules."""
    head = "output.weight" if "output.weight" in names else "token_embd.weight"
    values, downs = ([name for name in names if is_one(name)] for is_one in (is_value, is_down))
    places = {name: (index, len(some)) for some in (values, downs) for index, name in enumerate(some)}
    for name in names:
        more = name in places and bool(more_bits(*places[name]))
        yield name, mixture.wanted(name, shapes[name][-1], name == head, more)


def is_value(name: str) -> bool:
    return name.endswith(("attn_v.weight", "attn_qkv.weight"))


def is_down(name: str) -> bool:
    return name.endswith("ffn_down.weight")


def more_bits(index: Any, number: Any) -> Any:
    """Whether a mixture "_m" has more bits for the values or the MLP output of layer `index` of `number`, which may be tensors."""
    eighth = number // 8
    return (index < eighth) | (index >= 7 * number // 8) | ((index - eighth) % 3 == 2)


def quantised(values: Array, kind: Type, importance: Array | None = None) -> "np.ndarray[Shape, np.dtype[np.generic]]":
    """The values as they are stored.

    Args:
        importance: How much an error in each column counts, `columns`; K-quants go by it.

    Raises:
        UnsupportedExport: A K-quant, and llama.cpp's library is not there.
    """
    if kind not in FALLBACKS:
        return gguf.quants.quantize(values, kind)
    values, (block, size) = np.ascontiguousarray(values, dtype=np.float32), gguf.GGML_QUANT_SIZES[kind]
    rows, columns = values.shape
    found = np.empty((rows, columns // block * size), dtype=np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32).ctypes.data
    written = _ggml().ggml_quantize_chunk(int(kind), values.ctypes.data, found.ctypes.data, 0, rows, columns, weights)
    assert written == found.nbytes
    return found


def check_library(kinds: Iterable[Type]) -> None:
    """Refuse early what `quantised` would refuse.

    Raises:
        UnsupportedExport: There are K-quants among the types, and llama.cpp's library is not there.
    """
    if not FALLBACKS.keys().isdisjoint(kinds):
        _ggml()


@cache
def _ggml() -> ctypes.CDLL:
    """llama.cpp's own library, as llama-cpp-python brings it."""
    package = importlib.util.find_spec("llama_cpp")
    found = sorted(Path(package.origin).parent.glob("lib/*ggml-base.*")) if package and package.origin else []
    if not found:
        raise UnsupportedExport(
            "The types q4_k, q5_k and q6_k, which some tensors of this file need, are made by llama.cpp's own library, and that is not "
            f"here: pip install 'llmbo[llama-cpp]', or take q8_0 or a {RECIPE}FILE of types without 'k'."
        )
    library = ctypes.CDLL(str(found[0]))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
