"""Tests, marks and ranks in reports; every expected number is worked out here, by formulas of its own."""

import csv
import json
import math
import re
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.integrate import trapezoid
from scipy.stats import chi2, norm, t
from test_report import make_run

from flatcl.utils import metrics
from flatcl.utils.commands import report
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import ROOT
from flatcl.utils.reports import comparisons, latex, rank_picture, ranks, tables
from flatcl.utils.reports import runs as finished
from flatcl.utils.reports.comparisons import BETTER, OPEN, WORSE, holm, paired, seeds_needed

SGD = (0.80, 0.82, 0.81, 0.79)
SAM = (0.83, 0.86, 0.83, 0.82)  # minus SGD: .03 .04 .02 .03, mean .03
ADAM = (0.78, 0.85, 0.80, 0.81)  # minus SGD: -.02 .03 -.01 .02


def fill(root, optimizer, accuracies, first_seed=0, forgetting=0.1, **flags):
    """A run of each accuracy; forgetting falls as accuracy rises."""
    for seed, value in enumerate(accuracies, start=first_seed):
        make_run(root, optimizer=optimizer, seed=seed, accuracy=value, forgetting=1 - value, **flags)


@pytest.fixture
def three(tmp_path):
    for optimizer, values in (("sgd", SGD), ("sam", SAM), ("adam", ADAM)):
        fill(tmp_path, optimizer, values)
    return tmp_path


def told(capsys, *words):
    """(exit code, lines of stdout, stderr) of a report."""
    code = report.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err


def t_test(gaps):
    """(t statistic, two-sided p) by hand."""
    statistic = statistics.fmean(gaps) / (statistics.stdev(gaps) / math.sqrt(len(gaps)))
    return statistic, 2 * t.sf(abs(statistic), len(gaps) - 1)


def holm_by_hand(values):
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = highest
    return corrected


def test_a_pair_is_compared_over_the_seeds_of_both():
    ours = {0: 0.83, 1: 0.86, 2: 0.83, 3: 0.82, 9: 0.1}
    reference = {3: 0.79, 2: 0.81, 1: 0.82, 0: 0.80, 7: 0.9}
    found = paired(ours, reference)
    std = math.sqrt((0 + 0.01**2 + 0.01**2 + 0) / 3)
    half = t.ppf(0.975, 3) * std / 2
    assert (found.n, found.mean, found.std) == (4, pytest.approx(0.03), pytest.approx(std))
    assert (found.low, found.high) == (pytest.approx(0.03 - half), pytest.approx(0.03 + half))
    assert found.p_t == pytest.approx(t_test([0.03, 0.04, 0.02, 0.03])[1])
    assert found.p_wilcoxon == pytest.approx(2 / 2**4)  # all of one sign: the two most extreme of 16 sign patterns


def test_the_wilcoxon_test_counts_sign_patterns():
    """Ranks 1 2 3 with the signs + + -: the smaller rank sum is 3, as large as it can be."""
    found = paired(dict(enumerate((0.11, 0.22, 0.27))), dict(enumerate((0.1, 0.2, 0.3))))
    sums = [sum(rank for i, rank in enumerate((1, 2, 3)) if pattern >> i & 1) for pattern in range(8)]
    assert found.p_wilcoxon == pytest.approx(sum(min(value, 6 - value) <= 3 for value in sums) / 8)


def test_differences_without_spread_make_no_t_test():
    same = {0: 0.1 + 0.2, 1: 0.5, 2: 0.7}
    assert paired(same, {0: 0.3, 1: 0.5, 2: 0.7}) == comparisons.Paired(3, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
    shifted = paired({seed: value + 0.1 for seed, value in same.items()}, same)
    assert shifted.p_t is None and shifted.mean == pytest.approx(0.1) and shifted.std == 0
    assert shifted.p_wilcoxon == pytest.approx(2 / 2**3)
    assert seeds_needed(shifted) is None and seeds_needed(paired(same, same)) is None
    assert paired({0: 0.5}, {0: 0.25}) == comparisons.Paired(1, 0.25)
    assert paired({0: 0.5}, {1: 0.25}) == comparisons.Paired(0)


def test_holm_corrects_the_known_values_only():
    values = [0.04, 0.01, 0.03, 0.2]
    assert holm(values) == pytest.approx([0.09, 0.04, 0.09, 0.2]) == holm_by_hand(values)
    assert holm([0.01, None, 0.04]) == [pytest.approx(0.02), None, pytest.approx(0.04)]
    assert holm([None]) == [None] and holm([]) == []


def power_by_hand(effect, n):
    """The chance that a t statistic with this shift is above the limit: over the spread s of the sample, a normal
    variable is above limit * s - shift. (The other side adds less than 1e-4 to a power near 0.8.)"""
    limit, shift = t.ppf(0.975, n - 1), effect * math.sqrt(n)
    spreads = np.linspace(1e-9, 8, 200_001)
    density = 2 * (n - 1) * spreads * chi2.pdf((n - 1) * spreads**2, n - 1)
    return float(trapezoid(norm.sf(limit * spreads - shift) * density, spreads))


@pytest.mark.parametrize("effect", [0.2, 0.5, 1.0, 3.0, 5.5, 7.16, 8.0, 11.33, 11.5])
def test_seeds_needed_is_the_least_number_with_enough_power(effect):
    number = seeds_needed(comparisons.Paired(3, -effect * 0.01, 0.01))
    assert power_by_hand(effect, number) >= 0.8
    assert number == 2 or power_by_hand(effect, number - 1) < 0.8


def test_seeds_needed_has_ends():
    assert seeds_needed(comparisons.Paired(3, 1.0, 1e-6)) == 2
    assert seeds_needed(comparisons.Paired(3, 0.001, 0.1)) == comparisons.MOST_SEEDS + 1


def test_metrics_of_which_less_is_better_are_known():
    matrix = [[0.9, 0.1], [0.8, 0.9]]
    names = set(metrics.summarize(matrix, [0.1, 0.1], [10, 10]))
    assert names >= metrics.LOWER_IS_BETTER == {name for name in names if "forgetting" in name}
    assert comparisons.lower_is_better("train_s", {"train_s"}) and not comparisons.lower_is_better("bwt_gem17", set())


def test_against_shows_differences_and_corrected_tests(three, capsys):
    words = (three, "--by", "optimizer", "--setting", "domain-il", "--against", "optimizer=sgd")
    code, lines, err = told(capsys, *words)
    assert code == 0 and err == ""
    assert lines[0] == "| optimizer | metric | n | difference [95 %] | p t | p Wilcoxon | seeds needed | result |"
    of_sam, of_adam = [0.03, 0.04, 0.02, 0.03], [-0.02, 0.03, -0.01, 0.02]
    p = holm_by_hand([t_test(of_adam)[1]] * 2 + [t_test(of_sam)[1]] * 2)  # accuracy and 1 - accuracy, of both
    half = 100 * t.ppf(0.975, 3) * statistics.stdev(of_sam) / 2
    cells = [line.strip("| ").split(" | ") for line in lines[2:6]]
    assert [row[:3] for row in cells] == [
        [name, metric, "4"]
        for name in ("adam", "sam")
        for metric in ("final_average_accuracy", "forgetting_chaudhry18")
    ]
    assert [row[4] for row in cells] == [f"{value:.3f}" for value in p]
    assert cells[2][3] == f"+3.00 [+{3 - half:.2f}, +{3 + half:.2f}]"
    assert cells[3][3] == f"-3.00 [-{3 + half:.2f}, -{3 - half:.2f}]"
    assert [row[-1] for row in cells] == [OPEN, OPEN, BETTER, BETTER]
    assert "Holm-corrected over 4 comparison(s)" in "\n".join(lines)
    code, lines, _ = told(capsys, *words[:-1], "optimizer=sam", "--metrics", "forgetting_chaudhry18")
    assert code == 0 and [line.split(" | ")[-1].rstrip(" |") for line in lines[2:4]] == [OPEN, WORSE]


def test_names_stand_in_the_tables_of_comparisons_too(three, capsys):
    labels = ("--names", "optimizer=Optimizer", "sam=SAM", "sgd=SGD", "final_average_accuracy=FAA")
    words = (three, "--by", "optimizer", "--setting", "domain-il", "--against", "optimizer=sgd")
    code, lines, _ = told(capsys, *words, *labels)
    assert code == 0 and lines[0].startswith("| Optimizer | metric | n |")
    assert [row[:2] for row in cells_of(lines)] == [
        ["adam", "FAA"], ["adam", "forgetting_chaudhry18"], ["SAM", "FAA"], ["SAM", "forgetting_chaudhry18"]
    ]  # fmt: skip
    footing = "\n".join(lines[6:])
    assert "FAA in %, forgetting_chaudhry18 in %;" in footing and "minus the one of Optimizer = SGD," in footing
    code, lines, err = told(capsys, three, "--by", "optimizer", "--pivot", "seed", "--ranks", *labels)
    assert code == 0 and lines[0] == "| Optimizer | mean rank, FAA | mean rank, forgetting_chaudhry18 |"
    assert [row[0] for row in cells_of(lines)] == ["SAM", "adam", "SGD"] and "FAA: 4 blocks, 3 groups," in lines[6]
    code, _, err = told(capsys, three, "--by", "optimizer", "--pivot", "seed", "--ranks", "--names", "err=ER")
    assert code == 2 and "--names: nothing here is called 'err'." in err


def test_against_in_csv_has_fractions_and_both_p(three, capsys):
    _, lines, _ = told(capsys, three, "--by", "optimizer", "--against", "optimizer=sgd", "--format", "csv",
                       "--metrics", "final_average_accuracy")  # fmt: skip
    adam, sam = csv.DictReader(lines)
    assert (sam["optimizer"], sam["metric"], sam["n"]) == ("sam", "final_average_accuracy", "4")
    assert float(sam["mean"]) == pytest.approx(statistics.fmean(SAM))
    assert float(sam["reference_mean"]) == pytest.approx(statistics.fmean(SGD))
    p = [t_test([ours - theirs for ours, theirs in zip(own, SGD, strict=True)])[1] for own in (ADAM, SAM)]
    assert [float(row["p_t"]) for row in (adam, sam)] == pytest.approx(p)
    assert [float(row["p_t_holm"]) for row in (adam, sam)] == pytest.approx(holm_by_hand(p))


def test_against_leaves_out_what_has_no_partner_and_says_so(tmp_path, capsys):
    fill(tmp_path, "sgd", SGD)
    fill(tmp_path, "sam", SAM, first_seed=2)
    fill(tmp_path, "sam", SAM, model="derpp")
    code, lines, err = told(capsys, tmp_path, "--by", "model,optimizer", "--against", "optimizer=sgd",
                            "--metrics", "final_average_accuracy")  # fmt: skip
    assert code == 0 and len([line for line in lines if "+" in line]) == 1
    assert "| er | sam | domain-il | 2 |" in lines[2]
    assert "left out, since no run with optimizer=sgd differs from them in optimizer alone: derpp sam." in err
    assert "left out of er sam against er sgd: seed 4, 5 of er sam, which er sgd has not." in err
    assert "left out of er sam against er sgd: seed 0, 1 of er sgd, which er sam has not." in err


def test_against_names_other_flags_in_which_groups_differ(tmp_path, capsys):
    fill(tmp_path, "sgd", SGD, rho=None)
    fill(tmp_path, "sam", SAM, lr=0.03, rho=0.05)
    _, _, err = told(capsys, tmp_path, "--by", "optimizer", "--against", "optimizer=sgd")
    assert "also differ in lr (0.03 against 0.1); rho (0.05 against none): sam." in err


def test_several_keys_make_a_reference(tmp_path, capsys):
    fill(tmp_path, "sgd", SGD)
    fill(tmp_path, "sam", SAM, model="er_sam")
    code, lines, _ = told(capsys, tmp_path, "--against", "model=er,optimizer=sgd")
    assert code == 0 and "| perm-mnist | er_sam | sam | 200 | domain-il | final_average_accuracy | 4 |" in lines[2]
    code, _, err = told(capsys, tmp_path, "--against", "model=er")
    assert code == 2 and "no row differs from the reference in model alone" in err


def test_intervals_of_the_mean(three, capsys):
    half = 100 * t.ppf(0.975, 3) * statistics.stdev(SAM) / 2
    mean, std = 100 * statistics.fmean(SAM), 100 * statistics.stdev(SAM)
    cell = f"{mean:.2f} ± {std:.2f} [{mean - half:.2f}, {mean + half:.2f}]"
    words = (three, "--where", "optimizer=sam", "--interval", "--metrics", "final_average_accuracy")
    _, lines, _ = told(capsys, *words)
    assert lines[2].endswith(f"| 4 | {cell} |") and "95 % t interval of the mean" in lines[-1]
    _, lines, _ = told(capsys, *words, "--pivot", "dataset")
    assert lines[2] == f"| er | sam | 200 | {cell} |" or cell in lines[2]
    _, lines, _ = told(capsys, *words, "--format", "csv")
    (row,) = csv.DictReader(lines)
    low, high = (float(row[f"final_average_accuracy_{end}"]) for end in ("low", "high"))
    assert (100 * low, 100 * high) == (pytest.approx(mean - half), pytest.approx(mean + half))


def cells_of(lines, key="|"):
    return [line.strip("| ").split(" | ") for line in lines if line.startswith(key)][2:]


def test_only_what_beats_all_others_is_bold(three, capsys):
    """SAM minus ADAM is .05 .01 .03 .01, p = .08; minus SGD .03 .04 .02 .03, p = .005."""
    words = (three, "--by", "optimizer", "--best", "--metrics", "final_average_accuracy")
    p = holm_by_hand([t_test([0.05, 0.01, 0.03, 0.01])[1], t_test([0.03, 0.04, 0.02, 0.03])[1]])
    assert p[0] >= 0.05 > p[1]
    _, lines, _ = told(capsys, *words)
    assert [row[-1] for row in cells_of(lines)] == ["81.00 ± 2.94†", "83.50 ± 1.73†", "80.50 ± 1.29"]
    assert "no row is better than each other row" in lines[-3] and lines[-2].startswith("†: the best mean there")
    assert lines[-1].startswith("test: paired t over the seeds of both, 4 pairs, p < 0.05 after Holm's correction")
    _, lines, _ = told(capsys, *words, "--where", "optimizer=sgd,sam")
    assert [row[-1] for row in cells_of(lines)] == ["**83.50 ± 1.73**", "80.50 ± 1.29"]
    assert any(line.startswith("bold: better than each other row") for line in lines)
    _, lines, _ = told(capsys, *words, "--where", "optimizer=sgd,sam", "--format", "text")
    assert lines[2].endswith(" 83.50 ± 1.73*") and any(line.startswith("*: better") for line in lines)


def test_the_lowest_forgetting_is_the_best(three, capsys):
    _, lines, _ = told(capsys, three, "--by", "optimizer", "--where", "optimizer=sgd,sam", "--best")
    assert [row[-1] for row in cells_of(lines)] == ["**16.50 ± 1.73**", "19.50 ± 1.29"]


def test_memory_sizes_and_benchmarks_have_a_best_each(tmp_path, capsys):
    for dataset in ("perm-mnist", "rot-mnist"):
        for size, shift in ((200, 0.0), (500, 0.1)):
            fill(tmp_path, "sgd", SGD, dataset=dataset, buffer_size=size)
            fill(tmp_path, "sam", [value + shift for value in SAM], dataset=dataset, buffer_size=size)
    for words in ([], ["--pivot", "dataset,buffer_size"]):
        _, lines, _ = told(capsys, tmp_path, "--best", "--metrics", "final_average_accuracy", *words)
        text = "\n".join(lines)
        assert text.count("**83.50 ± 1.73**") == 2 and text.count("**93.50 ± 1.73**") == 2
        assert text.count("**80.50") == 0 and "†" not in text


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_common_seeds_make_no_best(tmp_path, capsys, seeds):
    fill(tmp_path, "sgd", SGD[:seeds])
    fill(tmp_path, "sam", [value + 0.1 + 0.001 * i for i, value in enumerate(SAM[:seeds])])
    _, lines, _ = told(capsys, tmp_path, "--best")
    text = "\n".join(lines)
    assert "**" not in text and "†" not in text
    assert lines[-1] == "no best is marked: its test needs 3 seeds that two rows of a column share"


@pytest.fixture
def grid(tmp_path):
    """Ranks of a, b, c in four blocks: 1 2 3, 1 2 3, 1 3 2, 1.5 1.5 3; c has no run in the fifth."""
    blocks = {
        ("perm-mnist", 200): (0.9, 0.8, 0.7), ("perm-mnist", 500): (0.9, 0.85, 0.7),
        ("rot-mnist", 200): (0.9, 0.6, 0.7), ("rot-mnist", 500): (0.8, 0.8, 0.5), ("seq-mnist", 500): (0.9, 0.8, None),
    }  # fmt: skip
    for (dataset, size), values in blocks.items():
        for model, value in zip("abc", values, strict=True):
            if value is not None:
                make_run(tmp_path, model=model, dataset=dataset, buffer_size=size, accuracy=value, forgetting=1 - value)
    return tmp_path


def test_mean_ranks_the_friedman_test_and_the_critical_difference(grid, capsys):
    code, lines, err = told(capsys, grid, "--by", "model", "--ranks")
    assert code == 0 and "left out of the ranks: seq-mnist, 500, domain-il, where c has no final_average" in err
    means = [4.5 / 4, 8.5 / 4, 11 / 4]
    assert [row[:2] for row in cells_of(lines)] == [[name, f"{mean:.2f}{mark}"] for name, mean, mark in
                                                    zip("abc", means, "†††", strict=True)]  # fmt: skip
    rank_sums = [4 * mean for mean in means]
    ties = 1 - (2**3 - 2) / (4 * 3 * (3**2 - 1))  # one pair of equal values in one of 4 blocks
    value = (12 / (4 * 3 * 4) * sum(own**2 for own in rank_sums) - 3 * 4 * 4) / ties
    difference = 2.343 * math.sqrt(3 * 4 / (6 * 4))  # q of Demsar (2006), table 5
    expected = f"4 blocks, 3 groups, Friedman chi2 = {value:.2f}, p = {chi2.sf(value, 2):.3f}, CD = {difference:.2f}"
    assert f"final_average_accuracy: {expected};" in lines and f"forgetting_chaudhry18: {expected};" in lines


@pytest.mark.parametrize(("k", "q"), [(2, 1.960), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_has_the_quantiles_of_the_paper(k, q):
    """Demsar (2006), table 5 (a); his example has 4 classifiers on 14 data sets: CD = 1.25."""
    assert ranks.critical_difference(k, 14) == pytest.approx(q * math.sqrt(k * (k + 1) / (6 * 14)), abs=1e-3)
    if k == 4:
        assert round(ranks.critical_difference(k, 14), 2) == 1.25


def test_bars_join_the_longest_runs_that_are_not_separable():
    """The ranks of Demsar's figure 1 (a): 3.143, 2.000, 2.893, 1.964, with CD 1.25: one bar; with 1, two."""
    means = (3.143, 2.000, 2.893, 1.964)
    assert ranks.cliques(means, 1.25) == [(0, 3)]
    assert ranks.cliques(means, 1.0) == [(0, 2), (2, 3)]
    assert ranks.cliques((1.0, 4.0), 1.0) == []


def test_further_keys_make_blocks(tmp_path, capsys):
    for model, shift in (("er", 0.0), ("derpp", 0.05)):
        fill(tmp_path, "sgd", [value + shift for value in SGD], model=model)
        fill(tmp_path, "sam", [value + shift for value in SAM], model=model)
    code, lines, _ = told(capsys, tmp_path, "--by", "optimizer", "--pivot", "model", "--ranks")
    assert code == 0 and [row[:2] for row in cells_of(lines)] == [["sam", "1.00†"], ["sgd", "2.00†"]]
    assert "2 blocks, 2 groups, no Friedman test" in "\n".join(lines)
    code, _, err = told(capsys, tmp_path, "--by", "optimizer", "--where", "model=er", "--ranks")
    assert code == 2 and "--ranks needs 2 groups and 2 blocks" in err and "got 2 group(s) and 1 such block(s)" in err


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_picture_of_the_ranks_is_written(grid, tmp_path, capsys, suffix):
    path = tmp_path / f"ranks.{suffix}"
    code, lines, _ = told(capsys, grid, "--by", "model", "--ranks", path)
    assert code == 0 and lines
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert path.read_bytes().startswith(start) and not list(tmp_path.glob(".*tmp"))
    if suffix == "png":
        assert min(Image.open(path).size) > 300


def test_the_picture_shows_ranks_names_and_bars():
    rows = tuple({"model": name} for name in ("a", "long_name", "c", "d"))
    own = ranks.Ranks("final_average_accuracy", rows, (3.143, 2.0, 2.893, 1.964), 14, 9.28, 0.026, rows)
    axes = rank_picture.draw(own).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert {"1", "4", "CD = 1.25", "d (1.96)", "long_name (2.00)", "c (2.89)", "a (3.14)"} <= set(texts)
    thick = [line for line in axes.lines if line.get_linewidth() > 3]
    assert [sorted(line.get_xdata()) for line in thick] == [pytest.approx([1.964 - 0.03, 3.143 + 0.03])]
    left, right = axes.get_xlim()
    assert left > 4 and right < 1, "the best rank is on the right"


def ranks_picture(root, path, *words):
    """Runs of two methods with two optimizers on two benchmarks, of which the picture is written."""
    pairs = [(model, optimizer) for model in ("er", "mgser_sam") for optimizer in ("sgd", "friendly_sam")]
    for place, (model, optimizer) in enumerate(pairs):
        for dataset in ("perm-mnist", "rot-mnist"):
            make_run(root, model=model, optimizer=optimizer, dataset=dataset, accuracy=0.5 + place / 10)
    return report.main([str(root), "--metrics", "final_average_accuracy", "--ranks", str(path), *words])


@pytest.mark.parametrize(("width", "points"), [("column", 252), ("page", 504)])
def test_the_picture_of_the_ranks_is_a_picture_as_the_others(tmp_path, width, points):
    for name in ("a", "b"):
        assert ranks_picture(tmp_path / name, tmp_path / f"{name}.pdf", "--width", width) == 0
    content = (tmp_path / "a.pdf").read_bytes()
    assert content == (tmp_path / "b.pdf").read_bytes(), "equal runs give equal files"
    assert b"/CIDFontType2" in content and b"/Type3" not in content and b"CreationDate" not in content
    assert re.search(rb"/MediaBox \[\s*0 0 %d " % points, content)


@pytest.mark.parametrize("width", ["column", "page"])
def test_names_of_ranks_are_those_of_the_other_pictures_and_lie_on_the_page(tmp_path, width):
    path = tmp_path / "r.svg"
    assert ranks_picture(tmp_path / "runs", path, "--names", "er=ER", "er+friendly_sam=ER-F", "--width", width) == 0
    texts = re.findall(r">([^<>]+)</text>", path.read_text())
    spaced = " ".join(texts)
    for label in ("mgser_sam + friendly_sam (1.00)", "mgser_sam + sgd (2.00)", "ER-F (3.00)", "ER + sgd (4.00)"):
        assert label in spaced
    rows = tuple({"model": model, "optimizer": optimizer} for model in ("er", "mgser_sam") for optimizer in "ab")
    own = ranks.Ranks("final_average_accuracy", rows, (4.0, 1.0, 3.0, 2.0), 2, None, None, rows)
    figure = rank_picture.draw(own, {"mgser_sam": "a long name"}, width)
    figure.draw_without_rendering()
    assert {text.get_fontsize() for text in figure.axes[0].texts} == {8}
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1 for box in boxes)
    with pytest.raises(UsageError, match="leave no room for the axis in"):
        rank_picture.draw(own, {"mgser_sam": "long" * 30}, width)


def test_ranks_name_the_optimizers_where_each_method_has_its_own(tmp_path):
    for dataset in ("perm-mnist", "rot-mnist"):
        make_run(tmp_path, model="er", optimizer="sgd", dataset=dataset, accuracy=0.5)
        make_run(tmp_path, model="mgser_sam", optimizer="sam", dataset=dataset, accuracy=0.6)
    assert report.main([str(tmp_path), "--ranks", str(tmp_path / "r.svg"), "--width", "page"]) == 0
    text = (tmp_path / "r.svg").read_text()
    assert "er + sgd (2.00)" in text and "mgser_sam + sam (1.00)" in text


def test_a_wrong_name_or_width_for_ranks_is_said_before_anything_is_printed(tmp_path, capsys):
    assert ranks_picture(tmp_path / "runs", tmp_path / "r.pdf", "--names", "err=ER") == 2
    said = capsys.readouterr()
    assert said.out == "" and "--names: nothing here is called 'err'. Did you mean er" in said.err
    assert report.main([str(tmp_path / "runs"), "--ranks", "--width", "page"]) == 2
    assert "--width is for pictures. Add --plot KIND or --ranks FILE, or drop it." in capsys.readouterr().err


def other(folder, **changes):
    """Changes keys of a run's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_mean_over_unlike_runs_is_refused(tmp_path, capsys):
    for seed in range(2):
        make_run(tmp_path, seed=seed, lr=0.1)
        make_run(tmp_path, seed=seed, lr=0.3, model="derpp")
    make_run(tmp_path, seed=5, lr=0.3)
    code, out, err = told(capsys, tmp_path)
    assert code == 2 and out == [] and err.count("\n") == 1
    assert "1 row(s) would be a mean over runs that differ in more than the seed (lr = 0.1, 0.3)" in err
    assert "'perm-mnist er sgd 200'" in err and "--by dataset,model,optimizer,buffer_size,lr" in err
    assert "--where lr=0.1" in err and "--mix" in err
    assert told(capsys, tmp_path, "--by", "dataset,model,optimizer,buffer_size,lr")[0] == 0
    assert told(capsys, tmp_path, "--where", "lr=0.1")[0] == 0
    code, _, err = told(capsys, tmp_path, "--mix")
    assert code == 0 and "note: perm-mnist er sgd 200 mixes runs of lr = 0.1, 0.3." in err


def test_other_code_and_another_protocol_are_not_averaged(tmp_path, capsys):
    codes = ({"models/er.py": "a" * 16}, {"models/er.py": "b" * 16}, None)
    for seed, code in enumerate(codes):
        other(make_run(tmp_path, seed=seed), code=code)
    code, _, err = told(capsys, tmp_path)
    assert code == 2 and "different code or data: models/er.py" in err
    assert "--by dataset,model,optimizer,buffer_size,code_version" in err
    assert told(capsys, tmp_path, "--by", "model,code_version")[0] == 0
    for folder, seed in zip(sorted(tmp_path.rglob("config.json")), (1, 1, 2), strict=True):
        other(folder.parent, code=None, protocol=seed)
    code, _, err = told(capsys, tmp_path)
    assert code == 2 and "protocol_version = 1, 2" in err and "--where protocol_version=1" in err
    assert told(capsys, tmp_path, "--where", "protocol_version=1")[0] == 0


def test_runs_of_two_codes_are_all_there_where_they_are_told_apart(tmp_path, capsys):
    for name, seeds, time in (("a", range(5), "20260101-000000"), ("b", range(3), "20260102-000000")):
        for seed in seeds:
            other(make_run(tmp_path, seed=seed, accuracy=0.5 + seed / 100, time=time), code={"models/er.py": name * 16})
    versions = {run.get("code_version"): run.code for run in finished.find_runs([tmp_path], with_repeats=True)}
    first = next(version for version, code in versions.items() if code == {"models/er.py": "a" * 16})
    second = next(version for version in versions if version != first)
    code, lines, err = told(capsys, tmp_path, "--where", f"code_version={first}")
    assert code == 0 and "| 5 |" in lines[2] and err == ""
    code, lines, err = told(capsys, tmp_path, "--by", "code_version")
    assert code == 0 and err == ""
    assert {line.split("|")[1].strip(): line.split("|")[3].strip() for line in lines[2:4]} == {first: "5", second: "3"}
    code, lines, err = told(capsys, tmp_path, "--by", "model,code_version", "--against", f"code_version={first}")
    assert code == 0 and "| 3 | +0.00" in lines[2] and "seed 3, 4" in err
    assert "3 run(s) repeat another one's flags and seed" in told(capsys, tmp_path, "--mix")[2]


def test_a_source_of_random_numbers_can_be_what_is_compared(tmp_path, capsys):
    for seed in range(4):
        for source in (0, 1):
            make_run(tmp_path, seed=seed, accuracy=0.5 + seed**2 / 100 + source * seed / 50, class_order_seed=source)
    words = ("--by", "model,class_order_seed", "--against", "class_order_seed=0", "--metrics", "final_average_accuracy")
    code, lines, err = told(capsys, tmp_path, *words)
    assert code == 0 and err == "" and lines[2].split("|")[4].strip() == "4"


def test_runs_that_changed_on_their_way_are_not_averaged_with_others(tmp_path, capsys):
    code = {"models/er.py": "a" * 16}
    later = [{"after_step": 10, "code": {"models/er.py": "b" * 16}}]
    for seed in range(2):
        other(make_run(tmp_path / "whole", seed=seed), code=code)
    other(make_run(tmp_path / "changed", seed=2), code=code, changed_code=later)
    assert told(capsys, tmp_path / "whole")[0] == told(capsys, tmp_path / "changed")[0] == 0
    found, _, err = told(capsys, tmp_path)
    assert found == 2 and "different code or data: models/er.py" in err
    found, lines, _ = told(capsys, tmp_path, "--by", "model,code_version")
    assert found == 0 and sorted(line.split("|")[4].strip() for line in lines[2:4]) == ["1", "2"]
    parent = {"run": "r", "config_hash": "h", "tasks": 3, "optimizer": "sgd", "code": None}
    other(make_run(tmp_path / "whole", seed=3), code=code, continues=parent)
    found, _, err = told(capsys, tmp_path / "whole")
    assert found == 2 and "continues = 3 task(s) under sgd, none" in err
    assert told(capsys, tmp_path / "whole", "--where", "continues=none")[0] == 0


def test_pairs_have_equal_seeds_of_every_source(tmp_path, capsys):
    for i in range(4):
        make_run(tmp_path, "er", seed=0, accuracy=0.5 + i / 100, class_order_seed=i)  # as a study varies one source
        make_run(tmp_path, "derpp", seed=0, accuracy=0.6 + i / 100 + i**2 / 1000, class_order_seed=i)
        make_run(tmp_path, "gdumb", seed=i, accuracy=0.4 + i / 100, class_order_seed=0)  # or fixes it
        make_run(tmp_path, "si", seed=i, accuracy=0.9, buffer_size=200)
    words = (tmp_path, "--by", "model", "--against", "model=er", "--metrics", "final_average_accuracy")
    code, lines, err = told(capsys, *words)
    assert code == 0
    numbers = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in lines[2:5]}
    assert numbers == {"derpp": "4", "gdumb": "1", "si": "1"}
    assert "seed 1 (class_order_seed 0), 2 (class_order_seed 0), 3 (class_order_seed 0) of gdumb, which er has" in err
    assert "seed 1, 2, 3 of si, which er has not" in err
    code, lines, err = told(capsys, tmp_path, "--by", "model", "--best", "--where", "model=er,derpp")
    assert code == 0 and "**" in "".join(lines)


def test_runs_that_do_not_say_which_code_made_them_count_as_the_same(tmp_path, capsys):
    other(make_run(tmp_path, seed=0), code={"models/er.py": "a" * 16})
    make_run(tmp_path, seed=1)
    code, lines, err = told(capsys, tmp_path)
    assert code == 0 and "| 2 |" in lines[2] and err == ""


def test_validation_and_test_runs_never_meet(tmp_path, capsys):
    fill(tmp_path, "sgd", SGD)
    fill(tmp_path, "sam", SAM, validation=True)
    fill(tmp_path, "sgd", ADAM, validation=True)
    code, _, err = told(capsys, tmp_path)
    assert (
        code == 2 and "split = test, validation" in err and "--where split=test, or show them apart with --mix" in err
    )
    for words in (["--mix"], ["--by", "optimizer,split"], ["--by", "optimizer,validation"]):
        code, lines, err = told(
            capsys, tmp_path, *words, "--metrics", "final_average_accuracy", "--setting", "domain-il"
        )
        assert code == 0 and len(cells_of(lines)) == 3 and "mixes" not in err
        assert lines[-1] == "rows of split = validation: validation split, not the test set"
    code, lines, _ = told(
        capsys, tmp_path, "--mix", "--by", "optimizer", "--best", "--metrics", "final_average_accuracy"
    )
    assert [row[-1] for row in cells_of(lines)] == ["83.50 ± 1.73†", "80.50 ± 1.29", "81.00 ± 2.94†"]
    code, lines, _ = told(capsys, tmp_path, "--mix", "--by", "optimizer", "--against", "optimizer=sgd")
    assert code == 0 and all("| validation |" in line for line in lines[2:4]) and lines[4] == ""
    code, _, err = told(capsys, tmp_path, "--by", "optimizer,split", "--against", "split=test")
    assert code == 2 and "validation and test runs are never compared" in err
    code, lines, _ = told(capsys, tmp_path, "--where", "split=validation", "--pivot", "dataset")
    assert lines[0].startswith("| model | optimizer | buffer_size | split |") or "| split |" in lines[0]
    assert lines[-1] == "validation split, not the test set"
    picture = tmp_path / "r.svg"
    ranked = ("--by", "optimizer", "--pivot", "seed", "--metrics", "final_average_accuracy", "--ranks", picture)
    code, lines, _ = told(capsys, tmp_path, "--where", "split=validation", *ranked)
    assert code == 0 and lines[-1] == "validation split, not the test set"
    assert "validation split, not the test set" in " ".join(re.findall(r">([^<>]+)</text>", picture.read_text()))
    code, lines, _ = told(capsys, tmp_path, "--where", "split=test", "optimizer=sgd")
    assert code == 0 and "validation" not in "\n".join(lines)


def test_a_table_from_python_and_a_sweeps_are_never_refused(tmp_path):
    make_run(tmp_path, seed=0, lr=0.1)
    make_run(tmp_path, seed=1, lr=0.3)
    said = []
    assert "| 2 |" in tables.table(finished.load_runs([tmp_path]), say=said.append) and "mixes runs of lr" in said[0]


def columns_of(text):
    """The number of columns that a tabular declares."""
    spec = re.search(r"\\begin\{tabular\}\{(.*)\}\n", text)[1]
    return len(re.sub(r"\[[^]]*\]", "", spec))


def check_latex(text, tmp_path):
    """Environments, braces and columns are balanced; where there is a pdflatex, it takes the table."""
    assert re.findall(r"\\begin\{(\w+)\}", text) == re.findall(r"\\end\{(\w+)\}", text)[::-1]
    plain = re.sub(r"^%.*\n", "", text, flags=re.MULTILINE)
    assert len(re.findall(r"(?<!\\)\{", plain)) == len(re.findall(r"(?<!\\)\}", plain))
    rows = [line for line in plain.splitlines() if line.endswith(r"\\")]
    assert rows and {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {columns_of(text)}
    if shutil.which("pdflatex"):
        head = "\\documentclass{article}\\usepackage{booktabs,siunitx}\n\\begin{document}\n"
        (tmp_path / "page.tex").write_text(head + text + "\\end{document}\n", encoding="utf-8")
        command = ["pdflatex", "-draftmode", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize(
    "more", [[], ["--pivot", "dataset"], ["--interval"], ["--best"], ["--against", "optimizer=sgd"]]
)
@pytest.mark.parametrize("siunitx", [[], ["--siunitx"]])
def test_latex_is_balanced(three, tmp_path, capsys, more, siunitx):
    make_run(three, optimizer=r"od_d&%$#{}~^\<>|", accuracy=0.5, forgetting=None)
    floating = ["--caption", r"5 % of {a}_b\c", "--label", "tab:a_b"]
    code, lines, _ = told(capsys, three, "--format", "latex", *floating, *more, *siunitx)
    assert code == 0
    text = "\n".join(lines) + "\n"
    assert r"\caption{5 \% of \{a\}\_b\textbackslash{}c}" in text and r"\label{tab:a_b}" in text
    assert r"od\_d\&\%\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}" in text or more[:1] == ["--against"]
    check_latex(text, tmp_path)


def test_siunitx_columns_have_room_for_their_numbers(three, capsys):
    make_run(three, optimizer="joint", accuracy=0.5, forgetting=None)
    _, lines, _ = told(capsys, three, "--by", "optimizer", "--where", "optimizer=sgd,sam,joint", "--format", "latex",
                       "--best", "--siunitx", "--setting", "domain-il")  # fmt: skip
    text = "\n".join(lines)
    assert r"\begin{tabular}{lrS[table-format = 2.2(3)]S[table-format = 2.2(3)]}" in text or "table-space" in text
    assert r"{final\_average\_accuracy (\%)}" in text and "{--}" in text
    assert "80.50 +- 1.29" in text and r"% \usepackage{booktabs,siunitx}" in text
    _, lines, _ = told(capsys, three, "--by", "optimizer", "--format", "latex", "--siunitx", "--pivot", "dataset")
    assert r"\num{80.50 +- 1.29} / \num{19.50 +- 1.29}" in "\n".join(lines)


def test_latex_of_before_is_unchanged_and_says_validation(tmp_path, capsys):
    fill(tmp_path, "sgd", SGD, validation=True)
    _, lines, _ = told(capsys, tmp_path, "--by", "optimizer", "--setting", "domain-il", "--format", "latex")
    spread = r"% mean $\pm$ sample standard deviation"
    assert lines[:3] == [spread, "% validation split, not the test set", r"\begin{tabular}{llrrr}"]
    assert lines[6] == r"sgd & validation & 4 & 80.50 $\pm$ 1.29 & 19.50 $\pm$ 1.29 \\"
    assert latex.latex_text("–") == "--" and latex.tabular(["a"], [["b"]], 1).count("&") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "optimizer"], "--against expects key=value, got 'optimizer'."),
        (["--against", "optimizer=sgdd"], "--against optimizer=sgdd: no row has that. These occur: optimizer=adam; "),
        (["--against", "rho=1"], "--against rho: it is not among the keys of the rows"),
        (["--against", "optimizer=sgd", "--ranks"], "--against and --ranks do not fit together"),
        (["--against", "optimizer=sgd", "--interval"], "--interval and --against do not fit together"),
        (["--ranks", "results"], "--ranks expects a file that ends in .pdf, .svg, .png, .pgf, got 'results'"),
        (["--ranks", "--by", "dataset,buffer_size"], "no key is left to rank by"),
        (["--caption", "x"], "--caption is for --format latex, got --format markdown."),
        (["--best", "--format", "csv"], "--best marks cells, which CSV cannot."),
        (["--format", "latex", "--label", "a b"], "--label expects letters, digits and"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(three, capsys, words, message):
    if "--by" in words:
        shutil.rmtree(three / "domain-il")
        fill(three, "sgd", SGD)
    code, out, err = told(capsys, three, *words)
    assert code == 2 and out == [] and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_all_problems_of_the_flags_are_said_at_once(three, capsys):
    code, _, err = told(capsys, three, "--ranks", "x.gif", "--best", "--siunitx")
    assert code == 2 and err.count("error: ") == 3


def test_without_statsmodels_one_line_says_what_to_install(three):
    program = (
        "import sys; sys.modules['statsmodels'] = None\n"
        "from flatcl.utils.commands import report\n"
        "sys.exit(report.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(three), "--best"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert 'pip install "flatcl[stats]"' in done.stderr and "pip install statsmodels" in done.stderr


def test_a_picture_that_cannot_be_written_ends_with_2(grid, tmp_path, capsys):
    code, lines, err = told(capsys, grid, "--by", "model", "--ranks", tmp_path / "missing" / "ranks.png")
    assert code == 2 and not lines and "cannot write" in err
