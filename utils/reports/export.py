"""Runs as files for other programs: tidy tables (CSV, Parquet), and the lines that Mammoth writes.

In a tidy table a row is one number, and its other columns say what it is of. Numbers are as in the run folder:
fractions in 0..1, seconds, MiB; tasks are counted from 0.
"""

import contextlib
import csv
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from flatcl.utils.arguments import EngineArgs, flags_of
from flatcl.utils.console import complain, reason
from flatcl.utils.errors import UsageError
from flatcl.utils.extras import require
from flatcl.utils.files import parse_json, printable, read_text
from flatcl.utils.registry import nearest
from flatcl.utils.reports.runs import Matrix, Run, is_joint, load_accuracies

Row = dict[str, Any]
SUFFIXES = (".csv", ".parquet", ".pyd")
IDENTITY = {"run": str, "config_hash": str, "commit": str, "uncommitted_changes": bool, "status": str}
CHOSEN = ("dataset", "model", "optimizer", "backbone", "buffer_size", "seed")  # columns, whether they vary or not
NUMBER = {  # what the rows of a table are, and the types of their own columns
    "metrics": {"setting": str, "metric": str, "value": float},
    "matrix": {"setting": str, "after_task": int, "on_task": int, "accuracy": float},
    "curves": {"step": int, "metric": str, "value": float},
}
ROWS_AT_ONCE = 2**16  # rows of a table in memory
FORMULA = tuple("=+-@＝＋－＠")  # with which a cell begins that a spreadsheet would compute; also in full width


def check(file: str | Path, what: str | None) -> Path:
    """The file to write. Raises `UsageError` for one that cannot be written."""
    path, problems = Path(file), []
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        problems.append(f"--out must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got '{file}'.")
    if suffix == ".pyd" and what is not None:
        problems.append(f"--what {what} has no effect on a .pyd file, which has one line for each run. Drop it.")
    if not path.parent.is_dir():
        problems.append(f"--out {file}: there is no folder {path.parent}. Make it first.")
    if problems:
        raise UsageError(*problems)
    if suffix == ".parquet":
        require("pyarrow", "export", f"--out {file}")
    return path


def export(
    runs: Sequence[Run],
    path: Path,
    what: str = "metrics",
    setting: str | None = None,
    say: Callable[[str], None] = complain,
) -> int:
    """Writes the runs into a file whose ending is one of `SUFFIXES`, as a whole or not at all; returns the number of
    its rows. `what`: a key of `NUMBER`. `setting`: class-il, ...; all that the runs have, but in a .pyd file that of
    the benchmark. Raises `OSError`, and `UsageError` where no run has what is asked for."""
    settings = sorted({name for run in runs for name in run.summary["metrics"]})
    if setting is not None and what == "curves":
        raise UsageError("--setting has no effect on --what curves: training curves have none. Drop it.")
    if setting is not None and setting not in settings:
        raise UsageError(f"unknown setting: '{setting}'. {nearest(setting, settings)}")
    missing: list[str] = []
    try:
        if path.suffix.lower() == ".pyd":
            return _write(path, lambda fresh: _write_lines(fresh, _lines(runs, setting, missing)))
        head, about = _identities(runs)
        columns = {**head, **NUMBER[what]}
        numbers = {
            "metrics": lambda: (_metrics(run, setting) for run in runs),
            "matrix": lambda: (_matrix(*learned, setting) for learned in _matrices(runs, missing)),
            "curves": lambda: (_curves(run, missing) for run in runs),
        }[what]()
        rows = ({**own, **row} for own, of_run in zip(about, numbers, strict=True) for row in of_run)
        write = _write_parquet if path.suffix.lower() == ".parquet" else _write_csv
        return _write(path, lambda fresh: write(fresh, columns, rows))
    finally:
        if missing:
            say(f"note: {len(missing)} run(s) left out, since what is asked for cannot be read there (records have "
                f"no curves, and old ones no matrices). The first one: {missing[0]}")  # fmt: skip


def _write(path: Path, write: Callable[[Path], int]) -> int:
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        count = write(fresh)
        if count == 0:
            raise UsageError(f"nothing to write into {path}: no run has what is asked for.")
        os.replace(fresh, path)
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
    return count


# columns


def _identities(runs: Sequence[Run]) -> tuple[dict[str, type], list[Row]]:
    """({column: type}, the columns of each run): what identifies it, what was chosen, and the flags that vary. Of flags
    that cannot change a number (where files lie, what is printed) only the notes and the protocol's name count."""
    names = dict.fromkeys([*CHOSEN, *(name for run in runs for name in run.flags), "continues", "notes"])
    values = {name: [_one(run.get(name)) for run in runs] for name in names if name not in _without_result()}
    taken = {*IDENTITY, *(column for own in NUMBER.values() for column in own)}
    values = {f"flag_{name}" if name in taken else name: own for name, own in values.items()
              if len(set(map(repr, own))) > 1 or (name in CHOSEN and own[0] is not None)}  # fmt: skip
    types = {name: _type_of(own) for name, own in values.items()}
    about = []
    for index, run in enumerate(runs):
        environment = run.content.get("environment")
        commit = environment if isinstance(environment, dict) else {}
        own = {
            "run": run.content.get("folder") or run.path.name, "config_hash": run.summary.get("config_hash"),
            "commit": commit.get("commit"), "uncommitted_changes": commit.get("uncommitted_changes"),
            "status": run.summary["status"],
        }  # fmt: skip
        own = {name: value if isinstance(value, IDENTITY[name]) else None for name, value in own.items()}
        about.append({**own, **{name: _as(types[name], column[index]) for name, column in values.items()}})
    return {**IDENTITY, **types}, about


@functools.cache
def _without_result() -> frozenset[str]:
    """Flags that cannot change a number, but for those that say what a run is."""
    names = {name for name, flag in flags_of(EngineArgs, "engine").items() if not flag.result}
    return frozenset(names - {"notes", "protocol"})


def _one(value: Any) -> Any:
    """A value that fits into a cell."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _type_of(values: Iterable[Any]) -> type:
    """The type of a column that has all of these values."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) == 1 and kinds <= {bool, int, float}:
        return kinds.pop() if all(value is None or abs(value) < 2**63 for value in values) else str
    return float if kinds == {int, float} else str


def _as(kind: type, value: Any) -> Any:
    """A value in the type of its column; None for a number that is too large for it."""
    try:
        return None if value is None else printable(value) if kind is str else kind(value)
    except OverflowError:
        return None


# rows


def _metrics(run: Run, setting: str | None) -> Iterator[Row]:
    """The metrics of each setting, then the costs, which have none."""
    for name, values in run.summary["metrics"].items():
        if setting in (None, name):
            yield from ({"setting": name, "metric": metric, "value": value} for metric, value in values.items())
    for metric, value in run.summary.get("cost", {}).items():
        yield {"setting": None, "metric": metric, "value": value}


def _matrices(runs: Sequence[Run], missing: list[str]) -> Iterator[tuple[list[int], dict[str, Matrix]]]:
    """Of each run (the tasks trained, {setting: accuracies after each of them}); empty where there is no matrix. A
    joint run has one row, after the last task."""
    for run, matrices in zip(runs, load_accuracies(runs), strict=True):
        if not matrices:
            missing.append(str(run.path))
            yield [], {}
            continue
        rows = next(iter(matrices.values()))
        first = len(rows[0]) - 1 if is_joint(run) else run.get("start_from") or 0
        yield [*range(first, first + len(rows))], matrices


def _matrix(tasks: list[int], matrices: dict[str, Matrix], setting: str | None) -> Iterator[Row]:
    """The accuracies that were measured."""
    for name, matrix in matrices.items():
        for task, row in zip(tasks, matrix, strict=True):
            for j, value in enumerate(row):
                if setting in (None, name) and value is not None:
                    yield {"setting": name, "after_task": task, "on_task": j, "accuracy": value}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**53


def _curves(run: Run, missing: list[str]) -> Iterator[Row]:
    """The points of the training curves; a number that was not finite has no value."""
    try:
        lines = read_text(run.path / "metrics.jsonl").splitlines()
    except (OSError, ValueError) as error:
        missing.append(f"{run.path}, metrics.jsonl ({reason(error)})")
        return
    for line in lines:
        try:
            content = parse_json(line)
        except ValueError:
            continue  # one that a full disk has cut
        if not isinstance(content, dict) or "task" in content or not _is_count(content.get("step")):
            continue
        for name, value in content.items():
            if name != "step" and isinstance(value, int | float | None):
                yield {"step": content["step"], "metric": name, "value": value}


# files


def _write_csv(path: Path, columns: Mapping[str, type], rows: Iterable[Row]) -> int:
    count = 0
    with open(path, "x", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(map(_cell, columns))
        for count, row in enumerate(rows, start=1):  # noqa: B007
            writer.writerow([_cell(row[name]) for name in columns])
    return count


def _cell(value: Any) -> Any:
    """Numbers in full, nothing for None. A text that a spreadsheet would take for a formula begins with ', so that it
    is shown and not computed: it may be a note from somebody else's run."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return ("'" if value.lstrip().startswith(FORMULA) else "") + printable(value)
    return value


def _write_parquet(path: Path, columns: Mapping[str, type], rows: Iterable[Row]) -> int:
    import pyarrow
    from pyarrow import parquet

    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in columns.items()])
    count, rows = 0, iter(rows)
    with parquet.ParquetWriter(path, schema) as writer:
        while part := list(islice(rows, ROWS_AT_ONCE)):
            table = {name: [_as(kind, row[name]) for row in part] for name, kind in columns.items()}
            writer.write_table(pyarrow.table(table, schema))
            count += len(part)
    return count


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with open(path, "x", encoding="utf-8", newline="\n") as file:
        for count, line in enumerate(lines, start=1):  # noqa: B007
            file.write(f"{ascii(dict(line))}\n")
    return count


def _lines(runs: Sequence[Run], setting: str | None, missing: list[str]) -> Iterator[Row]:
    """Of each run its flags, under our names, which are Mammoth's where both have the flag, and its results under
    Mammoth's names and in percent, as there; tasks are counted from 1."""
    for run, (tasks, matrices) in zip(runs, _matrices(runs, missing), strict=True):
        name = setting or run.summary.get("setting")
        if name not in matrices and setting is None:
            name = next(iter(matrices), None)  # of a method without results in the benchmark's setting (pnn)
        if name not in matrices:
            continue
        metrics = run.summary["metrics"].get(name, {})
        theirs = {
            "forward_transfer": metrics.get("fwt_gem17"), "backward_transfer": metrics.get("bwt_gem17"),
            "forgetting": metrics.get("forgetting_mammoth"),
        }  # fmt: skip
        flags = {key: value for key, value in run.flags.items() if key not in _without_result()}
        about = {**_identities([run])[1][0], "setting": name, "notes": run.get("notes")}
        results = {key: 100 * value for key, value in theirs.items() if value is not None}
        yield {**flags, **about, **_accuracies(tasks, matrices[name], is_joint(run)), **results}


def _accuracies(tasks: list[int], matrix: Matrix, at_once: bool) -> Row:
    """accmean_task2 after the second task, over the tasks trained so far; accuracy_1_task2 then of the first task."""
    found: Row = {}
    for count, (task, row) in enumerate(zip(tasks, matrix, strict=True), start=1):
        trained = range(len(row)) if at_once else tasks[:count]
        cells = {j: row[j] for j in trained if j < len(row)}
        values = [value for value in cells.values() if value is not None]
        if values:
            found[f"accmean_task{task + 1}"] = 100 * sum(values) / len(values)
        found |= {f"accuracy_{j + 1}_task{task + 1}": 100 * value for j, value in cells.items() if value is not None}
    return found
