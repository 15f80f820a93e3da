"""A recipe in words names what it changes, which way and how much, and nothing else."""

import pytest

from llmbo.problem.recipe import BOUNDS, DENSE_PRICES, AllocationRecipe
from llmbo.problem.wording import OPPOSITES, in_words


@pytest.mark.parametrize("name", BOUNDS)
def test_either_way_is_told_and_the_ways_differ(name: str) -> None:
    start, (low, high) = getattr(DENSE_PRICES, name), BOUNDS[name]
    up, down = (in_words(AllocationRecipe.of({name: end})) if end != start else "" for end in (high, low))
    assert (not up or f"({high - start:+.2f})" in up) and (not down or f"({low - start:+.2f})" in down)
    assert ";" not in up + down and up.split(" (")[0] != down.split(" (")[0]
    assert not name.endswith("_by_size") or "small models" in up
    assert any(word in up + down for pair in OPPOSITES for word in pair)


def test_words_tell_recipes_apart_and_the_largest_first() -> None:
    ends = {
        name: max(bounds, key=lambda end: abs(end - getattr(DENSE_PRICES, name))) for name, bounds in BOUNDS.items()
    }
    told = [in_words(AllocationRecipe.of({name: end})) for name, end in ends.items()]
    assert len({*told, "dense prices"}) == len(BOUNDS) + 1
    assert "profile" in in_words(AllocationRecipe.of({"profile": {"mlp": [0.5, 0.0]}}))
    assert in_words(DENSE_PRICES) == in_words(AllocationRecipe.of({"mlp_slope": 0.004})) == "dense prices"
    two = AllocationRecipe.of({"attention": 0.1, "mlp_slope": -0.4})
    assert in_words(two) == "MLPs of late layers cheaper (-0.40); attention dearer, MLPs cheaper (+0.10)"
    assert in_words(two, most=1) == "MLPs of late layers cheaper (-0.40); and 1 smaller change"
