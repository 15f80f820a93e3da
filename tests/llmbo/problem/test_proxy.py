"""What the proxy says about a candidate is what its shrunk model does."""

from pathlib import Path

import pytest
import torch

from llmbo.errors import out_of_memory
from llmbo.models.loading import load_model
from llmbo.problem.proxy import ProxyEvaluator, known_values
from llmbo.problem.space import SearchSpace
from pruning.anatomy import anatomy_of
from pruning.importance import activation
from pruning.likelihood import dense_distribution, window_qualities
from pruning.masks import PruningMask
from pruning.shrinking import shrink
from pruning.statistics import collect_statistics
from pruning.supernet import Supernet


def test_the_proxy_agrees_with_the_shrunk_model(model_folder: Path) -> None:
    model = load_model(str(model_folder), "float32", "cpu").model
    windows = torch.randint(62, (4, 16), generator=torch.Generator().manual_seed(0))
    ranking = activation(collect_statistics(model, windows)).ranking()
    space = SearchSpace(anatomy_of(model))
    candidates = [space.max_levels, (2, 1, 0, 2, 12, 3, 5, 0), (1, 1, 1, 1, 0, 12, 7, 1)]
    dense = dense_distribution(model, windows)
    expected = [
        window_qualities(shrink(model, PruningMask.from_architecture(space.decode(x), ranking)), windows, dense)
        for x in candidates
    ]
    with Supernet(model, ranking) as supernet:
        evaluator = ProxyEvaluator.on(windows, space, supernet)
        found, itself = evaluator.evaluate(candidates), evaluator.evaluate_dense()
    for x, values, windowed in zip(candidates, found, expected, strict=True):
        target = windowed.mean()
        assert target.kl is not None and windowed.kl is not None
        assert values["loss"] == pytest.approx(target.loss, abs=1e-4) and values["kl"] == pytest.approx(
            target.kl, abs=1e-4
        )
        assert values["perplexity"] == pytest.approx(torch.tensor(target.loss).exp().item(), rel=1e-3)
        for name, seen in (("kl", windowed.kl), ("loss", windowed.loss)):
            assert values.windows[name] == pytest.approx(seen.tolist(), abs=1e-4)
            assert values[name] == pytest.approx(sum(values.windows[name]) / 4, rel=1e-12)
        assert {name: values[name] for name in space.costs} == known_values(space, x)
    assert found[0]["kl"] == pytest.approx(0, abs=1e-5) and found[0]["params_share"] == 1
    assert itself == pytest.approx(found[0], abs=1e-6) and itself.windows["loss"] == found[0].windows["loss"]
    assert found[0]["params"] == sum(p.numel() for p in model.parameters())
    assert found[1]["kl"] > 0.01 and found[2]["kl"] > 0.01


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("MPS backend out of memory"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(2, "No such file"), False),
        (RuntimeError("bad shape"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: BaseException, expected: bool) -> None:
    assert out_of_memory(error) is expected
