"""A grid of runs: `flatcl sweep --models er,derpp --datasets perm-mnist --seeds 0-2`, or `flatcl sweep study.yaml`.

The runs, one command line of `train` each, are made by worker processes on this machine, or elsewhere (--engine). What
is finished below --results_path is not run again, so a sweep that was stopped is continued by the same command.
"""

import argparse
import dataclasses
import itertools
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcl.utils import studies
from flatcl.utils.arguments import (
    PROTOCOL,
    SEEDS,
    SELECTORS,
    Config,
    EngineArgs,
    Request,
    flags_of,
    known_flags,
    resolve,
)
from flatcl.utils.commands import train
from flatcl.utils.commands._engines import add_engines, chosen
from flatcl.utils.commands._parser import Parser
from flatcl.utils.commands.report import words
from flatcl.utils.console import complain, say, shown
from flatcl.utils.errors import UsageError
from flatcl.utils.files import json_text, user_path
from flatcl.utils.identity import DATA
from flatcl.utils.registry import METHODS, canonical, load_plugin
from flatcl.utils.reports.groups import BY
from flatcl.utils.reports.runs import Run, comparable, find_runs
from flatcl.utils.reports.tables import table
from flatcl.utils.studies import Study, status
from flatcl.utils.studies.engines import ALREADY, FAILED, INTERRUPTED, OK, Engine, Runner
from flatcl.utils.studies.engines.slurm import Slurm, new_folder
from flatcl.utils.studies.study import NOT_OF_MANY
from flatcl.utils.studies.study import parse_seeds as seeds_of

USAGE = 2
PARTS = (*SELECTORS, "protocol")  # what decides which flags a run has


@dataclass(frozen=True, eq=False)
class Job:
    """One run of the grid: `axes` are its place in the grid, `argv` the whole command line, `config` what it says."""

    axes: Mapping[str, str]
    argv: tuple[str, ...]
    config: Config

    @property
    def hash(self) -> str:
        return self.config.hash

    @property
    def results_path(self) -> Path:
        return user_path(self.config.results_path)

    @property
    def label(self) -> str:
        named = ("model", "dataset", "buffer_size")
        rest = (f"{name} {value}" for name, value in self.axes.items() if name not in named)
        return " ".join([*(self.axes[name] for name in named if name in self.axes), *rest])

    @property
    def log(self) -> Path:
        return self.results_path / "logs" / f"{self.hash}.log"


def parse_seeds(text: str) -> list[int]:
    """`0-2,5` as [0, 1, 2, 5]."""
    try:
        return seeds_of(text)
    except ValueError as error:
        raise UsageError(f"--seeds {error}") from None


def expand(
    models: Sequence[str],
    datasets: Sequence[str],
    buffer_sizes: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    grid: Mapping[str, Sequence[str]] = {},
    known: Callable[[Mapping[str, str]], set[str]] | None = None,
) -> list[dict[str, str]]:
    """The axes of each run. The buffer sizes and an axis of `grid` are for the runs that have this flag; the others run
    once without it. An axis that no run has is given to all, and refused with everything else when they are resolved.
    `known`: the flags of runs with these parts."""
    known = known or Known()
    axes = {**({"buffer_size": buffer_sizes} if buffer_sizes else {}), **grid}
    found = []
    for dataset, model in itertools.product(datasets, models):
        for *values, seed in itertools.product(*axes.values(), seeds):
            point = {"model": model, "dataset": dataset, **dict(zip(axes, values, strict=True))}
            found.append((point, known(point), seed))
    somewhere = set().union(*(flags for _, flags, _ in found))
    if buffer_sizes and "buffer_size" not in somewhere:
        for model in models:
            METHODS.check(model)
        raise UsageError(f"--buffer_sizes: none of {', '.join(models)} has a buffer. Drop the flag.")
    fitting = (
        {**{name: value for name, value in point.items() if name in flags or name not in somewhere}, "seed": str(seed)}
        for point, flags, seed in found
    )
    return [dict(items) for items in dict.fromkeys(tuple(point.items()) for point in fitting)]


class Known:
    """The names of the flags that a run has, which its parts decide, and the words `also` of a command line."""

    def __init__(self, also: Sequence[str] = ()):
        self._also, self._known = list(also), dict[tuple, set[str]]()

    def __call__(self, axes: Mapping[str, str]) -> set[str]:
        parts = {name: value for name, value in axes.items() if name in PARTS}
        key = tuple(parts.items())
        if key not in self._known:
            self._known[key] = known_flags(words_of(parts) + self._also)
        return self._known[key]

    @classmethod
    def beside(cls, flags: Sequence[tuple[str, Sequence[str]]]) -> "Known":
        """`flags`: those of all runs, as of `_cut`."""
        return cls([word for name, part in flags if name in PARTS for word in part])


class Shared:
    """The flags after --, for each run of the grid: those that only some of its models and optimizers have (rho) go to
    these."""

    def __init__(self, words: Sequence[str], grid: Sequence[Mapping[str, str]]):
        self.flags = _cut(words)
        self._flags_of = Known.beside(self.flags)
        known = [self._flags_of(axes) for axes in grid]
        everywhere, somewhere = set.intersection(*known), set.union(*known)
        self.partial = list(dict.fromkeys(name for name, _ in self.flags if name in somewhere - everywhere))

    def __call__(self, axes: Mapping[str, str]) -> list[str]:
        own = self._flags_of(axes)
        return [
            word for name, part in self.flags
            if name not in axes and (name in own or name not in self.partial) for word in part
        ]  # fmt: skip


def _cut(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Words as (flag's name, the flag as written and its values)."""
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            flags.append((canonical(word[2:].partition("=")[0]), [word]))
        else:  # a word before any flag is left to the run to complain about
            flags.append((flags[-1][0], [word]) if flags else ("", [word]))
    return flags


def words_of(axes: Mapping[str, str]) -> list[str]:
    return [word for name, value in axes.items() for word in (f"--{name}", value)]


def plan(
    grid: Sequence[Mapping[str, str]],
    rest: Sequence[str] | Shared = (),
    resolver: Callable[[list[str]], Config] = resolve,
) -> list[Job]:
    """The grid's runs, each once. Resolves all of them, so that whatever is wrong is said before any work begins."""
    jobs: dict[str, Job] = {}
    problems: dict[str, str] = {}
    for axes in grid:
        argv = words_of(axes) + (rest(axes) if isinstance(rest, Shared) else list(rest))
        try:
            config = resolver(argv)
        except UsageError as error:
            for problem in error.problems:
                problems.setdefault(problem, f"{axes['model']} on {axes['dataset']}: {problem}")
            continue
        first = jobs.setdefault(config.hash, Job(axes, tuple(argv), config))
        for name in _only_harmless(first.axes, axes):
            said = f"--{name} cannot change a number, so that runs with different values of it are one run."
            problems.setdefault(name, f"{said} Give it once, for all runs.")
    if problems:
        raise UsageError(*problems.values())
    return list(jobs.values())


def _only_harmless(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The flags that change no number, if two points of a grid differ in nothing else."""
    unlike = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    flags = flags_of(EngineArgs, "engine")
    return unlike if all(name in flags and not flags[name].result for name in unlike) else []


@dataclass(frozen=True)
class Found:
    """What there is of a grid, by the job's hash: finished runs (`done`), those of them that do not say which code made
    them (`unsure`), and for jobs that were finished by other code alone, the files that have changed."""

    done: dict[str, Run]
    unsure: set[str]
    changed: dict[str, list[str]]

    def notes(self) -> list[str]:
        lines = []
        if self.unsure:
            lines.append(f"note: {len(self.unsure)} of them do not say which code made them; they count as the same")
        data = {run.path: name for run in self.done.values() for name in run.code or () if name.startswith(DATA)}
        if data:
            lines.append(
                f"note: {len(data)} of them were made on data that is not the official one "
                f"({', '.join(sorted({*data.values()}))}), whatever it is now; --results_path keeps other data apart"
            )
        if self.changed:
            files = sorted({file for own in self.changed.values() for file in own})
            lines.append(
                f"note: {len(self.changed)} finished run(s) were made by other code or data ({', '.join(files)} "
                "changed since) and do not count; --keep_changed takes them as they are"
            )
        return lines


def look(
    jobs: Sequence[Job],
    folders: Sequence[Path] | None = None,
    keep_changed: bool = False,
    may_write: bool = True,
) -> Found:
    """The finished runs of these jobs; `folders` in place of the jobs' own results_path. Without `may_write`, no index
    is written."""
    if folders is None:
        folders = sorted({job.results_path for job in jobs if job.results_path.is_dir()})
    alike: dict[tuple, list[Run]] = {}
    for run in reversed(find_runs(folders, lambda line: None, with_repeats=True, may_write=may_write)):  # newest first
        alike.setdefault(_selection(run.flags), []).append(run)
    found = Found({}, set(), {})
    for job in jobs:
        own = [
            run for run in alike.get(_selection(job.config.values), [])
            if run.summary.get("config_hash") == job.hash or _same_run(job.config, run)
        ]  # fmt: skip
        changed = {id(run): [] if keep_changed else run.differs_from(job.config) for run in own}
        same = next((run for run in own if not changed[id(run)]), None)
        if same is not None:
            found.done[job.hash] = same
            if same.code is None:
                found.unsure.add(job.hash)
        elif own:
            found.changed[job.hash] = changed[id(own[0])]
    return found


def _selection(flags: Mapping[str, Any]) -> tuple:
    return tuple(comparable(flags.get(name)) for name in ("model", "dataset", "seed"))


def _same_run(config: Config, run: Run) -> bool:
    """Whether a run from before some flag existed, which has another hash for it, is what `config` would run: under one
    protocol, a flag's default is what the program did without that flag."""
    ours = {name: config.values[name] for name, flag in config.flags.items() if flag.result}
    theirs = {name: value for name, value in run.flags.items() if name in ours or name not in config.flags}
    full = {**{name: config.flags[name].default for name in ours}, **theirs}
    is_continued = config.continues is not None or run.content.get("config", {}).get("continues") is not None
    return (
        run.protocol == PROTOCOL
        and not is_continued  # the same flags from another start; an equal hash says more
        and full.keys() == ours.keys()
        and all(full[name] == value or comparable(full[name]) == comparable(value) for name, value in ours.items())
    )


def sweep(
    jobs: Sequence[Job],
    engine: Engine | Slurm,
    extra: Sequence[str] = (),
    runner: Runner = train.main,
    keep_changed: bool = False,
) -> int:
    """Runs what is not finished yet, shows how far it is, ends with the table of all runs; returns the exit code. With
    Slurm, submits what is not finished, and shows the table once all is."""
    found = look(jobs, keep_changed=keep_changed)
    pending = [job for job in jobs if job.hash not in found.done]
    for line in (f"{len(jobs)} run(s), {len(found.done)} of them already finished and skipped", *found.notes()):
        say(line)
    if isinstance(engine, Slurm) and pending:
        engine.submit(pending, extra)
        return OK
    failed, interrupted = ({}, False) if isinstance(engine, Slurm) else run_shown(pending, engine, extra, runner)
    found = look(jobs, keep_changed=keep_changed)
    runs = found.done
    if found.changed and not interrupted:  # a file was edited meanwhile
        say("\n".join(found.notes()))
    if runs:
        axes = dict.fromkeys(name for job in jobs for name in job.axes if name not in ("seed", *SEEDS))
        known = set().union(*(run.keys for run in runs.values()))
        by = [name for name in dict.fromkeys((*BY, *axes)) if name in known]
        say("\n" + table(list(runs.values()), by=by, format="text"))
    if interrupted:
        complain(f"interrupted: {len(runs)} of {len(jobs)} finished; the same command does the rest")
    say_failed(failed)
    return INTERRUPTED if interrupted else FAILED if failed else OK


def run_shown(
    jobs: Sequence[Job],
    engine: Engine,
    extra: Sequence[str] = (),
    runner: Runner = train.main,
    file=None,
    stopped: Callable[[Job], str] = lambda job: "",
) -> tuple[dict[Job, int], bool]:
    """Runs all jobs, with a progress bar, and a line for each run on `file` (default: stdout), at the end also how many
    of them other processes have made. `stopped` says of a run that has not finished why that is no failure. Returns the
    exit codes of the failed jobs, and whether the user interrupted."""
    from tqdm import tqdm

    failed: dict[Job, int] = {}
    made = Counter[bool]()  # {whether another process has made it: number}
    with tqdm(total=len(jobs), unit="run", disable=None if jobs else True, dynamic_ncols=True) as bar:

        def on_end(job: Job, code: int, why: str) -> None:
            no_failure = stopped(job) if code != OK else _outcome(job)
            if not no_failure:
                failed[job] = code
            by_another = code == OK and why == ALREADY
            made[by_another] += code == OK
            with bar.external_write_mode():
                outcome = no_failure or f"{_how_failed(job, f'FAILED ({code})')}, {why or f'see {job.log}'}"
                say(f"{job.label} -> {outcome}{', by another process' * by_another}", file)
            bar.set_postfix(failed=len(failed), refresh=False)
            bar.update()

        def on_wait(job: Job, why: str) -> None:
            with bar.external_write_mode():
                say(f"{job.label} {why}", file)

        try:
            engine.run(jobs, on_end, extra, runner, on_wait)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
    if made[True]:
        say(f"{made[False]} run(s) made here, {made[True]} by others meanwhile", file)
    return failed, interrupted


def _outcome(job: Job) -> str:
    """The accuracy that a run reached, per setting."""
    found = job.results_path.glob(f"*/*/*/*{job.hash}*/summary.json")
    files = sorted(found, key=lambda file: file.parent.name)
    runs = [run for file in files[-1:] for run in find_runs([file.parent], say=lambda line: None)]
    if not runs:
        return f"no summary, see {job.log}"
    metrics = runs[0].summary["metrics"]
    values = {setting: own.get("final_average_accuracy") for setting, own in metrics.items()}
    return ", ".join(f"{setting} {100 * value:.2f} %" for setting, value in values.items() if value is not None)


def say_failed(failed: Mapping[Job, int]) -> None:
    if failed:
        complain(f"{len(failed)} run(s) failed:")
    for job, code in failed.items():
        complain(f"  {job.label} {_how_failed(job, f'(exit code {code})')}: {job.log}")


def _how_failed(job: Job, otherwise: str) -> str:
    """Of a run that has just ended: its newest folder is its own, whatever code has begun it."""
    (state,) = status.look([job], {}, keep_changed=True)
    return state.why if state.why == status.DIVERGED else otherwise


def _parser() -> Parser:
    parser = Parser(
        of_runs="write it after a separate --, as in: flatcl sweep ... -- {flag} VALUE",
        elsewhere={
            "--model": "Write: --models er,derpp.",
            "--dataset": "Write: --datasets perm-mnist,seq-mnist.",
            "--buffer_size": "Write: --buffer_sizes 200,500.",
            "--seed": "Write: --seeds 0-2.",
            "--optimizer": "Write: --grid optimizer=sgd,sam.",
            "--optimizers": "Write: --grid optimizer=sgd,sam.",
        },
        prog="flatcl sweep",
        description="A grid of runs, from flags or from a study file. Flags of `train` for all runs come after a "
        "separate --.",
        epilog="examples: flatcl sweep --models er,derpp --datasets perm-mnist --seeds 0-2 -- --lr 0.1\n"
        "          flatcl sweep study.yaml --jobs 2\n          flatcl sweep study.yaml --status",
    )
    add = parser.add_argument
    add("study", nargs="?", help="a file (.yaml, .toml, .json) that says what follows; flags replace what it says")
    add("--models", type=words)
    add("--datasets", type=words)
    add("--buffer_sizes", type=words, default=[], help="for the methods that have a buffer")
    add("--seeds", help="e.g. 0-2,5 (default: 0)")
    add("--grid", action="append", default=[], metavar="FLAG=A,B", help="a further axis; repeat for more")
    add("--dry_run", action="store_true", help="print the runs, and which are finished or running, then stop")
    add(
        "--status", action="store_true",
        help="print how far the runs are, also while they run elsewhere, then stop; exit code 0: all are finished, 1: "
        "some failed, 3: not all are finished yet",
    )  # fmt: skip
    add("--json", action="store_true", help="with --status: print it as JSON")
    add_keep_changed(parser)
    add_engines(parser)
    return parser


def add_keep_changed(parser: Parser) -> None:
    parser.add_argument(
        "--keep_changed", nargs="?", type=int, choices=(0, 1), const=1, default=0, metavar="0|1",
        help="1: runs count as finished although the code that made them has changed since",
    )  # fmt: skip


def _grid(axes: Sequence[str]) -> dict[str, list[str]]:
    grid, problems = {}, []
    for axis in axes:
        name, _, values = axis.partition("=")
        name = canonical(name.removeprefix("--"))
        if not words(values):
            problems.append(f"--grid expects flag=value,value, got '{axis}'. Example: rho=0.02,0.05.")
        elif name in ("model", "dataset", "buffer_size", "seed"):
            problems.append(f"--grid {name}: that axis has a flag of its own. Give --{name}s {values}.")
        elif name in NOT_OF_MANY:
            problems.append(f"--grid {name}: it does not fit many runs. Drop it.")
        elif name in grid:
            problems.append(f"--grid {name}: that axis is given twice. Give all values in one.")
        grid[name] = words(values)
    if problems:
        raise UsageError(*problems)
    return grid


def check_rest(rest: Sequence[str], axes: Mapping[str, str]) -> Request:
    """The shared flags, their plugins loaded. They must not move an axis, nor turn a run into something that leaves no
    result."""
    request = Request.parse(list(rest))
    problems = [
        f"--{name} after -- is an axis of the grid. Give it before the --." for name in request.words if name in axes
    ]
    for name in ("dry_run", "disable_log"):
        if name in request.words:
            problems.append(f"--{name} leaves no result to collect. Drop it, or start one run.")
    if request.wants_help or request.listing is not None or request.resume is not None:
        problems.append("--help, --list and --resume do not fit many runs. Start one run.")
    if problems:
        raise UsageError(*problems)
    for plugin in request.plugins:
        load_plugin(plugin)
    return request


def check_jobs(number: int) -> None:
    if number < 1:
        raise UsageError(f"--jobs must be at least 1, got {number}.")


def flags_of_all(keep_changed: bool) -> list[str]:
    """Flags that each of many runs is given: no bar of its own, and what was interrupted is continued."""
    return ["--non_verbose", "1", "--resume", "auto", "--keep_changed", str(int(keep_changed))]


def catch_stops() -> None:
    """A scheduler's stop is treated as Ctrl-C is, since it must reach the workers as well."""
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"):
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # as nohup wants
                signal.signal(getattr(signal, name), signal.default_int_handler)


def _prepare(argv: Sequence[str]) -> tuple[list[Job], Engine | Slurm, bool]:
    """(jobs, what executes them, whether runs of changed code count)."""
    own = _own(argv)
    rest = list(argv[len(own) + 1 :])
    args = _parsed(own)
    engine = chosen(args)
    grid = _grid(args.grid)
    if args.study is None:
        sizes = {"buffer_size": ""} if args.buffer_sizes else {}
        request = check_rest(rest, {"model": "", "dataset": "", "seed": "", **sizes, **grid})
        seeds = parse_seeds("0" if args.seeds is None else args.seeds)
        points = expand(args.models, args.datasets, args.buffer_sizes, seeds, grid, Known.beside(_cut(rest)))
        study = None
    else:
        study = _study(args, grid, rest)
        points, rest = study.points(), [*study.words(), *rest]
        request = check_rest(rest, dict.fromkeys(study.axes, ""))
    shared = Shared(rest, points)
    partial = [*(name for name in grid if any(name not in point for point in points)), *shared.partial]
    if partial and not args.status:
        say(f"only for the runs that have them: --{', --'.join(partial)}")
    try:
        jobs = plan(points, shared)
    except UsageError as error:
        raise UsageError(*map(study.located, error.problems)) if study else error from None
    return jobs, engine, bool(args.keep_changed) or request.keep_changed


def _parsed(own: Sequence[str]) -> argparse.Namespace:
    """The flags of the sweep itself."""
    args = _parser().parse_args(own)
    missing = [f"--{name}" for name in ("models", "datasets") if getattr(args, name) is None]
    if args.study is None and missing:
        raise UsageError(
            f"the following arguments are required: {', '.join(missing)}. Give them, or a study file; see flatcl sweep "
            "--help."
        )
    if args.json and not args.status:
        raise UsageError("--json has no effect without --status. Give both, or drop it.")
    if args.status and args.dry_run:
        raise UsageError("--status and --dry_run exclude each other. Give one of them.")
    return args


def _study(args: argparse.Namespace, grid: Mapping[str, list[str]], rest: Sequence[str]) -> Study:
    """The study of a file, with what the command line says in its place."""
    given = Request.parse(list(rest))
    for plugin in given.plugins:  # its names may be used in the file
        load_plugin(plugin)
    study = studies.read(args.study)
    lists = {name: tuple(getattr(args, name)) for name in ("models", "datasets", "buffer_sizes") if getattr(args, name)}
    seeds = {} if args.seeds is None else {"seeds": tuple(parse_seeds(args.seeds))}
    axes = {name: tuple(values) for name, values in grid.items()}
    parts = {f"{name}s": axes.pop(name) for name in ("optimizer", "backbone") if name in axes}
    if study.tune is not None:
        complain("note: the section tune is for flatcl tune; these runs have the other flags of the file alone")
    decided = sorted(axes.keys() & study.seed_flags)
    if decided:
        raise UsageError(
            *(f"--grid {name}: the seeds decide it, by vary in {args.study}. Drop it." for name in decided)
        )
    study = dataclasses.replace(study, **lists, **seeds, **parts, grid={**study.grid, **axes})
    return study.without({*given.words, *axes})


def _own(argv: Sequence[str]) -> list[str]:
    """The words before the lone --."""
    return list(itertools.takewhile(lambda word: word != "--", argv))


def _show(jobs: Sequence[Job], found: Found, engine: Engine | Slurm) -> None:
    """The runs of a sweep, which of them are finished or under way, and the script that Slurm would be given."""
    states = [own.state for own in status.look(jobs, found.done)]
    for job, state in zip(jobs, states, strict=True):
        print(f"{state if state in (status.FINISHED, status.RUNNING) else 'to do':9} {job.label}")
    running = f", {states.count(status.RUNNING)} running" if status.RUNNING in states else ""
    print(f"{len(jobs)} run(s), {len(found.done)} of them finished{running}", *found.notes(), sep="\n")
    pending = [job for job in jobs if job.hash not in found.done]
    if isinstance(engine, Slurm) and pending:
        print("", engine.script(new_folder(pending), pending), sep="\n", end="")


def _show_status(jobs: Sequence[Job], args: argparse.Namespace, keep_changed: bool) -> int:
    """Prints how far the runs are; returns the exit code that says it too."""
    found = look(jobs, keep_changed=keep_changed, may_write=False)
    states = status.look(jobs, found.done, keep_changed)
    left = status.left(states, args.jobs or args.array or 1)
    name = None if args.study is None else studies.read(args.study).name
    for line in found.notes():
        complain(line)
    if args.json:
        text = json_text(status.to_json(states, left, name)) + "\n"
    else:
        text = status.report(states, left, name)
    return shown(lambda: print(text, end="")) or status.exit_code(states)


def main(argv: Sequence[str], runner: Runner = train.main) -> int:
    """0 all finished or submitted, 1 some failed, 2 bad input, 130 interrupted; with --status, 3 not all finished."""
    try:
        jobs, engine, keep_changed = _prepare(list(argv))
        args = _parsed(_own(argv))
        if args.status:
            return _show_status(jobs, args, keep_changed)
        if args.dry_run:
            return shown(lambda: _show(jobs, look(jobs, keep_changed=keep_changed), engine))
        catch_stops()
        return sweep(jobs, engine, flags_of_all(keep_changed), runner, keep_changed)
    except UsageError as error:
        for problem in error.problems:
            complain(f"error: {problem}")
        return USAGE
    except KeyboardInterrupt:  # before the first run, or after the last one
        complain("interrupted: the same command does the rest")
        return INTERRUPTED
