"""Does a search record answer as its supernet would? Both slim to the same targets.

    python benchmarks/search_record.py RUN RECORD --device iphone12 --device pixel4-cpu

RUN is the run folder of the search that trained the supernet, RECORD what `slimnas space record`
made of it. For each device and target (a share of the way from the cheapest network of the space
to the largest) the same slimming goes by the record, by the supernet itself, and blindly (every
network as good as any other, so that the most milliseconds saved win). What each finds is judged
by the supernet on all SEARCH images. Takes minutes on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# As the commands do, before torch loads OpenMP: threads that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import slimnas
from slimnas._files import atomic_write_text
from slimnas.arch.space import SearchSpace, Selection
from slimnas.latency.devices import find_device
from slimnas.measure.machine import this_machine
from slimnas.search.checks import pricer
from slimnas.search.config import FILE, SearchConfig
from slimnas.search.evaluator import SelectionEvaluator
from slimnas.search.importance import ImportanceRecord
from slimnas.search.record import RecordEvaluator, SearchRecord, open_record
from slimnas.search.run import SUPERNET, open_evaluator
from slimnas.search.slimming import Evaluate, Slimmer, cheapest
from slimnas.search.trajectory import Trajectory
from slimnas.supernet.train import load_supernet

SHARES = (0.7, 0.5, 0.35, 0.2)
FILL = 0.97


class Bench:
    """A record, the supernet it was made of, and the images both are judged on."""

    def __init__(self, run: Path, record: Path, data: str | None) -> None:
        config = SearchConfig.load(run / FILE)
        trained = load_supernet(run / SUPERNET)
        self.space: SearchSpace = trained.supernet.space
        self.record: SearchRecord = open_record(str(record), self.space)
        if self.record.supernet_digest != trained.digest:
            raise SystemExit(f"{record}: is not of the supernet in {run}")
        images = slimnas.open_data(
            data or config.data,
            resolution=(config.resolution, config.resolution),
            channels=self.space.input.channels,
            seed=config.seed,
            max_images=config.max_images,
        ).for_search()
        self.importance = ImportanceRecord(self.record.alphas, {})

        def judge(count: int) -> SelectionEvaluator:
            limited = config.model_copy(update={"search_images": count})
            evaluator = open_evaluator(
                limited, trained.supernet, self.importance, images, order=trained.channel_order()
            )
            evaluator.move_to(self.importance.start(self.space))
            return evaluator

        self.supernet = judge(self.record.search_images)
        self.all_images = len(images.search)
        self.whole = judge(self.all_images)
        self._known: dict[Selection, float] = {}

    def judged(self, selection: Selection) -> float:
        """Top-1 on all SEARCH images."""
        if selection not in self._known:
            self._known[selection] = self.whole.top1(selection)
            self.whole.move_to(self.importance.start(self.space))
        return self._known[selection]

    def rows(self, device: str) -> list[dict[str, Any]]:
        """Every target of a device, each answered three ways."""
        table = find_device(device)
        price = pricer(self.space, table)
        low, top = cheapest(self.space, price)[1], price(self.importance.start(self.space))
        targets = [low + share * (top - low) for share in SHARES]
        by_record = RecordEvaluator(self.record, self.space)
        ways: dict[str, Evaluate] = {
            "record": by_record.top1,
            "supernet": self.supernet.top1,
            "blind": lambda selection: 50.0,
        }
        rows: list[dict[str, Any]] = [
            {"device": device, "share": share, "target_ms": target_ms}
            for share, target_ms in zip(SHARES, targets, strict=True)
        ]
        for name, evaluate in ways.items():
            began = time.perf_counter()
            slimmer = Slimmer(self.space, self.importance, price, evaluate, fill=FILL)
            on_step = self._follow if name == "supernet" else None
            trajectory, reached = slimmer.run(slimmer.begin({}), targets, on_step)
            seconds = time.perf_counter() - began
            for row, target_ms in zip(rows, targets, strict=True):
                selection, latency_ms, top1 = trajectory.states[reached[target_ms]]
                row[name] = {
                    "said_top1": top1,
                    "judged_top1": self.judged(selection),
                    "latency_ms": latency_ms,
                    "widths": list(selection.widths),
                    "depths": [sum(c != "identity" for c in slots) for slots in selection.paths],
                    "seconds_for_all_targets": seconds,
                }
        return rows

    def _follow(self, trajectory: Trajectory) -> None:
        """Keep the activations of where slimming has got to."""
        self.supernet.move_to(trajectory.states[-1][0])


def main() -> None:
    """Compare, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--device", action="append", required=True)
    parser.add_argument("--data", help="the run's images, where they have moved")
    parser.add_argument("--output", type=Path, help="a JSON file")
    given = parser.parse_args()
    bench = Bench(given.run, given.record, given.data)
    rows: list[dict[str, Any]] = []
    for device in given.device:
        rows += bench.rows(device)
        print(f"{device}: done", file=sys.stderr)
    body = {
        "benchmark": "search_record",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "slimnas": slimnas.__version__,
        "machine": asdict(this_machine()),
        "record": bench.record.digest,
        "supernet": bench.record.supernet_digest,
        "judged_on": bench.all_images,
        "rows": rows,
    }
    for row in rows:
        ways = [f"{way} {row[way]['judged_top1']:.1f} %" for way in ("record", "supernet", "blind")]
        said = row["record"]["said_top1"]
        print(
            f"{row['device']} {row['target_ms']:.2f} ms: {', '.join(ways)}; record said {said:.1f}"
        )
    gaps = [row["supernet"]["judged_top1"] - row["record"]["judged_top1"] for row in rows]
    blind = [row["supernet"]["judged_top1"] - row["blind"]["judged_top1"] for row in rows]
    print(
        f"supernet minus record: mean {sum(gaps) / len(gaps):.2f} points, worst {max(gaps):.2f}; "
        f"supernet minus blind: mean {sum(blind) / len(blind):.2f}"
    )
    if given.output is not None:
        atomic_write_text(given.output, json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
