"""Commands that work long before they write: what they cannot write to is refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_world import slimnas

NETWORK = """schema: slimnas/architecture/1
name: small
input: {channels: 3, resolution: 32}
stem: {type: vit_stem, width: 8, patch: 8}
stages:
- {width: 8, blocks: [{type: vit, heads: 2, qk_dim: 4, v_dim: 4}]}
head: {type: token, classes: 10}
"""


@pytest.mark.parametrize(
    ("command", "work"),
    [
        ("analyze memory small.yaml", "slimnas.analysis.memory.profile_network"),
        ("analyze heads small.yaml", "slimnas.cli.analyze_heads.open_subject"),
        ("analyze spectrum small.yaml --part stem", "slimnas.cli.analyze_spectrum.open_subject"),
        ("evaluate small.yaml", "slimnas.cli.evaluate._evaluate"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    command: str,
    work: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(NETWORK)
    Path("taken").write_text("a file")
    monkeypatch.setattr("slimnas.cli.evaluate_inputs.open_inputs", lambda asked: None)
    monkeypatch.setattr(work, lambda *_, **__: pytest.fail("the work has begun"))
    for place in ("taken", "taken/out"):
        answer = slimnas(capsys, *command.split(), "--output", place)
        assert (answer.code, len(answer.errors)) == (1, 1)
        assert answer.errors[0].startswith(f"{place}: cannot be written")
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml", "taken"}
