"""What every optimizer must keep, whatever its rule: weights come back, BatchNorm moves once, state can be saved."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout

from flatcl.utils.contracts import methods
from flatcl.utils.contracts._runs import difference, expect
from flatcl.utils.contracts._steps import (
    TASK,
    Noisy,
    TwoHeads,
    batches,
    conv_bn_linear,
    copies,
    flat,
    make,
    momentum_of,
    step,
)
from flatcl.utils.registry import OPTIMIZERS

METHODS = ("er", "derpp", "agem")  # one block, several, and surgery on the update
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
SHARDS = 4  # of an optimizer whose passes are over shards


def subject(name: str) -> str:
    OPTIMIZERS.load(name)
    return name


class Trip(Exception):
    """The accident in a pass."""


def trip(gradient: Any) -> None:
    raise Trip


def weights_come_back(name: str, room: str, momentum: float | None = 0.1) -> None:
    """An exception in any pass, forward or backward, leaves weights and BatchNorm as they were before the step."""
    x, y = next(batches(torch.float32))
    for fatal in range(1, 20):
        net = conv_bn_linear(momentum, torch.float32)
        method, optimizer = make(name, net)
        before, places = copies(net), [p.data_ptr() for p in net.parameters()]
        statistics: list[dict] = []
        method.watch = _tripping(net, statistics, fatal, room)
        try:
            step(method, optimizer, x, y)
        except Trip:
            pass
        else:
            break  # it makes no such pass
        where = f"after an exception in the {room} of pass {fatal}"
        expect(torch.is_grad_enabled(), f"{where} torch makes no gradients. Use `with torch.no_grad():`")
        is_norm = net[1].track_running_stats and net[1].momentum == momentum
        expect(is_norm, f"{where} BatchNorm is left frozen. Use `with frozen_statistics(...)`")
        is_there = places == [p.data_ptr() for p in net.parameters()]
        expect(is_there, f"{where} parameters have other memory. Move weights by `with self.at(offset):`")
        parameters = {key for key, _ in net.named_parameters()}
        found = _difference(before, copies(net), parameters, "weights")
        expect(not found, f"{where} {found}. Move weights by `with self.at(offset):`")
        _check_statistics(name, statistics, fatal)
        found = _difference(before, copies(net), {f"1.{key}" for key in statistics[0]} - parameters, "statistics")
        expect(not found, f"{where} {found}. Use self.gradients(objective) and `with self.at(offset):`")
        net(x)
        expect(net[1].num_batches_tracked == 1, f"{where} BatchNorm's averages no longer move")
        method.watch = lambda number, logits: None
        step(method, optimizer, x, y)
        start = torch.cat([before[key].flatten() for key, _ in net.named_parameters()])
        expect(not torch.equal(flat(net), start), f"{where} training does not go on")
    expect(1 < fatal < 19, f"it makes {fatal - 1} passes in a step, where 1 to 17 can be")


def _tripping(net: nn.Module, statistics: list[dict], fatal: int, room: str) -> Callable:
    """Notes BatchNorm's state after each forward, and raises in the pass with the number `fatal`."""

    def watch(number: int, logits: torch.Tensor) -> None:
        statistics.append(copies(net[1]))
        if number == fatal:
            if room == "forward" or not logits.requires_grad:
                raise Trip
            logits.register_hook(trip)

    return watch


def _difference(a: dict[str, Any], b: dict[str, Any], keys: set[str], what: str) -> str | None:
    return difference({key: a[key] for key in sorted(keys)}, {key: b[key] for key in sorted(keys)}, what)


def _check_statistics(name: str, statistics: list[dict], fatal: int) -> None:
    """Only the clean pass, which is the first one, moves them; with shards, that of each."""
    moved = [
        number + 1
        for number in range(1, fatal)
        if any(not torch.equal(statistics[number - 1][key], statistics[number][key]) for key in STATISTICS)
    ]
    clean = [3, 5, 7][: (fatal - 1) // 2] if OPTIMIZERS.load(name).in_shards else []
    remedy = "Make passes at other weights in `with self.at(offset):`"
    expect(moved == clean, f"BatchNorm's averages move in the passes {moved} after the first, not {clean}. {remedy}")


def leaves_idle_parameters_alone(name: str) -> None:
    """Parameters without a gradient are neither moved nor stepped: no momentum, no weight decay."""
    net = TwoHeads()
    method, optimizer = make(name, net, weight_decay=0.1, **momentum_of(name))
    spare = net.spare_weight.detach().clone()
    for number, (x, y) in enumerate(batches(torch.float32, (6,) * 4)):
        net.head, net.seen = number // 2, []
        if number == 2:
            optimizer.begin_task(TASK)
        before = copies(net)
        step(method, optimizer, x, y)
        idle = {key for key in before if not key.startswith(f"heads.{net.head}.")}
        expect(
            len(idle) == 4, f"a step has made other parameters: {', '.join(net.state_dict().keys() - before.keys())}"
        )
        for seen in (*net.seen, net.state_dict()):  # the idle head has momentum from before, and weight decay is on
            found = _difference(before, seen, idle, "parameters")
            expect(not found, f"one without a gradient is changed: {found}. Give it an offset and an update of 0")
        busy = f"heads.{net.head}.weight"
        expect(not torch.equal(net.state_dict()[busy], before[busy]), f"{busy} has a gradient and is not stepped")
    is_spare = torch.equal(net.spare_weight, spare) and net.spare_weight.grad is None
    expect(is_spare, "a parameter that the loss does not depend on is changed. Leave it alone")


def keeps_dropout(name: str, kind: str = "module") -> None:
    """Dropout is the same in all passes over the same rows, and new in the next step."""
    net, shards = Noisy(kind), SHARDS if OPTIMIZERS.load(name).in_shards else 1
    method, optimizer = make(name, net)
    stream = list(batches(torch.float32, (12,) * 3))
    torch.manual_seed(7)
    for x, _ in stream:
        dropout(torch.ones_like(x))
    after_one_forward_a_step = torch.get_rng_state()
    torch.manual_seed(7)
    for x, y in stream:
        step(method, optimizer, x, y)
    is_one = shards > 1 or torch.equal(torch.get_rng_state(), after_one_forward_a_step)  # shards draw one by one
    expect(is_one, "a step draws more than its clean pass does. Call the objective for each pass, and draw in draw()")
    masks: dict[tuple, list] = {}
    for x, mask in net.passes:
        masks.setdefault(tuple(x.flatten().tolist()), []).append(mask)
    is_same = all(torch.equal(mask, those[0]) for those in masks.values() for mask in those)
    expect(is_same, "passes of a step have other dropout. Call the objective for each pass")
    whole = [those[0] for those in masks.values() if len(those[0]) == 12 // shards]
    expect(len(whole) == 3 * shards, f"{len(whole)} passes of 3 steps are over all rows, not {3 * shards}")
    is_new = all(not torch.equal(a, b) for i, a in enumerate(whole) for b in whole[:i])
    expect(is_new, "dropout is the same in two steps")


def goes_on_from_a_saved_state(name: str) -> None:
    """Saved after three steps and loaded into a fresh optimizer, it goes on bit for bit."""
    flags, stream = momentum_of(name), list(batches(torch.float32))
    method, optimizer = make(name, conv_bn_linear(dtype=torch.float32), **flags)
    for x, y in stream[:3]:
        step(method, optimizer, x, y)
    state = methods.saved({"method": method.state_dict(), "optimizer": optimizer.state_dict()})
    noise = torch.get_rng_state()
    for x, y in stream[3:]:
        step(method, optimizer, x, y)
    other = conv_bn_linear(dtype=torch.float32)
    nn.init.zeros_(other[4].weight)
    method2, optimizer2 = make(name, other, **flags)
    method2.load_state_dict(state["method"])
    optimizer2.load_state_dict(state["optimizer"])
    torch.set_rng_state(noise)
    for x, y in stream[3:]:
        step(method2, optimizer2, x, y)
    for what, a, b in (("weights", method, method2), ("the optimizer's state", optimizer, optimizer2)):
        found = difference(a.state_dict(), b.state_dict(), what)
        expect(not found, f"after loading it goes on otherwise: {found}. Keep state in self.state and self.clock")


def takes_no_step_that_is_not_finite(name: str) -> None:
    """Neither weights nor state change in a step whose loss is not a number, and the next one is taken."""
    method, optimizer = make(name, conv_bn_linear(), **momentum_of(name))
    *stream, (x, y), after = batches(sizes=(12,) * 5)
    for pair in stream:
        step(method, optimizer, *pair)
    before = _settled(method, optimizer)
    step(method, optimizer, x * float("nan"), y)
    found = difference(before, _settled(method, optimizer), "state")
    expect(not found, f"a step that is not finite has changed it: {found}. Write to self.pending, count in tick()")
    step(method, optimizer, *after)
    found = difference(before["method"], copies(method), "weights")
    expect(found, "after a step that is not finite none is taken any more")


def _settled(method: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Weights, BatchNorm and the optimizer's state, but for its generator and its count of steps not taken."""
    state = {key: part for key, part in optimizer.state_dict().items() if key not in ("skips", "rng")}
    return {"method": copies(method), "optimizer": state}


CONTRACTS = {
    **{f"trains two tasks of {name}": partial(methods.trains_two_tasks, name) for name in METHODS},
    **{
        f"an exception in a {room} pass leaves weights and BatchNorm as they were": partial(
            weights_come_back, room=room
        )
        for room in ("forward", "backward")
    },
    "parameters without a gradient are left alone": leaves_idle_parameters_alone,
    "dropout is the same in all passes of a step": keeps_dropout,
    "a step that is not finite is not taken": takes_no_step_that_is_not_finite,
    "a saved state is all that the next step depends on": goes_on_from_a_saved_state,
    "same seed, same run, also where it was stopped and resumed": (
        lambda name: methods.goes_on_where_it_was_stopped("derpp", optimizer=name)
    ),
    "steps that are recorded and replayed are the same": (
        lambda name: methods.replays_recorded_steps("derpp", optimizer=name)
    ),
}
