"""The constants behind a prepared problem: today's, and those that a stored run was made with."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llmbo.problem.recipe import DEFAULT_RECIPE, AllocationRecipe
from pruning.architecture import Architecture
from pruning.compensation import FIRST_RIDGE, RIDGE, Ridge
from pruning.refits import Order

PricedBy = Literal["objectives", "params"]


@dataclass(frozen=True)
class Method:
    """The constants behind the prepared problem, so that experiments can sweep them; runs use the defaults.

    Args:
        scored_tokens: Of the calibration windows, so many score units; all of them enter the refits, which need more.
        allocation_tokens: Of them, at most a quarter, tell block sensitivity and width exchanges; four times as many do it no better.
        ridge, order: Of the refits, see `pruning.compensation`, and of a block's units, see `pruning.refits.fit`.
        priced_by: Whether a step of the path is worth what it brings per known objective of the search, or per parameter in any case.
        anchors: Where the path is corrected, as parts of the way from its smallest member to the dense model; more bring nothing.
        refit_members: At which members of the path refits are fitted, too (`pruning.anchored`); None while the path is not known.
        allocation: What the path is made by.
        second_order: Weight of the expansions' second order; more than 1 allows for what several exchanges cost together.
        operating_point: Where one level less of each block is measured, as such a part: most of a front's gain is decided there.
    """

    scored_tokens: int = 8192
    allocation_tokens: int = 2048
    ridge: Ridge = RIDGE
    order: Order = "surgeon"
    refit_members: tuple[Architecture, ...] | None = None
    allocation: AllocationRecipe = DEFAULT_RECIPE
    priced_by: PricedBy = "objectives"
    anchors: tuple[float, ...] = (0.07, 0.23, 0.4)
    second_order: float = 1.5
    operating_point: float = 0.35

    @property
    def fits(self) -> dict[str, Any]:
        """What trials' weights depend on."""
        members = [member.to_dict() for member in self.refit_members or ()]
        return {"ridge": asdict(self.ridge), "order": self.order} | ({"refit_members": members} if members else {})

    @property
    def recipe(self) -> dict[str, Any]:
        """What trials' weights and the path depend on, to be stored with the run."""
        return {**self.fits, "allocation": self.allocation.to_dict(), "priced_by": self.priced_by}

    @classmethod
    def of(cls, recipe: Mapping[str, Any] | None) -> "Method":
        """The method of a run that has stored this; None for one of the first version. What it does not name had but one value then."""
        recipe = recipe or {"ridge": asdict(FIRST_RIDGE)}
        allocation = AllocationRecipe.of(recipe.get("allocation", {}))
        order, priced_by = recipe.get("order", "activation"), recipe.get("priced_by", "params")
        members = tuple(map(Architecture.from_dict, recipe.get("refit_members", ())))
        return cls(
            ridge=Ridge(**recipe["ridge"]),
            order=order,
            refit_members=members,
            allocation=allocation,
            priced_by=priced_by,
        )


DEFAULT = Method()
