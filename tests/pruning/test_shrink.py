"""The shrunk model computes what the masked one does, runs like any other and shares nothing with the dense one."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.compensation import CompensationTable
from pruning.errors import InvalidMask
from pruning.masks import PruningMask, Ranking, masked
from pruning.projection import Projection, matrix_of
from pruning.shrinking import shrink
from pruning.statistics import collect_statistics

PATTERNS = ["BBBBB", "ABMB-", "MABBB", "-BBMA", "MM-BB", "M-M-A"]
ONE_FAMILY = pytest.mark.parametrize("model", ["llama"], indirect=True)


@pytest.fixture
def full(anatomy: Anatomy, random_ranking: Callable[[Anatomy, int], Ranking]) -> PruningMask:
    return PruningMask.from_architecture(Architecture.full(anatomy), random_ranking(anatomy, 0))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_shrinking_equals_masking(
    model: PreTrainedModel,
    anatomy: Anatomy,
    windows: Tensor,
    random_mask: Callable[..., PruningMask],
    logits: Callable[[PreTrainedModel, Tensor], Tensor],
    pattern: str,
) -> None:
    for seed in range(2):
        mask = random_mask(anatomy, seed, pattern)
        with masked(model, mask):
            expected = logits(model, windows)
        torch.testing.assert_close(logits(shrink(model, mask), windows), expected, rtol=0, atol=1e-10)


def test_the_full_mask_gives_the_dense_model(
    model: PreTrainedModel,
    windows: Tensor,
    full: PruningMask,
    logits: Callable[[PreTrainedModel, Tensor], Tensor],
) -> None:
    small = shrink(model, full)
    assert torch.equal(logits(small, windows), logits(model, windows))
    assert small.config.to_dict() == model.config.to_dict()
    state = small.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("pattern", ["ABMB-", "MABBB"])
def test_cached_generation_equals_uncached(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_mask: Callable[..., PruningMask], pattern: str
) -> None:
    """Also past the sliding window, and when the first layers have no attention and so no cache."""
    mask = random_mask(anatomy, 0, pattern)
    small = shrink(model, mask)
    prompt = windows[:2, :8]

    def greedy(model: PreTrainedModel, use_cache: bool) -> tuple[Tensor, Tensor]:
        attend = torch.ones_like(prompt)
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True}
        out = model.generate(prompt, attention_mask=attend, use_cache=use_cache, output_logits=True, **options)
        return out.sequences, torch.stack(out.logits)

    with masked(model, mask):
        tokens, scores = greedy(model, use_cache=False)
    for use_cache in (False, True):
        found, found_scores = greedy(small, use_cache)
        assert torch.equal(found, tokens)
        torch.testing.assert_close(found_scores, scores, rtol=0, atol=1e-5)  # rotary angles are float32


@pytest.mark.parametrize("pattern", PATTERNS)
def test_decoding_in_pieces_equals_one_pass(
    model: PreTrainedModel,
    anatomy: Anatomy,
    windows: Tensor,
    random_mask: Callable[..., PruningMask],
    logits: Callable[[PreTrainedModel, Tensor], Tensor],
    pattern: str,
) -> None:
    """Without `generate`, which tells the positions: here the cache alone knows how far the text has come."""
    small = shrink(model, random_mask(anatomy, 0, pattern))
    pieces, cache = [], None
    with torch.no_grad():
        for piece in windows.split([4, 1, 3, 1, 1], dim=1):
            out = small(piece, past_key_values=cache, use_cache=True)
            pieces.append(out.logits)
            cache = out.past_key_values
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits(small, windows), rtol=0, atol=1e-5)


def test_the_dense_model_is_left_alone(
    model: PreTrainedModel,
    anatomy: Anatomy,
    windows: Tensor,
    random_mask: Callable[..., PruningMask],
    logits: Callable[[PreTrainedModel, Tensor], Tensor],
    unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]],
) -> None:
    expected = logits(model, windows)
    with unchanged(model):
        small = shrink(model, random_mask(anatomy, 0))
        with torch.no_grad():  # nothing done to the small model reaches the dense one
            for parameter in small.parameters():
                parameter.zero_()
        small.config.vocab_size = small.generation_config.pad_token_id = 3
    assert torch.equal(logits(model, windows), expected)
    assert model.generation_config.pad_token_id != 3


def test_no_storage_is_shared(
    model: PreTrainedModel, anatomy: Anatomy, full: PruningMask, random_mask: Callable[..., PruningMask]
) -> None:
    dense = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    for mask in (full, random_mask(anatomy, 0)):
        small = shrink(model, mask)
        tensors = [*small.parameters(), *small.buffers()]
        assert dense.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in tensors)
        # no parameter drags its dense original along
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in small.parameters())
        assert all(tensor.is_contiguous() for tensor in small.parameters())  # safetensors asks for it


@ONE_FAMILY
def test_the_dense_model_is_left_alone_by_a_wrong_mask(
    model: PreTrainedModel, unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]]
) -> None:
    with unchanged(model), pytest.raises(InvalidMask):
        shrink(model, PruningMask(torch.ones(5, 3, dtype=torch.bool), torch.ones(5, 24, dtype=torch.bool)))


def test_embeddings_stay_tied_or_untied(
    model: PreTrainedModel, anatomy: Anatomy, random_mask: Callable[..., PruningMask]
) -> None:
    small = shrink(model, random_mask(anatomy, 0))
    tied = small.get_output_embeddings().weight is small.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings == small.config.tie_word_embeddings


def test_the_config_tells_the_layers_left(
    model: PreTrainedModel, anatomy: Anatomy, random_mask: Callable[..., PruningMask]
) -> None:
    for pattern in PATTERNS:
        small = shrink(model, random_mask(anatomy, 0, pattern))
        left = len(pattern.replace("-", ""))
        assert small.config.num_hidden_layers == left == len(anatomy.layers_of(small))
        assert small.config is small.get_decoder().config
        assert len(getattr(small.config, "layer_types", None) or range(left)) == left
        small.config.validate()


def test_every_module_follows_the_config_of_the_shrunk_model(
    model: PreTrainedModel,
    anatomy: Anatomy,
    windows: Tensor,
    random_mask: Callable[..., PruningMask],
    logits: Callable[[PreTrainedModel, Tensor], Tensor],
) -> None:
    """Or `set_attn_implementation` would change the masks and leave the attention as it was."""
    small = shrink(model, random_mask(anatomy, 0))
    expected = logits(small, windows)
    small.set_attn_implementation("eager")
    assert {m.config._attn_implementation for m in small.modules() if hasattr(m, "config")} == {"eager"}
    torch.testing.assert_close(logits(small, windows), expected, rtol=0, atol=1e-4)  # eager's softmax is float32


def test_modules_tell_their_shapes(
    model: PreTrainedModel, anatomy: Anatomy, random_mask: Callable[..., PruningMask]
) -> None:
    def told(projection: Projection) -> tuple[int, int]:
        if isinstance(projection, Conv1D):
            return projection.nf, projection.nx
        return projection.out_features, projection.in_features

    projections = [m for m in shrink(model, random_mask(anatomy, 0)).modules() if isinstance(m, Projection)]
    assert all(told(projection) == matrix_of(projection).shape for projection in projections)
    assert len({told(projection) for projection in projections}) > 4


@ONE_FAMILY
def test_the_shrunk_model_can_be_trained_and_copied(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_mask: Callable[..., PruningMask]
) -> None:
    model.model.layers.requires_grad_(False)
    model.model.layers[0].self_attn.requires_grad_(True)
    small = shrink(model, random_mask(anatomy, 0, "BAMB-"))
    trained = {name for name, parameter in small.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}  # layer 0 stays layer 0
    twin = copy.deepcopy(small)
    loss = twin(windows, labels=windows).loss
    loss.backward()
    assert all((p.grad is not None and p.grad.abs().max() > 0) == p.requires_grad for p in twin.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ONE_FAMILY
def test_the_dtype_stays(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_ranking: Callable[[Anatomy, int], Ranking],
    random_architecture: Callable[..., Architecture], logits: Callable[[PreTrainedModel, Tensor], Tensor],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    model, ranking = model.to(dtype), random_ranking(anatomy, 0)
    table = CompensationTable(model, collect_statistics(model, windows), ranking)
    mask = PruningMask.from_architecture(random_architecture(anatomy, 0), ranking)
    for compensation in (None, table):
        small = shrink(model, mask, compensation)
        assert {parameter.dtype for parameter in small.parameters()} == {dtype}
        assert logits(small, windows).isfinite().all()


@ONE_FAMILY
def test_a_mask_that_the_compensation_was_not_made_for_is_refused(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_mask: Callable[..., PruningMask],
    random_ranking: Callable[[Anatomy, int], Ranking],
    unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]],
) -> None:  # fmt: skip
    table = CompensationTable(model, collect_statistics(model, windows), random_ranking(anatomy, 0))
    shrink(model, random_mask(anatomy, 0), table)
    with unchanged(model), pytest.raises(InvalidMask, match=r"Layer \d: .* (attention|mlp) units"):
        shrink(model, random_mask(anatomy, 1), table)
