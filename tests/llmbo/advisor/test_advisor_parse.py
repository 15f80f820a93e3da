"""Reply text to grid points: what is used, what is refused, and in which words."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch

from llmbo.advisor.context import offset_text
from llmbo.advisor.parse import all_rescaled, parse_reply, rescaled
from llmbo.advisor.replies import FORMATS, MAX_TEXT, reply_schema
from llmbo.advisor.roles import Answer, Question

GOOD = {
    "propose": {"proposals": [{"base": "threshold:0.7", "edits": [{"layers": [0, "2-3"], "neurons_delta": -1}], "why": "x"}]},
    "directions": {"directions": [{"name": "dip", "edits": [{"layers": ["1-2"], "neurons_delta": -1, "kv_delta": 1}]}]},
    "filter": {"decisions": [{"id": 2, "keep": False, "confidence": 0.9, "why": "no"}]},
}  # fmt: skip


@pytest.mark.parametrize("hook", GOOD)
@pytest.mark.parametrize(
    "wrapped", ["{}", "```json\n{}\n```", "Sure! Here it is:\n{}\nHope it helps {{}}", '<think>{{"a": 1}}</think> {}']
)
def test_a_good_reply_is_found_whatever_stands_around_it(
    question: Callable[..., Question], hook: str, wrapped: str
) -> None:
    asked = question(hook)
    answer = parse_reply(wrapped.format(json.dumps(GOOD[hook])), asked)
    assert answer and not answer.rejections
    jsonschema.validate(GOOD[hook], reply_schema(hook, 6, 4))
    assert Answer.from_dict(json.loads(json.dumps(answer.to_dict()))) == answer


def test_edits_do_what_they_say(question: Callable[..., Question]) -> None:
    asked = question()
    family = asked.context.setting.family
    base, layers = family.at(0.7), family.space.num_layers
    (candidate,) = parse_reply(json.dumps(GOOD["propose"]), asked).candidates
    changed = {index for index, (a, b) in enumerate(zip(base, candidate.x, strict=True)) if a != b}
    assert changed <= {layers, layers + 2, layers + 3}
    assert all(candidate.x[index] == base[index] - 1 for index in changed) and changed


@pytest.mark.parametrize("share", [0.5, 0.65, 0.9])
def test_a_target_share_is_met_as_closely_as_the_grid_allows(question: Callable[..., Question], share: float) -> None:
    asked = question()
    family = asked.context.setting.family
    item = GOOD["propose"]["proposals"][0] | {"target_share": share, "also_at": [0.8]}
    answer = parse_reply(json.dumps({"proposals": [item]}), asked)
    shares = [float(family.space.share(torch.tensor([c.x], dtype=torch.float64))[0]) for c in answer.candidates]
    assert len(shares) + len(answer.rejections) == 2
    assert all(min(abs(found - share), abs(found - 0.8)) < 0.03 for found in shares) and shares


@pytest.mark.parametrize(
    ("hook", "item", "kind", "reason"),
    [
        ("propose", {"base": "dense"}, "duplicate", "the dense model"),
        ("propose", {"base": 0}, "duplicate", "the same as trial 0"),
        ("propose", {"base": 999}, "illegal", "trial 999 does not exist"),
        ("propose", {"base": -1}, "illegal", "trial -1 does not exist"),
        ("propose", {"base": "thresh:0.5"}, "unparsable", "base"),
        ("propose", {"base": "dense", "edits": [{"layers": [31], "kv_delta": -1}]}, "illegal", r"layer 31 does .*0-5\)"),
        ("propose", {"base": "dense", "edits": [{"layers": [-1], "kv_delta": -1}]}, "illegal", "layer -1 does not exist"),
        ("propose", {"base": "dense", "edits": [{"layers": ["4-2"], "kv_delta": -1}]}, "illegal", "run backwards"),
        ("propose", {"base": "dense", "edits": [{"layers": ["0-5"], "kv_keep": 0}]}, "illegal", "no layer keeps attention"),
        ("propose", {"base": "dense", "edits": [{"layers": ["0-4"], "kv_keep": 0, "neurons_keep": 0}]}, "illegal", "below 0.4"),
        ("propose", {"base": "dense", "edits": [{"layers": [1], "kv_keep": 9}]}, "illegal", "kv_keep 9 does not exist"),
        ("propose", {"base": "dense", "edits": [{"layers": [1], "neuron_delta": -1}]}, "unparsable", "neuron_delta"),
        ("propose", {"base": "dense", "target_share": 0.1}, "illegal", "0.1 is below the smallest"),
        ("propose", {"base": "dense", "target_share": 7}, "unparsable", "target_share"),
        ("propose", "dense", "unparsable", "dictionary"),
        ("directions", {"name": "n", "edits": [{"layers": [1], "kv_keep": 1}]}, "illegal", "made of deltas"),
        ("directions", {"name": "n", "edits": [{"layers": [1], "kv_delta": 0}]}, "illegal", "changes nothing"),
        ("directions", {"name": "n", "edits": []}, "unparsable", "edits"),
        ("filter", {"id": 9, "keep": False}, "illegal", r"candidate 9 does not exist \(there are 0-3\)"),
        ("filter", {"id": 1, "keep": "perhaps"}, "unparsable", "keep"),
        ("filter", {"id": 1, "keep": False, "confidence": 3}, "unparsable", "confidence"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_with_its_reason_and_spoils_nothing_else(
    question: Callable[..., Question], hook: str, item: Any, kind: str, reason: str
) -> None:
    key = FORMATS[hook][0]
    answer = parse_reply(json.dumps({key: [item, *GOOD[hook][key]]}), question(hook))
    (rejection,) = answer.rejections
    assert rejection.kind == kind
    assert re.search(reason, rejection.reason), rejection.reason
    assert len(answer.candidates) + len(answer.directions) + len(answer.decisions) == 1


def test_a_broken_limit_is_told_by_its_name_and_value(question: Callable[..., Question]) -> None:
    """Else an advisor would be taught to keep attention that it had kept."""
    asked = question()
    family, trials = asked.context.setting.family, asked.context.trials
    space = replace(
        family.space, limits={"kv_bytes": 0.6 * float(family.space.cost("kv_bytes", family.space.bounds[1]))}
    )
    setting = replace(asked.context.setting, family=replace(family, space=space))
    limited = replace(asked, context=replace(asked.context, setting=setting, trials=trials[:0]))
    edits: list[dict[str, Any]] = [{"layers": ["0-5"], "kv_keep": 0}, {"layers": [0], "neurons_delta": -1}]
    items = [{"base": "dense", "edits": [edit]} for edit in edits]
    answer = parse_reply(json.dumps({"proposals": items}), limited)
    assert not answer.candidates
    bare, whole = (rejection.reason for rejection in answer.rejections)
    assert bare == "no layer keeps attention"
    value, limit = re.fullmatch(r"its kv_bytes (\S+) is above (\S+)", whole).groups()  # type: ignore[union-attr]
    assert float(value) == pytest.approx(float(limit) / 0.6, rel=1e-3)


@pytest.mark.parametrize(
    "text",
    ["", "no", "[]", '{"proposals": 3}', '{"proposals": [{"base": "dense", "edi', '{"other": []}',
     '{"proposals": NaN}', "{" * 5000, '{"proposals": [' * 3000],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_text_without_a_reply_is_one_rejection(question: Callable[..., Question], text: str) -> None:
    answer = parse_reply(text, question())
    assert not answer and [rejection.kind for rejection in answer.rejections] == ["unparsable"]


def test_repeats_within_a_reply_are_refused(question: Callable[..., Question]) -> None:
    for hook, good in GOOD.items():
        key = FORMATS[hook][0]
        answer = parse_reply(json.dumps({key: good[key] * 2}), question(hook))
        assert [rejection.kind for rejection in answer.rejections] == ["duplicate"]


def test_a_reason_is_inert_text(question: Callable[..., Question]) -> None:
    why = "<script>alert(1)</script>\x00\x1b[31m\n" + "long " * 5000
    item = GOOD["propose"]["proposals"][0] | {"why": why}
    (candidate,) = parse_reply(json.dumps({"proposals": [item]}), question()).candidates
    assert len(candidate.why) <= MAX_TEXT and candidate.why.isprintable()


def test_rescaling_keeps_the_contrast(make_toy: Callable[..., Any]) -> None:
    toy = make_toy(8)
    offset = torch.zeros(toy.space.d, dtype=torch.float64)
    offset[10] = -2
    x = rescaled(toy.family, offset, 0.7)
    share = toy.space.share(torch.tensor([x], dtype=torch.float64))
    profile = toy.family.profile(share)[0]
    assert abs(float(share[0]) - 0.7) < 0.03
    assert x[10] < profile[10]
    offsets, targets = torch.stack([offset, -offset, 0 * offset]), [0.7, 0.5, 0.95]
    assert all_rescaled(toy.family, offsets, targets) == list(map(rescaled, 3 * [toy.family], offsets, targets))


def test_an_offset_is_shown_in_ranges(make_toy: Callable[..., Any]) -> None:
    toy = make_toy(8)
    family = toy.family
    assert offset_text(family, family.at(0.7)) == "none"
    offset = torch.zeros(16, dtype=torch.float64)
    offset[10:13] = -3
    assert "mlp" in offset_text(family, rescaled(family, offset, 0.7))
