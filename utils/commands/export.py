"""Runs as a file for other programs: `flatcl export ./results --out runs.csv`, also `.parquet` and Mammoth's `.pyd`."""

from collections import Counter
from collections.abc import Sequence

from flatcl.utils.commands._parser import Parser, conditions
from flatcl.utils.console import complain, guarded, say
from flatcl.utils.errors import UsageError
from flatcl.utils.reports import export
from flatcl.utils.reports.runs import find_runs, newest, select


def _parser() -> Parser:
    parser = Parser(
        prog="flatcl export",
        description="All runs, of any status, in tidy form: a row for each number. Columns: what identifies a run, and "
        "the flags that vary.",
    )
    add = parser.add_argument
    add("runs", nargs="*", default=["./results"], help="folders, searched recursively (default: ./results)")
    add("--out", required=True, metavar="FILE", help="a file that ends in .csv, .parquet, or .pyd (lines as Mammoth's)")
    add("--what", choices=export.NUMBER, help="final metrics and costs (default), accuracy matrix, training curves")
    add("--setting", help="class-il, task-il, ...; default: all that the runs have; .pyd: the benchmark's")
    add("--where", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="only these runs")
    return parser


def _export(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    path, where = export.check(args.out, args.what), conditions(args.where)
    runs = find_runs(args.runs, with_unfinished=True, with_repeats=True)
    if not runs:
        raise UsageError(f"no runs in {', '.join(args.runs)}. Give folders that hold run folders.")
    runs = newest(select(runs, where), complain, with_code="code_version" in where)
    try:
        count = export.export(runs, path, args.what or "metrics", args.setting)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}. Give a file in a writable folder.") from None
    unfinished = Counter(run.summary["status"] for run in runs if run.summary["status"] != "finished")
    if unfinished:
        counts = ", ".join(f"{number} {status}" for status, number in sorted(unfinished.items()))
        complain(f"note: {counts}: their metrics are of the tasks so far. --where status=finished leaves them out.")
    say(f"{path}: {count:,} rows of {len(runs):,} runs")


def main(argv: Sequence[str]) -> int:
    """0, or 2 where the user asked for what cannot be done."""
    with guarded():
        try:
            _export(argv)
        except UsageError as error:
            for problem in error.problems:
                complain(f"error: {problem}")
            return 2
    return 0
