"""Libraries that talk while they load: quiet for a program, and for a while."""

import contextlib
import warnings
from collections.abc import Iterator

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging


def silence_libraries() -> None:
    """No progress bars and notices from libraries: a program's own display is enough. For programs only."""
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # a line for each of its attempts
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="gpytorch|linear_operator|botorch")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft's way to ask, until it changes


@contextlib.contextmanager
def libraries_silenced() -> Iterator[None]:
    """The same for as long as the context lasts, for callers who have settings of their own."""
    verbosity, hub, bars = logging.get_verbosity(), hub_logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        try:
            silence_libraries()
            yield
        finally:
            logging.set_verbosity(verbosity)
            hub_logging.set_verbosity(hub)
            if bars:
                logging.enable_progress_bar()
