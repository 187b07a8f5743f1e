"""Mean ranks over benchmarks, the Friedman test and the Nemenyi critical difference (Demsar, JMLR 2006, section 3.2.2).

In each block (a benchmark, memory size and setting) the groups are ranked by their means, the best first, equal ones
with the average of their ranks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flatcl.utils.errors import UsageError
from flatcl.utils.reports.comparisons import ALPHA, lower_is_better
from flatcl.utils.reports.groups import Column, Group, split_notes, spread, written

BLOCKS = ("dataset", "buffer_size", "split")  # keys of a block, with the setting


@dataclass(frozen=True)
class Ranks:
    """Mean ranks (from 1, the best) of k groups over N blocks in one metric. `rows` are their keys, without the
    optimizer where each method has one; `groups` all keys but those of the blocks. `chi2` and `p` of the Friedman test
    are None for k < 3, or where all groups are equal in each block. `split_notes` say which blocks are not of the test
    set."""

    metric: str
    rows: tuple[dict[str, Any], ...]
    means: tuple[float, ...]
    num_blocks: int
    chi2: float | None
    p: float | None
    groups: tuple[dict[str, Any], ...]
    split_notes: tuple[str, ...] = ()

    @property
    def critical_difference(self) -> float:
        return critical_difference(len(self.means), self.num_blocks)


def critical_difference(k: int, num_blocks: int) -> float:
    """CD = q * sqrt(k (k + 1) / (6 N)): two of k groups differ at 0.05 if their mean ranks over N blocks do by more.
    q is the quantile of the studentized range with infinitely many degrees of freedom, divided by sqrt(2)."""
    from scipy.stats import studentized_range

    q = float(studentized_range.ppf(1 - ALPHA, k, math.inf)) / math.sqrt(2)
    return q * math.sqrt(k * (k + 1) / (6 * num_blocks))


def rank(
    groups: Sequence[Group],
    metric: str,
    costs: set[str],
    say: Callable[[str], None],
    order: Sequence[str] = (),
    pivot: Sequence[str] = (),
) -> Ranks:
    """Ranks of the groups that are left when the keys of the blocks are taken out. `pivot`: further keys of blocks.
    Raises `UsageError` for fewer than 2 groups, or fewer than 2 blocks in which all of them are."""
    from scipy.stats import friedmanchisquare, rankdata

    keys = [key for key in dict.fromkeys((*BLOCKS, *pivot)) if key in groups[0].by]
    rows, columns, cells = spread(groups, keys, order)
    if not rows or not rows[0]:
        raise UsageError(f"--ranks: no key is left to rank by beside those of the blocks ({', '.join(keys)}).")
    means = {place: group.stat(metric).mean for place, group in cells.items()}
    whole = [column for column in columns if all(means.get((i, column)) is not None for i in range(len(rows)))]
    _check(rows, columns, whole, means, metric)
    for column in columns:
        if column not in whole:
            absent = [" ".join(map(written, row.values())) for i, row in enumerate(rows)
                      if means.get((i, column)) is None]  # fmt: skip
            say(f"note: left out of the ranks: {_name(column)}, where {', '.join(absent)} has no {metric}.")
    way = 1 if lower_is_better(metric, costs) else -1
    blocks = [[way * round(means[i, column] or 0.0, 12) for i in range(len(rows))] for column in whole]
    ranks = [rankdata(block) for block in blocks]
    mean_ranks = tuple(float(sum(own) / len(ranks)) for own in zip(*ranks, strict=True))
    chi2, p = (None, None)
    if len(rows) > 2 and any(len(set(block)) > 1 for block in blocks):
        result = friedmanchisquare(*zip(*blocks, strict=True))
        chi2, p = float(result.statistic), float(result.pvalue)
    whole_keys = ({key: value for key, value in cells[i, whole[0]].by.items() if key not in keys}
                  for i in range(len(rows)))  # fmt: skip
    used = [group for (_, column), group in cells.items() if column in whole]
    return Ranks(
        metric, tuple(rows), mean_ranks, len(whole), chi2, p, tuple(whole_keys), tuple(split_notes(used, "blocks"))
    )


def _check(rows: list[dict], columns: list[Column], whole: list[Column], means: dict, metric: str) -> None:
    if len(rows) > 1 and len(whole) > 1:
        return
    found = {" ".join(map(written, row.values())): sum(means.get((i, column)) is not None for column in columns)
             for i, row in enumerate(rows)}  # fmt: skip
    fewest = ", ".join(f"{label} in {number}" for label, number in sorted(found.items(), key=lambda item: item[1])[:3])
    raise UsageError(
        f"--ranks needs 2 groups and 2 blocks (benchmark, memory size, setting) with {metric} of all groups, got "
        f"{len(rows)} group(s) and {len(whole)} such block(s) of {len(columns)}. In the fewest blocks: {fewest}. "
        "Choose groups with --where, or other ones with --by."
    )


def _name(column: Column) -> str:
    return f"{column.label}, {column.setting}" if column.label else column.setting


def cliques(means: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """(first, last) position, in the order of the ranks, of each longest run of groups whose ranks differ by at most
    `difference`; single groups are none."""
    ordered = sorted(means)
    found: list[tuple[int, int]] = []
    for first in range(len(ordered)):
        last = max(i for i in range(first, len(ordered)) if ordered[i] - ordered[first] <= difference)
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found
