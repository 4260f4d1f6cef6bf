import numpy as np
import pytest

from vitpatch.data.partners import NO_PARTNER, choose_partners
from vitpatch.types import Partner


def sample(n=300, classes=6, clusters=80, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, n), rng.integers(0, clusters, n)


@pytest.mark.parametrize("kind", [Partner.SAME_CLASS, Partner.OTHER_CLASS])
def test_a_derangement_of_another_cluster_and_the_asked_for_class(kind):
    labels, clusters = sample()
    found = choose_partners(kind, labels, clusters, seed=0)
    assert sorted(found) == list(range(len(labels)))
    assert (clusters[found] != clusters).all()
    assert ((labels[found] == labels) == (kind is Partner.SAME_CLASS)).all()
    assert (found == choose_partners(kind, labels, clusters, seed=0)).all()
    assert (found != choose_partners(kind, labels, clusters, seed=1)).mean() > 0.5


def test_who_has_no_other_cluster_of_its_class_has_no_partner():
    labels, clusters = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 2])
    found = choose_partners(Partner.SAME_CLASS, labels, clusters, seed=0)
    assert found.tolist() == [NO_PARTNER] * 3 + [4, 3]
    assert choose_partners(Partner.OTHER_CLASS, np.zeros(3, int), np.arange(3), 0).tolist() == [NO_PARTNER] * 3


def test_where_no_derangement_is_possible_some_are_partners_of_several():
    labels, clusters = np.zeros(5, dtype=int), np.array([0, 0, 0, 0, 1])
    found = choose_partners(Partner.SAME_CLASS, labels, clusters, seed=0)
    assert found[:4].tolist() == [4] * 4 and found[4] in range(4)


def test_nearest_luminance_is_what_a_loop_finds(monkeypatch):
    from vitpatch.data import partners

    labels, clusters = sample(60)
    luminance = np.random.default_rng(1).random(60)
    want = []
    for i in range(60):
        others = [j for j in range(60) if labels[j] != labels[i] and clusters[j] != clusters[i]]
        want.append(min(others, key=lambda j: abs(luminance[j] - luminance[i])))
    monkeypatch.setattr(partners, "ROWS_AT_ONCE", 7)
    assert choose_partners(Partner.NEAREST_LUMINANCE, labels, clusters, 0, luminance).tolist() == want
