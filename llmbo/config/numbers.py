"""What a number may be, declared beside the field that holds it: `budget: Annotated[int, Within(1, 10**6)] = 60`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, get_type_hints

from llmbo.errors import ConfigError

MOST = 10**6  # of whatever is counted one by one
MOST_TOKENS = 10**9
# Together they keep a KV cache's bytes within 64 bits.
MOST_CONTEXT, MOST_SERVED = 10**7, 10**5
MOST_BYTES = 10**15
MOST_SECONDS, MOST_DOLLARS = 10**6, 10**9  # sockets wait for at most 2^31 milliseconds


@dataclass(frozen=True)
class Within:
    """A range of numbers, both ends included; NaN and the infinities lie in none.

    Args:
        apart: The ends themselves are excluded.
        flag: How the user calls the field, where that is not its name.
    """

    least: float
    most: float
    apart: bool = False
    flag: str = ""

    def check(self, name: str, value: object, whole: bool = False) -> None:
        """Refuse what is no number, or outside.

        Args:
            name: As the user typed it.
            whole: Only whole numbers are taken.

        Raises:
            ConfigError: One line with name, value and range.
        """
        if not isinstance(value, Integral if whole else Real) or value != value:
            expected = f"must be a {'whole ' * whole}number"
        elif value <= self.least if self.apart else value < self.least:
            expected = f"must be {'above' if self.apart else 'at least'} {_short(self.least)}"
        elif value >= self.most if self.apart else value > self.most:  # type: ignore[operator]
            expected = f"must be {'below' if self.apart else 'at most'} {_short(self.most)}"
        else:
            return
        raise ConfigError(f"{name} {expected}, got {value if isinstance(value, Real) else repr(value)}.")


SEED = Within(0, 2**32 - 1)  # torch takes 64 bits, and every round of a run has a seed of its own
VALUE = Within(0, 1e18, apart=True)  # of an objective: beyond it, products of two or three of them lose what differs


def flag_of(field: str) -> str:
    """`serve_batch` is typed as `--serve-batch`."""
    return f"--{field.replace('_', '-')}"


def check_numbers(settings: object, name: Callable[[str], str] = flag_of) -> None:
    """Check every field of a dataclass that declares a range; of a tuple every number, None where the field allows it.

    Args:
        name: What the user calls a field.

    Raises:
        ConfigError: The first that is out of range.
    """
    check_values(type(settings), vars(settings), name)


def check_values(kind: type, values: Mapping[str, Any], name: Callable[[str], str] = flag_of) -> None:
    """The same for what is to become one."""
    for field, hint in get_type_hints(kind, include_extras=True).items():
        for within in getattr(hint, "__metadata__", ()):
            if not isinstance(within, Within) or field not in values or (values[field] is None and "None" in str(hint)):
                continue
            value = values[field]
            for one in value if isinstance(value, (tuple, list)) and "tuple" in str(hint) else (value,):
                within.check(within.flag or name(field), one, whole="int" in str(hint.__origin__))


def bytes_of(flag: str, size: str) -> int:
    """What a size such as `500MB` is in bytes (powers of ten); without a unit it is bytes.

    Raises:
        ConfigError: It is none.
    """
    found = re.fullmatch(r"([0-9]+)(|[KMGT]B)", size.strip().upper())
    if not found:
        raise ConfigError(f"{flag} must be a size such as 500MB, 5GB or a number of bytes, got '{size}'.")
    value = int(found[1]) * 1000 ** ("", "KB", "MB", "GB", "TB").index(found[2])
    Within(1, MOST_BYTES).check(flag, value, whole=True)
    return value


def _short(end: float) -> str:
    return str(end) if abs(end) < 1e15 else f"{end:g}"
