"""The report page in a real headless Chromium, opened from the disk like a user would."""

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llmbo.report.page import render_page

LAYERS, GROUPS, NEURONS = 30, 3, 1536
HOSTILE = "</script><script>window.broken=1</script><img src=x onerror='window.broken=1'>{{7*7}}${1}"
SMOOTH = 1.0  # seconds that drawing 2,000 trials, or reacting to a click, may take on a busy machine


# Contrast of the text colours against the ground of the cards, WCAG 2.2.
CONTRAST = """() => {
  const channel = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (name) => {
    const [r, g, b] = css(name).match(/[0-9a-f]{2}/gi).map((part) => channel(parseInt(part, 16) / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return ["--text", "--muted", "--heldout", "--accent"].map((name) => {
    const [a, b] = [light(name), light("--card")].sort((one, other) => one - other);
    return (b + 0.05) / (a + 0.05);
  });
}"""
ATTACKS = (
    "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.broken = 1'}))",
    """document.body.insertAdjacentHTML('beforeend', '<b onclick="window.broken = 1" id=bad>x</b>');
    document.getElementById('bad').click()""",
)


def values_of(share: float, kl: float, **more: float) -> dict[str, Any]:
    params = round(28e6 + 106e6 * share)
    return {
        "kl": kl,
        "loss": 2.8 + kl,
        "perplexity": math.exp(2.8 + kl),
        "params": params,
        "params_share": share,
        **more,
    }


def made_up_report(trials: int = 40, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A report of the documented shape, with numbers as a search would give."""
    rng = random.Random(seed)

    def architecture(share: float) -> dict[str, list[int]]:
        kept = [rng.random() < 0.5 + share / 2 for _ in range(LAYERS)]
        return {
            "kv_groups": [rng.randint(1, GROUPS) * kept[layer] for layer in range(LAYERS)],
            "neurons": [128 * rng.randint(3, 12) * kept[layer] for layer in range(LAYERS)],
        }

    def trial(number: int) -> dict[str, Any]:
        share = rng.uniform(0.4, 0.98)
        values = values_of(share, 1.1 * (1 - share) ** 1.3 * rng.uniform(1.0, 1.6))
        return {
            "number": number, "round": number // 4, "origin": "threshold" if number < 12 else rng.choice(["qnehvi", "advisor"]),
            "state": "complete", "architecture": architecture(share), "objectives": values, "seconds": rng.uniform(0.8, 1.2),
            "failure": None, "gain": rng.gauss(0, 0.02),
        }  # fmt: skip

    made = [trial(number) for number in range(trials)]
    axes = [(one["objectives"]["params_share"], one["objectives"]["kl"]) for one in made]
    front = [
        {"trial": one["number"], "architecture": one["architecture"], "objectives": one["objectives"],
         "heldout": {**one["objectives"], "kl": one["objectives"]["kl"] * 1.1, "loss": one["objectives"]["loss"] + 0.01},
         "elsewhere": {**one["objectives"], "kl": one["objectives"]["kl"] * 1.7},
         "refitted": {part: {**one["objectives"], "kl": one["objectives"]["kl"] * 0.83} for part in ("objectives", "heldout")}}
        for one, (x, y) in zip(made, axes, strict=True)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in axes)
    ]  # fmt: skip
    full = {"kv_groups": [GROUPS] * LAYERS, "neurons": [NEURONS] * LAYERS}
    return {
        "schema_version": 1,
        "run": {"name": "made-up", "command": "llmbo optimize --model x", "status": "complete", "settings": {"budget": trials},
                "seed": seed, "versions": {}, "platform": "x", "device": "cpu", "dtype": "float32",
                "seconds": {"importance": 12.5, "search": 1.1 * trials}, "peak_memory_bytes": 10**9},
        "model": {"name": "made-up-135M", "source": "x", "model_type": "llama", "fingerprint": "f", "num_hidden_layers": LAYERS,
                  "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": GROUPS, "head_dim": 64,
                  "intermediate_size": NEURONS, "vocab_size": 49152, "params": 134000000, "block_params": 106000000},
        "data": {"source": "builtin", "sha256": "s", "available_tokens": 10**5, "window": 256, "bos": False,
                 **{part: {"windows": 12, "tokens": 3072} for part in ("calibration", "proxy", "heldout")}},
        "elsewhere": {"source": "python (made up)", "sha256": "e", "available_tokens": 10**5, "windows": 12, "tokens": 3072, "digest": "d"},
        "space": {"dimensions": 2 * LAYERS, "kv_group_levels": [0, 1, 2, 3], "neuron_levels": list(range(0, 1537, 128)), "min_share": 0.4},
        "objectives": [
            {"name": "kl", "unit": "nats/token", "direction": "minimize", "reference_point": 1.2, "known": False},
            {"name": "params_share", "unit": "share", "direction": "minimize", "reference_point": 1.0, "known": True},
        ],
        "dense": {"trial": None, "architecture": full, "objectives": values_of(1.0, 0.0), "heldout": values_of(1.0, 0.0),
                  "elsewhere": values_of(1.0, 0.0)},
        "trials": made,
        "front": sorted(front, key=lambda point: point["objectives"]["params"]),
        "hypervolume": {"final": 0.4, "trace": [0.4 * (1 - math.exp(-number / 10)) for number in range(trials)]},
        "importance": [
            {"method": method, "kind": kind, "scores": [rng.lognormvariate(0, 2) for _ in range(LAYERS)]}
            for method in ("fisher", "taylor") for kind in ("attention", "mlp")
        ],
        "recipes": [
            {"names": names, "numbers": {}, "words": said, **more}
            | {"paths": [{"share": share, "architecture": architecture(share)} for share in (0.55, 0.85)]}
            for names, said, more in (
                (["own", "default"], "dense prices", {}),
                (["best"], "MLPs of late layers dearer (+0.30)", {"trials": [3, 5], "gain": 0.042}),
            )
        ],
        **changes,
    }  # fmt: skip


@dataclass
class Tab:
    """An open page, everything it asked for and everything it complained about."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def where(self, key: str) -> tuple[float, float]:
        """Screen position of a trial in the front chart."""
        at = self.page.evaluate(
            """(key) => { const e = BY_KEY.get(key), c = chart("front-chart"); const box = c.getDom().getBoundingClientRect();
            const p = c.convertToPixel({xAxisIndex: 0, yAxisIndex: 0}, [e.values[STATE.x], e.values[STATE.y]]);
            return [p[0] + box.left, p[1] + box.top]; }""",
            key,
        )
        return at[0], at[1]

    def hover(self, key: str) -> None:
        """Rest the pointer on a trial until the chart tells about it."""
        self.page.evaluate("document.getElementById('front-chart').scrollIntoView({block: 'center'})")
        x, y = self.where(key)
        for attempt in range(20):  # a busy machine may draw after the pointer has come
            self.page.mouse.move(x + attempt % 2, y, steps=3)
            self.page.wait_for_timeout(100)
            if self.page.is_visible(".hover"):
                return
        raise AssertionError(f"nothing is told about {key}")


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Open:
    """`with opened(report, width=390) as tab:` shows the page of one or several reports."""

    @contextmanager
    def open_page(*reports: Mapping[str, Any], width: int = 1280, scheme: str = "light") -> Iterator[Tab]:
        file = tmp_path / "report.html"
        runs = [(f"runs/{report['run']['name']}", report) for report in reports]
        file.write_text(render_page(runs), encoding="utf-8")
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            permissions=["clipboard-read", "clipboard-write"],
        )
        tab = Tab(context.new_page())
        tab.page.on("request", lambda request: tab.requests.append(request.url))
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.page.on("console", lambda message: tab.complaints.append(f"{message.type}: {message.text}"))
        tab.page.goto(file.as_uri())
        tab.page.wait_for_selector("html[data-ready=yes]", timeout=20_000)
        yield tab
        assert tab.complaints == []
        assert [url for url in tab.requests if url != file.as_uri() and not url.startswith("data:")] == []
        context.close()

    return open_page


@pytest.fixture(scope="module")
def page_of_a_report(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An open page, for asking its functions. Read it only."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render_page([("runs/made-up", made_up_report())]), encoding="utf-8")
    context = browser.new_context()
    page = context.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready=yes]", timeout=20_000)
    yield page
    context.close()


def test_it_shows_the_front_and_a_trial_of_it(opened: Open) -> None:
    report = made_up_report()
    with opened(report) as tab:
        assert "made-up-135M" in tab.text("h1")
        assert tab.page.evaluate("document.querySelectorAll('canvas').length") == 2
        painted = "(id) => new Set(document.querySelector(`#${id} canvas`).getContext('2d').getImageData(0, 0, 400, 300).data).size"
        assert tab.page.evaluate(painted, "front-chart") > 10
        selected = tab.page.evaluate("STATE.selected")
        point = next(point for point in report["front"] if f"0:{point['trial']}" == selected)
        assert f"trial {point['trial']}" in tab.text("#trial h3") and "on the front" in tab.text("#trial")
        assert f"{point['objectives']['kl']:.4g}" in tab.text("#trial")
        assert f"{point['heldout']['kl']:.4g}" in tab.text("#trial")
        assert "held-out, python" in tab.text("#trial") and f"{point['elsewhere']['kl']:.4g}" in tab.text("#trial")
        assert "refitted: held-out" in tab.text("#trial") and "refitted: held-out, python" not in tab.text("#trial")
        assert f"{point['refitted']['heldout']['kl']:.4g}" in tab.text("#trial")
        assert "python (made up)" in tab.text(".facts")


def test_it_says_how_sure_held_out_values_are_and_which_neighbours_may_be_alike(opened: Open) -> None:
    report = made_up_report()
    with opened(report) as tab:  # of an earlier version
        assert tab.page.is_hidden("#noise") and "±" not in tab.text("#trial") + tab.text(".facts")
    front = report["front"] = sorted(report["front"], key=lambda point: point["objectives"]["params"])
    numbers = [point["trial"] for point in front]
    for place, point in enumerate(front):
        alike = {1: numbers[:1], 3: numbers[:1], 4: numbers[2:4]}.get(place, [])
        point["noise"] = {"windows": 12, "kl": 0.0123456, "loss": 0.00212, "by": "kl", "not_better_than": alike}
        point["noise_elsewhere"] = {
            **point["noise"],
            "kl": 0.0456,
            "windows": 7,
            "not_better_than": numbers[:place][:1],
        }
        point["refitted"]["noise"] = {**point["noise"], "kl": 0.00789, "not_better_than": []}
    with opened(report) as tab:
        line = f"2 of {len(front) - 1} points of the front are not surely better than the next smaller one: "
        assert f"{line}trial {numbers[1]}, trial {numbers[4]}. Compared" in tab.text("#noise")
        tab.page.click(f"#noise >> text=trial {numbers[4]}")
        point = front[4]
        assert tab.text("#trial h3") == f"trial {numbers[4]}"
        assert f"{point['heldout']['kl']:.4g}\n± 0.012" in tab.text("#trial") and "± 0.0021" in tab.text("#trial")
        assert f"Not surely better in held-out kl than the smaller trial {numbers[2]}, trial {numbers[3]}." in tab.text(
            "#trial"
        )
        assert f"{point['elsewhere']['kl']:.4g}\n± 0.046" in tab.text("#trial")
        assert f"{point['refitted']['heldout']['kl']:.4g}\n± 0.0079" in tab.text("#trial")
        noise = tab.text("#trial .noise")
        assert f"Not surely better in held-out, python kl than the smaller trial {numbers[0]}." in noise
        assert (
            "Surely better in refitted: held-out kl than every smaller point of the front that was measured so."
            in noise
        )
        assert "12 held-out, 7 held-out, python, 12 refitted: held-out windows" in noise
        tab.page.click(f"#trial .noise >> text=trial {numbers[2]}")
        assert tab.text("#trial h3") == f"trial {numbers[2]}" and "Surely better" in tab.text("#trial .noise")
        tab.page.evaluate(f"update({{selected: '0:{numbers[0]}'}})")
        assert "better" not in tab.text("#trial .noise") and "12 held-out, 7 held-out, python" in tab.text(
            "#trial .noise"
        )
        drawn = "chart('front-chart').getOption().series.find((one) => one.type === 'line' && one.name.includes('held-out')).data"
        bars = [pair for pair in tab.page.evaluate(drawn) if pair[0] != "-"]
        expected = [
            [point["objectives"]["params_share"], point["heldout"]["kl"] + side * 0.0123456]
            for point in front
            for side in (-1, 1)
        ]
        for bar, wanted in zip(sorted(bars), sorted(expected), strict=True):
            assert bar == pytest.approx(wanted)
        tab.hover(f"0:{numbers[1]}")
        assert "± 0.012)" in tab.text(".hover")
    for point in front:
        point["noise"]["not_better_than"] = []
    with opened(report) as tab:
        assert "every point of the front is surely better" in tab.text("#noise")


def test_hovering_tells_about_a_trial(opened: Open) -> None:
    report = made_up_report()
    report["trials"][7]["why"] = "thin the middle"
    with opened(report) as tab:
        tab.hover("0:7")
        told = tab.text(".hover")
        values = report["trials"][7]["objectives"]
        assert "trial 7 · threshold" in told and "thin the middle" in told
        assert f"kl: {values['kl']:.4g}" in told and f"{values['params'] / 1e6:.1f}".rstrip("0").rstrip(".") in told


def test_a_click_and_the_keys_select(opened: Open) -> None:
    """The panel tells all of a trial, the recipe that it stems from included."""
    report = made_up_report()
    numbers = [point["trial"] for point in report["front"]]
    recipe = {"fisher_weight": 0.5, "mlp_exponent": 1.0, "mlp_slope": 0.31, "attention": -0.2, "mlp_curve": 0.0}
    report["trials"][numbers[1]]["recipe"] = recipe
    with opened(report) as tab:
        tab.page.mouse.click(*tab.where(f"0:{numbers[0]}"))  # the only one without neighbours under the pointer
        assert f"trial {numbers[0]}" == tab.text("#trial h3")
        tab.page.focus("#front-chart")
        for key, number in (
            ("ArrowRight", numbers[1]),
            ("ArrowRight", numbers[2]),
            ("Home", numbers[0]),
            ("ArrowLeft", numbers[0]),
            ("ArrowRight", numbers[1]),
        ):
            tab.page.keyboard.press(key)
            assert tab.text("#trial h3") == f"trial {number}"
        assert f"trial {numbers[1]}" in tab.page.text_content("#announcement")
        assert "path of the recipe mlp slope 0.31, attention -0.20." in tab.text("#trial")
        tab.page.keyboard.press("End")
        assert tab.text("#trial h3") == "dense model" and tab.page.query_selector("#export-command") is None


def test_the_picture_shows_every_layer_and_what_is_gone(opened: Open) -> None:
    report = made_up_report()
    number = report["front"][0]["trial"]
    kept = report["trials"][number]["architecture"]
    last = max(layer for layer in range(LAYERS) if kept["kv_groups"][layer])
    kept["fewer_queries"] = [int(layer == last) for layer in range(LAYERS)]
    with opened(report) as tab:
        tab.page.evaluate(f"update({{selected: '0:{number}'}})")
        gone = [layer for layer in range(LAYERS) if kept["kv_groups"][layer] == kept["neurons"][layer] == 0]
        titles = tab.page.eval_on_selector_all(".layers title", "nodes => nodes.map(node => node.textContent)")
        assert len(titles) == LAYERS and tab.page.locator(".layers .cross").count() == len(gone) > 0
        assert [index for index, title in enumerate(titles) if title.endswith("dropped")] == gone
        first = next(layer for layer in range(LAYERS) if layer not in gone)
        assert (
            titles[first]
            == f"layer {first}: {kept['kv_groups'][first]} of 3 KV groups, {kept['neurons'][first]} of 1536 neurons"
        )
        first, *_, narrow = tab.page.eval_on_selector_all(
            ".layers .attention", "nodes => nodes.map(node => node.getBBox().width)"
        )
        queries = report["model"]["num_attention_heads"] / report["model"]["num_key_value_heads"]
        assert narrow == pytest.approx(first * (1 - 1 / queries), rel=1e-3) and queries > 1
        heights = tab.page.eval_on_selector_all(".layers .mlp", "nodes => nodes.map(node => node.getBBox().height)")
        widths = [width for width in kept["neurons"] if width]
        assert heights == pytest.approx([max(heights) * width / max(widths) for width in widths], rel=1e-3)


def test_the_budget_field_finds_the_best_trial_within_it(opened: Open) -> None:
    report = made_up_report()
    with opened(report) as tab:
        for typed, limit in (("100M", 100e6), ("95 m", 95e6), ("110000000", 110e6)):
            tab.page.fill("#budget", typed)
            fitting = [trial for trial in report["trials"] if trial["objectives"]["params"] <= limit]
            best = min(fitting, key=lambda trial: trial["objectives"]["kl"])
            assert tab.text("#budget-answer").startswith(f"trial {best['number']}:")
            assert tab.text("#trial h3") == f"trial {best['number']}"
        tab.page.fill("#budget", "3")
        assert "No trial is that small" in tab.text("#budget-answer")
        tab.page.fill("#budget", "small")
        assert (
            "Type a number" in tab.text("#budget-answer")
            and tab.page.get_attribute("#budget", "aria-invalid") == "true"
        )
        tab.page.select_option("#budget-quantity", "params_share")
        tab.page.fill("#budget", "60 %")
        best = min(
            (t for t in report["trials"] if t["objectives"]["params_share"] <= 0.6), key=lambda t: t["objectives"]["kl"]
        )
        assert tab.text("#trial h3") == f"trial {best['number']}"
        tab.page.focus("#budget-slider")
        tab.page.keyboard.press("Home")
        smallest = min(report["trials"], key=lambda trial: trial["objectives"]["params"])
        assert tab.text("#trial h3") == f"trial {smallest['number']}"


def test_the_export_command_can_be_copied(opened: Open) -> None:
    report = made_up_report()
    report["run"]["name"] = "it's mine"
    with opened(report) as tab:
        number = tab.page.evaluate("STATE.selected").split(":")[1]
        tab.page.click("#copy")
        tab.page.wait_for_selector(
            "#copy:text-is('Copied')"
        )  # a function that is polled would need the page's leave to evaluate it
        copied = tab.page.evaluate("navigator.clipboard.readText()")
        folder = "'runs/it'\\''s mine"
        assert (
            copied
            == f"llmbo export {folder}' --trial {number} --format hf --out {folder}/trial-{number}'"
            == tab.text("#export-command")
        )
        tab.page.select_option("#export-format", "gguf")
        assert "--format gguf" in tab.text("#export-command")


def test_hypervolume_importance_cost_trials_and_recipe_are_there(opened: Open) -> None:
    report = made_up_report()
    report["trials"][5] |= {"state": "failed", "objectives": None, "failure": "out of memory"}
    report["hypervolume"]["trace"].pop()
    with opened(report) as tab:
        tab.page.select_option("#over", "seconds")
        assert "seconds" in json.dumps(tab.page.evaluate("chart('hypervolume-chart').getOption().xAxis[0].name"))
        assert tab.page.locator("#importance tbody tr").count() == 4
        assert tab.page.locator("#importance tbody td").count() == 4 * LAYERS
        assert "importance" in tab.text("#cost") and "12.5 s" in tab.text("#cost")
        assert not tab.page.is_visible("#advisor") and not tab.page.is_visible("#runs")
        assert tab.text("#all-trials summary") == "40 trials: 39 complete, 1 failed"
        tab.page.click("#all-trials summary")
        tab.page.locator("#all-trials tbody tr").first.wait_for()  # drawn when it has been opened
        assert "out of memory" in tab.text("#all-trials") and tab.page.locator("#all-trials tbody tr").count() == 40
        tab.page.click("#all-trials th:has-text('kl') button")
        first = min((t for t in report["trials"] if t["objectives"]), key=lambda t: t["objectives"]["kl"])
        tab.page.click("#all-trials tbody tr:first-child button")
        assert tab.text("#trial h3") == f"trial {first['number']}"
        assert "llmbo optimize --model x" in tab.text("#recipe")


def test_recipes_are_told_in_words_and_drawn_along_depth(opened: Open) -> None:
    report = made_up_report()
    with opened(report) as tab:
        told = tab.text("#allocation")
        assert (
            "this run's = default" in told and "MLPs of late layers dearer (+0.30)." in told and "Saves 4.2 %" in told
        )
        tab.page.click("#allocation button:has-text('trial 5')")
        assert tab.text("#trial h3") == "trial 5"
        assert tab.page.locator("#allocation figure").count() == 2 and "share 85.0 %" in told
        spans = tab.page.eval_on_selector_all(
            "#allocation figure .path", "nodes => nodes.map(node => node.getBBox().height)"
        )
        kept = [
            (recipe["paths"][size]["architecture"][kind], most)
            for size in range(2)
            for recipe in report["recipes"]
            for kind, most in (("kv_groups", GROUPS), ("neurons", NEURONS))
        ]
        assert spans == pytest.approx([70 * (max(units) - min(units)) / most for units, most in kept], rel=1e-3)
        looks = tab.page.eval_on_selector_all(
            "#allocation dt .path",
            "nodes => nodes.map(n => [n.getAttribute('stroke'), n.getAttribute('stroke-dasharray')])",
        )
        assert len(looks) == 2 and all(a != b for a, b in zip(*looks, strict=True))
        tab.page.locator("#allocation summary").first.click()
        tab.page.locator("#allocation tbody tr").first.wait_for()
        cells = tab.page.locator("#allocation tbody tr").nth(7).locator("td").all_inner_texts()
        assert [int(cell) for cell in cells] == [units[7] for units, _ in kept[:4]]


def test_what_the_advisor_did_is_shown(opened: Open) -> None:
    outcomes = {"evaluated": 4, "vetoed": 7, "duplicate": 0, "illegal": 1, "unparsable": 0}
    hook = {"calls": 3, "attempts": 4, "prompt_tokens": 900, "completion_tokens": 100, "cost": 0.25, "seconds": 7.5}
    advisor = {
        "advisor": "openai:some-model",
        "hooks": {"propose": {**hook, "outcomes": outcomes}, "filter": {**hook, "cost": None, "outcomes": outcomes}},
        "stopped": "the server hung up", "hypervolume_by_origin": {"threshold": 0.3, "advisor": 0.02},
        "directions": [{"name": "dip", "trials": 2, "hypervolume": 0.01, "best_gain": None}],
        "filter": {"reviewed": 9, "dropped": 4, "audited": [3, 9], "precision": 0.75,
                   "drops": [{"round": 4, "confidence": 0.9, "why": "thin already", "trial": None}]}, "probe": None,
        "proposals": [{"round": 3, "hook": "propose", "why": "thin the middle", "trial": 13}],
        "refusals": [{"round": 3, "hook": "propose", "kind": "illegal", "reason": "layer 31 does not exist", "text": "{}"}],
    }  # fmt: skip
    report = made_up_report(advisor=advisor)
    report["trials"][13]["why"] = "thin the middle"
    with opened(report) as tab:
        tab.page.evaluate("document.querySelectorAll('#advisor details').forEach((node) => { node.open = true; })")
        shown = tab.text("#advisor")
        assert all(
            word in shown
            for word in (
                "openai:some-model",
                "vetoed",
                "unknown",
                "hung up",
                "dip",
                "0.75",
                "3, 9",
                "trials with a reason (1)",
                "thin the",
                "thin already",
                "layer 31",
            )
        )
        rows = tab.page.locator("#advisor table").first.locator("tbody tr")
        assert [row.split()[0] for row in rows.all_inner_texts()] == ["propose", "filter"]
        assert "1000 tokens" in tab.text("#cost") and "0.25 USD" in tab.text("#cost")


def constrained_report(maximum: float = 100e6) -> dict[str, Any]:
    report = made_up_report(constraints=[{"name": "params", "maximum": maximum, "known": True}])
    for trial in report["trials"]:
        trial["feasible"] = trial["objectives"]["params"] <= maximum
    report["front"] = [point for point in report["front"] if point["objectives"]["params"] <= maximum]
    return report


def test_constraints_shade_what_they_forbid_and_mark_who_breaks_them(opened: Open) -> None:
    report = constrained_report()
    outside = [trial["number"] for trial in report["trials"] if not trial["feasible"]]
    with opened(report) as tab:
        areas = "chart('front-chart').getOption().series.flatMap(s => s.markArea?.data ?? [])"
        assert tab.page.evaluate(areas) == []  # the axis shows something else
        tab.page.select_option("#x-axis", "params")
        assert [area[0]["xAxis"] for area in tab.page.evaluate(areas)] == [100e6]
        dashed = """chart('front-chart').getOption().series.flatMap(s => s.data ?? [])
            .filter(point => point.itemStyle?.borderType === 'dashed').map(point => Number(point.key.split(':')[1]))"""
        assert sorted(tab.page.evaluate(dashed)) == outside != []
        told = tab.text("#constraints")
        assert "params ≤ 100 M" in told and f"{len(outside)} of 40 trials" in told
        tab.page.evaluate(f"update({{selected: '0:{outside[0]}'}})")
        assert "Breaks a constraint: params" in tab.text("#trial")
        tab.page.fill("#budget", "1G")  # everything is within that, but not within the constraint
        best = min((t for t in report["trials"] if t["feasible"]), key=lambda t: t["objectives"]["kl"])
        assert tab.text("#trial h3") == f"trial {best['number']}"
        tab.page.focus("#front-chart")
        walked = set()
        for _ in range(40):
            tab.page.keyboard.press("ArrowRight")
            walked.add(tab.page.evaluate("BY_KEY.get(STATE.selected).trial.feasible"))
        assert False not in walked


def judged_report(text: str) -> dict[str, Any]:
    """A report whose front was judged on items, and whose ends and dense model wrote `text`."""
    report = made_up_report()
    points = [report["dense"], *report["front"]]
    for place, point in enumerate(points):
        scores = {
            "acc": 0.5,
            "acc_stderr": 0.02,
            "acc_norm": 0.6 - 0.01 * place,
            "acc_norm_stderr": 0.018,
            "perplexity": None,
        }
        point["items"] = {
            "my quiz": scores,
            "last": {"acc": 0.25, "acc_stderr": 0.1, "acc_norm": None, "perplexity": 51.289},
        }
    for point in (points[0], points[1], points[-1]):
        point["samples"] = {"The old man": text, "def f(x):": "\n    if x:\n\n\n        return " + "x" * 200}
    return report


def test_what_was_healed_is_told_with_its_items_and_curve(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = made_up_report()
    trial = report["front"][0]["trial"]
    values = [{"loss": 3.1, "kl": 0.25}, {"loss": 2.9, "kl": 0.125}]
    scores = [{"acc": 0.44, "acc_stderr": 0.028}, {"acc": 0.5, "acc_stderr": 0.029}]
    items = {"name": HOSTILE, "source": "quiz.jsonl", "sha256": "0", "kind": "multiple_choice", "count": 300}
    made = {
        "trial": trial, "folder": "exports/healed", "command": "llmbo recover", "what": "adapters", "tokens": 4096, "distilled": True,
        "before": values[0], "after": values[1], "validation": [[0, 0.25], [4, 0.125]],
    }  # fmt: skip
    folder = tmp_path / "runs" / report["run"]["name"]
    folder.mkdir(parents=True)
    whole = made | {"items": [items | {"before": scores[0], "after": scores[1], "between": [[2, 0.47], [4, 0.5]]}]}
    former = made | {"trial": report["front"][1]["trial"]}  # as the first versions wrote it
    (folder / "recovered.json").write_text(json.dumps([whole, former]))
    monkeypatch.chdir(tmp_path)
    with opened(report) as tab:
        tab.page.evaluate(f"STATE.selected = '0:{trial}'; drawTrial(STATE)")
        rows = [" ".join(row.split()) for row in tab.page.locator(".recovered tr").all_inner_texts()]
        assert rows[1:3] == ["KL from the dense model 0.2500 0.1250", "loss, nats per token 3.1000 2.9000"]
        assert rows[3].endswith("acc of 300 items 0.440 ± 0.028 0.500 ± 0.029") and "<img" in rows[3]
        assert tab.page.evaluate("window.broken") is None and "0.2500 → 0.1250 in 4 steps" in tab.text(".recovered")
        assert "acc by step: 0: 0.440, 2: 0.470, 4: 0.500" in tab.text(".recovered")
        assert tab.page.locator(".recovered svg").count() == 2
        tab.page.evaluate(f"STATE.selected = '0:{former['trial']}'; drawTrial(STATE)")
        assert tab.page.locator(".recovered tr").count() == 3


@pytest.mark.parametrize("width", [1280, 390])
def test_items_and_samples_are_shown_as_text(opened: Open, width: int) -> None:
    report = judged_report(HOSTILE + "\u202etxt.exe\u2066\x9b31m")
    smallest = report["front"][0]
    with opened(report, width=width) as tab:
        rows = tab.page.locator("#samples tbody tr").all_inner_texts()
        assert [row.split()[0] for row in rows] == ["dense", "trial", "trial"] and f"trial {smallest['trial']}" in rows[
            -1
        ]
        assert all(HOSTILE in row and "txt.exe" in row for row in rows) and "    if x:\n        return" in rows[0]
        assert not set(tab.page.content()) & set("\u202e\u2066\x9b")
        assert tab.page.evaluate("window.broken") is None
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tab.page.click(f"#samples button:has-text('trial {smallest['trial']}')")
        assert tab.text("#trial h3") == f"trial {smallest['trial']}"
        told = " ".join(tab.text("#trial").split())
        assert "my quiz acc_norm 59.0 ± 1.8 % 60.0 % −1.0 %" in told and "last perplexity 51.29 51.29" in told
        tab.page.select_option("#y-axis", "my quiz acc_norm")
        drawn = "chart('front-chart').getOption().series.flatMap(s => s.data ?? []).filter(p => p.symbolSize).length"
        assert tab.page.evaluate(drawn) == len(report["front"])


@pytest.mark.parametrize("written", [True, False], ids=["counts in the report", "report of an earlier version"])
def test_what_lost_its_race_is_on_no_front(opened: Open, written: bool) -> None:
    report = made_up_report()
    winner = min(report["trials"], key=lambda trial: trial["objectives"]["params"])["number"]
    report["trials"][winner]["objectives"] |= {
        "kl": 0.001,
        "tokens": 512,
        "error": 0.02,
    }  # beats all others, by estimate
    report["front"] = [point for point in report["front"] if point["trial"] != winner]
    if written:
        for trial in report["trials"]:
            trial["counts"] = trial["number"] != winner
    with opened(report) as tab:
        hollow = """chart('front-chart').getOption().series.flatMap(s => s.data ?? [])
            .filter(point => point.itemStyle?.color === 'transparent').map(point => point.key)"""
        assert tab.page.evaluate(hollow) == [f"0:{winner}"]
        line = (
            "chart('front-chart').getOption().series.find(s => s.name === 'front, proxy windows').data.map(p => p.key)"
        )
        assert f"0:{winner}" not in tab.page.evaluate(line) != []
        tab.page.fill("#budget", "1G")
        best = min((t for t in report["trials"] if t["number"] != winner), key=lambda t: t["objectives"]["kl"])
        assert tab.text("#trial h3") == f"trial {best['number']}"
        tab.page.evaluate(f"update({{selected: '0:{winner}'}})")
        assert "lost its race" in tab.text("#trial")
        tab.page.click("#all-trials summary")
        tab.page.wait_for_selector("#all-trials tbody tr")
        assert tab.text("#all-trials").count("lost its race") == 1


@pytest.mark.parametrize("counts", [True, False])
def test_the_page_takes_python_s_word_for_what_counts(opened: Open, counts: bool) -> None:
    """Not a predicate of its own: nothing but `counts` tells these trials apart."""
    report = made_up_report()
    best = min(report["trials"], key=lambda trial: trial["objectives"]["kl"])
    for trial in report["trials"]:
        trial["counts"] = counts or trial is not best
    with opened(report) as tab:
        tab.page.fill("#budget", "1G")
        assert (tab.text("#trial h3") == f"trial {best['number']}") is counts
        tab.page.evaluate("update({selected: '0:dense'})")
        entry = tab.page.evaluate(f"BY_KEY.get('0:{best['number']}').counts")
        assert entry is counts


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("kl", 0.123456, "0.1235 nats/token"),
        ("perplexity", 12.3456, "12.35"),
        ("accuracy", 0.125, "12.5 %"),
        ("params", 134515008, "134.5 M"),
        ("params_share", 0.6, "60.0 %"),
        ("flops", 269_000_000, "269 M FLOPs/token"),
        ("weight_bytes", 269_030_016, "269 MB"),
        ("kv_bytes", 15_500, "15.5 kB"),
        ("prefill_latency", 81.25, "81.25 ms"),
        ("decode_latency", 12.5, "12.5 ms/token"),
        ("energy", 0.75, "0.75 J/token"),
        ("peak_memory", 3.1e8, "310 MB"),
        ("gain", 0.01, "0.01 nats/token"),
        ("of_another_version", 3, "3"),
    ],
)
def test_values_are_written_as_their_rows_say(page_of_a_report: Any, name: str, value: float, shown: str) -> None:
    assert page_of_a_report.evaluate("([name, value]) => withUnit(name, value)", [name, value]) == shown


@pytest.mark.parametrize(
    ("name", "typed", "amount"),
    [
        ("params", "100M", 100e6),
        ("params", "1.5 bn", 1.5e9),
        ("params", "90 000 000", 90e6),
        ("params", "100M parameters", 100e6),
        ("params_share", "60 %", 0.6),
        ("flops", "150 MFLOPs", 150e6),
        ("weight_bytes", "1,2 GB", 1.2e9),
        ("peak_memory", "300 MBytes", 300e6),
        ("kv_bytes", "15 kB", 15e3),
        ("decode_latency", "25 ms", 25),
        ("energy", "0.5 J", 0.5),
        ("energy", "25 ms", None),
        ("params", "small", None),
        ("params", "", None),
    ],
)
def test_amounts_are_read_as_people_type_them(
    page_of_a_report: Any, name: str, typed: str, amount: float | None
) -> None:
    found = page_of_a_report.evaluate("([name, text]) => parseAmount(name, text)", [name, typed])
    assert math.isnan(found) if amount is None else found == pytest.approx(amount)


def test_three_objectives_and_whatever_else_was_measured(opened: Open) -> None:
    report = made_up_report()
    rng = random.Random(3)
    for trial in report["trials"]:
        share = trial["objectives"]["params_share"]
        trial["objectives"] |= {
            "latency": 40 * share * rng.uniform(0.8, 1.2), "weight_bytes": trial["objectives"]["params"] * 2,
            "kv_bytes": round(20_000 * share), "flops": round(2e8 * share), "energy": None,
        }  # fmt: skip
    dense = report["dense"]["objectives"]
    dense |= {"latency": 40.0, "weight_bytes": 268_000_000, "kv_bytes": 20_000, "flops": 200_000_000, "energy": None}
    report["objectives"].append(
        {"name": "latency", "unit": "ms", "direction": "minimize", "reference_point": 40.0, "known": False}
    )
    with opened(report) as tab:
        assert tab.page.evaluate("[STATE.x, STATE.y, STATE.size]") == ["params_share", "kl", "latency"]
        sizes = """chart('front-chart').getOption().series.flatMap(s => s.data ?? [])
            .filter(point => point.symbolSize).map(point => [point.key, point.symbolSize])"""
        drawn = dict(tab.page.evaluate(sizes))
        slow = sorted(report["trials"], key=lambda trial: trial["objectives"]["latency"])
        by_size = [drawn[f"0:{trial['number']}"] for trial in slow]
        assert by_size == sorted(by_size) and by_size[0] < by_size[-1]
        for quantity, typed, limit in (
            ("latency", "25 ms", 25.0),
            ("weight_bytes", "200 MB", 200e6),
            ("kv_bytes", "15 kB", 15e3),
            ("flops", "150 MFLOPs", 150e6),
        ):
            tab.page.select_option("#budget-quantity", quantity)
            tab.page.fill("#budget", typed)
            fitting = [trial for trial in report["trials"] if trial["objectives"][quantity] <= limit]
            best = min(fitting, key=lambda trial: trial["objectives"]["kl"])
            assert tab.text("#budget-answer").startswith(f"trial {best['number']}:")
        panel = tab.text("#trial")
        assert "latency (ms)" in panel and "flops (FLOPs/token)" in panel and "energy" not in panel
        tab.page.select_option("#x-axis", "latency")
        line = "chart('front-chart').getOption().series.find(s => s.name === 'front, proxy windows').data.map(p => p.value)"
        steps = tab.page.evaluate(line)
        both = [(trial["objectives"]["latency"], trial["objectives"]["kl"]) for trial in report["trials"]]
        best = sorted(p for p in both if not any(a <= p[0] and b <= p[1] and (a, b) != p for a, b in both))
        assert [tuple(step) for step in steps] == best


def test_several_runs_share_a_reference_point_and_a_union_front(opened: Open) -> None:
    runs = [made_up_report(), made_up_report(seed=1)]
    runs[1]["run"]["name"] = "other"
    runs[1]["objectives"] = [{**runs[1]["objectives"][0], "reference_point": 1.5}, runs[1]["objectives"][1]]
    runs[1]["data"] = {**runs[1]["data"], "window": 128}
    with opened(*runs) as tab:
        data = tab.page.evaluate(
            "({reference: DATA.reference_point, union: DATA.union, traces: RUNS.map(run => run.trace)})"
        )
        assert data["reference"] == {"kl": 1.5, "params_share": 1.0}
        assert all(trace == sorted(trace) and len(trace) == 40 for trace in data["traces"])
        points = [
            (run, t["number"], t["objectives"]["kl"], t["objectives"]["params_share"])
            for run, r in enumerate(runs)
            for t in r["trials"]
        ]
        union = {
            (p[0], p[1]) for p in points if not any(q[2] <= p[2] and q[3] <= p[3] and q[2:] != p[2:] for q in points)
        }
        assert {(point["run"], point["trial"]) for point in data["union"]} == union
        assert "windows of different lengths" in tab.text("#runs") and "kl 1.5" in tab.text("#runs")
        last = next(number for run, number in sorted(union, reverse=True) if run == 1)
        tab.page.evaluate(f"update({{selected: '1:{last}'}})")
        assert tab.text("#trial h3") == f"other, trial {last}" and "runs/other" in tab.text("#export-command")
        assert "of other" in tab.text("#recipe h2")


def test_hostile_text_stays_text(opened: Open) -> None:
    report = json.loads(json.dumps(made_up_report()).replace('"advisor"', json.dumps(HOSTILE)))
    report["run"] |= {"name": HOSTILE, "command": HOSTILE}
    report["model"]["name"] = report["data"]["source"] = HOSTILE
    report["advisor"] = {"name": HOSTILE, HOSTILE: [{HOSTILE: HOSTILE}]}
    for trial in report["trials"]:
        trial |= {"why": HOSTILE, "failure": HOSTILE}
    other = made_up_report(seed=1)
    with opened(report, other) as tab:
        tab.hover("0:7")
        tab.page.evaluate("document.getElementById('all-trials').open = true")
        tab.page.wait_for_selector("#all-trials tbody")
        assert HOSTILE in tab.page.text_content("h1") and HOSTILE in tab.page.text_content(".hover")
        assert HOSTILE in tab.page.text_content("#advisor") and HOSTILE in tab.page.text_content("#all-trials")
        assert tab.page.evaluate("window.broken") is None and tab.page.locator("img").count() == 0
        assert tab.page.locator("script").count() == 3


def test_no_script_runs_but_the_pages_own(opened: Open) -> None:
    """Should anything slip through the escaping, the content security policy still refuses to run it."""
    with opened(made_up_report()) as tab:
        for attack in ATTACKS:
            tab.page.evaluate(attack)
        assert tab.page.evaluate("window.broken") is None
        assert all("Content Security Policy" in complaint for complaint in tab.complaints) and tab.complaints
        tab.complaints.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_screen_and_can_be_read(opened: Open, width: int, scheme: str) -> None:
    with opened(made_up_report(), width=width, scheme=scheme) as tab:
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        assert min(tab.page.evaluate(CONTRAST)) >= 4.5  # WCAG 2.2 AA
        unlabelled = "() => [...document.querySelectorAll('input, select')].filter((node) => !node.labels.length).map((node) => node.id)"
        assert tab.page.evaluate(unlabelled) == []


def test_two_thousand_trials_stay_smooth(opened: Open) -> None:
    report = made_up_report(2000)
    with opened(report) as tab:
        for redraw in (
            "drawFront(STATE)",
            "update({selected: '0:1234'})",
            "update({limit: {name: 'params', value: 1e8}})",
        ):
            start = time.perf_counter()
            tab.page.evaluate(f"new Promise((done) => {{ {redraw}; requestAnimationFrame(() => done()); }})")
            assert time.perf_counter() - start < SMOOTH
        size = len(render_page([("runs/made-up", report)]))
        assert size < 4e6, f"the page has {size} bytes"


def test_without_scripts_the_numbers_are_still_there(browser: Any, tmp_path: Path) -> None:
    report = made_up_report()
    (tmp_path / "report.html").write_text(render_page([("runs/x", report)]), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("noscript tbody tr").count() == len(report["front"]) + 1
    context.close()
