"""Benchmark tasks through EleutherAI's lm-evaluation-harness, an optional package."""

import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmbo.errors import ConfigError, EvaluationError, first_line
from llmbo.models.loading import Checkpoint

ONE_TASK = re.compile(r"^task:[ \t]*['\"]?\w", re.MULTILINE)


@dataclass(frozen=True)
class Tasks:
    """Tasks that exist and whose data could be loaded.

    Args:
        names: Names of the harness, or paths of task files.
        limit: Examples per task; None takes all.
        num_fewshot: Solved examples before each question, drawn as the harness draws them; None takes each task's own number.
        apply_chat_template: Put questions as a user's turns and solved examples as turns before, in the model's chat template.
        notes: What the harness does not do as asked.
    """

    names: tuple[str, ...]
    manager: Any
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        names: Sequence[str],
        limit: int | None = None,
        num_fewshot: int | None = None,
        apply_chat_template: bool = False,
    ) -> "Tasks":
        """Find the tasks and load their data, before any model is loaded.

        Args:
            names: Task or group names, or paths of YAML files.

        Raises:
            ConfigError: The package is missing, there is no such task, or a task has too few examples.
            EvaluationError: A task's data cannot be loaded.
        """
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError("--tasks needs the package lm-eval: pip install 'llmbo[evaluate]'.") from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = TaskManager(
            include_path=sorted({str(Path(name).resolve().parent) for name in names if _is_file(name)}),
            include_defaults=not all(map(_stands_alone, names)),  # to look through all of them takes seconds
        )
        known = set(manager.all_tasks)
        for name in names:
            if name not in known and not _is_file(name):
                raise ConfigError(_unknown(name, known))
        try:
            loaded = manager.load(list(names))["tasks"]
        except Exception as error:  # whatever a task file or a dataset script raises
            raise EvaluationError(f"Cannot load the tasks {', '.join(names)}: {first_line(error)}") from error
        notes = tuple(_fewshot_notes(loaded, num_fewshot)) if num_fewshot else ()
        return cls(tuple(names), manager, limit, num_fewshot, apply_chat_template, notes)

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
            num_fewshot=self.num_fewshot,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.apply_chat_template,
            log_samples=False,
            bootstrap_iters=1000,
        )
        assert found is not None  # only on ranks other than the first
        return {task: _scores(values) for task, values in found["results"].items()}


def _fewshot_notes(tasks: Mapping[str, Any], wanted: int) -> Iterator[str]:
    """Tasks that take no examples, whatever is asked for.

    Raises:
        ConfigError: A task has fewer examples than wanted.
    """
    for name, task in tasks.items():
        if task.get_config("num_fewshot") == 0:
            yield f"The task '{name}' is defined without examples, so --num-fewshot {wanted} does not hold for it."
            continue
        drawn_from = task.fewshot_cfg.split
        own = drawn_from is not None and drawn_from == task.config.test_split  # the question itself is not shown
        examples = len(task.fewshot_docs()) - own
        if wanted > examples:
            raise ConfigError(f"--num-fewshot {wanted} is too many for the task '{name}': it has {examples} examples.")


def _scores(values: dict[str, Any]) -> dict[str, float]:
    """Numbers only, the harness' filter left out of their names where it is none."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "," in name
    }


def _is_file(name: str) -> bool:
    return _looks_like_file(name) and Path(name).is_file()


def _stands_alone(name: str) -> bool:
    """Whether it is a file of one task. One of a group may name tasks of the harness."""
    return _is_file(name) and bool(ONE_TASK.search(Path(name).read_text(encoding="utf-8", errors="replace")))


def _looks_like_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _unknown(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"Unknown task '{name}': {hint}Give a task of lm-eval, or the path of a YAML task file."
