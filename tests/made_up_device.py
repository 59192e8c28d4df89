"""A device for tables made up in tests."""

from __future__ import annotations

from slimnas.latency.table import DeviceInfo, RuntimeInfo


def made_up_device(name: str = "bench", *, protocol: str = "by hand") -> DeviceInfo:
    """A measured device that does not exist."""
    return DeviceInfo(
        name=name,
        device="a test bench",
        soc="none",
        os="none",
        runtime=RuntimeInfo(name="pencil", version="2B"),
        compute_unit="CPU",
        dtype="fp32",
        threads=1,
        protocol=protocol,
        date="2026-01-01",
        tool_version="slimnas 0",
        kind="measured",
    )
