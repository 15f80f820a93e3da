"""Prompts as letters in a folder, for models without an API and for blind tests: somebody else puts the replies beside them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from llmbo.advisor.client import Completion, Spending
from llmbo.advisor.parse import ends_early
from llmbo.advisor.render import Prompt, estimated_tokens
from llmbo.advisor.shapes import reply_text
from llmbo.errors import ConfigError, ReplyAwaited
from llmbo.files import replace_file

MAX_BYTES = 1_000_000  # of a reply
_LETTER = """\
# {name}

Give both messages to a model, and put its reply, as it comes, into `{reply}`: at most {tokens} tokens, thinking included.
As a chat request, with the JSON schema of the reply: `{record}`. Digest: {digest}

## System

{system}

## User

{user}
"""


@dataclass
class MailClient:
    """Writes each prompt as the next letter of a run, and reads the reply when it lies there.

    A letter is never written over by that of another prompt, so that no reply is taken for the answer to another question.

    Args:
        folder: Where the letters go.
        spending: Its exchanges number the letters, so that a run that is taken up again waits for the same one.
    """

    folder: Path
    spending: Spending
    model: str = "mail"

    def complete(self, prompt: Prompt, deadline: float) -> Completion:
        """The reply beside the letter.

        Raises:
            ReplyAwaited: There is none yet; the letter has been written.
            ConfigError: Letter or reply cannot be used as they are.
        """
        name = f"{len(self.spending.exchanges()) + 1:03d}-{prompt.hook}"
        letter, record = (self.folder / f"{name}.prompt.{ending}" for ending in ("md", "json"))
        places = [self.folder / f"{name}.reply.{ending}" for ending in ("md", "json")]
        replies = [place for place in places if os.path.lexists(place)]
        if len(replies) > 1:
            raise ConfigError(f"Both '{replies[0]}' and '{replies[1]}' lie there: leave one of them.")
        if replies and not os.path.lexists(record):
            raise ConfigError(
                f"'{replies[0]}' answers a letter that was never written: move it away, or put '{record}' back."
            )
        if os.path.lexists(record) and (asked := _digest(record)) != prompt.digest:
            raise ConfigError(
                f"'{record}' asks something else than the run now does (digest {asked}, now {prompt.digest}): start the run with the "
                "settings of that letter, or move the letter and its reply away."
            )
        if replies:
            text = _reply(replies[0], prompt.name)
            return Completion(text, 0, estimated_tokens(text), "mail")
        request = {
            "digest": prompt.digest,
            "messages": [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}],
            "max_tokens": prompt.max_tokens,
            "schema": prompt.schema,
            "reply": places[0].name,
        }
        told = _LETTER.format(
            name=name, reply=places[0].name, tokens=prompt.max_tokens, record=record.name, digest=prompt.digest,
            system=prompt.system.strip(), user=prompt.user.strip(),
        )  # fmt: skip
        self._write({record: json.dumps(request, indent=1, ensure_ascii=False) + "\n", letter: told})
        raise ReplyAwaited(letter, places[0])

    def _write(self, texts: dict[Path, str]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path, text in texts.items():
                replace_file(path, text)
        except OSError as error:
            raise ConfigError(
                f"--advisor mail:{self.folder}: no letter can be written ({error.strerror}): mend that, and run the same command again."
            ) from error


def check_mail(folder: Path) -> None:
    """Refuse a place where no letters can be written; makes nothing.

    Raises:
        ConfigError: It is a file or may not be written.
    """
    try:
        standing = next(path for path in (folder.absolute(), *folder.absolute().parents) if _stands(path))
        legal = standing.is_dir() and os.access(standing, os.W_OK | os.X_OK)
        fault = "" if legal else f"'{standing}' is {'not to be written' if standing.is_dir() else 'a file'}"
    except OSError as error:
        fault = error.strerror or str(error)
    if fault:
        raise ConfigError(
            f"--advisor mail:{folder} needs a folder for letters and replies ({fault}): name another one."
        )


def _stands(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _digest(record: Path) -> str:
    """Of the prompt in a letter's record."""
    try:
        return str(json.loads(_text(record))["digest"])
    except (ValueError, RecursionError, LookupError, TypeError):
        raise ConfigError(f"'{record}' is no letter of a run: move it away, and the run writes it anew.") from None


def _reply(place: Path, key: str) -> str:
    """What a model has answered, without its thinking."""
    written = _text(place)
    text = reply_text({"content": written}, cut=False)
    if not text:
        raise ConfigError(
            f"The reply '{place}' is empty: put the model's text into it, and run the same command again."
        )
    if ends_early(text, key):
        raise ConfigError(
            f"The reply '{place}' ends before its JSON object does: put the rest into it, and run the same command again."
        )
    return text


def _text(place: Path) -> str:
    try:
        content = place.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"'{place}' cannot be read ({error.strerror}): mend that, and run the same command again."
        ) from None
    if len(content) > MAX_BYTES:
        raise ConfigError(
            f"'{place}' has more than {MAX_BYTES} bytes, which is no reply: put the model's text into it."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"'{place}' is no UTF-8 text (byte {error.start}): save it as UTF-8, and run the same command again."
        ) from None
