"""Points and architectures are the same thing written twice."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmbo.config import RunConfig
from llmbo.errors import LlmboError
from llmbo.problem.space import (
    HARDWARE_MULTIPLE,
    NEURON_LEVELS,
    SearchSpace,
    _default_step,
    attention_ladder,
    space_of,
)
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.cost import cost_of
from pruning.widths import attention_width, lacking_of, units_of

FEWER = (attention_width(1, 1), 1, attention_width(2, 1), 2)
# layers, neurons, min_share, neuron_step, widths of attention; steps 5 and 7 divide neither 24 nor 100
CASES = [
    (4, 24, 0.4, 0, ()), (4, 24, 0.4, 5, ()), (3, 100, 0.1, 7, (2,)), (2, 24, 0.9, 24, ()), (5, 1, 0.5, 1, ()),
    (2, 500, 0.3, 0, (2,)), (3, 24, 0.3, 7, FEWER),
]  # fmt: skip


@pytest.fixture(params=CASES, ids=str)
def space(request: pytest.FixtureRequest, make_space: Callable[..., SearchSpace]) -> SearchSpace:
    *sizes, attention = request.param
    return replace(make_space(*sizes), attention=attention)


def random_levels(space: SearchSpace, n: int, seed: int = 0, margin: int = 0) -> torch.Tensor:
    """`n x d` whole levels, up to `margin` outside the bounds."""
    rng = torch.Generator().manual_seed(seed)
    span = space.bounds[1] + 1 + 2 * margin
    return (torch.rand(n, space.d, generator=rng, dtype=torch.float64) * span).floor() - margin


def test_decode_and_encode_are_inverse(space: SearchSpace) -> None:
    for row in random_levels(space, 50).int().tolist():
        if any(row[: space.num_layers]):
            architecture = space.decode(tuple(row))
            assert space.encode(architecture) == tuple(row)
            architecture.check(space.anatomy)


def test_the_highest_levels_are_the_dense_model(space: SearchSpace) -> None:
    assert space.decode(space.max_levels) == Architecture.full(space.anatomy)
    assert space.share(torch.tensor(space.max_levels, dtype=torch.float64)) == 1


def test_bounds_and_names_have_one_entry_per_dimension(space: SearchSpace) -> None:
    assert space.bounds.shape == (2, space.d) == (2, 2 * space.anatomy.num_hidden_layers)
    assert space.bounds[0].eq(0).all()
    assert tuple(space.bounds[1].int().tolist()) == space.max_levels
    assert len(set(space.names)) == space.d


@pytest.mark.parametrize("step", range(1, 25))
def test_any_step_ends_in_the_full_width(make_space: Callable[..., SearchSpace], step: int) -> None:
    widths = make_space(2, 24, 0.4, step).widths["mlp"]
    assert widths[0] == 0 and widths[-1] == 24
    assert all(width % step == 0 for width in widths[:-1])
    assert all(0 < high - low <= step for low, high in itertools.pairwise(widths))


@pytest.mark.parametrize("neurons", [24, 100, 500])
def test_the_default_step_gives_about_twelve_levels(make_space: Callable[..., SearchSpace], neurons: int) -> None:
    assert 8 <= len(make_space(2, neurons).widths["mlp"]) - 1 <= 18


def test_share_equals_the_counted_cost(space: SearchSpace) -> None:
    X = random_levels(space, 50)
    X[:, 0] = 1  # attention somewhere
    costs = [cost_of(space.anatomy, space.decode(tuple(row))).share for row in X.int().tolist()]
    torch.testing.assert_close(space.share(X), torch.tensor(costs, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(space.share(X.view(5, 10, -1)), space.share(X).view(5, 10), rtol=0, atol=0)


def test_legal_agrees_with_its_definition(space: SearchSpace) -> None:
    X = torch.cat([random_levels(space, 300, margin=1), random_levels(space, 300, seed=1), space.bounds])
    X[300:350, : space.num_layers] = 0  # no attention
    X[350:450] = space.bounds[1] - (random_levels(space, 100, seed=2) < 1).double()  # near the dense model

    def legal(row: list[int]) -> bool:
        inside = all(0 <= level <= most for level, most in zip(row, space.max_levels, strict=True))
        return (
            inside
            and any(row[: space.num_layers])
            and cost_of(space.anatomy, space.decode(tuple(row))).share >= space.min_share
        )

    expected = [legal(row) for row in X.int().tolist()]
    assert space.legal(X).tolist() == expected
    assert True in expected and False in expected


def test_an_architecture_off_the_grid_is_refused(make_space: Callable[..., SearchSpace]) -> None:
    space = make_space(2, 24, 0.4, 5)
    with pytest.raises(LlmboError, match="Layer 1 keeps 7 neurons"):
        space.encode(Architecture((1, 1), (5, 7)))
    with pytest.raises(LlmboError, match="Layer 0 keeps 1 KV groups"):
        replace(space, attention=(2,)).encode(Architecture((1, 2), (5, 5)))


@pytest.mark.parametrize("min_share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_smallest_share_outside_0_and_1_is_refused(make_space: Callable[..., SearchSpace], min_share: float) -> None:
    with pytest.raises(LlmboError, match="--min-share"):
        make_space(2, 24, min_share)


@pytest.mark.parametrize("step", [-1, 25])
def test_a_step_without_a_choice_is_refused(make_space: Callable[..., SearchSpace], step: int) -> None:
    with pytest.raises(LlmboError, match=rf"--neuron-step .* {step}"):
        make_space(2, 24, 0.4, step)


def test_neighbouring_widths_are_those_of_a_level_less_and_more(make_space: Callable[..., SearchSpace]) -> None:
    space = make_space(neurons=24, neuron_step=10)  # the last step is shorter
    for level in range(space.max_levels[-1] + 1):
        x = (1,) * space.num_layers + (level,) * space.num_layers
        found = space.neighbouring_widths(x, (-1, 1))
        assert found["attention"].tolist() == [[0, 2]] * space.num_layers
        below, above = (space.widths["mlp"][min(max(at, 0), space.max_levels[-1])] for at in (level - 1, level + 1))
        assert found["mlp"].tolist() == [[below, above]] * space.num_layers


@pytest.mark.parametrize("multiple", [256, 128, 32])
@pytest.mark.parametrize("size", [11008, 14336, 8192, 18944, 9728, 12288, 6912, 4864, 3072, 1536])
def test_a_default_step_is_what_files_and_hardware_like_and_gives_about_as_many_levels_as_wanted(
    size: int, multiple: int
) -> None:
    step = _default_step(size, multiple)
    assert step % (multiple if size >= 12 * multiple else HARDWARE_MULTIPLE) == 0
    assert size / step == pytest.approx(NEURON_LEVELS, rel=0.35 if multiple == 256 else 0.2)
    assert _default_step(24, multiple) == 24 // NEURON_LEVELS and _default_step(3, multiple) == 1  # models of tests


def test_every_width_of_an_8b_model_is_whole_blocks_of_k_quants_and_an_older_run_keeps_its_own(
    make_space: Callable[..., SearchSpace],
) -> None:
    anatomy = make_space(2, 14336).anatomy
    widths = space_of(RunConfig(model="llama"), anatomy).widths["mlp"]
    assert len(widths) == 13 and widths[-1] == 14336 and not any(width % 256 for width in widths)
    started = {"model": "llama", "neuron_step": 0}  # as stored before there was the setting
    assert space_of(RunConfig.from_settings(started), anatomy).neuron_step == 1184
    assert space_of(RunConfig(model="llama", neuron_step=896), anatomy).neuron_step == 896


def anatomy_with(heads: int, groups: int, biases: bool = False) -> Anatomy:
    config = LlamaConfig(
        hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=groups, head_dim=8, intermediate_size=16,
        num_hidden_layers=2, vocab_size=16, attention_bias=biases,
    )  # fmt: skip
    with torch.device("meta"):
        return anatomy_of(LlamaForCausalLM(config))


@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (32, 8), (14, 2), (16, 8), (4, 1), (4, 4), (28, 4)])
@pytest.mark.parametrize("biases", [False, True])
def test_no_known_cost_falls_from_a_level_with_fewer_query_heads_to_the_next(
    heads: int, groups: int, biases: bool
) -> None:
    anatomy = anatomy_with(heads, groups, biases)
    space = SearchSpace(anatomy, attention=attention_ladder(anatomy.attention))
    levels = torch.arange(len(space.widths["attention"]), dtype=torch.float64)
    points = torch.stack([levels, *[torch.ones_like(levels)] * 3], dim=1)
    for name in ("params", "flops", "kv_bytes", "params_share", "weight_bytes"):
        assert (space.cost(name, points).diff() >= 0).all()
    assert (space.cost("params", points).diff() > 0).all()
    whole = [width for width in space.widths["attention"] if not lacking_of(width)]
    assert whole == list(range(groups + 1))  # nothing that was there is gone
    assert space.query_heads == (heads > groups) and max(map(units_of, space.widths["attention"])) == groups
    if groups == 1:
        assert len(levels) == heads + 1


def test_query_heads_are_searched_where_asked_for_or_nothing_else_can_be() -> None:
    grouped, single, alone = anatomy_with(4, 2), anatomy_with(4, 1), anatomy_with(4, 4)

    def searched(anatomy: Anatomy, **settings: Any) -> bool:
        return space_of(RunConfig("tiny", **settings), anatomy).query_heads

    assert not searched(grouped) and searched(grouped, query_heads=True) and searched(single)
    assert not searched(single, query_heads=False) and not searched(single, deploy=("vllm",)) and not searched(alone)
    assert not space_of(RunConfig.from_settings({"model": "llama"}), single).query_heads  # a run from before
    for anatomy, deploy in ((alone, ()), (grouped, ("hf", "vllm")), (single, ("vllm",))):
        with pytest.raises(LlmboError, match=r"--query-heads leaves nothing to search, since (vllm|no query head)"):
            searched(anatomy, query_heads=True, deploy=deploy)
