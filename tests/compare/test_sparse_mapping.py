"""Sparse maps between networks: closed forms, optimality conditions, and scikit-learn's Lasso."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from sklearn.linear_model import Lasso

from etude.compare import mapping, sparse_mapping
from etude.core.checks import InputError
from etude.core.matching import correlation

PAPER = [0, 1e-5, 1e-4, 1e-3, 10**-2.8, 10**-2.6, 10**-2.4, 1e-2]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tables(samples=600, sources=20, targets=15, seed=0):
    latent = normal(samples, 10, seed=seed)
    x = (latent @ normal(10, sources, seed=1) + 0.3 * normal(samples, sources, seed=seed + 2)).relu()
    y = (latent @ normal(10, targets, seed=3) + 0.5 * normal(samples, targets, seed=seed + 4)).relu()
    return x, y


def standard(table):
    return (table - table.mean(0)) / table.std(0, correction=0)


def test_agrees_with_scikit_learns_lasso_along_the_papers_path():
    x, y = tables()
    path = sparse_mapping(correlation(x, x), correlation(x, y), PAPER)
    inputs, targets = standard(x).numpy(), standard(y).numpy()
    for row, penalty in enumerate(PAPER):
        if penalty == 0:
            coefficients = np.linalg.lstsq(inputs, targets, rcond=None)[0].T
        else:
            lasso = Lasso(alpha=15 * penalty, fit_intercept=False, tol=1e-12, max_iter=100_000)
            coefficients = np.stack([lasso.fit(inputs, targets[:, j]).coef_ for j in range(15)])
        np.testing.assert_allclose(path.weights[row], coefficients, atol=2e-4)
        losses = ((targets - inputs @ coefficients.T) ** 2).mean(0) / 2
        np.testing.assert_allclose(path.loss[row], losses, atol=1e-6)
        assert path.strengths[row] == pytest.approx(15 * penalty)


def test_one_source_has_a_closed_form():
    within = torch.ones(1, 1, dtype=torch.float64)
    between = torch.tensor([[0.9, -0.6, 0.1, 0.0]], dtype=torch.float64)
    path = sparse_mapping(within, between, [0.0, 0.05, 0.2])
    for row, alpha in enumerate([0.0, 0.2, 0.8]):
        expected = between.sign() * (between.abs() - alpha).clamp(min=0)
        torch.testing.assert_close(path.weights[row, :, 0], expected[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(path.loss[0], (1 - between[0] ** 2) / 2)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.001, 0.9), st.integers(0, 999))
def test_orthonormal_sources_are_soft_thresholded(sources, targets, alpha, seed):
    between = normal(sources, targets, seed=seed).tanh() / sources**0.5
    path = sparse_mapping(torch.eye(sources, dtype=torch.float64), between, [alpha / targets])
    expected = (between.sign() * (between.abs() - alpha).clamp(min=0)).T
    torch.testing.assert_close(path.weights[0], expected, atol=2e-4, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 25), st.integers(1, 15), st.floats(0.003, 0.5), st.integers(0, 99))
def test_the_optimality_conditions_hold(sources, targets, alpha, seed):
    x, y = tables(200, sources, targets, seed)
    within, between = correlation(x, x), correlation(x, y)
    path = sparse_mapping(within, between, [alpha / targets], tolerance=1e-11)
    weights = path.weights[0]
    slope = between.T - weights @ within  # alpha * sign where a weight is active, within +-alpha where not
    active = weights != 0
    assert (slope[active] - alpha * weights[active].sign()).abs().amax() < 1e-3 if active.any() else True
    assert slope.abs().amax() < alpha + 1e-3


def test_penalties_at_and_above_the_largest_correlation_leave_nothing():
    x, y = tables()
    between = correlation(x, y)
    largest = float(between.abs().max())
    path = sparse_mapping(correlation(x, x), between, [largest / 15, 1.0, 0.98 * largest / 15])
    assert (path.weights[:2] == 0).all()
    assert (path.loss[:2] == 0.5).all()
    assert path.active[:2].sum() == 0
    assert torch.equal(path.active[2] > 0, between.abs().amax(0) > 0.98 * largest)


def test_along_the_path_sources_drop_out_and_the_loss_rises():
    x, y = tables()
    within, between = correlation(x, x), correlation(x, y)
    path = sparse_mapping(within, between, PAPER)
    assert (path.mean_active.diff() <= 0).all()
    assert path.mean_active[0] == 20
    assert (path.loss.diff(dim=0) >= -1e-7).all()
    torch.testing.assert_close(path.r2, 1 - 2 * path.loss)
    # The order of the penalties is the caller's.
    turned = sparse_mapping(within, between, PAPER[::-1])
    torch.testing.assert_close(turned.weights.flip(0), path.weights, atol=1e-3, rtol=0)
    assert turned.penalties.tolist() == PAPER[::-1]


def test_exact_zeros_and_counts_of_noticeable_weights():
    x, y = tables()
    path = sparse_mapping(correlation(x, x), correlation(x, y), [1e-3])
    assert torch.equal(path.active, (path.weights != 0).sum(2))
    assert torch.equal(path.above(0.05), (path.weights.abs() > 0.05).sum(2))
    assert 0 < path.above()[0].sum() < path.active[0].sum() < 20 * 15


def test_a_planted_sparse_map_is_found():
    x = normal(4000, 30)
    weights = torch.zeros(6, 30, dtype=torch.float64)
    weights[torch.arange(6), torch.arange(6) * 3], weights[torch.arange(6), torch.arange(6) * 3 + 1] = 0.8, -0.6
    y = x @ weights.T + 0.05 * normal(4000, 6, seed=1)
    path = sparse_mapping(correlation(x, x), correlation(x, y), [0.1 / 6])
    assert torch.equal(path.weights[0] != 0, weights != 0)
    assert path.mean_active.item() == 2


def test_held_out_losses_are_those_of_predicting_held_out_activations():
    x, y = tables(900)
    fit, rest = slice(0, 600), slice(600, 900)
    path = sparse_mapping(correlation(x[fit], x[fit]), correlation(x[fit], y[fit]), PAPER)
    found = path.evaluate(correlation(x[rest], x[rest]), correlation(x[rest], y[rest]))
    for row in range(len(PAPER)):
        errors = standard(y[rest]) - standard(x[rest]) @ path.weights[row].T
        torch.testing.assert_close(found[row], errors.square().mean(0) / 2)
    again = path.evaluate(correlation(x[fit], x[fit]), correlation(x[fit], y[fit]))
    torch.testing.assert_close(again, path.loss)


def test_positive_affine_changes_of_the_activations_change_nothing():
    x, y = tables()
    moved = x * torch.linspace(0.1, 10, 20) + torch.linspace(-5, 5, 20)
    plain = sparse_mapping(correlation(x, x), correlation(x, y), PAPER)
    other = sparse_mapping(correlation(moved, moved), correlation(moved, y), PAPER)
    torch.testing.assert_close(plain.loss, other.loss, atol=1e-7, rtol=0)


def test_linearly_dependent_sources_and_few_samples_are_solved():
    x, y = normal(12, 20), normal(12, 15, seed=1)  # fewer samples than sources
    within, between = correlation(x, x), correlation(x, y)
    path = sparse_mapping(within, between, [0.0, 1e-3])
    assert (path.r2[0] > 1 - 1e-6).all()
    inputs, targets = standard(x).numpy(), standard(y).numpy()
    np.testing.assert_allclose(path.weights[0], np.linalg.lstsq(inputs, targets, rcond=None)[0].T, atol=1e-6)
    lasso = Lasso(alpha=15e-3, fit_intercept=False, tol=1e-10, max_iter=1_000_000)
    losses = [
        ((targets[:, j] - inputs @ lasso.fit(inputs, targets[:, j]).coef_) ** 2).mean() / 2
        + 15e-3 * np.abs(lasso.coef_).sum()
        for j in range(15)
    ]
    ours = path.loss[1] + 15e-3 * path.weights[1].abs().sum(1)
    np.testing.assert_allclose(ours, losses, atol=1e-6)


def test_dead_units_carry_no_weight_and_dead_targets_no_loss():
    x, y = tables()
    within, between = correlation(x, x), correlation(x, y)
    whole = sparse_mapping(within[2:, 2:], between[2:, 1:], PAPER)
    within[:2], within[:, :2], between[:2], between[:, 0] = (torch.nan,) * 4
    path = sparse_mapping(within, between, PAPER)
    torch.testing.assert_close(path.weights[:, 1:, 2:], whole.weights)
    assert (path.weights[:, 1:, :2] == 0).all()
    assert path.weights[:, 0].isnan().all()
    assert path.loss[:, 0].isnan().all()
    assert path.living.tolist() == [False] + [True] * 14
    assert (path.active[:, 0] == 0).all()
    torch.testing.assert_close(path.mean_loss, whole.loss.mean(1))
    torch.testing.assert_close(path.strengths, 14 * path.penalties)
    assert "1 dead targets left out" in path.summary()
    held = path.evaluate(within, between)
    assert held[:, 0].isnan().all()
    torch.testing.assert_close(held[:, 1:], whole.loss)
    within[5], within[:, 5], between[5] = (torch.nan,) * 3
    with pytest.raises(InputError, match=r"units \[0, 1, 5\] are dead here but carry weight"):
        path.evaluate(within, between)


def test_without_any_living_unit_nothing_is_predicted():
    path = sparse_mapping(torch.full((2, 2), torch.nan), torch.full((2, 3), torch.nan), [0.0, 0.1])
    assert path.loss.isnan().all()
    assert not path.living.any()


def test_an_unsolved_penalty_says_so(monkeypatch):
    monkeypatch.setattr(mapping, "STEPS", 10)
    x, y = tables()
    with pytest.warns(RuntimeWarning, match="a duality gap of .* is left at strength 0.0015 after 10 steps"):
        sparse_mapping(correlation(x, x), correlation(x, y), [1e-4])


def test_summary_and_plot_show_the_trade():
    x, y = tables()
    path = sparse_mapping(correlation(x, x), correlation(x, y), [0.0, 1e-3])
    assert "lambda 0: loss" in path.summary()
    assert "20.0 sources a target" in path.summary()
    ax = path.plot()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), path.mean_loss)
    plt.close("all")


EYE = torch.eye(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((EYE, EYE, []), "penalties: got"),
        ((EYE, EYE, [-1.0]), "penalties: got"),
        ((EYE, EYE, [float("inf")]), "penalties: got"),
        ((EYE, torch.eye(3), [0.0]), "2 sources within, 3 between"),
        ((2 * EYE, EYE, [0.0]), "within: holds 2; give correlations"),
        ((EYE, 2 * EYE, [0.0]), "between: holds 2; give correlations"),
        ((0.5 * EYE, EYE, [0.0]), "within: its diagonal is not 1"),
    ],
)
def test_unusable_input_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        sparse_mapping(*arguments)
    with pytest.raises(InputError, match="tolerance"):
        sparse_mapping(EYE, EYE, [0.0], tolerance=0.0)
    with pytest.raises(InputError, match="for weights"):
        sparse_mapping(EYE, EYE, [0.0]).evaluate(torch.eye(3), torch.eye(3))
