"""An adapter for all sub-networks makes them better, is PEFT's as well, belongs to one model, and is searched like a dense model."""

import json
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import PeftModel
from safetensors.torch import load_file
from scipy.stats import kendalltau
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from experiments.elastic import __main__ as experiment
from experiments.elastic.draws import DRAWS
from experiments.elastic.table import table, volume
from experiments.healing_order import __main__ as order
from llmbo.cli import app
from llmbo.config import RunConfig
from llmbo.models.adapter import Adapter
from llmbo.models.loading import fingerprint, load_checkpoint
from llmbo.problem.preparation import Problem
from llmbo.problem.texts import load_windows
from llmbo.training import lessons
from llmbo.training.elastic import Sandwich, on_path
from llmbo.training.plan import PASSES
from pruning.likelihood import quality

STEPS = 12


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with something to learn: every word calls for the next one."""
    path = tmp_path_factory.mktemp("story") / "words.txt"
    path.write_text(" ".join(f"w{index % 7}" for index in range(4800)), encoding="utf-8")
    return path


def train(model: Path, out: Path, story: Path, *words: object) -> Result:
    common = ("--window", 16, "--calibration-tokens", 128, "--heldout", 4, "--min-share", 0.4, "--device", "cpu")
    own = ("--dtype", "float32", "--text", f"text:{story}", "--lr", "3e-3", "--eval-every", 6, "--rank", 4)
    return CliRunner().invoke(app, ["elastic", "--model", *map(str, (model, "--out", out, *common, *own, *words))])


@pytest.fixture(scope="module")
def adapter(model_folder: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training has left. Read it only."""
    out = tmp_path_factory.mktemp("elastic") / "adapter"
    done = train(model_folder, out, story, "--steps", STEPS)
    assert done.exit_code == 0, done.output
    assert "share 0.4" in done.stdout and f"llmbo optimize --model {model_folder} --elastic {out}" in done.stdout
    return out


def test_members_get_better_and_peft_reads_the_adapter(model_folder: Path, adapter: Path) -> None:
    told = json.loads((adapter / "elastic.json").read_text())
    small, middle, dense = told["members"]
    assert small["share"] < middle["share"] < dense["share"] == 1
    assert small["after"]["kl"] < 0.9 * small["before"]["kl"] and dense["before"]["kl"] < 1e-6
    assert dense["after"]["kl"] < 0.1 * small["before"]["kl"]  # every fourth step is the dense model's
    assert not adapter.with_name("adapter.training").exists()
    for dtype, digest in told["base_model"]["fingerprints"].items():  # known again in each
        assert fingerprint(load_checkpoint(str(model_folder), dtype, "cpu").model) == digest
    merged = load_checkpoint(str(model_folder), "float32", "cpu").model
    Adapter.read(str(adapter)).merge_into(merged)
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter)
    windows = torch.arange(16).view(1, 16) + 2
    with torch.no_grad():
        own, theirs, before = (model(windows).logits for model in (merged, wrapped, plain))
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)
    assert (own - before).abs().max() > 0.01
    for name, weight in merged.named_parameters():
        kind = name.split(".")[-2]
        changed = not torch.equal(weight, plain.get_parameter(name))
        assert changed == (kind not in ("o_proj", "down_proj", "embed_tokens", "lm_head")), name


def test_the_dense_model_writes_what_is_trained_on(
    model_folder: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    sample = lessons.sample_windows

    def counted(model: Any, tokenizer: Any, counts: Any, *given: Any, **named: Any) -> Any:
        asked.append(counts["calibration"])
        return sample(model, tokenizer, counts, *given, **named)

    monkeypatch.setattr(lessons, "sample_windows", counted)
    trained = train(model_folder, tmp_path / "adapter", story, "--steps", 5, "--text", "self")
    assert trained.exit_code == 0, trained.output
    told = json.loads((tmp_path / "adapter" / "elastic.json").read_text())
    assert told["text"]["source"].startswith("self") and not told["text"]["reserved"]
    assert asked == [-(-5 * told["plan"]["batch"] // PASSES)]


def test_a_stopped_training_ends_with_the_same_adapter(
    model_folder: Path, adapter: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms, seen = Sandwich.forms, list[int]()

    def interrupted(lesson: Sandwich, step: int) -> Any:
        seen.append(step)
        if step == 8 and len(seen) < 20:
            raise KeyboardInterrupt
        return forms(lesson, step)

    out = tmp_path / "adapter"
    monkeypatch.setattr(Sandwich, "forms", interrupted)
    stopped = train(model_folder, out, story, "--steps", STEPS)
    assert stopped.exit_code == 130 and "goes on" in stopped.stderr and not out.exists()
    refused = train(model_folder, out, story, "--steps", STEPS, "--min-share", 0.6)
    assert refused.exit_code == 2 and "other settings (members)" in refused.stderr
    monkeypatch.setattr(Sandwich, "forms", lambda lesson, step: seen.append(step) or forms(lesson, step))
    del seen[:]
    assert train(model_folder, out, story, "--steps", STEPS).exit_code == 0
    assert seen == list(range(6, STEPS))
    assert (out / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()


def test_an_adapter_is_searched_and_exported_like_a_dense_model(
    llmbo: Any, model_folder: Path, adapter: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr("llmbo.models.adapter.load_file", lambda path: read.append(path) or load_file(path))
        result = llmbo(elastic=adapter, text=f"text:{story}", min_share=0.4, budget=3)
    assert result.exit_code == 0 and read == [adapter / "adapter_model.safetensors"], result.output
    report = llmbo.report()
    model = load_checkpoint(str(model_folder), "float32", "cpu")
    windows = load_windows(RunConfig.from_settings(report["run"]["settings"]), model)
    for part, own in (("objectives", windows.proxy), ("heldout", windows.heldout)):  # of the model as it was
        dense = report["dense"][part]
        assert dense["kl"] == 0 and dense["loss"] == pytest.approx(quality(model.model, own).loss, abs=1e-5)
    assert report["model"]["fingerprint"] != fingerprint(model.model)
    trial, out = report["front"][0]["trial"], tmp_path / "small"
    with chdir(llmbo.folder):
        shutil.rmtree("runs/tiny/prepared")  # prepared again, and measured against what the run measured
        done = CliRunner().invoke(app, ["export", "tiny", "--trial", str(trial), "--format", "hf", "--out", str(out)])
        assert done.exit_code == 0, done.output
    assert "an adapter for all" in (out / "README.md").read_text()
    weights = {name: weight for name, weight in load_checkpoint(str(out), "float32", "cpu").model.named_parameters()}
    assert not torch.equal(weights["model.norm.weight"], model.model.get_parameter("model.norm.weight"))
    again = llmbo(elastic=None, text=f"text:{story}", min_share=0.4, budget=5)
    assert again.exit_code == 2 and "elastic" in again.stderr
    again = llmbo(elastic=adapter, text=f"text:{story}", min_share=0.4, budget=5)
    assert again.exit_code == 0, again.output
    with chdir(llmbo.folder):  # a worker has the adapted model, too, and computes what the run did
        done = CliRunner().invoke(app, ["worker", "runs/tiny"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("fault", ["base", "missing", "damaged", "seen"])
def test_an_adapter_that_does_not_fit_is_refused(
    llmbo: Any, adapter: Path, story: Path, tmp_path: Path, model_folder: Path, fault: str
) -> None:
    folder, changes = tmp_path / "adapter", {}
    shutil.copytree(adapter, folder)
    if fault == "base":
        other = AutoModelForCausalLM.from_pretrained(model_folder)
        other.get_input_embeddings().weight.data += 0.1
        shutil.copytree(model_folder, tmp_path / "other")
        other.save_pretrained(tmp_path / "other")
        changes, said = {"model": tmp_path / "other"}, "was trained for"
    elif fault == "missing":
        folder, said = tmp_path / "nowhere", "no elastic.json"
    elif fault == "damaged":
        (folder / "adapter_model.safetensors").write_bytes(b"{")
        said = "is damaged"
    else:
        changes, said = {"seed": 1}, "--seed 0 --window 16"
    result = llmbo(elastic=folder, text=f"text:{story}", **changes)
    assert result.exit_code == 2 and said in result.stderr.splitlines()[-1], result.stderr
    assert not (llmbo.folder / "runs" / "tiny" / "study.db").exists()


def test_a_mix_of_texts_trains_on_each_and_leaves_windows_of_each(
    model_folder: Path, story: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"w{index % 5}" for index in range(4800)), encoding="utf-8")
    mix = f"mix:text:{story}=1,text:{other}=1"
    done = train(model_folder, tmp_path / "mixed", story, "--text", mix, "--steps", 2, "--eval-every", 2)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "mixed" / "elastic.json").read_text())
    assert len(told["text"]["reserved"]) == 2 and min(told["text"]["reserved"].values()) > 0


def test_a_study_of_a_text_that_it_cannot_use_ends_in_one_line(
    model_folder: Path,
    story: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mix = f"mix:text:{story}=99,text:{text_file}=1"  # too little of the second for a window in each split
    words = ["--model", model_folder, "--text", mix, "--judge", "python", "--shares", 0.6, "--window", 16]
    words += ["--calibration", 128, "--validation", 2, "--device", "cpu", "--out", tmp_path / "some.json"]
    for study in (experiment, order):
        monkeypatch.setattr("sys.argv", ["study", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            study.main()
        line = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2 and line.startswith("error: ") and "of the mix" in line
    monkeypatch.setattr("sys.argv", ["study", *map(str, words), "--healed", "0.7"])
    with pytest.raises(SystemExit) as ended:
        experiment.main()
    assert ended.value.code == 2 and "--healed 0.7: not among --shares 0.6" in capsys.readouterr().err


def test_the_experiment_trains_every_arm_once(
    model_folder: Path,
    story: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def words(out: Path, *more: object) -> list[str]:
        given = [
            "--model",
            model_folder,
            "--text",
            f"text:{story}",
            "--judge",
            f"text:{text_file}",
            "--shares",
            0.8,
            0.6,
        ]
        given += [
            "--seeds",
            0,
            "--tokens",
            1024,
            "--window",
            16,
            "--calibration",
            128,
            "--judged",
            64,
            "--validation",
            2,
        ]
        given += ["--rank", 2, "--dtype", "float32", "--device", "cpu", "--out", out, *more]
        return ["elastic", *map(str, given)]

    def entries(out: Path) -> dict[str, Any]:
        return dict(json.loads(out.read_text())["entries"])

    whole, parts = tmp_path / "elastic.json", tmp_path / "parts.json"
    monkeypatch.setattr("sys.argv", words(whole))
    experiment.main()
    expected = entries(whole)
    everything = {f"0 {share} {arm}" for share in ("0.8", "0.6") for arm in experiment.ARMS}
    assert set(expected) == everything - {"0 0.8 one"}
    steps = {arm: expected[f"0 0.6 {arm}"]["history"][-1:] for arm in experiment.ARMS}
    assert not steps["none"] and [steps[arm][0][0] for arm in ("one", "each", "elastic")] == [
        16,
        8,
        8,
    ]  # of 64 tokens a pass
    shown = capsys.readouterr().out.partition("Against")[0]
    for arm in experiment.ARMS:
        (row,) = [line for line in shown.splitlines() if line.startswith(f"| text:{text_file} | {arm} | 1 |")]
        assert f" {expected[f'0 0.6 {arm}']['texts'][f'text:{text_file}']['kl']:.4f} |" in row
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "Study", None)  # nothing is done again
        experiment.main()
    both = ("--healed", 0.8, 0.6)
    monkeypatch.setattr("sys.argv", words(whole, *both))
    experiment.main()
    expected = entries(whole)
    assert set(expected) == everything

    train, trained = experiment.train, list[int]()

    def second_is_stopped(*args: Any, **options: Any) -> Any:
        def step(done: int) -> None:
            trained.append(done)
            if len(trained) == 16 + 9:
                raise KeyboardInterrupt

        return train(*args, step, **options)

    monkeypatch.setattr(experiment, "train", second_is_stopped)
    monkeypatch.setattr("sys.argv", words(parts, *both, "--arms", "one", "elastic"))
    with pytest.raises(KeyboardInterrupt):
        experiment.main()
    assert set(entries(parts)) == {"0 0.8 one"}
    experiment.main()
    assert trained[16 + 9] == 9  # 16 steps, validated at every second: it went on behind the eighth
    assert len(trained) == 16 + 9 + 8 and [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    for key, entry in entries(parts).items():
        assert {**entry, "seconds": 0} == {**expected[key], "seconds": 0}


def test_members_are_drawn_as_the_arm_says(
    model_folder: Path, story: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[tuple[tuple[int, ...], bool, bool]]] = {}  # levels, on the path, smaller than by default

    def watched(arm: str) -> Any:
        draw = DRAWS[arm]

        def told(problem: Problem, generator: torch.Generator) -> tuple[int, ...]:
            state = generator.get_state()
            x = draw(problem, generator)
            ordinary = on_path(problem, generator.set_state(state))
            assert bool(problem.space.legal(torch.tensor([x], dtype=torch.float64)))
            path = {tuple(row) for row in problem.family.path.int().tolist()}
            smaller = problem.space.share(torch.tensor([x, ordinary], dtype=torch.float64)).diff() > 0
            seen.setdefault(arm, []).append((x, x in path, bool(smaller)))
            return x

        return told

    out = tmp_path / "arms.json"
    words = ["--model", model_folder, "--text", f"text:{story}", "--judge", f"text:{text_file}", "--shares", 0.6]
    words += ["--seeds", 0, "--tokens", 1024, "--window", 16, "--calibration", 128, "--judged", 64, "--validation", 2]
    words += ["--rank", 2, "--dtype", "float32", "--device", "cpu", "--out", out, "--arms", *DRAWS]
    monkeypatch.setattr("sys.argv", ["elastic", *map(str, words)])
    monkeypatch.setattr(experiment, "DRAWS", {arm: watched(arm) for arm in DRAWS})
    experiment.main()
    assert len({str(entry["texts"]) for entry in json.loads(out.read_text())["entries"].values()}) == len(DRAWS)
    told = {arm: [[step[1] for step in steps], [step[2] for step in steps]] for arm, steps in seen.items()}
    assert all(told["elastic"][0]) and not any(told["elastic"][1])
    assert all(told["elastic-small"][0]) and sum(told["elastic-small"][1]) > len(told["elastic-small"][1]) / 2
    assert not all(told["elastic-random"][0]) and len({step[0] for step in seen["elastic-random"]}) > 1


def test_hypervolume_is_of_what_models_of_all_shares_dominate() -> None:
    assert volume({"0.5": 0.5}, 1.0) == pytest.approx(0.25)
    assert volume({"0.5": 0.5, "0.8": 0.25}, 1.0) == pytest.approx(0.25 + 0.2 * 0.25)
    assert volume({"0.5": 1.0, "0.8": 1.0}, 2.0) == pytest.approx(0.25)  # the larger one adds nothing

    def entry(kl: float) -> dict[str, Any]:
        return {"texts": {"t": {"kl": kl}}}

    found = {f"{seed} {share} none": entry(kl) for seed in (0, 1) for share, kl in (("0.5", 1.0), ("0.8", 0.5))}
    found |= {"0 0.5 each": entry(0.5), "0 0.8 each": entry(0.25), "1 0.5 each": entry(0.5), "1 0.5 one": entry(0.25)}
    lines = table(found, ("0.8", "0.5")).splitlines()
    assert lines[2:5] == [
        "| t | each | 1 | 0.2500 | 0.5000 | 0.3000 |",
        "| t | none | 2 | 0.5000 ± 0.0000 | 1.0000 ± 0.0000 | 0.1000 ± 0.0000 |",
        "| t | one | 1 | 0.5000 | 0.2500 | 0.3750 |",  # the other size as it was
    ]
    assert lines[5:] == [
        *("", "Against `none`, paired by seed:", "", *lines[:2]),
        "| t | each | 1 | -50.0% | -50.0% | +200.0% |",
        "| t | one | 1 | +0.0% | -75.0% | +275.0% |",
    ]
    found |= {f"{seed} {share} elastic": entry(kl) for seed, kl in ((0, 0.8), (1, 0.6)) for share in ("0.5", "0.8")}
    row = table(found, ("0.5",)).splitlines()[-2]  # a mean of -20 and -40 %
    assert row.startswith("| t | elastic | 2 | -30.0% ± 127.1% |")
    assert "No arm" in table({"1 0.5 one": entry(0.5)}, ("0.8", "0.5"))


def test_scores_forecast_the_order_after_healing(
    model_folder: Path, story: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", model_folder, "--text", f"text:{story}", "--judge", f"text:{text_file}", "--shares", 0.6]
    words += ["--candidates", 3, "--tokens", 64, "--window", 16, "--calibration", 128, "--judged", 64, "--scored", 64]
    words += ["--validation", 2, "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "order.json"]
    monkeypatch.setattr("sys.argv", ["healing_order", *map(str, words)])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    order.main()
    assert not list(tmp_path.glob("order-*"))  # checkpoints of hundreds of megabytes each
    entries = json.loads((tmp_path / "order.json").read_text())["entries"]
    sizes = [entry["scores"]["params"] for entry in entries.values()]
    assert len(entries) == 3 and max(sizes) - min(sizes) < order.EQUAL * 2
    assert len({str(entry["neurons"]) + str(entry["kv_groups"]) for entry in entries.values()}) == 3
    whole = [torch.randn(4, 2, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    assert order.trace(whole, whole) == pytest.approx(1) and order.trace(
        whole, [-part for part in whole]
    ) == pytest.approx(-1)
    assert order.trace(whole, [whole[0], *map(torch.zeros_like, whole[1:])]) == pytest.approx(1 / 3)
    scores = {f"0.6 {n}": dict.fromkeys(order.BETTER, n) for n in range(5)}
    forecast = {key: {"scores": own, "unhealed": n, "healed": 1 + n} for n, (key, own) in enumerate(scores.items())}
    drawn = torch.randint(4, (3, 6, 2), generator=torch.Generator().manual_seed(0)).numpy()
    assert order._tau(drawn) == pytest.approx([kendalltau(*pairs.T).statistic for pairs in drawn])
    found = order.forecasts(forecast, ["0.6"])
    assert {name: own[0] for name, own in found.items()} == {name: -sign for name, sign in order.BETTER.items()}
    assert {name: own[3] for name, own in found.items()} == {name: 2 + 2 * sign for name, sign in order.BETTER.items()}
