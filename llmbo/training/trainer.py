"""Short training of a pruned model: steps, validation, refits. Knows nothing of files of models or of the command line."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmbo.errors import out_of_memory
from llmbo.models.placement import DTYPES
from llmbo.training.checkpoints import Checkpoints
from llmbo.training.learner import REFIT_TOKENS, Learner, Refitter
from llmbo.training.plan import Plan, Progress
from llmbo.training.processes import add_up, agree_on, agreed, in_turn, own_part
from llmbo.training.teacher import NextTokens, Teacher, moved
from pruning.distillation import heard
from pruning.likelihood import DenseDistribution, Head, last_hidden, quality


def autocast(device: str, dtype: str) -> AbstractContextManager[object]:
    """Matrix products in this dtype, a key of `DTYPES`, as long as the context lasts; weights stay what they are."""
    reduced = dtype == "bfloat16"
    return torch.autocast(torch.device(device).type, DTYPES[dtype] if reduced else None, enabled=reduced)


@dataclass(frozen=True)
class Lesson:
    """What a model learns from, and by what it is judged on the way.

    Args:
        training, validation: `num_windows x length` token ids.
        teacher: Of the training windows.
        dense: What the dense model predicts on the validation windows; with it KL decides, else the loss.
        refitter: Where output projections are to be refitted.
        dtype: Of the matrix products, a key of `DTYPES`: float32 or bfloat16. Weights that learn are float32.
        examine: What else is told of the model behind every so many validations (`examined`; 0 for none), by name.
    """

    training: Tensor
    validation: Tensor
    teacher: Teacher = field(default_factory=NextTokens)
    dense: DenseDistribution | None = None
    refitter: Refitter | None = None
    device: str = "cpu"
    dtype: str = "float32"
    examine: Callable[[PreTrainedModel], dict[str, float]] = lambda model: {}
    examined: int = 0

    @property
    def autocast(self) -> Callable[[], AbstractContextManager[object]]:
        return partial(autocast, self.device, self.dtype)

    def learner(self, model: PreTrainedModel, plan: Plan) -> Learner:
        """The model, prepared to learn by a plan."""
        return Learner.of(model, plan, self.refitter)

    def forms(self, step: int) -> Sequence[Callable[[], AbstractContextManager[object]]]:
        """What the model is while it learns at a step, each as long as a context lasts; gradients are their mean's."""
        return (nullcontext,)

    def head_of(self, model: PreTrainedModel) -> Head:
        """The model's head, which does not learn, with weights in the dtype of the products."""
        head = Head.of(model)
        return head if self.dtype == "float32" else head.to(DTYPES[self.dtype])

    def judge(self, model: PreTrainedModel) -> float:
        """What `model` is validated by, nats per token."""
        with self.autocast():
            found = quality(model, self.validation, self.dense)
        return found.loss if found.kl is None else found.kl


def train(
    model: PreTrainedModel,
    lesson: Lesson,
    plan: Plan,
    folder: Path,
    on_step: Callable[[int], None] = lambda step: None,
    on_validation: Callable[[Progress], None] = lambda progress: None,
    tell: Callable[[str], None] = lambda line: None,
    until: int | None = None,
) -> tuple[PreTrainedModel, Progress]:
    """Train float32 `model` and return it with the weights that validated best.

    Goes on from the checkpoint in `folder`, if there is one; the result is the same as without the interruption. A loss that is no number
    ends it: see `Progress.fault`. The first time that memory runs out, half as many windows pass the model at once from then on.

    Args:
        tell: Is told such things in a line.
        until: Stop at the validation that is behind so many steps; another call goes on from there.

    Raises:
        StorageError: The checkpoint belongs to another plan or cannot be written.
    """
    learner = lesson.learner(model, plan)
    optimizer = torch.optim.AdamW(learner.trained.values(), weight_decay=0.0)
    head = lesson.head_of(model)
    checkpoints = Checkpoints(folder, plan, learner.weights, optimizer)
    with in_turn():
        progress = checkpoints.restore() or checkpoints.save(Progress([(0, lesson.judge(model))]))
    on_validation(progress)
    while not progress.is_over(plan) and (until is None or progress.step < until):
        last = min(progress.step + plan.every, plan.steps)
        lost = torch.zeros((), device=lesson.device)
        for step in range(progress.step, last):
            for group in optimizer.param_groups:
                group["lr"] = plan.lr_at(step)
            lost += _within_memory(model, lesson, head, plan, step, progress, tell)
            torch.nn.utils.clip_grad_norm_(learner.trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            on_step(step + 1)
        found = agreed(lesson.judge(model))
        if not torch.isfinite(lost + found):  # the only place that waits for the device
            told = f"the loss is no longer a number between steps {progress.step} and {last}"
            progress = replace(progress, fault=f"{told}; the last good checkpoint is '{checkpoints.of(progress.step)}'")
            break
        if plan.refits_after(last):
            found = _refitted(model, lesson, learner, plan, last, found)
        progress = replace(progress, history=[*progress.history, (last, found)])
        if lesson.examined and not (len(progress.history) - 1) % lesson.examined:
            progress.scores = [*progress.scores, (last, lesson.examine(model))]
        checkpoints.save(progress)
        on_validation(progress)
    checkpoints.load_best()
    return learner.merged().eval(), progress


def _within_memory(
    model: PreTrainedModel,
    lesson: Lesson,
    head: Head,
    plan: Plan,
    step: int,
    progress: Progress,
    tell: Callable[[str], None],
) -> Tensor:
    """The gradients of a step, and its loss; with half as many windows at once, and ever after, if memory runs out the first time."""
    places = batch_of(len(lesson.training), plan, step)
    while True:
        try:
            return gradients(model, lesson, head, places, progress.micro or plan.micro, step)
        except Exception as error:
            at_once = min(plan.micro or plan.batch, len(own_part(places)))
            if progress.micro or not out_of_memory(error) or at_once < 2:
                raise
        # out here nothing holds on to what the step had made
        progress.micro = at_once // 2
        model.zero_grad()
        tell(
            f"Out of memory at step {step}: from here on {progress.micro} windows pass the model at once instead of a batch."
        )


def gradients(
    model: PreTrainedModel, lesson: Lesson, head: Head, places: Tensor, micro: int = 0, step: int = 0
) -> Tensor:
    """Add the gradients of a batch's mean loss, and return that loss; each of several processes passes its part of the batch. Does not
    wait for the device.

    Args:
        head: The model's, as `Lesson.head_of` has it.
        places: Of the batch's windows.
        micro: Windows at once; 0 takes all.
    """
    total, forms, own = torch.zeros((), device=lesson.device), lesson.forms(step), own_part(places)
    for some in own.split(micro or len(own)):
        windows = moved(lesson.training[some], lesson.device)
        for form in forms:
            with form():
                with lesson.autocast(), heard(lesson.teacher.compared(model)) as streams:
                    loss = lesson.teacher.loss(last_hidden(model, windows), head, windows, some, streams)
                loss = loss * (len(some) / len(places) / len(forms))
                loss.backward()
            total += loss.detach()
    return add_up(model.parameters(), total)


@torch.no_grad()
def _refitted(model: PreTrainedModel, lesson: Lesson, learner: Learner, plan: Plan, step: int, found: float) -> float:
    """Refit on some training windows, and what the model is validated by then. Where that is no better, nothing has changed."""
    assert lesson.refitter is not None  # `Learner.of` has seen to it
    count = max(1, REFIT_TOKENS // lesson.training.shape[1])
    order = torch.randperm(len(lesson.training), generator=torch.Generator().manual_seed(plan.seed + step))
    before = {name: parameter.clone() for name, parameter in learner.refitted.items()}
    with lesson.autocast():
        lesson.refitter.refit(model, lesson.training[order[:count]])
    agree_on(learner.refitted.values())
    if (refitted := agreed(lesson.judge(model))) < found:
        return refitted
    for name, parameter in learner.refitted.items():
        parameter.copy_(before[name])
    return found


def batch_of(windows: int, plan: Plan, step: int) -> Tensor:
    """Places of the windows of one step: a new seeded order every epoch, so that any step can be made again."""
    epoch, position = divmod(step, windows // plan.batch)
    return epoch_order(windows, plan.seed, epoch)[position * plan.batch : (position + 1) * plan.batch]


def epoch_order(windows: int, seed: int, epoch: int) -> Tensor:
    """In which the windows come."""
    return torch.randperm(windows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
