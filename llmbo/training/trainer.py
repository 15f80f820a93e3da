"""Short training of a pruned model: steps, validation, checkpoints. Knows nothing of files of models or of the command line."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import RNG_STATE_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from llmbo.config.numbers import MOST, SEED, Within, check_numbers
from llmbo.errors import ConfigError, StorageError, first_line
from pruning.likelihood import quality
from pruning.projection import Projection

WARMUP = 0.05  # of all steps
FLOOR = 0.1  # of the learning rate, where the cosine ends
RANK = 16  # of the adapters
LORA_ALPHA = 2  # times the rank
PROGRESS = "progress.json"  # in each checkpoint: the plan, and how validation went
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

    Raises:
        ConfigError: A number is out of range.
    """

    steps: Annotated[int, Within(1, MOST)]
    batch: Annotated[int, Within(1, MOST)] = 4
    lr: Annotated[float, Within(0, MOST)] = 0.0
    lora: Annotated[int, Within(0, MOST, flag="--rank")] = 0
    distil: bool = False
    temperature: Annotated[float, Within(0, MOST, apart=True)] = 1.0
    every: Annotated[int, Within(1, MOST, flag="--eval-every")] = 25
    patience: Annotated[int, Within(1, MOST)] = 4
    seed: Annotated[int, SEED] = 0

    def __post_init__(self) -> None:
        check_numbers(self)

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


def adapter_rank(lora: bool, rank: int | None) -> int:
    """`Plan.lora` for what was typed.

    Raises:
        ConfigError: A rank below 1, which would train all weights, or one without `--lora`.
    """
    if rank is not None:
        Within(1, MOST).check("--rank", rank, whole=True)
        if not lora:
            raise ConfigError(f"--rank {rank} is of no use without --lora: add it, or leave the rank out.")
    return (RANK if rank is None else rank) if lora else 0


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

    checkpoints = CheckpointManager(folder, plan, weights, accelerator)
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
    """Checkpoints of one training on disk: accelerate's state after each validation, and the weights that validated best.

    A checkpoint appears as a whole, as the folder `step-N`, before the one before it is deleted.
    """

    def __init__(self, folder: Path, plan: Plan, weights: Mapping[str, nn.Parameter], accelerator: Accelerator) -> None:
        self._folder, self._best = folder, folder / "best.safetensors"
        self._plan, self._weights, self._accelerator = plan, weights, accelerator
        accelerator.register_save_state_pre_hook(self._leave_out_frozen)

    def restore(self) -> Progress | None:
        """Load the last checkpoint into weights and optimizer.

        Raises:
            StorageError: It belongs to another plan or version, or is damaged.
        """
        if (self._folder / "state.pt").exists():
            raise StorageError(f"'{self._folder}' was left by an earlier version of llmbo: delete it, then run again.")
        if not (steps := self._steps()):
            return None
        *former, last = steps
        _delete(former)  # of a process that died before it could
        try:
            stored = json.loads((last / PROGRESS).read_text(encoding="utf-8"))
            if stored["plan"] != asdict(self._plan):
                raise StorageError(
                    f"'{self._folder}' holds a recovery with other settings: delete it, or choose another --out."
                )
            # `strict`: frozen weights are not in it. `weights_only`: nothing that is in it is run.
            self._accelerator.load_state(str(last), load_kwargs={"weights_only": True}, strict=False)
            return Progress([(step, loss) for step, loss in stored["history"]])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, UnpicklingError) as error:
            raise StorageError(
                f"The checkpoint '{last}' is damaged ({first_line(error)}): delete '{self._folder}', then run again."
            ) from error

    def save(self, progress: Progress) -> Progress:
        """Save everything needed to go on after `progress`."""
        if progress.best[0] == progress.step:
            with _written(self._best) as temporary:
                save_file(self._trained(), temporary)
        former = self._steps()
        with _written(self._folder / f"step-{progress.step}") as temporary:
            self._accelerator.save_state(str(temporary))
            _delete(temporary.glob(f"{RNG_STATE_NAME}_*"))  # the caller's generators, of which training uses none
            stored = {"plan": asdict(self._plan), "history": progress.history}
            (temporary / PROGRESS).write_text(json.dumps(stored), encoding="utf-8")
        _delete(former)
        return progress

    @torch.no_grad()
    def load_best(self) -> None:
        best = load_file(self._best)
        for name, parameter in self._weights.items():
            parameter.copy_(best[name])

    def _leave_out_frozen(self, models: list[nn.Module], states: list[dict[str, Tensor]], folder: str) -> None:
        """A hook of `save_state`: what is not trained, which may be most of a model, is there without a checkpoint."""
        states[0] = self._trained()

    def _trained(self) -> dict[str, Tensor]:
        return {name: parameter.detach().contiguous() for name, parameter in self._weights.items()}

    def _steps(self) -> list[Path]:
        """Whole checkpoints, the last one last."""
        return sorted(self._folder.glob("step-*[0-9]"), key=lambda path: int(path.name.removeprefix("step-")))


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` when all is there."""
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        _delete([temporary])
        raise StorageError(
            f"Cannot write the checkpoint '{path}' ({error}): free some disk space and run again."
        ) from error
