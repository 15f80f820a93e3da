"""A preparation is shared through an artifact store: by two processes with caches of their own, in a folder and in S3 over HTTP.

What was damaged, changed or made from something else is refused in one line; nothing of it is used.
"""

import contextlib
import hashlib
import importlib.util
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.problem.kept import OWN
from llmbo.problem.shared import Artifacts, check_artifacts
from llmbo.problem.texts import WRITTEN
from pruning.tensor_files import SUFFIX

MEASURED = (
    "pruning.refits.collect_statistics",
    "llmbo.problem.preparation.block_sensitivity",
    "pruning.anchored._solved",
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """From now on, preparations are kept in this folder."""

    def use(name: str) -> Path:
        monkeypatch.setenv("LLMBO_PREPARED", str(tmp_path / name))
        return tmp_path / name

    use("owner")
    return use


@pytest.fixture(params=["folder", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path / "artifacts")
        return
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket/some/prefix"
    finally:
        server.stop()


def extended(llmbo: Any, budget: int, **facts: Any) -> None:
    """More trials for a worker to evaluate, of a run whose owner has gone."""
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{llmbo.folder}/runs/tiny/study.db")
    study.set_user_attr("facts", {**study.user_attrs["facts"], "budget": budget, **facts})


def trials(llmbo: Any) -> list[tuple[Any, Any]]:
    return [(trial["architecture"], trial["objectives"]) for trial in llmbo.report()["trials"]]


def test_a_worker_with_a_cache_of_its_own_takes_what_the_owner_has_prepared(
    llmbo: Any,
    make_llmbo: Any,
    forked: Any,
    cache: Callable[[str], Path],
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And measures what the owner alone would have. The owner puts nothing there twice, and can itself begin anew from it."""
    tokens = {"calibration_tokens": 160, "refit_anchors": 1}
    flags = {"artifacts": address, **tokens}
    owner = forked(llmbo.flags(budget=5, **flags), llmbo.folder)
    assert owner.wait() == 0, owner.err.read_text()
    kept = sorted((tmp_path / "owner").glob("*/*.safetensors"))
    size = sum(path.stat().st_size for path in kept)
    told = f"{len(kept)} files, {len(kept)} of them new ({size / 1e6:.1f} MB)"
    assert told in owner.err.read_text() and len({path.parent for path in kept}) == 1

    extended(llmbo, 9)
    with monkeypatch.context() as patch:
        for measured in MEASURED:
            patch.setattr(measured, None)
        worker = forked(["worker", "runs/tiny"], llmbo.folder, LLMBO_PREPARED=str(tmp_path / "worker"))
        assert worker.wait() == 0, worker.err.read_text()
        assert f"{len(kept)} files ({size / 1e6:.1f} MB)" in worker.err.read_text()
        taken = sorted((tmp_path / "worker").glob("*/*.safetensors"))
        assert [(path.name, path.read_bytes()) for path in taken] == [(path.name, path.read_bytes()) for path in kept]
        cache("again")
        assert llmbo(budget=10, **flags).exit_code == 0
    cache("alone")
    (tmp_path / "alone_run").mkdir()
    alone = make_llmbo(tmp_path / "alone_run")
    assert alone(budget=10, **tokens).exit_code == 0
    assert trials(llmbo) == trials(alone) and len(trials(alone)) == 10
    cache("owner")
    again = llmbo(budget=11, **flags)
    assert f"{len(kept)} files, 0 of them new (0.0 MB)" in again.output + again.stderr


def test_what_a_model_wrote_for_a_run_comes_with_the_preparation(
    llmbo: Any, cache: Callable[[str], Path], tmp_path: Path, write_otherwise: Callable[[], None]
) -> None:
    """To whoever has it not, and would have something else written; and stays there."""
    flags = {"artifacts": tmp_path / "artifacts", "text": "self"}
    assert llmbo(budget=3, **flags).exit_code == 0

    write_otherwise()
    here, there = (tmp_path / run / OWN / f"{WRITTEN}{SUFFIX}" for run in ("away/runs/tiny", "runs/tiny"))
    first = there.read_bytes()
    there.unlink()
    assert llmbo(budget=4, **flags).exit_code == 0 and there.read_bytes() == first
    (tmp_path / "away").mkdir()

    def joins(budget: int, **facts: Any) -> Any:
        extended(llmbo, budget, **facts)
        with contextlib.chdir(tmp_path / "away"):
            return CliRunner().invoke(app, ["worker", f"sqlite:///{llmbo.folder}/runs/tiny/study.db", "--name", "tiny"])

    cache("worker")
    joined = joins(5)
    assert joined.exit_code == 0 and here.read_bytes() == first, joined.output
    assert joins(6, shared=None).exit_code == 0  # by what it has
    here.unlink()
    refused = joins(7, shared=None)
    assert refused.exit_code == 2 and "has another model, text or dtype" in refused.output


def test_what_was_damaged_changed_or_made_from_something_else_is_refused(
    llmbo: Any, cache: Callable[[str], Path], tmp_path: Path
) -> None:
    store = tmp_path / "artifacts"
    for name, text in (("other", {"calibration_tokens": 192}), ("tiny", {})):
        assert llmbo(name=name, budget=3, artifacts=store, **text).exit_code == 0
    facts, other = (
        optuna.load_study(study_name=name, storage=f"sqlite:///{llmbo.folder}/runs/{name}/study.db").user_attrs["facts"]
        for name in ("tiny", "other")
    )
    assert {path.name for path in store.iterdir()} == {
        hashlib.sha256(path.read_bytes()).hexdigest() + path.suffix for path in store.iterdir()
    }
    manifest = json.loads((store / f"{facts['shared']['manifest']}.json").read_bytes())
    layer = store / f"{manifest['files']['layer_001']['sha256']}.safetensors"
    fresh = iter(range(99))

    def joins(**changed: Any) -> tuple[int, str]:
        cache(f"worker{next(fresh)}")
        extended(llmbo, 4, **{"shared": facts["shared"], **changed})
        with contextlib.chdir(llmbo.folder):
            result = CliRunner().invoke(app, ["worker", "runs/tiny", "--quiet"])
        return result.exit_code, result.output.splitlines()[-1]

    def put(content: bytes, suffix: str) -> str:
        digest = hashlib.sha256(content).hexdigest()
        (store / f"{digest}{suffix}").write_bytes(content)
        return digest

    def listing(**files: Any) -> dict[str, Any]:
        changed = {**manifest, "files": {**manifest["files"], **files}}
        return {"shared": {"address": str(store), "manifest": put(json.dumps(changed).encode(), ".json")}}

    whole, poison = layer.read_bytes(), pickle.dumps(list(range(9)))
    layer.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert joins() == (
        2,
        f"error: '{layer.name}' in {store} is damaged: remove it there, and start the run's own command again, which puts it there anew.",
    )
    layer.write_bytes(whole[:-1])
    assert "is damaged" in joins()[1]
    layer.write_bytes(whole + b"x" * 10**6)
    assert "is damaged" in joins()[1]
    layer.write_bytes(whole)
    statistics = manifest["files"]["statistics"]
    for changed, said in (
        (listing(layer_000={"sha256": put(poison, ".safetensors"), "bytes": len(poison)}), "is no safetensors file"),
        (listing(layer_000={"sha256": layer.stem, "bytes": 10**9}), "has 1000000000 bytes where "),
        (listing(statistics={**manifest["files"]["layer_000"], "bytes": 1}), "is damaged"),
        (listing(layer_000=statistics), "holds other tensors"),
        (listing(**{"../../etc": statistics}), "is no manifest of this version"),
        ({"shared": {**facts["shared"], "manifest": put(poison, ".json")}}, "is no manifest of this version"),
        ({"shared": other["shared"]}, "is of another text, windows than this machine has"),
        ({"shared": {**facts["shared"], "manifest": "../x"}}, "makes no sense"),
        ({"shared": ["x"]}, "makes no sense"),
    ):  # fmt: skip
        code, line = joins(**changed)
        assert (code, said in line) == (2, True), (said, line)
    layer.unlink()
    assert joins()[0] == 0  # made by itself


def test_another_kind_of_device_or_build_takes_the_runs_preparation(llmbo: Any, cache: Any, tmp_path: Path) -> None:
    """Whose numbers are then the same everywhere. The folder that it is kept in is the run's."""
    store = tmp_path / "artifacts"
    assert llmbo(budget=3, artifacts=store).exit_code == 0
    path = next(store.glob("*.json"))
    found = json.loads(path.read_bytes())
    found["made_from"] |= {
        "device": "cuda",
        "versions": {
            **found["made_from"]["versions"],
            "torch": f"{found['made_from']['versions']['torch'].partition('+')[0]}+cu999",
        },
    }
    content = json.dumps(found).encode()
    digest = hashlib.sha256(content).hexdigest()
    (store / f"{digest}.json").write_bytes(content)
    extended(llmbo, 4, shared={"address": str(store), "manifest": digest})
    folder = cache("worker")
    with contextlib.chdir(llmbo.folder):
        result = CliRunner().invoke(app, ["worker", "runs/tiny"])
    assert result.exit_code == 0 and f"Taken from {store}: {len(found['files'])} files" in result.output + result.stderr
    (kept,) = folder.iterdir()
    assert json.loads((kept / "made_from.json").read_bytes())["device"] == "cuda"


def test_a_place_that_takes_nothing_is_refused_before_anything_is_done(llmbo: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = {
        str(tmp_path / "file" / "x"): "is no folder that can be written",
        "s3://A_B/c": "expected s3://BUCKET/PREFIX",
    }
    if importlib.util.find_spec("boto3") is None:
        said["s3://bucket"] = "needs boto3: pip install boto3"
    for address, words in said.items():
        result = llmbo(artifacts=address)
        assert result.exit_code == 2 and words in result.output.splitlines()[-1], result.output
    assert not (llmbo.folder / "runs").exists()
    check_artifacts(str(tmp_path / "new" / "folder"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(Exception, match="no address") as error:
        Artifacts.at("s3://key:secret@host/bucket")
    assert "secret" not in str(error.value)
