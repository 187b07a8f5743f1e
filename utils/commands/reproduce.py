"""Published tables, run again and compared: `flatcl reproduce der-perm-mnist --seeds 0-4 --jobs 2`.

`targets.csv` beside this file has the published figures, in percent, each with its source and with what confirms it.
What a table lacks is run through `sweep`; what is finished below --results_path is not run again, so that a table that
was stopped is continued by the same command. Each figure is then compared by Welch's t interval at 95 %, which needs no
more of a publication than mean, standard deviation and number of runs.
"""

import csv
import io
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from flatcl.utils.arguments import EngineArgs, Request, flags_of, resolve
from flatcl.utils.commands import sweep, train
from flatcl.utils.commands._parser import Parser
from flatcl.utils.commands.report import words
from flatcl.utils.console import complain
from flatcl.utils.errors import UsageError
from flatcl.utils.files import user_path
from flatcl.utils.registry import DATASETS, METHODS, canonical, nearest
from flatcl.utils.reports.cells import percent
from flatcl.utils.reports.groups import METRICS, Stat, written
from flatcl.utils.reports.runs import Run
from flatcl.utils.reports.tables import FORMATS, RENDER
from flatcl.utils.studies.engines import Runner
from flatcl.utils.studies.engines.local import Local

TARGETS = Path(__file__).with_name("targets.csv")
METRIC = METRICS[0]
LEVEL = 0.95
LIST = "LIST"
SEEDS = "0-4"
AGREES, ABOVE, BELOW, OTHER = "agrees", "differs (+)", "differs (-)", "protocol differs"
FEW, NOT_RUN, NO_DATA, NO_METHOD = "too few runs", "not run", "data missing", "method missing"
UNCONFIRMED, CONSTANT = "*", "†"


@dataclass(frozen=True)
class Target:
    """One published figure. `mean` and `std` are fractions; None: not published. `flags` are those of its protocol."""

    table: str
    model: str
    dataset: str
    buffer_size: str | None
    setting: str
    mean: float
    std: float | None
    runs: int | None
    source: str
    confirmed_by: str
    flags: tuple[tuple[str, str], ...]
    protocol: str  # in what the run behind the published figure is known to differ from ours

    @property
    def cell(self) -> tuple[tuple[str, str], ...]:
        """The flags of its runs, without the seed. Figures in several settings come from the same runs."""
        buffer = (("buffer_size", self.buffer_size),) if self.buffer_size else ()
        return ("model", self.model), ("dataset", self.dataset), *buffer, *self.flags

    @property
    def label(self) -> str:
        return f"{self.model}:{self.buffer_size}" if self.buffer_size else self.model


@dataclass(frozen=True)
class Difference:
    """Ours minus published, fractions, with its 95 % interval. `constant`: the published mean is taken as exact."""

    mean: float
    low: float
    high: float
    constant: bool


@dataclass(frozen=True)
class Row:
    """One figure of the table: published, ours, and what to make of it. `wall_s` is of all runs of the cell."""

    target: Target
    ours: Stat
    difference: Difference | None
    verdict: str
    protocol: str
    wall_s: float


def read_targets(file: Path = TARGETS) -> list[Target]:
    with open(file, newline="", encoding="utf-8") as lines:
        return [_target(line) for line in csv.DictReader(lines)]


def _target(line: Mapping[str, str]) -> Target:
    flags = line["flags"].split()
    return Target(
        table=line["table"],
        model=line["model"],
        dataset=line["dataset"],
        buffer_size=line["buffer_size"] or None,
        setting=line["setting"],
        mean=_fraction(line["mean"]),
        std=_fraction(line["std"]) if line["std"] else None,
        runs=int(line["runs"]) if line["runs"] else None,
        source=line["source"],
        confirmed_by=line["confirmed_by"] if line["confirmed"] == "1" else "",
        flags=tuple((name.removeprefix("--"), value) for name, value in zip(flags[::2], flags[1::2], strict=True)),
        protocol=line["protocol"],
    )


def _fraction(percents: str) -> float:
    return round(float(percents) / 100, 8)  # 0.8501, not 0.8501000000000001


def compare(ours: Stat, target: Target) -> Difference | None:
    """Welch's interval from summary statistics (Welch, 1947, with Satterthwaite's degrees of freedom). Where the
    published spread or number of runs is unknown, that of one sample against a constant. None for fewer than 2 runs."""
    from scipy.stats import t

    if ours.std is None:
        return None
    own, constant = ours.std**2 / ours.n, target.std is None or target.runs is None
    theirs = 0.0 if constant else target.std**2 / target.runs
    mean, half = ours.mean - target.mean, 0.0
    if own + theirs > 0:
        spread = own**2 / (ours.n - 1) + (0.0 if constant else theirs**2 / (target.runs - 1))
        half = float(t.ppf((1 + LEVEL) / 2, (own + theirs) ** 2 / spread)) * math.sqrt(own + theirs)
    return Difference(mean, mean - half, mean + half, constant)


def judge(difference: Difference | None, protocol: str) -> str:
    """The verdict on a figure that has been run."""
    if protocol:
        return OTHER
    if difference is None:
        return FEW
    if difference.low <= 0 <= difference.high:
        return AGREES
    return ABOVE if difference.mean > 0 else BELOW


def pick_table(targets: Sequence[Target], name: str) -> list[Target]:
    found = [target for target in targets if canonical(target.table) == canonical(name)]
    if not found:
        raise UsageError(f"unknown table: '{name}'. {nearest(name, _tables(targets))}")
    return found


def _tables(targets: Sequence[Target]) -> list[str]:
    return list(dict.fromkeys(target.table for target in targets))


def pick_cells(targets: Sequence[Target], patterns: Sequence[str]) -> list[Target]:
    """The targets that fit any of the patterns, model[:buffer[:dataset]], each part with wildcards."""
    chosen: set[Target] = set()
    problems = []
    for pattern in patterns:
        parts = canonical(pattern).split(":")
        found = {target for target in targets if len(parts) <= 3 and _fits(target, parts)}
        chosen |= found
        if not found:
            labels = list(dict.fromkeys(target.label for target in targets))
            problems.append(f"--cells: the table has no cell '{pattern}'. {nearest(pattern, labels)}")
    if problems:
        raise UsageError(*problems)
    return [target for target in targets if target in chosen]


def _fits(target: Target, parts: Sequence[str]) -> bool:
    own = (target.model, target.buffer_size or "", target.dataset)
    return all(fnmatchcase(canonical(name), part) for name, part in zip(own, parts, strict=False))


class Table:
    """The chosen part of one published table, and the runs that it asks for."""

    def __init__(self, targets: Sequence[Target], seeds: Sequence[int], rest: Sequence[str]):
        self.targets = targets
        axes = {"seed", *(name for target in targets for name, _ in target.cell)}
        self.request = sweep.check_rest(rest, dict.fromkeys(axes, ""))
        self.methods = set(METHODS.names())
        cells = list(dict.fromkeys(target.cell for target in targets if target.model in self.methods))
        points = [{**dict(cell), "seed": str(seed)} for seed in seeds for cell in cells]  # something of each cell first
        shared = sweep.Shared(rest, points) if points else ()
        self.partial = shared.partial if points else []
        self.jobs = sweep.plan(points, shared)
        self.changed = {_cell(job) for job in self.jobs[: len(cells)] if _changes(job)}
        self.missing = self.missing_data()

    def missing_data(self) -> dict[str, str]:
        """What to put where, for each dataset that is not on this machine."""
        configs = {dict(_cell(job))["dataset"]: job.config for job in self.jobs}
        found = {name: config.benchmark.missing(user_path(config.base_path)) for name, config in configs.items()}
        return {name: remedy for name, remedy in found.items() if remedy is not None}

    def download(self) -> None:
        """One after the other, before any run, since runs at the same time would fetch the same file."""
        configs = {dict(_cell(job))["dataset"]: job.config for job in self.jobs}
        for name in self.missing:
            configs[name].benchmark(configs[name], "cpu")
        self.missing = self.missing_data()

    def rows(self, runs: Mapping[str, Run]) -> list[Row]:
        """`runs`: the finished ones, by the hash of their job."""
        cells: dict[tuple, list[Run]] = {}
        for job in self.jobs:
            if job.hash in runs:
                cells.setdefault(_cell(job), []).append(runs[job.hash])
        return [self._row(target, cells.get(target.cell, [])) for target in self.targets]

    def _row(self, target: Target, runs: Sequence[Run]) -> Row:
        ours = Stat.of(run.summary["metrics"].get(target.setting, {}).get(METRIC) for run in runs)
        difference, protocol = compare(ours, target), target.protocol
        if target.cell in self.changed:
            protocol = "; ".join(filter(None, [protocol, f"{self._given()} after -- changes what is run"]))
        wall_s = sum(run.summary.get("cost", {}).get("wall_s", 0.0) for run in runs)
        verdict = judge(difference, protocol) if ours.n else self._why_not(target)
        return Row(target, ours, difference, verdict, protocol, wall_s)

    def _why_not(self, target: Target) -> str:
        if target.model not in self.methods:
            return NO_METHOD
        return NO_DATA if target.dataset in self.missing else NOT_RUN

    def _given(self) -> str:
        harmless = {name for name, flag in flags_of(EngineArgs, "engine").items() if not flag.result}
        return ", ".join(f"--{name}" for name in self.request.words if name not in harmless) or "a flag"


def _cell(job: sweep.Job) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in job.axes.items() if name != "seed")


def _changes(job: sweep.Job) -> bool:
    """Whether the flags after -- make another run of it than the published protocol."""
    return resolve(sweep.words_of(job.axes)).hash != job.hash


def listing(targets: Sequence[Target], root: Path, format: str) -> str:
    """All tables: what they are, how many cells they have, and for how many the data and the method are here."""
    head = ["table", "figures of", "datasets", "cells", "with data", "with method"]
    datasets = dict.fromkeys(target.dataset for target in targets)
    here = {name for name in datasets if DATASETS.load(name).missing(root) is None}
    methods, body = set(METHODS.names()), []
    for name in _tables(targets):
        own = [target for target in targets if target.table == name]
        cells = {target.cell: target for target in own}.values()
        with_data = sum(target.dataset in here for target in cells)
        with_method = sum(target.model in methods for target in cells)
        sources, names = (", ".join(dict.fromkeys(part)) for part in zip(*((t.source, t.dataset) for t in own),
                                                                         strict=True))  # fmt: skip
        body.append([name, sources, names, *map(str, (len(cells), with_data, with_method))])
    return _csv(head, body) if format == "csv" else RENDER[format](head, body, 3)


def shown(rows: Sequence[Row], format: str, times: bool) -> str:
    """The comparison as text that ends in a newline, its footnotes below (LaTeX: above, as comments; CSV: none)."""
    if format == "csv":
        return _raw(rows, times)
    several = [name for name in ("dataset", "setting") if len({getattr(row.target, name) for row in rows}) > 1]
    keys = ["model", *(["dataset"] if "dataset" in several else []), "buffer_size",
            *(["setting"] if "setting" in several else [])]  # fmt: skip
    head = [*keys, "ours (n)", "published (n)", f"difference [{LEVEL:.0%} interval]".replace("%", " %"), "verdict"]
    body = [
        [*(written(getattr(row.target, key)) for key in keys), *_cells(row), *([_seconds(row)] if times else [])]
        for row in rows
    ]
    text = RENDER[format](head + (["wall_s"] if times else []), body, len(keys))
    notes = footnotes(rows)
    if format == "latex":
        return "".join(f"% {note}\n" for note in notes) + text
    if format == "markdown":
        notes = ["- " + note.replace("*", "\\*") for note in notes]
    return text + "\n" + "".join(f"{note}\n" for note in notes)


def _cells(row: Row) -> list[str]:
    target, ours, difference = row.target, row.ours, row.difference
    number = target.runs or "?"
    published = f"{percent(Stat(target.mean, target.std, 0))} ({number}){'' if target.confirmed_by else UNCONFIRMED}"
    interval = written(None)
    if difference is not None:
        low, high = (f"{100 * end:+.2f}" for end in (difference.low, difference.high))
        interval = f"{100 * difference.mean:+.2f} [{low}, {high}]{CONSTANT if difference.constant else ''}"
    return [f"{percent(ours)} ({ours.n})" if ours.n else written(None), published, interval, row.verdict]


def _seconds(row: Row) -> str:
    return f"{row.wall_s:,.0f}" if row.ours.n else written(None)


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table needs to know, one line each."""
    notes = ["accuracy in %, mean ± sample standard deviation (number of runs); difference: ours minus published"]
    if any(not row.target.confirmed_by for row in rows):
        notes.append(f"{UNCONFIRMED} published figure from memory, confirmed in no second source")
    if any(row.difference and row.difference.constant for row in rows):
        notes.append(
            f"{CONSTANT} published std or n unknown: the published mean is treated as exact, the interval is from "
            "our runs only"
        )
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.verdict == OTHER:
            reasons.setdefault(row.protocol, []).append(row.target.label)
    notes += [f"{OTHER}: {', '.join(dict.fromkeys(cells))}: {reason}" for reason, cells in reasons.items()]
    absent = dict.fromkeys(row.target.model for row in rows if row.verdict == NO_METHOD)
    if absent:
        notes.append(f"{NO_METHOD}: {', '.join(absent)}")
    return notes + _balance(rows) + _costs(rows)


def _balance(rows: Sequence[Row]) -> list[str]:
    """How many figures have which verdict, and how much that says."""
    kinds = (AGREES, ABOVE, BELOW, OTHER, FEW, NOT_RUN, NO_DATA, NO_METHOD)
    counts = {kind: sum(row.verdict == kind for row in rows) for kind in kinds}
    notes = [f"{len(rows)} figure(s): " + ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)]
    judged = counts[AGREES] + counts[ABOVE] + counts[BELOW]
    if judged:
        missed = (1 - LEVEL) * judged
        notes.append(
            f"if there is no real difference, {missed:.1f} of {judged} intervals at {100 * LEVEL:.0f} % are expected "
            "to miss 0 by chance"
        )
    halves = [50 * (row.difference.high - row.difference.low) for row in rows if row.verdict == AGREES]
    if halves:
        notes.append(
            f"'{AGREES}' excludes only differences outside its interval: ± {min(halves):.2f} to ± {max(halves):.2f} "
            "points"
        )
    return notes


def _costs(rows: Sequence[Row]) -> list[str]:
    """The wall time of all runs, each counted once, and the cells that take most of it."""
    cells = {row.target.cell: row for row in rows if row.wall_s}
    total = sum(row.wall_s for row in cells.values())
    longest = sorted(cells.values(), key=lambda row: -row.wall_s)[:3]
    most = ", ".join(f"{row.target.label} {row.wall_s:,.0f} s ({row.wall_s / total:.0%})" for row in longest)
    return [f"wall time of these runs: {total:,.0f} s; most of it: {most}"] if cells else []


def _raw(rows: Sequence[Row], times: bool) -> str:
    """CSV: fractions, and every column."""
    head = ["table", "model", "dataset", "buffer_size", "setting", "mean", "std", "n", "published_mean",
            "published_std", "published_n", "source", "confirmed_by", "difference", "low", "high", "test", "verdict",
            "protocol", *(["wall_s"] if times else [])]  # fmt: skip
    body = []
    for row in rows:
        target, ours, gap = row.target, row.ours, row.difference
        test = "" if gap is None else "one-sample" if gap.constant else "welch"
        ends = (gap.mean, gap.low, gap.high) if gap else (None, None, None)
        body.append([target.table, target.model, target.dataset, target.buffer_size, target.setting, ours.mean,
                     ours.std, ours.n, target.mean, target.std, target.runs, target.source, target.confirmed_by, *ends,
                     test, row.verdict, row.protocol, *([row.wall_s] if times else [])])  # fmt: skip
    return _csv(head, body)


def _csv(head: Sequence[str], body: Sequence[Sequence]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *body])
    return out.getvalue()


def _panel(target: Target, datasets: Sequence[str], settings: Sequence[str]) -> tuple[int, int, int]:
    return datasets.index(target.dataset), settings.index(target.setting), int(target.buffer_size or 0)


def picture(rows: Sequence[Row], path: str) -> None:
    """Bars of ours beside published, with standard deviations: a panel for each dataset, setting and buffer size."""
    from flatcl.utils.engine import pictures

    bars = []
    several = [list(dict.fromkeys(getattr(row.target, key) for row in rows)) for key in ("dataset", "setting")]
    ran = [row for row in rows if row.ours.n]
    for row in sorted(ran, key=lambda row: _panel(row.target, *several)):
        target = row.target
        size = f"buffer {target.buffer_size}" if target.buffer_size else "no buffer"
        place = {"panel": f"{target.dataset}, {target.setting}, {size}", "method": target.model}
        bars.append({**place, "series": "ours", "mean": row.ours.mean, "std": row.ours.std})
        bars.append({**place, "series": "published", "mean": target.mean, "std": target.std})
    if not bars:
        complain(f"note: no run is finished, {path} is not drawn.")
        return
    pictures.save(pictures.comparison(bars, f"{METRIC.replace('_', ' ')} (%)"), path)


def _parser() -> Parser:
    parser = Parser(
        of_runs="write it after a separate --, as in: flatcl reproduce TABLE -- {flag} VALUE",
        elsewhere={
            "--model": "Write: --cells 'er,derpp'.",
            "--dataset": "The table decides it. See: flatcl reproduce.",
            "--buffer_size": "Write: --cells '*:200'.",
            "--seed": "Write: --seeds 0-2.",
            "--dry_run": "To run nothing, write: --show.",
        },
        prog="flatcl reproduce",
        description="Runs a published table and compares. Flags of `train` for all runs come after a separate --.",
        epilog="example: flatcl reproduce der-perm-mnist --cells 'er,*:200' --seeds 0-2 -- --device cpu",
    )
    add = parser.add_argument
    add("table", nargs="?", default=LIST, help=f"the table's name; {LIST} (default) prints all of them")
    add("--cells", type=words, metavar="PATTERNS", help="model[:buffer[:dataset]] with wildcards, e.g. 'er,*:200'")
    add("--seeds", help=f"e.g. 0-2,5 (default: {SEEDS})")
    add("--jobs", type=int, metavar="N", help="worker processes, which share the cores (default: 1)")
    add("--show", nargs="?", const="", metavar="FOLDER",
        help="run nothing; show what is finished below --results_path, or below FOLDER (runs and records)")  # fmt: skip
    add("--download", action="store_true", help="fetch the data that is not on this machine")
    add("--times", action="store_true", help="a column with the wall time of each cell's runs")
    add("--format", choices=FORMATS, default="text")
    add("--out", metavar="FILE", help="write the table there instead of printing it")
    add("--picture", metavar="FILE.png", help="also draw ours beside published")
    sweep.add_keep_changed(parser)
    return parser


def _check_files(args) -> None:
    """Files that cannot be written are found before the work, not after it."""
    problems = []
    if args.picture and Path(args.picture).suffix.lower() != ".png":
        problems.append(f"--picture expects a file that ends in .png, got '{args.picture}'.")
    for flag, name in (("--out", args.out), ("--picture", args.picture)):
        path = Path(name) if name else None
        if path and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
            problems.append(f"{flag}: cannot write {path}. Give a file in a folder that exists and can be written.")
    if problems:
        raise UsageError(*problems)


def _list(args, rest: Sequence[str], targets: Sequence[Target]) -> int:
    rest_words = Request.parse(list(rest)).words
    unused = [flag for flag in ("cells", "seeds", "jobs", "show", "download", "times", "picture")
              if getattr(args, flag) not in (None, False)]  # fmt: skip
    unused += [f"{name} after --" for name in rest_words if name != "base_path"]
    if unused:
        given = ", ".join(f"--{flag}" for flag in unused)
        raise UsageError(f"{given} needs a table, got {LIST}. Choose from: {', '.join(_tables(targets))}.")
    root = " ".join(rest_words.get("base_path", [])) or os.environ.get("FLATCL_DATA") or EngineArgs.base_path
    _write(listing(targets, user_path(root), args.format), args.out)
    return sweep.OK


def _write(text: str, out: str | None) -> None:
    if out:
        Path(out).write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def _reproduce(argv: Sequence[str], runner: Runner, file: Path) -> int:
    cut = argv.index("--") if "--" in argv else len(argv)
    rest = list(argv[cut + 1 :])
    args = _parser().parse_args(argv[:cut])
    targets = read_targets(file)
    _check_files(args)
    if canonical(args.table) == canonical(LIST):
        return _list(args, rest, targets)
    num_workers = 1 if args.jobs is None else args.jobs
    sweep.check_jobs(num_workers)
    for name, given in (("download", args.download), ("jobs", args.jobs is not None)):
        if args.show is not None and given:
            raise UsageError(f"--show runs nothing, --{name} is for runs. Give one of them.")
    chosen = pick_table(targets, args.table)
    if args.cells is not None:
        chosen = pick_cells(chosen, args.cells or [""])
    table = Table(chosen, sweep.parse_seeds(SEEDS if args.seeds is None else args.seeds), rest)
    code, folders = sweep.OK, [user_path(args.show)] if args.show else None
    keep_changed = bool(args.keep_changed)
    if args.show is None:
        code = _run(table, num_workers, args.download, runner, keep_changed)
    found = sweep.look(table.jobs, folders, keep_changed)
    if args.show is not None:
        for line in found.notes():
            complain(line)
    rows = table.rows(found.done)
    _write(shown(rows, args.format, args.times), args.out)
    if args.picture:
        picture(rows, args.picture)
    for name in dict.fromkeys(row.target.dataset for row in rows if row.verdict == NO_DATA):
        complain(f"{NO_DATA}: {name}: {table.missing[name]}, or add --download.")
    return code


def _run(table: Table, num_workers: int, download: bool, runner: Runner, keep_changed: bool) -> int:
    """Runs what is not finished and has its data; returns the exit code."""
    if download:
        table.download()
    if table.partial:
        complain(f"only for the runs that have them: --{', --'.join(table.partial)}")
    found = sweep.look(table.jobs, keep_changed=keep_changed)
    waiting = [job for job in table.jobs if job.hash not in found.done]
    pending = [job for job in waiting if job.axes["dataset"] not in table.missing]
    without = f", {len(waiting) - len(pending)} without their data" if len(pending) < len(waiting) else ""
    complain(f"{len(table.jobs)} run(s), {len(found.done)} of them already finished{without}")
    for line in found.notes():
        complain(line)
    sweep.catch_stops()
    failed, interrupted = sweep.run_shown(
        pending, Local(num_workers), sweep.flags_of_all(keep_changed), runner, file=sys.stderr
    )
    if interrupted:
        complain("interrupted: this is what is finished; the same command does the rest")
    sweep.say_failed(failed)
    return sweep.INTERRUPTED if interrupted else sweep.FAILED if failed else sweep.OK


def main(argv: Sequence[str], runner: Runner = train.main, file: Path = TARGETS) -> int:
    """0 all finished or without its data, 1 some runs failed, 2 bad input, 130 interrupted."""
    try:
        return _reproduce(list(argv), runner, file)
    except UsageError as error:
        for problem in error.problems:
            complain(f"error: {problem}")
        return sweep.USAGE
    except KeyboardInterrupt:  # before or after the runs
        complain("interrupted")
        return sweep.INTERRUPTED
