"""Continual-learning metrics of an accuracy matrix. Each name carries its definition, since frameworks disagree.

a[t][j] is the accuracy (a fraction) on task j after training task t, both counted from 1; T tasks; b[j] is the
accuracy on task j before any training; n[j] the number of its test images. All functions take plain lists and leave
them as they were. With `--eval_tasks seen`, a[t][j] is None for j > t, and b is not measured.
"""

Matrix = list[list[float | None]]

LOWER_IS_BETTER = frozenset({"forgetting_chaudhry18", "forgetting_mammoth"})  # of all others, more is better


def average_accuracy(row: list[float], seen: int) -> float:
    """(1/seen) * sum of a[seen][j] over the tasks seen so far."""
    return sum(row[:seen]) / seen


def overall_accuracy(row: list[float], sizes: list[int]) -> float:
    """Images classified correctly over images, of all tasks together: sum of n[j] * a[T][j] over sum of n[j]. Equal to
    the average accuracy where all tasks have as many test images."""
    return sum(round(size * value) for size, value in zip(sizes, row, strict=True)) / sum(sizes)


def average_incremental_accuracy(a: Matrix) -> float:
    """Mean over t of the average accuracy after task t (Rebuffi et al., 2017; Douillard et al., 2020)."""
    return sum(average_accuracy(row, t) for t, row in enumerate(a, start=1)) / len(a)


def average_incremental_overall_accuracy(a: Matrix, sizes: list[int]) -> float:
    """Mean over t of the overall accuracy on the tasks up to t, so that each image counts alike, as in PyCIL. It
    differs from `average_incremental_accuracy` where tasks have unequal numbers of test images."""
    return sum(overall_accuracy(row[:t], sizes[:t]) for t, row in enumerate(a, start=1)) / len(a)


def forgetting_chaudhry18(a: Matrix) -> float | None:
    """1/(T-1) * sum over j < T of max over t < T of a[t][j], minus a[T][j] (Chaudhry et al., 2018, eq. 3).

    Negative where old tasks improve with the last one. The maximum is over what was measured: with `--eval_tasks seen`
    it begins at t = j, so that the result is lower where a task was at its best before it was trained.
    """
    return _old_tasks(a, lambda j: max(row[j] for row in a[:-1] if row[j] is not None) - a[-1][j])


def forgetting_mammoth(a: Matrix) -> float | None:
    """As Mammoth (and PyCIL) compute it: the maximum runs over all t up to T, entries before task j counted as 0; so
    it is never negative."""
    return _old_tasks(a, lambda j: max(row[j] for row in a[j:]) - a[-1][j])


def bwt_gem17(a: Matrix) -> float | None:
    """Backward transfer, 1/(T-1) * sum over j < T of a[T][j] - a[j][j] (Lopez-Paz & Ranzato, 2017). Avalanche's
    forgetting is its negative."""
    return _old_tasks(a, lambda j: a[-1][j] - a[j][j])


def fwt_gem17(a: Matrix, untrained: list[float] | None) -> float | None:
    """Forward transfer, 1/(T-1) * sum over j > 1 of a[j-1][j] - b[j] (Lopez-Paz & Ranzato, 2017). None where tasks to
    come and the untrained network (`untrained` is None) are not evaluated."""
    if len(a) < 2 or untrained is None:
        return None
    return sum(a[j - 1][j] - untrained[j] for j in range(1, len(a))) / (len(a) - 1)


def summarize(
    a: Matrix, untrained: list[float] | None, sizes: list[int], joint: bool = False
) -> dict[str, float | None]:
    """All metrics of a square matrix (rows and columns: the trained tasks). What one task cannot define is None, and
    what was not measured: forward transfer where `untrained` is None. `sizes`: test images of each task.

    With `joint`, the matrix has one row, after training on all tasks at once: only its two accuracies are defined.
    """
    final = {
        "final_average_accuracy": average_accuracy(a[-1], len(a[-1])),
        "final_overall_accuracy": overall_accuracy(a[-1], sizes),
    }
    if joint:
        return {
            **final,
            **dict.fromkeys(
                (
                    "average_incremental_accuracy",
                    "average_incremental_overall_accuracy",
                    "forgetting_chaudhry18",
                    "forgetting_mammoth",
                    "bwt_gem17",
                    "fwt_gem17",
                )
            ),
        }
    return {
        **final,
        "average_incremental_accuracy": average_incremental_accuracy(a),
        "average_incremental_overall_accuracy": average_incremental_overall_accuracy(a, sizes),
        "forgetting_chaudhry18": forgetting_chaudhry18(a),
        "forgetting_mammoth": forgetting_mammoth(a),
        "bwt_gem17": bwt_gem17(a),
        "fwt_gem17": fwt_gem17(a, untrained),
    }


def _old_tasks(a: Matrix, of_task) -> float | None:
    """Mean of a quantity over all tasks but the last."""
    return sum(of_task(j) for j in range(len(a) - 1)) / (len(a) - 1) if len(a) > 1 else None
