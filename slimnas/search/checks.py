"""What is refused before anything is trained, and the digests that tell runs apart."""

from __future__ import annotations

import hashlib
from functools import cache

from slimnas.arch.space import SearchSpace, Selection
from slimnas.errors import SpecError
from slimnas.latency.estimate import latency_ms, missing_components, require_prices
from slimnas.latency.rows import rows_to_csv
from slimnas.latency.table import LatencyTable
from slimnas.search.actions import Price
from slimnas.search.config import SearchConfig
from slimnas.search.slimming import check_reachable
from slimnas.supernet.train import TrainedSupernet

FEWEST_CLASSES = 2


def check_search(space: SearchSpace, table: LatencyTable, config: SearchConfig) -> None:
    """Refuse what cannot end well, before anything is trained.

    Raises:
        MissingLatencyError: the table cannot price the space.
        UnreachableTargetError: a target is below the smallest network.
    """
    require_prices(space, table)
    check_reachable(space, pricer(space, table), config.targets_ms)


def check_before_data(space: SearchSpace, table: LatencyTable, config: SearchConfig) -> None:
    """Refuse what no data could mend, while the number of classes is not known.

    Raises:
        MissingLatencyError: the table cannot price a component other than the head.
        UnreachableTargetError: a target is below the smallest network with the smallest head.
    """
    if any(key.component != "head" for key in missing_components(space, table)):
        require_prices(space, table)
    smallest_head = space.with_classes(FEWEST_CLASSES)
    if not missing_components(smallest_head, table):
        check_search(smallest_head, table, config)


def pricer(space: SearchSpace, table: LatencyTable) -> Price:
    """Latency in ms of selections of `space`; each is priced once."""

    @cache
    def price(selection: Selection) -> float:
        return latency_ms(space.architecture(selection), table)

    return price


def space_digest(space: SearchSpace) -> str:
    """SHA-256 (hex) of a space's content."""
    return hashlib.sha256(space.to_yaml().encode()).hexdigest()


def table_digest(table: LatencyTable) -> str:
    """SHA-256 (hex) of a table's content."""
    content = rows_to_csv(table.rows) + table.device.model_dump_json()
    return hashlib.sha256(content.encode()).hexdigest()


def require_same_space(trained: TrainedSupernet, space: SearchSpace, source: str) -> None:
    """Refuse a supernet that was trained for another space or number of classes.

    Raises:
        SpecError: says which.
    """
    given, wanted = trained.supernet.space, space
    if given.head.classes != wanted.head.classes:
        raise SpecError(
            f"{source}: trained for {given.head.classes} classes, the data has "
            f"{wanted.head.classes}; give the data it was trained on"
        )
    if given.to_yaml() != wanted.to_yaml():
        raise SpecError(
            f"{source}: trained for another content of space {given.name}, not this "
            f"{wanted.name}; give the --space it was trained on"
        )
