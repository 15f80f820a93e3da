"""The language of formulas: what it computes, and that nothing else is ever evaluated."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmbo.advisor.formula import FEATURES, MAX_LENGTH, FormulaError, block_features, evaluated


@pytest.fixture
def features(priced: Any) -> dict[str, Tensor]:
    return block_features(priced.family)


@pytest.mark.parametrize(
    ("formula", "same"),
    [
        ("depth * is_mlp", lambda f: f["depth"] * f["is_mlp"]),
        ("-3 + 2 * +depth - first / 4", lambda f: 2 * f["depth"] - f["first"] / 4),
        ("max(layer, 2, 3 * last) > 2.5", lambda f: (torch.maximum(f["layer"].clamp_min(2), 3 * f["last"]) > 2.5).double()),
        ("sqrt(abs(log_fisher)) + log(importance) - exp(min(kept, 0.5))",
         lambda f: f["log_fisher"].abs().sqrt() + f["importance"].log() - f["kept"].clamp_max(0.5).exp()),
    ],
)  # fmt: skip
def test_a_formula_is_what_it_says_around_zero_and_of_unit_size(
    features: dict[str, Tensor], formula: str, same: Callable[[dict[str, Tensor]], Tensor]
) -> None:
    found, expected = evaluated(formula, features), same(features)
    assert float(found.mean()) == pytest.approx(0, abs=1e-9) and float(found.std(correction=0)) == pytest.approx(1)
    torch.testing.assert_close(found, (expected - expected.mean()) / expected.std(correction=0))


def test_features_are_what_their_words_say(priced: Any) -> None:
    family, L = priced.family, priced.space.num_layers
    corrections = torch.stack([torch.arange(2.0 * L), torch.ones(2 * L), torch.zeros(2 * L)]).double()
    informed = replace(family.prices, anchors=torch.tensor([0.5, 0.7, 1.0]), corrections=corrections)
    found = block_features(replace(family, prices=informed))
    assert found.keys() == FEATURES.keys() and all(f.shape == (2 * L,) and f.isfinite().all() for f in found.values())
    assert found["depth"].tolist()[:: L - 1][:2] == [-1, 1] and found["layer"].tolist() == [*range(L)] * 2
    assert found["first"][0] == found["last"][-1] == 1 and found["is_mlp"].tolist() == [0] * L + [1] * L
    torch.testing.assert_close(found["measured"], corrections[:2].mean(0))
    assert (found["kept"] * priced.space.bounds[1] - torch.tensor(family.at(0.7))).abs().max() <= 1
    unmeasured = replace(family.prices, anchors=torch.ones(1), corrections=torch.zeros(1, 2 * L).double())
    assert not block_features(replace(family, prices=unmeasured))["measured"].any()


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        ("__import__('os').system('true')", "not in the language"),
        ("depth.__class__", "not in the language"),
        ("depth[0]", "not in the language"),
        ("(lambda: depth)()", "not in the language"),
        ("[depth for _ in layer]", "not in the language"),
        ("eval(depth)", r"'eval\(depth\)' is not in the language"),
        ("max(*depth)", "not in the language"),
        ("max(depth)", "not in the language"),
        ("log(depth, 2)", "not in the language"),
        ("abs(depth, out=layer)", "not in the language"),
        ("depth ** 2", "not in the language"),
        ("9 ** 9 ** 9 ** 9", "not in the language"),
        ("1 << 10 ** 9", "not in the language"),
        ("'a' * 10 ** 9", "not in the language"),
        ("depth % 2", "not in the language"),
        ("depth if layer else first", "not in the language"),
        ("0 < depth < 1", "not in the language"),
        ("depth and layer", "not in the language"),
        ("not depth", "not in the language"),
        ("True * depth", "'True' is not in"),
        ("depth * 1j", "'1j' is not in"),
        ("(depth := 3)", "not in the language"),
        ("f'{depth}'", "not in the language"),
        ("1 / layer", "'1 / layer' is no finite number for block 0"),
        ("depth * (1 / (1 / 0))", "'1 / 0' is no finite"),
        ("depth + exp(exp(exp(9)))", "is no finite"),
        ("log(depth)", "is no finite"),
        ("sqrt(-layer)", "is no finite"),
        ("depth * 1e999", "no finite"),
        ("depht", "Unknown feature 'depht': did you mean depth"),
        ("3 + 4", "the same for every block"),
        ("depth - depth", "the same for every block"),
        ("depth +", "no expression"),
        ("depth; layer", "no expression"),
        ("", "no expression"),
        ("depth\x00", "no expression"),
        ("1if depth else 2", "not in the language"),
        ("(" * 90 + "depth" + ")" * 89, "no expression"),
        ("-" * 150 + "depth", "parts"),
        ("depth" + "+depth" * 31, "63 parts, at most 60"),
        ("depth " * 100, f"at most {MAX_LENGTH}"),
        ("9" * 190 + "* depth", "no finite number for block"),
    ],
)  # fmt: skip
def test_whatever_else_is_refused_and_named(features: dict[str, Tensor], formula: str, reason: str) -> None:
    with pytest.raises(FormulaError, match=reason):
        evaluated(formula, features)
