"""What the runners of a latency kit share: its files, the timing protocol, the results, progress.

Needs Python 3.10 and nothing else. A round times every network of an entry in shuffled order,
with the reference network before and after. When the reference is further than `max_drift` from
its running median, the device was doing something else: the whole round is rejected and repeated.
Every round, rejected ones too, goes to the results file, one line per visited entry; a run that
was stopped goes on after the last whole line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol

KIT_SCHEMA = "slimnas/latency-kit/1"
RESULTS_SCHEMA = "slimnas/latency-kit-results/1"
"""Waits after rejected rounds, each twice the one before."""
WINDOW = 101
"""Reference timings that the running median looks back on."""
DIGITS = 6
"""Decimals of a sample in milliseconds: nanoseconds."""

Visit = Callable[[], Sequence[float]]
"""Runs a loaded network for a while; milliseconds per call, one value per sample."""


class KitError(Exception):
    """Something the person who runs the kit can put right, in one line."""


class Backend(Protocol):
    """Where the networks run."""

    def load(self, file: Mapping[str, Any]) -> Visit:
        """Make one of the kit's files ready and warm it up."""

    def unload(self, file: Mapping[str, Any]) -> None:
        """Let go of a file that `load` made ready."""


@dataclass(frozen=True)
class Kit:
    """A kit's folder and what its manifest says."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Kit:
        """Read and check the manifest.

        Raises:
            KitError: no manifest, a damaged or changed one.
        """
        path = folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise KitError(f"{path}: no such file; give the kit's folder with --kit") from None
        except (OSError, ValueError) as error:
            raise KitError(f"{path}: cannot be read ({error}); copy the kit again") from None
        if not isinstance(manifest, dict) or manifest.get("schema") != KIT_SCHEMA:
            raise KitError(f"{path}: must have the schema {KIT_SCHEMA}; is this the kit's folder?")
        if manifest.get("digest") != digest_of(manifest):
            raise KitError(f"{path}: was changed after the kit was made; copy the kit again")
        return cls(folder, manifest)

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Every network by its file's name."""
        return {file["name"]: file for file in self.manifest["files"]}

    def check_files(self) -> None:
        """Compare every file with the manifest.

        Raises:
            KitError: files are missing or differ.
        """
        listed = [*self.manifest["files"], *self.manifest["shared"]]
        bad = [
            file["name"]
            for file in listed
            if sha256_of(self.folder / file["name"]) != file["sha256"]
        ]
        if bad:
            raise KitError(
                f"{self.folder}: {len(bad)} of {len(listed)} files are missing or damaged, such "
                f"as {bad[0]}; copy the kit again"
            )


def digest_of(manifest: Mapping[str, Any]) -> str:
    """What names a kit: the SHA-256 of its manifest without the digest itself."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(path: Path) -> str | None:
    """SHA-256 of a file; none of one that cannot be read."""
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except OSError:
        return None
    return found.hexdigest()


def checked_kit(given: argparse.Namespace, file_format: str) -> Kit | None:
    """Open the kit of a command line and check its files; none if that was all that was asked.

    Raises:
        KitError: it holds other files than the runner's, or one that is not what the manifest says.
    """
    kit = Kit.load(given.kit)
    if kit.manifest["format"] != file_format:
        raise KitError(f"{given.kit}: holds {kit.manifest['format']} files; use its own runner")
    say(f"checking {len(kit.files)} files")
    kit.check_files()
    if given.check:
        say("all files are what the manifest says")
        return None
    return kit


class Rounds:
    """Times networks by the protocol.

    Args:
        protocol: the manifest's, as changed by options.
        reference: the reference network, loaded.
        clock: seconds, to give up on a device that never stands still.
    """

    def __init__(
        self,
        protocol: Mapping[str, Any],
        reference: Visit,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._protocol = protocol
        self._reference = reference
        self._clock = clock
        self._paces: deque[float] = deque(maxlen=WINDOW)

    def prime(self, paces_ms: Sequence[float] = (), visits: int = WINDOW) -> None:
        """Give the running median something to go by: earlier paces, else some visits now."""
        self._paces.extend(paces_ms)
        if not self._paces:
            self._paces.extend(self._pace() for _ in range(visits))

    def time(self, visits: Sequence[Visit], name: str, rng: random.Random) -> list[dict[str, Any]]:
        """Time an entry's networks side by side until enough rounds are accepted.

        Raises:
            KitError: no round was accepted for `patience_s`.
        """
        done: list[dict[str, Any]] = []
        quiet = self._clock()
        while sum(one["accepted"] for one in done) < self._protocol["rounds"]:
            done.append(self._round(visits, rng))
            if done[-1]["accepted"]:
                quiet = self._clock()
                continue
            if self._clock() - quiet > self._protocol["patience_s"]:
                raise KitError(
                    f"{name}: the reference network stayed more than "
                    f"{100 * self._protocol['max_drift']:g} % off its running median for "
                    f"{self._protocol['patience_s']:g} s; leave the device alone (other programs, "
                    "heat, power saving) and start the same command again, it goes on here"
                )
        return done

    def _round(self, visits: Sequence[Visit], rng: random.Random) -> dict[str, Any]:
        before = self._pace()
        steady = self._is_usual(before)
        samples: dict[int, Sequence[float]] = {}
        if steady:  # else the round is lost already
            for i in rng.sample(range(len(visits)), len(visits)):
                samples[i] = visits[i]()
        after = self._pace() if steady else before
        accepted = steady and self._is_usual(after)
        # Unusual paces count too, so that a lasting change is followed.
        self._paces.extend((before, after) if steady else (before,))
        return {
            "accepted": accepted,
            "reference_ms": _rounded((before, after)),
            "samples_ms": [_rounded(samples[i]) for i in sorted(samples)],
        }

    def _is_usual(self, pace: float) -> bool:
        return abs(pace / median(self._paces) - 1) <= float(self._protocol["max_drift"])

    def _pace(self) -> float:
        return median(self._reference())


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, DIGITS) for value in values]


class Results:
    """The results file: a header, then one line per visited entry.

    Args:
        path: the file; continued if it is there.
        header: what the lines belong to; a file with another one is refused.

    Raises:
        KitError: results of something else, or damaged ones.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.visits: list[dict[str, Any]] = []
        wanted = {"schema": RESULTS_SCHEMA, **header}
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        if lines and (not lines[-1].endswith(b"\n") or _parsed(lines[-1]) is None):
            lines.pop()  # the start of a line that was never finished
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_line(wanted))
            return
        self._check(wanted, _parsed(lines[0]))
        for number, line in enumerate(lines[1:], start=2):
            read = _parsed(line)
            if not isinstance(read, dict):
                raise KitError(f"{path}:{number}: damaged line; remove the file to start anew")
            if "entry" in read:
                self.visits.append(read)
        os.truncate(path, sum(len(line) for line in lines))

    def _check(self, wanted: dict[str, Any], found: Any) -> None:
        if not isinstance(found, dict) or found.get("schema") != RESULTS_SCHEMA:
            raise KitError(f"{self.path}: is no results file of a kit; choose another --output")
        for key in wanted:
            if found.get(key) != wanted[key]:
                raise KitError(
                    f"{self.path}: belongs to another run: its {key} differs"
                    f"{_shown(found.get(key), wanted[key])}; repeat that command to finish it, or "
                    "choose another --output"
                )

    def append(self, data: Mapping[str, Any]) -> None:
        """Add a line; it survives a kill and a power cut from here on."""
        with self.path.open("ab") as file:
            file.write(_line(data))
            file.flush()
            os.fsync(file.fileno())
        if "entry" in data:
            self.visits.append(dict(data))


def _shown(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            if found.get(key) != wanted.get(key):
                return f" ({key}: {found.get(key)!r}, not {wanted.get(key)!r})"
    short = isinstance(found, (str, int)) and isinstance(wanted, (str, int))
    return f" ({found!r}, not {wanted!r})" if short else ""


def _line(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def wanted_visits(
    entries: Sequence[Mapping[str, Any]],
    protocol: Mapping[str, Any],
    visits: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[int, Mapping[str, Any], int]]:
    """Yield (pass, entry, visits planned) for every visit that is not in `visits` yet.

    After the regular passes come extra ones over the priced entries that are still uncertain.
    """
    planned = 0
    for number in range(protocol["passes"] + protocol["extra_passes"]):
        chosen = list(entries)
        if number >= protocol["passes"]:
            earlier = [visit for visit in visits if visit["pass"] < number]
            chosen = [one for one in entries if is_uncertain(one, earlier, protocol["precision"])]
            planned += len(chosen)
        else:
            planned = protocol["passes"] * len(chosen)
        random.Random(f"{protocol['seed']} {number}").shuffle(chosen)
        done = {visit["entry"] for visit in visits if visit["pass"] == number}
        for entry in chosen:
            if entry["name"] not in done:
                yield number, entry, planned


def is_uncertain(
    entry: Mapping[str, Any], visits: Sequence[Mapping[str, Any]], precision: float
) -> bool:
    """Whether the standard error of a priced entry is above `precision` of its price."""
    if not entry["priced"]:
        return False
    shares = [term["share"] for term in entry["terms"]]
    rounds = [
        one
        for visit in visits
        if visit["entry"] == entry["name"]
        for one in visit["rounds"]
        if one["accepted"]
    ]
    # Rounds are brought to one pace, that of the entry's own first round.
    paces = [sum(one["reference_ms"]) / 2 for one in rounds]
    prices = [
        sum(share * median(ms) for share, ms in zip(shares, one["samples_ms"], strict=True))
        * (paces[0] / pace)
        for one, pace in zip(rounds, paces, strict=True)
    ]
    if len(prices) < 2:
        return False
    low, _, high = quantiles(prices, n=4, method="inclusive")
    error = 1.2533 * (high - low) / 1.349 / math.sqrt(len(prices))
    return bool(error > precision * median(prices))


def time_all(
    kit: Kit,
    backend: Backend,
    results: Results,
    protocol: Mapping[str, Any],
    *,
    shard: str = "1/1",
    prime: int = WINDOW,
) -> None:
    """Make every visit that the results lack, telling how far it is.

    Args:
        kit: what to time.
        backend: where.
        results: what was timed so far, and where the rest goes.
        protocol: how.
        shard: part i/n of the entries.
        prime: visits of the reference at the start; fewer where each takes long.
    """
    files = kit.files
    entries = part_of(kit.manifest["entries"], shard)
    rounds, start, first = None, time.monotonic(), len(results.visits)
    for number, entry, planned in wanted_visits(entries, protocol, results.visits):
        if rounds is None:
            rounds = Rounds(protocol, backend.load(files[kit.manifest["reference"]]))
            known = [one for visit in results.visits for one in visit["rounds"]]
            rounds.prime([ms for one in known for ms in one["reference_ms"]], prime)
        done = len(results.visits)
        progress(done, planned, done - first, time.monotonic() - start, entry["name"])
        used = [files[term["file"]] for term in entry["terms"]]
        loaded = [backend.load(file) for file in used]
        rng = random.Random(f"{protocol['seed']} {number} {entry['name']}")
        taken = rounds.time(loaded, entry["name"], rng)
        for file in used:
            backend.unload(file)
        results.append({"entry": entry["name"], "pass": number, "rounds": taken})


def part_of(entries: Sequence[Mapping[str, Any]], shard: str) -> Sequence[Mapping[str, Any]]:
    """The entries of part i of n, which several devices of one kind share.

    Raises:
        KitError: not of the form i/n.
    """
    number, _, of = shard.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise KitError(f"--shard must be i/n with 1 <= i <= n, got {shard!r}")
    return entries[int(number) - 1 :: int(of)]


def progress(done: int, planned: int, since: int, seconds: float, what: str) -> None:
    """One line on how far the run is; in a log, one every fiftieth part only."""
    left = "" if not since else f", about {seconds / since * (planned - done) / 60:.0f} min left"
    line = f"{done}/{planned} ({100 * done // planned} %{left}): {what}"
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{line[:100]}")
        sys.stderr.flush()
    elif done % max(planned // 50, 1) == 0:
        say(line)


def say(line: str) -> None:
    """A line for people."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every runner has."""
    here = Path(__file__).resolve().parent
    add = parser.add_argument
    add("--kit", type=Path, default=here, help="the kit's folder (default: where this file is)")
    add("--output", type=Path, help="results file (default: results.jsonl in the kit's folder)")
    add("--rounds", type=int, help="accepted rounds per entry and pass")
    add("--passes", type=int, help="how often each entry is visited")
    add("--extra-passes", type=int, help="how often at most uncertain entries are visited again")
    add("--shard", default="1/1", help="part i/n of the entries, to share the work")
    add("--device", help="the device in words, such as 'Pixel 8'")
    add("--soc", help="its chip")
    add("--check", action="store_true", help="only check the kit's files")


def protocol_of(kit: Kit, given: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """The manifest's protocol as changed by options; nothing given changes nothing.

    Raises:
        KitError: a number that must be positive is not.
    """
    options = {"rounds": given.rounds, "passes": given.passes, **changes}
    for name, value in options.items():
        if isinstance(value, int) and value < 1:
            raise KitError(f"--{name} must be at least 1, got {value}")
    if given.extra_passes is not None:
        options["extra_passes"] = max(given.extra_passes, 0)
    wanted = {name: value for name, value in options.items() if value is not None}
    return {**kit.manifest["protocol"], **wanted}


def header_of(
    kit: Kit, device: Mapping[str, Any], protocol: Mapping[str, Any], shard: str
) -> dict[str, Any]:
    """The first line of the results: the kit, the device, how it was timed."""
    return {
        "kit": kit.manifest["digest"],
        "device": dict(device),
        "protocol": dict(protocol),
        "shard": shard,
        "manifest": kit.manifest,
    }


def session(**facts: Any) -> dict[str, Any]:
    """A line on one start of the runner."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"session": {"date": now, "load": load, **facts}}


def main_of(run: Callable[[], None]) -> int:
    """Run it; errors are one line, an interrupted run can go on."""
    try:
        run()
    except KitError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("\nstopped; the same command goes on here")
        return 130
    return 0
