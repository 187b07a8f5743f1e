"""Tables of finished runs: `flatcl report ./results --pivot dataset,buffer_size`.

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
from flatcl.utils.files import user_path, write_text
from flatcl.utils.registry import canonical
from flatcl.utils.reports import comparison_tables, latex, page, rank_picture
from flatcl.utils.reports.comparisons import check_statsmodels
from flatcl.utils.reports.groups import BY, METRICS, asked_keys, check_mixtures, costs_of, group_runs
from flatcl.utils.reports.runs import RECORD, Run, all_runs, load_runs, select, write_record
from flatcl.utils.reports.tables import FORMATS, picture, table


def words(text: str) -> list[str]:
    """`a,b` as a list."""
    return text.replace(",", " ").split()


def names(text: str) -> list[str]:
    """As `words`, for names in which `-` and `_` are equal."""
    return [canonical(word) for word in words(text)]


def _parser() -> Parser:
    parser = Parser(prog="flatcl report", description="Tables of finished runs: mean ± sample std in percent, and n.")
    add = parser.add_argument
    add("runs", nargs="*", default=["./results"], help="folders, searched recursively (default: ./results)")
    add("--setting", help="class-il, task-il, ...; default: all that the runs have")
    add("--by", type=names, metavar="KEYS", help=f"keys that make a row (default: {','.join(BY)})")
    add(
        "--metrics",
        type=names,
        default=list(METRICS),
        help=f"metrics or costs, e.g. train_s (default: {','.join(METRICS)})",
    )
    add("--pivot", type=names, default=[], metavar="KEYS", help="keys that make columns, e.g. dataset,buffer_size")
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
        "Friedman and Nemenyi tests; into FILE (.png, .pdf, .svg) goes the picture of the critical difference",
    )
    add("--mix", action="store_true", help="also average runs that differ in more than their seed, with notes")
    add("--order", type=words, default=[], metavar="MODELS", help="models in the order of the rows")
    add("--format", choices=FORMATS, default="markdown")
    add("--caption", metavar="TEXT", help="with --format latex: a float with this caption")
    add("--label", metavar="NAME", help="with --format latex: a float with this label")
    add("--siunitx", action="store_true", help="with --format latex: numbers for the package siunitx")
    add("--out", metavar="FILE", help="write the table there instead of printing it")
    add("--record", metavar="FILE", help=f"write the runs into one file; as {RECORD} in a folder it can be read again")
    add("--picture", metavar="FILE.png", help="also draw the first metric as bars")
    add(
        "--html",
        metavar="FILE.html",
        help="instead of the table, one page for a browser: tables that sort and filter, all runs, their details",
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    """Flags that do not fit together, and files of a wrong kind, all at once and before any run is read."""
    problems = []
    if args.picture and Path(args.picture).suffix.lower() != ".png":
        problems.append(f"--picture expects a file that ends in .png, got '{args.picture}'.")
    if args.html and Path(args.html).suffix.lower() not in (".html", ".htm"):
        problems.append(f"--html expects a file that ends in .html, got '{args.html}'.")
    elif args.html and not user_path(args.html).parent.is_dir():
        problems.append(f"--html: there is no folder {user_path(args.html).parent}. Make it, or give another file.")
    if args.html and not (args.out or args.picture):
        for flag, value in (("--pivot", args.pivot), ("--format", args.format != "markdown")):
            if value:
                problems.append(f"{flag} is for the table, which --html replaces. Drop it, or give --out too.")
    if args.ranks and Path(args.ranks).suffix.lower() not in rank_picture.FORMATS:
        problems.append(
            f"--ranks expects a file that ends in {', '.join(rank_picture.FORMATS)}, got '{args.ranks}'. Give the "
            "folders of runs before the flags."
        )
    if args.label is not None and not re.fullmatch(r"[A-Za-z0-9:._+/-]+", args.label):
        problems.append(f"--label expects letters, digits and :._+/-, got '{args.label}'. Example: tab:results.")
    given = {name for name in ("interval", "best", "pivot", "against", "caption", "label", "siunitx")
             if getattr(args, name) not in (None, False, [])}  # fmt: skip
    given |= {"ranks"} if args.ranks is not None else set()
    apart = [("against", "ranks"), *((name, other) for other in ("against", "ranks") for name in ("interval", "best"))]
    apart.append(("pivot", "against"))
    problems += [f"--{name} and --{other} do not fit together. Drop one of them."
                 for name, other in apart if {name, other} <= given]  # fmt: skip
    problems += [f"--{name} is for --format latex, got --format {args.format}."
                 for name in ("caption", "label", "siunitx") if name in given and args.format != "latex"]  # fmt: skip
    if "best" in given and args.format == "csv":
        problems.append("--best marks cells, which CSV cannot. Choose another --format.")
    if problems:
        raise UsageError(*problems)
    for name in ("against", "best"):
        if name in given:
            check_statsmodels(f"--{name}")


def _text_of(args: argparse.Namespace, runs: Sequence[Run]) -> tuple[str, list]:
    """(the table that is asked for, the ranks that it shows)."""
    options = latex.Options(args.caption, args.label, args.siunitx)
    if args.ranks is not None:
        keys = comparison_tables.block_keys(runs, args.by, args.pivot)
    else:
        keys = asked_keys(runs, args.by, args.pivot)
    if not args.mix:
        check_mixtures(group_runs(runs, keys, args.setting), keys)
    if args.against is not None:
        pairs = conditions(args.against.split(","), "--against", "optimizer=sgd")
        text = comparison_tables.against_table(
            runs, pairs, args.by, args.metrics, args.setting, args.order, args.format, complain, options
        )
        return text, []
    if args.ranks is not None:
        ranks = comparison_tables.ranks_of(runs, args.by, args.metrics, args.setting, args.order, args.pivot, complain)
        return comparison_tables.ranks_table(ranks, args.format, options), ranks
    text = table(runs, args.by, args.metrics, args.setting, args.pivot, args.order, args.format, interval=args.interval,
                 best=args.best, options=options)  # fmt: skip
    return text, []


def _report(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    _check(args)
    where = conditions(args.where)
    try:
        if args.html:
            _write_page(args, where)
        if not args.html or args.out or args.record or args.picture or args.ranks:
            _write_table(args, where)
    except OSError as error:
        raise UsageError(
            f"cannot write {error.filename}: {error.strerror}. Give a file in a writable folder."
        ) from None


def _write_table(args: argparse.Namespace, where: dict[str, str]) -> None:
    runs = select(load_runs(args.runs), where)
    if args.picture and args.metrics[0] in costs_of(runs):
        raise UsageError(f"--picture draws the first of --metrics in percent, got the cost '{args.metrics[0]}'.")
    text, ranks = _text_of(args, runs)
    if args.out:
        Path(args.out).write_text(text, encoding="utf-8")
    elif not args.html:
        print(text, end="", flush=True)
    if args.record:
        write_record(runs, args.record)
    if args.picture:
        picture(runs, args.picture, args.by, args.metrics[0], args.setting, args.pivot, args.order)
    if args.ranks:
        rank_picture.save(ranks[0], args.ranks)


def _write_page(args: argparse.Namespace, where: dict[str, str]) -> None:
    """The page has all runs, also those that did not finish."""
    said: list[str] = []
    runs = select(all_runs(args.runs, said.append), where)
    text = page.build(runs, args.runs, args.by, args.metrics, args.setting, args.order, notes=said)
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
