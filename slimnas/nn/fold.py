"""`fold`: the network as it is deployed, with everything removable at inference removed.

BatchNorm goes into the convolution before it, layer scale into the last linear map before it,
biases that attention gathers from a table are gathered once, and the two classifiers of a
distilled head become one, unless they read two different tokens (ViT). The outputs stay those of
evaluation mode up to rounding. MB4D's first layer scale stays: nothing but the pooling stands
before it. What folds in a module is its method `fold_`.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def fold(module: nn.Module) -> nn.Module:
    """Return a folded copy of a network, block or stem, in evaluation mode.

    The copy is for export and timing; none of its parameters takes a gradient. `module` is not
    changed, and modules of unknown families are copied as they are.
    """
    folded = copy.deepcopy(module).eval()
    folded.requires_grad_(False)
    for part in list(folded.modules()):
        hook: Any = getattr(part, "fold_", None)
        if hook is not None:
            hook()
    return folded
