"""Advisors without a model: nobody, chance, ill will, and rules over the same context that a model reads."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmbo.advisor.context import Context, offset_from_path, share_of
from llmbo.advisor.designs import random_recipe, ruled_recipes
from llmbo.advisor.parse import judge
from llmbo.advisor.replies import FORMATS, formats
from llmbo.advisor.roles import Answer, Exchange, Question, Transcript
from llmbo.problem.depth import gaussian_smoothed
from llmbo.search.baselines import ThresholdProposer

Reply = dict[str, Any]
MAX_SHARE = 0.95  # larger models differ too little from the dense one to tell anything
SMOOTH = 1.5  # layers; one block's measurement is noisy, and neighbours resemble each other
CONTRAST = 0.6  # standard deviations that a block must stand out to join a contrast
RIDGE = 1.0


class NoAdvisor:
    """Never advises."""

    def ask(self, question: Question, transcript: Transcript) -> Answer:
        return Answer()


@dataclass(frozen=True)
class OfflineAdvisor:
    """A function of the question as an advisor. Its reply is checked and kept like a model's."""

    name: str
    reply: Callable[[Question], Reply]

    def ask(self, question: Question, transcript: Transcript) -> Answer:
        reply = self.reply(question)
        if not transcript.recorded():
            transcript.record(Exchange(reply=json.dumps(reply), model=self.name, attempts=0))
        return judge(reply, question)


def random_reply(question: Question) -> Reply:
    """The control arm: as many items as asked for, with as small edits, from chance alone."""
    rng = random.Random(question.seed)
    context = question.context
    space = context.setting.space
    low = min(context.smallest_useful, MAX_SHARE)
    bases: list[int | str] = [trial.number for trial in context.front]

    def item() -> Reply:
        share = round(rng.uniform(low, MAX_SHARE), 3)
        base = rng.choice([*bases, f"threshold:{share}"])
        return {"base": base, "edits": _random_contrast(rng, space.num_layers), "target_share": share, "why": "chance"}

    def recipe() -> Reply:
        return random_recipe(
            rng, context.setting.family.recipe, [round(rng.uniform(low, MAX_SHARE), 3) for _ in range(question.shares)]
        )

    makers: dict[str, Callable[[int], Reply]] = {
        "recipes": lambda index: recipe(),
        "proposals": lambda index: item(),
        "directions": lambda index: {"name": f"chance {index + 1}", "edits": _random_contrast(rng, space.num_layers)},
        "decisions": lambda index: {"id": order[index], "keep": False, "confidence": 0.5, "why": "chance"},
    }
    order = rng.sample(range(len(question.candidates)), len(question.candidates))
    key = next(iter(formats(question.hook, question.priced and question.hook != "directions")))
    return {key: [makers[key](index) for index in range(question.count)]}


def _random_contrast(rng: random.Random, layers: int) -> list[Reply]:
    """One range of layers up, another down, in MLPs or attention."""
    edits = []
    for delta in (1, -1):
        first = rng.randrange(layers)
        last = min(layers - 1, first + rng.randrange(max(1, layers // 4)))
        edits.append({"layers": [f"{first}-{last}"], rng.choice(["neurons_delta", "neurons_delta", "kv_delta"]): delta})
    return edits


def hostile_reply(question: Question) -> Reply:
    """The stress arm, for which the veto is there: MLPs emptied wholesale, the wrong way pointed out, and of the candidates
    those dropped that past trials speak for most."""
    context, layers = question.context, question.context.setting.space.num_layers
    low, everywhere = min(context.smallest_useful, MAX_SHARE), [f"0-{layers - 1}"]

    def proposal(place: int) -> Reply:
        share = round(low + (MAX_SHARE - low) * (place + 0.5) / question.count, 3)
        edits = [{"layers": everywhere, "neurons_keep": 0}]
        return {"base": "dense", "edits": edits, "target_share": share, "why": "ill will"}

    def direction(place: int) -> Reply:
        half = [f"{place % layers}-{layers - 1}"]
        return {"name": f"wrong {place + 1}", "edits": [{"layers": half, "neurons_delta": -1, "kv_delta": 1}]}

    if FORMATS[question.hook][0] == "proposals":
        return {"proposals": [proposal(place) for place in range(question.count)]}
    if FORMATS[question.hook][0] == "directions":
        return {"directions": [direction(place) for place in range(question.count)]}
    scores = _alignment(question)
    best = sorted(range(len(scores)), key=lambda index: -scores[index])
    decisions = [{"id": index, "keep": False, "confidence": 1.0, "why": "ill will"} for index in best[: question.count]]
    return {"decisions": decisions}


@dataclass(frozen=True)
class Contrast:
    """A direction with a reason: `levels` `d`, largest absolute value 1; `measured` unless it is a rule of thumb."""

    name: str
    levels: Tensor
    why: str
    measured: bool = True


def heuristic_reply(question: Question) -> Reply:
    """Rules: follow measured marginal costs, what past trials taught, and what importance says the family gets wrong."""
    return {"proposals": _proposals, "directions": _directions, "decisions": _decisions}[FORMATS[question.hook][0]](
        question
    )


def contrasts(context: Context) -> list[Contrast]:
    """What the context speaks for, the best founded first.

    Tried on SmolLM2 against the family of Fisher scores, at shares 0.5, 0.6 and 0.75: flatter MLPs gained 0.003 to 0.022
    nats at equal share, measured costs up to 0.023; block influence of the dense model lost 0.01 to 0.16: no rule uses it.
    """
    found = [_learnt(context), *_measured(context), _flat(context)]
    return [contrast for contrast in found if contrast is not None]


def _measured(context: Context) -> list[Contrast | None]:
    """Levels move, within each kind, from blocks where a parameter is cheap to lose to blocks where it is dear.

    At the best allocation of a given size all blocks lose equally by one parameter less (the Lagrange condition). MLPs
    are smoothed along depth, since neighbours resemble each other and one measurement is noisy; attention differs from
    layer to layer by more than the noise.
    """
    if context.marginals is None:
        return []
    layers = context.setting.space.num_layers
    attention, mlp = (_standardised(_known(half)) for half in _halves(context.marginals.cost, layers))
    nothing, smoothed = torch.zeros(layers, dtype=torch.float64), _standardised(gaussian_smoothed(mlp, SMOOTH))
    return [
        _contrast(
            "MLPs by measured cost", torch.cat([nothing, smoothed]), "a neuron less should hurt equally everywhere"
        ),
        _contrast(
            "attention by measured cost", torch.cat([attention, nothing]), "a group less should hurt equally everywhere"
        ),
    ]


def _learnt(context: Context) -> Contrast | None:
    """The gradient of gain along depth, by ridge regression over the trials that left the family."""
    off_path = [trial for trial in context.off_path if trial.number in context.gains]
    if len(off_path) < 6:
        return None
    family, space = context.setting.family, context.setting.space
    offsets = torch.stack([offset_from_path(family, trial.x) for trial in off_path]) / space.bounds[1]  # n x d
    basis = _gaussian_basis(space.num_layers)  # d x k
    design = offsets @ basis
    gains = torch.tensor([context.gains[trial.number] for trial in off_path], dtype=torch.float64)
    scale = design.square().sum(0).mean().clamp_min(1e-12)
    weights = torch.linalg.solve(
        design.T @ design + RIDGE * scale * torch.eye(basis.shape[1], dtype=torch.float64), design.T @ gains
    )
    return _contrast("learnt from trials", _standardised(basis @ weights), "where past gains point")


def _flat(context: Context) -> Contrast | None:
    """Against the family's own profile along depth: a threshold on the dense model's scores overstates it."""
    family = context.setting.family
    low, high = float(family.shares[0]), float(family.shares[-1])
    profile = family.profile(torch.tensor([(low + high) / 2], dtype=torch.float64))[0]
    attention, mlp = profile.split(context.setting.space.num_layers)
    scores = torch.cat([torch.zeros_like(attention), _standardised(-gaussian_smoothed(mlp, SMOOTH))])
    contrast = _contrast("flatter MLPs", scores, "the family's profile is too steep")
    return contrast and replace(contrast, measured=False)


def _known(costs: Sequence[float | None]) -> Tensor:
    """Costs with their mean where there is none."""
    known = [cost for cost in costs if cost is not None]
    mean = sum(known) / max(1, len(known))
    return torch.tensor([mean if cost is None else cost for cost in costs], dtype=torch.float64)


def _proposals(question: Question) -> Reply:
    """The best trials carried to the widest gaps, and steps of one level along the contrasts at all sizes."""
    context, setting = question.context, question.context.setting
    low = min(context.smallest_useful, MAX_SHARE)
    # With no trial off the family yet, a rule of thumb is no reason to give up a place of the design: what was measured is.
    named = [contrast for contrast in contrasts(context) if contrast.measured or context.off_path]
    best = sorted((n for n in context.gains if context.gains[n] > 0), key=lambda n: -context.gains[n])
    gaps = [round((a + b) / 2, 3) for a, b in context.gaps if low <= (a + b) / 2 < MAX_SHARE]
    # where the family's own next members would stand: at any other size advice loses to them whatever it knows
    places = ThresholdProposer(setting.family, setting.objectives, setting.dense).propose(
        context.trials, question.count, 0
    )
    shares = [round(share_of(setting.space, member.x), 3) for member in places]
    if question.priced and (recipes := ruled_recipes(question, shares)):
        return {"recipes": recipes}
    items: list[Reply] = []
    for place, number in enumerate(best[: question.count // 2]):
        edits = _edits(named[place % len(named)].levels, setting.space.num_layers) if named else []
        items.append(
            {
                "base": number,
                "edits": edits,
                "target_share": gaps[place % len(gaps)] if gaps else 0.6,
                "why": "best so far, one more step",
            }
        )
    wanted = question.count - len(items)
    for place, share in enumerate(shares[:wanted] if named else []):
        contrast = named[place % len(named)]
        edits = _edits(contrast.levels, setting.space.num_layers)
        items.append({"base": f"threshold:{share}", "edits": edits, "target_share": share, "why": contrast.why})
    return {"proposals": items}


def _directions(question: Question) -> Reply:
    layers = question.context.setting.space.num_layers
    return {
        "directions": [
            {"name": contrast.name, "edits": _edits(contrast.levels, layers), "why": contrast.why}
            for contrast in contrasts(question.context)[: question.count]
        ]
    }


def _decisions(question: Question) -> Reply:
    """Against candidates that leave the family the way that measured marginal costs and past trials speak against."""
    worst = sorted((score, index) for index, score in enumerate(_alignment(question)) if score < 0)[: question.count]
    return {
        "decisions": [
            {
                "id": index,
                "keep": False,
                "confidence": round(min(1.0, -score / 2), 3),
                "why": "against the measured costs",
            }
            for score, index in worst
        ]
    }


def _alignment(question: Question) -> list[float]:
    """How far each candidate leaves the family along the two best founded contrasts."""
    family, named = question.context.setting.family, contrasts(question.context)[:2]
    return [
        sum(float(torch.cosine_similarity(offset_from_path(family, x), contrast.levels, dim=0)) for contrast in named)
        for x in question.candidates
    ]


def _contrast(name: str, scores: Tensor, why: str) -> Contrast | None:
    """One level up where scores stand out, one down where they fall short."""
    levels = (scores > CONTRAST).double() - (scores < -CONTRAST).double()
    return Contrast(name, levels, why) if levels.gt(0).any() and levels.lt(0).any() else None


def _edits(levels: Tensor, layers: int) -> list[Reply]:
    """A contrast in the reply format: at most four edits."""
    edits = []
    for field, half in zip(("kv_delta", "neurons_delta"), levels.split(layers), strict=True):
        for delta in (-1, 1):
            members = (half == delta).nonzero().flatten().tolist()
            if members:
                edits.append({"layers": _ranges(members), field: delta})
    return edits


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Sorted layer numbers as ranges, the longest twelve."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    longest = sorted(runs, key=lambda run: (run[0] - run[1], run[0]))[:12]
    return [f"{first}-{last}" for first, last in sorted(longest)]


def _gaussian_basis(layers: int, per_kind: int = 6) -> Tensor:
    """Gaussian basis functions of depth for both kinds, `d x 2 per_kind`."""
    depth = torch.arange(layers, dtype=torch.float64)
    centres = torch.linspace(0, layers - 1, min(per_kind, layers), dtype=torch.float64)
    width = max(1.0, layers / per_kind / 2)
    basis = torch.exp(-((depth[:, None] - centres) ** 2) / (2 * width**2))
    return torch.block_diag(basis, basis)


def _standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / scores.std(correction=0).clamp_min(1e-12)


def _halves(values: Sequence[Any], layers: int) -> tuple[Sequence[Any], Sequence[Any]]:
    return values[:layers], values[layers:]


OFFLINE: Mapping[str, Callable[[Question], Reply]] = {
    "random": random_reply,
    "heuristic": heuristic_reply,
    "hostile": hostile_reply,
}
