"""A problem is prepared with what it needs and nothing else."""

import contextlib
from typing import Any

from llmbo import load_run


def test_without_compensation_no_gram_matrix_is_made_by_a_run_or_to_rebuild_its_models(llmbo: Any, shapes: Any) -> None:
    """They are most of the memory beside the model. The tiny llama's MLPs have 24 neurons; nothing else is 24 x 24."""
    with shapes() as made, contextlib.chdir(llmbo.folder):
        assert llmbo(budget=1, no_compensation=True).exit_code == 0
        load_run("runs/tiny", show="nothing").model(0)
    assert made.seen and (24, 24) not in made.seen
