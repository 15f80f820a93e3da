"""Shrunk models as files that load where people deploy: Hugging Face folders and GGUF."""

from pruning.export.hf import Pruned, load_pruned, save_hf, save_padded
from pruning.export.llama_cpp import save_gguf

__all__ = ["Pruned", "load_pruned", "save_gguf", "save_hf", "save_padded"]
