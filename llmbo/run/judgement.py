"""What the finished front is judged by beside its values: their noise, items it gets right, what it writes. The search sees none of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from llmbo.errors import printable
from llmbo.models.loading import max_positions
from llmbo.problem.objectives import Objective
from llmbo.report import front_of
from llmbo.report.schema import NoisePart
from llmbo.run.assemble import RunParts
from llmbo.run.records import digest_elsewhere
from llmbo.search.noise import half_width, surely_better
from llmbo.types import Measurement, Phases, Trial
from pruning.continuations import continued

PROMPTS = (  # a fact, a story, code
    "The three largest cities in France are",
    "The old man opened the box and found",
    "def is_prime(n):",
)
NEW_TOKENS = 24
SAMPLED = 6  # points of the front


def judge(run: RunParts, phases: Phases) -> None:
    """Ask the finished front, and the dense model, every item, and some of it for samples; skips what is stored."""
    front, tokenizer = front_of(run.store.trials(), run.objectives), run.loaded.tokenizer
    if run.exams:
        _complete(run, phases, "items", front, lambda model: {exam.name: exam.taken_by(model) for exam in run.exams})
    if run.config.samples and run.loaded.resident:  # they are written by whole models
        _complete(run, phases, "samples", spread(front, SAMPLED), lambda model: samples(model, tokenizer))


def judgements(run: RunParts) -> dict[str, Mapping[int | None, Mapping[str, Any]]]:
    """What is stored, as the report shows it: of samples those that belong to the front as it is now."""
    front = front_of(run.store.trials(), run.objectives)
    shown = {None, *(trial.number for trial in spread(front, SAMPLED))}
    found, digest = run.store.judgements("samples"), digest_elsewhere(run.store.facts)
    elsewhere = run.store.heldout(digest) if digest else {}
    return {
        "items": run.store.judgements("items"),
        "samples": {key: found[key] for key in shown & found.keys()},
        "noise": noise(front, windows_of(run.store.heldout()), run.objectives),
        "noise_elsewhere": noise(front, windows_of(elsewhere), run.objectives),
    }


def windows_of(found: Mapping[int | None, Measurement]) -> dict[int | None, Mapping[str, Sequence[float]]]:
    """`kl` and `loss` by window of those that have kept them."""
    return {number: measured.windows for number, measured in found.items() if measured.windows}


def noise(
    front: Sequence[Trial],
    windows: Mapping[int | None, Mapping[str, Sequence[float]]],
    objectives: Sequence[Objective],
) -> dict[int | None, dict[str, Any]]:
    """`NoisePart` of every point of the front that has kept its held-out windows, two or more; smallest first, as `front`.

    Args:
        windows: `kl` and `loss` of each held-out window by trial number, and of the dense model (None).
    """
    known = [trial for trial in front if trial.number in windows]
    if not known or None not in windows or len(windows[None]["loss"]) < 2:
        return {}
    by: Literal["kl", "loss"] = "loss" if "loss" in {objective.name for objective in objectives} else "kl"
    values = {
        name: torch.tensor([windows[trial.number][name] for trial in known], dtype=torch.float64)
        for name in ("kl", "loss")
    }
    cost = {**values, "loss": values["loss"] - torch.tensor(windows[None]["loss"], dtype=torch.float64)}
    wide = {name: half_width(found).tolist() for name, found in cost.items()}
    found: dict[int | None, dict[str, Any]] = {}
    for place, trial in enumerate(known):
        better = surely_better(values[by][place], values[by]).tolist()
        not_better = [
            other.number
            for other, sure in zip(known, better, strict=True)
            if not sure and other.values["params"] < trial.values["params"]
        ]
        found[trial.number] = NoisePart(
            windows=values[by].shape[1],
            kl=wide["kl"][place],
            loss=wide["loss"][place],
            by=by,
            not_better_than=not_better,
        ).model_dump()
    return found


def spread(front: Sequence[Trial], count: int) -> list[Trial]:
    """At most `count` trials of a front, smallest first: its ends, and what lies nearest to equal steps of size between them."""
    if len(front) <= count:
        return list(front)
    sizes = [trial.values["params"] for trial in front]
    wanted = [sizes[0] + (sizes[-1] - sizes[0]) * step / (count - 1) for step in range(1, count - 1)]
    nearest = (min(range(len(front)), key=lambda place: abs(sizes[place] - size)) for size in wanted)
    return [front[place] for place in sorted({0, *nearest, len(front) - 1})[:count]]


def samples(model: PreTrainedModel, tokenizer: Any) -> dict[str, str]:
    """What `model` writes behind each prompt, as far as its positions reach, without what a terminal would obey.

    A prompt that has no tokens, or no room behind it, has no text.
    """
    tokens = {prompt: torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS}
    tokens = {prompt: ids for prompt, ids in tokens.items() if 0 < len(ids) < max_positions(model)}
    if not tokens:
        return {}
    prompts = list(tokens.values())
    count = min(NEW_TOKENS, max_positions(model) - max(map(len, prompts)))
    texts = {}
    for (prompt, ids), new in zip(
        tokens.items(), continued(model, prompts, count, tokenizer.eos_token_id), strict=True
    ):
        before, whole = (
            tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for part in (ids, torch.cat([ids, new]))
        )
        texts[prompt] = printable(whole.removeprefix(before))  # decoded alone, a word would lose the space before it
    return texts


def _complete(
    run: RunParts,
    phases: Phases,
    kind: str,
    trials: Sequence[Trial],
    of: Callable[[PreTrainedModel], Mapping[str, Any]],
) -> None:
    """Store what `of` says of the dense model and each trial that has nothing stored."""
    space, stored = run.problem.space, run.store.judgements(kind)
    wanted: dict[int | None, tuple[int, ...]] = {None: space.max_levels}
    wanted |= {trial.number: trial.x for trial in trials}
    missing = [number for number in wanted if number not in stored]
    if missing:
        with phases.phase(kind, len(missing)) as advance:
            for done, number in enumerate(missing, 1):
                with run.problem.supernet.active(space.decode(wanted[number])) as model:
                    found = of(model)
                run.store.set_judgement(kind, number, found)
                advance(done)
