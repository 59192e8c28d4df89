"""The file of importance scores: what is read is what was written, and nothing else is."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prune_cases import ARCHITECTURES, FAMILIES

from slimnas.arch.architecture import Architecture
from slimnas.errors import PruneError, SlimnasError, WeightsError
from slimnas.nn.tensorfiles import load_tensors, save_tensors
from slimnas.prune.scores import SCHEMA, BlockScores, Scores
from slimnas.prune.vector import UnitVector


def numbered(architecture: Architecture) -> Scores:
    """Every unit has another score."""
    units = UnitVector(architecture)
    blocks, embedding = units.split(torch.arange(units.size, dtype=torch.float64) / 7)
    return Scores(
        criterion="fisher",
        architecture=architecture.digest,
        weights="w" * 64,
        data="d" * 64,
        images=5,
        batch_size=3,
        seed=2,
        blocks=blocks,
        embedding=embedding,
    )


def arrays(scores: Scores) -> list[Any]:
    kinds = [kind.name for kind in fields(BlockScores)]
    return [
        *(np.asarray(getattr(block, kind)) for block in scores.blocks.values() for kind in kinds),
        *scores.embedding,
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_is_read(family: str, tmp_path: Path) -> None:
    scores = numbered(ARCHITECTURES[family])
    path, again = tmp_path / "scores.safetensors", tmp_path / "again.safetensors"
    scores.save(path)
    read = Scores.load(path)
    assert read.header == scores.header
    assert list(read.blocks) == list(scores.blocks)
    read.check(ARCHITECTURES[family])
    compared = 0
    for mine, theirs in zip(arrays(scores), arrays(read), strict=True):
        assert mine.dtype == theirs.dtype == np.float64
        np.testing.assert_array_equal(mine, theirs)
        compared += mine.size
    assert compared == UnitVector(ARCHITECTURES[family]).size
    read.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_each_unit_has_its_own_entry() -> None:
    for architecture in ARCHITECTURES.values():
        values = np.concatenate([array.reshape(-1) for array in arrays(numbered(architecture))])
        assert len(set(values)) == len(values) == UnitVector(architecture).size


def test_ten_blocks_stay_in_order(tmp_path: Path) -> None:
    body = ARCHITECTURES["vit"].to_dict()
    body["stages"][0]["blocks"][0]["repeat"] = 11
    architecture = Architecture.from_dict(body)
    numbered(architecture).save(tmp_path / "scores")
    read = Scores.load(tmp_path / "scores")
    assert list(read.blocks) == [f"stages.0.blocks.{i}" for i in range(12)]


def test_scores_of_another_network_are_refused() -> None:
    scores = numbered(ARCHITECTURES["vit"])
    with pytest.raises(PruneError, match=r"a\.safetensors: must be for tiny_swin"):
        scores.check(ARCHITECTURES["swin"], "a.safetensors")
    foreign = replace(scores, architecture=ARCHITECTURES["swin"].digest)
    with pytest.raises(PruneError, match="its units must be those of tiny_swin"):
        foreign.check(ARCHITECTURES["swin"])


def test_damaged_and_foreign_files_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    numbered(ARCHITECTURES["vit"]).save(path)
    tensors, metadata = load_tensors(path, "scores")
    whole = path.read_bytes()
    block = "stages.0.blocks.1"
    nan = torch.full((3,), float("nan"), dtype=torch.float64)

    def rewritten(change: dict[str, Any] | None = None, **meta: Any) -> None:
        changed = {k: v for k, v in {**tensors, **(change or {})}.items() if v is not None}
        save_tensors(path, changed, {**metadata, **meta})

    def refused(error: type[SlimnasError], message: str) -> None:
        with pytest.raises(error, match=message) as caught:
            Scores.load(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)

    rewritten()
    Scores.load(path)
    rewritten(schema="slimnas/supernet/1")
    refused(PruneError, f"schema: must be '{SCHEMA}', got 'slimnas/supernet/1'")
    rewritten(images="many")
    refused(PruneError, "images: must be a whole number, got 'many'")
    rewritten(criterion=3)
    refused(PruneError, "criterion: must be text, got 3")
    rewritten({f"{block}.head": nan})
    refused(PruneError, f"{block}.head: must be finite float64")
    rewritten({f"{block}.head": torch.ones(3)})
    refused(PruneError, f"{block}.head: must be finite float64")
    rewritten({f"{block}.head": None})
    refused(PruneError, f"{block}: every block must have")
    rewritten({"embedding.3": tensors["embedding.0"]})
    refused(PruneError, "every stage an embedding")
    path.write_bytes(whole[:-40])
    refused(WeightsError, "damaged or not safetensors")
    path.unlink()
    refused(WeightsError, "no such file; expected importance scores")
