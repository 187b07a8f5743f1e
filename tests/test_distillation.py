"""Methods that learn from the network as it was: their losses, exemplars, predictions and inner trainings, by hand."""

import copy

import numpy as np
import pytest
import torch

from flatcl.models._herding import herd
from flatcl.utils.arguments import resolve
from flatcl.utils.errors import UsageError

WITH_EXEMPLARS = ("icarl", "bic", "lucir")


def after_one_task(start, name, **flags):
    trainer = start(name, stop_after=1, seed=4, **flags)
    trainer.run()
    return trainer


def enter(trainer, index=1):
    """Begins a task as the engine does."""
    task = trainer.benchmark[index]
    trainer.method.train()
    trainer.method.begin_task(task)
    trainer.optimizer.begin_task(task)
    return task


def learn(trainer, index):
    """A whole further task, an epoch."""
    task = enter(trainer, index)
    for batch in trainer.stream.epoch(trainer.method.train_split(task, 0)):
        trainer.method.observe(batch, trainer.optimizer)
    trainer.method.end_task(task)
    trainer.optimizer.follow()


def mixed_batch(trainer, task):
    """A batch with classes of both tasks, where the method has exemplars."""
    batches = trainer.stream.epoch(trainer.method.train_split(task, 0))
    has_old = hasattr(trainer.method, "buffer")
    return next(b for b in batches if not has_old or (b.y < task.classes.start).sum() > 1)


def move(net):
    """Somewhere else, so that the network and its teacher differ."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))


def double(net):
    return copy.deepcopy(net).double()


def plain64(trainer, images):
    return trainer.augment.plain(images).double()


def log_softmax(z):
    return z - z.logsumexp(1, keepdim=True)


def near(a, b, tolerance=1e-5):
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)


# iCaRL and LwF.MC


@pytest.mark.parametrize("name", ("icarl", "lwf_mc"))
def test_past_classes_follow_the_sigmoids_of_the_old_network_and_new_ones_the_label(start, name):
    trainer = after_one_task(start, name, wd_reg=0.01)
    method, old = trainer.method, double(trainer.method.net).eval()
    task = enter(trainer)
    move(method.net)
    batch = mixed_batch(trainer, task)
    (block,) = method.draw(batch)
    loss = method.loss(block)
    new = double(method.net).train()
    z, z_old = new(block.x.double())[:, :4], old(block.x.double())[:, :4]
    costs = []
    for row in range(len(batch.y)):
        for label in range(4):
            target = z_old[row, label].sigmoid() if label < 2 else torch.tensor(float(batch.y[row] == label))
            p = z[row, label].sigmoid()
            costs.append(-target * p.log() - (1 - target) * (1 - p).log())
    assert near(loss.terms["classes"], sum(costs) / (4 * len(batch.y)))
    assert near(loss.terms["decay"], 0.01 * sum((p**2).sum() for p in new.parameters()))
    assert loss.rows.keys() | loss.penalties.keys() == {"classes", "decay"}
    gradient = torch.autograd.grad(loss.terms["decay"], method.net[4].bias)[0]
    assert near(gradient, 2 * 0.01 * method.net[4].bias)


@pytest.mark.parametrize("wd_reg, penalties", [(0.01, {"decay"}), (0, set())])
def test_the_first_task_of_icarl_has_one_hot_targets(start, wd_reg, penalties):
    trainer = start("icarl", wd_reg=wd_reg)
    task = enter(trainer, 0)
    batch = next(trainer.stream.epoch(trainer.method.train_split(task, 0)))
    (block,) = trainer.method.draw(batch)
    assert torch.equal(block.targets, torch.eye(2)[batch.y])
    assert trainer.method.loss(block).penalties.keys() == penalties


def test_herding_follows_its_definition():
    rng = np.random.default_rng(0)
    for n, number in ((40, 15), (9, 9), (6, 20), (1, 3)):
        features = rng.normal(2.0, 1.0, (n, 5))
        mean, chosen = features.mean(0), []
        for _ in range(min(n, number)):
            costs = [
                np.inf if row in chosen
                else np.linalg.norm(mean - (features[row] + features[chosen].sum(0)) / (len(chosen) + 1))
                for row in range(n)
            ]  # fmt: skip
            chosen.append(int(np.argmin(costs)))
        assert herd(torch.from_numpy(features).float(), number).tolist() == chosen


@pytest.mark.parametrize("name", ("icarl", "lucir"))
def test_exemplars_are_herded_and_those_of_old_classes_cut(start, name):
    trainer = after_one_task(start, name, buffer_size=43)
    method, benchmark = trainer.method, trainer.benchmark
    first = method.buffer.all()
    assert torch.bincount(first["y"], minlength=10).tolist() == [21, 21] + [0] * 8
    learn(trainer, 1)
    second = method.buffer.all()
    assert torch.bincount(second["y"], minlength=10).tolist() == [10] * 4 + [0] * 6  # 43 // 4
    for label in (0, 1):
        ids = [memory["ids"][memory["y"] == label] for memory in (first, second)]
        assert torch.equal(ids[0][:10], ids[1])
    net = double(method.net).eval()
    for label in (2, 3):  # un-normalised features of all rows of the class, in eval mode, un-augmented
        rows = (benchmark[1].train.labels == label).nonzero().squeeze(1)
        features = net.features(plain64(trainer, benchmark[1].train.images[rows])).detach()
        expected = benchmark[1].train.ids[rows[herd(features, 10)]]
        assert torch.equal(second["ids"][second["y"] == label], expected)
        unit = features / features.norm(dim=1, keepdim=True)
        assert not torch.equal(expected, benchmark[1].train.ids[rows[herd(unit, 10)]])


@pytest.mark.parametrize("name", WITH_EXEMPLARS)
def test_exemplars_are_trained_on_as_they_were(start, name):
    """Bit for bit, and once an epoch: neither scaled, nor turned, nor left out."""
    trainer = after_one_task(start, name, buffer_size=40)
    task = enter(trainer)
    split, whole = trainer.method.train_split(task, 0), trainer.benchmark.joint_split()
    assert torch.equal(split.images, whole.images[split.ids]) and torch.equal(split.labels, whole.labels[split.ids])
    held = 4 if name == "bic" else 0
    assert len(split) == 128 + 40 - 2 * held and len(split.ids.unique()) == len(split)
    assert (split.labels < 2).sum() == 40 - held
    assert trainer.method.train_split(task, 1) is split
    seen = torch.cat([batch.y for batch in trainer.stream.epoch(split)])
    assert (seen < 2).sum() == 40 - held


def test_icarl_predicts_the_nearest_mean_of_exemplars(start):
    trainer = start("icarl", stop_after=1, seed=4)
    images = trainer.benchmark[0].test.images[:12]
    x = trainer.augment.plain(images)
    trainer.method.eval()
    assert torch.equal(trainer.method(x), trainer.method.net(x))  # there are no exemplars yet
    trainer.run()
    learn(trainer, 1)
    method = trainer.method.eval()
    net, memory = double(method.net).eval(), method.buffer.all()
    features = net.features(plain64(trainer, images))
    scores = method(x)
    assert scores.shape == (12, 10)
    for label in range(4):
        mean = net.features(plain64(trainer, memory["x"][memory["y"] == label])).mean(0)
        assert near(-scores[:, label], ((features - mean) ** 2).sum(1).sqrt(), 1e-4)
    assert scores.isfinite().all() and (scores[:, 4:] < scores[:, :4].min()).all()


@pytest.mark.parametrize("name", WITH_EXEMPLARS)
def test_a_memory_without_room_for_every_class_is_refused(name):
    with pytest.raises(UsageError, match="--buffer_size must have room for one exemplar of each of the 10 classes"):
        resolve(["--model", name, "--dataset", "seq-synth", "--buffer_size", "9"])


@pytest.mark.parametrize("name", ("icarl", "lwf_mc", "bic", "lucir"))
def test_the_teacher_is_the_network_at_the_end_of_the_last_task_and_costs_a_forward(start, name, assert_same):
    trainer = after_one_task(start, name)
    method, kept = trainer.method, dict(copy.deepcopy(trainer.method.net.state_dict()))
    task = enter(trainer)
    method.rows = [0, 0]
    batch = mixed_batch(trainer, task)
    ((objective, _),) = method.observe(batch, trainer.optimizer)
    assert method.rows == [len(batch.y), 0] and objective.forward_rows == len(batch.y)
    for _ in range(3):
        method.observe(batch, trainer.optimizer)
    teacher = method.teacher.net.state_dict()
    assert_same({key: teacher[key] for key in kept}, kept)  # BatchNorm's statistics too
    assert not method.teacher.net.training and not any(p.requires_grad for p in method.teacher.parameters())
    now = method.net.state_dict()
    assert any(not torch.equal(now[key], value) for key, value in kept.items())


# LwF


def test_lwf_warms_up_the_classifier_on_the_new_classes_alone(start, assert_same):
    trainer = after_one_task(start, "lwf", augmentation=0, n_epochs=2, lr=0.1)
    method, task = trainer.method, trainer.benchmark[1]
    before, order = copy.deepcopy(method.net), copy.deepcopy(method.context.rng)
    reference = double(before).eval()
    weight, bias = (p.detach().clone().requires_grad_() for p in (reference[4].weight, reference[4].bias))
    for _ in range(2):
        for rows in torch.from_numpy(order.permutation(128)).split(16):
            features = reference.features(plain64(trainer, task.train.images[rows])).detach()
            z = (features @ weight.T + bias)[:, 2:4]
            cost = -log_softmax(z)[torch.arange(16), task.train.labels[rows] - 2].mean()
            grads = torch.autograd.grad(cost, (weight, bias))
            with torch.no_grad():
                weight -= 0.1 * grads[0]
                bias -= 0.1 * grads[1]
    enter(trainer)
    after = method.net.state_dict()
    assert near(after["4.weight"], weight) and near(after["4.bias"], bias)
    others = [slice(0, 2), slice(4, 10)]
    for rows in others:  # softmax over the new classes: the other outputs have no gradient
        assert torch.equal(after["4.weight"][rows], before[4].weight[rows])
    assert not torch.equal(after["4.weight"][2:4], before[4].weight[2:4])
    rest = {key: value for key, value in before.state_dict().items() if not key.startswith("4.")}
    assert_same(rest, {key: after[key] for key in rest})  # BatchNorm's statistics too
    assert method.net.training


def test_lwf_records_the_outputs_of_images_as_stored_after_the_warm_up(start):
    trainer = after_one_task(start, "lwf", alpha=0.7, wd_reg=0.01)
    method = trainer.method
    task = enter(trainer)
    recorded = double(method.net).eval()
    move(method.net)
    for batch in trainer.stream.epoch(task.train):
        (block,) = method.draw(batch)
        expected = recorded(batch.x.double() / 255)[:, :2]
        assert near(block.past, expected) and not near(block.past, recorded(block.x.double())[:, :2], 1e-2)
    loss = method.loss(block)
    z = double(method.net).train()(block.x.double())
    smooth = [torch.softmax(logits, 1) ** (1 / 2) for logits in (expected, z[:, :2])]
    old, new = (q / q.sum(1, keepdim=True) for q in smooth)
    assert near(loss.terms["past"], 0.7 * -(old * new.log()).sum(1).mean())
    assert near(loss.terms["current"], -log_softmax(z[:, :4])[torch.arange(16), block.y].mean())
    assert near(loss.terms["decay"], 0.01 * sum((p.double() ** 2).sum() for p in method.net.parameters()))


def test_the_first_task_of_lwf_is_plain(start):
    trainer = start("lwf", wd_reg=0)
    before = copy.deepcopy(trainer.method.state_dict())
    task = enter(trainer, 0)
    after = trainer.method.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key != "_extra_state")
    loss = trainer.method.loss(*trainer.method.draw(next(trainer.stream.epoch(task.train))))
    assert loss.terms.keys() == {"current"}


def test_a_run_that_starts_later_has_nothing_to_remember_in_its_first_task(start):
    for name in ("lwf", "lwf_mc", *WITH_EXEMPLARS):
        trainer = start(name, start_from=2, stop_after=4, debug_mode=1)
        task = enter(trainer, 2)
        (block,) = trainer.method.draw(next(trainer.stream.epoch(trainer.method.train_split(task, 0))))
        assert len(trainer.method.loss(block).rows) == 1
        assert trainer.run()["status"] == "finished"


# BiC


def test_bic_holds_out_exemplars_and_as_many_new_images(start):
    trainer = after_one_task(start, "bic", buffer_size=60, valset_split=0.2)
    exemplars = trainer.method.buffer.all()["ids"]
    task = enter(trainer)
    held = trainer.method.held
    assert torch.isin(held, exemplars).sum() == 12 and torch.isin(held, task.train.ids).sum() == 12
    split = trainer.method.train_split(task, 0)
    assert not torch.isin(split.ids, held).any() and len(split) == 60 + 128 - 24
    again = after_one_task(start, "bic", buffer_size=60, valset_split=0.2)
    enter(again)
    assert torch.equal(again.method.held, held)


@pytest.mark.parametrize("rule, weights", [("one_task", (1 / 2, 1 / 3)), ("old_classes", (1 / 2, 2 / 3))])
def test_bic_distils_from_corrected_logits(start, rule, weights):
    trainer = after_one_task(start, "bic", distill_weight=rule, temp=3.0)
    method = trainer.method
    for index, lam in zip((1, 2), weights, strict=True):
        scale, shift = method.scale.clone(), method.shift.clone()
        old = double(method.net).eval()
        if index == 2:  # the last task's logits were corrected
            assert (scale[2:4] != 1).all() and (shift[2:4] != 0).all()
            assert (scale[[0, 1, 4, 5, 6, 7, 8, 9]] == 1).all() and (shift[[0, 1, 4, 5, 6, 7, 8, 9]] == 0).all()
        task = enter(trainer, index)
        move(method.net)
        (block,) = method.draw(mixed_batch(trainer, task))
        loss, past = method.loss(block), 2 * index
        z = double(method.net).train()(block.x.double())
        p_old = torch.softmax((old(block.x.double()) * scale + shift)[:, :past] / 3, 1)
        distance = -(p_old * log_softmax(z[:, :past] / 3)).sum(1).mean()
        cost = -log_softmax(z[:, : past + 2])[torch.arange(len(block)), block.y].mean()
        assert near(loss.terms["past"], lam * 9 * distance) and near(loss.terms["current"], (1 - lam) * cost)
        method.eval()
        assert torch.equal(method(block.x), method.net(block.x))  # the old correction is the teacher's now
        learn(trainer, index)


def test_bic_fits_two_numbers_by_adam_and_corrects_the_last_task_alone(start, assert_same):
    trainer = after_one_task(start, "bic", valset_split=0.3, bic_epochs=40)
    method, task = trainer.method, enter(trainer)
    for batch in trainer.stream.epoch(method.train_split(task, 0)):
        method.observe(batch, trainer.optimizer)
    whole = trainer.benchmark.joint_split()
    rows = torch.cat([method.held[30:], method.held[:30]])  # the task's rows, then the exemplars, in their order
    split = torch.cat([task.train.ids, method.buffer.all()["ids"]])
    rows = split[torch.isin(split, rows)]
    order, kept = copy.deepcopy(method.context.rng), copy.deepcopy(method.net.state_dict())
    z = double(method.net).eval()(plain64(trainer, whole.images[rows])).detach()
    scale, shift = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, 0.0))
    adam = torch.optim.Adam([scale, shift], lr=1e-3)
    for _ in range(40):
        for part in torch.from_numpy(order.permutation(60)).split(16):
            corrected = torch.cat((z[part, :2], scale * z[part, 2:4] + shift), 1)
            cost = -log_softmax(corrected)[torch.arange(len(part)), whole.labels[rows[part]]].mean()
            adam.zero_grad()
            cost.backward()
            adam.step()
    method.end_task(task)
    assert_same(kept, method.net.state_dict())  # the network is fixed
    assert near(method.scale[2:4], scale.detach().expand(2)) and near(method.shift[2:4], shift.detach().expand(2))
    assert abs(scale - 1) > 1e-3 and len(method.held) == 0
    x = trainer.augment.plain(task.test.images)
    method.eval()
    expected = double(method.net)(x.double())
    expected[:, 2:4] = expected[:, 2:4] * scale + shift
    assert near(method(x), expected, 1e-4)
    assert torch.equal(method(x)[:, [0, 1, 4]], method.net(x)[:, [0, 1, 4]])


def test_the_correction_of_bic_lowers_the_cost_of_held_out_rows(start):
    trainer = after_one_task(start, "bic", n_epochs=2)
    method, task = trainer.method, enter(trainer)
    for _ in range(3):
        for batch in trainer.stream.epoch(method.train_split(task, 0)):
            method.observe(batch, trainer.optimizer)
    split = trainer.benchmark.joint_split()
    x, y = trainer.augment.plain(split.images[method.held]), split.labels[method.held]
    method.eval()
    before = torch.nn.functional.cross_entropy(method(x)[:, :4], y)
    method.train().end_task(task)
    assert torch.nn.functional.cross_entropy(method.eval()(x)[:, :4], y) < before


def test_new_exemplars_of_bic_are_rows_that_it_was_trained_on(start):
    """Half of the task is held out; of the exemplars held out, those of its share stay."""
    trainer = after_one_task(start, "bic", buffer_size=100, valset_split=0.64)
    old, task = trainer.method.buffer.all()["ids"], trainer.benchmark[1]
    learn(trainer, 1)
    again = after_one_task(start, "bic", buffer_size=100, valset_split=0.64)
    enter(again)
    held = again.method.held  # the same draw
    memory = trainer.method.buffer.all()["ids"]
    assert torch.isin(held, task.train.ids).sum() == 64 and len(memory) == 100
    assert torch.equal(memory[:50], old[:50]) and torch.isin(memory[:50], held).any()
    assert torch.isin(memory[50:], task.train.ids).all() and not torch.isin(memory[50:], held).any()


def test_bic_shares_its_memory_among_the_tasks(start):
    trainer = after_one_task(start, "bic", buffer_size=50)
    for index, share in ((1, 25), (2, 16)):
        learn(trainer, index)
        memory = trainer.method.buffer.all()
        assert torch.bincount(memory["y"] // 2).tolist() == [share] * (index + 1)
        assert len(memory["ids"].unique()) == len(memory["ids"])


# LUCIR


def lucir_by_hand(net, teacher, block, past, lam, margin, number):
    """(cost of the labels, of the features, of the margins) in float64, row by row."""
    net, teacher = double(net).train(), double(teacher).eval()
    f, f_old = net.features(block.x.double()), teacher.features(block.x.double())
    w = torch.cat([*net.weights])
    cosines = (f @ w.T) / (f.norm(dim=1, keepdim=True) * w.norm(dim=1))
    labels, features, margins, seen = [], [], [], past + 2
    for row, y in enumerate(block.y.tolist()):
        z = net.sigma * cosines[row]  # of all classes, those that have not come too
        labels.append(z.logsumexp(0) - z[y])
        features.append(lam * (1 - f[row] @ f_old[row] / (f[row].norm() * f_old[row].norm())))
        if y < past:
            hardest = sorted(cosines[row, past:seen].tolist())[-number:]
            margins += [max(0.0, margin - cosines[row, y].item() + cosine) for cosine in hardest]
    return sum(labels) / len(labels), sum(features) / len(features), sum(margins) / len(margins)


@pytest.mark.parametrize("number", (1, 2))
def test_lucir_minimises_its_three_terms(start, number):
    trainer = after_one_task(start, "lucir", k_mr=number, mr_margin=0.4, lamda_mr=0.7)
    method = trainer.method
    for index, lam in ((1, 5.0), (2, 5.0 * 2**0.5)):  # by the number of past tasks: not 0 in the second task
        task, teacher = enter(trainer, index), method.teacher.net
        move(method.net)
        (block,) = method.draw(mixed_batch(trainer, task))
        loss = method.loss(block)
        expected = lucir_by_hand(method.net, teacher, block, 2 * index, lam, 0.4, number)
        assert near(loss.terms["current"], expected[0]) and near(loss.terms["features"], expected[1])
        assert loss.terms["margin"].item() == pytest.approx(0.7 * expected[2], rel=1e-4)
        assert expected[1] > 0 and expected[2] > 0
        learn(trainer, index)


def test_lucir_imprints_the_weights_of_new_classes(start):
    trainer = after_one_task(start, "lucir")
    method, task = trainer.method, trainer.benchmark[1]
    net = double(method.net).eval()
    torch.manual_seed(5)
    enter(trainer)
    norm = sum(w.double().norm() for w in method.net.weights[0]) / 2
    torch.manual_seed(5)
    for row, label in enumerate((2, 3)):
        images = task.train.images[task.train.labels == label]
        weights = []
        for x in (trainer.augment(images).double(), plain64(trainer, images)):
            features = net.features(x)
            mean = (features / features.norm(dim=1, keepdim=True)).mean(0)
            weights.append(norm * mean / mean.norm())
        assert near(method.net.weights[1][row], weights[0]) and not near(*weights, 1e-3)


def test_lucir_knows_new_classes_before_its_first_step(start):
    trainer = after_one_task(start, "lucir", augmentation=0)
    method, task = trainer.method, enter(trainer)
    accuracy = (method.eval()(trainer.augment.plain(task.test.images)).argmax(1) == task.test.labels).float().mean()
    assert accuracy > 0.5  # of ten classes


@pytest.mark.parametrize("optimizer", ("sgd", "sam"))
def test_old_weights_of_lucir_are_frozen_and_coming_ones_untouched(start, optimizer):
    """Under momentum and weight decay too, which move what has no gradient."""
    trainer = after_one_task(start, "lucir", optimizer=optimizer, optim_mom=0.9, optim_wd=0.01)
    method, task = trainer.method, enter(trainer)
    before = [w.detach().clone() for w in method.net.weights]
    for batch in trainer.stream.epoch(method.train_split(task, 0)):
        method.observe(batch, trainer.optimizer)
    same = [torch.equal(a, b) for a, b in zip(before, method.net.weights, strict=True)]
    assert same == [True, False, True, True, True]
    body = copy.deepcopy(method.net.body.state_dict())
    method.end_task(task)
    assert all(torch.equal(body[key], value) for key, value in method.net.body.state_dict().items())
    fitted = [torch.equal(a, b) for a, b in zip(before, method.net.weights, strict=True)]
    assert fitted == same  # nor does the fit after the task train others
    assert [w.requires_grad for w in method.net.weights] == [False, True, False, False, False]


def test_classes_that_have_not_come_take_part_in_lucirs_softmax(start):
    trainer = after_one_task(start, "lucir")
    method, task = trainer.method, enter(trainer)
    (block,) = method.draw(mixed_batch(trainer, task))
    logits = method.net(block.x)
    expected = logits.logsumexp(1) - logits[torch.arange(len(block)), block.y]
    assert near(method.loss(block).terms["current"], expected.mean())
    with torch.no_grad():
        method.net.weights[3].copy_(10 * method.net.weights[1])  # as close as the right ones
    x = trainer.augment.plain(task.test.images)
    scores = method.eval()(x)
    assert scores.shape == (len(x), 10) and near(scores[:, 6:8], scores[:, 2:4])


@pytest.mark.parametrize("optimizer", ("sgd", "friendly_sam"))
def test_momentum_of_lucir_ends_with_its_task(start, optimizer, assert_same):
    """A task's first step is that of an optimizer which has just been made."""
    trainer = after_one_task(start, "lucir", optimizer=optimizer, optim_mom=0.9)
    assert all(buffer.any() for buffer in trainer.optimizer.base.state["momentum"])
    other = start("lucir", optimizer=optimizer, optim_mom=0.9)
    task = enter(trainer)
    batch = mixed_batch(trainer, task)
    other.method.load_state_dict(trainer.method.state_dict())
    other.optimizer.begin_task(task)
    for each in (trainer, other):
        each.method.observe(batch, each.optimizer)
    assert_same(trainer.method.state_dict(), other.method.state_dict())
    assert_same(trainer.optimizer.base.state_dict(), other.optimizer.base.state_dict())


def test_lucir_fits_its_newest_weights_on_the_exemplars(start):
    """SGD with momentum on them and sigma, by labels and margins, at batch statistics; the rate divided by 10 after 10
    steps."""
    trainer = after_one_task(start, "lucir", augmentation=0, fitting_epochs=3, lr_finetune=0.5, lamda_mr=0.7)
    method, task = trainer.method, enter(trainer)
    for batch in trainer.stream.epoch(method.train_split(task, 0)):
        method.observe(batch, trainer.optimizer)
    net, order = double(method.net).train(), copy.deepcopy(method.context.rng)
    kept = copy.deepcopy(method.net.body.state_dict())
    method.end_task(task)
    memory = method.buffer.all()
    params = [net.sigma, net.weights[1]]
    sgd, steps, costs = torch.optim.SGD(params, lr=0.5, momentum=0.9), 0, []
    for _ in range(3):
        for rows in torch.from_numpy(order.permutation(100)).split(16):
            sgd.param_groups[0]["lr"] = 0.5 if steps < 10 else 0.05
            f, w, y = net.features(plain64(trainer, memory["x"][rows])).detach(), torch.cat([*net.weights]), memory["y"]
            cosines = (f @ w.T) / (f.norm(dim=1, keepdim=True) * w.norm(dim=1))
            cost, margins = -log_softmax(net.sigma * cosines)[torch.arange(len(rows)), y[rows]].mean(), []
            for row, label in enumerate(y[rows].tolist()):
                if label < 2:  # two new classes are the two hardest
                    margins += [(0.5 - cosines[row, label] + cosines[row, new]).clamp(min=0) for new in (2, 3)]
            cost = cost + 0.7 * sum(margins) / len(margins)
            sgd.zero_grad()
            cost.backward()
            sgd.step()
            steps += 1
            costs.append(cost.item())
    assert steps == 21 and costs[-1] < costs[0]
    assert near(method.net.sigma, net.sigma, 1e-4) and near(method.net.weights[1], net.weights[1], 1e-4)
    assert all(torch.equal(kept[key], value) for key, value in method.net.body.state_dict().items())


# all


@pytest.mark.parametrize("name", ("lwf", "lwf_mc", *WITH_EXEMPLARS))
@pytest.mark.parametrize("backbone", ("mnistmlp", "reduced-resnet18", "resnet32"))
def test_every_backbone_serves(start, name, backbone):
    for flags in ({"dataset": "seq-synth"}, {"dataset": "seq-digits", "amp": "bf16"}):
        trainer = start(name, backbone=backbone, debug_mode=1, stop_after=2, **flags)
        assert trainer.run()["status"] == "finished"
        assert all(v.isfinite().all() for v in trainer.method.state_dict().values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("name", ("lwf", "lwf_mc", *WITH_EXEMPLARS))
def test_joint_training_is_one_first_task(start, name):
    trainer = start(name, joint=1, n_epochs=6)
    assert trainer.run()["accuracy"]["task-il"][0][0] > 0.7


@pytest.mark.parametrize(
    "words, decay",
    [
        (["icarl", "--buffer_size", "500"], 1e-5),
        (["icarl", "--buffer_size", "2000"], 1e-5),
        (["lwf_mc"], 5e-4),
    ],
)
def test_the_published_runs_on_cifar100_decay_in_the_optimizer(words, decay):
    """There is no penalty beside the weight decay of the base optimizer."""
    config = resolve(["--dataset", "seq-cifar100", "--model", *words])
    assert (config.optim_wd, config.wd_reg) == (decay, 0.0)
