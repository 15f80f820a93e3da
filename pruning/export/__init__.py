"""Shrunk models as files that load where people deploy: Hugging Face folders and GGUF.

Names are looked up on first use (PEP 562), so that a process which reads results back can be started before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pruning.export.hf import Pruned, load_pruned, save_hf, save_padded
    from pruning.export.llama_cpp import save_gguf
    from pruning.export.vllm import save_vllm

__all__ = ["Pruned", "load_pruned", "save_gguf", "save_hf", "save_padded", "save_vllm"]

if not TYPE_CHECKING:  # a checker would take every name for one that is there

    def __getattr__(name: str) -> Any:
        if name in __all__:
            owner = {"save_gguf": "llama_cpp", "save_vllm": "vllm"}.get(name, "hf")
            return getattr(import_module(f"pruning.export.{owner}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
