"""The shapes in which real servers send a reply or a complaint. Pure: what a server says -> the words that count."""

import json
import re
from collections.abc import Mapping
from typing import Any

_THOUGHT = re.compile(r"</think(?:ing)?>|\[/THINK\]", re.IGNORECASE)  # ends what a model thinks before it answers
_THINKING = re.compile(r"\s*(?:<think(?:ing)?>|\[THINK\])", re.IGNORECASE)
_STATUS = range(100, 600)


def reply_text(message: Mapping[str, Any], cut: bool) -> str:
    """What a chat message answers: its content after any thinking, else the arguments of its tool calls, else its reasoning.

    Args:
        cut: The reply ended at the token limit, so that its reasoning is no answer.
    """
    text = _answer(_chunks(message.get("content"))) or _arguments(message)
    if text or cut:
        return text
    return next(filter(None, (_answer(_chunks(message.get(key))) for key in ("reasoning_content", "reasoning"))), "")


def complaint(data: Any) -> tuple[str, int | None] | None:
    """(message, HTTP status that it names) of an error body, whatever status it came with; None if it is none."""
    data = data[0] if isinstance(data, list) and data else data
    if not isinstance(data, dict):
        return None
    choices = data.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    error = data.get("error") or choice.get("error")
    if not error and not choices:
        error = {key: data[key] for key in ("message", "detail", "code", "status") if data.get(key)}
    if not error:
        return None
    parts = error if isinstance(error, dict) else {"message": error}
    message = next((parts[key] for key in ("message", "detail", "msg") if parts.get(key)), error)
    named = (place.get(key) for place in (parts, data) for key in ("code", "status", "status_code"))
    status = next((int(str(one)) for one in named if str(one).isdecimal() and int(str(one)) in _STATUS), None)
    return message if isinstance(message, str) else json.dumps(message), status


def _answer(text: str) -> str:
    """What follows the last thought; nothing if the model still thinks."""
    if _THOUGHT.search(text):
        text = _THOUGHT.split(text)[-1]
    return "" if _THINKING.match(text) else text.strip()


def _chunks(content: Any) -> str:
    """The text of a message's content, which may come in chunks, some of them thoughts."""
    if isinstance(content, str):
        return content
    chunks = content if isinstance(content, list) else [content]
    return "".join(
        chunk if isinstance(chunk, str) else _chunks(chunk.get("text"))
        for chunk in chunks
        if isinstance(chunk, str) or (isinstance(chunk, dict) and chunk.get("type") not in ("thinking", "reasoning"))
    )


def _arguments(message: Mapping[str, Any]) -> str:
    """What the tools that a model calls, instead of answering, are given."""
    calls = message.get("tool_calls")
    called = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    given = [one.get("arguments") for one in (*called, message.get("function_call")) if isinstance(one, dict)]
    return "\n".join(text if isinstance(text, str) else json.dumps(text) for text in given if text).strip()
