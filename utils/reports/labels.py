"""Labels in place of names, in tables and pictures: `--names er=ER,buffer_size=memory,er+sam=ER-SAM`.

`names` maps a canonical name to its label. It can be a value (`er`, `500`, `class-il`), a key (`buffer_size`), a metric
or a cost, and in a picture also a pair of method and optimizer (`er+sam`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from flatcl.utils.errors import UsageError
from flatcl.utils.registry import canonical, nearest
from flatcl.utils.reports.groups import written

PAIR = ("model", "optimizer")


def named(value: Any, names: Mapping[str, str], otherwise: str | None = None) -> str:
    """The label of a value, key or metric; without one `otherwise`, by default the value as text."""
    text = written(value)
    return names.get(canonical(text), text if otherwise is None else otherwise)


def pair_of(row: Mapping[str, Any]) -> str:
    """`er+sam`, of a row of keys."""
    return "+".join(written(row[key]) for key in PAIR if row.get(key) is not None)


def check_names(
    names: Mapping[str, str],
    rows: Iterable[Mapping[str, Any]],
    others: Iterable[str] = (),
    has_pairs: bool = True,
) -> None:
    """Raises `UsageError` for a name that is neither a value, a key or a pair of the rows nor among the `others`: it is
    a typing error. `has_pairs` is False for a table, whose columns show method and optimizer apart."""
    known, pairs = dict.fromkeys(others), {}
    for row in rows:
        known |= dict.fromkeys([*row, *map(written, row.values())])
        pairs[pair_of(row)] = None
    apart = {canonical(pair) for pair in pairs if "+" in pair}
    if has_pairs:
        known |= pairs
    there = {canonical(word) for word in known}
    problems = []
    for name in names:
        if name in apart and not has_pairs:
            problems.append(f"--names: '{name}' is a pair, whose parts a table shows in two columns. Name the parts.")
        elif canonical(name) not in there:
            problems.append(f"--names: nothing here is called '{name}'. {nearest(name, list(known))}")
    if problems:
        raise UsageError(*problems)
