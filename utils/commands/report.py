"""Tables and pictures of finished runs: `flatcl report ./results --pivot dataset,buffer_size`.

Runs that differ only in their seed make one row: mean ± sample standard deviation (n - 1). What is left out, counted
once or mixed is said on stderr, so that no table hides what it stands on.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from flatcl.utils.commands._parser import Parser
from flatcl.utils.console import complain, guarded, silence
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import canonical, nearest
from flatcl.utils.reports import plots
from flatcl.utils.reports.runs import RECORD, Run, load_runs, select, write_record
from flatcl.utils.reports.tables import BY, FORMATS, METRICS, table

SUFFIXES = ", ".join(plots.SUFFIXES)
OF_PICTURES, OF_TABLES = ("width", "names", "x"), ("pivot", "format")


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
    add("--order", type=words, default=[], metavar="NAMES", help="models (in a picture also optimizers, ...) in order")
    add("--format", choices=FORMATS, help=f"of a table (default: {FORMATS[0]})")
    add("--out", metavar="FILE", help=f"write the table there instead of printing it; the picture: {SUFFIXES}")
    add("--record", metavar="FILE", help=f"write the runs into one file; as {RECORD} in a folder it can be read again")
    add("--plot", metavar="KIND", help=f"draw a picture instead of a table: {kinds}")
    add("--width", choices=plots.WIDTHS,
        help="of a picture: " + ", ".join(f"{name} ({inches:g} inches)" for name, inches in plots.WIDTHS.items())
        + f"; default: {next(iter(plots.WIDTHS))}")  # fmt: skip
    add("--names", nargs="+", action="extend", metavar="NAME=LABEL", help="labels, e.g. er=ER,er+sam='ER with SAM'")
    add("--x", metavar="COST", help=f"of compute: {plots.ROWS} (forward + 2 x backward, the default) or train_s, ...")
    return parser


def _conditions(pairs: Sequence[str]) -> dict[str, str]:
    bad = [pair for pair in pairs if "=" not in pair]
    if bad:
        raise UsageError(
            *(f"--where expects key=value, got '{pair}'. Example: --where model=er,derpp." for pair in bad)
        )
    split = (pair.partition("=") for pair in pairs)
    return {key.replace("-", "_"): value for key, _, value in split}


def _labels(pairs: Sequence[str]) -> dict[str, str]:
    """{name: label} of `er=ER,mgser_sam=MGSER-SAM`. A comma that no name follows belongs to the label."""
    parts = [part for pair in pairs for part in re.split(r",(?=[^,=]+=)", pair)]
    bad = [part for part in parts if "=" not in part or not all(part.partition("=")[::2])]
    if bad:
        raise UsageError(*(f"--names expects name=label, got '{part}'. Example: --names er=ER." for part in bad))
    return {canonical(name): label for name, _, label in (part.partition("=") for part in parts)}


def _problems(args) -> list[str]:
    """Flags that do not belong together."""
    picture = args.out is not None and Path(args.out).suffix.lower() in plots.SUFFIXES
    if args.plot is None:
        given = [flag for flag in OF_PICTURES if getattr(args, flag) is not None]
        lost = [f"--{flag} is for pictures. Add --plot KIND, or drop it." for flag in given]
        return lost + ([f"--out {args.out} is a picture's name. Add --plot KIND, or give another."] if picture else [])
    problems = [f"--{flag} is for tables. Drop it, or --plot." for flag in OF_TABLES if getattr(args, flag) is not None]
    if args.plot not in plots.KINDS:
        problems.append(f"--plot: unknown kind: '{args.plot}'. {nearest(args.plot, list(plots.KINDS))}")
    if args.out is None:
        problems.append(f"--plot needs a file. Add --out FILE that ends in {SUFFIXES}.")
    if args.metrics is not None and len(args.metrics) != 1:
        problems.append(f"--plot draws one metric, got --metrics {','.join(args.metrics)}. Give one of them.")
    return problems


def _picture(args, runs: Sequence[Run], labels: dict[str, str]) -> None:
    figure = plots.figure(
        args.plot, runs, metric=args.metrics and args.metrics[0], by=args.by, setting=args.setting, order=args.order,
        names=labels, width=args.width or next(iter(plots.WIDTHS)), x=args.x or plots.ROWS,
    )  # fmt: skip
    plots.save(figure, args.out)


def _report(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    if problems := _problems(args):
        raise UsageError(*problems)
    labels, where = _labels(args.names or []), _conditions(args.where)
    if args.plot:
        plots.check_path(args.out)
    runs = select(load_runs(args.runs), where)
    try:
        if args.plot:
            _picture(args, runs, labels)
        else:
            _table(args, runs)
        if args.record:
            write_record(runs, args.record)
    except OSError as error:
        raise UsageError(
            f"cannot write {error.filename}: {error.strerror}. Give a file in a writable folder."
        ) from None


def _table(args, runs: Sequence[Run]) -> None:
    text = table(runs, args.by, args.metrics or METRICS, args.setting, args.pivot or (), args.order,
                 args.format or FORMATS[0])  # fmt: skip
    if args.out:
        Path(args.out).write_text(text, encoding="utf-8")
    else:
        print(text, end="", flush=True)


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
