"""Attention, folding and resizing against written-out arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from slimnas.errors import InputSizeError, WeightsError
from slimnas.nn.build import build
from slimnas.nn.efficientformer import MB3D, MB4D, Attention, PoolMixer, offset_index
from slimnas.nn.fold import fold
from slimnas.nn.resolution import adapt_state_dict, resize_attention_bias
from slimnas.zoo.registry import get


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and statistic that starts at a constant away from it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.copy_(torch.randn(part.num_features, generator=generator) * 0.3)
                part.running_var.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            elif parameter.dim() == 2 and not parameter.any():
                parameter.add_(noise)
    return module


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (4, 1)])
def test_attention_written_out(grid: tuple[int, int]) -> None:
    rows, columns = grid
    attention = randomise(Attention(width=6, grid=grid, heads=2, qk_dim=3, v_dim=4)).double()
    x = torch.randn(1, rows * columns, 6, dtype=torch.double)
    qkv = x[0] @ attention.qkv.weight.T + attention.qkv.bias
    positions = [(y, x_) for y in range(rows) for x_ in range(columns)]
    mixed = torch.zeros(rows * columns, 8, dtype=torch.double)
    for head in range(2):
        mine = qkv[:, head * 10 : head * 10 + 10]
        q, k, v = mine[:, :3], mine[:, 3:6], mine[:, 6:]
        for i, (y1, x1) in enumerate(positions):
            logits = torch.stack(
                [
                    q[i] @ k[j] / math.sqrt(3)
                    + attention.attention_biases[head, abs(y1 - y2) * columns + abs(x1 - x2)]
                    for j, (y2, x2) in enumerate(positions)
                ]
            )
            mixed[i, head * 4 : head * 4 + 4] = logits.softmax(0) @ v
    expected = mixed @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x)[0], expected)


def test_offset_index_reaches_the_whole_table() -> None:
    index = offset_index(3, 5)
    assert index.shape == (15, 15)
    assert set(index.unique().tolist()) == set(range(15))
    assert torch.equal(index, index.T)


def test_the_bias_index_is_no_weight() -> None:
    names = set(Attention(width=4, grid=(2, 2), heads=1, qk_dim=2, v_dim=2).state_dict())
    assert names == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "attention_biases"}


def test_attention_names_the_grid_it_was_built_for() -> None:
    attention = Attention(width=4, grid=(2, 3), heads=1, qk_dim=2, v_dim=2)
    with pytest.raises(InputSizeError, match="built for 2x3 = 6 tokens, got 4"):
        attention(torch.zeros(1, 4, 4))


def test_pool_mixer_averages_over_what_lies_inside() -> None:
    x = torch.randn(1, 2, 3, 4, dtype=torch.double)
    out = PoolMixer()(x)
    for row in range(3):
        for column in range(4):
            patch = x[0, :, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            expected = patch.mean(dim=(1, 2)) - x[0, :, row, column]
            torch.testing.assert_close(out[0, :, row, column], expected)


@pytest.mark.parametrize("resolution", [64, (64, 96)], ids=["square", "unequal sides"])
def test_folding_changes_nothing(resolution: int | tuple[int, int]) -> None:
    architecture = get("efficientformer_l1").architecture.with_resolution(resolution)
    network = randomise(build(architecture))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold(network)
    assert network.training
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())

    shape = architecture.input.shape
    x = torch.randn(2, 3, shape.height, shape.width, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, got = network.eval()(x), folded(x)
    assert expected.std() > 0.1
    assert (got - expected).abs().max() < 1e-5
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    scales = [name for name, _ in folded.named_parameters() if name.endswith("gamma")]
    assert len(scales) == 14  # the pooling branch of MB4D has no linear map to take it
    assert not [name for name, _ in folded.named_parameters() if "head_dist" in name]
    with torch.inference_mode():
        assert torch.equal(fold(folded)(x), got)


@pytest.mark.parametrize("kind", ["mb4d", "mb3d"])
def test_folding_one_block(kind: str) -> None:
    block: nn.Module
    if kind == "mb4d":
        block, x = MB4D(width=6, ffn_dim=10), torch.randn(2, 6, 5, 4)
    else:
        block = MB3D(width=6, grid=(5, 4), heads=2, qk_dim=3, v_dim=4, ffn_dim=9)
        x = torch.randn(2, 20, 6)
    randomise(block)
    with torch.inference_mode():
        torch.testing.assert_close(fold(block)(x), block.eval()(x))


def test_same_grid_keeps_the_table() -> None:
    table = torch.randn(3, 28)
    assert torch.equal(resize_attention_bias(table, (4, 7), (4, 7)), table)


@pytest.mark.parametrize(
    ("grid", "new_grid"),
    [((7, 7), (14, 14)), ((7, 7), (5, 5)), ((4, 7), (8, 3)), ((1, 6), (1, 12)), ((1, 1), (2, 3))],
)
def test_zero_and_largest_offsets_stay(grid: tuple[int, int], new_grid: tuple[int, int]) -> None:
    table = torch.randn(2, grid[0] * grid[1])
    resized = resize_attention_bias(table, grid, new_grid)
    assert resized.shape == (2, new_grid[0] * new_grid[1])
    torch.testing.assert_close(resized[:, 0], table[:, 0])
    torch.testing.assert_close(resized[:, -1], table[:, -1])


def smooth_table(rows: int, columns: int) -> Tensor:
    y = torch.linspace(0, 1, rows)[:, None]
    x = torch.linspace(0, 1, columns)
    return torch.stack([1 - y**2 - 0.5 * x**2, torch.cos(2 * y) * torch.cos(x)]).flatten(1)


@pytest.mark.parametrize("new_grid", [(14, 14), (10, 20), (8, 8)])
def test_a_smooth_table_keeps_its_shape(new_grid: tuple[int, int]) -> None:
    resized = resize_attention_bias(smooth_table(7, 9), (7, 9), new_grid)
    expected = smooth_table(*new_grid)
    error = (resized - expected).abs().view(2, *new_grid)
    # Beyond the largest offset there is nothing to interpolate from, so the rim is rougher.
    assert error[:, : new_grid[0] // 2, : new_grid[1] // 2].max() < 0.02
    assert error.max() < 0.05
    assert expected.max() - expected.min() > 1


def test_adapted_weights_build_and_keep_everything_else() -> None:
    source = get("efficientformer_l1").architecture
    target = source.with_resolution((192, 256))
    state = randomise(build(source)).state_dict()
    adapted = adapt_state_dict(state, source=source, target=target)
    network = build(target)
    network.load_state_dict(adapted)
    changed = [name for name in state if adapted[name] is not state[name]]
    assert changed == ["stages.3.blocks.3.token_mixer.attention_biases"]
    assert adapted[changed[0]].shape == (8, 6 * 8)
    back = adapt_state_dict(state, source=source, target=source)
    assert all(back[name] is state[name] for name in state)


def test_only_the_resolution_may_differ() -> None:
    source = get("efficientformer_l1").architecture
    target = get("efficientformer_l3").architecture
    with pytest.raises(WeightsError, match="must differ in input resolution only"):
        adapt_state_dict({}, source=source, target=target)
    with pytest.raises(WeightsError, match=r"attention_biases is missing"):
        adapt_state_dict({}, source=source, target=source)


def test_table_of_another_grid() -> None:
    with pytest.raises(WeightsError, match=r"4x7 grid must be \(heads, 28\), got \(2, 49\)"):
        resize_attention_bias(torch.zeros(2, 49), (4, 7), (8, 8))
