"""Preparations in an artifact store of Optuna's, a folder or S3, for processes whose machines share no other folder.

Every artifact is named after its own SHA-256: files of tensors as they lie on the owner's disk, and for each preparation a JSON
object, the manifest, that says what it was made from and which files it has. The run's database keeps the manifest's name. So whoever
joins takes exactly what the owner has put there, runs share what they have in common, and nothing is ever overwritten. What is taken
is safetensors and JSON, no larger than what it must hold, and read by nobody before its digest is known to be right.
"""

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any, BinaryIO

from optuna.artifacts import Boto3ArtifactStore, FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmbo.errors import DamagedError, ModelError, StorageError, first_fault, first_line
from llmbo.problem.residence import readable
from llmbo.types import Phases
from pruning.tensor_files import SUFFIX, TensorFiles

S3 = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([\w./-]*))?")
MANIFEST_BYTES = 4 << 20  # most that a manifest may have; one of 80 layers and three anchors has 50 kB
CHUNK = 1 << 20
PHASE = "sharing the preparation"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Fact(_Data):
    """What a run keeps of its shared preparation. `manifest`: its digest, and so its name in the store."""

    address: Annotated[str, Field(min_length=1, max_length=4096)]
    manifest: Sha256


class _File(_Data):
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


class _Manifest(_Data):
    made_from: dict[str, Any]
    files: dict[Annotated[str, Field(pattern=r"^\w{1,100}$")], _File]


class _Folder(FileSystemArtifactStore):
    """Writes an artifact beside its place and moves it there: what is there is whole, whoever was killed while writing."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        with NamedTemporaryFile(dir=self._base_path, prefix=".", suffix=".partial", delete=False) as file:
            temporary = Path(file.name)
        try:
            super().write(temporary.name, content_body)
            temporary.chmod(0o644)
            os.replace(temporary, self._base_path / artifact_id)
        finally:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Artifacts:
    """A folder, or `s3://BUCKET/PREFIX`. What goes wrong there is told in one line.

    Raises:
        StorageError: It cannot be used.
    """

    address: str
    _store: Any
    _prefix: str = ""
    _errors: tuple[type[Exception], ...] = (OSError,)

    @classmethod
    def at(cls, address: str) -> "Artifacts":
        """The store behind an address. Asks S3 for an artifact that is not there, so that a wrong address is told at once."""
        if not address.startswith("s3:"):
            folder = str(Path(address).expanduser().absolute())
            return cls(folder, _Folder(folder))
        named = S3.fullmatch(address)
        if named is None:
            raise StorageError(f"--artifacts {address.rpartition('@')[2]} is no address: expected s3://BUCKET/PREFIX.")
        try:
            from boto3.exceptions import Boto3Error
            from botocore.exceptions import BotoCoreError, ClientError
        except ImportError:
            raise StorageError(f"--artifacts {address} needs boto3: pip install boto3, or name a folder.") from None
        errors = (OSError, BotoCoreError, ClientError, Boto3Error)
        prefix = f"{named[2].strip('/')}/" if named[2] else ""
        try:
            found = cls(address, Boto3ArtifactStore(named[1], avoid_buf_copy=True), prefix, errors)
        except errors as error:  # e.g. no region, or a profile that is not there
            raise _unusable(address, error) from error
        found.has("0" * 64)
        return found

    def make(self) -> None:
        """The folder, if it is one and is not there yet."""
        if isinstance(self._store, _Folder):
            with self._explained():
                Path(self.address).mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        """Whether there is such an artifact."""
        with self._explained(), contextlib.suppress(ArtifactNotFound):
            self._store.open_reader(self._prefix + name).close()
            return True
        return False

    def write(self, name: str, content: BinaryIO) -> None:
        with self._explained():
            self._store.write(self._prefix + name, content)

    def copy(self, name: str, to: BinaryIO, most: int) -> tuple[str, int] | None:
        """Copy an artifact: the SHA-256 and the number of bytes that were copied, `most` + 1 at most; None if it is not there."""
        digest, size = hashlib.sha256(), 0
        try:
            with self._explained():
                reader = self._store.open_reader(self._prefix + name)
        except ArtifactNotFound:
            return None
        with contextlib.closing(reader):
            while True:
                with self._explained():  # not around the write: a full disk here is another matter
                    part = reader.read(min(CHUNK, most + 1 - size))
                if not part:
                    return digest.hexdigest(), size
                to.write(part)
                digest.update(part)
                size += len(part)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise _unusable(self.address, error) from error


def _unusable(address: str, error: Exception) -> StorageError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return StorageError(
        f"The artifacts in {address} cannot be read or written ({reason}): mend that, or say with --artifacts where they are."
    )


def check_artifacts(address: str) -> None:
    """Before anything is prepared: whether a folder can be written or made, or S3 answers. Nothing is written.

    Raises:
        StorageError: It cannot be used.
    """
    if address.startswith("s3:"):
        Artifacts.at(address)
    elif address:
        folder = Path(address).expanduser().absolute()
        there = next(one for one in (folder, *folder.parents) if one.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise _unusable(address, PermissionError(0, f"'{there}' is no folder that can be written"))


def share(
    files: TensorFiles, made_from: Mapping[str, Any], beside: Mapping[str, Path], address: str, phases: Phases
) -> dict[str, str] | None:
    """Put a preparation into an artifact store, as far as it is not there yet; what the run keeps of it.

    Args:
        files: Of the preparation, as it has read or written them; None comes back where the disk did not take them.
        made_from: As in `llmbo.problem.kept`.
        beside: Other files of sets that workers need, by name.

    Raises:
        StorageError: The store cannot be used.
    """
    if files.folder is None:
        phases.note("The preparation is not on disk, so it is not shared: workers prepare for themselves.")
        return None
    artifacts, paths = Artifacts.at(address), {name: files.path(name) for name in files.read} | dict(beside)
    artifacts.make()
    kept: dict[str, _File] = {}
    moved, new = 0, 0
    with phases.phase(PHASE, len(paths)) as advance:
        for done, (name, path) in enumerate(paths.items(), 1):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                kept[name] = _File(sha256=digest, bytes=file.tell())
                if not artifacts.has(digest + SUFFIX):
                    file.seek(0)
                    artifacts.write(digest + SUFFIX, file)
                    moved, new = moved + kept[name].bytes, new + 1
            advance(done)
        content = _Manifest(made_from=dict(made_from), files=kept).model_dump_json().encode()
        manifest = hashlib.sha256(content).hexdigest()
        if not artifacts.has(f"{manifest}.json"):
            artifacts.write(f"{manifest}.json", io.BytesIO(content))
    phases.note(
        f"The preparation is in {artifacts.address}: {len(paths)} files, {new} of them new ({readable(moved)})."
    )
    return Fact(address=artifacts.address, manifest=manifest).model_dump()


@dataclass
class Shared:
    """The preparation that a run shares, to be taken from. `files` and `bytes` tell how much was.

    Args:
        made_from: As in `llmbo.problem.kept`.
    """

    artifacts: Artifacts
    made_from: dict[str, Any]
    listed: Mapping[str, _File]
    tell: Callable[[str], None]
    files: int = 0
    bytes: int = 0
    _gone: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, fact: Any, tell: Callable[[str], None], address: str = "") -> "Shared | None":
        """What a run's facts say of it; None where it shares none, or what it shares is not there.

        Args:
            address: Where the store is on this machine, if elsewhere than where the run has it.

        Raises:
            StorageError: The store cannot be used.
            DamagedError: What the run or the manifest says makes no sense.
        """
        if not fact:
            return None
        try:
            found = Fact.model_validate(fact)
        except ValidationError as error:
            raise DamagedError(
                f"What the run says of its shared preparation makes no sense ({first_fault(error)}): start its own command again."
            ) from error
        artifacts, content = Artifacts.at(address or found.address), io.BytesIO()
        read = artifacts.copy(f"{found.manifest}.json", content, MANIFEST_BYTES)
        if read is None:
            tell(f"The run's preparation is not in {artifacts.address}: this machine prepares for itself.")
            return None
        if read[0] != found.manifest:
            raise _damaged(artifacts, f"{found.manifest}.json")
        try:
            manifest = _Manifest.model_validate_json(content.getvalue())
        except ValidationError as error:
            raise DamagedError(
                f"'{found.manifest}.json' in {artifacts.address} is no manifest of this version ({first_fault(error)}): "
                "start the run's own command again."
            ) from error
        return cls(artifacts, manifest.made_from, manifest.files, tell)

    def same(self, made_from: Mapping[str, Any]) -> dict[str, Any]:
        """What the run's preparation was made from, which is what this machine has, but for its kind of device and builds of libraries.

        Raises:
            ModelError: It is not.
        """
        own, other = _comparable(made_from), _comparable(self.made_from)
        if changed := sorted(key for key in {*own, *other} if own.get(key) != other.get(key)):
            raise ModelError(
                f"The preparation in {self.artifacts.address} is of another {', '.join(changed)} than this machine has: "
                "give it the run's model and text, or say with --artifacts where the run's preparation is."
            )
        return self.made_from

    def fetch(self, name: str, most: int, to: Path) -> bool:
        """As `pruning.tensor_files.Fetch`.

        Raises:
            StorageError: The store cannot be read.
            DamagedError: The file is not the one that the run's owner has put there, or larger than what it must hold.
        """
        listed = self.listed.get(name)
        if listed is None or name in self._gone:
            return False
        if listed.bytes > most:
            raise DamagedError(
                f"'{name}' in {self.artifacts.address} has {listed.bytes} bytes where {most} are enough: start the run's own command "
                "again with another --artifacts."
            )
        with open(to, "wb") as file:
            found = self.artifacts.copy(listed.sha256 + SUFFIX, file, listed.bytes)
        if found is None:
            self._gone.add(name)
            self.tell(f"'{name}' of the run's preparation is not in {self.artifacts.address}: it is made here.")
            return False
        if found != (listed.sha256, listed.bytes):
            raise _damaged(self.artifacts, listed.sha256 + SUFFIX)
        self.files, self.bytes = self.files + 1, self.bytes + listed.bytes
        return True

    @property
    def taken(self) -> str:
        """How much was, in words."""
        return f"Taken from {self.artifacts.address}: {self.files} files ({readable(self.bytes)})."


def _comparable(made_from: Mapping[str, Any]) -> dict[str, Any]:
    versions = made_from.get("versions")
    plain = {key: str(one).partition("+")[0] for key, one in versions.items()} if isinstance(versions, dict) else {}
    return {key: value for key, value in made_from.items() if key != "device"} | {"versions": plain}


def _damaged(artifacts: Artifacts, name: str) -> DamagedError:
    return DamagedError(
        f"'{name}' in {artifacts.address} is damaged: remove it there, and start the run's own command again, which puts it there anew."
    )
