"""Every metric on matrices that are worked out by hand."""

import copy

import numpy as np
import pytest

from flatcl.utils import metrics

# a[t][j]: after task t (row) on task j (column)
A = [
    [0.9, 0.2, 0.1],
    [0.6, 0.8, 0.3],
    [0.5, 0.7, 0.9],
]
# old tasks get better with each task: positive backward transfer
B = [
    [0.5, 0.1, 0.2],
    [0.6, 0.7, 0.2],
    [0.8, 0.9, 0.6],
]
# a task is at its best before it is trained, and again in the middle
C = [
    [0.7, 0.9, 0.0, 0.0],
    [0.8, 0.6, 0.0, 0.4],
    [0.4, 0.5, 0.8, 0.6],
    [0.6, 0.3, 0.7, 0.9],
]
UNTRAINED = [0.1, 0.05, 0.3, 0.2]  # not a row of any of them


def close(value):
    return pytest.approx(value, abs=1e-12)


def test_average_accuracy():
    assert metrics.average_accuracy(A[2], 3) == close(0.7)  # (.5 + .7 + .9) / 3
    assert metrics.average_accuracy(A[1], 2) == close(0.7)  # (.6 + .8) / 2; the future .3 does not count
    assert metrics.average_accuracy(A[0], 1) == close(0.9)


def test_overall_accuracy_counts_images_not_tasks():
    """All accuracies are counts over sizes, so that the sum is a whole number of images."""
    assert metrics.overall_accuracy([1 / 3, 6 / 7, 0.0], [3, 7, 10]) == 7 / 20
    assert metrics.overall_accuracy([0.5, 0.7, 0.9], [10, 10, 10]) == close(metrics.average_accuracy(A[2], 3))
    with pytest.raises(ValueError):
        metrics.overall_accuracy([0.5, 0.7], [10, 10, 10])


def test_average_incremental_accuracy():
    assert metrics.average_incremental_accuracy(A) == close(2.3 / 3)  # .9, (.6 + .8) / 2 = .7, 2.1 / 3 = .7
    # .7, (.8 + .6) / 2 = .7, (.4 + .5 + .8) / 3 = 1.7/3, (.6 + .3 + .7 + .9) / 4 = .625
    assert metrics.average_incremental_accuracy(C) == close((0.7 + 0.7 + 1.7 / 3 + 0.625) / 4)


def test_average_incremental_overall_accuracy_counts_images():
    sizes = [50, 10, 10]
    a = [[0.8, 0.1, 0.1], [0.7, 0.9, 0.0], [0.6, 0.9, 0.9]]
    # 40 of 50, 35 + 9 of 60, 30 + 9 + 9 of 70
    assert metrics.average_incremental_overall_accuracy(a, sizes) == close((40 / 50 + 44 / 60 + 48 / 70) / 3)
    assert metrics.average_incremental_overall_accuracy(A, [10, 10, 10]) == close(2.3 / 3)


def test_forgetting_chaudhry18():
    assert metrics.forgetting_chaudhry18(A) == close(0.25)  # (.9 - .5 = .4) + (.8 - .7 = .1), over 2
    # best before the last task: .6 - .8 = -.2 and .7 - .9 = -.2: forgetting is negative
    assert metrics.forgetting_chaudhry18(B) == close(-0.2)
    # .8 - .6 = .2; task 2 was best before it was trained: .9 - .3 = .6; .8 - .7 = .1; sum .9 over 3
    assert metrics.forgetting_chaudhry18(C) == close(0.3)


def test_forgetting_mammoth():
    assert metrics.forgetting_mammoth(A) == close(0.25)
    assert metrics.forgetting_mammoth(B) == 0.0  # the maximum includes the last row: .8 - .8, .9 - .9
    # .8 - .6 = .2; entries before the task do not count: .6 - .3 = .3; .8 - .7 = .1; sum .6 over 3
    assert metrics.forgetting_mammoth(C) == close(0.2)


def test_backward_transfer():
    assert metrics.bwt_gem17(A) == close(-0.25)  # (.5 - .9) + (.7 - .8) = -.5 over 2
    assert metrics.bwt_gem17(B) == close(0.25)  # (.8 - .5) + (.9 - .7) = .5 over 2
    assert metrics.bwt_gem17(C) == close(-0.5 / 3)  # (.6 - .7) + (.3 - .6) + (.7 - .8) = -.5


def test_forward_transfer():
    assert metrics.fwt_gem17(A, UNTRAINED[:3]) == close(0.075)  # (.2 - .05 = .15) + (.3 - .3 = 0), over 2
    assert metrics.fwt_gem17(B, [0.9, 0.4, 0.2]) == close(-0.15)  # (.1 - .4) + (.2 - .2); task 1's .9 does not count
    assert metrics.fwt_gem17(C, UNTRAINED) == close(0.95 / 3)  # (.9 - .05) + (0 - .3) + (.6 - .2) = .95


def test_one_task_defines_only_accuracies():
    assert metrics.summarize([[0.6]], [0.1], [5]) == {
        "final_average_accuracy": 0.6,
        "final_overall_accuracy": 0.6,
        "average_incremental_accuracy": 0.6,
        "average_incremental_overall_accuracy": 0.6,
        "forgetting_chaudhry18": None,
        "forgetting_mammoth": None,
        "bwt_gem17": None,
        "fwt_gem17": None,
    }


def test_joint_training_has_one_row_and_only_its_accuracies():
    summary = metrics.summarize([[0.9, 0.5, 0.4]], [0.1, 0.1, 0.1], [10, 10, 80], joint=True)
    assert summary.keys() == metrics.summarize(A, UNTRAINED[:3], [1, 1, 1]).keys()
    assert summary.pop("final_average_accuracy") == close(0.6)  # 1.8 / 3
    assert summary.pop("final_overall_accuracy") == close(0.46)  # 9 + 5 + 32 of 100 images
    assert set(summary.values()) == {None}


def test_the_summary_has_each_metric_under_its_name():
    assert metrics.summarize(C, UNTRAINED, [10, 20, 30, 40]) == {
        "final_average_accuracy": close(0.625),
        "final_overall_accuracy": close(0.69),  # 6 + 6 + 21 + 36 of 100 images
        "average_incremental_accuracy": close((0.7 + 0.7 + 1.7 / 3 + 0.625) / 4),
        # 7 of 10; 8 + 12 of 30; 4 + 10 + 24 of 60; 69 of 100
        "average_incremental_overall_accuracy": close((0.7 + 20 / 30 + 38 / 60 + 0.69) / 4),
        "forgetting_chaudhry18": close(0.3),
        "forgetting_mammoth": close(0.2),
        "bwt_gem17": close(-0.5 / 3),
        "fwt_gem17": close(0.95 / 3),
    }


def test_tasks_that_were_not_evaluated_count_nowhere():
    """With --eval_tasks seen, entries above the diagonal are None and the untrained row is missing."""
    seen = [[value if j <= t else None for j, value in enumerate(row)] for t, row in enumerate(C)]
    found, full = (metrics.summarize(a, b, [10, 20, 30, 40]) for a, b in ((seen, None), (C, UNTRAINED)))
    assert found.pop("fwt_gem17") is None and full.pop("fwt_gem17") is not None
    # the best accuracies after training: .8 - .6 = .2, .6 - .3 = .3, .8 - .7 = .1; .9 before task 2 was not measured
    assert found.pop("forgetting_chaudhry18") == close(0.2) and full.pop("forgetting_chaudhry18") == close(0.3)
    assert found == full


def mammoth(a):
    """Columnwise maximum of the lower triangle, padded with zeros, minus the last row."""
    padded = np.tril(np.array(a))
    return (padded.max(0) - padded[-1])[:-1].mean()


def avalanche(a):
    """First accuracy on a task, right after training on it, minus the last one."""
    return np.mean([a[j][j] - a[-1][j] for j in range(len(a) - 1)])


def chaudhry(a):
    """f_j = max over l in 1..T-1 of a_lj, minus a_Tj; mean over j < T."""
    a = np.array(a)
    return (a[:-1].max(0) - a[-1])[:-1].mean()


@pytest.mark.parametrize("seed", range(5))
def test_relations_to_the_definitions_of_others(seed):
    a = np.random.default_rng(seed).uniform(size=(6, 6)).round(2).tolist()
    assert metrics.forgetting_mammoth(a) == close(mammoth(a)) and mammoth(a) >= 0
    assert metrics.bwt_gem17(a) == close(-avalanche(a))
    assert metrics.forgetting_chaudhry18(a) == close(chaudhry(a))
    assert metrics.forgetting_mammoth(a) >= metrics.forgetting_chaudhry18(np.tril(a).tolist())


def test_nothing_is_modified():
    """Triangular rows of different lengths too, where the metric needs no more."""
    a, untrained = copy.deepcopy(C), list(UNTRAINED)
    metrics.summarize(a, untrained, [10, 20, 30, 40])
    assert a == C and untrained == UNTRAINED
    ragged = [[0.9], [0.6, 0.8], [0.5, 0.7, 0.9]]
    assert metrics.forgetting_mammoth(ragged) == close(0.25) and metrics.bwt_gem17(ragged) == close(-0.25)
    assert metrics.average_incremental_accuracy(ragged) == close(2.3 / 3)
    assert ragged == [[0.9], [0.6, 0.8], [0.5, 0.7, 0.9]]
    joint = [[0.9, 0.5]]
    metrics.summarize(joint, [0.1, 0.1], [10, 10], joint=True)
    assert joint == [[0.9, 0.5]]
