"""Short training of a pruned model: steps, validation, checkpoints. Knows nothing of files of models or of the command line."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from llmbo.errors import ConfigError, StorageError
from pruning.likelihood import quality
from pruning.projection import Projection

WARMUP = 0.05  # of all steps
FLOOR = 0.1  # of the learning rate, where the cosine ends
LORA_ALPHA = 2  # times the rank
LEARNING_RATES = {False: 3e-4, True: 1e-3}  # all weights, LoRA


@dataclass(frozen=True)
class Plan:
    """How to train.

    Args:
        steps, batch: Optimizer steps, and windows in each.
        lr: Peak learning rate; 0 takes the default of the method.
        lora: Train low-rank adapters (arXiv:2106.09685) of this rank instead of all weights but the embeddings; 0 is off.
        distil: Learn the dense model's distributions (forward KL, arXiv:1503.02531) instead of the text's next tokens.
        temperature: Of both distributions in `distil`.
        every: Steps between validations, each of which is a checkpoint to resume from.
        patience: Validations without a new best after which training stops.
    """

    steps: int
    batch: int = 4
    lr: float = 0.0
    lora: int = 0
    distil: bool = False
    temperature: float = 1.0
    every: int = 25
    patience: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, value in (("--steps", self.steps), ("--batch", self.batch), ("--eval-every", self.every)):
            if value < 1:
                raise ConfigError(f"{flag} must be at least 1, got {value}.")
        if self.lr < 0 or self.temperature <= 0:
            raise ConfigError(f"--lr and --temperature must be positive, got {self.lr} and {self.temperature}.")

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine."""
        peak, warm = self.lr or LEARNING_RATES[bool(self.lora)], max(1, round(WARMUP * self.steps))
        if step < warm:
            return peak * (step + 1) / warm
        share = (step - warm) / max(1, self.steps - warm)
        return peak * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * share)) / 2)


@dataclass
class Progress:
    """Where training stands. `history` holds (steps done, validation loss in nats per token), the untrained model first."""

    history: list[tuple[int, float]] = field(default_factory=list)

    @property
    def step(self) -> int:
        return self.history[-1][0]

    @property
    def best(self) -> tuple[int, float]:
        return min(self.history, key=lambda entry: entry[1])

    def is_over(self, plan: Plan) -> bool:
        behind = sum(step > self.best[0] for step, _ in self.history)
        return self.step >= plan.steps or behind >= plan.patience


def train(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    training: Tensor,
    validation: Tensor,
    plan: Plan,
    folder: Path,
    device: str,
    mixed_precision: str = "no",
    on_step: Callable[[int], None] = lambda step: None,
    on_validation: Callable[[Progress], None] = lambda progress: None,
) -> tuple[PreTrainedModel, Progress]:
    """Train float32 `model` on `num_windows x length` token ids and return it with the weights that validated best.

    Goes on from the checkpoint in `folder`, if there is one; the result is the same as without the interruption.

    Args:
        mixed_precision: Of the matrix products, as accelerate names it: "no", "bf16" or "fp16".

    Raises:
        StorageError: The checkpoint belongs to another plan or cannot be written.
        ConfigError: LoRA is asked for and peft is not installed.
    """
    AcceleratorState._reset_state()  # it keeps the precision of the process's first Accelerator, and refuses any other
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision)
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)  # LoRA's first factors are random
        learner: Any = _with_adapters(model, plan.lora) if plan.lora else _without_embeddings(model)
    weights = {name: parameter for name, parameter in learner.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    prepared, optimizer = accelerator.prepare(learner, optimizer)

    def validated() -> float:
        with accelerator.autocast():
            return quality(model, validation).loss

    checkpoints = CheckpointManager(folder, plan, weights, optimizer)
    progress = checkpoints.restore() or checkpoints.save(Progress([(0, validated())]))
    on_validation(progress)
    while not progress.is_over(plan):
        last = min(progress.step + plan.every, plan.steps)
        for step in range(progress.step, last):
            _step(accelerator, prepared, teacher, optimizer, _batch(training, plan, step), plan, step)
            on_step(step + 1)
        progress = checkpoints.save(Progress([*progress.history, (last, validated())]))
        on_validation(progress)
    checkpoints.load_best()
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    return (learner.merge_and_unload() if plan.lora else model).eval(), progress


def checkpoint_bytes(model: PreTrainedModel, plan: Plan) -> int:
    """Disk that the checkpoints of a training take at most: the best weights, and weights with two moments while they are replaced."""
    trained = sum(parameter.numel() for parameter in model.parameters())
    if plan.lora:
        shapes = [module.weight.shape for module in model.modules() if isinstance(module, Projection)]
        trained = sum(plan.lora * sum(shape) for shape in shapes)
    return 4 * (1 + 3 + 3) * trained


def forward_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of `... x V` logits softened by T, mean over all but the last axis, nats.

    T^2 keeps the size of the gradients (arXiv:1503.02531).
    """
    p = (teacher.float() / temperature).log_softmax(-1)
    q = (student.float() / temperature).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean() * temperature**2


def _step(
    accelerator: Accelerator,
    model: nn.Module,
    teacher: PreTrainedModel | None,
    optimizer: Any,
    windows: Tensor,
    plan: Plan,
    step: int,
) -> None:
    windows = windows.to(accelerator.device)
    for group in optimizer.param_groups:
        group["lr"] = plan.lr_at(step)
    model.eval()  # dropout would be one more thing to learn against in so few steps
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    if teacher is None:
        loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
    else:
        with torch.no_grad():
            target = teacher(input_ids=windows, use_cache=False).logits[:, :-1]
        loss = forward_kl(logits, target, plan.temperature)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _batch(training: Tensor, plan: Plan, step: int) -> Tensor:
    """Windows of one step: a new seeded order every epoch, so that any step can be made again."""
    epoch_steps = len(training) // plan.batch
    epoch, position = divmod(step, epoch_steps)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch))
    return training[order[position * plan.batch : (position + 1) * plan.batch]]


def _without_embeddings(model: PreTrainedModel) -> PreTrainedModel:
    """Everything learns but the embeddings and the head: a few hundred steps see too few of their rows."""
    model.requires_grad_(True)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(False)
    return model


def _with_adapters(model: PreTrainedModel, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("--lora needs the package peft: pip install 'llmbo[recovery]'.") from error
    config = LoraConfig(
        r=rank, lora_alpha=LORA_ALPHA * rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


class CheckpointManager:
    """Checkpoints of one training on disk: where it stands, and the weights that validated best."""

    def __init__(self, folder: Path, plan: Plan, weights: dict[str, nn.Parameter], optimizer: Any) -> None:
        self._state, self._best = folder / "state.pt", folder / "best.pt"
        self._plan, self._weights, self._optimizer = plan, weights, optimizer

    def restore(self) -> Progress | None:
        """Load the last checkpoint into weights and optimizer."""
        if not self._state.is_file():
            return None
        state = torch.load(self._state, map_location="cpu", weights_only=True)
        if state["plan"] != asdict(self._plan):
            raise StorageError(
                f"'{self._state.parent}' holds a recovery with other settings: delete it, or choose another --out."
            )
        self._load(state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        return Progress([(int(step), float(loss)) for step, loss in state["history"]])

    def save(self, progress: Progress) -> Progress:
        """Save everything needed to go on after `progress`."""
        weights = {name: parameter.detach() for name, parameter in self._weights.items()}
        if progress.best[0] == progress.step:
            _save(weights, self._best)
        state = {
            "plan": asdict(self._plan),
            "history": progress.history,
            "weights": weights,
            "optimizer": self._optimizer.state_dict(),
        }
        _save(state, self._state)
        return progress

    def load_best(self) -> None:
        self._load(torch.load(self._best, map_location="cpu", weights_only=True))

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._weights.items():
            parameter.copy_(weights[name])


def _save(content: dict[str, Any], path: Path) -> None:
    with _written(path) as temporary:
        torch.save(content, temporary)


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` when all is there."""
    temporary = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"Cannot write the checkpoint '{path}' ({error}): free some disk space and run again."
        ) from error
