"""The numbers in the cells of a table, before a format writes them."""

from dataclasses import dataclass, replace

from flatcl.utils.reports.groups import NOTHING, Stat

BEST, TIE = "best", "tie"
TIE_MARK = "†"


@dataclass(frozen=True)
class Number:
    """One number as text: '87.29', its standard deviation '0.46' (empty: none), the ends of an interval, and whether it
    is marked as the best of its column (`BEST`) or as one that cannot be told apart from it (`TIE`)."""

    mean: str
    std: str = ""
    interval: tuple[str, str] | None = None
    mark: str | None = None

    @classmethod
    def of(cls, stat: Stat, is_cost: bool, with_interval: bool = False) -> "Number":
        """Percent of a fraction; a cost in its own unit."""
        if stat.mean is None:
            return cls(NOTHING)
        places = 2 if not is_cost else 0 if stat.mean >= 100 else 1
        ends = (stat.interval if with_interval else None) or ()
        mean, *rest = (shown(value, is_cost, places) for value in (stat.mean, *ends))
        is_spread = stat.std is not None and (stat.std > 0 or not is_cost)
        std = shown(stat.std, is_cost, places) if is_spread else ""
        return cls(mean, std, (rest[0], rest[1]) if rest else None)

    def marked(self, mark: str | None) -> "Number":
        return replace(self, mark=mark)

    def __str__(self) -> str:
        return self.value + (f" [{self.interval[0]}, {self.interval[1]}]" if self.interval else "")

    @property
    def value(self) -> str:
        return f"{self.mean} ± {self.std}" if self.std else self.mean


Cell = str | tuple[Number, ...]  # several metrics of a pivoted table


def shown(value: float, is_cost: bool, places: int) -> str:
    """A fraction in percent, or a cost."""
    value = value if is_cost else 100 * value
    return f"{round(value, places) + 0.0:,.{places}f}"  # + 0.0 turns -0.0 into 0.0


def plain(cell: Cell, best: str = "{}") -> str:
    """A cell as text; `best` is how the best number is shown, as in '**{}**'."""
    if isinstance(cell, str):
        return cell
    return " / ".join((best.format(number) if number.mark == BEST else str(number)) +
                      (TIE_MARK if number.mark == TIE else "") for number in cell)  # fmt: skip


def percent(stat: Stat) -> str:
    """`87.29 ± 0.46`; no ± for a single run, a dash for what is not defined."""
    return str(Number.of(stat, is_cost=False))
