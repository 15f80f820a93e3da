"""Families that are built like others obey the laws that their rows could break, each with one sub-network of every kind of layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.cost import cost_of
from pruning.export import Pruned, load_pruned
from pruning.export.hf import padded
from pruning.export.rebuild import rebuilt
from pruning.families import FAMILIES
from pruning.likelihood import Head, last_hidden
from pruning.masks import PruningMask, Ranking, masked
from pruning.refusals import REASONS
from pruning.shrinking import shrink, shrink_to
from pruning.supernet import Supernet

SINGLE = {"rtol": 0, "atol": 1e-4}  # some compute scores or positions in float32 whatever the weights are


def test_a_lookalike_obeys_the_laws(
    lookalike: PreTrainedModel, windows: Tensor, logits: Any, tmp_path: Path,
    random_architecture: Callable[..., Architecture], random_ranking: Callable[..., Ranking],
) -> None:  # fmt: skip
    if lookalike.config.model_type == "xglm":
        lookalike.float()  # its masks are too large for float64
    anatomy = anatomy_of(lookalike)
    architecture, ranking = random_architecture(anatomy, 1, "MAB-B"), random_ranking(anatomy, 1)
    mask = PruningMask.from_architecture(architecture, ranking)
    small = shrink(lookalike, mask)
    expected = logits(small, windows)
    assert cost_of(anatomy, architecture).parameters == small.num_parameters()
    with masked(lookalike, mask):
        close = SINGLE if lookalike.config.model_type in ("gptj", "xglm") else {"rtol": 0, "atol": 1e-9}
        torch.testing.assert_close(logits(lookalike, windows), expected, **close)
        torch.testing.assert_close(Head.of(lookalike)(last_hidden(lookalike, windows)).detach(), expected, **SINGLE)
    with Supernet(lookalike, ranking) as supernet, supernet.active(architecture) as active:
        torch.testing.assert_close(logits(active, windows), expected, **SINGLE)
    rebuilt(small, anatomy, architecture).save_pretrained(tmp_path)
    reloaded = load_pruned(tmp_path)
    pieces, cache = [], None
    with torch.no_grad():
        for piece in windows.split([6, 1, 3], dim=1):
            out = reloaded(piece, past_key_values=cache, use_cache=True)
            pieces.append(out.logits)
            cache = out.past_key_values
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **SINGLE)
    torch.testing.assert_close(logits(padded(Pruned(small, anatomy, architecture)), windows), expected, **SINGLE)


def test_equal_layers_whose_norms_go_by_a_size_of_heads_that_no_stock_config_tells(
    build: Callable[[str], PreTrainedModel], windows: Tensor, logits: Any
) -> None:
    model, architecture = build("phi-normed"), Architecture((1,) * 5, (8,) * 5)
    pruned = Pruned(shrink_to(model, architecture), anatomy_of(model), architecture)
    expected = logits(pruned.model, windows)
    for held in (rebuilt(pruned.model, pruned.anatomy, architecture), padded(pruned)):
        torch.testing.assert_close(logits(held, windows), expected, **SINGLE)


def test_every_causal_language_model_is_a_row_or_has_a_reason() -> None:
    own = {CONFIG_MAPPING_NAMES[name] for name in FAMILIES if name in CONFIG_MAPPING_NAMES}
    left = {
        name
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if name not in REASONS and CONFIG_MAPPING_NAMES[name] not in own  # 'gpt-sw3' is a GPT-2
    }
    assert left == set() and not {*REASONS} & {*FAMILIES}
