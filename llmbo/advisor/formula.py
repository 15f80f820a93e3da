"""A language for what makes blocks dear: a short expression over named features of blocks -> a profile of log prices.

    is_mlp * (depth - 0.3 * first) + 0.5 * measured

Numbers, names, `+ - * /`, comparisons (1 where they hold, else 0), `min`, `max`, `abs`, `log`, `exp`, `sqrt`: nothing else is evaluated,
and nothing that is not finite for every block.
"""

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor

from llmbo.errors import unknown
from llmbo.problem.family import ThresholdFamily

MAX_LENGTH = 200  # characters
MAX_NODES = 60  # of the syntax tree, operators aside
LARGEST = 1e100  # of what counts as finite: its square does too
KEPT_AT = 0.7  # the share of the member whose levels are the feature `kept`
FEATURES: Mapping[str, str] = {
    "depth": "-1 first layer .. 1 last",
    "layer": "its number",
    "first": "1, 1/2, 1/4 .. from the first layer on",
    "last": "the same from the last layer back",
    "is_attention": "1 or 0",
    "is_mlp": "1 or 0",
    "log_fisher": "mean log price by Fisher scores",
    "log_sensitivity": "by sensitivity of whole blocks",
    "measured": "log of how much dearer than priced at pruned members",
    "kept": f"part of its levels that the family keeps at share {KEPT_AT:g}",
    "importance": "Fisher importance, mean 1",
}
_OPERATORS: Mapping[type, Callable[[Tensor, Tensor], Tensor]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_OF_ONE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs, "log": torch.log, "exp": torch.exp, "sqrt": torch.sqrt,
}  # fmt: skip
_OF_MANY: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"min": torch.minimum, "max": torch.maximum}
FUNCTIONS = (*_OF_MANY, *_OF_ONE)


class FormulaError(ValueError):
    """A formula cannot be used; the message says why in words for its author."""


def block_features(family: ThresholdFamily) -> dict[str, Tensor]:
    """`FEATURES` of every block, `d` each, of a family that knows prices."""
    prices, space, L = family.prices, family.space, family.space.num_layers
    assert prices is not None
    layer, kind = torch.arange(L, dtype=torch.float64), torch.arange(2, dtype=torch.float64).repeat_interleave(L)
    own = {"depth": (2 * layer / max(1, L - 1) - 1) * (L > 1), "layer": layer, "first": 0.5**layer}
    own["last"] = own["first"].flip(0)
    pruned = prices.corrections[:-1]  # the last is the dense model
    return {
        **{name: values.repeat(2) for name, values in own.items()},
        "is_attention": 1 - kind,
        "is_mlp": kind,
        "log_fisher": prices.fisher.nanmean(-1),
        "log_sensitivity": prices.sensitivity.nanmean(-1),
        "measured": pruned.mean(0) if len(pruned) else torch.zeros(space.d, dtype=torch.float64),
        "kept": family.profile(torch.tensor([KEPT_AT], dtype=torch.float64))[0] / space.bounds[1],
        "importance": family.importance / family.importance.mean(),
    }


def evaluated(text: str, features: Mapping[str, Tensor]) -> Tensor:
    """What a formula says of every block, `d` float64, with mean 0 and standard deviation 1.

    Raises:
        FormulaError: It is too long, not in the language, not finite everywhere, or the same everywhere.
    """
    if len(text) > MAX_LENGTH:
        raise FormulaError(f"the formula has {len(text)} characters, at most {MAX_LENGTH} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a compiler, about code that will not be run
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise FormulaError(f"the formula '{text}' is no expression ({getattr(error, 'msg', error)})") from None
    nodes = sum(isinstance(node, ast.expr) for node in ast.walk(tree))
    if nodes > MAX_NODES:
        raise FormulaError(f"the formula has {nodes} parts, at most {MAX_NODES} are read")
    found = _value(tree, features)
    scaled = standardized(found)
    if scaled is None:
        raise FormulaError(f"'{text}' is the same for every block, which changes nothing")
    return scaled


def standardized(values: Tensor) -> Tensor | None:
    """`d` values with mean 0 and standard deviation 1; None where all are the same."""
    spread = values.std(correction=0)
    return (values - values.mean()) / spread if spread > 1e-9 * values.abs().max() else None


def _value(node: ast.expr, features: Mapping[str, Tensor]) -> Tensor:
    shown = ast.unparse(node)
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            found = torch.full_like(next(iter(features.values())), float(number))
        case ast.Name(id=name):
            if name not in features:
                raise FormulaError(unknown("feature", name, features))
            found = features[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            found = _value(operand, features) * (-1 if isinstance(sign, ast.USub) else 1)
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]) if (
            type(op) in _OPERATORS
        ):
            found = _OPERATORS[type(op)](_value(left, features), _value(right, features)).double()
        case ast.Call(func=ast.Name(id=name), args=[one], keywords=[]) if name in _OF_ONE:
            found = _OF_ONE[name](_value(one, features))
        case ast.Call(func=ast.Name(id=name), args=[_, _, *_] as several, keywords=[]) if name in _OF_MANY:
            found = reduce(_OF_MANY[name], [_value(one, features) for one in several])
        case _:
            raise FormulaError(
                f"'{shown}' is not in the language of formulas: numbers, features, + - * /, one comparison, {', '.join(FUNCTIONS)}"
            )
    if len(off := (~(found.abs() < LARGEST)).nonzero()):
        raise FormulaError(f"'{shown}' is no finite number for block {int(off[0])}")
    return found
