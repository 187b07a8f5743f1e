"""What every method must keep, whatever it learns by. Each contract makes small runs of its own, of about a second.

A method for which a rule has no sense says so in its class; see the attributes of `Method`.
"""

import copy
import io
import random
import signal
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from flatcl.models import Block, Method, ReplayMethod
from flatcl.utils.contracts._runs import (
    Broken,
    Skipped,
    begin,
    difference,
    expect,
    flags_for,
    global_generators,
    last_step,
    next_batch,
    quick,
    set_global_generators,
    setting_of,
    start,
)
from flatcl.utils.contracts._tape import Tape
from flatcl.utils.engine.program import Programs
from flatcl.utils.engine.trainer import SignalWatch, Trainer
from flatcl.utils.errors import Interrupted
from flatcl.utils.optim._driver import frozen_statistics
from flatcl.utils.registry import METHODS

OPTIMIZERS = ("sgd", "sam", "esam", "c_flat")  # one pass, two, two over a part of the rows, three


def subject(name: str) -> str:
    METHODS.load(name)
    return name


def trains_two_tasks(name: str, optimizer: str, **flags: Any) -> None:
    """The run ends, with accuracies of the right shape, finite weights, and a classifier that has moved."""
    trainer = begin(name, optimizer=optimizer, seed=3, **quick(name), **flags)
    before = copy.deepcopy(trainer.method.state_dict())
    summary = trainer.run()
    _check_summary(trainer, summary)
    _check_method(trainer.method, before)


def _check_summary(trainer: Trainer, summary: dict[str, Any]) -> None:
    tasks, method, cost = 1 if trainer.joint else 2, trainer.method, summary["cost"]
    found, wanted = (
        [summary[key] for key in ("status", "model", "optimizer")],
        ["finished", method.name, trainer.config.optimizer],
    )
    expect(found == wanted, f"the summary says {found}, it must say {wanted}")
    for setting in trainer.evaluate.settings:
        shape = np.shape(summary["accuracy"][setting])
        expect(shape == (tasks, 5), f"accuracies of {setting} are {shape}, they must be {(tasks, 5)}")
        average = summary["metrics"][setting]["final_average_accuracy"]
        expect(0 <= average <= 1, f"the final average accuracy of {setting} must be in 0..1, got {average}")
    epochs = sum(method.num_epochs(trainer.benchmark[task], 1) for task in range(tasks))
    expect(cost["batches"] == 5 * epochs, f"{cost['batches']} batches have passed, not 5 in each of {epochs} epochs")
    rows, least = min(cost["forward_rows"], cost["backward_rows"]), 80 * (1 if method.learns_at_the_end else tasks)
    expect(rows >= least, f"{rows} rows have passed forward and backward, at least {least} must. Train on each batch")


def _check_method(method: Method, before: dict[str, Any]) -> None:
    """After a run; `before` it the state was this."""
    for key, value in method.state_dict().items():
        is_bad = isinstance(value, torch.Tensor) and not value.isfinite().all()
        expect(not is_bad, f"{key} is not finite after two tasks. Look for a division by 0 or a logarithm of it")
    matrices = {key: p for key, p in method.named_parameters() if p.ndim == 2 and key in before}
    has_moved = any(not torch.equal(before[key], p) for key, p in matrices.items())  # the classifier, whoever has it
    expect(has_moved, "no weight matrix has changed: nothing is learned. Compute the loss from self.net(block.x)")
    kept = [key for key, p in method.named_parameters() if p.grad is not None]
    expect(not kept, f"{', '.join(kept[:3])} has a .grad: the engine owns backward(). Return a Loss instead")
    expect(method.training, "the method is left in eval mode. Put it back: self.train()")
    track = all(m.track_running_stats for m in method.modules() if isinstance(m, nn.BatchNorm2d))
    expect(track, "BatchNorm no longer tracks its averages. Use `with frozen_statistics(self.net)`")


def beats_guessing(name: str) -> None:
    """After eight epochs over the first two classes it knows them apart."""
    method = METHODS.load(name)
    first_task_only = {} if method.trains_jointly else {"stop_after": 1}
    epochs = {"fitting_epochs": 8} if method.learns_at_the_end else {"n_epochs": 8}
    trainer = begin(name, **epochs, model_config="default", **first_task_only)
    accuracy = trainer.run()["accuracy"]
    if "task-il" not in accuracy:
        (setting,) = accuracy
        found, least, choices = accuracy[setting][0][0], 0.3, "ten"
    else:
        found, least, choices = accuracy["task-il"][0][0], 0.8, "two"
    expect(found > least, f"after 8 epochs {found:.0%} of {choices} classes' test images are right, not {least:.0%}")


def loss_is_pure(name: str) -> None:
    """Called twice on the same blocks at the same weights, it gives the same and changes nothing."""
    trainer = begin(name, **quick(name))
    trainer.run()
    method = trainer.method
    blocks, _ = last_step(method, next_batch(trainer))
    columns = copy.deepcopy([(block.x, block.columns) for block in blocks])
    with frozen_statistics(method):
        before = everything(method)
        first = method.loss(*blocks)
        gradient = torch.autograd.grad(first.total, trainer.optimizer.params, allow_unused=True)
        torch.manual_seed(99), random.random(), np.random.rand()  # a loss that draws would now differ
        second = method.loss(*blocks)
        set_global_generators(before["generators"])
        changed = difference(before, everything(method), "state")
        expect(not changed, f"loss() has a side effect: {changed}. Write what is kept in remember(), draws in draw()")
        third = method.loss(*blocks)
        changed = difference(before, everything(method), "state")
        expect(not changed, f"loss() draws, or has a side effect: {changed}. Draw in draw(), as columns of a block")
    has_gradient = any(part is not None and part.abs().sum() > 0 for part in gradient)
    expect(has_gradient, "the loss has a gradient of zero everywhere")
    for other in (second, third):
        for what in ("terms", "logits"):
            found = difference(getattr(first.detach(), what), getattr(other.detach(), what), what)
            expect(not found, f"loss() gives another result when called again: {found}. Draw in draw(), not in loss()")
    changed = difference(columns, [(block.x, block.columns) for block in blocks], "blocks")
    expect(not changed, f"loss() changes its blocks in place: {changed}. Make new tensors")


def everything(method: Method) -> dict[str, Any]:
    """All that a pure function must leave alone."""
    return copy.deepcopy(
        {
            "method": method.state_dict(),
            "rng": method.context.rng.bit_generator.state,
            "generators": global_generators(),
            "numbers": {key: value for key, value in vars(method).items() if isinstance(value, int | float)},
            "grads": [p.grad for p in method.parameters()],
            "training": [module.training for module in method.modules()],
        }
    )


def terms_sum_to_the_total(name: str) -> None:
    """Each term is the mean of its block's rows, and logits are the stream's."""
    trainer = begin(name, **flags_for(name, minibatch_size=7), **quick(name))
    trainer.run()
    batch = next_batch(trainer)
    blocks, _ = last_step(trainer.method, batch)
    loss = trainer.method.loss(*blocks)
    expect(loss.terms, "the loss has no terms")
    for term, rows in loss.costs.items():
        about = loss.rows[term][0] if len(blocks) > 1 else blocks[0]
        expect(any(about is block for block in blocks), f"the term '{term}' is about a block that loss() was not given")
        expect(rows.shape == (len(about),), f"the term '{term}' has costs {tuple(rows.shape)} of {len(about)} rows")
        expect(torch.equal(loss.terms[term], rows.mean()), f"the term '{term}' is not the mean of its rows")
    total = sum(term.item() for term in loss.terms.values())
    is_sum = abs(loss.total.item() - total) <= 1e-5 * abs(total)
    expect(is_sum, f"the total is {loss.total.item():g}, and the sum of its terms {total:g}")
    if loss.logits is not None:
        wanted = (len(batch.y), trainer.benchmark.num_classes)
        expect(loss.logits.shape == wanted, f"logits must be {wanted}, got {tuple(loss.logits.shape)}")
    unknown = {term for terms in trainer.method.guides.values() for term in terms} - loss.terms.keys()
    expect(not unknown, f"guides names terms that the loss does not have: {', '.join(sorted(unknown))}")


def draw_has_no_side_effect(name: str) -> None:
    """Weights, statistics and remembered rows are the same after a draw; only what decides the next draws goes on."""
    trainer = begin(name, **quick(name))
    trainer.run()
    batch = next_batch(trainer)
    before = _kept(trainer.method)
    trainer.method.draw(batch)
    changed = difference(before, _kept(trainer.method), "state")
    expect(not changed, f"draw() has a side effect: {changed}. Write what is kept in remember()")


def _kept(method: Method) -> dict[str, Any]:
    kept = {"net": method.net.state_dict(), "ids": method.remembered_ids()}
    return copy.deepcopy(kept | ({"memory": method.buffer.all()} if isinstance(method, ReplayMethod) else {}))


def remembers_once(name: str) -> None:
    """remember() is called once a batch, however many passes a step has, with a loss that is detached."""
    trainer = begin(name, optimizer="c_flat", **quick(name))
    own, given = trainer.method.remember, []

    def remember(batch: Any, loss: Any) -> None:
        given.append(loss)
        own(batch, loss)

    trainer.method.remember = remember
    trainer.run()
    expect(
        len(given) == trainer.cost.batches,
        f"remember() was called {len(given)} times in {trainer.cost.batches} batches",
    )
    live = [loss for loss in given if loss is not None and loss.logits is not None and loss.logits.requires_grad]
    expect(not live, "remember() was given logits with a gradient: each batch would keep its graph. Detach them")


def replayed(name: str) -> tuple[Any, list[Block]]:
    """(a batch of the second task, the blocks of its step with rows of the memory, but for images that are made)."""
    trainer = begin(name, debug_mode=1, stop_after=1, **flags_for(name, minibatch_size=7))
    trainer.run()
    batch = next_batch(trainer)
    blocks = [block for step in trainer.method.steps(batch) for block in step]
    return batch, _stored(blocks)


def _stored(blocks: Iterable[Block]) -> list[Block]:
    """The blocks with rows of the memory, without images that are made, which have no ids."""
    blocks = [block for block in blocks if block.memory]
    return [block for block in blocks if "ids" in block.columns] or blocks


def marks_memory(name: str) -> None:
    """Rows of the past are the last ones of their block, and `memory` says how many they are."""
    method = METHODS.load(name)
    if not method.has_memory or method.trains_jointly or setting_of(name):
        raise Skipped("no rows of a memory are in its loss")
    if method.learns_at_the_end or method.loss_needs_task:
        raise Skipped("its memory is not replayed in each step")
    batch, blocks = replayed(name)
    remedy = "Write: Block(x, memory=number of rows, ...), these rows last"
    expect(blocks, f"no block of a step in the second task has rows of the memory. {remedy}")
    for block in blocks:
        if "y" not in block.columns:
            continue
        new, old = set(block.y[: -block.memory].tolist()), set(block.y[-block.memory :].tolist())
        expect(
            new <= set(batch.y.tolist()), f"rows before the last memory={block.memory} have old classes {new}. {remedy}"
        )
        expect(old <= {0, 1}, f"the last memory={block.memory} rows have new classes {old - {0, 1}}. {remedy}")


def stores_images_as_they_are(name: str) -> None:
    """The reservoir has images of all that has passed, uint8; draws are augmented anew."""
    method = METHODS.load(name)
    if not issubclass(method, ReplayMethod) or method.own_memory:
        raise Skipped("its memory is not a reservoir of the engine's")
    trainer = begin(name, buffer_size=30, debug_mode=1, stop_after=2)
    trainer.run()
    buffer, split = trainer.method.buffer, trainer.benchmark.joint_split()
    stored, num_rows = buffer.all(), 2 * 5 * trainer.config.batch_size
    remedy = "Write: self.buffer.add(x=batch.x, y=batch.y, ids=batch.ids), or own_memory = True where another is meant"
    expect({"x", "y"} <= stored.keys(), f"the memory has no columns x and y, it has {', '.join(stored)}. {remedy}")
    is_image = stored["x"].dtype == torch.uint8 and stored["x"].shape == (30, *trainer.benchmark.shape)
    expect(is_image, f"the memory's images are {stored['x'].dtype} {tuple(stored['x'].shape)}. {remedy}")
    expect(buffer.num_seen == num_rows, f"the memory has seen {buffer.num_seen} of {num_rows} images. {remedy}")
    known, kept = (_pairs(x, y) for x, y in ((split.images, split.labels), (stored["x"], stored["y"])))
    expect(kept <= known and len(kept) > 20, f"{len(kept - known)} of 30 stored images are not the stream's. {remedy}")
    trainer.method.args = replace(trainer.method.args, minibatch_size=30)
    batch = next_batch(trainer)
    draws = [_stored(trainer.method.draw(batch))[-1].x[-30:] for _ in range(2)]
    pixels = stored["x"] / 255 if method.replays_as_stored else trainer.augment.plain(stored["x"])
    plain = {image.numpy().tobytes() for image in pixels}
    unchanged = [sum(x.numpy().tobytes() in plain for x in rows) for rows in draws]
    if method.replays_as_stored:
        expect(min(unchanged) == 30, f"{30 - min(unchanged)} of 30 replayed images are not as stored")
        return
    remedy = "Use self.replay(), or self.context.augment(rows['x']) in draw()"
    expect(max(unchanged) < 15, f"{max(unchanged)} of 30 replayed images are not augmented. {remedy}")  # 1 in 18 crops
    different = {x.numpy().tobytes() for rows in draws for x in rows}
    expect(len(different) > 35, f"two draws of 30 images have {len(different)} different ones. {remedy}")


def _pairs(images: torch.Tensor, labels: torch.Tensor) -> set[tuple[bytes, int]]:
    return {(image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}


def goes_on_from_a_saved_state(name: str) -> None:
    """A fresh method that loads the state_dict predicts, draws and learns as the one that saved it."""
    trainer = begin(name, seed=1, **quick(name))
    trainer.run()
    batch = next_batch(trainer)
    fresh = begin(name, seed=2, **quick(name))
    method, other = trainer.method, fresh.method
    method.eval(), other.eval()
    expect(not torch.equal(method(batch.inputs), other(batch.inputs)), "another seed has given the same predictions")
    other.load_state_dict(saved(method.state_dict()))
    expect(torch.equal(method(batch.inputs), other(batch.inputs)), "with the same state it predicts otherwise")
    _expect_equal(method.state_dict(), other.state_dict(), "the state after loading")
    drawn = []
    for one in (method.train(), other.train()):
        torch.manual_seed(5)
        drawn.append([(b.x, b.memory, b.columns) for _ in range(3) for b in one.draw(batch)])
    _expect_equal(*drawn, "what is drawn after loading")
    for one, optimizer in ((method, trainer.optimizer), (other, fresh.optimizer)):
        optimizer.follow()
        optimizer.set_lr(0.05)
        torch.manual_seed(6)
        for _ in range(3):
            one.observe(batch, optimizer)
    _expect_equal(method.state_dict(), other.state_dict(), "the state three steps after loading")


def _expect_equal(a: Any, b: Any, what: str) -> None:
    found = difference(a, b, what)
    remedy = "Keep all that the next step depends on in buffers, or in get_extra_state() and set_extra_state()"
    expect(not found, f"{found}. {remedy}")


def saved(state: Any) -> Any:
    """Written by torch and read again, as a checkpoint is: without unpickling anything but tensors and plain values."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:  # torch has many
        raise Broken(
            f"its state cannot be read again ({str(error).splitlines()[0]}). Keep tensors, numbers, texts, lists and "
            "dicts alone in it"
        ) from None


def goes_on_where_it_was_stopped(name: str, **flags: Any) -> None:
    """Twice with the same seed, once stopped inside the last task and resumed: one run, bit for bit."""
    whole = begin(name, **quick(name), **flags)
    summary = whole.run()
    again = begin(name, **quick(name), **flags)
    accuracy = again.run()["accuracy"]
    found = difference(whole.method.state_dict(), again.method.state_dict(), "the state")
    expect(not found, f"two runs of one seed differ: {found}. Draw from torch's generator or self.context.rng alone")
    expect(accuracy == summary["accuracy"], "two runs of one seed have other accuracies: forward() draws, or remembers")
    stopped = begin(name, **quick(name), **flags)
    resumed = begin(name, **quick(name), **flags)
    resumed.load_checkpoint(saved(_run_until(stopped, whole.cost.batches - 2)))
    accuracy = resumed.run()["accuracy"]
    _expect_equal(whole.method.state_dict(), resumed.method.state_dict(), "the resumed run's state")
    _expect_equal(whole.optimizer.state_dict(), resumed.optimizer.state_dict(), "the resumed run's optimizer")
    expect(accuracy == summary["accuracy"], "a run that was resumed has other accuracies")


def _run_until(trainer: Trainer, last: int) -> dict[str, Any]:
    """Stops a run after so many batches, as a signal does. What its checkpoint would hold."""
    own = trainer.stream.epoch

    def epoch(split: Any) -> Iterator[Any]:
        for batch in own(split):
            if trainer.cost.batches == last - 1:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    trainer.stream.epoch = epoch
    try:
        with SignalWatch(trainer):
            trainer.run()
    except Interrupted:
        return trainer.state_dict()
    raise Broken("the run did not stop when a signal asked for it")


def learns_nothing_from_test_images(name: str) -> None:
    """With other test images it ends with the same weights and the same memory."""
    trainer = begin(name, **quick(name))
    trainer.run()
    other = begin(name, **quick(name))
    own = other.benchmark.test_split
    other.benchmark.test_split = lambda index: replace(own(index), images=255 - own(index).images)
    other.run()
    found = difference(trainer.method.state_dict(), other.method.state_dict(), "the state")
    expect(not found, f"with other test images {found}: it learns from them. Use task.train alone")


def takes_unequal_tasks(name: str) -> None:
    """Tasks of 2, 5 and 3 classes."""
    if setting_of(name):
        raise Skipped("it learns no classes in tasks")
    trainer = start(name, dataset="unequal-synth", debug_mode=1)
    matrix = trainer.run()["accuracy"]["task-il"]
    wanted = (1 if trainer.joint else 3, 3)
    expect(np.shape(matrix) == wanted, f"accuracies are {np.shape(matrix)}, they must be {wanted}")


def replays_recorded_steps(name: str, **flags: Any) -> str | None:
    """Steps that are recorded once and replayed, as CUDA graphs are, give the same run bit for bit."""
    flags = flags if METHODS.load(name).trains_jointly else {"stop_after": 2, **flags}
    ordinary = begin(name, **flags)
    summary = ordinary.run()
    recorded = begin(name, **flags)
    programs = recorded.optimizer.programs = Programs(recorded.method, recorded.optimizer, Tape())
    same = recorded.run()["accuracy"] == summary["accuracy"]
    found = difference(ordinary.method.state_dict(), recorded.method.state_dict(), "the state")
    remedy = "Say in phase() what the host decides anew from step to step"
    expect(same and not found, f"recorded steps are not the ordinary ones: {found or 'accuracies differ'}. {remedy}")
    if programs.replayed:
        return None
    return f"not recorded: {next(iter(programs.ordinary), 'too few steps of one form')}"


CONTRACTS = {
    **{f"trains two tasks under {name}": partial(trains_two_tasks, optimizer=name) for name in OPTIMIZERS},
    "beats guessing on the task at hand": beats_guessing,
    "loss is pure": loss_is_pure,
    "loss terms are means of their rows and sum to the total": terms_sum_to_the_total,
    "draw has no side effect": draw_has_no_side_effect,
    "remember happens once a batch": remembers_once,
    "blocks mark rows of the memory": marks_memory,
    "the memory has images as they are, replayed ones are augmented": stores_images_as_they_are,
    "a saved state is all that the next step depends on": goes_on_from_a_saved_state,
    "same seed, same run, also where it was stopped and resumed": goes_on_where_it_was_stopped,
    "test images are not learned from": learns_nothing_from_test_images,
    "tasks of unequal size": takes_unequal_tasks,
    "steps that are recorded and replayed are the same": replays_recorded_steps,
}
