"""optuna-dashboard opens a run's study as it is: its server on loopback, its pages in a real browser."""

import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from typing import Any
from urllib.request import urlopen

import pytest

pytest.importorskip("optuna_dashboard", reason="no optuna-dashboard here (pip install optuna-dashboard)")

TIMEOUT = 120.0  # seconds until the server answers, on a busy machine


@pytest.fixture(scope="module")
def address(finished: Any) -> Iterator[str]:
    """The dashboard of a finished run, as `optuna-dashboard sqlite:///…` serves it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    database = f"sqlite:///{finished.folder / 'runs' / 'tiny' / 'study.db'}"

    def serve() -> None:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        sys.argv = ["optuna-dashboard", database, "--host", "127.0.0.1", "--port", str(port)]
        importlib.import_module("optuna_dashboard._cli").main()

    server = get_context("fork").Process(target=serve)  # Optuna is imported here already
    server.start()
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + TIMEOUT
    try:
        while True:
            try:
                urlopen(f"{address}/api/studies", timeout=5).close()
                break
            except OSError:
                assert server.is_alive() and time.monotonic() < deadline, "the dashboard did not start"
                time.sleep(0.2)
        yield address
    finally:
        server.kill()
        server.join()


def fetched(url: str) -> Any:
    with urlopen(url, timeout=60) as answer:
        return json.load(answer)


def test_it_serves_the_trials_that_the_report_has(address: str, finished: Any) -> None:
    report = finished.report()
    summaries = fetched(f"{address}/api/studies")["study_summaries"]
    studies = {summary["study_name"]: summary for summary in summaries}
    study = studies["tiny"]
    assert set(studies) == {"tiny", "tiny/lease"} and study["directions"] == ["minimize", "minimize"]
    detail = fetched(f"{address}/api/studies/{study['study_id']}?after=0")
    names = [objective["name"] for objective in report["objectives"]]
    assert detail["objective_names"] == names and len(detail["trials"]) == len(report["trials"])
    for shown, trial in zip(detail["trials"], report["trials"], strict=True):
        assert shown["values"] == [trial["objectives"][name] for name in names]
    assert {trial["number"] for trial in detail["best_trials"]} >= {point["trial"] for point in report["front"]}


def test_its_pareto_page_draws_the_front(address: str, browser: Any, finished: Any) -> None:
    study = next(s for s in fetched(f"{address}/api/studies")["study_summaries"] if s["study_name"] == "tiny")
    page = browser.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.set_default_timeout(1000 * TIMEOUT)
    page.goto(f"{address}/dashboard/studies/{study['study_id']}", wait_until="commit")
    page.wait_for_selector("text=Pareto")
    page.wait_for_selector(".js-plotly-plot .scatterlayer .point")
    drawn = page.evaluate(
        """() => [...document.querySelectorAll('.js-plotly-plot')].map((plot) => plot.data.flatMap((trace) =>
            [...(trace.x ?? [])].map((x, at) => [x, trace.y?.[at]])))"""
    )
    axes = [objective["name"] for objective in finished.report()["objectives"]]
    points = {tuple(trial["objectives"][name] for name in axes) for trial in finished.report()["trials"]}
    assert any({tuple(point) for point in plot} >= points for plot in drawn)
    page.close()
    assert not complaints
