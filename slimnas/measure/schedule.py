"""What a build times next, decided by its journal alone, so that it may stop at any visit.

1. The components on a coarse grid of widths, a call, the held-out networks and the first ones for
   calibration.
2. Components at widths between, as long as a straight line misses what was timed there.
3. The components whose price is still uncertain, again.
4. More calibration networks, a batch at a time, until they no longer help.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from slimnas.arch.architecture import Architecture
from slimnas.errors import LatencyTableError
from slimnas.latency.keys import PriceKey
from slimnas.measure.calibrate import calibrate
from slimnas.measure.grid import Lines
from slimnas.measure.journal import Visit
from slimnas.measure.plan import Entry, Plan, entries_for, make_plan, network_entry
from slimnas.measure.results import Timing, make_prior, network_timings, timings
from slimnas.measure.scope import Scope
from slimnas.measure.timing import Protocol
from slimnas.measure.visits import Wanted

FIRST_BATCH = 10
"""Calibration networks that are timed before the first look at the error."""
BATCH = 5
"""Networks added at a time."""
MOST = 60
"""Networks at most."""
BETTER = 0.1
"""A batch that lowers the leave-one-out error by less than this share was the last: of so few
networks, the error itself is known to a fifth."""

NOTICEABLE = 0.003
"""Errors of a component below this share of a network's latency are not worth a visit."""


@dataclass(frozen=True)
class Networks:
    """How many random networks are timed whole.

    Attributes:
        calibration: that correct the prices; none lets the error decide.
        held_out: that the stated error is from.
    """

    calibration: int | None = None
    held_out: int = 20


@dataclass(frozen=True)
class Shard:
    """One host's part of a build that several hosts with the same device share.

    Attributes:
        number: which, from 1.
        of: how many there are.
    """

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise LatencyTableError(
                f"--shard must be i/n with 1 <= i <= n, got {self.number}/{self.of}"
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def timed_plan(
    scope: Scope, protocol: Protocol, networks: Networks, visits: Sequence[Visit]
) -> Plan:
    """Return what a finished build timed, whatever version of `Schedule` decided on it.

    Args:
        scope: what the table covers.
        protocol: the build's.
        networks: the build's.
        visits: all of them.

    Raises:
        LatencyTableError: the visits are of other things than this version would time.
    """
    grid = scope.grid()
    names = {visit.entry for visit in visits}
    plan = make_plan(
        scope,
        chains=protocol.chains,
        calibration=MOST if networks.calibration is None else networks.calibration,
        held_out=networks.held_out,
        seed=protocol.seed,
        components=None if grid is None else grid.every(),
    )
    known = {entry.name for entry in plan.entries}
    foreign = sorted(names - known)
    if foreign or plan.nothing.name not in names:
        what = f"hold {foreign[0]!r}" if foreign else f"lack {plan.nothing.name!r}"
        raise LatencyTableError(
            f"samples must be of a build by this version, these {what}; measure the table anew"
        )
    return replace(
        plan,
        components=tuple(one for one in plan.components if one.name in names),
        calibration=tuple(one for one in plan.calibration if network_entry(one).name in names),
        held_out=tuple(one for one in plan.held_out if network_entry(one).name in names),
    )


class Schedule:
    """What to time for a table.

    Args:
        scope: what the table covers.
        protocol: how often each entry is visited.
        networks: how many whole networks.
        shard: which part. A part of several cannot see the others' timings, so that grid and
            number of networks are fixed in advance then.
    """

    def __init__(
        self,
        scope: Scope,
        protocol: Protocol,
        networks: Networks,
        shard: Shard | None = None,
    ) -> None:
        self._protocol, self._networks = protocol, networks
        self._shard = shard or Shard()
        self._scope = scope
        self._grid = scope.grid() if self._shard.of == 1 else None
        self._lines: Lines = self._grid.coarse() if self._grid else {}
        self._all = make_plan(
            scope,
            chains=protocol.chains,
            calibration=MOST if networks.calibration is None else networks.calibration,
            held_out=networks.held_out,
            seed=protocol.seed,
            components=None if self._grid is None else self._grid.components(self._lines),
        )
        self.plan = replace(self._all, calibration=self._all.calibration[: self._fewest()])

    def _fewest(self) -> int:
        wanted = self._networks.calibration
        if wanted is not None:
            return wanted
        return FIRST_BATCH if self._shard.of == 1 else FIRST_BATCH + 2 * BATCH

    def missing(self, visits: Sequence[Visit]) -> Iterator[list[Wanted]]:
        """Yield what is not in `visits` yet, a pass at a time.

        `visits` must have grown by all of one before the next. At the end `plan` is what was
        timed.
        """
        if self._shard.of > 1:
            mine = self.plan.entries[self._shard.number - 1 :: self._shard.of]
            yield from self._passes(mine, visits)
            return
        # Networks and components in the same passes, so that a slow change of the machine's pace
        # is not taken for a difference between them.
        networks = map(network_entry, (*self.plan.calibration, *self.plan.held_out))
        yield from self._passes([*self.plan.components, self.plan.nothing, *networks], visits)
        while added := self._finer(visits):
            yield from self._passes(added, visits)
        for number in range(self._protocol.extra_passes):
            again = self._uncertain(visits, self._protocol.passes + number)
            yield self._pass(again, self._protocol.passes + number, visits)
        while more := self._more_networks(visits):
            yield from self._passes([network_entry(one) for one in more], visits)

    def _passes(self, entries: Sequence[Entry], visits: Sequence[Visit]) -> Iterator[list[Wanted]]:
        passes = self._protocol.passes
        for number in range(passes):
            yield self._pass(entries, number, visits, (passes - number - 1) * len(entries))

    def _pass(
        self, entries: Sequence[Entry], number: int, visits: Sequence[Visit], later: int = 0
    ) -> list[Wanted]:
        """Return the entries a pass lacks, in its order; `later` more visits are planned after."""
        shuffled = list(entries)
        random.Random(f"{self._protocol.seed} {number}").shuffle(shuffled)
        done = {visit.entry for visit in visits if visit.number == number}
        todo = [entry for entry in shuffled if entry.name not in done]
        planned = len(visits) + len(todo) + later
        return [(number, entry, planned) for entry in todo]

    def _finer(self, visits: Sequence[Visit]) -> list[Entry]:
        """Add the widths that the timings ask for to the plan; returns their entries."""
        if self._grid is None:
            return []
        found = self._timed(self.plan.components, visits, self._protocol.passes)

        def price(key: PriceKey) -> tuple[float, float]:
            timing = found[str(key)]
            return timing.latency_ms, timing.error_ms

        self._lines = self._grid.finer(self._lines, price)
        known = {entry.name for entry in self.plan.components}
        listed = self._grid.components(self._lines)
        entries = tuple(entries_for(self._scope, listed, self._protocol.chains))
        self.plan = replace(self.plan, components=entries)
        return [entry for entry in entries if entry.name not in known]

    @staticmethod
    def _timed(
        entries: Sequence[Entry], visits: Sequence[Visit], passes: int | None = None
    ) -> dict[str, Timing]:
        """Timings by the visits of `entries` in the first `passes` alone.

        What was decided from them is decided again when a build is resumed with later visits.
        """
        names = {entry.name for entry in entries}
        return timings(
            entries,
            [v for v in visits if v.entry in names and (passes is None or v.number < passes)],
        )

    def _uncertain(self, visits: Sequence[Visit], number: int) -> list[Entry]:
        found = self._timed(self.plan.components, visits, number)
        networks = self._timed(list(map(network_entry, self.plan.held_out)), visits, passes=None)
        totals = [one.latency_ms for one in networks.values()]
        least_ms = NOTICEABLE * median(totals) if totals else 0.0
        precision = self._protocol.precision
        return [
            entry
            for entry in self.plan.components
            if found[entry.name].error_ms > max(precision * found[entry.name].latency_ms, least_ms)
        ]

    def _more_networks(self, visits: Sequence[Visit]) -> Sequence[Architecture]:
        """Add a batch of calibration networks to the plan if the last one helped."""
        known = len(self.plan.calibration)
        if self._networks.calibration is not None or known >= len(self._all.calibration):
            return ()
        if known > FIRST_BATCH:
            before, now = self._error(visits, known - BATCH), self._error(visits, known)
            if now > (1 - BETTER) * before:
                return ()
        self.plan = replace(self.plan, calibration=self._all.calibration[: known + BATCH])
        return self.plan.calibration[known:]

    def _error(self, visits: Sequence[Visit], count: int) -> float:
        """Mean absolute leave-one-out error of a calibration on the first `count` networks."""
        calibration = self.plan.calibration[:count]
        entries = [*self.plan.components, self.plan.nothing, *map(network_entry, calibration)]
        found = self._timed(entries, visits)
        networks = network_timings(calibration, found)
        fit = calibrate(make_prior(self.plan, found), networks)
        pairs = zip(fit.left_out_ms, networks, strict=True)
        return fmean(abs(predicted / one.latency_ms - 1) for predicted, one in pairs)
