"""What may stand after `--advisor` and its companions."""

import math
from typing import Any

import pytest

from llmbo.config import RunConfig
from llmbo.config.advisor import parse_spec
from llmbo.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "model", "url"),
    [
        ("m", "m", None),
        ("qwen3:8b", "qwen3:8b", None),
        ("m@20240620", "m@20240620", None),
        ("m@001", "m@001", None),
        ("m@latest", "m@latest", None),
        ("m@sha256:0f3ac9", "m@sha256:0f3ac9", None),
        ("org/model.v1:free@20240620", "org/model.v1:free@20240620", None),
        ("m@http://localhost:11434/v1", "m", "http://localhost:11434/v1"),
        ("qwen3:8b@http://localhost:11434/v1", "qwen3:8b", "http://localhost:11434/v1"),
        ("m@20240620@https://h/v1", "m@20240620", "https://h/v1"),
        ("m@1.5@https://h/v1", "m@1.5", "https://h/v1"),
        ("m@http://[::1]:8000/v1", "m", "http://[::1]:8000/v1"),
        ("m@HTTPS://h", "m", "HTTPS://h"),
        ("m@http://h", "m", "http://h"),
    ],
)
def test_a_model_and_its_server(text: str, model: str, url: str | None) -> None:
    spec = parse_spec(f"openai:{text}")
    assert (spec.argument, spec.base_url) == (model, url)


@pytest.mark.parametrize(
    "text",
    [
        "qwen3:8b@localhost:11434/v1", "m@localhost", "m@LocalHost", "m@localhost:11434", "m@localhost/v1", "m@localhost:",
        "m@127.0.0.1", "m@127.0.0.1:8000", "m@api.example.org", "m@api.example.org/v1", "m@myserver:8000", "m@myserver/v1",
        "localhost:11434/v1", "localhost", "127.0.0.1:8000", "m@localhost:abc",
        "m@[::1]", "m@[::1]:8000", "m@[fe80::1]/v1", "m@::1", "m@2001:db8::1", "m@//myserver/v1", "m@/v1", "m@ localhost ",
        "m@v@host.docker.internal:11434", "m@http:localhost", "m@http:/localhost/v1", "m@http//localhost", "m@host\\v1", "m@",
        "m@user:secret@host:80",
    ],
)  # fmt: skip
def test_a_server_without_its_scheme_is_no_model_of_openai(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--advisor .*looks like a server, so it needs its scheme: .*@http://"
    ) as caught:
        parse_spec(f"openai:{text}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "m@ftp://h/v1", "m@ws://h", "m@socks5://h:1080", "m@unix:///run/x.sock", "m@htp://h", "m@file:///x", "m@http://", "m@http:///v1",
        "m@http://h:port/v1", "m@http://h:99999/v1", "m@http://h:0/v1", "m@http://[::1/v1", "m@http://a b/v1", "http://localhost:1/v1",
        "@http://h/v1",
    ],
)  # fmt: skip
def test_what_is_no_server_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--advisor openai (needs a server like|is written)") as caught:
        parse_spec(f"openai:{text}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://u:pw-1@h/v1",
        "http://pw-1@h",
        "http://h/v1?key=pw-1",
        "http://h/v1#pw-1",
        "http://u:pw-1@",
        "http://u:pw-1@[::1",
    ],
)
def test_a_url_that_may_hold_a_secret_is_refused_without_it(url: str) -> None:
    with pytest.raises(ConfigError, match="without user, password, query or fragment") as caught:
        parse_spec(f"openai:m@{url}")
    assert "pw-1" not in str(caught.value)


@pytest.mark.parametrize("text", ["openai:m\x1b[31m", "openai:m\n", "openai:m\u202e", "replay:\ud800"], ids=ascii)
def test_a_name_that_cannot_be_printed_is_refused_in_ascii(text: str) -> None:
    with pytest.raises(ConfigError, match="--advisor takes a name in characters that can be printed") as caught:
        parse_spec(text)
    assert str(caught.value).isprintable()


NUMBERS = ("share", "every", "max_calls", "max_tokens", "reply_tokens", "max_cost", "max_seconds", "deadline")
NONSENSE: tuple[Any, ...] = (math.nan, math.inf, -math.inf, -1, 1e308, "1", "x", [1])


@pytest.mark.parametrize("value", NONSENSE, ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_the_advisors_is_one_within_reason(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"--advisor-{name.replace('_', '-')} must be ") as caught:
        RunConfig(model="m", advisor_price=(1.0, 2.0), **{f"advisor_{name}": value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", NONSENSE, ids=repr)
@pytest.mark.parametrize("place", [0, 1])
def test_a_price_is_two_numbers_within_reason(place: int, value: Any) -> None:
    prices: list[Any] = [1.0, 1.0]
    prices[place] = value
    with pytest.raises(ConfigError, match="--advisor-price "):
        RunConfig(model="m", advisor_price=tuple(prices))
