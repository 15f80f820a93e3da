"""What a run writes, where, and whether there is room for it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from llmbo.problem.residence import readable

WRITTEN = {
    "download": "the weights, to be downloaded,",
    "copy": "a copy of the weights to map",
    "refits": "refits of all widths",
    "run": "the run's folder",
    "export": "an export, at most",
}


@dataclass(frozen=True)
class Disk:
    """Bytes that will be written, and those free where they go."""

    place: Path
    needed: int
    free: int

    @classmethod
    def at(cls, place: Path, needed: int) -> "Disk":
        return cls(place, needed, shutil.disk_usage(_standing(place)).free)

    def shares(self, other: "Disk") -> bool:
        """Whether both places are on one file system."""
        return _standing(self.place).stat().st_dev == _standing(other.place).stat().st_dev


def _standing(place: Path) -> Path:
    """The folder that is there already, of `place` and those above it."""
    return next(path for path in (place.absolute(), *place.absolute().parents) if path.is_dir())


def missing(name: str, disk: Disk, spare: int) -> str:
    """What to do where a run could not go on for want of disk.

    Args:
        spare: Bytes of the host's memory, which can hold refits as well. An export is made when its size is known.
    """
    if disk.needed <= disk.free or name == "export" or (name == "refits" and disk.needed <= spare):
        return ""
    remedy = {
        "download": "set HF_HUB_CACHE to a larger disk",
        "copy": "set LLMBO_CACHE to a larger disk",
        "refits": "set LLMBO_PREPARED to a larger disk, or take a larger --neuron-step",
    }.get(name, "free some")
    said = f"Too little disk space for {WRITTEN[name].rstrip(',')} in '{disk.place}'"
    return f"{said}: {readable(disk.needed)} are needed, {readable(disk.free)} are free; {remedy}."
