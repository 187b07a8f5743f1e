"""A step as a program: recorded once, then replayed on other rows, without the Python code that made it.

A step starts some hundred to some thousand small operations, and on a GPU it is the host that takes the time. Its loss
is pure, its randomness is drawn beforehand, and all that it changes stays in its tensors. So for blocks of one form and
one phase (`utils/engine/phase.py`) the operations are always the same: they are recorded with tensors of their own for
the blocks, and a later step copies its blocks there and replays them. What is another number in each step (Adam's
corrections, drawn tensors) is copied in too; the learning rate is a part of the program, as it stays for an epoch.

A step is taken as ever, not replayed: the first ones of a task and the first of each form, phase and learning rate, in
which state appears and checks are made; those that are logged; those of a network that draws (dropout) or changes what
it keeps in Python; and those of which a method or an optimizer says so. A new task drops all programs. Before each
replay a `Guard` looks whether the method's tensors and its layers' settings are still those of the recorded step. One
recording that fails is the run's last.

The recorder is a function: operations -> a function that repeats them. On a GPU it is `CudaGraphs`. That a replay is
the step is tested without a GPU, by a recorder for the CPU (`utils/contracts/_tape.py`).
"""

import copy
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from flatcl.models._blocks import Block
from flatcl.models._method import Method
from flatcl.models._objective import Objective
from flatcl.utils.engine import seeding
from flatcl.utils.engine.phase import Ordinary, phase_of
from flatcl.utils.errors import UsageError
from flatcl.utils.optim._driver import Driver, Grads

KEPT = 8  # programs; each has its blocks and its results for itself
KNOWN = 256  # forms and phases that are remembered; a phase may be another in each step
TRIES = 3  # steps of one make in which something may appear or be replaced, and of a run that a guard ends
OF_METHOD = ("loss", "references", "combine", "draw", "steps", "remember", "begin_epoch")  # what runs in mid-task
OF_OPTIMIZER = (
    "direction", "update", "gradients", "ascent", "descent", "settle", "at", "clipped", "step", "record", "make_base",
    "draw", "tick", "begin_epoch",
)  # fmt: skip


class Recorder(Protocol):
    def __call__(self, operations: Callable[[], None]) -> Callable[[], None]:
        """Keeps what `operations` does, and returns what repeats it. Raises `RuntimeError` where that fails."""

    def renew(self) -> None:
        """All that was recorded so far is dropped."""


class CudaGraphs:
    """Records what is started on a CUDA device, on a stream of its own. Its graphs share their memory: one is replayed
    at a time. Kernels that were chosen by measurement are used; none is measured while recording. That memory is apart
    from what ordinary steps need, which go on between replays: a recording that leaves no room for them fails."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.failed: list[torch.cuda.CUDAGraph] = []  # what the allocator may still point to
        self.renew()

    def renew(self) -> None:
        # the libraries' work spaces stay in the old memory, which cannot be taken again once its graphs are gone
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, operations: Callable[[], None]) -> Callable[[], None]:
        graph, cudnn = torch.cuda.CUDAGraph(), torch.backends.cudnn
        is_measuring, cudnn.benchmark = cudnn.benchmark, False
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        try:
            self._capture(graph, operations)
        except BaseException as error:
            self._recover(None if isinstance(error, torch.cuda.OutOfMemoryError) else graph)
            raise
        finally:
            cudnn.benchmark = is_measuring
        taken = torch.cuda.memory_reserved(self.device) - before
        free = torch.cuda.mem_get_info(self.device)[0]
        if free < taken:
            raise RuntimeError(f"it takes {taken >> 20:,} MiB beside an ordinary step, {free >> 20:,} are free")
        return graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, operations: Callable[[], None]) -> None:
        here = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(here):  # after an error, too, they are as before
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                operations()

    def _recover(self, graph: torch.cuda.CUDAGraph | None) -> None:
        """After a failure torch (2.11) takes the device's generator to be recording, until a recording succeeds. A
        graph that only found no memory is not kept: it would hold what it has taken."""
        self.renew()
        trivial = torch.cuda.CUDAGraph()
        self.failed += [trivial] if graph is None else [graph, trivial]
        self._capture(trivial, lambda: torch.zeros(1, device=self.device))


def recorder(device: torch.device) -> Recorder | None:
    """For steps on this device; None where there is none."""
    return CudaGraphs(device) if device.type == "cuda" else None


class Programs:
    """The steps of a method under an optimizer. `replayed` counts those that were replays, `others` the rest, and
    `ordinary` those of the rest that cannot be replays, by the reason."""

    def __init__(self, method: Method, optimizer: Driver, record: Recorder):
        self.method, self.optimizer, self.record = method, optimizer, record
        self.replayed, self.others, self.ordinary = 0, 0, Counter()
        self.kept: OrderedDict[tuple, Program] = OrderedDict()  # the one that was used last stands last
        self.given_up: str | None = None  # why no further step of this run is recorded
        self.breaks = 0  # programs that a guard has ended
        self.copies_losses = False  # somebody keeps the losses of steps, which the next replay overwrites
        self.drop()

    def drop(self) -> None:
        """Of a task or run that has ended."""
        self.kept.clear()
        self.record.renew()
        self.known: dict[tuple, str | None] = {}  # makes that were seen -> why they are not recorded
        self.unsettled: Counter[tuple] = Counter()  # makes in whose steps something has appeared or been replaced

    def give_up(self, why: str) -> None:
        self.given_up = why
        self.kept.clear()

    def check(self) -> None:
        """Raises `UsageError` where no step could be replayed."""
        method, optimizer = self._method_phase(), phase_of(self.optimizer, OF_OPTIMIZER)
        for phase in (method, optimizer):
            if isinstance(phase, Ordinary) and phase.for_good:
                raise UsageError(f"--cuda_graph 1: {phase.why}. Use --cuda_graph auto or 0.")

    def __str__(self) -> str:
        """For the end of a run: how many steps were replays, and why others cannot be."""
        line = f"{self.replayed:,} of {self.replayed + self.others:,} steps were replays of recorded ones"
        return "\n".join([line, *(f"{number:,} could not be replayed: {why}" for why, number in self.ordinary.items())])

    def step(self, blocks: tuple[Block, ...], trace: bool = False) -> tuple[Objective, Grads]:
        """One step on these blocks. Of a replay: its objective has loss and rows, and no update is given."""
        phases = self._method_phase(), phase_of(self.optimizer, OF_OPTIMIZER)
        why = self.given_up or next((phase.why for phase in phases if isinstance(phase, Ordinary)), None)
        if self.optimizer.lr_rises:
            why = "the learning rate rises from step to step (--warmup_epochs)"
        if why is not None:
            self.ordinary[why] += 1
            return self._ordinary(blocks, trace)
        rates = self.optimizer.base.lr, self.method.lr
        make = (*rates, *phases, *self.optimizer.state, *(block.form for block in blocks))
        program = self.kept.get(make)
        changed = None if program is None else program.guard.changed()
        if changed is not None:
            self._end(make, changed)
        if trace or self.optimizer.is_watching or make not in self.known:
            return self._first(make, blocks, trace)
        if self.known[make] is None:
            program = self._program(make, blocks)
            if program is not None:
                self.replayed += 1
                return program.run(blocks, self.copies_losses), []
        self.ordinary[self.given_up or self.known[make]] += 1
        return self._ordinary(blocks, trace)

    def _method_phase(self) -> Any:
        return phase_of(self.method, OF_METHOD)

    def _ordinary(self, blocks: tuple[Block, ...], trace: bool) -> tuple[Objective, Grads]:
        self.others += 1
        objective = Objective(self.method, blocks, self.optimizer.params, trace)
        return objective, self.optimizer.step(objective)

    def _first(self, make: tuple, blocks: tuple[Block, ...], trace: bool) -> tuple[Objective, Grads]:
        """An ordinary step, after which others of its make can be recorded."""
        if make in self.known:
            return self._ordinary(blocks, trace)
        if len(self.known) == KNOWN:
            self.known.clear()
            self.unsettled.clear()
        before, guard = _global_states(), Guard(self.method)
        done = self._ordinary(blocks, trace)
        if done[0].skipped:
            return done
        changed = guard.changed()
        if _differ(before, _global_states()):
            self.known[make] = "the network draws random numbers (dropout)"
        elif changed is None:
            self.known[make] = None
        else:
            self.unsettled[make] += 1
            if self.unsettled[make] == TRIES:
                self.known[make] = f"each pass changes {changed}, which Python keeps"
        return done

    def _end(self, make: tuple, changed: str) -> None:
        """Of a program that took for given what has changed since."""
        del self.kept[make]
        self.known.pop(make, None)
        self.breaks += 1
        if self.breaks == TRIES:
            self.give_up(f"{changed} is replaced or changed between steps. Write new values into the same tensor")

    def _program(self, make: tuple, blocks: tuple[Block, ...]) -> "Program | None":
        """The program of these blocks, recorded if it is new; None, and a reason noted, where that fails."""
        program = self.kept.get(make)
        if program is None:
            if len(self.kept) == KEPT:
                self.kept.popitem(last=False)
            optimizer = self.optimizer
            state = {name: [*entries] for name, entries in optimizer.state.items()}
            base = {name: [*entries] for name, entries in optimizer.base.state.items()}
            guard, why = Guard(self.method), None
            try:
                program = Program(self.method, optimizer, blocks, self.record)
                program.guard = guard
            except Exception as error:  # of a step that has run in the ordinary way
                while error.__context__ is not None:  # what is said last is that recording has failed
                    error = error.__context__
                said = str(error).splitlines() or [""]
                why = f"it cannot be recorded ({type(error).__name__}: {said[0]})"
            if not (_same(state, optimizer.state) and _same(base, optimizer.base.state)):
                why = "the step makes new state"
            elif guard.changed() is not None:
                why = why or f"the step replaces {guard.changed()}"
            optimizer.state, optimizer.base.state = state, base
            guard.restore()
            if why is not None:
                self.give_up(why)
                return None
            self.kept[make] = program
        self.kept.move_to_end(make)
        return program


class Guard:
    """What a recorded step takes for given of a method and its networks, and Python code can change: which tensors they
    have (their values may change), and for the layers of the networks also numbers, flags and words, alone or in lists
    and dicts. The method's own numbers are for its `phase` to say."""

    def __init__(self, method: Method):
        self.tensors: list[tuple[str, dict, str, Tensor]] = []
        self.settings: list[tuple[str, dict, str, Any]] = []
        self.sizes: list[tuple[str, dict, int]] = []
        for name, layer in method.named_modules():
            for place in (vars(layer), layer._parameters, layer._buffers):
                for key, value in place.items():
                    path = f"{name}.{key}" if name else key
                    if isinstance(value, Tensor):
                        self.tensors.append((path, place, key, value))
                    elif name and key not in OF_MODULES and _is_plain(value):
                        self.settings.append((path, place, key, copy.copy(value)))
            if name:
                self.sizes.append((name, vars(layer), len(vars(layer))))

    def changed(self) -> str | None:
        """The name of something that is another one now."""
        for name, place, key, tensor in self.tensors:
            if place.get(key) is not tensor:
                return name
        for name, place, key, value in self.settings:
            now = place.get(key)
            if now is not value and not (type(now) is type(value) and _is_plain(now) and now == value):
                return name
        return next((name for name, place, size in self.sizes if len(place) != size), None)

    def restore(self) -> None:
        """Puts the tensors back that a recording has replaced by some that were never computed."""
        for _, place, key, tensor in self.tensors:
            place[key] = tensor


OF_MODULES = {*vars(nn.Module())} - {"training"}  # torch's own entries of a layer
PLAIN = (bool, int, float, complex, str, type(None))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set):
        return all(isinstance(entry, PLAIN) for entry in value)
    return isinstance(value, PLAIN) or isinstance(value, dict) and _is_plain([*value.values()])


def _global_states() -> tuple[dict, Any, Any]:
    """Of the generators of torch, Python and NumPy."""
    return seeding.global_state(), random.getstate(), np.random.get_state()


def _differ(before: tuple[dict, Any, Any], after: tuple[dict, Any, Any]) -> bool:
    of_numpy = any(np.any(a != b) for a, b in zip(before[2], after[2], strict=True))
    return seeding.differ(before[0], after[0]) or before[1] != after[1] or of_numpy


class Program:
    """One recorded step. `run` takes it again, on other blocks of the same form, while its `guard` finds no change."""

    guard: Guard

    def __init__(self, method: Method, optimizer: Driver, blocks: tuple[Block, ...], record: Recorder):
        self.optimizer = optimizer
        self.blocks = tuple(block.map(torch.empty_like) for block in blocks)
        self.objective = Objective(method, self.blocks, optimizer.params, recorded=True)
        before = seeding.generator_state(optimizer.rng)
        self.drawn = {name: self._here(numbers) for name, numbers in optimizer.draw(self.objective).items()}
        seeding.set_generator_state(optimizer.rng, before)  # the step itself draws in `run`
        self.numbers = self._here(np.array(optimizer.base.numbers()))
        self._write(blocks)
        optimizer.drawn = self.drawn
        self.replay = record(lambda: optimizer.record(self.objective, self.numbers))
        self.loss = self.objective.loss
        self.objective.forget_gradients()

    def run(self, blocks: tuple[Block, ...], copies_loss: bool = False) -> Objective:
        optimizer, objective = self.optimizer, copy.copy(self.objective)
        self._write(blocks)
        for name, numbers in optimizer.draw(objective).items():
            self.drawn[name].copy_(_pinned(numbers, self.drawn[name].device), non_blocking=True)
        optimizer.base.advance(objective.used)
        if len(self.numbers):
            self.numbers.copy_(_pinned(np.array(optimizer.base.numbers()), self.numbers.device), non_blocking=True)
        self.replay()
        objective.loss = self.loss.copied() if copies_loss else self.loss
        optimizer.tick(objective)
        return objective

    def _here(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.optimizer.device)

    def _write(self, blocks: tuple[Block, ...]) -> None:
        """Copies the blocks' columns to where the operations read them, one call for each type of number."""
        columns = [(own, new) for pair in zip(self.blocks, blocks, strict=True) for own, new in _columns(*pair)]
        for dtype in {own.dtype for own, _ in columns}:
            torch._foreach_copy_(*zip(*(pair for pair in columns if pair[0].dtype == dtype), strict=True))


def _columns(a: Block, b: Block) -> Iterator[tuple[Tensor, Tensor]]:
    yield a.x, b.x
    for name, column in a.columns.items():
        yield column, b.columns[name]


def _pinned(numbers: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _same(before: dict[str, list], after: dict[str, list]) -> bool:
    """Whether both have the same tensors."""
    return before.keys() == after.keys() and all(
        a is b or not isinstance(a, Tensor) and not isinstance(b, Tensor)
        for name in before
        for a, b in zip(before[name], after[name], strict=True)
    )
