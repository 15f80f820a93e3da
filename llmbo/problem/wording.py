"""What a recipe says, for people: only what it changes of the dense model's prices."""

from llmbo.problem.recipe import BOUNDS, DENSE_PRICES, WORDS, AllocationRecipe

UNSEEN = 0.005  # a change that two digits do not show
OPPOSITES = (("dearer", "cheaper"), ("more", "less"), ("farther apart", "closer together"))


def in_words(recipe: AllocationRecipe, most: int | None = None) -> str:
    """What a recipe changes, largest changes first, each with how much: `dense prices` where that is nothing.

    Args:
        most: So many changes are told, the others counted.
    """
    changes = {name: getattr(recipe, name) - getattr(DENSE_PRICES, name) for name in BOUNDS}
    seen = [name for name in changes if abs(changes[name]) >= UNSEEN]
    seen.sort(key=lambda name: -abs(changes[name]) / (BOUNDS[name][1] - BOUNDS[name][0]))
    told = [f"{_change(name, changes[name] > 0)} ({changes[name]:+.2f})" for name in seen[:most]]
    rest = len(seen) - len(told)
    if recipe.profile:
        told.append("a profile of its own along depth")
    return "; ".join(told) + (f"; and {rest} smaller change{'s' * (rest > 1)}" if rest else "") or "dense prices"


def _change(name: str, up: bool) -> str:
    """The number's words, turned round where it falls."""
    named = name.removesuffix("_by_size")
    words = WORDS[named].split(": ")[-1]
    if not up:
        for one, other in OPPOSITES:
            words = words.replace(one, "\0").replace(other, one).replace("\0", other)
    return words if named == name else f"in small models {words}"
