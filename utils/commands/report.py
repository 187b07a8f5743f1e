"""Tables and pictures of finished runs: `flatcl report ./results --pivot dataset,buffer_size`.

Runs that differ only in their seed make one row: mean ± sample standard deviation (n - 1). Rows whose runs differ in
more are refused unless --mix is given. What is left out, counted once or mixed is said on stderr, so that no table
hides what it stands on.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from flatcl.utils.commands._parser import Parser, conditions
from flatcl.utils.console import complain, guarded, silence
from flatcl.utils.errors import UsageError
from flatcl.utils.extras import require
from flatcl.utils.files import printable, user_path, write_text
from flatcl.utils.registry import canonical, nearest
from flatcl.utils.reports import comparison_tables, latex, page, page_pictures, plots, rank_picture
from flatcl.utils.reports.groups import BY, METRICS, asked_keys, check_mixtures, group_runs
from flatcl.utils.reports.runs import RECORD, Run, all_runs, load_runs, select, write_record
from flatcl.utils.reports.tables import FORMATS, table

SUFFIXES = ", ".join(plots.SUFFIXES)
OF_PICTURES = ("width", "x")
OF_RANK_PICTURES = ("width",)
OF_TABLES = ("pivot", "format", "interval", "best", "against", "ranks", "caption", "label", "siunitx")


def words(text: str) -> list[str]:
    """`a,b` as a list."""
    return text.replace(",", " ").split()


def names(text: str) -> list[str]:
    """As `words`, for names in which `-` and `_` are equal."""
    return [canonical(word) for word in words(text)]


def _parser() -> Parser:
    kinds = "; ".join(f"{name}: {what}" for name, what in plots.KINDS.items()).replace("%", "%%")
    parser = Parser(
        prog="flatcl report",
        description="Tables of finished runs: mean ± sample std in percent, and n. With --plot, a picture of them.",
    )
    add = parser.add_argument
    add("runs", nargs="*", default=["./results"], help="folders, searched recursively (default: ./results)")
    add("--setting", help="class-il, task-il, ...; default: all that the runs have")
    add("--by", type=names, metavar="KEYS",
        help=f"keys that make a row (default: {','.join(BY)}); of a picture, a line, point, row or cell (default: "
        f"{','.join(plots.BY)})")  # fmt: skip
    add("--metrics", type=names,
        help=f"metrics or costs, e.g. train_s (default: {','.join(METRICS)}); a picture has one")  # fmt: skip
    add("--pivot", type=names, metavar="KEYS", help="keys that make columns, e.g. dataset,buffer_size")
    add("--where", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="count only these runs")
    add("--interval", action="store_true", help="the 95 %% t interval of each mean as well")
    add("--best", action="store_true", help="mark the best of each column, if a test can tell it from all others")
    add(
        "--against",
        metavar="KEY=VALUE",
        help="instead of means: each row minus the one that has KEY=VALUE and is equal in the other keys, with tests "
        "paired by seed; several pairs are joined by commas",
    )
    add(
        "--ranks",
        nargs="?",
        const="",
        metavar="FILE",
        help="instead of means: mean ranks over benchmarks, memory sizes and settings (and --pivot keys), with the "
        f"Friedman and Nemenyi tests; into FILE ({SUFFIXES}) goes the picture of the critical difference",
    )
    add(
        "--mix",
        action="store_true",
        help="also average (and draw) runs that differ in more than their seed, with notes",
    )
    add("--order", type=words, default=[], metavar="NAMES", help="models (in a picture also optimizers, ...) in order")
    add("--format", choices=FORMATS, help=f"of a table (default: {FORMATS[0]})")
    add("--caption", metavar="TEXT", help="with --format latex: a float with this caption")
    add("--label", metavar="NAME", help="with --format latex: a float with this label")
    add("--siunitx", action="store_true", help="with --format latex: numbers for the package siunitx")
    add("--out", metavar="FILE", help=f"write the table there instead of printing it; the picture: {SUFFIXES}")
    add("--record", metavar="FILE", help=f"write the runs into one file; as {RECORD} in a folder it can be read again")
    add("--plot", metavar="KIND", help=f"draw a picture instead of a table: {kinds}")
    add("--width", choices=plots.WIDTHS,
        help="of a picture: " + ", ".join(f"{name} ({inches:g} inches)" for name, inches in plots.WIDTHS.items())
        + f"; default: {next(iter(plots.WIDTHS))}")  # fmt: skip
    add(
        "--names",
        nargs="+",
        action="extend",
        metavar="NAME=LABEL",
        help="labels of values, keys and metrics, e.g. er=ER,buffer_size=memory; in pictures also er+sam='ER with SAM'",
    )
    add("--x", metavar="COST", help=f"of compute: {plots.ROWS} (forward + 2 x backward, the default) or train_s, ...")
    add(
        "--html",
        metavar="FILE.html",
        help="instead of the table, one page for a browser: tables that sort and filter, pictures, all runs",
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    """Flags that do not fit together, and files of a wrong kind, all at once and before any run is read."""
    given = {name for name in (*OF_PICTURES, *OF_TABLES) if getattr(args, name) not in (None, False)}
    problems = [*_problems_of_files(args), *_problems_of_tables(args, given)]
    if args.plot is None:
        fitting = OF_RANK_PICTURES if args.ranks else ()
        problems += [f"--{name} is for pictures. Add --plot KIND{' or --ranks FILE' * (name in OF_RANK_PICTURES)}, or "
                     "drop it." for name in OF_PICTURES if name in given and name not in fitting]  # fmt: skip
        if args.out is not None and Path(args.out).suffix.lower() in plots.SUFFIXES:
            problems.append(f"--out {args.out} is a picture's name. Add --plot KIND, or give another.")
    else:
        problems += [f"--{name} is for tables. Drop it, or --plot." for name in OF_TABLES if name in given]
        problems += _problems_of_plots(args)
    if problems:
        raise UsageError(*problems)
    for name in ("against", "best"):
        if name in given:
            require("statsmodels", "stats", f"--{name}")
    for file in (args.out if args.plot else None, args.ranks):
        if file:
            plots.check_path(file)


def _problems_of_files(args: argparse.Namespace) -> list[str]:
    problems = []
    if args.html and Path(args.html).suffix.lower() not in (".html", ".htm"):
        problems.append(f"--html expects a file that ends in .html, got '{args.html}'.")
    elif args.html and not user_path(args.html).parent.is_dir():
        problems.append(f"--html: there is no folder {user_path(args.html).parent}. Make it, or give another file.")
    if args.html and not (args.out or args.ranks):
        problems += [f"--{name} is for the table, which --html replaces. Drop it, or give --out too."
                     for name in (*OF_TABLES, "names")
                     if name != "ranks" and getattr(args, name) not in (None, False)]  # fmt: skip
    if args.ranks and Path(args.ranks).suffix.lower() not in plots.SUFFIXES:
        problems.append(
            f"--ranks expects a file that ends in {SUFFIXES}, got '{args.ranks}'. Give the folders of runs before the "
            "flags."
        )
    return problems


def _problems_of_tables(args: argparse.Namespace, given: set[str]) -> list[str]:
    problems = []
    if args.label is not None and not re.fullmatch(r"[A-Za-z0-9:._+/-]+", args.label):
        problems.append(f"--label expects letters, digits and :._+/-, got '{args.label}'. Example: tab:results.")
    apart = [("against", "ranks"), *((name, other) for other in ("against", "ranks") for name in ("interval", "best"))]
    apart.append(("pivot", "against"))
    problems += [f"--{name} and --{other} do not fit together. Drop one of them."
                 for name, other in apart if {name, other} <= given]  # fmt: skip
    problems += [f"--{name} is for --format latex, got --format {args.format or FORMATS[0]}."
                 for name in ("caption", "label", "siunitx") if name in given and args.format != "latex"]  # fmt: skip
    if "best" in given and args.format == "csv":
        problems.append("--best marks cells, which CSV cannot. Choose another --format.")
    if args.names and args.format == "csv":
        problems.append("--names: CSV keeps the names that programs know. Drop it, or choose another --format.")
    return problems


def _problems_of_plots(args: argparse.Namespace) -> list[str]:
    problems = []
    if args.plot not in plots.KINDS:
        problems.append(f"--plot: unknown kind: '{args.plot}'. {nearest(args.plot, list(plots.KINDS))}")
    if args.out is None:
        problems.append(f"--plot needs a file. Add --out FILE that ends in {SUFFIXES}.")
    if args.metrics is not None and len(args.metrics) != 1:
        problems.append(f"--plot draws one metric, got --metrics {','.join(args.metrics)}. Give one of them.")
    return problems


def _labels(pairs: Sequence[str]) -> dict[str, str]:
    """{name: label} of `er=ER,mgser_sam=MGSER-SAM`. A comma that no name follows belongs to the label."""
    parts = [part for pair in pairs for part in re.split(r",(?=[^,=]+=)", pair)]
    bad = [part for part in parts if "=" not in part or not all(part.partition("=")[::2])]
    if bad:
        raise UsageError(*(f"--names expects name=label, got '{part}'. Example: --names er=ER." for part in bad))
    names = [canonical(part.partition("=")[0]) for part in parts]
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    if twice:
        raise UsageError(*(f"--names gives {name} {names.count(name)} labels. Give one." for name in twice))
    return {name: part.partition("=")[2] for name, part in zip(names, parts, strict=True)}


def _text_of(args: argparse.Namespace, runs: Sequence[Run], labels: dict[str, str]) -> tuple[str, list]:
    """(the table that is asked for, the ranks that it shows)."""
    metrics, pivot, form = args.metrics or METRICS, args.pivot or (), args.format or FORMATS[0]
    options = latex.Options(args.caption, args.label, args.siunitx)
    if args.ranks is not None:
        keys = comparison_tables.block_keys(runs, args.by, pivot)
    else:
        keys = asked_keys(runs, args.by, pivot)
    if not args.mix:
        check_mixtures(group_runs(runs, keys, args.setting), keys)
    if args.against is not None:
        pairs = conditions(args.against.split(","), "--against", "optimizer=sgd")
        text = comparison_tables.against_table(
            runs, pairs, args.by, metrics, args.setting, args.order, form, complain, options, labels
        )
        return text, []
    if args.ranks is not None:
        ranks = comparison_tables.ranks_of(runs, args.by, metrics, args.setting, args.order, pivot, complain)
        return comparison_tables.ranks_table(ranks, form, options, labels, has_pairs=bool(args.ranks)), ranks
    text = table(runs, args.by, metrics, args.setting, pivot, args.order, form, interval=args.interval,
                 best=args.best, options=options, names=labels)  # fmt: skip
    return text, []


def _picture(args, runs: Sequence[Run], labels: dict[str, str]) -> None:
    figure = plots.figure(
        args.plot, runs, metric=args.metrics and args.metrics[0], by=args.by, setting=args.setting, order=args.order,
        names=labels, width=args.width or next(iter(plots.WIDTHS)), x=args.x or plots.ROWS, mix=args.mix,
    )  # fmt: skip
    plots.save(figure, args.out)


def _report(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    _check(args)
    labels, where = _labels(args.names or []), conditions(args.where)
    try:
        if args.html:
            _write_page(args, where)
        if not args.html or args.out or args.record or args.ranks:
            against = conditions((args.against or "").split(",") if args.against else [], "--against", "optimizer=sgd")
            runs = load_runs(args.runs, where=where, keys=(*(args.by or ()), *(args.pivot or ()), *against))
            if args.plot:
                _picture(args, runs, labels)
            else:
                _write_table(args, runs, labels)
            if args.record:
                write_record(runs, args.record)
                if Path(args.record).name != RECORD:
                    complain(f"note: in folders only records named {RECORD} are found; give this one by its name.")
    except OSError as error:
        raise UsageError(
            f"cannot write {error.filename or args.out or args.record or args.html}: {error.strerror}. Give a file in "
            "a folder that can be written to and has room."
        ) from None


def _write_table(args: argparse.Namespace, runs: Sequence[Run], labels: dict[str, str]) -> None:
    text, ranks = _text_of(args, runs, labels)
    picture = rank_picture.draw(ranks[0], labels, args.width or next(iter(plots.WIDTHS))) if args.ranks else None
    if args.out:
        write_text(user_path(args.out), printable(text))
    elif not args.html:
        print(text, end="", flush=True)
    if picture is not None:
        plots.save(picture, args.ranks)


def _write_page(args: argparse.Namespace, where: dict[str, str]) -> None:
    """The page has all runs, also those that did not finish."""
    said: list[str] = []
    runs = select(all_runs(args.runs, said.append), where)
    metrics = args.metrics or METRICS
    choice = page_pictures.Choice(metrics[0], args.by, args.setting, args.order, args.mix)
    figures, left_out = page_pictures.draw(runs, args.runs, choice)
    notes = [*said, *left_out]
    text = page.build(runs, args.runs, args.by, metrics, args.setting, args.order, figures, notes)
    for line in said:
        complain(line)
    write_text(user_path(args.html), text)
    print(f"{args.html}: {len(runs):,} run(s), {len(text) / 1e6:.1f} MB", flush=True)


def main(argv: Sequence[str]) -> int:
    """0, 1 where stdout is closed, or 2 where the user asked for what cannot be done."""
    with guarded():
        try:
            _report(argv)
        except UsageError as error:
            for problem in error.problems:
                complain(f"error: {problem}")
            return 2
        except BrokenPipeError:  # `| head`
            silence("stdout")
            return 1
    return 0
