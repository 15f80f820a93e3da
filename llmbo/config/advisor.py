"""What the user may type after `--advisor` and its companions. Refuses what can be refused without a model or a server."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from urllib.parse import urlsplit

from llmbo.config.plugins import installed, plugin_named
from llmbo.errors import ConfigError, unknown

HOOKS = ("warm_start", "propose", "directions", "filter")
CONTEXT_LEVELS = ("full", "partial", "none")
ENTRY_POINTS = "llmbo.advisors"
# name -> what its argument is, None when it takes none
KINDS = {
    "none": None,
    "random": None,
    "heuristic": None,
    "hostile": None,
    "openai": "MODEL[@BASE_URL]",
    "transformers": "PATH_OR_NAME or self",
    "replay": "FILE",
}


@dataclass(frozen=True)
class AdvisorSpec:
    """`kind[:argument]`; for `openai` the argument is the model and `base_url` the server, None for OpenAI's own."""

    kind: str
    argument: str = ""
    base_url: str | None = None


def plugins() -> dict[str, EntryPoint]:
    """Third parties' advisors by name."""
    return installed(ENTRY_POINTS)


def parse_spec(text: str) -> AdvisorSpec:
    """Check what was typed.

    Raises:
        ConfigError: Unknown name or one with two owners, missing or needless argument, or a URL that holds a secret.
    """
    kind, _, argument = text.partition(":")
    others = plugins()
    if kind not in KINDS and kind not in others:
        raise ConfigError(f"--advisor {text}: {unknown('advisor', kind, [*(_usage(name) for name in KINDS), *others])}")
    plugin_named("advisor", ENTRY_POINTS, kind, KINDS)  # one owner only
    wanted = KINDS.get(kind, "ARGUMENT")
    if kind in KINDS and bool(argument) != (wanted is not None):
        raise ConfigError(f"--advisor {kind} is written '{_usage(kind)}', got '{text}'.")
    if kind != "openai":
        return AdvisorSpec(kind, argument)
    model, at, url = argument.partition("@http")
    if not model:
        raise ConfigError(f"--advisor openai is written '{_usage(kind)}', got '{text}'.")
    return AdvisorSpec(kind, model, _checked_url(f"http{url}") if at else None)


def check_hooks(hooks: tuple[str, ...]) -> None:
    """Refuse unknown or repeated hooks.

    Raises:
        ConfigError: One of them is unknown, repeated, or there is none.
    """
    for hook in hooks:
        if hook not in HOOKS:
            raise ConfigError(f"--advisor-hooks: {unknown('hook', hook, HOOKS)}")
    if not hooks or len(set(hooks)) != len(hooks):
        raise ConfigError(f"--advisor-hooks needs different names out of {', '.join(HOOKS)}, got '{','.join(hooks)}'.")


def _usage(kind: str) -> str:
    wanted = KINDS[kind]
    return kind if wanted is None else f"{kind}:{wanted}"


def _checked_url(url: str) -> str:
    """The URL is stored and printed, so it must not carry a secret."""
    parts = urlsplit(url)
    if not parts.hostname or parts.scheme not in ("http", "https"):
        raise ConfigError(f"--advisor openai needs a server like http://localhost:8000/v1 behind the '@', got '{url}'.")
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            "--advisor openai: the server's URL must not hold a user, password or query; put the key into OPENAI_API_KEY."
        )
    return url
