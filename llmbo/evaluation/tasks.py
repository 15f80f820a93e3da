"""Benchmark tasks through EleutherAI's lm-evaluation-harness, an optional package."""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmbo.errors import ConfigError, EvaluationError, first_line
from llmbo.models.loading import Checkpoint


@dataclass(frozen=True)
class Tasks:
    """Tasks that exist and whose data could be loaded.

    Args:
        names: Names of the harness, or paths of task files.
        limit: Examples per task; None takes all.
    """

    names: tuple[str, ...]
    manager: Any
    limit: int | None = None

    @classmethod
    def load(cls, names: Sequence[str], limit: int | None = None) -> "Tasks":
        """Find the tasks and load their data, before any model is loaded.

        Args:
            names: Task or group names, or paths of YAML files.

        Raises:
            ConfigError: The package is missing, or there is no such task.
            EvaluationError: A task's data cannot be loaded.
        """
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError("--tasks needs the package lm-eval: pip install 'llmbo[evaluate]'.") from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = TaskManager(
            include_path=sorted({str(Path(name).resolve().parent) for name in names if _is_file(name)})
        )
        known = set(manager.all_tasks)
        for name in names:
            if name not in known and not _is_file(name):
                raise ConfigError(_unknown(name, known))
        try:
            manager.load(list(names))
        except Exception as error:  # whatever a task file or a dataset script raises
            raise EvaluationError(f"Cannot load the tasks {', '.join(names)}: {first_line(error)}") from error
        return cls(tuple(names), manager, limit)

    def evaluate(self, checkpoint: Checkpoint, batch_size: int = 1) -> dict[str, dict[str, float]]:
        """Scores by task and metric ("acc", "acc_stderr", "acc_norm", …), as the harness names them."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        adapter = HFLM(pretrained=checkpoint.model, tokenizer=checkpoint.tokenizer, batch_size=batch_size)
        found = simple_evaluate(
            adapter,
            tasks=list(self.names),
            task_manager=self.manager,
            limit=self.limit,
            log_samples=False,
            bootstrap_iters=1000,
        )
        assert found is not None  # only on ranks other than the first
        return {task: _scores(values) for task, values in found["results"].items()}


def _scores(values: dict[str, Any]) -> dict[str, float]:
    """Numbers only, the harness' filter left out of their names where it is none."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "," in name
    }


def _is_file(name: str) -> bool:
    return _looks_like_file(name) and Path(name).is_file()


def _looks_like_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _unknown(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"Unknown task '{name}': {hint}Give a task of lm-eval, or the path of a YAML task file."
