"""Tables of comparisons: each group against a reference, and mean ranks over benchmarks."""

from collections.abc import Callable, Mapping, Sequence

from flatcl.utils.reports import latex
from flatcl.utils.reports.cells import TIE, TIE_MARK, Number, shown
from flatcl.utils.reports.comparisons import ALPHA, MOST_SEEDS, POWER, Comparison, compare, seeds_needed
from flatcl.utils.reports.groups import (
    LEVEL,
    NOTHING,
    check_metrics,
    costs_of,
    gaps,
    group_runs,
    keys_of,
    mixtures,
    split_notes,
    written,
)
from flatcl.utils.reports.labels import check_names, named
from flatcl.utils.reports.ranks import BLOCKS, Ranks, rank
from flatcl.utils.reports.runs import Run
from flatcl.utils.reports.tables import check_names_of, csv_keys, csv_text, laid_out, tuning_note, with_unit

CSV = ("metric", "n", "mean", "reference_mean", "difference", "std", "low", "high", "p_t", "p_t_holm", "p_wilcoxon",
       "p_wilcoxon_holm", "seeds_needed", "verdict")  # fmt: skip


def against_table(
    runs: Sequence[Run],
    against: Mapping[str, str],
    by: Sequence[str] | None,
    metrics: Sequence[str],
    setting: str | None,
    order: Sequence[str],
    format: str,
    say: Callable[[str], None],
    options: latex.Options = latex.PLAIN,
    names: Mapping[str, str] = {},
) -> str:
    """A row for each group and metric: its difference from the reference group `against` {key: value}, with the tests
    of `comparisons`. CSV has fractions, and the p values also before their correction."""
    check_metrics(metrics, runs)
    groups = group_runs(runs, keys_of(runs, by), setting, order)
    check_names_of(groups, metrics, names)
    for line in (*mixtures(groups), *gaps(groups, metrics)):
        say(line)
    costs = costs_of(runs)
    found = compare(groups, against, metrics, costs, say)
    if format == "csv":
        return csv_text([*groups[0].by, "setting", *CSV], [_csv_row(own) for own in found])
    constant = [] if setting is None else ["setting"]
    constant += ["metric"] if len(metrics) == 1 else []
    head = [name for name in (*groups[0].by, "setting", "metric") if name not in constant]
    body = []
    for own in found:
        keys = {**own.ours.by, "setting": own.ours.setting, "metric": own.metric}
        body.append([*(named(keys[name], names) for name in head), *_cells(own, costs)])
    titles = ["n", f"difference [{LEVEL * 100:.0f} %]", "p t", "p Wilcoxon", "seeds needed", "result"]
    footing = [*_footing(found, against, metrics, costs, names), *split_notes(groups), *tuning_note(groups, names)]
    keys = [named(name, names) for name in head]
    return laid_out([*keys, *titles], body, len(keys), footing, format, options)


def _cells(found: Comparison, costs: set[str]) -> list[str]:
    own, is_cost = found.paired, found.metric in costs
    places = 2 if not is_cost else 0 if abs(own.mean or 0) >= 100 else 1
    number = NOTHING if own.mean is None else _signed(own.mean, is_cost, places)
    if own.low is not None and own.high is not None:
        number += f" [{_signed(own.low, is_cost, places)}, {_signed(own.high, is_cost, places)}]"
    needed = seeds_needed(own)
    return [str(own.n), number, p_text(found.holm_t), p_text(found.holm_wilcoxon),
            NOTHING if needed is None else f">{MOST_SEEDS}" if needed > MOST_SEEDS else str(needed),
            found.verdict]  # fmt: skip


def _signed(value: float, is_cost: bool, places: int) -> str:
    text = shown(value, is_cost, places)
    return text if text.startswith("-") else f"+{text}"


def p_text(p: float | None) -> str:
    return NOTHING if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _footing(
    found: Sequence[Comparison], against: Mapping[str, str], metrics: Sequence[str], costs: set[str],
    names: Mapping[str, str],
) -> list[str]:  # fmt: skip
    reference = ", ".join(f"{named(key, names)} = {named(value, names)}" for key, value in against.items())
    units = ", ".join(with_unit(metric, costs, names) for metric in metrics)
    counts = {sum(getattr(own, name) is not None for own in found): None for name in ("holm_t", "holm_wilcoxon")}
    number = " and ".join(map(str, counts))
    return [
        units,
        f"difference: row minus the one of {reference}, mean of n pairs of equal seed [{LEVEL * 100:.0f} % t interval]",
        f"p of the paired t test and of the Wilcoxon signed-rank test, Holm-corrected over {number} comparison(s)"
        if any(counts)
        else "no test: there are fewer than two pairs of equal seed",
        f"result: better or worse by the corrected t test at {ALPHA}; less forgetting and less cost are better",
        f"seeds needed: pairs for a power of {POWER} of the paired t test at {ALPHA} (uncorrected), if the true "
        "difference is the observed one",
    ]


def _csv_row(found: Comparison) -> list:
    own, needed = found.paired, seeds_needed(found.paired)
    seeds = found.ours.of_seeds(found.metric), found.reference.of_seeds(found.metric)
    common = sorted(seeds[0].keys() & seeds[1].keys())
    means = [sum(values[seed] for seed in common) / len(common) if common else None for values in seeds]
    return [*csv_keys(found.ours), found.ours.setting, found.metric, own.n, *means, own.mean, own.std, own.low,
            own.high, own.p_t, found.holm_t, own.p_wilcoxon, found.holm_wilcoxon,
            f">{MOST_SEEDS}" if needed is not None and needed > MOST_SEEDS else needed, found.verdict]  # fmt: skip


def ranks_of(
    runs: Sequence[Run],
    by: Sequence[str] | None,
    metrics: Sequence[str],
    setting: str | None,
    order: Sequence[str],
    pivot: Sequence[str],
    say: Callable[[str], None],
) -> list[Ranks]:
    """The ranks in each metric. Keys of the blocks are always grouped by: nothing is averaged over benchmarks."""
    check_metrics(metrics, runs)
    groups = group_runs(runs, block_keys(runs, by, pivot), setting, order)
    for line in (*mixtures(groups), *gaps(groups, metrics)):
        say(line)
    return [rank(groups, metric, costs_of(runs), say, order, pivot) for metric in metrics]


def block_keys(runs: Sequence[Run], by: Sequence[str] | None, pivot: Sequence[str]) -> list[str]:
    own = [key for key in BLOCKS if any(run.get(key) is not None for run in runs) and key != "split"]
    return list(dict.fromkeys((*keys_of(runs, by, pivot), *own)))


def ranks_table(
    found: Sequence[Ranks],
    format: str,
    options: latex.Options = latex.PLAIN,
    names: Mapping[str, str] = {},
    has_pairs: bool = False,
) -> str:
    """A row for each group, in the order of its rank in the first metric. `has_pairs`: `names` may have names of pairs,
    for the picture."""
    first = found[0]
    check_names(names, first.groups, [own.metric for own in found], has_pairs)
    order = sorted(range(len(first.means)), key=lambda i: first.means[i])
    if format == "csv":
        head = [*first.rows[0], "metric", "mean_rank", "blocks", "friedman_chi2", "friedman_p", "critical_difference"]
        rows = [[*(written(value) for value in own.rows[i].values()), own.metric, own.means[i], own.num_blocks,
                 own.chi2, own.p, own.critical_difference] for own in found for i in order]  # fmt: skip
        return csv_text(head, rows)
    keys = [named(key, names) for key in first.rows[0]]
    head = [*keys, *(f"mean rank, {named(own.metric, names)}" for own in found)]
    body = [[*(named(value, names) for value in first.rows[i].values()), *((_rank_number(own, i),) for own in found)]
            for i in order]  # fmt: skip
    footing = [_friedman(own, named(own.metric, names)) for own in found]
    footing.append(
        f"{TIE_MARK}: the best rank, or not separable from it: nearer than the critical difference (CD) of the Nemenyi "
        f"test at {ALPHA}"
    )
    return laid_out(head, body, len(keys), [*footing, *first.split_notes], format, options)


def _rank_number(own: Ranks, i: int) -> Number:
    is_near = own.means[i] - min(own.means) <= own.critical_difference
    return Number(f"{own.means[i]:.2f}", mark=TIE if is_near else None)


def _friedman(own: Ranks, metric: str) -> str:
    test = "no Friedman test (it needs 3 groups that are not all equal)"
    if own.chi2 is not None:
        p = "< 0.001" if own.p is not None and own.p < 0.001 else f"= {p_text(own.p)}"
        test = f"Friedman chi2 = {own.chi2:.2f}, p {p}"
    return f"{metric}: {own.num_blocks} blocks, {len(own.means)} groups, {test}, CD = {own.critical_difference:.2f}"
