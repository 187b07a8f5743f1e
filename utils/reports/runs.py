"""Finished runs: found in folders and in records, chosen, written into a record.

What is left out or counted once is said on stderr, so that no table hides what it stands on.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcl.utils.arguments import MANY_TASKS, SEEDS, Config, EngineArgs, flags_of
from flatcl.utils.console import complain, reason
from flatcl.utils.errors import UsageError
from flatcl.utils.files import is_writable, parse_json, read_json, read_text, user_path, write_text
from flatcl.utils.metrics import Matrix
from flatcl.utils.registry import canonical, nearest
from flatcl.utils.reports import _run_index as run_index
from flatcl.utils.saved import other_code

RECORD = "runs.jsonl"
VALIDATION, TEST = "validation", "test"
DERIVED = ("split", "protocol_version", "code_version", "continues")  # keys that are neither of the summary nor flags
NO_RESULT = "no result"  # the status of a run that has no summary: it is at its first task, or ended there
DECIMALS = 5  # of an accuracy (a fraction) in a record: enough for test sets of up to 100,000 images


Seeds = tuple[Any, ...]


@dataclass(frozen=True)
class Run:
    """One run: its summary, and the values of its flags."""

    path: Path
    summary: Mapping[str, Any]
    flags: Mapping[str, Any]
    protocol: int | None = None
    content: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)  # the files it was read from

    @property
    def code(self) -> Mapping[str, str] | None:
        """{file: digest} of the code that made it; None where that was not written down."""
        return self.content.get("config", {}).get("code")

    @property
    def codes(self) -> list[Mapping[str, str]]:
        """The code that it was begun with, and each other one that it went on with (--keep_changed)."""
        later = self.content.get("config", {}).get("changed_code", ())
        return [code for code in (self.code, *(entry["code"] for entry in later)) if code is not None]

    @property
    def continues(self) -> str | None:
        """What it was begun from the end of (--continue)."""
        parent = self.content.get("config", {}).get("continues")
        return None if parent is None else f"{parent.get('tasks')} task(s) under {parent.get('optimizer')}"

    def differs_from(self, config: Config) -> list[str]:
        """The files of other code than the present one that the run was made with."""
        saved = self.content.get("config", {})
        later = [entry["code"] for entry in saved.get("changed_code", ())]
        return other_code([self.code, *later], (saved.get("continues") or {}).get("code"), config)

    @property
    def split(self) -> str:
        """What it was measured on: `validation` (--validation) or `test`."""
        return VALIDATION if self.flags.get("validation") else TEST

    def get(self, key: str) -> Any:
        """The value of a key of the summary, else of a flag, else of `DERIVED`; None where the run has none of them."""
        if key in self.summary or key in self.flags:
            return self.summary[key] if key in self.summary else self.flags[key]
        if key == "code_version":
            return _digest(self.codes)
        return {"split": self.split, "protocol_version": self.protocol, "continues": self.continues}.get(key)

    def seeds(self, sources: Iterable[str] = SEEDS) -> Seeds:
        """The seed, and that of each source of random numbers: runs with equal ones are pairs."""
        seed = self.get("seed")
        own = (self.get(name) for name in sources)
        return seed, *(seed if value is None else value for value in own)

    @property
    def keys(self) -> set[str]:
        plain = {key for key, value in self.summary.items() if not isinstance(value, dict | list)}
        return plain | set(self.flags) | set(DERIVED)


def _digest(codes: Sequence[Mapping[str, str]]) -> str | None:
    """A short name for the code that made a run, the key `code_version`; a letter first makes it no number."""
    if not codes:
        return None
    text = json.dumps(codes[0] if len(codes) == 1 else list(codes), sort_keys=True)
    return "c" + hashlib.sha256(text.encode()).hexdigest()[:7]


def load_runs(
    paths: Sequence[str | Path],
    say: Callable[[str], None] = complain,
    where: Mapping[str, str] | None = None,
    keys: Iterable[str] = (),
) -> list[Run]:
    """The finished runs in these folders (and records) that have the values of `where`, searched recursively; of equal
    runs (flags and seed) the newest. `keys`: by which they will be told apart; with code_version, runs of other code
    are not equal. Raises `UsageError` where there are none."""
    where = where or {}
    runs = find_runs(paths, say, with_repeats=True, where=where)
    if not runs:
        raise UsageError(
            f"no finished runs in {', '.join(str(path) for path in paths)}. Give folders that hold run folders."
        )
    return newest(select(runs, where), say, with_code="code_version" in {*keys, *where})


def find_runs(
    paths: Sequence[str | Path],
    say: Callable[[str], None] = complain,
    with_repeats: bool = False,
    with_unfinished: bool = False,
    may_write: bool = True,
    where: Mapping[str, str] | None = None,
) -> list[Run]:
    """As `load_runs`, but there may be none, and `where` only says which runs that are left out are counted.
    `with_repeats`: all of equal runs, the newest last. `with_unfinished`: runs of any status that have a result; of
    equal runs a finished one counts rather than a newer one that is not. Without `may_write`, no index is written."""
    found: dict[Path, Run] = {}
    unfinished: Counter[str] = Counter()
    for path in paths:
        folder = user_path(path)
        place = folder.resolve()
        for run in _runs_in(folder, say, may_write):
            if run is None:
                continue
            status = run.summary["status"]
            if status == "finished" or (with_unfinished and status != NO_RESULT):
                found[place / run.path.relative_to(folder)] = run
            elif _has(run, where or {}):
                unfinished[status] += 1
    if unfinished:
        said = {NO_RESULT: "without a result yet"}
        counts = ", ".join(f"{number} {said.get(status, status)}" for status, number in sorted(unfinished.items()))
        say(f"note: left out, since they did not finish: {counts}.")
    return _by_age(found.values()) if with_repeats else newest(list(found.values()), say)


def all_runs(paths: Sequence[str | Path], say: Callable[[str], None] = complain) -> list[Run]:
    """The runs in these folders, whatever their status, each run folder once, equal runs too; the newest last. Raises
    `UsageError` where there are none."""
    found: dict[Path, Run] = {}
    for path in paths:
        folder = user_path(path)
        for run in _runs_in(folder, say):
            if run is not None:
                found.setdefault(folder.resolve() / run.path.relative_to(folder), run)
    if not found:
        raise UsageError(f"no runs in {', '.join(str(path) for path in paths)}. Give folders that hold run folders.")
    return _by_age(found.values())


def _runs_in(folder: Path, say: Callable[[str], None], may_write: bool = True) -> Iterable[Run | None]:
    """Run folders, and records (`runs.jsonl`) of run folders that are not kept. Runs that ended before their first task
    did, or are still at it, have no result: their folders have a configuration alone."""
    if folder.suffix == Path(RECORD).suffix and folder.is_file():
        runs, records, begun = [], [folder], []
    else:
        try:
            next(folder.iterdir(), None)  # rglob is silent about a folder that it cannot read
        except OSError as error:
            raise UsageError(f"cannot read {folder}: {error.strerror}. Give a folder that holds run folders.") from None
        runs, records, begun = run_index.read_runs(folder, _contents, RECORD, may_write)
    for path, content in runs:
        yield _as_run(path, content, say)
    for path in begun:
        run = _as_run(path, _contents(path, has_summary=False), lambda line: None)  # or somebody else's config.json
        if run is not None and run.flags:
            yield run
    for file in records:
        try:
            lines = read_text(file).splitlines()
        except (OSError, ValueError) as error:
            say(f"note: left out, since it cannot be read ({reason(error)}): {file}")
            continue
        for number, line in enumerate(lines, start=1):
            yield _as_run(file / str(number), _parsed(line), say)


def _contents(folder: Path, has_summary: bool = True) -> dict[str, Any] | None:
    """What a record keeps of a run folder; None where that is no run's. Of the summary without the matrix, which no
    table needs (see `load_matrices`). The index keeps it, so that it is looked at once."""
    content: dict[str, Any] = {"folder": folder.name}
    for file in run_index.FILES[0 if has_summary else 1 :]:
        try:
            content[file.removesuffix(".json")] = read_json(folder / file)
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return None
    if not has_summary:
        config_hash = content["config"].get("config_hash") if isinstance(content.get("config"), dict) else None
        content["summary"] = {"status": NO_RESULT, "metrics": {}, "config_hash": config_hash}
    return _checked(content)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return _checked(parse_json(line))
    except ValueError:
        return None


def _checked(content: Any) -> dict[str, Any] | None:
    """Without the matrix, which takes more memory than all else; None for what is no run's."""
    if isinstance(content, dict) and isinstance(content.get("summary"), dict):
        content["summary"].pop("accuracy", None)
    return content if _is_of_a_run(content) else None


def _as_run(path: Path, content: dict[str, Any] | None, say: Callable[[str], None]) -> Run | None:
    """A run of any status; None for what is not the summary of one of ours."""
    if content is None:
        say(f"note: left out, since it is not the summary of a run: {path}")
        return None
    config = content.get("config", {"flags": {}})
    flags = {name: entry["value"] for name, entry in config["flags"].items()}
    return Run(path, content["summary"], flags, config.get("protocol"), content)


def _is_of_a_run(content: Any) -> bool:
    """Whether everything that a table is made of has the type that our files have."""
    try:
        return _has_types(content)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _has_types(content: Mapping[str, Any]) -> bool:
    summary, config = content["summary"], content.get("config", {"flags": {}})
    flags = {name: entry["value"] for name, entry in config["flags"].items()}

    def plain(value: Any, *kinds: type) -> bool:
        return value is None or (isinstance(value, kinds) and (not isinstance(value, str) or is_writable(value)))

    parts = (*config.get("changed_code", ()), config.get("continues") or {"code": None})
    codes = [config.get("code") or {}, *(part["code"] or {} for part in parts)]
    numbers = [*summary["metrics"].values(), summary.get("cost", {})]
    values = [item for value in flags.values() for item in (value if isinstance(value, list) else [value])]
    values += [value for key, value in summary.items() if key not in ("metrics", "cost")]
    names = [*flags, *summary, *summary["metrics"], *(name for part in numbers for name in part), summary["status"]]
    return (
        isinstance(summary["status"], str)
        and all(isinstance(part, dict) for part in (summary["metrics"], *numbers))
        and all(plain(value, int, float) for part in numbers for value in part.values())
        and all(plain(value, int, float, str) for value in (*values, *names))
        and all(plain(value, str) for value in (summary.get("config_hash"), content.get("folder")))
        and all(isinstance(part, str) for code in codes for item in code.items() for part in item)
        and isinstance(config.get("protocol", 0), int)
    )


def load_matrices(runs: Sequence[Run]) -> list[dict[str, Matrix]]:
    """Of each run, in the order of `runs`, {setting: accuracy matrix}: fractions, a row and a column for each task that
    was trained, None for what was not evaluated; of a joint run one row. Empty where neither the run folder nor the
    record has it.

    It is read now, from accuracy.json or summary.json in the run folder, or from the run's line of the record, each
    record once: a `Run` does without it, so that tables of many runs are fast.
    """
    return [_trained(accuracy, run) for accuracy, run in zip(load_accuracies(runs), runs, strict=True)]


def load_accuracies(runs: Iterable[Run]) -> Iterator[dict[str, Matrix]]:
    """As `load_matrices`, one after the other, with a column for each task of the benchmark, trained or not."""
    records: dict[Path, list[str]] = {}
    for run in runs:
        yield _folder_accuracy(run) if run.path.is_dir() else _record_accuracy(run, records)


def is_joint(run: Run) -> bool:
    """Whether all tasks were trained at once: then alone there is no average over what was learned before."""
    return all(own.get("average_incremental_accuracy") is None for own in run.summary["metrics"].values())


def _folder_accuracy(run: Run) -> dict[str, Matrix]:
    for name in ("accuracy.json", "summary.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return _valid(read_json(run.path / name)["accuracy"], run)
    return {}


def _record_accuracy(run: Run, records: dict[Path, list[str]]) -> dict[str, Matrix]:
    """`records`: the lines of the files that were read before. A line that has become another run's counts as none."""
    file, number = run.path.parent, run.path.name
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        if file not in records:
            records[file] = read_text(file).splitlines()
        summary = parse_json(records[file][int(number) - 1])["summary"]
        if summary.get("config_hash") == run.summary.get("config_hash"):
            return _valid(summary["accuracy"], run)
    return {}


def _valid(accuracy: Any, run: Run) -> dict[str, Matrix]:
    """The matrices of the settings that the run has metrics of. Raises `ValueError`, `KeyError` or `TypeError` for what
    a run does not write."""
    for setting in run.summary["metrics"]:
        rows = accuracy[setting]
        values = [value for row in rows for value in row if value is not None]
        if len({len(row) for row in rows}) != 1 or not all(type(value) in (int, float) for value in values):
            raise ValueError("not a matrix of numbers")
        if not all(0 <= value <= 1 for value in values):
            raise ValueError("not fractions")
    return {setting: accuracy[setting] for setting in run.summary["metrics"]}


def _trained(accuracy: dict[str, Matrix], run: Run) -> dict[str, Matrix]:
    """The columns of the tasks that were trained: they follow each other, and a joint run has trained all of them."""
    first, found = run.get("start_from") or 0, {}
    for setting, rows in accuracy.items():
        last = len(rows[0]) if len(rows) == 1 and is_joint(run) else first + len(rows)
        if 0 <= first < last <= len(rows[0]):
            found[setting] = [row[first:last] for row in rows]
    return found


def write_record(runs: Sequence[Run], path: str | Path) -> None:
    """One line of JSON for each run: summary, configuration and environment, without the flags that cannot change a
    number (where files lay). Of at most `MANY_TASKS` tasks with the accuracy matrix, rounded to `DECIMALS` decimals."""
    places = {name for name, item in flags_of(EngineArgs, "engine").items() if not item.result}
    lines = []
    for run, accuracy in zip(runs, load_accuracies(runs), strict=True):
        summary = dict(run.content["summary"])
        if accuracy and all(len(rows[0]) <= MANY_TASKS for rows in accuracy.values()):
            summary["accuracy"] = {
                name: [[None if value is None else round(value, DECIMALS) for value in row] for row in rows]
                for name, rows in accuracy.items()
            }
        config = dict(run.content.get("config", {"flags": {}}))
        config["flags"] = {name: entry for name, entry in config["flags"].items() if name not in places}
        lines.append(json.dumps({**run.content, "summary": summary, "config": config}, sort_keys=True))
    write_text(user_path(path), "".join(f"{line}\n" for line in lines))


def newest(runs: Sequence[Run], say: Callable[[str], None], with_code: bool = False) -> list[Run]:
    """One run of each config hash, or of each config hash and code."""
    kept: dict[Any, Run] = {}
    for run in _by_age(runs):
        kept[run.summary.get("config_hash") or run.path, run.get("code_version") if with_code else None] = run
    repeated = len(runs) - len(kept)
    if repeated:
        say(f"note: {repeated} run(s) repeat another one's flags and seed; the newest of equal runs counts.")
    return list(kept.values())


def _by_age(runs: Iterable[Run]) -> list[Run]:
    """The newest last, those that did not finish first. Folder names begin with the time, and copies keep them, unlike
    file times."""

    def place(run: Run) -> tuple[bool, str, str]:
        return run.summary["status"] == "finished", run.content.get("folder") or run.path.name, str(run.path)

    return sorted(runs, key=place)


def select(runs: Sequence[Run], where: Mapping[str, str]) -> list[Run]:
    """The runs whose keys have these values; commas separate alternatives: {"model": "er,derpp", "seed": "0"}."""
    for key, wanted in where.items():
        check_key(key, runs)
        found = [run for run in runs if _has(run, {key: wanted})]
        if not found:
            has = sorted({comparable(run.get(key)) for run in runs})
            raise UsageError(f"no run has {key} = {wanted}. These occur: {', '.join(has)}.")
        runs = found
    return list(runs)


def _has(run: Run, where: Mapping[str, str]) -> bool:
    return all(comparable(run.get(key)) in map(comparable, wanted.split(",")) for key, wanted in where.items())


def comparable(value: Any) -> str:
    """One spelling of a value, for words of the command line and for values of JSON: 0.10 and 0.1, True and 1."""
    if isinstance(value, list | tuple):
        return " ".join(comparable(item) for item in value)
    if value is None or str(value).lower() in ("true", "false"):
        return {"none": "none", "true": "1", "false": "0"}[str(value).lower()]
    try:
        return f"{float(value):.12g}"
    except (ValueError, OverflowError):
        return canonical(str(value))


def check_key(key: str, runs: Sequence[Run]) -> None:
    known = set().union(*(run.keys for run in runs))
    if key not in known:
        raise UsageError(f"unknown key: '{key}'. {nearest(key, sorted(known))}")
