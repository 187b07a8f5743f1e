"""Which differences between groups are more than chance: paired by seed, corrected for the number of comparisons.

Two groups are compared over the seeds that both have, by the paired t test and the Wilcoxon signed-rank test (Student,
1908; Wilcoxon, 1945). p values are corrected by Holm's step-down procedure (Holm, 1979). The correction and the power
of a test come from statsmodels (the extra flatcl[stats]), all else from scipy.
"""

import bisect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flatcl.utils.errors import UsageError
from flatcl.utils.identity import DATA, differences
from flatcl.utils.metrics import LOWER_IS_BETTER
from flatcl.utils.reports.cells import BEST, TIE, TIE_MARK
from flatcl.utils.reports.groups import LEVEL, Group, result_flags, written
from flatcl.utils.reports.runs import Seeds, comparable

ALPHA, POWER = 0.05, 0.8
FEWEST_PAIRS = 3  # with which a test may call a group the best
MOST_SEEDS = 1000
BETTER, WORSE, OPEN = "better", "worse", "undecided"
DIGITS = 12  # to which values are compared: equal differences of accuracies are not equal in floating point


@dataclass(frozen=True)
class Paired:
    """Ours minus reference over the n seeds that both have; None: too few seeds, or no spread to test against. `low`
    and `high` are the ends of the 95 % t interval of the mean difference."""

    n: int
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None
    p_t: float | None = None
    p_wilcoxon: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A group with its reference in one metric, in the metric's unit. `holm_t` and `holm_wilcoxon` are the p values
    corrected over all comparisons of the table; `verdict` is by `holm_t`."""

    ours: Group
    reference: Group
    metric: str
    paired: Paired
    holm_t: float | None = None
    holm_wilcoxon: float | None = None
    verdict: str = OPEN


def lower_is_better(metric: str, costs: set[str]) -> bool:
    """Of forgetting, and of every cost."""
    return metric in LOWER_IS_BETTER or metric in costs


def paired(ours: Mapping[Any, float], reference: Mapping[Any, float]) -> Paired:
    """Compares {seed: value} with {seed: value} over the seeds of both. Where all differences are 0, both p are 1;
    where they are equal but not 0, the t statistic is infinite, and its p is left open."""
    from scipy.stats import t, ttest_rel, wilcoxon

    seeds = sorted(ours.keys() & reference.keys())
    gaps = [round(ours[seed] - reference[seed], DIGITS) for seed in seeds]
    if len(gaps) < 2:
        return Paired(len(gaps), *gaps)
    mean, std = statistics.fmean(gaps), statistics.stdev(gaps) if len(set(gaps)) > 1 else 0.0
    half = float(t.ppf((1 + LEVEL) / 2, len(gaps) - 1)) * std / math.sqrt(len(gaps))
    if not any(gaps):
        return Paired(len(gaps), 0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
    p_t = None
    if std > 0:
        p_t = float(ttest_rel([ours[seed] for seed in seeds], [reference[seed] for seed in seeds]).pvalue)
    return Paired(len(gaps), mean, std, mean - half, mean + half, p_t, float(wilcoxon(gaps).pvalue))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values corrected by Holm's procedure over those that are not None."""
    from statsmodels.stats.multitest import multipletests

    known = [value for value in values if value is not None]
    corrected = iter(multipletests(known, method="holm")[1] if known else ())
    return [None if value is None else float(next(corrected)) for value in values]


def seeds_needed(found: Paired) -> int | None:
    """The smallest number of pairs (at least 2) with which a paired t test, two-sided at 0.05, has a power of 0.8
    against the observed difference and its standard deviation. None where one of them is 0 or unknown;
    `MOST_SEEDS` + 1 where it is above `MOST_SEEDS`."""
    from statsmodels.stats.power import TTestPower

    if not found.std or not found.mean:
        return None
    effect, power = abs(found.mean) / found.std, TTestPower().power
    numbers = range(2, MOST_SEEDS + 1)

    def power_with(n: int) -> float:
        """That of the one side on which the effect lies: the other adds nothing to it near 0.8, and cannot be computed
        for large effects. Nor can this one for the largest, where it is 1."""
        found = float(power(effect, n, ALPHA / 2, alternative="larger"))
        return 1.0 if math.isnan(found) else found

    return 2 + bisect.bisect_left(numbers, POWER, key=power_with)


def compare(
    groups: Sequence[Group],
    against: Mapping[str, str],
    metrics: Sequence[str],
    costs: set[str],
    say: Callable[[str], None],
) -> list[Comparison]:
    """Every group with the one that has the values `against` and differs from it in nothing else. Raises `UsageError`
    where there is no such pair."""
    pairs = _pairs(groups, against, say)
    found = []
    for ours, reference in pairs:
        for metric in metrics:
            values = ours.of_seeds(metric), reference.of_seeds(metric)
            if all(values):
                found.append(Comparison(ours, reference, metric, paired(*values)))
    for line in (*_unpaired(pairs), *_unlike(pairs, against)):
        say(line)
    by_t, by_wilcoxon = (holm([getattr(own.paired, name) for own in found]) for name in ("p_t", "p_wilcoxon"))
    return [
        replace(own, holm_t=p_t, holm_wilcoxon=p_wilcoxon, verdict=_verdict(own, p_t, costs))
        for own, p_t, p_wilcoxon in zip(found, by_t, by_wilcoxon, strict=True)
    ]


def _verdict(found: Comparison, p: float | None, costs: set[str]) -> str:
    if p is None or p >= ALPHA or not found.paired.mean:
        return OPEN
    return BETTER if (found.paired.mean < 0) == lower_is_better(found.metric, costs) else WORSE


def _pairs(
    groups: Sequence[Group], against: Mapping[str, str], say: Callable[[str], None]
) -> list[tuple[Group, Group]]:
    """(group, its reference), in the order of the groups."""
    problems = [f"--against {key}: it is not among the keys of the rows ({', '.join(groups[0].by)}). Add it to --by."
                for key in against if key not in groups[0].by]  # fmt: skip
    problems += [f"--against {key}: validation and test runs are never compared." for key in against
                 if key in ("split", "validation")]  # fmt: skip
    if problems:
        raise UsageError(*problems)

    def is_reference(group: Group) -> bool:
        return all(comparable(group.by[key]) == comparable(value) for key, value in against.items())

    def place(group: Group) -> tuple:
        return group.setting, *(value for key, value in group.by.items() if key not in against)

    words = ", ".join(f"{key}={value}" for key, value in against.items())
    references = {place(group): group for group in groups if is_reference(group)}
    if not references:
        has = sorted({", ".join(f"{key}={written(group.by[key])}" for key in against) for group in groups})
        raise UsageError(f"--against {words}: no row has that. These occur: {'; '.join(has)}.")
    others = [group for group in groups if not is_reference(group)]
    pairs = [(group, references[place(group)]) for group in others if place(group) in references]
    if not pairs:
        raise UsageError(f"--against {words}: no row differs from the reference in {', '.join(against)} alone.")
    alone = dict.fromkeys(group.label for group in others if place(group) not in references)
    if alone:
        say(f"note: left out, since no run with {words} differs from them in {', '.join(against)} alone: "
            f"{', '.join(alone)}.")  # fmt: skip
    return pairs


def _unpaired(pairs: Sequence[tuple[Group, Group]]) -> list[str]:
    """Runs that are left out, since the other group has none of the same seed."""
    lines = []
    for ours, reference in pairs:
        mine, theirs = ({run.seeds(ours.sources) for run in group.runs} for group in (ours, reference))
        repeated = sum(len(group.runs) for group in (ours, reference)) - len(mine) - len(theirs)
        for own, other, seeds in ((ours, reference, mine - theirs), (reference, ours, theirs - mine)):
            if seeds:
                lines.append(f"note: left out of {ours.label} against {reference.label}: seed "
                             f"{_listed(seeds, ours.sources)} of "
                             f"{own.label}, which {other.label} has not.")  # fmt: skip
        if repeated:
            lines.append(f"note: left out of {ours.label} against {reference.label}: seeds that a group has twice.")
    return list(dict.fromkeys(lines))


def _listed(seeds: set[Seeds], sources: Sequence[str]) -> str:
    """Each with the sources of random numbers that have another seed."""
    texts = []
    for seed, *others in sorted(seeds, key=lambda own: tuple(map(str, own))):
        apart = [f"{name} {own}" for name, own in zip(sources, others, strict=True) if own != seed]
        texts.append(f"{seed} ({', '.join(apart)})" if apart else str(seed))
    return ", ".join(sorted(texts, key=lambda text: (len(text), text)))


def _unlike(pairs: Sequence[tuple[Group, Group]], against: Mapping[str, str]) -> list[str]:
    """In what groups that are compared differ besides the keys: flags that both have, protocol, files of both."""
    found: dict[str, list[str]] = {}
    for ours, reference in pairs:
        mine, theirs = result_flags(ours.runs), result_flags(reference.runs)
        names = [name for name in mine if name in theirs and name not in against and mine[name] != theirs[name]]
        parts = [f"{name} ({', '.join(sorted(mine[name]))} against {', '.join(sorted(theirs[name]))})"
                 for name in names]  # fmt: skip
        codes = [run.code for group in (ours, reference) for run in group.runs if run.code is not None]
        unlike = {file for code in codes for file in differences(codes[0], code)
                  if {file} <= code.keys() & codes[0] or file.startswith(DATA)}  # fmt: skip
        shared = sorted(file for file in unlike if not file.startswith(DATA))
        parts += [f"the code of {', '.join(shared)}"] if shared else []
        parts += [f"the {file}" for file in sorted(unlike.difference(shared))]
        if parts:
            found.setdefault("; ".join(parts), []).append(ours.label)
    return [f"note: compared all the same, although they also differ in {parts}: {', '.join(dict.fromkeys(labels))}."
            for parts, labels in found.items()]  # fmt: skip


def mark_best(
    groups: Sequence[Group],
    columns: Sequence[Any],
    metrics: Sequence[str],
    costs: set[str],
    pivot: Sequence[str] = (),
    sign: str = "bold",
) -> tuple[list[list[str | None]], list[str]]:
    """([a mark or None for each metric, for each group], what they mean). `columns[i]` is where group i stands in a
    pivoted table with the pivot keys `pivot`; `sign` is how a reader sees the best."""
    marks: list[list[str | None]] = []
    contests = [_Contest(groups, members) for members in _contests(groups, columns, pivot)]
    for metric in metrics:
        for contest in contests:
            contest.decide(metric, costs)
        marks.append([_in_all([contest.marks[i] for contest in contests if i in contest.marks])
                      for i in range(len(groups))])  # fmt: skip
    used = {mark for own in marks for mark in own}
    numbers = sorted({n for contest in contests for n in contest.num_pairs})
    return [list(own) for own in zip(*marks, strict=True)], _meaning(used, numbers, sign)


def _meaning(used: set[str | None], numbers: Sequence[int], sign: str) -> list[str]:
    if not used - {None}:
        return [f"no best is marked: its test needs {FEWEST_PAIRS} seeds that two rows of a column share"]
    pairs = f"{numbers[0]}" + (f" to {numbers[-1]}" if len(numbers) > 1 else "")
    notes = [f"{sign}: better than each other row of its benchmark, memory size and column"]
    if BEST not in used:
        notes = ["no row is better than each other row of its benchmark, memory size and column"]
    if TIE in used:
        notes.append(f"{TIE_MARK}: the best mean there, or not separable from it")
    return [*notes, f"test: paired t over the seeds of both, {pairs} pairs, p < {ALPHA} after Holm's correction in the "
                    "column"]  # fmt: skip


def _contests(groups: Sequence[Group], columns: Sequence[Any], pivot: Sequence[str]) -> list[list[int]]:
    """The groups (by their index) among which one may be the best: those of one column, benchmark, split, setting and
    memory size. A method without a memory stands beside every size."""
    places: dict[tuple, list[int]] = {}
    for i, (column, group) in enumerate(zip(columns, groups, strict=True)):
        keys = (group.common(key) for key in ("dataset", "split") if key not in pivot)
        places.setdefault((column, group.setting, *keys), []).append(i)
    found = []
    for members in places.values():
        sizes = {i: None if "buffer_size" in pivot else groups[i].common("buffer_size") for i in members}
        own = dict.fromkeys(size for size in sizes.values() if size is not None)
        found += [[i for i in members if sizes[i] in (None, size)] for size in own or (None,)]
    return found


def _in_all(marks: Sequence[str | None]) -> str | None:
    """The mark of a row that takes part in several contests: the least that it has in any."""
    return None if None in marks else TIE if TIE in marks else BEST


class _Contest:
    """Rows among which one may be the best: `marks` {index of the group: mark}, and the numbers of pairs of all tests
    that were made."""

    def __init__(self, groups: Sequence[Group], members: Sequence[int]):
        self.groups, self.members = groups, members
        self.marks: dict[int, str | None] = {}
        self.num_pairs: set[int] = set()

    def decide(self, metric: str, costs: set[str]) -> None:
        self.marks = dict.fromkeys(self.members)
        way = -1 if lower_is_better(metric, costs) else 1
        means = {i: self.groups[i].stat(metric).mean for i in self.members}
        known = {i: way * mean for i, mean in means.items() if mean is not None}
        if len(known) < 2:
            return
        top = max(known, key=known.__getitem__)
        others = [i for i in known if i != top]
        values = self.groups[top].of_seeds(metric)
        found = [paired(values, self.groups[i].of_seeds(metric)) for i in others]
        can_test = [own.n >= FEWEST_PAIRS and own.p_t is not None for own in found]
        if not any(can_test):
            return
        self.num_pairs |= {own.n for own, is_tested in zip(found, can_test, strict=True) if is_tested}
        corrected = holm([own.p_t if ok else None for own, ok in zip(found, can_test, strict=True)])
        beaten = [p is not None and p < ALPHA and way * (own.mean or 0) > 0
                  for p, own in zip(corrected, found, strict=True)]  # fmt: skip
        tied = [i for i, is_beaten in zip(others, beaten, strict=True) if not is_beaten]
        self.marks |= {top: TIE if tied else BEST, **dict.fromkeys(tied, TIE)}
