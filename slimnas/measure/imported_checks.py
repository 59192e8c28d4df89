"""Whether imported times can be milliseconds of the networks that they are said to be of."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from slimnas.errors import LatencyTableError
from slimnas.measure.kit_manifest import KitManifest, NetworkFile

CALL_MS = (5e-4, 20.0)
"""What a call of a network that does next to nothing can take. A call into a runtime takes more
than half a microsecond and less than 20 ms on anything a network is deployed on."""

GMACS_PER_S = (0.05, 2e4)
"""What a device can make of a network for one image: from a microcontroller to a data centre's."""

OFF = 50.0
"""Factor between a file's time and what call and rate of the others say, at which it is of
another unit. Small networks use a device worse than large ones, by less than that."""


def check_units(manifest: KitManifest, median_ms: Mapping[str, float], source: str) -> None:
    """Refuse times that are off by a thousand, all or one of them.

    All: the call of a network that does next to nothing, and the multiply-adds per second of
    the reference and the whole networks, must be those of some device. One: every file's time
    must be near what the call and the rate of the whole networks make it.

    Args:
        manifest: the kit's.
        median_ms: every file's time.
        source: for messages.

    Raises:
        LatencyTableError: they are not milliseconds.
    """
    files = manifest.by_name
    call_ms = median(median_ms[name] for name, file in files.items() if not file.macs)
    rates = {name: _rate(files[name], manifest.batch, median_ms[name]) for name in _whole(manifest)}
    rate = median(rates.values())
    if call_ms < CALL_MS[0] or rate > GMACS_PER_S[1]:
        raise LatencyTableError(_all_off(manifest, median_ms, source, call_ms, "seconds"))
    if call_ms > CALL_MS[1] or rate < GMACS_PER_S[0]:
        raise LatencyTableError(_all_off(manifest, median_ms, source, call_ms, "microseconds"))
    for name, file in files.items():
        expected_ms = call_ms + manifest.batch * file.macs / rate / 1e6
        if not 1 / OFF < median_ms[name] / expected_ms < OFF:
            raise LatencyTableError(
                f"{source}: {name} ({file.what}) took {median_ms[name]:.4g} ms, where the other "
                f"files say about {expected_ms:.3g} ms; is it in another unit, or another file?"
            )


def _all_off(
    manifest: KitManifest,
    median_ms: Mapping[str, float],
    source: str,
    call_ms: float,
    unit: str,
) -> str:
    reference = manifest.by_name[manifest.reference]
    time_ms = median_ms[manifest.reference]
    return (
        f"{source}: the reference network, {reference.macs / 1e6:.3g} million multiply-adds, took "
        f"{time_ms:.3g} ms, which is {_rate(reference, manifest.batch, time_ms):.3g} billion per "
        f"second, and a call of next to nothing {call_ms:.3g} ms: no device is like that; are the "
        f"times in {unit}?"
    )


def _whole(manifest: KitManifest) -> list[str]:
    """The reference and the whole networks."""
    whole = [
        entry.terms[0].file
        for entry in manifest.entries
        if not entry.priced and manifest.by_name[entry.terms[0].file].macs
    ]
    return [manifest.reference, *whole]


def _rate(file: NetworkFile, batch: int, time_ms: float) -> float:
    return batch * file.macs / time_ms / 1e6
