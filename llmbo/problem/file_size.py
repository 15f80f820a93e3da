"""The size of what a candidate would be exported as, by arithmetic."""

from pkgutil import resolve_name

from llmbo.config import RunConfig
from llmbo.config.formats import FORMATS, title
from llmbo.models.loading import LoadedModel
from llmbo.models.placement import DTYPES
from llmbo.problem.space import CostFunction
from pruning.export.folder_size import FolderSize
from pruning.export.gguf_size import GgufSize
from pruning.export.quantise import Mixture


def file_costs(config: RunConfig, loaded: LoadedModel) -> dict[str, CostFunction]:
    """`file_bytes`, if anybody wants to know."""
    if not (kind := config.counted_type):
        return {}
    format = FORMATS[config.counted_format]
    if format.quantised:
        return {"file_bytes": GgufSize(loaded.model, loaded.tokenizer, Mixture.of(kind), title(loaded.name))}
    held = {"held": resolve_name(format.held)} if format.held else {}
    return {"file_bytes": FolderSize(loaded.model, DTYPES[loaded.dtype], **held)}
