"""LITv2's modules against loops and torch's own attention."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from litv2_cases import images, litv2_architecture, randomised, varied
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimnas.arch.shapes import FeatureShape
from slimnas.errors import InputSizeError
from slimnas.nn.build import build, build_features
from slimnas.nn.fold import fold
from slimnas.nn.litv2 import ConvFFN, ConvMerging, HiLo
from slimnas.nn.resolution import adapt_state_dict
from slimnas.runtimes.onnx_export import export_onnx
from slimnas.zoo.registry import get

GRIDS = [(4, 6), (5, 7), (3, 3), (1, 5), (6, 4)]
SPLITS = [
    pytest.param(0, 2, id="all Hi-Fi"),
    pytest.param(1, 2, id="both"),
    pytest.param(2, 3, id="both, window 3"),
    pytest.param(3, 2, id="all Lo-Fi"),
    pytest.param(3, 1, id="window 1"),
    pytest.param(1, 8, id="window larger than the map"),
]


def hilo(
    grid: tuple[int, int], lo_heads: int, window: int, *, bias: bool = True, heads: int = 3
) -> HiLo:
    torch.manual_seed(0)
    made = HiLo(4 * heads, grid, heads, lo_heads, window, qkv_bias=bias)
    randomised(made).double()
    return made


def tokens(grid: tuple[int, int], width: int = 12, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, grid[0] * grid[1], width)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# HiLo


def mixed_by_hand(q: Tensor, keys: list[Tensor], values: list[Tensor], dim: int) -> Tensor:
    """What one query of one head gets, pair by pair."""
    weights = [math.exp(float(q @ key) / math.sqrt(dim)) for key in keys]
    parts = [weight * value for weight, value in zip(weights, values, strict=True)]
    return sum(parts[1:], parts[0]) / sum(weights)


def hilo_by_hand(module: HiLo, image: Tensor) -> Tensor:
    """HiLo on one image's tokens (N, C), token by token, head by head."""
    (rows, columns), side, dim = module.grid, module.window, module.dim
    hi, lo = module.hi_heads * dim, module.lo_heads * dim
    high, wide = math.ceil(rows / side) * side, math.ceil(columns / side) * side
    at = {
        (r, c): image[r * columns + c]
        if r < rows and c < columns
        else torch.zeros(module.width, dtype=image.dtype)
        for r in range(high)
        for c in range(wide)
    }
    windows: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for r, c in at:
        windows.setdefault((r // side, c // side), []).append((r, c))
    out = torch.zeros_like(image)
    qkv = {place: module.h_qkv(token) for place, token in at.items()} if hi else {}
    kv = []
    if lo:
        for places in windows.values():
            mean = sum(at[place] for place in places) / side**2
            kv.append(module.l_kv(mean))
    for r in range(rows):
        for c in range(columns):
            parts = []
            if hi:
                near = windows[r // side, c // side]
                heads = []
                for head in range(module.hi_heads):
                    q, k, v = (
                        slice(i * hi + head * dim, i * hi + (head + 1) * dim) for i in (0, 1, 2)
                    )
                    keys, values = [qkv[p][k] for p in near], [qkv[p][v] for p in near]
                    heads.append(mixed_by_hand(qkv[r, c][q], keys, values, dim))
                parts.append(module.h_proj(torch.cat(heads)))
            if lo:
                query, heads = module.l_q(at[r, c]), []
                for head in range(module.lo_heads):
                    k, v = (slice(i * lo + head * dim, i * lo + (head + 1) * dim) for i in (0, 1))
                    keys, values = [each[k] for each in kv], [each[v] for each in kv]
                    heads.append(mixed_by_hand(query[k], keys, values, dim))
                parts.append(module.l_proj(torch.cat(heads)))
            out[r * columns + c] = torch.cat(parts)
    return out


@pytest.mark.parametrize(("lo_heads", "window"), SPLITS)
@pytest.mark.parametrize("grid", GRIDS)
def test_hilo_pair_by_pair(grid: tuple[int, int], lo_heads: int, window: int) -> None:
    compared = 0
    for bias in (True, False):
        module, x = hilo(grid, lo_heads, window, bias=bias), tokens(grid)
        with torch.no_grad():
            got, wanted = module(x), torch.stack([hilo_by_hand(module, image) for image in x])
        assert wanted.std() > 0.1
        assert (got - wanted).abs().max() < 1e-12
        compared += 1
    assert compared == 2


def torchs_attention(heads: int, inputs: list[nn.Linear], output: nn.Linear) -> nn.Module:
    """torch's attention with the weights of these projections, one below the other."""
    made = nn.MultiheadAttention(output.out_features, heads, batch_first=True).double()
    made.in_proj_weight = nn.Parameter(torch.cat([layer.weight for layer in inputs]))
    made.in_proj_bias = nn.Parameter(torch.cat([layer.bias for layer in inputs]))
    made.out_proj.weight, made.out_proj.bias = output.weight, output.bias
    return made


def windowed(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Tokens (B, N, C) as windows (B, count, side * side, C)."""
    rows, columns = grid
    cut = x.unflatten(1, (rows // side, side, columns // side, side)).transpose(2, 3)
    return cut.flatten(3, 4).flatten(1, 2)


def unwindowed(windows: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    rows, columns = grid
    cut = windows.unflatten(2, (side, side)).unflatten(1, (rows // side, columns // side))
    return cut.transpose(2, 3).flatten(1, 4)


def test_a_window_of_one_is_plain_attention() -> None:
    module, x = hilo((4, 5), 3, 1), tokens((4, 5))
    reference = torchs_attention(3, [module.l_q, module.l_kv], module.l_proj)
    assert (module(x) - reference(x, x, x)[0]).abs().max() < 1e-12
    assert hilo((4, 5), 0, 1).state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize("side", [2, 3])
def test_no_lo_heads_is_window_attention(side: int) -> None:
    module, x = hilo((6, 12), 0, side), tokens((6, 12))
    reference = torchs_attention(3, [module.h_qkv], module.h_proj)
    windows = windowed(x, (6, 12), side)
    flat = windows.flatten(0, 1)
    wanted = reference(flat, flat, flat)[0].view_as(windows)
    assert (module(x) - unwindowed(wanted, (6, 12), side)).abs().max() < 1e-12


@pytest.mark.parametrize("side", [2, 3])
def test_all_lo_heads_is_attention_to_averages(side: int) -> None:
    module, x = hilo((6, 12), 3, side), tokens((6, 12))
    reference = torchs_attention(3, [module.l_q, module.l_kv], module.l_proj)
    pooled = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (6, 12)), side)
    averages = pooled.flatten(2).transpose(1, 2)
    assert (module(x) - reference(x, averages, averages)[0]).abs().max() < 1e-12


def test_hifi_follows_its_windows() -> None:
    grid, side = (4, 6), 2
    module, x = hilo(grid, 1, side), tokens(grid)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = unwindowed(windowed(x, grid, side)[:, order], grid, side)
    wanted = unwindowed(windowed(module.hifi(x), grid, side)[:, order], grid, side)
    assert (module.hifi(moved) - wanted).abs().max() < 1e-12
    assert (module.hifi(moved) - module.hifi(x)).abs().max() > 0.1


def test_lofi_keys_forget_the_order_inside_windows() -> None:
    grid, side = (4, 6), 2
    module, x = hilo(grid, 2, side), tokens(grid)
    order = torch.tensor([2, 0, 3, 1])
    moved = unwindowed(windowed(x, grid, side)[:, :, order], grid, side)
    wanted = unwindowed(windowed(module.lofi(x), grid, side)[:, :, order], grid, side)
    assert (module.lofi(moved) - wanted).abs().max() < 1e-12  # the queries moved, and only they


@pytest.mark.parametrize("lo_heads", [0, 1, 3])
def test_a_constant_map_stays_constant(lo_heads: int) -> None:
    module = hilo((4, 6), lo_heads, 2)
    out = module(tokens((1, 1)).expand(2, 24, 12))
    assert (out - out[:, :1]).abs().max() < 1e-12
    assert out.std() > 0.1


def test_branches_stand_side_by_side() -> None:
    module, x = hilo((4, 6), 1, 2), tokens((4, 6))
    assert torch.equal(module(x), torch.cat([module.hifi(x), module.lofi(x)], dim=2))


def test_gradients_of_hilo() -> None:
    module = hilo((3, 4), 1, 2)
    assert torch.autograd.gradcheck(module, (tokens((3, 4), count=1).requires_grad_(),))


# FFN and merging


@pytest.mark.parametrize("grid", GRIDS)
def test_conv_ffn_pixel_by_pixel(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = ConvFFN(width=12, grid=grid, ffn_dim=5)
    randomised(module).double()
    x = tokens(grid, count=1)
    hidden = x[0] @ module.fc1.weight.T + module.fc1.bias
    rows, columns = grid
    out = torch.zeros_like(x[0])
    for r in range(rows):
        for c in range(columns):
            seen = module.dwconv.bias.clone()
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    if 0 <= r + i < rows and 0 <= c + j < columns:
                        weights = module.dwconv.weight[:, 0, i + 1, j + 1]
                        seen = seen + weights * hidden[(r + i) * columns + c + j]
            gelu = seen * (1 + torch.erf(seen / math.sqrt(2))) / 2
            out[r * columns + c] = module.fc2.weight @ gelu + module.fc2.bias
    assert out.std() > 0.1
    assert (module(x)[0] - out).abs().max() < 1e-12


MAPS = [(8, 6), (7, 6), (5, 9), (2, 2), (2, 3)]


def merging(grid: tuple[int, int], *, deformable: bool) -> ConvMerging:
    torch.manual_seed(0)
    return ConvMerging(shape=FeatureShape(3, *grid), width_out=4, deformable=deformable).eval()


def sampled_by_hand(x: Tensor, y: float, z: float) -> Tensor:
    """The channels of a map (C, H, W) at row y, column z, between pixels; zero outside."""
    out = torch.zeros_like(x[:, 0, 0])
    for r in (math.floor(y), math.floor(y) + 1):
        for c in (math.floor(z), math.floor(z) + 1):
            if 0 <= r < x.shape[1] and 0 <= c < x.shape[2]:
                out += (1 - abs(y - r)) * (1 - abs(z - c)) * x[:, r, c]
    return out


@pytest.mark.parametrize("reach", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("grid", MAPS)
def test_deformable_merging_tap_by_tap(grid: tuple[int, int], reach: float) -> None:
    x = torch.randn(3, *grid, generator=torch.Generator().manual_seed(1)).double()
    module = merging(grid, deformable=True)
    randomised(module).double()
    assert module.offset is not None
    with torch.no_grad():
        module.offset.weight *= reach
        module.offset.bias *= reach
        got = module(x[None])[0]
        offsets = F.conv2d(x[None], module.offset.weight, module.offset.bias, stride=2)[0]
    assert got.shape == (4, grid[0] // 2, grid[1] // 2)
    assert offsets.abs().max() > reach / 3
    made = torch.zeros_like(got)
    for r in range(grid[0] // 2):
        for c in range(grid[1] // 2):
            made[:, r, c] = module.conv.bias.detach()
            for tap, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
                down, right = offsets[2 * tap : 2 * tap + 2, r, c].tolist()
                seen = sampled_by_hand(x, 2 * r + i + down, 2 * c + j + right)
                made[:, r, c] += module.conv.weight.detach()[:, :, i, j] @ seen
    with torch.no_grad():
        wanted = F.gelu(module.bn(made[None]))[0]
    assert (got - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("grid", [*MAPS, (56, 56)])
def test_merging_starts_as_a_plain_convolution(grid: tuple[int, int]) -> None:
    plain, moving = merging(grid, deformable=False), merging(grid, deformable=True)
    moving.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (plain(x) - moving(x)).abs().max() < 1e-4  # places are rounded in fp32
        x, plain, moving = x.double(), plain.double(), moving.double()
        assert (plain(x) - moving(x)).abs().max() < 1e-12
        wanted = F.conv2d(x, plain.conv.weight, plain.conv.bias, stride=2)
        assert (plain(x) - F.gelu(plain.bn(wanted))).abs().max() < 1e-12


# Networks


@pytest.mark.parametrize("deformable", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (76, 100)])
def test_folding_changes_nothing(size: tuple[int, int], deformable: bool) -> None:
    network = randomised(build(litv2_architecture(size, deformable=deformable)))
    folded = fold(network)
    x = images(size)
    with torch.inference_mode():
        wanted, got = network.eval()(x), folded(x)
        assert wanted.std() > 0.1
        assert (got - wanted).abs().max() < 1e-5
        assert torch.equal(fold(folded)(x), got)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())


@pytest.mark.parametrize("deformable", [False, True])
def test_everything_is_trained(deformable: bool) -> None:
    network = randomised(build(litv2_architecture((72, 88), deformable=deformable)))
    network(images((72, 88))).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all(), name
        if not name.endswith("downsample.conv.bias"):  # BatchNorm takes the mean away
            assert parameter.grad.abs().max() > 0, name


def test_starts_as_the_released_code() -> None:
    state = build(get("litv2_s").architecture).state_dict()
    weights = state["stages.2.blocks.0.mlp.dwconv.weight"]
    assert weights.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert state["stages.2.blocks.0.attn.l_kv.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    names = ("h_qkv", "h_proj", "l_q", "l_kv", "l_proj")
    zero = [f"stages.2.blocks.0.attn.{name}.bias" for name in names]
    assert not any(state[name].any() for name in [*zero, "stages.0.blocks.0.mlp.dwconv.bias"])


@pytest.mark.parametrize("size", [(64, 96), (100, 76)])
def test_feature_maps(size: tuple[int, int]) -> None:
    network = build_features(litv2_architecture(size)).eval()
    with torch.no_grad():
        maps = network(images(size))
    sides = [tuple(side // 4 // 2**i for side in size) for i in range(4)]
    assert [out.shape for out in maps] == [
        (2, width, *side) for width, side in zip((8, 16, 24, 32), sides, strict=True)
    ]


def test_weights_fit_every_resolution() -> None:
    source = litv2_architecture((64, 64), deformable=True)
    state = build(source).state_dict()
    adapted = adapt_state_dict(state, source=source, target=source.with_resolution((80, 112)))
    assert all(adapted[name] is state[name] for name in state)
    build(source.with_resolution((80, 112))).load_state_dict(adapted)


@pytest.mark.parametrize("deformable", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (76, 100)])
def test_exports(size: tuple[int, int], deformable: bool, tmp_path: Path) -> None:
    network = randomised(build(litv2_architecture(size, deformable=deformable))).eval()
    x = images(size)
    folded = fold(network)
    file = tmp_path / "litv2.onnx"
    assert export_onnx(folded, x, file, reference=network, dynamic_batch=True) < 1e-4
    pytest.importorskip("openvino")
    from slimnas.runtimes.openvino_export import export_openvino

    assert export_openvino(folded, x, tmp_path / "litv2.xml", reference=network) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("deformable", [False, True])
def test_exports_a_published_model(deformable: bool, tmp_path: Path) -> None:
    architecture = varied(get("litv2_s").architecture, deformable=deformable)
    network = randomised(build(architecture)).eval()
    x = images((224, 224), count=1)
    file = tmp_path / "litv2.onnx"
    assert export_onnx(fold(network), x, file, reference=network) < 1e-4


class Axes(TorchDispatchMode):
    """Remembers the largest number of axes of any tensor made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.most = max(self.most, out.dim())
        return out


def test_no_tensor_has_five_axes() -> None:
    network = build(litv2_architecture((76, 100), deformable=True)).eval()
    with torch.no_grad(), Axes() as axes:
        network(images((76, 100)))
    assert axes.most == 4


def test_another_image_size_is_refused() -> None:
    network = build(litv2_architecture((64, 64)))
    with pytest.raises(InputSizeError, match=r"built for 64x64 images, got 32x64"):
        network(torch.zeros(1, 3, 32, 64))
    with pytest.raises(InputSizeError, match=r"built for 4x6 = 24 tokens, got 25"):
        hilo((4, 6), 1, 2)(torch.zeros(1, 25, 12, dtype=torch.float64))
