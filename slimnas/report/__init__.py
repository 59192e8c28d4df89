"""The report of a search run: one HTML page, and its figures as files."""

from slimnas.report.html import write_report
from slimnas.report.run import (
    DataSummary,
    FoundNetwork,
    PricedNetwork,
    ReferenceNetwork,
    RunReport,
)

__all__ = [
    "DataSummary",
    "FoundNetwork",
    "PricedNetwork",
    "ReferenceNetwork",
    "RunReport",
    "write_report",
]
