"""The section `tune` of a study file: which flags are searched, how, and the rule of the choice."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flatcl.utils.arguments import SEEDS
from flatcl.utils.registry import nearest

METHODS = ("grid", "random", "tpe")
INCREMENTAL = "average_incremental_accuracy"
METRICS = ("final_average_accuracy", INCREMENTAL)  # higher is better
SETTINGS = ("class-il", "task-il", "domain-il", "general-continual")
RULES = ("best_mean",)
MOST_TRIALS = 10_000
KEYS = (
    "space", "method", "trials", "budget_rows", "seeds", "stop_after", "metric", "setting", "share", "rule", "prune",
    "random_seed", "same_seeds",
)  # fmt: skip
DECIDED = ("seed", "validation", "budget_rows", "stop_after", "notes", *SEEDS)  # by the section, or in another place
EXAMPLE = "Example: tune: {space: {lr: [0.01, 0.03, 0.1]}}."


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`; `log`: evenly in the logarithm."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Section:
    """What is searched. `space`: {flag: words, or a range of numbers}; `trials` of each cell (None: the whole grid);
    `seeds`: the runs of each trial; `share`: flags that are chosen once for several models. See docs/tuning.md."""

    space: Mapping[str, tuple[str, ...] | Range]
    method: str = "grid"
    trials: int | None = None
    budget_rows: int | None = None
    seeds: tuple[int, ...] = (0,)
    stop_after: int | None = None
    metric: str = METRICS[0]
    setting: str = "class-il"
    share: tuple[str, ...] = ()
    rule: str = RULES[0]
    prune: bool = False
    random_seed: int = 0
    same_seeds: bool = False

    def to_json(self) -> dict[str, Any]:
        """For the record, and to compare with it: lists in place of tuples."""
        space = {
            name: asdict(values) if isinstance(values, Range) else list(values) for name, values in self.space.items()
        }
        return {**asdict(self), "space": space, "seeds": list(self.seeds), "share": list(self.share)}


class TuneReader:
    """Reads the section, for the reader of a study file, whose helpers it uses. Mistakes go to `tree.problems`."""

    def _tune(self) -> Section | None:
        if "tune" not in self.top:
            return None
        own = self.top["tune"]
        if not isinstance(own, dict):
            self.tree.complain(("tune",), f"expects keys such as space and method. {EXAMPLE}")
            return None
        for key in own:
            if key not in KEYS:
                self.tree.complain(("tune", key), f"unknown key. {nearest(key, list(KEYS))}")
        if "space" not in own:
            self.tree.complain(("tune",), f"the key 'space' is missing. {EXAMPLE}")
        section = Section(
            space=self._space(own.get("space", {})),
            method=self._one_of("method", METHODS),
            trials=self._whole("trials", 1, MOST_TRIALS),
            budget_rows=self._whole("budget_rows", 1, 10**18),
            seeds=self._seeds_of(("tune", "seeds"), own["seeds"]) if "seeds" in own else (0,),
            stop_after=self._whole("stop_after", 1, 10**6),
            metric=self._one_of("metric", METRICS),
            setting=self._one_of("setting", SETTINGS),
            share=tuple(name for _, name in self._list(("tune", "share"), own["share"])) if "share" in own else (),
            rule=self._one_of("rule", RULES),
            prune=self._switch("prune"),
            random_seed=self._whole("random_seed", 0, 2**32 - 1) or 0,
            same_seeds=self._switch("same_seeds"),
        )
        self._check_tune(section)
        return section

    def _check_tune(self, section: Section) -> None:
        """Keys that do not fit each other."""
        given, complain = self.top["tune"], self.tree.complain
        if section.method == "grid":
            for name, values in section.space.items():
                if isinstance(values, Range):
                    complain(
                        ("tune", "space", name),
                        "a grid needs a list of values. Give one, or method: random or tpe, for a range.",
                    )
            for key in ("trials", "random_seed", "prune"):
                if key in given:
                    complain(
                        ("tune", key), "a grid tries all of its values, to the end. Drop it, or give method: random."
                    )
        elif "trials" not in given:
            complain(("tune",), f"method: {section.method} needs the number of trials of each cell. Give trials: 20.")
        if section.method == "tpe" and "share" in given:
            complain(("tune", "share"), "tpe chooses for each cell by itself. Drop it, or give method: grid or random.")
        for name in section.share:
            if name not in section.space:
                complain(("tune", "share"), f"'{name}' is not in the space. {nearest(name, list(section.space))}")
        for name in ("validation", *(["budget_rows"] if section.budget_rows else ())):
            if name in self.places:
                complain(("tune",), f"--{name} is set by the search, and also at {self.places[name]}. Give it once.")

    def _space(self, value: Any) -> dict[str, tuple[str, ...] | Range]:
        space: dict[str, tuple[str, ...] | Range] = {}
        entries = list(self._mapping(("tune", "space"), value))
        if isinstance(value, dict) and not value:
            self.tree.complain(("tune", "space"), f"expects at least one flag, got none. {EXAMPLE}")
        for path, name, item in entries:
            if name in DECIDED:
                self.tree.complain(path, f"--{name} cannot be searched. Drop it.")
                continue
            if not self._flag_is_known(path, name):
                continue
            if name in self.places:
                self.tree.complain(path, f"--{name} is also given at {self.places[name]}. Give it in one place.")
            self.places[name] = self.tree.where(path)
            values = self._range(path, item) if isinstance(item, dict) else self._choices(path, name, item)
            if values:
                space[name] = values
        return space

    def _range(self, path: tuple, item: Mapping[str, Any]) -> Range | None:
        for key in item:
            if key not in ("low", "high", "log"):
                self.tree.complain((*path, key), f"unknown key. {nearest(key, ['low', 'high', 'log'])}")
        low, high = (self._number(path, item, key) for key in ("low", "high"))
        log = self._switch_at((*path, "log"), item.get("log", "0"))
        if low is None or high is None:
            return None
        if low >= high:
            self.tree.complain(path, f"low must be less than high, got {low:g} and {high:g}.")
        if log and low <= 0:
            self.tree.complain(path, f"log needs a low above 0, got {low:g}.")
        return Range(low, high, log)

    def _number(self, path: tuple, item: Mapping[str, Any], key: str) -> float | None:
        if key not in item:
            self.tree.complain(path, f"the key '{key}' is missing. Example: {{low: 0.01, high: 0.5, log: true}}.")
            return None
        try:
            value = float(item[key])
            if math.isfinite(value):
                return value
        except (TypeError, ValueError):
            pass
        self.tree.complain((*path, key), f"expects a finite number, got {item[key]!r}.")
        return None

    def _one_of(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.top["tune"].get(key, choices[0])
        if value not in choices:
            hint = nearest(str(value), list(choices))
            self.tree.complain(("tune", key), f"expects one of {', '.join(choices)}, got '{value}'. {hint}")
            return choices[0]
        return value

    def _whole(self, key: str, low: int, high: int) -> int | None:
        value = self.top["tune"].get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value.isdecimal() or not low <= int(value) <= high:
            got = f"'{value}'" if isinstance(value, str) else "a collection"
            self.tree.complain(("tune", key), f"expects a whole number from {low} to {high:,}, got {got}.")
            return None
        return int(value)

    def _switch(self, key: str) -> bool:
        return self._switch_at(("tune", key), self.top["tune"].get(key, "0"))

    def _switch_at(self, path: tuple, value: Any) -> bool:
        if value not in ("0", "1", "true", "false"):
            self.tree.complain(path, f"expects true or false, got {value!r}.")
        return value in ("1", "true")
