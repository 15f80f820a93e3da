"""Units go in the order in which backward elimination that fits from scratch each time would let them go."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pruning.surgeon
from pruning.anatomy import Anatomy
from pruning.block import Block
from pruning.compensation import RIDGE, Factor, Ridge
from pruning.surgeon import surgeon_order

pytestmark = pytest.mark.parametrize("model", ["llama"], indirect=True)
HIDDEN = 7
WIDTHS = pytest.mark.parametrize("width", [1, 3])


@pytest.fixture
def block(anatomy: Anatomy) -> Callable[[int, int], Block]:
    """Of so many units with so many columns each."""
    return lambda units, width: replace(anatomy.mlp, units=units, columns_per_unit=width)


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated, of scales that differ a thousandfold, around means that are not 0."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    return (z + torch.randn(columns, generator=draw)) * 10 ** (3 * torch.rand(columns, generator=draw))


def projection(columns: int, bias: bool = False) -> nn.Linear:
    output = nn.Linear(columns, HIDDEN, bias=bias)
    draw = torch.Generator().manual_seed(1)
    for parameter in output.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
    return output


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.T @ z / len(z), z.mean(0)


def surgeon(z: Tensor, output: nn.Linear, block: Block, ridge: Ridge = RIDGE) -> Tensor:
    return surgeon_order(*moments(z), output, block, ridge, len(z))


def activation(z: Tensor, output: nn.Linear, block: Block) -> Tensor:
    energy = block.per_unit(z.square().mean(0) * output.weight.detach().square().sum(0))
    return energy.argsort(descending=True, stable=True)


def training_errors(z: Tensor, output: nn.Linear, block: Block, order: Tensor, ridge: Ridge = RIDGE) -> Tensor:
    """Of the refit that keeps 1, 2, ... units, the first of an order."""
    columns, errors = block.columns_of(order), []
    factor = Factor.of(*moments(z), output, columns, ridge, len(z))
    for kept in range(block.columns_per_unit, len(columns), block.columns_per_unit):
        weight, bias = factor.solve(kept)
        written = z[:, columns[:kept]] @ weight.T + (0 if bias is None else bias)
        errors.append((output(z).detach() - written).square().mean())
    return torch.stack(errors)


@WIDTHS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("units", "at_once"), [(7, 32), (12, 4)])
def test_it_is_backward_elimination_with_a_new_fit_each_time(
    block: Callable[[int, int], Block],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    bias: bool,
    units: int,
    at_once: int,
) -> None:
    """Least squares over the tokens themselves, the ridge as rows beneath them, a column of ones where there is a bias.

    Where several go at a time, of twice as many each costs at least what it costs after all before it.
    """
    monkeypatch.setattr(pruning.surgeon, "AT_ONCE", at_once)
    some, ridge = block(units, width), Ridge(0.05)
    z, output = inputs(50, some.columns), projection(some.columns, bias)
    gram, _ = moments(z.double())
    rows = torch.cat([z.double(), (len(z) * ridge.of(gram, len(z))).diag().sqrt()])
    ones = torch.cat([torch.ones(len(z), 1), torch.zeros(some.columns, 1)]).double()
    target = rows @ output.weight.detach().double().T
    left, gone = list(range(units)), []

    def missed(*without: int) -> float:
        others = torch.tensor([unit for unit in left if unit not in without], dtype=torch.long)
        known = torch.cat([bias * ones, rows[:, some.columns_of(others)]], dim=1)
        return float((target - known @ torch.linalg.lstsq(known, target, driver="gelsd").solution).square().sum())

    while len(left) > 1:
        batch, alone = max(1, len(left) // at_once), {unit: missed(unit) - missed() for unit in left}
        least = sorted(left, key=alone.__getitem__)[: 2 * batch]
        cost = {
            unit: max(alone[unit], missed(*least[: place + 1]) - missed(*least[:place]))
            for place, unit in enumerate(least)
        }
        for unit in sorted(least, key=cost.__getitem__)[:batch]:
            left.remove(unit)
            gone.insert(0, unit)
    assert surgeon(z, output, some, ridge).tolist() == [*left, *gone]


@pytest.mark.parametrize("units", [8, 100])
def test_of_two_units_that_say_the_same_one_goes_early(block: Callable[[int, int], Block], units: int) -> None:
    """By activation energy both stay to the end, since nothing is stronger; and of a hundred units, three go at a time, but not both."""
    some, output, ridge = block(units, 1), projection(units), Ridge(1e-3)
    z = torch.randn(2000, units, generator=torch.Generator().manual_seed(0))
    z[:, 3] *= 20
    z[:, 6] = z[:, 3] + 0.1 * z[:, 6]
    output.weight.data /= output.weight.data.norm(dim=0)
    found, by_energy = surgeon(z, output, some, ridge), activation(z, output, some)
    assert set(by_energy[:2].tolist()) == {3, 6}
    assert len({3, 6} & set(found[-max(1, units // 32) :].tolist())) == 1
    ours, theirs = (training_errors(z, output, some, order, ridge) for order in (found, by_energy))
    assert (ours <= 1.01 * theirs).all() and ours[1:].mean() < 0.95 * theirs[1:].mean()


@WIDTHS
def test_refits_to_its_prefixes_err_less_than_by_energy(block: Callable[[int, int], Block], width: int) -> None:
    some, output = block(96, width), projection(96 * width, bias=True)
    draw = torch.Generator().manual_seed(0)
    said = torch.randn(2000, 24, generator=draw) @ torch.randn(24, some.columns, generator=draw)
    z = (said + 0.3 * torch.randn(said.shape, generator=draw)) * (1 + 3 * torch.rand(some.columns, generator=draw))
    ours, theirs = (training_errors(z, output, some, order(z, output, some)) for order in (surgeon, activation))
    assert (ours / theirs).mean() < 0.9


@WIDTHS
def test_units_in_another_sequence_come_in_the_same_order(block: Callable[[int, int], Block], width: int) -> None:
    some = block(70, width)
    z, output = inputs(300, some.columns), projection(some.columns, bias=True)
    found = surgeon(z, output, some)
    moved = torch.randperm(70, generator=torch.Generator().manual_seed(2))
    columns, other = some.columns_of(moved), projection(some.columns, bias=True)
    other.weight.data = output.weight.data[:, columns]
    assert torch.equal(moved[surgeon(z[:, columns], other, some)], found)


@WIDTHS
@pytest.mark.parametrize("ridge", [RIDGE, Ridge(1e-3)])
@pytest.mark.parametrize("bias", [False, True])
def test_dead_columns_go_first_and_few_tokens_are_no_trouble(
    block: Callable[[int, int], Block], width: int, ridge: Ridge, bias: bool
) -> None:
    """Three tokens; a third of the units never fire; one direction is a thousand times all others."""
    some, output = block(99, width), projection(99 * width, bias)
    z = inputs(3, some.columns) + 1000 * torch.ones(3, 1)
    z[:, some.columns_of(torch.arange(0, 99, 3))] = 0
    found = surgeon(z, output, some, ridge)
    assert found.sort().values.tolist() == list(range(99))
    assert set(found[-33:].tolist()) == set(range(0, 99, 3))
    assert training_errors(z, output, some, found, ridge).isfinite().all()
    assert surgeon(0 * z, output, some, ridge).sort().values.tolist() == list(range(99))


def test_equals_stay_in_the_order_of_the_layer(block: Callable[[int, int], Block]) -> None:
    some, output = block(40, 1), projection(40)
    output.weight.data.fill_(1.0)
    assert surgeon_order(torch.eye(40), torch.zeros(40), output, some, RIDGE, 64).tolist() == list(range(40))


class _NothingAsked(TorchDispatchMode):
    """The host never wants to know a value, or how many there are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), func
        return func(*args, **(kwargs or {}))


@WIDTHS
def test_the_host_does_not_wait_for_values(block: Callable[[int, int], Block], width: int) -> None:
    some, output = block(50, width), projection(50 * width, bias=True)
    gram, mean = moments(inputs(100, some.columns))
    before = gram.clone()
    with _NothingAsked():
        surgeon_order(gram, mean, output, some, RIDGE, 100)
    assert torch.equal(gram, before)  # the refits need it


def test_what_is_not_finite_is_an_error(block: Callable[[int, int], Block]) -> None:
    z = inputs(50, 9)
    z[4, 4] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        surgeon(z, projection(9), block(9, 1))
