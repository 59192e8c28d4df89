"""The model card of a zoo entry."""

from __future__ import annotations

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.zoo.metrics import Metrics


def model_card(architecture: Architecture, metrics: Metrics) -> str:
    """Return the README.md of a model: what it is, its numbers and where they come from."""
    counted = cost(architecture)
    image = architecture.input.shape
    lines = [
        f"# {architecture.name}",
        "",
        f"- input: {image.channels} x {image.height} x {image.width}",
        f"- classes: {architecture.head.classes}",
        f"- stage widths: {', '.join(map(str, architecture.widths))}",
        f"- stage depths: {', '.join(map(str, architecture.depths))}, "
        f"{_with_attention(architecture)} of them with attention",
        f"- parameters: {counted.params:,}",
        f"- multiply-adds for one image: {counted.macs:,}",
        f"- source: {architecture.provenance.get('source', 'not recorded')}",
        "",
        "| number | value | where it comes from |",
        "|---|---|---|",
        *(
            f"| {name} | {_plain(metric.value)} | {metric.provenance.replace('|', '/')} |"
            for name, metric in metrics.items()
        ),
        "",
        "```python",
        "import slimnas",
        "",
        f'network = slimnas.create_model("{architecture.name}", pretrained=True)',
        "```",
        "",
    ]
    return "\n".join(lines)


def _with_attention(architecture: Architecture) -> int:
    blocks = [block for stage in architecture.stages for block in stage.blocks]
    return sum(getattr(block, "heads", 0) > 0 for block in blocks)


def _plain(value: float) -> str:
    """Whole numbers in full, others to four digits."""
    return f"{int(value):,}" if value == int(value) else f"{value:.4g}"
