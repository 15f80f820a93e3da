"""What the user may type after `--advisor` and its companions. Refuses what can be refused without a model or a server."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from urllib.parse import urlsplit

from llmbo.config.plugins import installed, plugin_named
from llmbo.errors import ConfigError, unknown

HOOKS = ("warm_start", "propose", "directions", "filter")
DEFAULT_HOOKS = ("warm_start", "propose", "directions")  # what the filter drops was right no more often than chance
# level -> what prompts tell at it: the model, tables of its blocks, what the optimiser thinks; trials and gaps are told at each
CONTEXT_LEVELS: Mapping[str, frozenset[str]] = {
    "full": frozenset({"model", "tables", "optimiser"}),
    "no-tables": frozenset({"model", "optimiser"}),
    "no-optimiser": frozenset({"model", "tables"}),
    "shuffled": frozenset({"model", "tables", "shuffled", "optimiser"}),
    "partial": frozenset(),
    "none": frozenset({"nothing"}),
}
ENTRY_POINTS = "llmbo.advisors"
# name -> what its argument is, None when it takes none
KINDS = {
    "none": None,
    "random": None,
    "heuristic": None,
    "hostile": None,
    "openai": "MODEL[@BASE_URL]",
    "transformers": "PATH_OR_NAME or self",
    "mail": "DIR",
    "replay": "FILE",
}
_SERVER = re.compile(r"(?P<model>.+?)@(?P<url>[a-z][a-z0-9+.-]*://.*)", re.IGNORECASE | re.DOTALL)
_HOST = re.compile(
    r"[./\\]|:\d*$|::|^\[|^localhost(:|$)|^https?:", re.IGNORECASE
)  # what a model's version behind an '@' does not hold
_MORE = re.compile(r"[?#]|//[^/]*@")  # than a server's place


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
    if not text.isprintable():
        raise ConfigError(f"--advisor takes a name in characters that can be printed, got {text!a}.")
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
    written = _SERVER.fullmatch(argument)
    if written:
        return AdvisorSpec(kind, written["model"], checked_url(written["url"], "--advisor openai needs"))
    model, at, tail = argument.rpartition("@")
    if argument.startswith("@") or "://" in argument:
        raise ConfigError(f"--advisor openai is written '{_usage(kind)}', got '{text}'.")
    if at and (not tail.strip() or _HOST.search(tail.strip())):
        raise ConfigError(
            f"--advisor {text}: '{tail}' looks like a server, so it needs its scheme: openai:{model}@http://{tail or 'HOST:PORT/v1'}."
        )
    if re.match(r"(localhost|\d+(\.\d+){3})(:|/|$)", argument, re.IGNORECASE):
        raise ConfigError(
            f"--advisor {text}: '{argument}' looks like a server, so it needs its scheme: openai:MODEL@http://{argument}."
        )
    return AdvisorSpec(kind, argument)


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


def checked_url(url: str, said: str) -> str:
    """The URL is stored and printed, so it must not carry a secret.

    Args:
        said: The beginning of the refusal, which says who needs the URL.

    Raises:
        ConfigError: It names no HTTP server, or holds more than the server.
    """
    if _MORE.search(url):
        raise ConfigError(
            f"{said} a server's URL without user, password, query or fragment; put the key into OPENAI_API_KEY."
        )
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:  # brackets or a port that make no sense
        named = False
    if not named or not url.isprintable() or " " in url:
        raise ConfigError(f"{said} a server like http://localhost:8000/v1, got {url!a}.")
    return url
