"""`manifest.json` of a latency kit: what is in it, and the plan that its results price."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from slimnas import __version__
from slimnas.arch.architecture import Architecture
from slimnas.arch.documents import Spec, check_schema, parse_spec
from slimnas.arch.space import SearchSpace
from slimnas.errors import LatencyTableError, SpecError
from slimnas.measure.kit_networks import KitNetworks
from slimnas.measure.model_scope import ModelScope
from slimnas.measure.plan import Plan, make_plan
from slimnas.measure.scope import Scope, SpaceScope

MANIFEST_FILE = "manifest.json"
SCHEMA = "slimnas/latency-kit/1"
WHAT = "a latency kit's manifest"


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

    def scope(self) -> Scope:
        """The scope again.

        Raises:
            SpecError: the document is not what `kind` says.
        """
        if self.kind == "space":
            return SpaceScope(SearchSpace.from_yaml(self.text, source="the kit's space"))
        return ModelScope(Architecture.from_yaml(self.text, source="the kit's model"))


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


class KitEntry(Spec):
    """Networks that are timed side by side; priced if they make a row of the table."""

    name: str
    priced: bool
    terms: tuple[KitTerm, ...]


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

    @property
    def suffix(self) -> str:
        """How the names of the networks' files end."""
        return "." + self.reference.partition(".")[2]

    @cached_property
    def by_name(self) -> Mapping[str, NetworkFile]:
        """Every network's file by its name."""
        return {file.name: file for file in self.files}

    def plan(self) -> Plan:
        """Make the plan again, and check that its networks are the kit's.

        Raises:
            LatencyTableError: this slimnas plans other networks than the one that made the kit.
        """
        try:
            scope = self.scope.scope()
        except SpecError as error:
            raise LatencyTableError(f"{WHAT}: scope: {error}") from error
        plan = make_plan(
            scope,
            chains=(int(self.protocol["chains"][0]), int(self.protocol["chains"][1])),
            calibration=self.calibration,
            held_out=self.held_out,
            seed=self.seed,
        )
        if entries_of(KitNetworks.of(plan), self.suffix) != self.entries:
            raise LatencyTableError(
                f"the kit was made by slimnas {self.tool_version}, which times other networks "
                f"than slimnas {__version__}; import its results with that version"
            )
        return plan


def entries_of(networks: KitNetworks, suffix: str) -> tuple[KitEntry, ...]:
    """The entries of a kit whose files end in `suffix`."""
    return tuple(
        KitEntry(
            name=name,
            priced=priced,
            terms=tuple(KitTerm(file=file, share=share) for file, share in terms),
        )
        for name, priced, terms in networks.entries(suffix)
    )


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Return what names a kit: the SHA-256 of its manifest without the digest itself."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
