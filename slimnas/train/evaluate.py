"""Top-1 accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


@torch.inference_mode()
def top1_percent(
    predict: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> float:
    """Share of images whose largest logit is the label's, in percent.

    Args:
        predict: images (B, c, H, W) -> logits (B, K).
        batches: pairs of images and labels (B,); at least one image in all.
    """
    right = total = 0
    for images, labels in batches:
        right += int((predict(images).argmax(dim=1) == labels).sum())
        total += len(labels)
    return 100.0 * right / total
