"""Makes a latency kit: everything a device that cannot be reached from here has to time.

A kit is a folder: the networks of a table's plan as files of one runtime, each once; a manifest
with their digests; a runner that needs nothing of slimnas; a README for whoever runs it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from slimnas import __version__
from slimnas._files import atomic_write_bytes, atomic_write_text
from slimnas._resources import data_dir
from slimnas.errors import LatencyTableError, RunFolderError, suggest
from slimnas.latency.devices import require_device_name
from slimnas.measure.exports import Exports, OnExport, exports_slowly
from slimnas.measure.kit_check import checked_input
from slimnas.measure.kit_manifest import (
    MANIFEST_FILE,
    RUNNERS,
    KitFile,
    KitManifest,
    NetworkFile,
    RuntimeFact,
    ScopeDocument,
    digest_of,
    entries_of,
)
from slimnas.measure.kit_networks import FOLDER, KitNetworks, in_words, macs_of, params_of
from slimnas.measure.kit_readme import readme
from slimnas.measure.kit_weights import SharedWeights
from slimnas.measure.networks import network_and_input, network_input
from slimnas.measure.plan import make_plan
from slimnas.measure.scope import Parts, Scope
from slimnas.measure.timing import Protocol
from slimnas.runtimes.base import FileRuntime
from slimnas.runtimes.registry import get_runtime

RUNTIMES = {"onnx": "onnxruntime", "coreml": "coreml", "executorch": "executorch"}
"""The runtime that writes the files of a format."""

PROTOCOL_FILE = "kit_protocol.py"
README_FILE = "README.md"
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}

Progress = Callable[[int, int, str], None]
"""Called with files done, files planned, and what is written next."""


@dataclass(frozen=True)
class KitJob:
    """What a kit is for and where it goes.

    Attributes:
        output: the kit's folder, which must not be there yet.
        device: name of the table that its results will become.
        scope: the networks to price, at their deployment resolution.
        file_format: onnx, coreml or executorch.
        protocol: how the runner times.
        batch: images per call.
        calibration: random networks that correct the prices.
        held_out: random networks for the stated error.
        shared_weights: let ONNX networks read one file of weights.
    """

    output: Path
    device: str
    scope: Scope
    file_format: str = "onnx"
    protocol: Protocol = field(default_factory=Protocol)
    batch: int = 1
    calibration: int = 20
    held_out: int = 20
    shared_weights: bool = True


def kit_runtime(file_format: str, dtype: str | None = None) -> FileRuntime:
    """Return the runtime that writes files of `file_format`.

    Raises:
        LatencyTableError: no such format.
        RuntimeUnavailableError: it is not installed, or has no such dtype.
    """
    if file_format not in RUNTIMES:
        raise LatencyTableError(
            f"--format must be one of {', '.join(RUNTIMES)}, got {file_format!r}"
            f"{suggest(file_format, RUNTIMES)}"
        )
    runtime = get_runtime(RUNTIMES[file_format], dtype=dtype)
    assert isinstance(runtime, FileRuntime)
    return runtime


def make_kit(job: KitJob, runtime: FileRuntime, progress: Progress | None = None) -> KitManifest:
    """Write a kit; it appears whole or not at all.

    Args:
        job: what for and where.
        runtime: writes the files; see `kit_runtime`.
        progress: is told about every file.

    Returns:
        The kit's manifest.

    Raises:
        ExportError: a network the runtime has no form for, or a file that does not compute.
        LatencyTableError: a name that no table can have.
        RunFolderError: the folder is there already, cannot be written, or has no room.
    """
    _refuse(job)
    plan = make_plan(
        job.scope,
        chains=job.protocol.chains,
        calibration=job.calibration,
        held_out=job.held_out,
        seed=job.protocol.seed,
    )
    networks = KitNetworks.of(plan)
    with _partial(job.output) as folder:
        _refuse_full(job, networks, runtime.dtype)
        written = _export(job, runtime, networks, folder, progress)
        shared = written.finish()
        files = [written.checked(stem, parts) for stem, parts in networks.parts.items()]
        manifest = _manifest(job, runtime, networks, files, shared, written.ran)
        _write_rest(folder, job, manifest)
    return manifest


class _Files:
    """Writes the networks' files, and checks each as its runner will read it."""

    def __init__(self, job: KitJob, runtime: FileRuntime, folder: Path) -> None:
        self._job, self._runtime, self._folder = job, runtime, folder
        sharing = job.shared_weights and job.file_format == "onnx" and runtime.dtype == "fp32"
        self._weights = SharedWeights() if sharing else None
        self.ran = True

    def write(self, stem: str, parts: Parts) -> None:
        """Write a network's file, unless it was written ahead."""
        if not self.path(stem).exists():
            module, x = network_and_input(parts, self._job.batch)
            model = self._runtime.export(module, x)
            if self._weights is not None:
                model = self._weights.share(model)
            atomic_write_bytes(self.path(stem), model)

    def finish(self) -> tuple[KitFile, ...]:
        """Write what the networks' files share."""
        if self._weights is None:
            return ()
        path = self._weights.write(self._folder / FOLDER, self._job.protocol.seed)
        return (KitFile(**self._facts(path)),)

    def checked(self, stem: str, parts: Parts) -> NetworkFile:
        """Check a network's file; returns what the manifest says about it."""
        path = self.path(stem)
        x = network_input(parts, self._job.batch)
        info, ran = checked_input(path, self._job.file_format, self._runtime, x)
        self.ran = self.ran and ran
        what = in_words(parts)
        return NetworkFile(**self._facts(path), what=what, macs=macs_of(parts), input=info)

    def path(self, stem: str) -> Path:
        """Where a network's file goes."""
        return self._folder / f"{stem}{self._runtime.suffix}"

    def _facts(self, path: Path) -> dict[str, Any]:
        data = path.read_bytes()
        name = path.relative_to(self._folder).as_posix()
        return {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def _export(
    job: KitJob,
    runtime: FileRuntime,
    networks: KitNetworks,
    folder: Path,
    progress: Progress | None,
) -> _Files:
    files = _Files(job, runtime, folder)
    if exports_slowly(runtime):
        with Exports(runtime, job.batch, lambda parts: files.path(networks.stem(parts))) as exports:
            exports.prepare(networks.parts.values(), _exporting(progress))
    for i, (stem, parts) in enumerate(networks.parts.items()):
        if progress is not None:
            progress(i, len(networks.parts), in_words(parts))
        files.write(stem, parts)
    if progress is not None:
        progress(len(networks.parts), len(networks.parts), "checking")
    return files


def _exporting(progress: Progress | None) -> OnExport | None:
    if progress is None:
        return None
    return lambda made, of: progress(made, of, "exporting")


def _manifest(
    job: KitJob,
    runtime: FileRuntime,
    networks: KitNetworks,
    files: Sequence[NetworkFile],
    shared: tuple[KitFile, ...],
    ran: bool,
) -> KitManifest:
    library = f"{runtime.name} {runtime.version}"
    manifest = KitManifest(
        tool_version=__version__,
        device=job.device,
        made=date.today().isoformat(),
        title=job.scope.title,
        scope=ScopeDocument.of(job.scope),
        runtime=RuntimeFact(name=runtime.name, version=runtime.version),
        format=job.file_format,
        dtype=runtime.dtype,
        batch=job.batch,
        calibration=len(networks.plan.calibration),
        held_out=len(networks.plan.held_out),
        sample=networks.plan.sample,
        seed=job.protocol.seed,
        protocol=job.protocol.to_dict(),
        reference=files[0].name,
        shared=shared,
        files=tuple(files),
        entries=entries_of(networks, runtime.suffix),
        size=sum(file.size for file in (*files, *shared)),
        checked=f"every file run in {library}"
        if ran
        else f"written and read by {library}, not run",
    )
    return manifest.model_copy(update={"digest": digest_of(manifest.to_dict())})


def _write_rest(folder: Path, job: KitJob, manifest: KitManifest) -> None:
    runners = data_dir("kit_runners")
    for name in (RUNNERS[job.file_format], PROTOCOL_FILE):
        shutil.copyfile(runners / name, folder / name)
    atomic_write_text(folder / README_FILE, readme(manifest))
    text = json.dumps(manifest.to_dict(), indent=1) + "\n"
    atomic_write_text(folder / MANIFEST_FILE, text)


def _refuse(job: KitJob) -> None:
    require_device_name(job.device)
    if job.output.exists():
        raise RunFolderError(
            f"{job.output}: is there already; choose another --output, or remove it"
        )


def _refuse_full(job: KitJob, networks: KitNetworks, dtype: str) -> None:
    sizes = [params_of(parts) * BYTES[dtype] for parts in networks.parts.values()]
    needed = max(sizes) if job.file_format == "onnx" and job.shared_weights else sum(sizes)
    free = shutil.disk_usage(job.output.parent).free
    if needed > free:
        raise RunFolderError(
            f"{job.output}: needs about {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; ask "
            "for fewer --networks and --held-out, or choose another --output"
        )


@contextlib.contextmanager
def _partial(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` when the block succeeds, and is removed when it fails."""
    folder = output.parent / f".{output.name}.partial"
    try:
        shutil.rmtree(folder, ignore_errors=True)  # a killed run's
        (folder / FOLDER).mkdir(parents=True)
    except OSError as error:
        raise RunFolderError(
            f"{output}: cannot be written ({error.strerror}); choose another --output"
        ) from error
    try:
        yield folder
        folder.replace(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
