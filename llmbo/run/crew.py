"""Who evaluates for a run, seen from outside: devices, claims and rates as the store has them, and who is gone."""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from llmbo.display.team import Member
from llmbo.run.lease import Pulse, Sight, records
from llmbo.run.team import Team

RECENT = 10  # trials that a rate is of: one that falls is seen


def crew(pulse: Pulse, sight: Sight, trials: Sequence[FrozenTrial], device: str) -> list[Member]:
    """The owner of a run and its workers, at the last look of `pulse`; empty for a run that never had a worker.

    What nobody has claimed, but somebody has begun, is the owner's.

    Args:
        sight: Of the workers, look after look.
        trials: Of the run, by place.
        device: The owner's.
    """
    workers = records(pulse.storage, f"{pulse.name}/workers")
    if not workers:
        return []
    holders = Team(pulse.storage, pulse.name).holders()
    claimed = {place: str(claim.user_attrs.get("by")) for place, claim in holders.items()}
    names = {f"worker {one.number}" for one in workers}
    of: dict[str, list[int]] = {}
    for place, trial in enumerate(trials):
        by = claimed.get(place, "")
        if by in names or trial.state is not TrialState.WAITING:
            of.setdefault(by if by in names else "owner", []).append(place)
    epoch = pulse.epoch if pulse.epoch and not pulse.epoch.state.is_finished() else None
    process = _process(epoch) if epoch else None
    leader = next((one.number for one in workers if process and _process(one) == process), None)
    members = []
    if leader is not None:
        epoch = None
    if leader is None or "owner" in of:
        gone = epoch is None or pulse.sight.lives(epoch, lock_tells=False) is False
        heard = None if epoch is None or gone else pulse.sight.heard(epoch)
        members.append(_member("owner", device, of.get("owner", []), trials, heard, gone))
    for one in workers:
        gone = one.state.is_finished() or sight.lives(one, lock_tells=False) is False
        name, told = f"worker {one.number}", one.user_attrs.get("device")
        title = f"{name}, now the owner" if one.number == leader else name
        members.append(
            _member(title, str(told)[:40], of.get(name, []), trials, None if gone else sight.heard(one), gone)
        )
    return members


def _member(
    name: str, device: str, own: Sequence[int], trials: Sequence[FrozenTrial], heard: float | None, gone: bool
) -> Member:
    done = [trials[place] for place in own if trials[place].state.is_finished()]
    claims = tuple(place for place in own if not trials[place].state.is_finished())
    return Member(name, device, claims, len(done), _per_minute(done), heard, gone)


def _per_minute(done: Sequence[FrozenTrial]) -> float | None:
    """Of the last trials, from the first one's start to the last one's end, both by the clock of whoever did them."""
    ends = sorted((one for one in done if one.datetime_complete), key=lambda one: str(one.datetime_complete))[-RECENT:]
    starts = [one.datetime_start for one in ends if one.datetime_start]
    if not starts or ends[-1].datetime_complete is None:
        return None
    seconds = (ends[-1].datetime_complete - min(starts)).total_seconds()
    return 60 * len(ends) / seconds if seconds > 0 else None


def _process(record: FrozenTrial) -> tuple[Any, Any] | None:
    owner = record.user_attrs.get("owner")
    return (owner.get("host"), owner.get("pid")) if isinstance(owner, Mapping) else None
