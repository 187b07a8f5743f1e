"""A step as a program: recorded once, then replayed on other rows, without the Python code that made it.

A step starts some hundred to some thousand small operations, and on a GPU it is the host that takes the time. Its loss
is pure, its randomness is drawn beforehand, and all that it changes stays in its tensors. So for blocks of one form and
one phase (`utils/engine/phase.py`) the operations are always the same: they are recorded with tensors of their own for
the blocks, and a later step copies its blocks there and replays them. What is another number in each step (Adam's
corrections, drawn tensors) is copied in too; the learning rate is a part of the program, as it stays for an epoch.

A step is taken as ever, not replayed: the first ones of a task and the first of each form and phase, in which state
appears and checks are made; those that are logged; those of a network that draws (dropout) or counts its passes; and
those of which a method or an optimizer says so. A new task drops all programs.

The recorder is a function: operations -> a function that repeats them. On a GPU it is `CudaGraphs`. That a replay is
the step is tested without a GPU, by a recorder for the CPU (`utils/contracts/_tape.py`).
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flatcl.models._blocks import Block
from flatcl.models._method import Method
from flatcl.models._objective import Objective
from flatcl.utils.engine import seeding
from flatcl.utils.engine.phase import Ordinary, phase_of
from flatcl.utils.errors import UsageError
from flatcl.utils.optim._driver import Driver, Grads

KEPT = 8  # programs; each has its blocks and its results for itself
KNOWN = 256  # forms and phases that are remembered; a phase may be another in each step
OF_METHOD = ("loss", "references", "combine")
OF_OPTIMIZER = ("direction", "update", "gradients", "ascent", "descent", "settle", "at")


class Recorder(Protocol):
    def __call__(self, operations: Callable[[], None]) -> Callable[[], None]:
        """Keeps what `operations` does, and returns what repeats it. Raises `RuntimeError` where that fails."""

    def renew(self) -> None:
        """All that was recorded so far is dropped."""


class CudaGraphs:
    """Records what is started on a CUDA device, on a stream of its own. Its graphs share their memory: one is replayed
    at a time. Kernels that were chosen by measurement are used; none is measured while recording."""

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
        try:
            self._capture(graph, operations)
        except BaseException:
            self._recover(graph)
            raise
        finally:
            cudnn.benchmark = is_measuring
        return graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, operations: Callable[[], None]) -> None:
        here = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(here):  # after an error, too, they are as before
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                operations()

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a failure torch (2.11) takes the device's generator to be recording, until a recording succeeds."""
        self.renew()
        trivial = torch.cuda.CUDAGraph()
        self.failed += [graph, trivial]
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
        self.drop()

    def drop(self) -> None:
        self.kept.clear()
        self.record.renew()
        self.known: dict[tuple, str | None] = {}  # forms and phases that were seen -> why they are not recorded

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
        why = next((phase.why for phase in phases if isinstance(phase, Ordinary)), None)
        if self.optimizer.lr_rises:
            why = "the learning rate rises from step to step (--warmup_epochs)"
        if why is not None:
            self.ordinary[why] += 1
            return self._ordinary(blocks, trace)
        make = (*phases, *self.optimizer.state, *(block.form for block in blocks))
        if trace or self.optimizer.is_watching or make not in self.known:
            return self._first(make, blocks, trace)
        if self.known[make] is None:
            program = self._program((self.optimizer.base.lr, self.method.lr, *make), make, blocks)
            if program is not None:
                self.replayed += 1
                return program.run(blocks), []
        self.ordinary[self.known[make]] += 1
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
        before, numbers = seeding.global_state(), _numbers_of_networks(self.method)
        done = self._ordinary(blocks, trace)
        if not done[0].skipped:
            self.known[make] = None
            for name, number in _numbers_of_networks(self.method).items():
                if numbers.get(name) != number:
                    self.known[make] = f"the network changes a number of Python in each pass ({name})"
            if seeding.differ(before, seeding.global_state()):
                self.known[make] = "the network draws random numbers (dropout)"
        return done

    def _program(self, key: tuple, make: tuple, blocks: tuple[Block, ...]) -> "Program | None":
        """The program of these blocks, recorded if it is new; None, and a reason noted, where that fails."""
        program = self.kept.get(key)
        if program is None:
            if len(self.kept) == KEPT:
                self.kept.popitem(last=False)
            optimizer = self.optimizer
            state = {name: [*entries] for name, entries in optimizer.state.items()}
            base = {name: [*entries] for name, entries in optimizer.base.state.items()}
            try:
                program = Program(self.method, optimizer, blocks, self.record)
            except RuntimeError as error:
                while error.__context__ is not None:  # what is said last is that recording has failed
                    error = error.__context__
                self.known[make] = f"it cannot be recorded ({type(error).__name__}: {str(error).splitlines()[0]})"
            if not (_same(state, optimizer.state) and _same(base, optimizer.base.state)):
                program, self.known[make] = None, "the step makes new state"
            optimizer.state, optimizer.base.state = state, base
            if program is None:
                return None
            self.kept[key] = program
        self.kept.move_to_end(key)
        return program


class Program:
    """One recorded step. `run` takes it again, on other blocks of the same form."""

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

    def run(self, blocks: tuple[Block, ...]) -> Objective:
        optimizer, objective = self.optimizer, self.objective
        self._write(blocks)
        for name, numbers in optimizer.draw(objective).items():
            self.drawn[name].copy_(_pinned(numbers, self.drawn[name].device), non_blocking=True)
        optimizer.base.advance(objective.used)
        if len(self.numbers):
            self.numbers.copy_(_pinned(np.array(optimizer.base.numbers()), self.numbers.device), non_blocking=True)
        self.replay()
        objective.loss = self.loss
        optimizer.tick(objective)
        return objective

    def _here(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.optimizer.device)

    def _write(self, blocks: tuple[Block, ...]) -> None:
        """Copies the blocks' columns to where the operations read them, one call for each type of number."""
        columns = [(own, new) for pair in zip(self.blocks, blocks, strict=True) for own, new in _columns(*pair)]
        for dtype in {own.dtype for own, _ in columns}:
            torch._foreach_copy_(*zip(*(pair for pair in columns if pair[0].dtype == dtype), strict=True))


def _numbers_of_networks(method: Method) -> dict[str, Any]:
    """What the layers of the method's networks keep beside tensors and may decide by: numbers, flags and words."""
    return {
        f"{name}.{key}": value
        for name, layer in method.named_modules()
        if name  # the method itself has a phase
        for key, value in vars(layer).items()
        if isinstance(value, (bool, int, float, str))
    }


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
