"""The reservoir against a textbook that takes one item at a time, its fairness, and what saving must keep."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from flatcl.utils.engine.buffer import Buffer


def rng(seed=0):
    return np.random.default_rng(seed)


def items(first, n):
    """n rows that can be told apart: a (3,) float64 and an int64 column."""
    number = torch.arange(first, first + n)
    return {"logits": number[:, None] * torch.tensor([1.0, 0.5, -2.0]).double(), "y": number}


def filled(capacity, seen, seed=0, batch=64):
    buffer = Buffer(capacity, "cpu", rng(seed))
    for first in range(0, seen, batch):
        buffer.add(**items(first, min(batch, seen - first)))
    return buffer


class Textbook:
    """Algorithm R, one item at a time, in a list."""

    def __init__(self, capacity, generator):
        self.capacity, self.rng, self.rows, self.seen = capacity, generator, [], 0

    def add(self, item):
        if self.seen < self.capacity:
            self.rows.append(item)
        else:
            slot = int(np.floor(self.rng.random() * (self.seen + 1)))
            if slot < self.capacity:
                self.rows[slot] = item
        self.seen += 1


@pytest.mark.parametrize("capacity", (1, 7, 10, 50))
@pytest.mark.parametrize("sizes", [(1,) * 60, (4,) * 20, (10, 10, 10), (3, 25, 1, 40), (100,), (7, 0, 7, 30)])
def test_equals_the_textbook_for_any_batches(capacity, sizes):
    buffer, textbook = Buffer(capacity, "cpu", rng(1)), Textbook(capacity, rng(1))
    first = 0
    for n in sizes:
        buffer.add(**items(first, n))
        for item in range(first, first + n):
            textbook.add(item)
        first += n
        rows = buffer.all()
        assert rows["y"].tolist() == textbook.rows
        assert torch.equal(rows["logits"], items(0, first)["logits"][rows["y"]])  # columns stay together
        assert buffer.num_seen == first and len(buffer) == min(first, capacity)
        assert buffer.rng.bit_generator.state == textbook.rng.bit_generator.state


def test_the_later_row_stays_where_two_take_one_slot():
    """With one slot and 200 rows in one batch, rows meet in the slot many times; the last one that took it is there."""
    for seed in range(20):
        buffer = Buffer(1, "cpu", rng(seed))
        buffer.add(**items(0, 200))
        draws = rng(seed).random(199)
        taken = [0] + [i for i in range(1, 200) if int(draws[i - 1] * (i + 1)) == 0]
        assert buffer.all()["y"].tolist() == [taken[-1]]
        assert len(taken) > 1


def test_every_item_is_as_likely_to_stay():
    """Chi-squared over which of 60 items are in a memory of 12, in batches that cross the capacity."""
    runs, capacity, n = 1500, 12, 60
    counts, slots = np.zeros(n), np.zeros((capacity, n))
    for seed in range(runs):
        kept = filled(capacity, n, seed, batch=9).all()["y"].numpy()
        counts[kept] += 1
        slots[np.arange(capacity), kept] += 1
    assert counts.sum() == runs * capacity
    # the counts of one run are not independent (12 of 60 without repeats): the variance is p (1 - p) n / (n - 1)
    p = capacity / n
    chi2 = ((counts - runs * p) ** 2).sum() / (runs * p * (1 - p)) * (n - 1) / n
    assert stats.chi2.sf(chi2, n - 1) > 1e-3 and stats.chi2.cdf(chi2, n - 1) > 1e-3
    assert stats.chisquare(slots[:, capacity:].sum(1)).pvalue > 1e-3  # late items prefer no slot


def test_draws_distinct_rows_no_more_than_there_are():
    buffer = filled(20, 8)
    for size, expected in ((5, 5), (8, 8), (50, 8)):
        rows = buffer.draw(size)
        assert rows["y"].shape == (expected,) and rows["logits"].shape == (expected, 3)
        assert rows["y"].unique().numel() == expected
        assert torch.equal(rows["logits"], items(0, 8)["logits"][rows["y"]])
    assert sorted(buffer.draw(50)["y"].tolist()) == list(range(8))
    assert filled(20, 100).draw(50)["y"].unique().numel() == 20


def test_draws_are_uniform_and_independent_of_each_other():
    buffer, runs, size, n = filled(10, 10), 4000, 3, 10
    counts, first_second = np.zeros(n), np.zeros((n, n))
    overlap = 0
    for _ in range(runs):
        rows = buffer.draw(size, draws=2)["y"].view(2, size).numpy()
        assert len(set(rows[0])) == len(set(rows[1])) == size
        np.add.at(counts, rows.ravel(), 1)
        first_second[rows[0, 0], rows[1, 0]] += 1
        overlap += len(set(rows[0]) & set(rows[1]))
    p = size / n
    chi2 = ((counts - 2 * runs * p) ** 2).sum() / (2 * runs * p * (1 - p)) * (n - 1) / n
    assert stats.chi2.sf(chi2, n - 1) > 1e-3
    assert stats.chisquare(first_second.ravel()).pvalue > 1e-3
    # two independent draws of 3 of 10 share 0.9 rows on average; hypergeometric variance .9 * .7 * 7/9 = .49
    assert abs(overlap / runs - 0.9) < 4 * 0.7 / runs**0.5


def test_several_draws_in_one_call_are_several_calls():
    together, apart = filled(10, 30), filled(10, 30)
    both = together.draw(4, draws=3)["y"]
    assert torch.equal(both, torch.cat([apart.draw(4)["y"] for _ in range(3)]))


def test_drawn_rows_are_copies():
    buffer = filled(5, 5)
    buffer.draw(5)["logits"].zero_()
    assert torch.equal(buffer.all()["logits"], items(0, 5)["logits"])


@pytest.mark.parametrize("seen", (0, 4, 10, 37))
def test_saved_and_loaded_goes_on_as_if_nothing_had_happened(seen, tmp_path):
    """Before it is full, when it is, and after; the counter does not restart and the generator is where it was."""
    buffer = filled(10, seen, seed=3, batch=5)
    if seen:
        buffer.draw(3)
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    other = filled(10, 23, seed=9)  # whatever it held before is gone
    if seen == 0:
        other = Buffer(10, "cpu", rng(9))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.num_seen == seen and len(other) == min(seen, 10)
    for first in range(seen, seen + 200, 8):
        for one in (buffer, other):
            one.add(**items(first, 8))
        assert torch.equal(buffer.draw(4, draws=2)["logits"], other.draw(4, draws=2)["logits"])
    for name, column in buffer.all().items():
        assert torch.equal(column, other.all()[name]) and column.dtype == other.all()[name].dtype
    assert buffer.rng.bit_generator.state == other.rng.bit_generator.state


def test_a_saved_state_does_not_change_with_the_buffer():
    buffer = filled(10, 10)
    state = buffer.state_dict()
    buffer.add(**items(10, 500))
    assert state["num_seen"] == 10 and torch.equal(state["columns"]["y"], torch.arange(10))


def test_loading_an_empty_state_empties():
    buffer = filled(10, 30)
    buffer.load_state_dict(Buffer(10, "cpu", rng()).state_dict())
    assert len(buffer) == 0 and buffer.num_seen == 0
    buffer.add(**items(0, 4))
    assert buffer.all()["y"].tolist() == [0, 1, 2, 3]


class Largest(TorchDispatchMode):
    """Rows that the largest new tensor of any operation has, and rows written into the columns."""

    def __init__(self):
        super().__init__()
        self.made, self.written = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.index_copy_:
            self.written = max(self.written, len(args[2]))
        elif isinstance(out, torch.Tensor) and out._base is None:
            self.made = max(self.made, len(out) if out.ndim else 1)
        return out


def test_only_rows_that_stay_are_touched():
    """A memory of a million, long full: an add copies the kept rows alone, a draw the drawn ones."""
    buffer = Buffer(1_000_000, "cpu", rng(5))
    buffer.add(y=torch.arange(10))
    batch = torch.arange(400)
    buffer.num_seen, buffer.filled = 50_000_000, 1_000_000  # as if long full: one row in fifty stays
    buffer.columns["y"].fill_(-1)
    with Largest() as cost:
        buffer.add(y=batch)
    slots = (rng(5).random(400) * (50_000_001 + np.arange(400))).astype(np.int64)
    kept = slots[slots < 1_000_000]
    assert 0 < len(set(kept.tolist())) == len(kept) < 30
    assert cost.made == cost.written == len(kept)
    changed = (buffer.columns["y"] != -1).nonzero().squeeze(1)
    assert changed.tolist() == sorted(kept.tolist())
    with Largest() as cost:
        assert buffer.draw(32, draws=2)["y"].shape == (64,)
    assert cost.made == 64
    buffer.num_seen = 10**12  # nothing stays: nothing is copied
    with Largest() as cost:
        buffer.add(y=batch)
    assert cost.made == cost.written == 0
