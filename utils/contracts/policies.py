"""What every memory policy must keep: slots that are there, rows of all tasks, and decisions that can be resumed."""

from functools import partial
from typing import Any

import numpy as np
import torch

from flatcl.utils.contracts import methods
from flatcl.utils.contracts._runs import difference, expect, start
from flatcl.utils.engine.buffer import Buffer
from flatcl.utils.engine.policies import Policy
from flatcl.utils.registry import POLICIES

CLASSES = 5
LENGTHS = (1, 7, 3, 40, 2, 2, 9)  # of the batches of a stream


def subject(name: str) -> str:
    POLICIES.load(name)
    return name


def _filled(name: str, capacity: int, batches: tuple[int, ...] = LENGTHS, seed: int = 0) -> Buffer:
    """A memory after a stream of random labels; the slots are checked."""
    policy: Policy = POLICIES.load(name)(CLASSES)
    buffer = Buffer(capacity, "cpu", np.random.default_rng(seed), policy)
    draw = np.random.default_rng(1)
    for length in batches:
        labels, rows = draw.integers(CLASSES, size=length), torch.arange(length)
        state = buffer.rng.bit_generator.state
        _check_slots(policy, policy.place(buffer, length, labels), buffer, length)
        policy = POLICIES.load(name)(CLASSES)  # what it has decided for the check does not count
        policy.load_state_dict(methods.saved(buffer.state_dict())["policy"])
        buffer.policy, buffer.rng.bit_generator.state = policy, state
        buffer.add(labels, y=torch.from_numpy(labels), ids=rows)
    return buffer


def _check_slots(policy: Policy, slots: Any, buffer: Buffer, length: int) -> None:
    is_right = isinstance(slots, np.ndarray) and slots.shape == (length,) and slots.dtype.kind in "iu"
    got = f"{slots.dtype} {slots.shape}" if isinstance(slots, np.ndarray) else type(slots).__name__
    expect(is_right, f"place() of {length} rows must return whole numbers ({length},), got {got}")
    expect((slots >= 0).all(), f"place() gives the slot {slots.min()}. Slots begin with 0; capacity means: not kept")
    new = sorted({int(slot) for slot in slots if len(buffer) <= slot < buffer.capacity})
    expected = list(range(len(buffer), len(buffer) + len(new)))
    expect(new == expected, f"place() fills the empty slots {new}, where {len(buffer)} comes next. Fill them in order")


def takes_slots_that_are_there(name: str) -> None:
    """Whatever the capacity and the batches; and save and load on the way change nothing."""
    for capacity in (CLASSES, 12, 200):
        buffer = _filled(name, capacity)
        expect(len(buffer) <= capacity, f"{len(buffer)} rows are kept in a memory of {capacity}")


def decides_by_the_generator_alone(name: str) -> None:
    """The same seed gives the same memory, whatever was drawn elsewhere."""
    first = _filled(name, 12)
    np.random.seed(5)
    torch.manual_seed(5)
    found = difference(first.all(), _filled(name, 12).all(), "the memory")
    expect(not found, f"{found} in a second run. Draw from buffer.rng alone")


def remembers_tasks(name: str) -> str | None:
    """After two tasks the memory of ER has rows of the last one at least."""
    trainer = start("er", buffer_policy=name, buffer_size=40, stop_after=2)
    trainer.run()
    labels = {*trainer.method.buffer.all().get("y", torch.empty(0)).tolist()}
    tasks = [index for index in range(2) if labels & {*trainer.benchmark[index].classes}]
    expect(tasks, "after two tasks the memory is empty. Fill it in place() or end_task()")
    return None if tasks == [0, 1] else f"note: after two tasks it has rows of task {tasks[0] + 1} alone"


def trains_two_tasks(name: str, model: str, optimizer: str) -> None:
    methods.trains_two_tasks(model, optimizer, buffer_policy=name, buffer_size=40)


def goes_on_where_it_was_stopped(name: str) -> None:
    """A run with it, stopped inside the last task and resumed, is the one that was not, bit for bit."""
    methods.goes_on_where_it_was_stopped("derpp", buffer_policy=name, buffer_size=40)


CONTRACTS = {
    "takes slots that are there": takes_slots_that_are_there,
    "decides by the buffer's generator alone": decides_by_the_generator_alone,
    "remembers the tasks": remembers_tasks,
    "er trains two tasks under sgd": partial(trains_two_tasks, model="er", optimizer="sgd"),
    "derpp trains two tasks under sam": partial(trains_two_tasks, model="derpp", optimizer="sam"),
    "same seed, same run, also where it was stopped and resumed": goes_on_where_it_was_stopped,
}
