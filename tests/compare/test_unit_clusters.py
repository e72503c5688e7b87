"""Joint clusters of two networks' units: planted groups are found, and spans judged."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from scipy.sparse.csgraph import laplacian
from sklearn.cluster import AgglomerativeClustering, SpectralClustering
from sklearn.linear_model import LinearRegression
from sklearn.metrics import adjusted_rand_score

from etude.compare import cluster_units
from etude.core.checks import InputError
from etude.core.matching import correlation


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(groups=8, dimension=3, samples=20_000, sizes_a=None, sizes_b=None, seed=0):
    """Latent subspaces of positive sources, each mixed anew into the units of either network."""
    tables, truth = ([], []), ([], [])
    for group in range(groups):
        latent = normal(samples, dimension, seed=100 * seed + group)
        for net, sizes in enumerate((sizes_a, sizes_b)):
            count = dimension if sizes is None else sizes[group]
            # Rows of positive mixtures: within a group all correlations are positive.
            weights = normal(dimension, count, seed=1000 + 100 * seed + 2 * group + net).abs() + 0.1
            tables[net].append(latent @ weights)
            truth[net].extend([group] * count)
    return [torch.cat(each, 1) for each in tables], [np.array(each) for each in truth]


def blocks(a, b):
    return correlation(a, a), correlation(a, b), correlation(b, b)


@pytest.mark.parametrize("method", ["spectral", "agglomerative"])
def test_planted_groups_are_found_though_no_axes_are_shared(method):
    (a, b), (truth_a, truth_b) = planted()
    found = cluster_units(*blocks(a, b), 8, method=method)
    labels = np.concatenate([found.labels_a, found.labels_b])
    assert adjusted_rand_score(np.concatenate([truth_a, truth_b]), labels) > 0.95
    assert found.sizes.tolist() == [[3, 3]] * 8
    assert (found.group_r2 > 0.99).all()
    if method == "spectral":
        assert found.eigengap() == 8


def test_agrees_with_scikit_learns_spectral_clustering():
    (a, b), _ = planted(6, sizes_a=[2, 3, 4, 2, 3, 4], sizes_b=[3, 2, 4, 4, 2, 2])
    a, b = a + 0.5 * normal(*a.shape, seed=7), b + 0.5 * normal(*b.shape, seed=8)
    found = cluster_units(*blocks(a, b), 6)
    affinity = np.clip(np.corrcoef(torch.cat([a, b], 1).T), 0, None)
    np.fill_diagonal(affinity, 0)
    np.testing.assert_allclose(found.affinity, affinity, atol=1e-9)
    peer = SpectralClustering(6, affinity="precomputed", random_state=0).fit(affinity)
    assert adjusted_rand_score(peer.labels_, np.concatenate([found.labels_a, found.labels_b])) > 0.99
    exact = np.linalg.eigvalsh(laplacian(affinity, normed=True))
    np.testing.assert_allclose(found.eigenvalues, exact, atol=1e-9)


def test_agrees_with_scikit_learns_average_linkage():
    a, b = normal(500, 9) @ normal(9, 9, seed=1), normal(500, 9) @ normal(9, 7, seed=2)
    found = cluster_units(*blocks(a, b), 5, method="agglomerative")
    distance = 1 - found.affinity.numpy()
    np.fill_diagonal(distance, 0)
    peer = AgglomerativeClustering(5, metric="precomputed", linkage="average").fit(distance)
    assert adjusted_rand_score(peer.labels_, np.concatenate([found.labels_a, found.labels_b])) == 1
    assert found.tree.shape == (15, 4)
    assert found.eigenvalues is None
    # Each merge joins the two clusters of greatest mean affinity: its height says how great.
    assert found.tree[0, 2].item() == pytest.approx(1 - found.affinity.max().item())


def test_separate_blocks_have_as_many_zero_eigenvalues():
    within = torch.block_diag(*[torch.full((3, 3), 0.6, dtype=torch.float64)] * 8).fill_diagonal_(1)
    between = torch.block_diag(*[torch.full((3, 3), 0.5, dtype=torch.float64)] * 8)
    found = cluster_units(within, between, within, 8)
    assert (found.eigenvalues[:8].abs() < 1e-9).all()
    assert found.eigenvalues[8] > 0.5
    assert found.eigengap() == 8
    assert (found.best_pair == 0.5).all()


def test_groups_of_unequal_size_predict_each_other_as_regression_says():
    (a, b), _ = planted(4, dimension=2, sizes_a=[2, 2, 3, 1], sizes_b=[3, 2, 2, 2])
    b = b + 0.3 * normal(*b.shape, seed=9)
    found = cluster_units(*blocks(a, b), 4)
    assert sorted(found.sizes.tolist()) == [[1, 2], [2, 2], [2, 3], [3, 2]]
    assert found.unequal.sum() == 3
    assert found.mixed.all()
    for index in range(4):
        first, second = a[:, found.labels_a == index].numpy(), b[:, found.labels_b == index].numpy()

        def mean_r2(x, y):
            return np.mean([LinearRegression().fit(x, y[:, j]).score(x, y[:, j]) for j in range(y.shape[1])])

        forward, backward = mean_r2(first, second), mean_r2(second, first)
        assert found.r2_forward[index].item() == pytest.approx(forward, abs=1e-6)
        assert found.r2_backward[index].item() == pytest.approx(backward, abs=1e-6)
        n, m = found.sizes[index].tolist()
        assert found.group_r2[index].item() == pytest.approx((forward * m + backward * n) / (n + m), abs=1e-6)
        assert found.best_pair[index].item() == pytest.approx(np.corrcoef(first.T, second.T)[:n, n:].max(), abs=1e-9)


def test_shared_spans_are_groups_and_not_pairs():
    # Three latent directions, in the second network rotated away from the axes: no pair above .7, R2 = 1.
    latent = normal(20_000, 3) + 0.8 * normal(20_000, 1, seed=1)
    turn = torch.tensor([[2.0, 2.0, -1.0], [-1.0, 2.0, 2.0], [2.0, -1.0, 2.0]], dtype=torch.float64) / 3
    other = normal(20_000, 1, seed=2)  # a unit that both have
    a, b = torch.cat([normal(20_000, 3), other], 1), torch.cat([normal(20_000, 3) @ turn, other], 1)
    del latent
    found = cluster_units(*blocks(a, b), 2)
    assert sorted(found.sizes.tolist()) == [[1, 1], [3, 3]]
    (index,) = found.shared_spans().tolist()
    assert found.sizes[index].tolist() == [3, 3]
    assert found.group_r2[index] > 0.999
    assert found.best_pair[index] < 0.7
    assert "3 + 3 units, R2 1.00, best pair 0.6" in found.summary()
    assert "2 clusters, 2 with units of both networks, 0 of them of unequal size" in found.summary()


@pytest.mark.parametrize("method", ["spectral", "agglomerative"])
def test_dead_and_unrelated_units_join_no_cluster(method):
    (a, b), _ = planted(3)
    within_a, between, within_b = blocks(a, b)
    within_a[4], within_a[:, 4], between[4] = (torch.nan,) * 3
    for values in (between[:, 0], within_b[0], within_b[:, 0]):
        values.copy_(-values.abs())  # correlates positively with nothing
    within_b[0, 0] = 1
    found = cluster_units(within_a, between, within_b, 3, method=method)
    assert (found.labels_a < 0).nonzero().flatten().tolist() == [4]
    assert (found.labels_b < 0).nonzero().flatten().tolist() == [0]
    assert found.sizes.sum().item() == 16
    assert "1 + 1 units in none" in found.summary()


def test_clusters_of_one_network_have_no_shared_span():
    alone = torch.block_diag(torch.full((3, 3), 0.9), torch.full((3, 3), 0.9)).fill_diagonal_(1)
    found = cluster_units(alone, torch.zeros(6, 3), torch.full((3, 3), 0.9).fill_diagonal_(1), 3)
    assert not found.mixed.any()
    assert found.group_r2.isnan().all()
    assert found.best_pair.isnan().all()
    assert len(found.shared_spans()) == 0


def test_the_generator_decides_and_repeats():
    a, b = normal(300, 20), normal(300, 20, seed=1)
    runs = [cluster_units(*blocks(a, b), 6, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(runs[0].labels_a, runs[1].labels_a)
    assert torch.equal(cluster_units(*blocks(a, b), 6).labels_b, cluster_units(*blocks(a, b), 6).labels_b)


def test_plot_orders_units_by_cluster():
    (a, b), _ = planted(4)
    found = cluster_units(*blocks(a, b), 4)
    image = found.plot().images[0].get_array()
    inside = torch.block_diag(*[torch.ones(6, 6)] * 4).bool().numpy()
    assert image[inside].mean() > 5 * image[~inside].mean()
    plt.close("all")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.eye(2), torch.ones(2, 2) / 2, torch.eye(2), 0), {}, "clusters: got 0"),
        ((torch.eye(2), torch.ones(2, 2) / 2, torch.eye(2), 5), {}, "give at most 4"),
        ((torch.eye(2), torch.zeros(2, 2), torch.eye(2), 1), {}, "give at most 0"),
        ((torch.eye(2), torch.ones(3, 2) / 2, torch.eye(2), 1), {}, r"give \(n, n\), \(n, m\) and \(m, m\)"),
        ((torch.eye(2), torch.ones(2, 2) * 2, torch.eye(2), 1), {}, "between: holds 2; give correlations"),
        ((torch.eye(2), torch.ones(2, 2) / 2, torch.eye(2), 1), {"method": "dbscan"}, "method: got 'dbscan'"),
    ],
)
def test_unusable_input_is_refused(arguments, options, message):
    with pytest.raises(InputError, match=message):
        cluster_units(*arguments, **options)


def test_an_eigengap_needs_eigenvalues():
    (a, b), _ = planted(3)
    with pytest.raises(InputError, match="cluster with method"):
        cluster_units(*blocks(a, b), 3, method="agglomerative").eigengap()
    with pytest.raises(InputError, match="most: got 1"):
        cluster_units(*blocks(a, b), 3).eigengap(1)
