"""How to train, for how long, and how it went. Needs neither a model nor anything heavy."""

import math
from dataclasses import dataclass, field
from typing import Annotated

from llmbo.config.numbers import MOST, MOST_TOKENS, SEED, Within, check_numbers
from llmbo.errors import ConfigError, unknown

WARMUP = 0.05  # of all steps
FLOOR = 0.1  # of the learning rate, where the cosine ends
RANK = 16  # of the adapters
MINUTES = 20.0
BATCH, DEVICE_BATCH = 4, 16  # windows of a step, on a CPU and on devices that want more at once
LEAST_STEPS = 4  # of a training that minutes are too short for
PASSES = 2  # over each window where the dense model's predictions are kept: as good as fresh ones (arXiv:2305.16264), at half of its time
VALIDATIONS = 10  # of a training, unless --eval-every says otherwise
REFITS = 5  # of a training, each about three passes

# What trains, and the peak learning rate that it does best with.
METHODS: dict[str, tuple[str, float]] = {
    "lora": ("low-rank adapters of all projections", 1e-3),
    "refit-lora": ("low-rank adapters of the blocks' inputs, norms; output projections are refitted", 1e-3),
    "norms": ("norms and biases", 1e-3),
    "all": ("all weights but the embeddings", 3e-4),
}


@dataclass(frozen=True)
class Plan:
    """How to train.

    Args:
        steps, batch: Optimizer steps, and windows in each. Of a plan that is carried out none is 0; before, 0 stands for what follows from
            time and device.
        train: What learns, see `METHODS`.
        rank: Of adapters (arXiv:2106.09685).
        lr: Peak learning rate; 0 takes the default of the method.
        distil: Learn the dense model's distributions (forward KL, arXiv:1503.02531) instead of the text's next tokens.
        every: Steps between validations, each of which is a checkpoint to resume from, and after some of which there is a refit.
        patience: Validations without a new best after which training stops.
        micro: Windows that pass the model at once; 0 takes all of a batch. Gradients are summed over a batch.
        hidden: Weight of the distance between the residual streams of both models (`pruning.distillation.distance`) beside the divergence.
        recompute: Keep no activations for the backward pass but those between layers (Chen et al. 2016, arXiv:1604.06174).

    Raises:
        ConfigError: A number is out of range, or the method unknown.
    """

    steps: Annotated[int, Within(0, MOST)]
    batch: Annotated[int, Within(0, MOST)] = BATCH
    train: str = "lora"
    rank: Annotated[int, Within(1, MOST)] = RANK
    lr: Annotated[float, Within(0, MOST)] = 0.0
    distil: bool = False
    every: Annotated[int, Within(0, MOST, flag="--eval-every")] = 25
    patience: Annotated[int, Within(1, MOST)] = 4
    seed: Annotated[int, SEED] = 0
    micro: Annotated[int, Within(0, MOST, flag="--micro-batch")] = 0
    recompute: bool = False
    hidden: Annotated[float, Within(0, MOST)] = 0.0

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.train not in METHODS:
            raise ConfigError(unknown("--train", self.train, METHODS))

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return self.lr or METHODS[self.train][1]

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine."""
        peak, warm = self.peak, max(1, round(WARMUP * self.steps))
        if step < warm:
            return peak * (step + 1) / warm
        share = (step - warm) / max(1, self.steps - warm)
        return peak * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * share)) / 2)

    def refits_after(self, step: int) -> bool:
        """Whether output projections are refitted behind a validation: behind `REFITS` of them, evenly, the last among these."""
        validations = -(-self.steps // self.every)
        own = -(-step // self.every)  # counted from one
        due = min(REFITS, validations)
        return self.train == "refit-lora" and own * due // validations > (own - 1) * due // validations


@dataclass(frozen=True)
class Length:
    """How long to train: by steps, by tokens, or by minutes, which is what is left when neither is given.

    Raises:
        ConfigError: A number is out of range, or several are given.
    """

    steps: Annotated[int | None, Within(1, MOST)] = None
    tokens: Annotated[int | None, Within(1, MOST_TOKENS)] = None
    minutes: Annotated[float | None, Within(0, MOST, apart=True)] = None

    def __post_init__(self) -> None:
        check_numbers(self)
        given = [f"--{name} {value:g}" for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} both say how long to train: give one of them.")

    @property
    def seconds(self) -> float:
        """There are, where neither steps nor tokens are given."""
        return 60 * (self.minutes or MINUTES)

    def known_steps(self, batch_tokens: int) -> int | None:
        """Steps of so many tokens each; None where they follow from minutes."""
        return self.steps or (self.tokens and -(-self.tokens // batch_tokens))

    def steps_of(self, step: float, teacher: float, windows: int, batch: int, apart: float) -> int:
        """Steps that the minutes leave room for.

        Args:
            step: Seconds of one, without the teacher's.
            teacher: Seconds that the dense model takes for a window.
            windows: There are to train on; each passes the dense model once, and the small one `PASSES` times at least.
            batch: Windows in a step.
            apart: Seconds of all that is done but once, and of all validations together.
        """
        left = self.seconds - apart
        steps = left / (step + batch * teacher / PASSES)
        if steps * batch > PASSES * windows:
            steps = (left - windows * teacher) / step
        return min(MOST, max(LEAST_STEPS, int(steps)))


@dataclass
class Progress:
    """Where training stands.

    Args:
        history: (Steps done, what is validated in nats per token: KL from the dense model where it teaches, else loss), the untrained
            model first.
        micro: Windows at once, where that is less than the plan's.
        scores: (Steps done, part of the items that are right, by file) behind some of the validations.
        fault: Why it stopped before its time; empty if it did not.
    """

    history: list[tuple[int, float]] = field(default_factory=list)
    micro: int = 0
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    fault: str = ""

    @property
    def step(self) -> int:
        return self.history[-1][0]

    @property
    def best(self) -> tuple[int, float]:
        return min(self.history, key=lambda entry: entry[1])

    def is_over(self, plan: Plan) -> bool:
        behind = sum(step > self.best[0] for step, _ in self.history)
        return bool(self.fault) or self.step >= plan.steps or behind >= plan.patience


def method_of(train: str, lora: bool | None, rank: int | None) -> tuple[str, int]:
    """`Plan.train` and `Plan.rank` for what was typed.

    Raises:
        ConfigError: Two that do not go together, or a rank of adapters that nobody trains.
    """
    if rank is not None:
        Within(1, MOST).check("--rank", rank, whole=True)
    short = {None: "", True: "lora", False: "all"}[lora]
    if train and short and train != short:
        raise ConfigError(f"--train {train} and --{'no-' * (not lora)}lora ask for different trainings: leave one out.")
    method = train or short or "lora"
    if rank is not None and "lora" not in method:
        raise ConfigError(f"--rank {rank} is of no use without adapters: take --lora, or leave the rank out.")
    return method, rank or RANK
