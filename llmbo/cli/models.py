"""`llmbo models`."""

from llmbo.cli.common import say


def models() -> None:
    """List the model aliases. Any local folder or Hugging Face hub name works as well.

    Example: llmbo models
    """
    from llmbo.models.aliases import ALIASES

    for alias in ALIASES.values():
        say(f"{alias.name:10} {alias.title}; from the package {alias.package}, {alias.licence}")
