"""Tables of finished runs: `flatcl report ./results --pivot dataset,buffer_size`.

Runs that differ only in their seed make one row: mean ± sample standard deviation (n - 1). What is left out, counted
once or mixed is said on stderr, so that no table hides what it stands on.
"""

from collections.abc import Sequence
from pathlib import Path

from flatcl.utils.commands._parser import Parser, conditions
from flatcl.utils.console import complain, guarded, silence
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import canonical
from flatcl.utils.reports.runs import RECORD, load_runs, select, write_record
from flatcl.utils.reports.tables import BY, FORMATS, METRICS, costs_of, picture, table


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
    add("--order", type=words, default=[], metavar="MODELS", help="models in the order of the rows")
    add("--format", choices=FORMATS, default="markdown")
    add("--out", metavar="FILE", help="write the table there instead of printing it")
    add("--record", metavar="FILE", help=f"write the runs into one file; as {RECORD} in a folder it can be read again")
    add("--picture", metavar="FILE.png", help="also draw the first metric as bars")
    return parser


def _report(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    if args.picture and Path(args.picture).suffix.lower() != ".png":
        raise UsageError(f"--picture expects a file that ends in .png, got '{args.picture}'.")
    runs = select(load_runs(args.runs), conditions(args.where))
    if args.picture and args.metrics[0] in costs_of(runs):
        raise UsageError(f"--picture draws the first of --metrics in percent, got the cost '{args.metrics[0]}'.")
    text = table(runs, args.by, args.metrics, args.setting, args.pivot, args.order, args.format)
    try:
        if args.out:
            Path(args.out).write_text(text, encoding="utf-8")
        else:
            print(text, end="", flush=True)
        if args.record:
            write_record(runs, args.record)
        if args.picture:
            picture(runs, args.picture, args.by, args.metrics[0], args.setting, args.pivot, args.order)
    except OSError as error:
        raise UsageError(
            f"cannot write {error.filename}: {error.strerror}. Give a file in a writable folder."
        ) from None


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
