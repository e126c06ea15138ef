"""What the streams of the benchmark of adaptation methods are made of."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.tta import divisor
from benchmarks.tta_models import ManyHeads
from benchmarks.tta_streams import STREAMS, interleaved, runs, spec_of


def test_runs_are_a_permutation_in_which_classes_follow_themselves() -> None:
    labels = np.repeat(np.arange(5), 40)
    stays = []
    for gamma in (0.05, 50.0):
        order = runs(labels, gamma, np.random.default_rng(0))
        assert sorted(order.tolist()) == list(range(200))
        stays.append(sum(int(a == b) for a, b in pairwise(labels[order].tolist())))
    assert stays[0] > stays[1] > 100


def test_mixed_domains_keep_the_order_inside_each() -> None:
    domain = np.repeat(np.arange(3), 10)
    order = interleaved(domain, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(30))
    mixed = domain[order]
    assert sum(int(a != b) for a, b in pairwise(mixed.tolist())) > 5
    for one in range(3):
        inside = order[mixed == one].tolist()
        assert inside == sorted(inside)


def test_a_stream_is_named_with_changes() -> None:
    spec = spec_of("iid:severity=3,gamma=0.5", seed=4, per_class=7, batch_size=16)
    assert (spec.iid, spec.severity, spec.gamma, spec.seed, spec.per_class, spec.batch_size) == (True, 3, 0.5, 4, 7, 16)
    assert spec_of("single", 0, None, 64).batch_size == 1
    with pytest.raises(ValueError, match="there is no stream 'idd'"):
        spec_of("idd", 0, None, None)
    with pytest.raises(ValueError, match="no 'sevrity'"):
        spec_of("iid:sevrity=3", 0, None, None)
    assert STREAMS["recurring20"].visits == 20


def test_dear_methods_get_fewer_images_by_powers_of_two() -> None:
    assert [divisor("iid", "tent", share) for share in (1.0, 0.5, 0.1)] == [1, 2, 8]
    assert [divisor("correlated", "tent", share) for share in (0.5, 0.125, 0.06)] == [1, 1, 4]
    assert divisor("iid", "auto", 0.1) == 1


def test_a_model_of_many_sources_answers_with_the_mean_of_its_heads() -> None:
    model = ManyHeads(torch.nn.Identity(), 2, 3, 4)
    x = torch.randn(5, 2)
    heads = [head(x) for head in model.heads]
    torch.testing.assert_close(model(x), (heads[0] + heads[1] + heads[2]) / 3)
    assert len(heads) == 3
    assert all(head.shape == (5, 4) for head in heads)
