"""Ways to a file of a given size: which of them has the least KL."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.bits.files import Row, measured
from experiments.bits.prices import (
    Choice,
    built,
    cheapest_of,
    choices_of,
    costs_around,
    head_costs,
    of_widths,
)
from experiments.bits.refits import QuantisedRefits, fit_after
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.space import SearchSpace
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.calibration import TokenWindows
from pruning.compensation import Refits
from pruning.export import Pruned
from pruning.export.gguf_size import GgufSize, file_size
from pruning.export.quantise import Mixture
from pruning.likelihood import DenseDistribution, dense_distribution, quality
from pruning.masks import PruningMask
from pruning.shrinking import shrink
from pruning.tensor_files import TensorFiles

KINDS = ("q8_0", "q5_0", "q4_0")  # not Q4_1, which SmolLM2's packaged weights were made from
ANCHORS = (1.0, 0.9, 0.8, 0.65)  # shares of members around which costs are told
PRICED = 8  # windows
SMALLEST = 0.45  # share of members


@dataclass(frozen=True)
class Problem:
    """What there is to choose from, and to judge by.

    Args:
        model: The dense one in float32.
        refits: To full precision.
        judged: So many held-out windows judge; the others choose.
        files: Keep what has been worked out.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    space: SearchSpace
    family: ThresholdFamily
    refits: Refits
    windows: TokenWindows
    judged: int
    files: TensorFiles

    @cached_property
    def dense(self) -> tuple[DenseDistribution, DenseDistribution]:
        """The dense model's distribution on windows that costs are told on, and on those held out."""
        some = self.windows.calibration[:PRICED], self.windows.heldout
        first, second = (
            self.files.once(name, lambda w=w: vars(dense_distribution(self.model, w)))  # type: ignore[misc]
            for name, w in zip(("dense_seen", "dense_heldout"), some, strict=True)
        )
        return DenseDistribution(**first), DenseDistribution(**second)

    def measured(self, name: str, make: Callable[[], tuple[Pruned, Mixture]]) -> Row:
        """One file, kept by name."""

        def compute() -> dict[str, torch.Tensor]:
            with tempfile.TemporaryDirectory() as folder:
                pruned, mixture = make()
                row = measured(
                    pruned, Path(folder, "x.gguf"), mixture, self.windows.heldout, self.dense[1], self.windows.calibration[:32]
                )  # fmt: skip
            numbers = [row.share, row.size, *row.kls]
            return {"row": torch.tensor(numbers, dtype=torch.float64)}

        share, size, *kls = self.files.once(f"row_{name.replace(' ', '_')}", compute)["row"].tolist()
        return Row(share, name, round(size), tuple(kls))

    def uniform(self, architecture: Architecture, kind: str) -> tuple[Pruned, Mixture]:
        """A model with its refits, and one type for all of it."""
        small = shrink(self.model, PruningMask.from_architecture(architecture, self.refits.ranking), self.refits)
        return Pruned(small, anatomy_of(self.model), architecture, self.tokenizer), Mixture.of(kind)

    def around(self, share: float, refits: QuantisedRefits) -> tuple[float, list[list[Choice]]]:
        """KL of the member of that share on windows that were seen, and what every choice around it costs."""
        x = self.family.at(share)
        architecture = self.space.decode(x)
        steps = range(-4, 1) if x == self.space.max_levels else range(-2, 3)
        widths = self.space.neighbouring_widths(x, list(steps))
        seen, (dense, _) = self.windows.calibration[:PRICED], self.dense

        def own() -> dict[str, torch.Tensor]:
            small = self.uniform(architecture, "f32")[0].model
            return {"kl": torch.tensor(quality(small, seen, dense).kl)}

        costs = self.files.once(
            f"costs_{share}",
            lambda: costs_around(self.model, architecture, widths, KINDS, refits, seen, dense),
        )
        heads = self.files.once("heads", lambda: {"kl": torch.tensor(head_costs(self.model, KINDS, seen, dense))})["kl"]
        anatomy = anatomy_of(self.model)
        return float(self.files.once(f"kl_{share}", own)["kl"]), choices_of(
            anatomy, widths, KINDS, costs, heads.tolist()
        )


def compare(problem: Problem, budgets: Sequence[int]) -> None:
    """Print a row for each way to each size; of some, the two that promise most are tried, and other windows choose."""
    anatomy, judged = anatomy_of(problem.model), problem.judged
    absorbed = TensorFiles(problem.files.folder and problem.files.folder / "refits")
    fit_after(problem.model, problem.windows.calibration, problem.refits.ranking, KINDS[1:], absorbed)
    after = QuantisedRefits(problem.model, problem.refits, absorbed)
    before = QuantisedRefits(problem.model, problem.refits, None)
    anchors = {share: problem.around(share, after) for share in ANCHORS}
    members = [problem.space.decode(tuple(x.int().tolist())) for x in problem.family.path]

    def show(rows: Sequence[Row]) -> None:
        best = min(rows, key=lambda row: sum(row.kls[judged:]))
        print(replace(best, kls=best.kls[:judged]), flush=True)

    def make(chosen: Sequence[Choice], refits: QuantisedRefits) -> tuple[Pruned, Mixture]:
        return built(problem.model, problem.tokenizer, chosen, refits, "searched")

    whole = of_widths(anchors[1.0][1], Architecture.full(anatomy))
    finest = [own[0] for own in whole]
    outside = file_size(*make(finest, before), "bits") - sum(choice.size for choice in finest)
    for budget in budgets:
        size = budget - outside
        for kind in KINDS:
            sizes = GgufSize(problem.model, problem.tokenizer, Mixture.of(kind), "bits")(
                *problem.space.units(problem.family.path)
            )
            fitting = (sizes <= budget).nonzero().flatten()
            if not len(fitting) or problem.family.shares[fitting[-1]] < SMALLEST:
                continue
            architecture = members[int(fitting[-1])]

            make_uniform = partial(problem.uniform, architecture, kind)
            show([problem.measured(f"{budget / 1e6:g} uniform {kind}", make_uniform)])
        mixtures: list[tuple[float, float, list[Choice]]] = []
        joint: list[tuple[float, float, list[Choice]]] = []
        for share, (kl, choices) in anchors.items():
            found = [picked for member in members if (picked := cheapest_of(of_widths(choices, member), size))]
            if found:
                best = min(found, key=_cost)
                mixtures.append((kl + _cost(best), share, best))
            if best := cheapest_of(choices, size):
                joint.append((kl + _cost(best), share, best))
        for name, refits, ways in (
            ("mixture before", before, sorted(mixtures)[:1]),
            ("mixture after", after, sorted(mixtures)[:2]),
            ("joint", after, sorted(joint)[:2]),
        ):
            show(
                [
                    problem.measured(f"{budget / 1e6:g} {name} {share}", partial(make, best, refits))
                    for _, share, best in ways
                ]
            )
        if best := cheapest_of(whole, size):
            show([problem.measured(f"{budget / 1e6:g} dense mixture after", partial(make, best, after))])


def _cost(chosen: Sequence[Choice]) -> float:
    return sum(choice.cost for choice in chosen)
