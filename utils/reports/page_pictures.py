"""The pictures of the page of all runs: of each section, each kind that its runs allow and that can still be read.

What is left out is said in notes. Runs on validation splits have pictures of their own.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flatcl.utils.errors import UsageError
from flatcl.utils.reports import plots
from flatcl.utils.reports._panels import BY, NAMES, PANELS
from flatcl.utils.reports.groups import Mixture, group_runs
from flatcl.utils.reports.page import VALIDATION, counted_in, sections_of, split_of
from flatcl.utils.reports.runs import Run

MOST_GROUPS = 60  # of bars and of a heat map; of the other kinds `plots.MANY`
MOST_PANELS = 20
MOST_MATRICES = 12
MATRICES_OF = 1_000  # runs up to which their accuracy matrices are read, each from a file of its own
MOST_BYTES = 5_000_000  # of all pictures of a page, as SVG
NOTE = 300  # letters


@dataclass(frozen=True)
class Choice:
    """What the pictures show; the fields are those of `plots.figure`."""

    metric: str
    by: Sequence[str] | None = None
    setting: str | None = None
    order: Sequence[str] = ()
    mix: bool = False


def draw(runs: Sequence[Run], given: Sequence[str | Path], choice: Choice) -> tuple[dict[str, str], list[str]]:
    """({title: SVG}, notes on what is left out) for `page.build(runs, given, ...)`. Without pictures, and without an
    error, for what cannot be drawn."""
    figures: dict[str, str] = {}
    notes: list[str] = []
    sections = sections_of(runs, given)
    for section in sections:
        counted = [
            run for run in counted_in(section.runs, choice.by) if choice.setting in (None, *run.summary["metrics"])
        ]
        for validation in (False, True):
            own = [run for run in counted if (split_of(run) == VALIDATION) == validation]
            parts = [section.title] * (len(sections) > 1) + [VALIDATION] * validation
            if own:
                _add(own, ", ".join(parts), choice, figures, notes)
    return figures, list(dict.fromkeys(notes))


def _add(runs: Sequence[Run], name: str, choice: Choice, figures: dict[str, str], notes: list[str]) -> None:
    """The pictures of the runs of one section and split, and what is to be said about them."""
    runs, problems = (runs, []) if choice.mix else _without_mixtures(runs, choice)
    kinds, more = _kinds(runs, choice) if runs else ([], [])
    notes += [_note(name or "These runs", problem) for problem in (*problems, *more)]
    for kind in kinds:
        said: list[str] = []
        metric = choice.metric if kind in plots.WITH_METRIC else None
        try:
            svg = plots.svg(kind, runs, prefix=f"p{len(figures)}-", metric=metric, by=choice.by, width="page",
                            setting=choice.setting, order=choice.order, mix=choice.mix, say=said.append)  # fmt: skip
        except UsageError:  # these runs do not allow this kind
            continue
        title = _title(kind, name, choice.metric, figures)
        if sum(map(len, figures.values())) + len(svg) > MOST_BYTES:
            said = [f"not drawn, since all pictures together take at most {MOST_BYTES / 1e6:g} MB."]
        else:
            figures[title] = svg
        notes += [_note(title, line.removeprefix("note: ")) for line in said]


def _note(name: str, text: str) -> str:
    return textwrap.shorten(f"{name}: {text}", NOTE, placeholder=" ...")


def _title(kind: str, name: str, metric: str, figures: dict[str, str]) -> str:
    """What the picture shows and of what, in a way that no other picture has."""
    what = plots.KINDS[kind].replace("the metric", NAMES.get(metric, metric.replace("_", " ")))
    title = f"{name}: {what}" if name else what[0].upper() + what[1:]
    return title if title not in figures else f"{title} ({len(figures) + 1})"


def _keys(choice: Choice) -> tuple[list[str], list[str]]:
    """(the keys of a group, the further ones of a panel)."""
    keys = [key for key in choice.by or BY if key != "dataset"]
    return keys, [key for key in PANELS if key not in keys]


def _without_mixtures(runs: Sequence[Run], choice: Choice) -> tuple[list[Run], list[str]]:
    """(the runs that a picture may show, what is to be said about the others): a group whose runs differ in more than
    the seed is left out as a whole."""
    keys, apart = _keys(choice)
    mixed: dict[int, None] = {}
    labels: dict[str, dict[str, None]] = {}
    for group in group_runs(runs, [*keys, *apart], choice.setting):
        mixture = Mixture.of(group)
        if mixture:
            mixed |= dict.fromkeys(map(id, group.runs))
            labels.setdefault(str(mixture), {})[group.label] = None
    said = [f"not drawn, since their runs differ in more than the seed ({what}): {', '.join(names)}. Split them with "
            "--by, or give --mix." for what, names in labels.items()]  # fmt: skip
    return [run for run in runs if id(run) not in mixed], said


def _kinds(runs: Sequence[Run], choice: Choice) -> tuple[list[str], list[str]]:
    """(the kinds that can be read, what is to be said about the others)."""
    keys, apart = _keys(choice)
    groups = group_runs(runs, [*keys, *apart], choice.setting)
    names = {tuple(group.by[key] for key in keys) for group in groups}
    panels = len({(*(group.by[key] for key in apart), group.setting) for group in groups})
    if len(names) > MOST_GROUPS or panels > MOST_PANELS:
        limits = f"drawn are at most {MOST_GROUPS} groups and {MOST_PANELS} combinations"
        return [], [
            f"no pictures of {len(names):,} groups in {panels:,} combinations of benchmark, memory size and setting: "
            f"{limits}. Choose with --where."
        ]
    kinds, problems = _readable(len(runs), names, panels)
    if len(keys) != 2 and len(names) > 1:
        kinds = [kind for kind in kinds if kind != "heat"]
        problems.append(f"no heat map: it needs two keys, --by has {len(keys)}: {', '.join(keys)}.")
    return kinds, problems


def _readable(runs: int, names: set[tuple], panels: int) -> tuple[list[str], list[str]]:
    """As `_kinds`, for so many runs and panels, and groups of these names."""
    problems: list[str] = []
    skipped, count = set[str](), len(names)
    if count == 1:
        skipped = {"compute", "bars"}
    if count <= max((len(set(values)) for values in zip(*names, strict=True)), default=0):
        skipped.add("heat")  # with one cell in each row it would show what the bars do
    if count > plots.MANY:
        skipped |= {*plots.OF_MATRICES, "compute"}
        problems.append(
            f"no lines, points and matrices of {count} groups: at most {plots.MANY} can be told apart. Choose with "
            "--where."
        )
    elif runs > MATRICES_OF:
        skipped |= {*plots.OF_MATRICES}
        problems.append(f"accuracy matrices are read of at most {MATRICES_OF:,} runs, here are {runs:,}.")
    elif count * panels > MOST_MATRICES:
        skipped.add("matrix")
        problems.append(
            f"no accuracy matrices: drawn are at most {MOST_MATRICES}, here are {count * panels:,}. Choose with "
            "--where."
        )
    return [kind for kind in plots.KINDS if kind not in skipped], problems
