"""A trial of a stored run -> a folder to deploy."""

from pkgutil import resolve_name
from typing import Any

from torch import nn

from llmbo.deploy.card import details, licence_of, model_card
from llmbo.deploy.request import ExportRequest
from llmbo.models.loading import LoadedModel
from llmbo.models.placement import DTYPES
from llmbo.run.rebuild import Cut, RebuildInputs, load_base
from llmbo.types import Phases
from pruning.anatomy import anatomy_of
from pruning.calibration import TokenWindows
from pruning.export import Pruned
from pruning.export.reader import Read
from pruning.export.rebuild import cast, is_stock, rebuilt
from pruning.export.verify import Check


def export(
    request: ExportRequest,
    command: str,
    phases: Phases,
    model: str | LoadedModel | None = None,
    device: str | None = None,
    read: Read | None = None,
) -> Check:
    """Cut the trial's model again and write it.

    Args:
        command: For the model card.
        model, device: As in `load_base`.
        read: As `started` gives it, which saves seconds.

    Raises:
        ModelError, StorageError, PruningError: One line for the user; nothing is left.
    """
    loaded, windows = base_of(request, phases, model, device)
    inputs = RebuildInputs.of(request.report, request.folder, loaded, windows, phases)
    return write(request, loaded, windows, inputs.cut(request.trial, phases, request.refit), command, phases, read)


def base_of(
    request: ExportRequest, phases: Phases, model: str | LoadedModel | None = None, device: str | None = None
) -> tuple[LoadedModel, TokenWindows]:
    """The model to cut the trial from, and the run's windows; refused if the format cannot hold what comes of it.

    Args:
        model, device: As in `load_base`.

    Raises:
        ModelError, StorageError, PruningError: One line for the user.
    """
    loaded, windows = load_base(request.report, request.folder, phases, model, device)
    resolve_name(request.format.check_model)(loaded.model, loaded.tokenizer, request.architecture)
    return loaded, windows


def write(
    request: ExportRequest,
    loaded: LoadedModel,
    windows: TokenWindows,
    cut: Cut,
    command: str,
    phases: Phases,
    read: Read | None = None,
    trained: tuple[dict[str, Any], str] = ({}, ""),
) -> Check:
    """Write what was cut, and read it back.

    Args:
        windows: The run's.
        command, read: As for `export`.
        trained: How it was trained since: for `llmbo.json`, and as a section of the model card.

    Raises:
        ModelError, StorageError, PruningError: One line for the user; nothing is left.
    """
    format, architecture, small = request.format, request.architecture, cut.model
    if request.target.note:
        phases.note(request.target.note)
    nn.Module.to(small, "cpu")
    if request.dtype in DTYPES:  # others are the writer's own
        cast(small, DTYPES[request.dtype])
    anatomy = anatomy_of(loaded.model)
    pruned = Pruned(small, anatomy, architecture, loaded.tokenizer)
    stock = not format.load_unequal or is_stock(rebuilt(small, anatomy, architecture))
    files = {
        "README.md": model_card(
            request, cut, licence_of(loaded), format.load if stock else format.load_unequal, command, trained[1]
        ),
        "llmbo.json": details(request, cut, command, trained[0]),
    }
    with phases.phase("writing and reading back", request.steps) as on_layer:
        check: Check = resolve_name(format.save)(
            pruned, request.out, files, **request.options(read, windows.calibration, on_layer)
        )
    return check
