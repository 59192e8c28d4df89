"""How long an architecture takes, by table and without torch."""

from slimnas.latency.devices import find_device, known_devices, provenance_line
from slimnas.latency.estimate import (
    Estimate,
    component_latency_ms,
    estimate,
    latency_ms,
    missing_components,
    require_prices,
)
from slimnas.latency.keys import OVERHEAD, PriceKey, price_key, price_keys, price_parts
from slimnas.latency.rows import PriceRow
from slimnas.latency.spaces import space_components
from slimnas.latency.table import DeviceInfo, LatencyTable

__all__ = [
    "OVERHEAD",
    "DeviceInfo",
    "Estimate",
    "LatencyTable",
    "PriceKey",
    "PriceRow",
    "component_latency_ms",
    "estimate",
    "find_device",
    "known_devices",
    "latency_ms",
    "missing_components",
    "price_key",
    "price_keys",
    "price_parts",
    "provenance_line",
    "require_prices",
    "space_components",
]
