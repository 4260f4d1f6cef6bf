import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from scipy.stats import entropy

from vitpatch.patching.metrics import metrics, runner_up
from vitpatch.stats.result import total_effects
from vitpatch.types import Direction, Donor, Metric


def test_metrics_are_their_definitions():
    rng = np.random.default_rng(0)
    runs, clean = rng.normal(size=(4, 7, 5)) * 3, rng.normal(size=(7, 5))
    labels, rivals, others = rng.integers(0, 5, (3, 7))
    tensors = [torch.from_numpy(x) for x in (runs, labels, rivals, others, clean)]
    got = metrics(*tensors)
    for p, i in np.ndindex(4, 7):
        logits, y = runs[p, i], labels[i]
        log_probs = log_softmax(logits)
        want = {
            "prob": np.exp(log_probs[y]),
            "log_odds": logits[y] - logsumexp(np.delete(logits, y)),
            "logit": logits[y],
            "logit_diff": logits[y] - logits[rivals[i]],
            "logit_diff_other_rival": logits[y] - logits[others[i]],
            "kl": entropy(np.exp(log_softmax(clean[i])), np.exp(log_probs)),
            "pred": logits.argmax(),
        }
        assert {name: float(got[name][p, i]) for name in want} == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_log_odds_of_a_sure_answer_keep_their_size():
    logits = torch.tensor([[80.0, 0.0, 0.0]])
    got = metrics(logits, *torch.tensor([[0], [1], [2]]), logits)
    assert float(got["log_odds"]) == pytest.approx(80 - np.log(2), rel=1e-12)


def test_the_runner_up_is_never_the_label():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert runner_up(logits, torch.tensor([0, 1])).tolist() == [1, 0]


def test_the_total_effect_is_donor_minus_recipient():
    examples = pd.DataFrame({"prob_clean": [0.9], "prob_corrupt": [0.2]})
    assert total_effects(examples, Donor.PAIR, Direction.DENOISE, Metric.PROB).tolist() == pytest.approx([0.7])
    assert total_effects(examples, Donor.PAIR, Direction.NOISE, Metric.PROB).tolist() == pytest.approx([-0.7])
