"""The README of a kit, for somebody who has never seen slimnas."""

from __future__ import annotations

from string import Template

from slimnas._resources import data_dir
from slimnas.measure.kit_manifest import KitManifest


def readme(manifest: KitManifest) -> str:
    """Return the text that tells what to install, what to run, what comes back, how long."""
    template = (data_dir("kit_runners") / f"README_{manifest.format}.md").read_text(
        encoding="utf-8"
    )
    protocol = manifest.protocol
    visits = protocol["passes"] * len(manifest.entries)
    terms = sum(len(entry.terms) for entry in manifest.entries)
    per_visit = (2 + terms / len(manifest.entries)) * protocol["rounds"]
    seconds = visits * per_visit * protocol["visit_ms"] / 1e3
    return Template(template).substitute(
        title=manifest.title,
        device=manifest.device,
        files=len(manifest.files),
        entries=len(manifest.entries),
        megabytes=max(1, round(manifest.size / 1e6)),
        checked=manifest.checked,
        minutes=max(1, round(2 * seconds / 60)),
        version=manifest.tool_version,
        dtype=manifest.dtype,
        digest=manifest.digest[:12],
    )
