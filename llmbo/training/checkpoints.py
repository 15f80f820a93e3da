"""Checkpoints of one training on disk: whole or not there, and nothing in them is run when they are read."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from llmbo.errors import StorageError, first_line
from llmbo.training.learner import adapter_values
from llmbo.training.plan import Plan, Progress
from llmbo.training.processes import in_turn, place

BEST, WEIGHTS, OPTIMIZER, PROGRESS = "best.safetensors", "weights.safetensors", "optimizer.safetensors", "progress.json"


class Checkpoints:
    """The last validation's weights and moments, as the folder `step-N`, and the weights that validated best.

    A checkpoint appears as a whole before the one before it is deleted: whatever ends the process, the newest is all that is lost.
    """

    def __init__(self, folder: Path, plan: Plan, weights: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
        self._folder, self._plan, self._weights, self._optimizer = folder, plan, weights, optimizer

    def restore(self) -> Progress | None:
        """Load the last checkpoint into weights and optimizer.

        Raises:
            StorageError: It belongs to another plan or version, or is damaged.
        """
        if not (steps := self._steps()):
            return None
        *former, last = steps
        if not place():
            _delete(former)  # of a process that died before it could
        try:
            stored = json.loads((last / PROGRESS).read_text(encoding="utf-8"))
            if stored["plan"] != asdict(self._plan):
                raise StorageError(
                    f"'{self._folder}' holds a recovery with other settings: delete it, or choose another --out."
                )
            self._put(load_file(last / WEIGHTS))
            self._put_moments(load_file(last / OPTIMIZER))
            history, scores = (
                [(step, found) for step, found in of] for of in (stored["history"], stored.get("scores", ()))
            )
            return Progress(history, stored["micro"], scores)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise StorageError(
                f"The checkpoint '{last}' is damaged or of another version of llmbo ({first_line(error)}): delete '{self._folder}', then "
                "run again."
            ) from error

    def save(self, progress: Progress) -> Progress:
        """Save everything needed to go on after `progress`. Of several processes the first one does.

        Raises:
            StorageError: The disk does not take it; the one before is still there.
        """
        if place():
            return progress
        if progress.best[0] == progress.step:
            with _written(self._folder / BEST) as temporary:
                save_file(self._trained(), temporary)
        former = self._steps()
        with _written(self.of(progress.step)) as temporary:
            temporary.mkdir(exist_ok=True)
            save_file(self._trained(), temporary / WEIGHTS)
            save_file(self._moments(), temporary / OPTIMIZER)
            stored = {"plan": asdict(self._plan), **asdict(progress)}
            (temporary / PROGRESS).write_text(json.dumps(stored), encoding="utf-8")
        _delete(former)
        return progress

    def of(self, step: int) -> Path:
        """Where the checkpoint behind a step is, or was."""
        return self._folder / f"step-{step}"

    def load_best(self) -> None:
        """Give the weights the values that validated best."""
        with in_turn():
            self._put(load_file(self._folder / BEST))

    @torch.no_grad()
    def _put(self, stored: Mapping[str, Tensor]) -> None:
        for name, parameter in self._weights.items():
            parameter.copy_(stored[name])

    def _trained(self) -> dict[str, Tensor]:
        return {name: parameter.detach().contiguous() for name, parameter in self._weights.items()}

    def _moments(self) -> dict[str, Tensor]:
        """AdamW's step and two moments of each weight; none before the first step."""
        state = self._optimizer.state
        return {
            f"{name}.{key}": value
            for name, parameter in self._weights.items()
            for key, value in state.get(parameter, {}).items()
        }

    def _put_moments(self, stored: Mapping[str, Tensor]) -> None:
        for key, value in stored.items():
            name, _, kind = key.rpartition(".")
            parameter = self._weights[name]
            own = self._optimizer.state[parameter]
            own[kind] = value.clone() if kind == "step" else value.to(parameter.device, copy=True)

    def _steps(self) -> list[Path]:
        """Whole checkpoints, the last one last."""
        return sorted(self._folder.glob("step-*[0-9]"), key=lambda path: int(path.name.removeprefix("step-")))


def checkpoint_bytes(model: PreTrainedModel, plan: Plan) -> int:
    """Disk that the checkpoints of a training take at most: the best weights, and weights with two moments while they are replaced."""
    own = sum(parameter.numel() for parameter in model.parameters())
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    trained = {
        "all": own,
        "norms": norms,
        "lora": adapter_values(model, plan.rank),
        "refit-lora": own + norms + adapter_values(model, plan.rank),  # what is refitted has no moments
    }
    return 4 * (1 + 3 + 3) * trained[plan.train]


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
    except (OSError, SafetensorError) as error:
        _delete([temporary])
        raise StorageError(
            f"Cannot write the checkpoint '{path}' ({first_line(error)}): free some disk space and run again, which goes on from the "
            "checkpoint before."
        ) from error
