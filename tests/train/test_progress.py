import math

import pytest

from jlora.train.progress import Progress


def test_the_mean_of_one_step_is_its_loss_bit_for_bit():
    progress = Progress()
    for loss in (0.1 + 0.2, 1e-30, 5.573886394500732):
        progress.add_loss(loss, 61)
        assert progress.take_mean_loss() == loss


def test_the_mean_counts_supervised_tokens_and_leaves_out_what_is_not_finite():
    progress = Progress()
    for loss, count in ((1.0, 1), (math.nan, 8), (math.inf, 8), (5.0, 3), (0.0, 0)):
        progress.add_loss(loss, count)
    assert progress.take_mean_loss() == pytest.approx(4.0)
    assert math.isnan(progress.take_mean_loss())


def test_the_first_of_the_lowest_evaluations_is_the_best_and_nan_never_is():
    progress = Progress()
    losses = [1.0, math.nan, 3.0, 2.0, 2.0, math.nan, 2.5]  # the first before step 1
    found = [progress.add_evaluation(step, loss) for step, loss in enumerate(losses)]
    assert found == [False, False, True, True, False, False, False]
    assert (progress.best_step, progress.best_eval_loss) == (3, 2.0)
    assert progress.evaluations_since_best == 3
    assert progress.initial_eval_loss == 1.0
