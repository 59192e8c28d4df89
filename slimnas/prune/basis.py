"""The principal basis: attention heads turned so that single dims matter as unequally as can be.

A head's logits depend on its queries and keys only through their products, and a block's output
on the values only through the output projection. So any invertible matrix may stand between the
two factors without changing the function: q -> A q, k -> A^-T k, and v -> B v, proj -> proj B^-1.
Trained networks spread what a head does evenly over its dims, and removing any of them hurts. In
the basis chosen here the dims are sorted by what they contribute, on the images given, to the
centred logits (queries, keys) or to the output (values); the last ones contribute next to nothing.

For queries with second moment S_q and keys with centred second moment S_k (a key's mean moves all
logits of a query alike, which softmax ignores), the singular vectors of S_q^1/2 S_k^1/2 give the
best bilinear form of every lower rank for independent queries and keys (Eckart and Young, 1936).
For values, whose mean goes into a bias, those of proj S_v^1/2 give the best output of every rank.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimnas.arch.walk import walk
from slimnas.errors import PruneError
from slimnas.nn.build import Network
from slimnas.nn.units import ATTENTION, AttentionSpec, attention_of, qkv_rows
from slimnas.prune.supported import check_network

SMALLEST = 1e-8
"""Directions below this share of the largest second moment count as having it."""


@torch.no_grad()
def to_principal_basis(
    network: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    on_batch: Callable[[int], None] | None = None,
) -> Network:
    """A copy of `network` that computes the same with every attention head in its principal basis.

    Args:
        network: any network of slimnas; left as it was.
        batches: images (B, c, H, W) and labels, which are not looked at; a few hundred images do.
        on_batch: called after every minibatch with the number of images seen.

    Returns:
        The same architecture, equal outputs up to rounding, dims by falling contribution.

    Raises:
        PruneError: no images, or activations that are not finite.
        InputSizeError: images of another size.
    """
    check_network(network)
    turned = copy.deepcopy(network)
    heads = list(_attention(turned))
    if not heads:
        return turned
    first = next(turned.parameters())
    modes = [(module, module.training) for module in turned.modules()]
    turned.eval()
    images_seen = 0
    with contextlib.ExitStack() as hooks:
        for head in heads:
            head.hook(hooks)
        for images, _ in batches:
            turned(images.to(first.device, first.dtype))
            images_seen += len(images)
            if on_batch is not None:
                on_batch(images_seen)
    if not images_seen:
        raise PruneError("the principal basis must see at least one image, got none")
    for head in heads:
        head.turn()
    for module, training in modes:
        module.training = training
    return turned


@dataclass
class _Attention:
    """One attention module, and the moments of what flows through it.

    Attributes:
        name: where it is.
        qkv, proj: its projections.
        queries, keys, values: rows of `qkv`, (heads, dims).
        moments: second moments (heads, dims, dims) and sums (heads, dims), float64, unscaled.
        count: positions summed over.
    """

    name: str
    qkv: nn.Linear
    proj: nn.Linear
    queries: Tensor
    keys: Tensor
    values: Tensor
    moments: dict[str, Tensor]
    count: int = 0

    def hook(self, hooks: contextlib.ExitStack) -> None:
        """Watch the module until `hooks` is closed."""
        for handle in (
            self.qkv.register_forward_hook(lambda _, __, out: self._see_qkv(out)),
            self.proj.register_forward_pre_hook(lambda _, args: self._see_mixed(args[0])),
        ):
            hooks.callback(handle.remove)

    def _see_qkv(self, out: Tensor) -> None:
        """Add queries and keys; (B, tokens that attend to each other, rows)."""
        queries, keys = out[..., self.queries], out[..., self.keys]
        self._add("queries", queries)
        self._add("keys", keys - keys.mean(dim=1, keepdim=True))
        self.count += out.shape[0] * out.shape[1]

    def _see_mixed(self, mixed: Tensor) -> None:
        """Add the heads' outputs; (B, tokens, heads * v_dim)."""
        mixed = mixed.reshape(*mixed.shape[:2], *self.values.shape)
        self._add("mixed", mixed)
        self._sum("mean", mixed.sum(dim=(0, 1)))

    def _add(self, name: str, x: Tensor) -> None:
        self._sum(name, torch.einsum("bthi,bthj->hij", x, x))

    def _sum(self, name: str, value: Tensor) -> None:
        value = value.cpu().double()
        self.moments[name] = self.moments[name] + value if name in self.moments else value

    def turn(self) -> None:
        """Change the weights to the principal basis."""
        moments = {name: value / self.count for name, value in self.moments.items()}
        bad = [name for name, value in moments.items() if not bool(torch.isfinite(value).all())]
        if bad:
            raise PruneError(f"{self.name}: its {bad[0]} must be finite, they are not")
        heads, v_dim = self.values.shape
        weight = self.proj.weight.cpu().double().reshape(-1, heads, v_dim)
        for head in range(heads):
            self._turn_logits(head, moments["queries"][head], moments["keys"][head])
            mean = moments["mean"][head]
            centred = moments["mixed"][head] - torch.outer(mean, mean)
            weight[:, head] = self._turn_values(head, centred, weight[:, head])
        self.proj.weight.copy_(weight.reshape(self.proj.weight.shape))

    def _turn_logits(self, head: int, queries: Tensor, keys: Tensor) -> None:
        if not (queries.trace() > 0 and keys.trace() > 0):
            return  # all logits of a query are alike, whatever the dims
        root_q, inverse_q = _roots(queries)
        root_k, inverse_k = _roots(keys)
        left, sizes, right = torch.linalg.svd(root_q @ root_k)
        share = sizes.clamp_min(SMALLEST * sizes[0]).sqrt()[:, None]  # half of it to each side
        self._apply(self.queries[head], share * (left.T @ inverse_q))
        self._apply(self.keys[head], share * (right @ inverse_k))

    def _turn_values(self, head: int, moment: Tensor, weight: Tensor) -> Tensor:
        """Turn the values of a head; returns its columns (C, v_dim) of the output projection."""
        if not moment.trace() > 0:
            return weight
        root, inverse = _roots(moment)
        # Complete: a projection narrower than the head still needs as many directions as dims.
        _, _, right = torch.linalg.svd(weight @ root, full_matrices=True)
        self._apply(self.values[head], right @ inverse)
        turned: Tensor = weight @ root @ right.T
        return turned

    def _apply(self, rows: Tensor, matrix: Tensor) -> None:
        """Multiply these rows of the joint projection, biases too, by `matrix` from the left."""
        for tensor in (self.qkv.weight, self.qkv.bias):
            tensor[rows] = (matrix @ tensor[rows].cpu().double()).to(tensor)


def _attention(network: Network) -> Iterator[_Attention]:
    for component in walk(network.architecture):
        spec: AttentionSpec | None = attention_of(component.spec)
        if spec is not None:
            name = f"{component.name}.{ATTENTION[type(spec)]}"
            qkv, proj = (network.get_submodule(f"{name}.{part}") for part in ("qkv", "proj"))
            assert isinstance(qkv, nn.Linear)
            assert isinstance(proj, nn.Linear)
            device = qkv.weight.device
            q, k, v = (torch.from_numpy(part.copy()).to(device) for part in qkv_rows(spec))
            yield _Attention(name, qkv, proj, q, k, v, {})


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a second moment, and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(SMALLEST * float(values[-1])).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T
