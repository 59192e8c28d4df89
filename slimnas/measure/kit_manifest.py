"""`manifest.json` of a latency kit: what is in it, and the plan that its results price."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from slimnas import __version__
from slimnas.arch.architecture import Architecture
from slimnas.arch.documents import Spec, check_schema, parse_spec
from slimnas.errors import LatencyTableError, SpecError
from slimnas.latency.keys import PriceKey, format_fields, parse_fields
from slimnas.measure.kit_networks import KitNetworks
from slimnas.measure.model_scope import ModelScope
from slimnas.measure.plan import Entry, Plan, Term, network_entry
from slimnas.measure.scope import Scope, SpaceScope

MANIFEST_FILE = "manifest.json"
SCHEMA = "slimnas/latency-kit/1"
WHAT = "a latency kit's manifest"

RUNNERS = {"onnx": "run_kit.py", "coreml": "run_kit_mac.py", "executorch": "run_kit_adb.py"}
"""The runner of a kit's format."""

Use = Literal["part", "call", "calibration", "held out"]


class ScopeDocument(Spec):
    """What the networks of a kit can contain.

    Attributes:
        kind: a search space, or a model and what can be pruned from it.
        text: the space's or the architecture's YAML document.
    """

    kind: Literal["space", "model"]
    text: str

    @classmethod
    def of(cls, scope: Scope) -> ScopeDocument:
        """Write down `scope`.

        Raises:
            LatencyTableError: neither a space's scope nor a model's.
        """
        if isinstance(scope, SpaceScope):
            return cls(kind="space", text=scope.space.to_yaml())
        if isinstance(scope, ModelScope):
            return cls(kind="model", text=scope.model.to_yaml())
        raise LatencyTableError(f"{scope.title}: a kit is for a space or for a model")


class InputInfo(Spec):
    """The one input of a network's file: shape, and NumPy's name of its number format."""

    shape: tuple[int, ...]
    dtype: str


class KitFile(Spec):
    """A file of a kit."""

    name: str
    sha256: str
    size: int


class NetworkFile(KitFile):
    """A network's file.

    Attributes:
        what: the network in words.
        macs: multiply-adds for one image.
        input: what it takes.
    """

    what: str
    macs: int
    input: InputInfo


class KitTerm(Spec):
    """A file and the share of its latency in an entry's price."""

    file: str
    share: float


class KeyDocument(Spec):
    """A price's key as plain data; see `slimnas.latency.keys.PriceKey`."""

    component: str
    type: str
    fields: str
    resolution: str
    width_in: int
    width_out: int

    @classmethod
    def of(cls, key: PriceKey) -> KeyDocument:
        """Write down `key`."""
        return cls(**{**asdict(key), "fields": format_fields(key.fields)})

    def key(self) -> PriceKey:
        """The key again."""
        return PriceKey(**{**self.model_dump(), "fields": parse_fields(self.fields)})


class KitEntry(Spec):
    """Networks that are timed side by side.

    Attributes:
        name: unique in the kit.
        use: a part of networks, what a call costs, or a whole network and what it is for.
        priced: whether a row of the table follows from it.
        terms: the networks, and the share of each in the price.
        key: of the row.
        network: a whole network's architecture, a YAML document.
    """

    name: str
    use: Use
    priced: bool
    terms: tuple[KitTerm, ...]
    key: KeyDocument | None = None
    network: str | None = None

    def entry(self) -> Entry:
        """The plan's entry, its terms without their components."""
        terms = tuple(Term((), term.share) for term in self.terms)
        return Entry(self.name, terms, None if self.key is None else self.key.key())


class RuntimeFact(Spec):
    """The library that wrote the files."""

    name: str
    version: str


class KitManifest(Spec):
    """Everything about a kit but the bytes of its files.

    Attributes:
        device: name of the table that its results become.
        format: onnx, coreml or executorch.
        calibration: whole networks that correct the prices.
        held_out: whole networks that state the error.
        sample: what the whole networks are, in words.
        reference: file of the reference network.
        shared: files that several networks read, such as weights.
        size: bytes of all files.
        checked: how the files were checked where the kit was made.
        digest: SHA-256 of everything else; names the kit.
    """

    tool_version: str
    device: str
    made: str
    title: str
    scope: ScopeDocument
    runtime: RuntimeFact
    format: str
    dtype: str
    batch: int
    calibration: int
    held_out: int
    sample: str
    seed: int
    protocol: dict[str, Any]
    reference: str
    shared: tuple[KitFile, ...] = ()
    files: tuple[NetworkFile, ...]
    entries: tuple[KitEntry, ...]
    size: int
    checked: str
    digest: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the document with its schema and digest."""
        body = {"schema": SCHEMA, **self.model_dump(mode="json", exclude={"digest"})}
        return {**body, "digest": digest_of(body)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str) -> KitManifest:
        """Read what `to_dict` gave.

        Raises:
            LatencyTableError: it is not that, or was changed.
        """
        try:
            found = parse_spec(cls, check_schema(data, SCHEMA, WHAT, source=source), source=source)
        except SpecError as error:
            raise LatencyTableError(str(error)) from error
        if digest_of(data) != found.digest:
            raise LatencyTableError(
                f"{source}: digest: does not fit the rest, which was changed after the kit was "
                "made; use the kit as it was made"
            )
        return found

    @classmethod
    def load(cls, folder: Path) -> KitManifest:
        """Read a kit's manifest.

        Raises:
            LatencyTableError: missing, damaged or changed.
        """
        path = folder / MANIFEST_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LatencyTableError(
                f"{path}: no such file; --kit must be the folder of a latency kit"
            ) from None
        except (OSError, ValueError) as error:
            raise LatencyTableError(f"{path}: not a readable JSON file ({error})") from error
        if not isinstance(data, dict):
            raise LatencyTableError(f"{path}: must be a JSON object")
        return cls.from_dict(data, source=str(path))

    @cached_property
    def by_name(self) -> Mapping[str, NetworkFile]:
        """Every network's file by its name."""
        return {file.name: file for file in self.files}

    def plan(self) -> Plan:
        """The plan that the kit was made of, for what comes after timing.

        It is read from the manifest alone, so that any slimnas prices the results of any kit.
        What its terms consist of is not in it, only their shares.

        Raises:
            LatencyTableError: an architecture or a price that this slimnas does not know.
        """
        try:
            priced = [(entry, entry.entry()) for entry in self.entries]
            networks = {
                use: tuple(
                    Architecture.from_yaml(entry.network, source=f"{WHAT}: {entry.name}")
                    for entry in self.entries
                    if entry.use == use and entry.network is not None
                )
                for use in ("calibration", "held out")
            }
        except (SpecError, LatencyTableError) as error:
            raise LatencyTableError(
                f"{error}; import the results with slimnas {self.tool_version}, which made the kit"
            ) from error
        (nothing,) = (entry for kit, entry in priced if kit.use == "call")
        plan = Plan(
            reference=(),
            components=tuple(entry for kit, entry in priced if kit.use == "part"),
            nothing=nothing,
            calibration=networks["calibration"],
            held_out=networks["held out"],
            sample=self.sample,
        )
        if [entry.name for entry in plan.entries] != [entry.name for entry in self.entries]:
            raise LatencyTableError(
                f"the kit was made by slimnas {self.tool_version}, which names networks otherwise "
                f"than slimnas {__version__}; import its results with that version"
            )
        return plan


def entries_of(networks: KitNetworks, suffix: str) -> tuple[KitEntry, ...]:
    """The entries of a kit whose files end in `suffix`."""
    plan = networks.plan
    wholes = {network_entry(one).name: one.to_yaml() for one in (*plan.calibration, *plan.held_out)}
    held_out = {network_entry(one).name for one in plan.held_out}
    found = []
    for entry in plan.entries:
        use: Use = "held out" if entry.name in held_out else "calibration"
        if entry.name not in wholes:
            use = "call" if entry.key is None else "part"
        found.append(
            KitEntry(
                name=entry.name,
                use=use,
                priced=entry.key is not None,
                terms=tuple(
                    KitTerm(file=f"{networks.stem(term.parts)}{suffix}", share=term.share)
                    for term in entry.terms
                ),
                key=None if entry.key is None else KeyDocument.of(entry.key),
                network=wholes.get(entry.name),
            )
        )
    return tuple(found)


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Return what names a kit: the SHA-256 of its manifest without the digest itself."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
