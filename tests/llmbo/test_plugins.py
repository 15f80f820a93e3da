"""Third parties' strategies: found by name, refused in one line, and never the end of what was measured.

That they keep the contract of all proposers is tested in `test_proposers.py`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmbo.comparison.config import read_config
from llmbo.comparison.strategies import strategy_of as compared
from llmbo.config import STRATEGIES, RunConfig
from llmbo.config.advisor import parse_spec
from llmbo.errors import ConfigError, StrategyError
from llmbo.report import Report
from llmbo.report.files import read_report
from llmbo.run.rebuild import config_of
from llmbo.run.store import TrialStore
from llmbo.search.loop import run_search
from llmbo.search.strategies import strategy_of
from llmbo.types import Trial

GROUP = "llmbo.strategies"
GUEST = """
from dataclasses import dataclass
from typing import Any

from llmbo.config.strategies import Strategy
from llmbo.search.baselines import RandomProposer

@dataclass(frozen=True)
class Guest:
    space: Any
    dense: Any
    after: int = 1000
    fault: str = ""

    def propose(self, trials, q, seed):
        found = RandomProposer(self.space).propose(trials, q, seed)
        return found if len(trials) < self.after else spoilt(self.fault, found, trials)

@dataclass(frozen=True)
class Needy:
    appetite: int

    def propose(self, trials, q, seed):
        return []

@dataclass(frozen=True)
class Fussy(Guest):
    def __post_init__(self):
        raise ArithmeticError("not this model")

def spoilt(fault, found, trials):
    from llmbo.types import Proposal
    if fault == "raises":
        raise KeyError("oops")
    if fault == "none":
        return None
    points = {
        "many": [*found, found[0]], "twice": [found[0], found[0]], "known": [trials[0]],
        "illegal": [Proposal((0,) * len(found[0].x), "guest")], "short": [Proposal(found[0].x[:-1], "guest")],
        "real": [Proposal(tuple(map(float, found[0].x)), "guest")],
    }
    return points[fault]

seeded = Strategy(Guest, design="threshold", fixed={"after": 500})
named = Strategy("guest:Guest")
misfit = Strategy(Guest, fixed={"afterwards": 1})
number = 7
"""


@pytest.fixture
def guest(install: Callable[..., None]) -> None:
    rows = {
        name.lower(): f"guest:{name}"
        for name in ("Guest", "Needy", "Fussy", "seeded", "named", "misfit", "number", "Lost", "spoilt")
    }
    install("guest", GUEST, {GROUP: {**rows, "gone": "nowhere:Guest"}})


@pytest.fixture
def open_store(toy: Any, tmp_path: Path) -> Callable[[str], TrialStore]:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    return lambda name: TrialStore.create(url, name, toy.space, toy.objectives, {}, {})


class Silent:
    def on_proposing(self, round: int) -> None: ...

    def on_trial_start(self, proposal: object, number: int) -> None: ...

    def on_trial_end(self, trial: Trial, trials: object) -> None: ...


@pytest.mark.usefixtures("guest")
def test_a_name_is_checked_without_importing_what_is_behind_it() -> None:
    assert RunConfig(model="llama", strategy="guest").strategy == "guest"
    assert "guest" not in sys.modules
    assert strategy_of("guest").type.__module__ == "guest"


@pytest.mark.usefixtures("guest")
def test_an_unknown_name_tells_plug_ins_too() -> None:
    for check in (lambda name: RunConfig(model="llama", strategy=name), strategy_of, compared):
        with pytest.raises(ConfigError, match="did you mean guest"):
            check("gest")


@pytest.mark.usefixtures("guest")
def test_a_class_is_a_strategy_without_a_design_and_a_strategy_says_more(toy: Any) -> None:
    plain, seeded = strategy_of("guest"), strategy_of("seeded")
    assert (plain.design, plain.options) == (None, {"after": 1000, "fault": ""})
    assert (seeded.design, seeded.options) == ("threshold", {"fault": "", "num_initial": 12})
    assert strategy_of("named").type.__name__ == "Guest"
    assert {proposal.origin for proposal in plain.build(toy, toy.objectives, {}).propose([], 4, 0)} == {"random"}
    design = seeded.build(toy, toy.objectives, {}).propose([], 4, 0)
    assert design == strategy_of("threshold").build(toy, toy.objectives, {}).propose([], 4, 0)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("gone", "No module named 'nowhere'"),
        ("lost", "has no attribute 'Lost'"),
        ("number", "expected a dataclass with the method propose, or a Strategy, got 7"),
        ("spoilt", "expected a dataclass with the method propose"),
        ("needy", "field appetite needs a default"),
        ("misfit", "no field afterwards"),
    ],
)
@pytest.mark.usefixtures("guest")
def test_what_cannot_be_used_is_refused_in_one_line_that_says_whose_it_is(llmbo: Any, name: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as caught:
        strategy_of(name)
    assert f"The strategy '{name}' of guest 1.0" in str(caught.value) and "\n" not in str(caught.value)
    before = llmbo.files()
    result = llmbo(strategy=name)
    assert result.exit_code == 2 and str(caught.value) in result.output and "Traceback" not in result.output
    assert llmbo.files() == before  # refused before anything was written


@pytest.mark.parametrize("owner", ["llmbo", "guest 1.0"])
def test_a_name_with_two_owners_is_refused_and_others_are_not(
    install: Callable[..., None], guest: None, owner: str
) -> None:
    name = "nsga2" if owner == "llmbo" else "guest"
    install("rival", GUEST, {GROUP: {name: "rival:Guest"}})
    for check in (lambda name: RunConfig(model="llama", strategy=name), strategy_of, compared):
        with pytest.raises(
            ConfigError, match=f"The strategy '{name}' is brought by .*rival 1.0.*: uninstall"
        ) as caught:
            check(name)
        assert owner in str(caught.value)
    assert strategy_of("random") and strategy_of("seeded")


def test_an_advisors_name_with_two_owners_is_refused_likewise(install: Callable[..., None]) -> None:
    install("rival", GUEST, {"llmbo.advisors": {"heuristic": "rival:Guest", "mine": "rival:Guest"}})
    with pytest.raises(ConfigError, match=r"The advisor 'heuristic' is brought by llmbo and by rival 1\.0"):
        parse_spec("heuristic")
    assert parse_spec("mine:x").argument == "x" and parse_spec("random").kind == "random"


def test_no_plug_in_takes_the_name_that_only_comparisons_know(install: Callable[..., None]) -> None:
    install("rival", GUEST, {GROUP: {"advised": "rival:Guest"}})
    with pytest.raises(ConfigError, match=r"'advised' is brought by llmbo and by rival 1\.0"):
        compared("advised")


@pytest.mark.usefixtures("guest")
def test_a_comparison_takes_it_with_its_keys(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    text = 'strategies = ["random", {strategy = "guest", KEY}]\n[problem]\nrecorded = "problem-r-surrogate"\n'
    config.write_text(text.replace("KEY", 'label = "late", after = 7'))
    assert [(arm.label, arm.options) for arm in read_config(config).arms] == [("random", {}), ("late", {"after": 7})]
    config.write_text(text.replace("KEY", "later = 7"))
    with pytest.raises(ConfigError, match="did you mean after"):
        read_config(config)


@pytest.mark.usefixtures("guest")
def test_a_class_that_takes_exception_to_the_problem_is_named(toy: Any) -> None:
    with pytest.raises(ConfigError, match=r"'fussy' of guest 1.0 .*ArithmeticError: not this model"):
        strategy_of("fussy").build(toy, toy.objectives, {})


FAULTS = {
    "raises": "of guest 1.0 .* failed .KeyError: 'oops'",
    "none": "failed .TypeError",
    "many": "5 candidates where 4 were asked for",
    "twice": "the same candidate twice",
    "known": "evaluated before",
    "illegal": "an illegal candidate",
    "short": "no tuple of 8 whole numbers",
    "real": "no tuple of 8 whole numbers",
}


@pytest.mark.usefixtures("guest")
def test_a_fault_while_proposing_loses_nothing(toy: Any, open_store: Callable[[str], TrialStore]) -> None:
    def search(name: str, **options: object) -> list[tuple[int, ...]]:
        proposer = strategy_of("guest").build(toy, toy.objectives, options)
        run_search(proposer, toy.evaluator, open_store(name), 12, 4, 0, Silent())
        return [trial.x for trial in open_store(name).trials()]

    whole = search("whole")
    for fault, told in FAULTS.items():
        with pytest.raises(StrategyError, match=told) as caught:
            search(fault, after=8, fault=fault)
        assert "guest" in str(caught.value) and "8 evaluations so far are kept" in str(caught.value)
        assert [trial.complete for trial in open_store(fault).trials()] == [True] * 8
        assert search(fault) == whole  # once it is mended


@pytest.mark.usefixtures("guest")
def test_a_run_with_a_plug_in_can_be_exported_without_it(
    llmbo: Any, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = GUEST.replace("after: int = 1000", "after: int = 4").replace('fault: str = ""', 'fault: str = "raises"')
    install("guest", broken, {GROUP: {"guest": "guest:Guest"}})
    result = llmbo(strategy="guest", budget=8)
    assert result.exit_code == 2 and "KeyError" in result.output and "Traceback" not in result.output
    assert llmbo.report()["run"]["status"] == "failed" and len(llmbo.report()["trials"]) == 4
    install("guest", GUEST, {GROUP: {"guest": "guest:Guest"}})
    assert llmbo(strategy="guest", budget=8).exit_code == 0
    assert len(llmbo.report()["trials"]) == 8

    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if "site-guest" not in folder])
    with pytest.raises(ConfigError, match="Unknown strategy 'guest'"):
        RunConfig.from_settings(llmbo.report()["run"]["settings"])
    assert config_of(Report.model_validate(read_report(llmbo.folder / "runs" / "tiny"))).window == 16


def test_every_strategy_of_ours_is_fit_to_be_built(toy: Any) -> None:
    for name in STRATEGIES:
        factory = strategy_of(name)
        assert set(factory.strategy.fixed) <= set(factory.type.__dataclass_fields__), name
        problem = toy.with_prices() if factory.strategy.recipes else toy
        assert factory.build(problem, toy.objectives, {}).propose([], 1, 0), name
