"""Choices and mixtures against their formulas, written out again in NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from supernet_cases import CLASSES, images, micro_supernet
from torch.nn.functional import cross_entropy

from slimnas.arch.space import IDENTITY
from slimnas.nn.layout import as_layout, run_module
from slimnas.supernet.gumbel import draw_noise, draw_route, straight_through, temperature
from slimnas.supernet.supernet import Supernet

ALPHAS = ((0.0, 0.0), (1.0, -0.5, 0.3), (-2.0, 0.0, 2.0, 1.0))
TAUS = (0.5, 1.0, 4.0)
DRAWS = 3000
TOO_RARE = 1e-4
NOISES = ("gumbel", "uniform")


def numpy_softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def counts(alpha: tuple[float, ...], tau: float, noise: str) -> np.ndarray:
    generator = torch.Generator().manual_seed(11)
    parameters = torch.tensor(alpha)
    routes = [
        draw_route(parameters, tau, mixing="sampled", noise=noise, generator=generator)
        for _ in range(DRAWS)
    ]
    return np.bincount([route.index for route in routes], minlength=len(alpha))


def numpy_noise(size: int, noise: str, generator: torch.Generator) -> np.ndarray:
    """The noise of the next draw, from the same uniform numbers."""
    uniform = torch.rand(size, generator=generator, dtype=torch.float64).numpy()
    return uniform if noise == "uniform" else -np.log(-np.log(uniform))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tau", TAUS)
def test_gumbel_choices_are_as_frequent_as_the_softmax(
    alpha: tuple[float, ...], tau: float
) -> None:
    expected = DRAWS * numpy_softmax(np.array(alpha) / tau)
    assert chisquare(counts(alpha, tau, "gumbel"), expected).pvalue > TOO_RARE


@pytest.mark.parametrize("alpha", ALPHAS[:2])
@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_uniform_choices_are_as_frequent_as_the_mixture_averaged_over_the_noise(
    alpha: tuple[float, ...], tau: float
) -> None:
    # Gauss-Legendre over the cube of noises.
    points, weights = np.polynomial.legendre.leggauss(24)
    points, weights = (points + 1) / 2, weights / 2
    size = len(alpha)
    noises = np.array(list(itertools.product(points, repeat=size)))
    volumes = np.array([np.prod(w) for w in itertools.product(weights, repeat=size)])
    mean = volumes @ numpy_softmax((np.array(alpha) + noises) / tau)
    assert mean.sum() == pytest.approx(1.0)
    assert chisquare(counts(alpha, tau, "uniform"), DRAWS * mean).pvalue > TOO_RARE


def test_another_temperature_would_be_noticed() -> None:
    expected = DRAWS * numpy_softmax(np.array(ALPHAS[1]) / 1.3)
    assert chisquare(counts(ALPHAS[1], 1.0, "gumbel"), expected).pvalue < TOO_RARE


@pytest.mark.parametrize(("noise", "law"), [("gumbel", "gumbel_r"), ("uniform", "uniform")])
def test_noise_has_its_law(noise: str, law: str) -> None:
    drawn = draw_noise(4000, noise, torch.Generator().manual_seed(3)).numpy()
    assert kstest(drawn, law).pvalue > TOO_RARE
    assert np.isfinite(drawn).all()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("tau", TAUS)
def test_soft_weights_are_the_formula(noise: str, tau: float) -> None:
    alpha = torch.tensor(ALPHAS[2])
    route = draw_route(
        alpha, tau, mixing="soft", noise=noise, generator=torch.Generator().manual_seed(5)
    )
    drawn = numpy_noise(len(alpha), noise, torch.Generator().manual_seed(5))
    assert route.index is None
    assert route.weights is not None
    np.testing.assert_allclose(
        route.weights.numpy(), numpy_softmax((alpha.numpy() + drawn) / tau), atol=1e-6
    )


def soft_by_hand(
    supernet: Supernet, batch: torch.Tensor, tau: float, noise: str, generator: torch.Generator
) -> torch.Tensor:
    x = supernet.stem(batch)
    for stage in supernet.super_stages():
        if stage.downsample is not None:
            x = stage.downsample(as_layout(x, "map", stage.shape_in))
        for slot in stage.slots:
            alpha = slot.alpha.detach().numpy()
            weights = numpy_softmax((alpha + numpy_noise(len(alpha), noise, generator)) / tau)
            total = np.zeros(x.shape)
            for choice, weight in zip(slot.choices, weights, strict=True):
                y = x if choice == IDENTITY else run_module(slot.blocks[choice], x, slot.shape)
                total += weight * as_layout(y, "map", slot.shape).numpy()
            x = torch.from_numpy(total)
    logits: torch.Tensor = supernet.head(x)
    return logits


@pytest.mark.parametrize("noise", NOISES)
@torch.no_grad()
def test_soft_supernet_is_the_mixture_by_hand(noise: str) -> None:
    supernet = micro_supernet().double()
    batch = images(dtype=torch.float64)
    routes = supernet.draw_routes(
        1.5, mixing="soft", noise=noise, generator=torch.Generator().manual_seed(9)
    )
    by_hand = soft_by_hand(supernet, batch, 1.5, noise, torch.Generator().manual_seed(9))
    # Noise is kept in single precision, so that every device draws the same.
    torch.testing.assert_close(supernet(batch, routes), by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("training", [False, True])
def test_soft_alpha_gradient_is_the_finite_difference(noise: str, training: bool) -> None:
    supernet = micro_supernet().double().train(training)
    batch, labels = images(dtype=torch.float64), torch.tensor([0, 3, 4])

    def loss() -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        routes = supernet.draw_routes(0.7, mixing="soft", noise=noise, generator=generator)
        return cross_entropy(supernet(batch, routes), labels)

    loss().backward()
    step, looked_at = 1e-5, 0
    for path in supernet.meta_paths():
        assert path.alpha.grad is not None
        for index in range(len(path.choices)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    path.alpha[index] += sign * step
                    values.append(loss().item())
                    path.alpha[index] -= sign * step
            difference = (values[0] - values[1]) / (2 * step)
            assert path.alpha.grad[index].item() == pytest.approx(difference, rel=1e-4, abs=1e-8)
            looked_at += 1
    assert looked_at == 2 * 2 + 2 + 3 * 3 + 2 * 3


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gradient", ["output", "change"])
def test_sampled_alpha_gradient_is_output_times_its_gradient(
    noise: str, seed: int, gradient: str
) -> None:
    """Or, with `change`, what the choice adds to its input times the gradient."""
    supernet = micro_supernet().double()
    batch, labels, tau = images(dtype=torch.float64), torch.tensor([1, 0, 2]), 0.8
    routes = supernet.draw_routes(
        tau,
        mixing="sampled",
        noise=noise,
        generator=torch.Generator().manual_seed(seed),
        gradient=gradient,
    )
    cross_entropy(supernet(batch, routes), labels).backward()
    assert all(route.index is not None for route in routes)

    # The same path without gates, watched at the output of each slot.
    outputs: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []
    for path in supernet.meta_paths():
        path.register_forward_hook(lambda _m, given, out: outputs.append(out))
        path.register_forward_hook(lambda _m, given, out: inputs.append(given[0]))
    bare = [type(route)(route.index, None) for route in routes]
    gradients = torch.autograd.grad(cross_entropy(supernet(batch, bare), labels), outputs)
    of_change = gradient == "change"

    generator = torch.Generator().manual_seed(seed)
    for path, route, x, y, dy in zip(
        supernet.meta_paths(), routes, inputs, outputs, gradients, strict=True
    ):
        alpha = path.alpha.detach().numpy()
        drawn = numpy_noise(len(alpha), noise, generator)
        if noise == "uniform":
            w = numpy_softmax((alpha + drawn) / tau)
            torch.multinomial(torch.tensor(w, dtype=torch.float64), 1, generator=generator)
        else:
            w = numpy_softmax(alpha / tau + drawn)
            assert route.index == int(np.argmax(alpha / tau + drawn))
        chosen = route.index
        assert chosen is not None
        jacobian = w[chosen] * ((np.arange(len(w)) == chosen) - w) / tau
        if of_change and path.choices[chosen] == IDENTITY:
            assert path.alpha.grad is None
            continue
        y, dy = (as_layout(tensor, "map", path.shape) for tensor in (y, dy))
        passed = as_layout(x, "map", path.shape) if of_change else torch.zeros(())
        expected = (dy * (y - passed)).sum().item() * jacobian
        assert path.alpha.grad is not None
        np.testing.assert_allclose(path.alpha.grad.numpy(), expected, rtol=1e-4, atol=1e-9)


def test_straight_through_keeps_value_and_gradient_of_the_output() -> None:
    output = torch.randn(2, CLASSES, requires_grad=True, dtype=torch.float64)
    weight = torch.tensor(0.3, requires_grad=True, dtype=torch.float64)
    factor = torch.randn(2, CLASSES, dtype=torch.float64)
    gated = straight_through(output, weight)
    assert torch.equal(gated, output)
    (gated * factor).sum().backward()
    assert output.grad is not None
    assert torch.equal(output.grad, factor)
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx((factor * output).sum().item())


def test_temperature_falls_from_start_to_end_by_equal_factors() -> None:
    taus = [temperature(p, 4.0, 0.5) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert taus[0] == 4.0
    assert taus[-1] == pytest.approx(0.5)
    factors = [b / a for a, b in itertools.pairwise(taus)]
    assert factors == pytest.approx([factors[0]] * 4)
    assert factors[0] < 1


@pytest.mark.parametrize("mixing", ["sampled", "soft"])
@pytest.mark.parametrize("noise", NOISES)
def test_routes_follow_the_generator(mixing: str, noise: str) -> None:
    supernet = micro_supernet()

    def draw(seed: int) -> list[tuple[int | None, list[float]]]:
        generator = torch.Generator().manual_seed(seed)
        routes = supernet.draw_routes(2.0, mixing=mixing, noise=noise, generator=generator)
        return [(r.index, [] if r.weights is None else r.weights.tolist()) for r in routes]

    assert len(draw(0)) == 8
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
