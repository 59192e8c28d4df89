"""Core ML's programs, computed operation by operation with PyTorch.

What each operation means is read from the specification of MIL; Core ML itself runs on macOS only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from slimnas.runtimes.quiet import quiet

with quiet():
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

Operation = Callable[..., Any]


def program_of(package: Path) -> Any:
    """The main function of a package's program."""
    with quiet():
        spec = coremltools.models.utils.load_spec(str(package))
        weights = package / "Data" / "com.apple.CoreML" / "weights"
        return load(spec, spec.specificationVersion, str(weights)).functions["main"]


def evaluate(main: Any, x: Tensor) -> Tensor:
    """The program's output for input `x`, in single precision whatever the program's."""
    (name,) = main.inputs
    values: dict[str, Any] = {name: x}

    def value(variable: Any) -> Any:
        if isinstance(variable, (list, tuple)):
            return [value(one) for one in variable]
        if variable.name in values:
            return values[variable.name]
        return plain(variable.val)

    for operation in main.operations:
        if operation.op_type == "const":
            continue
        arguments = {key: value(given) for key, given in operation.inputs.items()}
        results = OPERATIONS[operation.op_type](**arguments)
        results = results if isinstance(results, (list, tuple)) else [results]
        for variable, result in zip(operation.outputs, results, strict=True):
            assert tuple(result.shape) == tuple(variable.shape), operation
            values[variable.name] = result
    (output,) = main.outputs
    return values[output.name]


def plain(constant: Any) -> Any:
    """Tensors of numbers in single precision, everything else as Python's own."""
    if getattr(constant, "ndim", 0) and constant.dtype.kind == "f":
        return torch.from_numpy(constant.astype("float32"))
    return constant.item() if getattr(constant, "ndim", 1) == 0 else constant


def conv(x: Tensor, weight: Tensor, strides: Any, pad_type: str, **more: Any) -> Tensor:
    pad = [int(p) for p in more["pad"]] if pad_type == "custom" else [0] * 4
    assert pad_type in ("custom", "valid")
    x = F.pad(x, [pad[2], pad[3], pad[0], pad[1]])
    return F.conv2d(
        x,
        weight,
        more.get("bias"),
        tuple(map(int, strides)),
        0,
        tuple(map(int, more["dilations"])),
        int(more["groups"]),
    )


def avg_pool(x: Tensor, kernel_sizes: Any, strides: Any, pad_type: str, **more: Any) -> Tensor:
    pad = [int(p) for p in more["pad"]] if pad_type == "custom" else [0] * 4
    assert pad[0] == pad[1]
    assert pad[2] == pad[3]
    return F.avg_pool2d(
        x,
        tuple(map(int, kernel_sizes)),
        tuple(map(int, strides)),
        (pad[0], pad[2]),
        ceil_mode=bool(more["ceil_mode"]),
        count_include_pad=not more["exclude_padding_from_average"],
    )


def layer_norm(x: Tensor, axes: Any, gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    assert [int(axis) % x.dim() for axis in axes] == [x.dim() - 1]
    return F.layer_norm(x, x.shape[-1:], gamma, beta, float(epsilon))


def matmul(x: Tensor, y: Tensor, transpose_x: bool, transpose_y: bool) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def split(x: Tensor, axis: int, num_splits: int = 0, split_sizes: Any = None) -> list[Tensor]:
    sizes = [x.shape[axis] // num_splits] * num_splits if split_sizes is None else split_sizes
    return list(x.split([int(size) for size in sizes], int(axis)))


def slice_by_index(x: Tensor, begin: Any, end: Any, **more: Any) -> Tensor:
    none = [False] * x.dim()
    masks = [more.get(f"{name}_mask", none) for name in ("begin", "end", "squeeze")]
    strides = more.get("stride", [1] * x.dim())
    picks: list[Any] = []
    for i in range(x.dim()):
        if masks[2][i]:
            picks.append(int(begin[i]))
        else:
            first = None if masks[0][i] else int(begin[i])
            last = None if masks[1][i] else int(end[i])
            picks.append(slice(first, last, int(strides[i])))
    return x[tuple(picks)]


def pad(x: Tensor, pad: Any, mode: str, constant_val: float) -> Tensor:
    assert mode == "constant"
    pairs = [(int(pad[i]), int(pad[i + 1])) for i in range(0, len(pad), 2)]
    return F.pad(x, [p for pair in reversed(pairs) for p in pair], value=float(constant_val))


def reduce_sum(x: Tensor, axes: Any, keep_dims: bool) -> Tensor:
    return x.sum([int(axis) for axis in axes], bool(keep_dims))


def upsample_bilinear(x: Tensor, align_corners: bool, **scales: Any) -> Tensor:
    size = [
        int(x.shape[axis] * float(scales.get(f"scale_factor_{side}", 1)))
        for axis, side in ((-2, "height"), (-1, "width"))
    ]
    return F.interpolate(x, size=size, mode="bilinear", align_corners=bool(align_corners))


def gather(x: Tensor, indices: Any, axis: int, **_: Any) -> Tensor:
    return x.index_select(int(axis), torch.as_tensor(indices).long())


OPERATIONS: dict[str, Operation] = {
    "add": lambda x, y: x + y,
    "avg_pool": avg_pool,
    "cast": lambda x, dtype: x,
    "concat": lambda values, axis, interleave: torch.cat(values, int(axis)),
    "conv": conv,
    "gather": gather,
    "gelu": lambda x, mode: F.gelu(x, approximate={"EXACT": "none"}[mode]),
    "layer_norm": layer_norm,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": matmul,
    "mul": lambda x, y: x * y,
    "pad": pad,
    "reduce_mean": lambda x, axes, keep_dims: x.mean([int(a) for a in axes], bool(keep_dims)),
    "reduce_sum": reduce_sum,
    "relu": lambda x: F.relu(x),
    "reshape": lambda x, shape: x.reshape([int(size) for size in shape]),
    "sigmoid": lambda x: x.sigmoid(),
    "slice_by_index": slice_by_index,
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "split": split,
    "sub": lambda x, y: x - y,
    "transpose": lambda x, perm: x.permute([int(axis) for axis in perm]),
    "upsample_bilinear": upsample_bilinear,
}
