"""What is refused before anything is trained, and the digests that tell runs apart."""

from __future__ import annotations

import hashlib
from functools import cache

from slimnas.arch.space import SearchSpace, Selection
from slimnas.data.splits import SearchData
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
    """SHA-256 (hex) of a space's content, however its supernet is trained."""
    return hashlib.sha256(space.without_recipe().to_yaml().encode()).hexdigest()


def table_digest(table: LatencyTable) -> str:
    """SHA-256 (hex) of a table's content."""
    content = rows_to_csv(table.rows) + table.device.model_dump_json()
    return hashlib.sha256(content.encode()).hexdigest()


def require_fitting(
    trained: TrainedSupernet,
    space: SearchSpace,
    data: SearchData,
    resolution: int,
    source: str = "the supernet",
) -> None:
    """Refuse a supernet that cannot answer for this space and data.

    Other data, or the same data split by another seed, would judge candidates on images that
    the supernet may have been trained on.

    Args:
        trained: the supernet.
        space: the space of the search, for the data's number of classes.
        data: TRAIN and SEARCH of the search.
        resolution: side of their images, pixels.
        source: what to call the supernet in a message.

    Raises:
        SpecError: another space, head, resolution, or other data; says which.
    """
    given = trained.supernet
    if given.resolution != resolution:
        raise SpecError(
            f"{source} was trained at {given.resolution} px, the data are at {resolution} px; "
            "leave out --resolution"
        )
    if given.space.head.classes != space.head.classes:
        raise SpecError(
            f"{source}: trained for {given.space.head.classes} classes, the data has "
            f"{space.head.classes}; give the data it was trained on"
        )
    if space_digest(given.space) != space_digest(space):
        raise SpecError(
            f"{source}: trained for another content of space {given.space.name}, not this "
            f"{space.name}; give the --space it was trained on"
        )
    if trained.provenance.get("data") != data.digest:
        raise SpecError(
            f"{source}: trained on other data or another split of them, so SEARCH may hold images "
            "it has seen; give the --data, --seed, --max-images and --skip-bad-images of its "
            "training"
        )
