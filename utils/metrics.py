"""Continual-learning metrics of an accuracy matrix. Each name carries its definition, since frameworks disagree.

a[t][j] is the accuracy (a fraction) on task j after training task t, both counted from 1; T tasks; b[j] is the
accuracy on task j before any training. All functions take plain lists and leave them as they were.
"""

Matrix = list[list[float]]


def average_accuracy(row: list[float], seen: int) -> float:
    """(1/seen) * sum of a[seen][j] over the tasks seen so far."""
    return sum(row[:seen]) / seen


def average_incremental_accuracy(a: Matrix) -> float:
    """Mean over t of the average accuracy after task t (Rebuffi et al., 2017; Douillard et al., 2020)."""
    return sum(average_accuracy(row, t) for t, row in enumerate(a, start=1)) / len(a)


def forgetting_chaudhry18(a: Matrix) -> float | None:
    """1/(T-1) * sum over j < T of max over t < T of a[t][j], minus a[T][j] (Chaudhry et al., 2018, eq. 3).

    Negative where old tasks improve with the last one.
    """
    return _old_tasks(a, lambda j: max(row[j] for row in a[:-1]) - a[-1][j])


def forgetting_mammoth(a: Matrix) -> float | None:
    """As Mammoth (and PyCIL) compute it: the maximum runs over all t up to T, entries before task j counted as 0; so
    it is never negative."""
    return _old_tasks(a, lambda j: max(row[j] for row in a[j:]) - a[-1][j])


def bwt_gem17(a: Matrix) -> float | None:
    """Backward transfer, 1/(T-1) * sum over j < T of a[T][j] - a[j][j] (Lopez-Paz & Ranzato, 2017). Avalanche's
    forgetting is its negative."""
    return _old_tasks(a, lambda j: a[-1][j] - a[j][j])


def fwt_gem17(a: Matrix, untrained: list[float]) -> float | None:
    """Forward transfer, 1/(T-1) * sum over j > 1 of a[j-1][j] - b[j] (Lopez-Paz & Ranzato, 2017)."""
    if len(a) < 2:
        return None
    return sum(a[j - 1][j] - untrained[j] for j in range(1, len(a))) / (len(a) - 1)


def summarize(a: Matrix, untrained: list[float], joint: bool = False) -> dict[str, float | None]:
    """All metrics of a square matrix (rows and columns: the trained tasks). What one task cannot define is None.

    With `joint`, the matrix has one row, after training on all tasks at once: only the average accuracy is defined.
    """
    if joint:
        return {
            "final_average_accuracy": average_accuracy(a[0], len(a[0])),
            **dict.fromkeys(
                (
                    "average_incremental_accuracy",
                    "forgetting_chaudhry18",
                    "forgetting_mammoth",
                    "bwt_gem17",
                    "fwt_gem17",
                )
            ),
        }
    return {
        "final_average_accuracy": average_accuracy(a[-1], len(a)),
        "average_incremental_accuracy": average_incremental_accuracy(a),
        "forgetting_chaudhry18": forgetting_chaudhry18(a),
        "forgetting_mammoth": forgetting_mammoth(a),
        "bwt_gem17": bwt_gem17(a),
        "fwt_gem17": fwt_gem17(a, untrained),
    }


def _old_tasks(a: Matrix, of_task) -> float | None:
    """Mean of a quantity over all tasks but the last."""
    return sum(of_task(j) for j in range(len(a) - 1)) / (len(a) - 1) if len(a) > 1 else None
