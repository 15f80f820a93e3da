"""A candidate in the resident model computes what its shrunk model computes, costs no copy, and leaves no trace."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.compensation import CompensationTable
from pruning.errors import InvalidArchitecture, InvalidMask
from pruning.importance import activation
from pruning.likelihood import dense_distribution, quality
from pruning.masks import PruningMask, Ranking, masked
from pruning.projection import Projection
from pruning.shrinking import shrink
from pruning.statistics import collect_statistics
from pruning.supernet import Supernet, absent

ONE_FAMILY = pytest.mark.parametrize("model", ["llama-biased"], indirect=True)


@pytest.fixture
def ranking(anatomy: Anatomy, random_ranking: Callable[[Anatomy, int], Ranking]) -> Ranking:
    return random_ranking(anatomy, 0)


@pytest.fixture
def compensation(model: PreTrainedModel, windows: Tensor, ranking: Ranking) -> CompensationTable:
    return CompensationTable(model, collect_statistics(model, windows), ranking)


@pytest.mark.parametrize("pattern", ["ABMB-", "M-BBA", "BB-MB"])
def test_a_candidate_without_compensation_is_the_masked_model(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, ranking: Ranking,
    random_architecture: Callable[..., Architecture], logits: Callable[[PreTrainedModel, Tensor], Tensor], pattern: str,
) -> None:  # fmt: skip
    architecture = random_architecture(anatomy, 3, pattern)
    mask = PruningMask.from_architecture(architecture, ranking)
    with masked(model, mask):
        expected, loss = logits(model, windows), quality(model, windows).loss
    with Supernet(model, ranking) as supernet:
        with supernet.active(architecture) as candidate:
            torch.testing.assert_close(logits(candidate, windows), expected, rtol=0, atol=1e-10)
        assert supernet.loss(architecture, windows) == pytest.approx(loss, abs=1e-10)
    assert quality(shrink(model, mask), windows).loss == pytest.approx(loss, abs=1e-10)


@pytest.mark.parametrize("pattern", ["ABMB-", "M-BBA", "BB-MB"])
def test_a_candidate_with_compensation_is_the_repaired_shrunk_model(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, ranking: Ranking, compensation: CompensationTable,
    random_architecture: Callable[..., Architecture], logits: Callable[[PreTrainedModel, Tensor], Tensor], pattern: str,
) -> None:  # fmt: skip
    architecture = random_architecture(anatomy, 3, pattern)
    mask = PruningMask.from_architecture(architecture, ranking)
    dense = dense_distribution(model, windows)
    with Supernet(model, ranking, compensation) as supernet:
        with supernet.active(architecture) as candidate:
            found = logits(candidate, windows)
        measured = supernet.quality(architecture, windows, dense)
    small = shrink(model, mask, compensation)
    torch.testing.assert_close(found, logits(small, windows), rtol=0, atol=1e-10)
    expected = quality(small, windows, dense)
    assert (measured.loss, measured.kl) == pytest.approx((expected.loss, expected.kl), abs=1e-10)
    assert (found - logits(shrink(model, mask), windows)).abs().max() > 0.1  # the repair did something


def test_the_full_architecture_is_the_untouched_model(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, ranking: Ranking, compensation: CompensationTable,
    logits: Callable[[PreTrainedModel, Tensor], Tensor],
) -> None:  # fmt: skip
    expected, dense = logits(model, windows), dense_distribution(model, windows)
    untouched = quality(model, windows, dense)
    for table in (None, compensation):
        with Supernet(model, ranking, table) as supernet:
            with supernet.active(Architecture.full(anatomy)) as candidate:
                torch.testing.assert_close(logits(candidate, windows), expected, rtol=0, atol=1e-10)
            found = supernet.quality(Architecture.full(anatomy), windows, dense)
        assert (found.loss, found.kl) == pytest.approx((untouched.loss, untouched.kl), abs=1e-10)


def test_a_result_does_not_depend_on_the_candidates_before(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, ranking: Ranking, compensation: CompensationTable,
    random_architecture: Callable[..., Architecture],
) -> None:  # fmt: skip
    architectures = [random_architecture(anatomy, seed) for seed in range(4)]
    with Supernet(model, ranking, compensation) as supernet:
        losses = [supernet.loss(architecture, windows) for architecture in architectures]
        assert [supernet.loss(a, windows) for a in reversed(architectures)] == losses[::-1]
    assert len(set(losses)) == 4


def test_the_model_is_restored_bit_for_bit(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, ranking: Ranking, compensation: CompensationTable,
    random_architecture: Callable[..., Architecture],
    unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]],
) -> None:  # fmt: skip
    anatomy.mlp.output_of(anatomy.layers_of(model)[1]).weight.requires_grad_(False)
    for table in (None, compensation):
        with unchanged(model), Supernet(model, ranking, table) as supernet:
            for seed in range(3):
                with unchanged(model):  # sorted, but the same after each candidate
                    supernet.loss(random_architecture(anatomy, seed), windows)


def test_the_model_is_restored_when_something_raises(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, ranking: Ranking, compensation: CompensationTable,
    random_architecture: Callable[..., Architecture],
    unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]],
) -> None:  # fmt: skip
    architecture = random_architecture(anatomy, 0)
    with unchanged(model), pytest.raises(KeyboardInterrupt), Supernet(model, ranking, compensation):
        raise KeyboardInterrupt
    with unchanged(model), Supernet(model, ranking, compensation) as supernet:
        expected = supernet.loss(architecture, windows)
        with unchanged(model), pytest.raises(KeyboardInterrupt), supernet.active(architecture):
            raise KeyboardInterrupt
        assert supernet.loss(architecture, windows) == expected
    supernet = Supernet(model, ranking)
    with unchanged(model), pytest.raises(KeyboardInterrupt), supernet, supernet.active(architecture):
        raise KeyboardInterrupt


@ONE_FAMILY
def test_the_model_is_restored_when_a_candidate_cannot_be_set_up(
    model: PreTrainedModel, anatomy: Anatomy, ranking: Ranking, compensation: CompensationTable,
    unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    solve = compensation.weight

    def out_of_memory(layer: int, *args: object) -> Tensor:
        if layer == 3:
            raise MemoryError
        return solve(layer, *args)

    monkeypatch.setattr(compensation, "weight", out_of_memory)
    with Supernet(model, ranking, compensation) as supernet, unchanged(model):
        with pytest.raises(MemoryError), supernet.active(Architecture((1,) * 5, (7,) * 5)):
            pass
        with pytest.raises(InvalidArchitecture), supernet.active(Architecture((1,) * 5, (25,) * 5)):
            pass


@ONE_FAMILY
@pytest.mark.parametrize(("layers", "groups", "neurons"), [(5, 2, 23), (5, 1, 24), (5, 2, 1), (4, 2, 24)])
def test_a_ranking_of_another_model_is_refused_before_anything_is_sorted(
    model: PreTrainedModel, unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]],
    layers: int, groups: int, neurons: int,
) -> None:  # fmt: skip
    ranking = Ranking(torch.arange(groups).flip(0).repeat(layers, 1), torch.arange(neurons).flip(0).repeat(layers, 1))
    with unchanged(model), pytest.raises(InvalidMask), Supernet(model, ranking):
        pass


@ONE_FAMILY
def test_compensation_for_another_ranking_is_refused(
    model: PreTrainedModel, anatomy: Anatomy, compensation: CompensationTable,
    random_ranking: Callable[[Anatomy, int], Ranking],
) -> None:  # fmt: skip
    """As in `shrink`: refitted columns multiplied with other units' activations are noise."""
    with pytest.raises(InvalidMask), Supernet(model, random_ranking(anatomy, 1), compensation):
        pass


def test_a_candidate_copies_no_weight(
    model: PreTrainedModel, anatomy: Anatomy, ranking: Ranking, compensation: CompensationTable,
    random_architecture: Callable[..., Architecture],
) -> None:  # fmt: skip
    architecture = random_architecture(anatomy, 0, "BAMBB", whole=True)  # columns of some heads alone are no view
    resident = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    for table in (None, compensation):
        with Supernet(model, ranking, table) as supernet, supernet.active(architecture):
            for index, layer in enumerate(anatomy.layers_of(model)):
                for block in anatomy.blocks:
                    units = architecture.units(block.kind)[index]
                    if units == 0:
                        assert not any(list(getattr(layer, name).parameters()) for name in absent(block))
                        continue
                    if units == block.units:
                        assert all(isinstance(projection, Projection) for projection, _ in block.inputs_of(layer))
                        continue
                    for projection, rows in block.inputs_of(layer):
                        assert sum(map(len, projection.matrices)) == units * rows.per_unit
                        values = [v for v in (*projection.matrices, *projection.biases) if v is not None]
                        assert all(value.untyped_storage().data_ptr() in resident for value in values)
                    (weight,) = block.output_of(layer).matrices
                    if table is None:
                        assert weight.untyped_storage().data_ptr() in resident
                    else:
                        assert weight is compensation.weight(index, block, units)


@ONE_FAMILY
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_candidates_run_in_the_models_dtype(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, ranking: Ranking,
    random_architecture: Callable[..., Architecture], dtype: torch.dtype, tolerance: float,
) -> None:  # fmt: skip
    model, architecture = model.to(dtype), random_architecture(anatomy, 0)
    table = CompensationTable(model, collect_statistics(model, windows), ranking)
    small = shrink(model, PruningMask.from_architecture(architecture, ranking), table)
    with Supernet(model, ranking, table) as supernet:
        assert supernet.loss(architecture, windows) == pytest.approx(quality(small, windows).loss, abs=tolerance)


@ONE_FAMILY
def test_a_better_ranking_gives_a_better_candidate(model: PreTrainedModel, anatomy: Anatomy, windows: Tensor) -> None:
    """Prefixes keep the units ranked first, not last."""
    best = activation(collect_statistics(model, windows)).ranking()
    worst = Ranking(best.groups.flip(-1), best.neurons.flip(-1))
    dense = dense_distribution(model, windows)
    found = []
    for ranking in (best, worst):
        with Supernet(model, ranking) as supernet:
            found.append(supernet.quality(Architecture((2,) * 5, (16,) * 5), windows, dense).kl)
    assert found[0] < found[1]
