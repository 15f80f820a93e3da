"""Models that are cut by what other methods keep have the size they should, and are healed and told of like ours."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.healing import __main__ as experiment
from experiments.healing import picture, prose
from experiments.healing.peers import PEERS, BiasAlone
from experiments.healing.table import Key, table
from experiments.studies import parsed, parser_of
from pruning.anatomy import anatomy_of
from pruning.block import Block
from pruning.cost import cost_of
from pruning.likelihood import last_hidden, quality
from pruning.masks import PruningMask, masked


@pytest.fixture
def llama(build: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return build("llama")


def inputs(model: PreTrainedModel, windows: Tensor, projections: list[nn.Module]) -> list[Tensor]:
    """What each of some projections reads, `num_windows x T x columns`."""
    found: list[Tensor] = []
    handles = [each.register_forward_pre_hook(lambda _, args: found.append(args[0])) for each in projections]
    with torch.no_grad():
        last_hidden(model, windows)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("share", [0.6, 0.4])
@pytest.mark.parametrize("peer", list(PEERS))
def test_a_peer_keeps_the_share_that_it_is_asked_for(
    llama: PreTrainedModel, windows: Tensor, unchanged: Any, peer: str, share: float
) -> None:
    anatomy = anatomy_of(llama)
    with unchanged(llama):
        small, architecture = PEERS[peer](llama, share, windows)
    cost = cost_of(anatomy, architecture)
    unit = anatomy.attention.parameters_per_unit + anatomy.attention.fixed_parameters
    width = anatomy.num_hidden_layers * anatomy.mlp.parameters_per_unit
    assert abs(cost.share - share) * cost.block_parameters / cost.share <= max(unit, width)
    biases = sum(p.numel() for name, p in small.named_parameters() if name.endswith("bias"))
    assert small.num_parameters() == cost.parameters + biases and (biases > 0) == (peer == "flap")


def test_2ssp_keeps_the_loudest_neurons_and_drops_the_attention_that_costs_least(
    llama: PreTrainedModel, windows: Tensor
) -> None:
    anatomy, share = anatomy_of(llama), 0.5
    small, architecture = PEERS["2ssp"](llama, share, windows)
    (width,) = set(architecture.neurons)
    ratio = anatomy.mlp.units * anatomy.mlp.parameters_per_unit
    ratio /= anatomy.attention.units * anatomy.attention.parameters_per_unit
    gone = [index for index, groups in enumerate(architecture.kv_groups) if not groups]
    assert len(gone) == round(anatomy.num_hidden_layers * (1 - share) ** (ratio / 1.5)) > 0
    outputs = [anatomy.mlp.output_of(layer) for layer in anatomy.layers_of(llama)]
    neurons = torch.zeros(anatomy.num_hidden_layers, anatomy.mlp.units, dtype=torch.bool)
    for row, z in zip(neurons, inputs(llama, windows, outputs), strict=True):
        row[z.norm(dim=1).mean(0).argsort(descending=True)[:width]] = True
    groups = torch.ones(anatomy.num_hidden_layers, anatomy.attention.units, dtype=torch.bool)
    for _ in gone:
        losses = {}
        for index in groups.any(1).nonzero().flatten().tolist():
            without = groups.clone()
            without[index] = False
            with masked(llama, PruningMask(without, neurons)) as model:
                losses[index] = quality(model, windows).loss
        groups[min(losses, key=lambda index: losses[index])] = False
    with masked(llama, PruningMask(groups, neurons)) as model, torch.no_grad():
        torch.testing.assert_close(small(windows).logits, model(windows).logits)


def test_flap_keeps_what_fluctuates_and_the_mean_of_the_rest(llama: PreTrainedModel, windows: Tensor) -> None:
    anatomy = anatomy_of(llama)
    first = anatomy.layers_of(llama)[0]
    still = torch.arange(anatomy.mlp.units) % 2 == 0
    with torch.no_grad():
        anatomy.attention.output_of(first).weight.mul_(1e-4)  # so that the first MLP's inputs stay what they were
        first.mlp.down_proj.weight[:, still] *= 1e-3  # what such neurons do matters little
    small, architecture = PEERS["flap"](llama, 0.5, windows)
    narrow = anatomy.layers_of(small)[0]
    assert 0 < architecture.neurons[0] <= (~still).sum()

    def mean(layer: nn.Module, block: Block, model: PreTrainedModel) -> Tensor:
        found: list[Tensor] = []
        module = block.module_of(layer)
        handle = module.register_forward_hook(
            lambda _, args, out: found.append(out if torch.is_tensor(out) else out[0])
        )
        with torch.no_grad():
            last_hidden(model, windows)
        handle.remove()
        return found[0].flatten(0, 1).mean(0)

    for block in anatomy.blocks:
        dense = mean(first, block, llama)
        torch.testing.assert_close(mean(narrow, block, small), dense, rtol=1e-3, atol=1e-3 * float(dense.abs().max()))
    tight, architecture = PEERS["flap"](llama, 0.3, windows)
    gone = [
        index for index, groups in enumerate(architecture.kv_groups) if not groups and architecture.keeps_layer(index)
    ]
    assert gone and sum(isinstance(module, BiasAlone) for module in tight.modules()) >= len(gone)


def entry(kl: float, *history: tuple[int, float]) -> dict[str, Any]:
    told: dict[str, Any] = {"seconds": 1.0, "texts": {"t": {"kl": kl, "loss": math.log(2.0)}}, "items": {}}
    return told | ({"history": history, "tokens": 512} if history else {})


def test_the_table_reads_what_there_was_before_other_cuts() -> None:
    entries = {"0 1 none": entry(0.0), "0 0.8 none": entry(0.4), "0 0.8 lora": entry(0.3, (0, 0.4), (2, 0.3))}
    lines = table(entries | {"0 0.8 none 2ssp": entry(0.8), "0 0.8 lora 2ssp": entry(0.2, (0, 0.8))}).splitlines()
    assert "| 0.8 | llmbo | lora | 1 | 1 | 512 | 0.3 (+25%) | 2 |" in lines
    assert "| 0.8 | 2ssp | lora | 1 | 1 | 512 | 0.2 (+75%) | 2 |" in lines
    assert "0 0.8 lora 2ssp: 0 0.8000" in lines and "0 0.8 lora: 0 0.4000, 2 0.3000" in lines
    for key in ("0 0.8 lora", "1 1 none", "2 0.65 norms flap"):
        assert str(Key(*key.split())) == key


def test_curves_are_means_over_seeds_of_several_files(tmp_path: Path) -> None:
    ours = {"0 1 lora": entry(0.0, (0, 0.1)), "0 0.8 lora": entry(0.3, (0, 0.4), (2, 0.3))}
    theirs = {f"{seed} 0.8 lora 2ssp": entry(0.8, (0, 0.8), (2, 0.6 + seed / 10)) for seed in (0, 1)}
    files = [tmp_path / "ours.json", tmp_path / "theirs.json"]
    for file, entries in zip(files, (ours, theirs), strict=True):
        file.write_text(json.dumps({"settings": {}, "entries": entries}))
    found = picture.curves(picture.read(files))
    assert found == {"0.8": {("llmbo", "lora"): {0: [0.4], 2: [0.3]}, ("2ssp", "lora"): {0: [0.8, 0.8], 2: [0.6, 0.7]}}}
    svg = picture.drawn(picture.read(files)).decode()
    assert all(text in svg for text in ("llmbo (1 seed)", "2ssp (2 seeds)", "0.8 of the blocks"))
    files[1].write_text(json.dumps({"settings": {"rank": 3}, "entries": theirs}))
    with pytest.raises(SystemExit, match=r"theirs\.json' holds results of other settings"):
        picture.read(files)
    with pytest.raises(SystemExit, match="no curve"):
        picture.drawn({"0 0.8 none": entry(0.4)})


def test_prose_is_the_paragraphs_of_two_books_in_turns(tmp_path: Path) -> None:
    def words(name: str, count: int = prose.WORDS) -> str:
        return " ".join(f"{name}{n}" for n in range(count))

    handbook, faq = tmp_path / prose.HANDBOOK, tmp_path / prose.FAQ
    for folder in (handbook, faq):
        folder.mkdir(parents=True)
    inner = f'<div class="url">{words("i", 2)}</div><pre>left out</pre>'
    (handbook / "b.html").write_text(f'<div><div class="para">{words("b")} {inner}</div>outside</div>')
    (handbook / "a.html").write_text(f'<div class="para">{words("a")}</div><div class="para">{words("s", 11)}</div>')
    count = 7 * prose.TURN
    pages = "".join(f"<p>{words(f'q{n}x')}\n</p>" for n in range(count))
    (faq / "1.html").write_text(f"<p><h2>{words('list')}</h2>{pages}<p>{words('q0x')}</p>")
    found = prose.prose(tmp_path).split("\n\n")
    assert [text for text in found if text[0] != "q"] == [words("a"), f"{words('b')} {words('i', 2)}"]
    kept = [text.split("x")[0] for text in found if text[0] == "q"]
    assert kept == [f"q{n}" for n in range(count) if n // prose.TURN in (0, 3, 6)]
    one, other = [str(n) for n in range(120)], [f"o{n}" for n in range(180)]
    assert prose.in_turns(one, other)[:7] == ["0", "1", "o0", "o1", "o2", "2", "3"]


def test_peers_are_healed_alike(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    story, other, items, out = (tmp_path / name for name in ("words.txt", "other.txt", "items.jsonl", "healing.json"))
    story.write_text(" ".join(f"w{index % 7}" for index in range(4800)))
    other.write_text(" ".join(f"w{index * index % 59}" for index in range(9600)))
    items.write_text(
        "".join(json.dumps({"question": f"w{n}", "choices": ["w1", "w2"], "answer": 0}) + "\n" for n in range(4))
    )
    words = ["--model", model_folder, "--text", f"text:{story}", "--cut-text", f"text:{other}", "--items", items]
    words += ["--judge", f"text:{text_file}", "--shares", 0.5, "--seeds", 0, "--methods", "lora", "refit-lora"]
    words += ["--tokens", 128, "--window", 16, "--calibration", 256, "--judged", 256, "--validation", 2, "--rank", 2]
    words += ["--dtype", "bfloat16", "--device", "cpu", "--out", out]
    monkeypatch.setattr("sys.argv", ["healing", *map(str, words), "--methods"])
    experiment.main()  # cut alone
    assert set(json.loads(out.read_text())["entries"]) == {"0 1 none", "0 0.5 none"}
    monkeypatch.setattr("sys.argv", ["healing", *map(str, words)])
    experiment.main()  # ours alone, as it was
    ours = {f"0 0.5 {method}" for method in ("none", "lora", "refit-lora")} | {"0 1 none", "0 1 lora"}
    assert set(json.loads(out.read_text())["entries"]) == ours
    monkeypatch.setattr("sys.argv", ["healing", *map(str, words), "--cuts", "llmbo", *PEERS])
    experiment.main()
    entries = json.loads(out.read_text())["entries"]
    kinds = [f"0 0.5 {method}" for method in ("none", "lora", "refit-lora")]
    assert set(entries) == ours | {f"{kind} {peer}" for peer in PEERS for kind in kinds}
    told = [{name: entries[key].get(name) for name in ("tokens", "plan")} for key in entries if "0.5 lora" in key]
    assert len(told) == 3 and told[0] == told[1] == told[2] and told[0]["tokens"] == 128
    assert not out.with_name("healing.json.work").exists()
    monkeypatch.setattr(experiment, "Study", None)  # nothing is done again
    experiment.main()
    monkeypatch.setattr("sys.argv", ["healing", *map(str, words), "--rank", "3"])
    with pytest.raises(SystemExit) as ended:
        experiment.main()
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and line.startswith("error: ") and "other settings" in line
    out.write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit):
        experiment.main()
    assert "holds no results" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("trained", "judged", "refused"),
    [
        ("text:{story}", "text:{twin}", True),  # the same words under another name
        ("mix:python=1,text:{story}=1", "text:{twin}", True),
        ("text:{story}", "text:{other}", False),
        ("text:{other}-python", "python", False),  # whose name merely holds that of the judged text
        ("self", "text:{story}", False),
    ],
)
def test_a_judged_text_is_known_by_what_it_holds(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trained: str,
    judged: str,
    refused: bool,
) -> None:
    names = {name: tmp_path / name for name in ("story", "twin", "other")}
    for name, path in names.items():
        path.write_text("some other words" if name == "other" else "once upon a time", encoding="utf-8")
    (tmp_path / "other-python").write_text("more words", encoding="utf-8")
    words = ["--text", trained.format(**names), "--judge", judged.format(**names)]
    monkeypatch.setattr("sys.argv", ["healing", *words])
    if not refused:
        assert parsed(parser_of("")).judge == words[3:]
        return
    with pytest.raises(SystemExit):
        parsed(parser_of(""))
    assert "judge by another text" in capsys.readouterr().err
