"""The defining steps of the baselines against formulas of our own in float64, and what each of them must remember.

The oracles know the weights as a list, networks as plain functions, and gradients by autograd of plain losses. To make
steps foreseeable, augmentation is a mark (the negative of an image), and draws take the whole memory.
"""

import copy
import io
import itertools
import math
from collections import Counter, deque

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import nn

from flatcl.models._method import Batch
from flatcl.models.gem import solve_dual
from flatcl.utils.arguments import resolve
from flatcl.utils.engine import passes, seeding
from flatcl.utils.engine.buffer import Buffer
from flatcl.utils.engine.build import build
from flatcl.utils.registry import BACKBONES

LR = 0.1
NETS = ("mnistmlp", "tiny-bn")


class Negative:
    """Stands for augmentation; `seen` keeps what passed through it."""

    def __init__(self):
        self.seen = []

    def on_bytes(self, images):
        self.seen.append(images.clone())
        return 255 - images


@pytest.fixture
def begin(start):
    """`begin(model, flag=value, ...)` -> a trainer in its first task, whose augmentation makes negatives."""

    def begin(model, backbone="mnistmlp", **flags):
        small = dict(hidden=12) if backbone == "mnistmlp" else {}
        trainer = start(model, backbone=backbone, lr=LR, **small, **flags)
        mark = Negative()
        trainer.augment.transforms, trainer.augment.on_bytes, trainer.augment.on_floats = [mark], [mark], []
        trainer.mark = mark
        trainer.method.train()
        with torch.no_grad():  # biases and BatchNorm's weights that are not 0 and 1
            generator = torch.Generator().manual_seed(3)
            for p in trainer.method.net.parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator)
        for average in ("stable", "plastic"):
            if hasattr(trainer.method, average):
                getattr(trainer.method, average).load_state_dict(trainer.method.net.state_dict())
        enter(trainer, 0)
        return trainer

    return begin


def enter(trainer, task):
    trainer.method.begin_task(trainer.benchmark[task])
    trainer.optimizer.begin_task(trainer.benchmark[task])


def leave(trainer, task):
    trainer.method.end_task(trainer.benchmark[task])
    trainer.optimizer.follow()


def rows_of(trainer, task, rows, y=None):
    """A batch of these rows of a task; `y` are other labels."""
    split, rows = trainer.benchmark[task].train, torch.as_tensor(rows)
    x, labels, ids = split.images[rows], split.labels[rows], split.ids[rows]
    return Batch(x, labels if y is None else torch.as_tensor(y), ids, trainer.augment(x), trainer.augment)


def observe(trainer, batch):
    return trainer.method.observe(batch, trainer.optimizer)


# the other side


def raw(x):
    return x.double() / 255


def normal(x):
    return (raw(x) - 0.5) / 0.25


def augmented(x):
    return normal(255 - x)


def weights(net):
    return [p.detach().double().requires_grad_() for p in net.parameters()]


def features(w, x, norm=None):
    """Before the last layer. `norm`: (mean, variance) of the BatchNorm in eval mode; None: those of the batch."""
    if w[0].ndim == 2:
        hidden = torch.relu(x.flatten(1) @ w[0].T + w[1])
        return torch.relu(hidden @ w[2].T + w[3])
    x = nn.functional.conv2d(x, w[0], w[1], stride=2, padding=1)
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if norm is None else norm
    shape = (1, -1, 1, 1)
    x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    return torch.relu(x * w[2].view(shape) + w[3].view(shape)).flatten(1)


def logits(w, x, norm=None):
    return features(w, x, norm) @ w[-2].T + w[-1]


def costs(z, y):
    return z.logsumexp(1) - z[torch.arange(len(y)), y]


def ce(w, x, y, norm=None):
    return costs(logits(w, x, norm), y).mean()


def gradient(w, loss):
    return [g.detach() for g in torch.autograd.grad(loss, w)]


def descend(w, g, lr=LR):
    return [(a.detach() - lr * b).requires_grad_() for a, b in zip(w, g, strict=True)]


def flat(parts):
    return torch.cat([part.detach().double().reshape(-1) for part in parts])


def shaped(vector, w):
    return [part.view_as(p) for part, p in zip(vector.split([p.numel() for p in w]), w, strict=True)]


def near(actual, expected, tolerance=2e-5):
    """Both (P,), in units of the largest entry."""
    actual, expected = (v if isinstance(v, torch.Tensor) else flat(v) for v in (actual, expected))
    assert actual.shape == expected.shape and expected.abs().max() > 0
    error = (actual.double() - expected.double()).abs().max() / expected.abs().max()
    assert error < tolerance, error.item()


def direction(before, trainer):
    """What the weights were moved by, as an update of plain SGD."""
    return (flat(before) - flat(trainer.method.net.parameters())) / LR


# memory


def test_a_buffer_takes_appends_and_replaces_rows():
    buffer = Buffer(5, "cpu", np.random.default_rng(0))
    buffer.append(a=torch.tensor([1, 2]), b=torch.tensor([[1.0], [2.0]]))
    buffer.append(a=torch.tensor([3]), b=torch.tensor([[3.0]]))
    buffer.append(a=torch.tensor([], dtype=torch.int64), b=torch.empty(0, 1))
    assert len(buffer) == 3 and buffer.all()["a"].tolist() == [1, 2, 3]
    taken = buffer.take(np.array([2, 0, 2]))
    assert taken["a"].tolist() == [3, 1, 3] and taken["b"].tolist() == [[3.0], [1.0], [3.0]]
    with pytest.raises(AssertionError, match="3 rows of 5"):
        buffer.append(a=torch.arange(3), b=torch.zeros(3, 1))
    assert buffer.all()["a"].tolist() == [1, 2, 3]
    buffer.append(a=torch.tensor([4, 5]), b=torch.tensor([[4.0], [5.0]]))
    assert buffer.all()["a"].tolist() == [1, 2, 3, 4, 5]
    buffer.replace(c=torch.tensor([7.0, 8.0]))
    assert len(buffer) == 2 and buffer.all().keys() == {"c"} and buffer.all()["c"].tolist() == [7, 8]
    buffer.append(c=torch.tensor([9.0, 10.0, 11.0]))
    assert buffer.all()["c"].tolist() == [7, 8, 9, 10, 11]
    other = Buffer(5, "cpu", np.random.default_rng(1))
    other.load_state_dict(buffer.state_dict())
    assert other.all()["c"].tolist() == [7, 8, 9, 10, 11] and len(other) == 5


@pytest.mark.parametrize("seed", range(20))
def test_overwriting_is_one_row_after_the_other(seed):
    rng = np.random.default_rng(seed)
    capacity, n = int(rng.integers(1, 9)), int(rng.integers(1, 25))
    buffer = Buffer(capacity, "cpu", rng)
    old = {"a": torch.arange(capacity), "b": torch.arange(capacity * 6.0).view(capacity, 2, 3)}
    buffer.append(**old)
    slots, wins = torch.from_numpy(rng.integers(0, capacity, n)), torch.from_numpy(rng.random(n) < 0.6)
    new = {"a": 100 + torch.arange(n), "b": 1000 + torch.arange(n * 6.0).view(n, 2, 3)}
    expected = {name: column.clone() for name, column in old.items()}
    for i in range(n):
        if wins[i]:
            for name in expected:
                expected[name][slots[i]] = new[name][i]
    buffer.overwrite(slots, wins, **new)
    for name, column in expected.items():
        assert torch.equal(buffer.all()[name], column)


# gradients of single rows


class Twice(nn.Module):
    """The same layer at two places, and where asked for one that is not used."""

    def __init__(self, idle=False):
        super().__init__()
        self.inner, self.outer = nn.Linear(12, 12), nn.Linear(12, 4)
        if idle:
            self.idle = nn.Linear(3, 2)

    def forward(self, x):
        return self.outer(self.inner(torch.tanh(self.inner(x.flatten(1)))))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.last = (nn.Linear(12, size, bias=False) for size in (12, 12, 4))
        self.outer.weight = self.inner.weight

    def forward(self, x):
        return self.last(self.outer(torch.tanh(self.inner(x.flatten(1)))))


def frozen_first_layer():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4))
    net[1].requires_grad_(False)
    return net


KINDS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.Tanh(),
                                    nn.Linear(5, 4)),
    "frozen": frozen_first_layer,
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 4, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                                  nn.Linear(36, 4)),
    "strided": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=3, bias=False), nn.BatchNorm2d(4), nn.Tanh(),
                                     nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(45, 4)),
    "wide": lambda: nn.Sequential(nn.Conv2d(3, 4, 2, padding=(9, 5), dilation=2, stride=(2, 1)), nn.Tanh(),
                                  nn.Flatten(), nn.Linear(360, 4)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(3, 6, 2, padding=1, groups=3), nn.Flatten(), nn.Linear(54, 4)),
    "circular": lambda: nn.Sequential(nn.Conv2d(3, 4, 2, padding=1, padding_mode="circular"), nn.Flatten(),
                                      nn.Linear(36, 4)),
    "overwritten": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(inplace=True), nn.Linear(6, 4)),
    "twice": Twice,
    "twice and idle": lambda: Twice(idle=True),
    "tied": Tied,
    "pixels normalised": lambda: nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.Linear(12, 4)),
    "norm without weights": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, 4)),
}  # fmt: skip


@pytest.mark.parametrize("is_training", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_squares_and_products_of_single_gradients(kind, is_training, monkeypatch):
    torch.manual_seed(0)
    net = KINDS[kind]().double().train(is_training)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.track_running_stats = False or not is_training  # as with frozen statistics
    x, y = torch.randn(7, 3, 2, 2).double(), torch.randint(4, (7,))
    trained = [p for p in net.parameters() if p.requires_grad]
    single, single_costs = [], []
    for i in range(7):
        cost = costs(net(x[i : i + 1]), y[i : i + 1])[0]
        found = torch.autograd.grad(cost, trained, allow_unused=True)
        single.append([torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)])
        single_costs.append(cost.detach())
    rows = torch.stack([flat(g) for g in single])
    scale = (-torch.stack(single_costs)).exp()
    for floats in (2**26, 100):
        monkeypatch.setattr(passes, "GRADIENT_FLOATS", floats)
        sums = passes.square_sums(net, x, y, lambda c: (-c).exp())
        assert [s.shape for s in sums] == [p.shape for p in trained]
        near(sums, (scale[:, None] * rows.square()).sum(0), 1e-9)
        near(passes.gram(net, x, y), rows @ rows.T, 1e-9)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", BACKBONES.names())
def test_gradients_of_single_rows_of_our_backbones_follow_from_their_layers(name, monkeypatch):
    """No layer is of a kind that needs one pass a row."""
    monkeypatch.setattr(passes, "row_gradients", None)
    argv = ["--model", "sgd", "--dataset", "seq-synth", "--backbone", name, "--disable_log"]
    net = build(resolve(argv), torch.device("cpu"), None).method.net.eval()
    x, y = torch.randn(3, 3, 8, 8), torch.randint(4, (3,))
    assert passes.gram(net, x, y).shape == (3, 3)
    assert len(passes.square_sums(net, x, y, torch.ones_like)) == len(list(net.parameters()))


# EWC


@pytest.mark.parametrize("backbone", NETS)
@pytest.mark.parametrize("weight", ("probability", "none"))
def test_ewc_sums_the_squared_gradients_of_single_images_over_full_batches(begin, backbone, weight):
    """128 images in batches of 48: N counts three full batches, 144 rows."""
    trainer = begin("ewc_on", backbone, batch_size=48, gamma=0.6, e_lambda=2.0, fisher_weight=weight)
    method, expected = trainer.method, 0
    for task in (0, 1):
        enter(trainer, task)
        observe(trainer, rows_of(trainer, task, range(0, 128, 5)))
        statistics = [(b.running_mean.double(), b.running_var.double()) for b in bn_layers(method.net)]
        trainer.mark.seen.clear()
        w, rows = weights(method.net), method.rows
        leave(trainer, task)
        again = 128 if bn_layers(method.net) else 0  # for the running averages
        assert method.rows == [rows[0] + 128 + again, rows[1] + 128]
        split = trainer.benchmark[task].train
        fisher = 0
        for i in range(128):
            cost = ce(w, augmented(split.images[i : i + 1]), split.labels[i : i + 1])
            share = math.exp(-cost.item()) if weight == "probability" else 1
            fisher = fisher + share * flat(gradient(w, cost)).square() / 144
        expected = 0.6 * expected + fisher
        near(method.fisher, expected)
        assert torch.equal(method.anchor, torch.cat([p.detach().reshape(-1) for p in method.net.parameters()]))
        assert torch.equal(flat(w), flat(method.net.parameters()))
        order = torch.cat(trainer.mark.seen)
        assert len(order) == 128 and Counter(map(bytes, order.numpy())) == Counter(map(bytes, split.images.numpy()))
        for (mean, var), layer in zip(statistics, bn_layers(method.net), strict=True):
            for image in order:  # one by one, in train mode: the running averages move along
                z = nn.functional.conv2d(augmented(image[None]), w[0], w[1], stride=2, padding=1)
                mean, var = 0.9 * mean + 0.1 * z.mean((0, 2, 3)), 0.9 * var + 0.1 * z.var((0, 2, 3))
            near(layer.running_mean, mean.detach(), 1e-4)
            near(layer.running_var, var.detach(), 1e-4)


def bn_layers(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def test_ewc_pulls_with_twice_the_fisher_and_not_before_there_is_one(begin):
    trainer = begin("ewc_on", e_lambda=40.0)
    method = trainer.method
    for task in (0, 1):
        enter(trainer, task)
        for step in range(3):
            batch, before = rows_of(trainer, task, range(step, 128, 6)), weights(method.net)
            pull = 2 * 40.0 * method.fisher.double() * (flat(before) - method.anchor.double())
            ((objective, _),) = observe(trainer, batch)
            own = flat(gradient(before, ce(before, augmented(batch.x), batch.y)))
            near(direction(before, trainer), own + pull)
            penalty = objective.loss.terms["ewc"].item()
            assert (penalty > 0) == (task > 0 and step > 0)
            if penalty:
                expected = 40 * (method.fisher.double() * (flat(before) - method.anchor.double()).square()).sum()
                assert penalty == pytest.approx(expected.item(), rel=1e-4)
                assert pull.abs().max() > 0.01 * own.abs().max()
        leave(trainer, task)


# SI


@pytest.mark.parametrize("variant", ("total", "task"))
def test_si_integrates_along_the_path(begin, variant):
    trainer = begin("si", c=0.7, xi=0.05, si_gradient=variant)
    method = trainer.method
    with torch.no_grad():
        for p in method.net.parameters():
            p *= 3  # gradients beyond the clip
    w = weights(method.net)
    importance, clipped, pulled = torch.zeros_like(flat(w)), 0, 0
    for task in (0, 1, 2):
        enter(trainer, task)
        anchor, path = flat(w), torch.zeros_like(flat(w))
        for step in range(3):
            batch = rows_of(trainer, task, range(step, 128, 9))
            w = weights(method.net)
            own = flat(gradient(w, ce(w, augmented(batch.x), batch.y)))
            total = own + 2 * 0.7 * importance * (flat(w) - anchor)
            clipped, pulled = clipped + (total.abs() > 1).sum(), pulled + (total - own).abs().max()
            ((_, update),) = observe(trainer, batch)
            near(update, total.clamp(-1, 1))
            near(direction(w, trainer), total.clamp(-1, 1))
            w = weights(method.net)
            moved = LR * total.clamp(-1, 1)
            path += moved * (total.clamp(-1, 1) if variant == "total" else own)
            near(method.path, path, 1e-4)
        importance = importance + path / ((flat(w) - anchor).square() + 0.05)
        leave(trainer, task)
        near(method.importance, importance, 1e-4)
    assert clipped > 20 and pulled > 0.1


def test_si_forgets_the_path_and_moves_its_anchor_with_a_new_task(begin):
    trainer = begin("si")
    observe(trainer, rows_of(trainer, 0, range(20)))
    leave(trainer, 0)
    enter(trainer, 1)
    assert trainer.method.path.abs().max() == 0
    assert torch.equal(trainer.method.anchor.double(), flat(trainer.method.net.parameters()))


# A-GEM, A-GEM-R, GEM


@pytest.mark.parametrize("name", ("agem", "gem"))
def test_every_task_gets_its_share_of_the_memory(begin, name):
    """A memory of 23 and five tasks: four images each, drawn anew with another seed, as they are stored."""
    shares = []
    for seed in (1, 2):
        trainer = begin(name, buffer_size=23, seed=seed)
        for task in range(5):
            enter(trainer, task)
            leave(trainer, task)
            memory = trainer.method.buffer.all()
            assert len(memory["y"]) == 4 * (task + 1)
        for task, part in enumerate(memory["ids"].split(4)):
            split = trainer.benchmark[task].train
            rows = [split.ids.tolist().index(number) for number in part.tolist()]
            assert len(set(rows)) == 4
            assert torch.equal(memory["x"][4 * task : 4 * task + 4], split.images[rows])
            assert torch.equal(memory["y"][4 * task : 4 * task + 4], split.labels[rows])
            shares.append(rows)
    assert shares[:5] != shares[5:] and any(max(rows) > 8 for rows in shares)


def in_second_task(begin, name, backbone="mnistmlp", **flags):
    trainer = begin(name, backbone, **flags)
    first = rows_of(trainer, 0, range(12))
    observe(trainer, first)
    leave(trainer, 0)
    enter(trainer, 1)
    return trainer


@pytest.mark.parametrize("backbone", NETS)
@pytest.mark.parametrize("name", ("agem", "agem_r"))
def test_agem_projects_on_the_memorys_gradient_where_they_disagree(begin, name, backbone):
    size = 60 if name == "agem" else 12
    trainer = in_second_task(begin, name, backbone, buffer_size=size, minibatch_size=50)
    method = trainer.method
    memory = copy.deepcopy(method.buffer.all())
    assert len(memory["y"]) == 12
    reference_x = augmented(memory["x"]) if name == "agem" else raw(memory["x"])
    w = weights(method.net)
    ref = flat(gradient(w, ce(w, reference_x, memory["y"])))
    of_label = [flat(gradient(w, ce(w, augmented(memory["x"]), torch.full((12,), k)))) for k in range(10)]
    products = torch.stack([g @ ref / (g.norm() * ref.norm()) for g in of_label])
    assert products.min() < -0.02 and products.max() > 0.02
    state, buffer = copy.deepcopy(method.net.state_dict()), method.get_extra_state()
    for label in (products.argmin().item(), products.argmax().item()):
        method.net.load_state_dict(state)
        method.set_extra_state(buffer)
        inputs = trainer.augment(memory["x"])
        observe(trainer, Batch(memory["x"], torch.full((12,), label), memory["ids"], inputs, trainer.augment))
        g = of_label[label]
        expected = g - (g @ ref) / (ref @ ref) * ref if g @ ref < 0 else g
        near(direction(w, trainer), expected, 1e-4)
        assert g @ ref > 0 or abs(direction(w, trainer) @ ref) < 1e-4 * g.norm() * ref.norm()


def test_agem_r_fills_its_reservoir_with_every_step_and_agem_only_between_tasks(begin):
    filled = {}
    for name in ("agem", "agem_r"):
        trainer = begin(name, buffer_size=50)
        for _ in range(3):
            observe(trainer, rows_of(trainer, 0, range(10)))
        filled[name] = (len(trainer.method.buffer), trainer.method.buffer.num_seen)
        leave(trainer, 0)
        filled[name] += (len(trainer.method.buffer),)
    assert filled == {"agem": (0, 0, 10), "agem_r": (30, 30, 30)}


@pytest.mark.parametrize("optimizer", ("sgd", "sam", "msam", "sampa", "esam", "looksam"))
@pytest.mark.parametrize("name", ("agem", "gem"))
def test_no_update_goes_against_the_past(begin, name, optimizer):
    """What goes into the base optimizer agrees with the memory's gradient at the unmoved weights, found whichever way;
    GEM's in so far as its ridge lets it."""
    trainer = begin(name, buffer_size=50, optimizer=optimizer, **({"minibatch_size": 50} if name == "agem" else {}))
    method, projected, found = trainer.method, 0, []
    combine = method.combine
    method.combine = lambda update, guides: combine(found.append(update) or update, guides)
    for task in range(3):
        enter(trainer, task)
        for step in range(4):
            batch = rows_of(trainer, task, range(step, 128, 10))
            w = weights(method.net)
            memory = method.buffer.all()
            ((_, update),) = observe(trainer, batch)
            if not memory:
                continue
            parts = [slice(None)] if name == "agem" else [slice(10 * k, 10 * k + 10) for k in range(task)]
            references = torch.stack(
                [flat(gradient(w, ce(w, augmented(memory["x"][p]), memory["y"][p]))) for p in parts]
            )
            g, update = flat(found[-1]), flat(update)
            products, slack = references @ g, 1e-4 * g.norm() * references.norm(dim=1)
            if name == "gem":  # the ridge lets through 1e-3 v, u = g + G' v
                slack += 1e-3 * torch.linalg.lstsq(references.T, (update - g)[:, None]).solution[:, 0].abs()
            assert (references @ update > -slack).all()
            projected += (products < -slack).any()
        leave(trainer, task)
    assert projected > 2


def brute_force(a, b, margin):
    """argmin of v' a v / 2 + b' v over v >= margin, by trying every set of components that lie on the bound."""
    best, best_value = None, math.inf
    for on_bound in itertools.product((True, False), repeat=len(b)):
        bound, free = np.flatnonzero(on_bound), np.flatnonzero(~np.array(on_bound))
        v = np.full(len(b), float(margin))
        if len(free):
            v[free] = np.linalg.solve(a[np.ix_(free, free)], -b[free] - a[np.ix_(free, bound)] @ v[bound])
        value = v @ a @ v / 2 + b @ v
        if (v >= margin - 1e-12).all() and value < best_value:
            best, best_value = v, value
    return best


@pytest.mark.parametrize("margin", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("seed", range(5))
def test_gems_dual_is_solved(margin, seed):
    rng = np.random.default_rng(seed)
    tasks = 1 + seed
    references, g = rng.normal(size=(tasks, 9)), rng.normal(size=9)
    gram, products = references @ references.T, references @ g
    a = gram + 1e-3 * np.eye(tasks)
    v = solve_dual(gram, products, margin)
    assert (v >= margin - 1e-12).all()
    np.testing.assert_allclose(v, brute_force(a, products, margin), atol=1e-8)
    found = optimize.minimize(
        lambda v: v @ a @ v / 2 + products @ v, np.full(tasks, margin + 1.0), jac=lambda v: a @ v + products,
        bounds=[(margin, None)] * tasks, method="L-BFGS-B", options=dict(ftol=1e-15, gtol=1e-10),
    )  # fmt: skip
    np.testing.assert_allclose(v, found.x, atol=1e-4)
    update = g + references.T @ v
    assert (references @ update >= -1e-3 * v - 1e-9).all()


def gem_by_hand(g, references, margin):
    products = references @ g
    if not (products < 0).any():
        return g, None
    a = (references @ references.T).numpy() + 1e-3 * np.eye(len(references))
    v = brute_force(a, products.numpy(), margin)
    return g + references.T @ torch.from_numpy(v), v


@pytest.mark.parametrize("backbone", NETS)
def test_gem_solves_for_all_past_tasks(begin, backbone):
    trainer = begin("gem", backbone, buffer_size=30, gamma=0.3)
    method = trainer.method
    outcomes = Counter()
    for task in range(4):
        enter(trainer, task)
        for step in range(4):
            batch = rows_of(trainer, task, range(step, 128, 11))
            memory = method.buffer.all()
            if step == 3 and task:  # nothing to protect from: the memory itself
                batch = Batch(memory["x"], memory["y"], memory["ids"], trainer.augment(memory["x"]), trainer.augment)
            w = weights(method.net)
            expected = g = flat(gradient(w, ce(w, augmented(batch.x), batch.y)))
            v = None
            if task:
                parts = [slice(6 * k, 6 * k + 6) for k in range(task)]
                references = torch.stack(
                    [flat(gradient(w, ce(w, augmented(memory["x"][p]), memory["y"][p]))) for p in parts]
                )
                expected, v = gem_by_hand(g, references, 0.3)
            outcomes["free" if v is None else "on the bound" if (v < 0.3 + 1e-9).any() else "inside"] += 1
            ((_, update),) = observe(trainer, batch)
            near(update, expected, 1e-3 if backbone == "tiny-bn" else 1e-4)
            near(direction(w, trainer), update, 1e-4)
            if v is not None:
                assert (references @ flat(update) >= -1e-3 * torch.from_numpy(v) - 1e-4 * g.norm()).all()
        leave(trainer, task)
    assert len(outcomes) == 3, outcomes


@pytest.mark.parametrize("optimizer", ("sgd", "sam", "esam", "msam", "sampa"))
@pytest.mark.parametrize("name", ("agem", "gem"))
def test_gems_memories_pass_before_the_stream_and_agems_after_it(begin, name, optimizer):
    """BatchNorm's running averages are those of passes in that order."""
    flags = dict(buffer_size=30, optimizer=optimizer, **({} if name == "gem" else {"minibatch_size": 50}))
    trainer = begin(name, "tiny-bn", **flags, **({"msam_shards": 1} if optimizer == "msam" else {}))
    for task in (0, 1):
        enter(trainer, task)
        leave(trainer, task)
    enter(trainer, 2)
    method, batch = trainer.method, rows_of(trainer, 2, range(0, 128, 11))
    net, memory = copy.deepcopy(method.net), method.buffer.all()
    parts = [slice(0, 6), slice(6, 12)] if name == "gem" else [slice(None)]
    passes = [trainer.augment(memory["x"][part]) for part in parts]
    passes.insert(len(passes) if name == "gem" else 0, batch.inputs)
    for x in passes:
        net(x)
    observe(trainer, batch)
    for ours, theirs in zip(method.net[1].buffers(), net[1].buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5)  # A-GEM draws its rows in another order


@pytest.mark.parametrize("margin", (0.0, 0.5))
@pytest.mark.parametrize("scale", (1.0, 1e3, 1e6))
def test_gem_bears_large_gradients_that_are_nearly_the_same(begin, scale, margin):
    """Their products in float32 are off by more than the ridge."""
    method = begin("gem", gamma=margin).method
    torch.manual_seed(0)
    base = [torch.randn(shape) for shape in ((40, 50), (40,), (10, 40))]
    for noise in (1e-6, 1e-3, 1e-2):
        guides = {f"task {k}": [scale * (b + noise * torch.randn_like(b)) for b in base] for k in range(8)}
        update = [scale * (torch.randn_like(b) - 0.1 * b) for b in base]
        g, references = flat(update), torch.stack([flat(guide) for guide in guides.values()])
        assert (references @ g < 0).all()
        # over s = v - margin: |g + G' (s + margin)|^2 + ridge |s + margin|^2, without products
        matrix = np.vstack((references.T.numpy(), 1e-3**0.5 * np.eye(8)))
        shift = matrix @ np.full(8, margin)
        s, _ = optimize.nnls(matrix, -np.append(g.numpy(), np.zeros(8)) - shift)
        near(method.combine(update, guides), g + references.T @ torch.from_numpy(s + margin), 1e-4)


# FDR


def function_distance(w, x, z):
    return (logits(w, x).softmax(1) - z.softmax(1)).square().sum(1).sqrt().mean()


@pytest.mark.parametrize("backbone", NETS)
def test_fdr_takes_two_steps(begin, backbone):
    trainer = in_second_task(begin, "fdr", backbone, buffer_size=10, minibatch_size=10)
    method = trainer.method
    memory = {key: column.clone() for key, column in method.buffer.all().items()}
    for step in range(3):
        batch = rows_of(trainer, 1, range(step, 128, 8))
        w = weights(method.net)
        done = observe(trainer, batch)
        assert len(done) == 2
        first = flat(gradient(w, ce(w, augmented(batch.x), batch.y)))
        between = descend(w, shaped(first, w))
        second = flat(gradient(between, function_distance(between, augmented(memory["x"]), memory["logits"].double())))
        near(done[0][1], first)
        near(done[1][1], second, 1e-3)
        near(direction(w, trainer), first + second, 1e-4)
        assert second.norm() > 0.01 * first.norm()
    assert all(torch.equal(memory[key], column) for key, column in method.buffer.all().items())


def test_fdr_stays_put_where_the_outputs_are_the_remembered_ones(begin):
    """The distance has a kink there; its gradient must be a number."""
    trainer = in_second_task(begin, "fdr", buffer_size=10)
    method = trainer.method
    (_, memory) = method.draw(rows_of(trainer, 1, range(4)))
    memory.columns["logits"] = method.net(memory.x).detach()
    grads = torch.autograd.grad(method.loss(memory).total, list(method.net.parameters()))
    assert all(g.isfinite().all() and g.abs().max() < 1e-3 for g in grads)


@pytest.mark.parametrize("backbone", NETS)
def test_fdr_shares_its_memory_among_the_tasks_so_far(begin, backbone):
    trainer = begin("fdr", backbone, buffer_size=50, batch_size=8)
    method, kept = trainer.method, {}
    for task, share in enumerate((50, 25, 16, 12)):
        enter(trainer, task)
        observe(trainer, rows_of(trainer, task, range(16)))
        trainer.mark.seen.clear()
        w = weights(method.net)
        leave(trainer, task)
        assert torch.equal(flat(w), flat(method.net.parameters()))
        memory = method.buffer.all()
        assert len(memory["y"]) == share * (task + 1) and memory["task"].tolist() == [
            t for t in range(task + 1) for _ in range(share)
        ]
        order = torch.cat(trainer.mark.seen)[:share]
        split = trainer.benchmark[task].train
        assert len(order) == share and {bytes(x) for x in order.numpy()} <= {bytes(x) for x in split.images.numpy()}
        assert not torch.equal(order, split.images[:share])  # a shuffled pass
        z = torch.cat([logits(w, augmented(x)) for x in trainer.mark.seen])[:share].detach()  # whole batches
        own = {key: column[-share:] for key, column in memory.items()}
        assert torch.equal(own["x"], order)
        near(own["logits"].reshape(-1), z.reshape(-1))
        assert len(set(own["ids"].tolist())) == share
        known = dict(zip(split.ids.tolist(), zip(split.images, split.labels.tolist(), strict=True), strict=True))
        for x, y, number in zip(own["x"], own["y"].tolist(), own["ids"].tolist(), strict=True):
            assert torch.equal(known[number][0], x) and known[number][1] == y
        kept[task] = {key: column.clone() for key, column in own.items()}
        for past in range(task + 1):
            rows = slice(past * share, (past + 1) * share)
            for key, column in memory.items():
                assert torch.equal(column[rows], kept[past][key][:share])


# GSS


def statistics(net):
    layers = bn_layers(net)
    return (layers[0].running_mean.double(), layers[0].running_var.double()) if layers else None


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("backbone", NETS)
def test_gss_scores_batches_by_their_closest_gradient(begin, backbone):
    """The first batch has 0.1; later ones 1 + the greatest cosine, of images as they are stored, in eval mode."""
    trainer = begin("gss", backbone, buffer_size=21, gss_minibatch_size=100, minibatch_size=100)
    method, expected = trainer.method, [0.1] * 6
    observe(trainer, rows_of(trainer, 0, range(6)))
    assert method.buffer.all()["score"].tolist() == pytest.approx([0.1] * 6)
    for task, rows in ((1, range(3, 11)), (0, range(40, 50))):
        memory, batch = {k: c.clone() for k, c in method.buffer.all().items()}, rows_of(trainer, task, rows)
        observe(trainer, batch)
        w, norm = weights(method.net), statistics(method.net)
        own = flat(gradient(w, ce(w, raw(batch.x), batch.y, norm)))
        others = [
            flat(gradient(w, ce(w, raw(x[None]), y[None], norm))) for x, y in zip(memory["x"], memory["y"], strict=True)
        ]
        closest = max(cosine(own, other) for other in others)
        expected += [1 + closest] * len(batch.y)
        expected = expected[:21]
        now = method.buffer.all()
        assert now["score"].tolist() == pytest.approx(expected, abs=2e-4)
        added = len(now["y"]) - len(memory["y"])
        assert torch.equal(now["x"][-added:], batch.x[:added]) and torch.equal(now["y"][-added:], batch.y[:added])
    assert len(expected) == 21 and method.training and 0.1 < expected[-1] < 2


def full_gss(begin, **flags):
    """A memory of four images of class 0 with scores by hand, in which a batch of class 1 is news."""
    trainer = begin("gss", buffer_size=4, gss_minibatch_size=4, minibatch_size=4, **flags)
    method, first = trainer.method, rows_of(trainer, 0, [0, 1, 2, 3], y=[0] * 4)
    observe(trainer, first)
    method.buffer.columns["score"][:] = torch.tensor([0.2, 1.5, 0.7, 0.05])
    return trainer, first


def test_gss_replaces_in_proportion_to_the_scores(begin):
    trainer, first = full_gss(begin)
    method = trainer.method
    news = rows_of(trainer, 0, [0, 1, 64], y=[1, 1, 1])
    w = weights(method.net)
    others = [flat(gradient(w, ce(w, raw(x[None]), y[None]))) for x, y in zip(first.x, first.y, strict=True)]
    own = [flat(gradient(w, ce(w, raw(x[None]), y[None]))) for x, y in zip(news.x, news.y, strict=True)]
    c = [1 + max(cosine(a, b) for b in others) for a in own]
    of_batch = flat(gradient(w, ce(w, raw(news.x), news.y)))
    assert max(cosine(of_batch, b) for b in others) < 0
    old = {name: column.clone() for name, column in method.buffer.columns.items()}
    scores = old["score"].double().numpy()
    trials, wins = 1500, np.zeros((3, 4))
    for _ in range(trials):
        method.remember(news, None)
        for slot, score in enumerate(method.buffer.all()["score"].tolist()):
            image = method.buffer.all()["x"][slot]
            if score == pytest.approx(scores[slot], abs=1e-6):
                assert torch.equal(image, old["x"][slot]) and method.buffer.all()["y"][slot] == 0
                continue
            (row,) = [i for i in range(3) if score == pytest.approx(c[i], abs=1e-4)]
            assert torch.equal(image, news.x[row]) and method.buffer.all()["y"][slot] == 1
            wins[row, slot] += 1
        for name, column in old.items():
            method.buffer.columns[name].copy_(column)
    chance = np.array([[s / scores.sum() * s / (s + own) for s in scores] for own in c])
    expected = np.array([chance[0] * (1 - chance[1]) * (1 - chance[2]), chance[1] * (1 - chance[2]), chance[2]])
    cells = np.append(expected.ravel(), 0)[:-1] * trials
    variance = trials * expected.ravel() * (1 - expected.ravel())
    assert (np.abs(wins.ravel() - cells) < 4.5 * np.sqrt(variance) + 1).all(), (wins, expected * trials)
    assert len({round(score, 3) for score in c}) == 3


def test_gss_keeps_its_memory_where_a_batch_is_nothing_new(begin, assert_same):
    """Repeated images: their own gradients, cosine 1; and a row that is news in a batch that is none."""
    trainer, first = full_gss(begin)
    method = trainer.method
    old = copy.deepcopy(method.buffer.all())
    mixed = rows_of(trainer, 0, [0, 1, 2, 3, 0], y=[0, 0, 0, 0, 1])
    for batch in (first, mixed):
        for _ in range(50):
            method.remember(batch, None)
        assert_same(old, method.buffer.all())


def test_gss_shows_every_row_of_the_memory_in_each_round(begin):
    trainer = begin("gss", buffer_size=12, minibatch_size=4, batch_num=3)
    method = trainer.method
    method.buffer.append(**method._rows(rows_of(trainer, 0, range(12)), torch.full((12,), 1e-9)))
    rounds = []
    batch = rows_of(trainer, 1, range(5))
    for _ in range(3):
        w = weights(method.net)
        ids = []
        for blocks in method.steps(batch):
            (block,) = blocks
            assert len(block) == 9 and block.memory == 4 and torch.equal(block.x[:5], batch.inputs)
            ids += block.ids[5:].tolist()
        assert sorted(ids) == sorted(method.buffer.all()["ids"].tolist())
        rounds.append(ids)
    assert rounds[0] != rounds[1] != rounds[2]
    trainer = begin("gss", buffer_size=8, minibatch_size=8, batch_num=3)
    method = trainer.method
    method.buffer.append(**method._rows(rows_of(trainer, 0, range(8)), torch.full((8,), 1e-9)))
    memory = copy.deepcopy(method.buffer.all())
    w = start = weights(method.net)
    for _ in range(3):
        x, y = torch.cat((batch.x, memory["x"])), torch.cat((batch.y, memory["y"]))
        w = descend(w, gradient(w, ce(w, augmented(x), y)))
    assert len(observe(trainer, batch)) == 3
    near(direction(start, trainer), (flat(start) - flat(w)) / LR, 1e-4)


# HAL


def with_anchors(begin, backbone, **flags):
    """HAL in its second task, its memory all of what it was shown."""
    trainer = begin("hal", backbone, buffer_size=12, minibatch_size=50, steps_on_anchors=3, **flags)
    observe(trainer, rows_of(trainer, 0, range(0, 120, 10)))
    leave(trainer, 0)
    enter(trainer, 1)
    return trainer


@pytest.mark.parametrize("backbone", NETS)
def test_hal_keeps_anchors_where_they_are_after_the_step(begin, backbone):
    trainer = with_anchors(begin, backbone, hal_lambda=30.0, beta=0.7)
    method, anchors = trainer.method, trainer.method.anchors.double()
    assert anchors.shape == (2, 3, 8, 8) and method.phi.abs().max() == 0
    phi = 0
    method.lr = 0.5 * LR  # as a schedule sets it
    for step in range(3):
        memory, batch = copy.deepcopy(method.buffer.all()), rows_of(trainer, 1, range(step, 128, 9))
        w = weights(method.net)
        x, y = torch.cat((batch.x, memory["x"])), torch.cat((batch.y, memory["y"]))
        own = gradient(w, ce(w, augmented(x), y))
        target = logits(descend(w, own, 0.5 * LR), anchors).detach()
        pull = gradient(w, 30.0 * (logits(w, anchors) - target).square().mean())
        observe(trainer, batch)
        near(direction(w, trainer), flat(own) + flat(pull), 1e-3)
        assert flat(pull).norm() > 0.05 * flat(own).norm()
        after = weights(method.net)
        phi = 0.7 * phi + 0.3 * features(after, augmented(batch.x)).mean(0).detach()
        near(method.phi, phi, 1e-4)
        assert method.buffer.num_seen == 12 + sum(len(range(s, 128, 9)) for s in range(step + 1))
    leave(trainer, 1)
    assert method.anchors.shape == (4, 3, 8, 8) and torch.equal(method.anchors[:2].double(), anchors)
    enter(trainer, 2)
    assert method.phi.abs().max() == 0


@pytest.mark.parametrize("backbone", NETS)
def test_hals_anchors_are_what_would_be_forgotten_most(begin, backbone):
    """One for each class of the task, from uniform noise; each is a batch of its own. Their rate is that of the flags,
    not the one that a schedule has left."""
    trainer = begin("hal", backbone, buffer_size=10, minibatch_size=4, batch_size=16, steps_on_anchors=6, gamma=0.4)
    method = trainer.method
    for task in (0, 1):
        enter(trainer, task)
        for step in range(2):
            observe(trainer, rows_of(trainer, task, range(step, 128, 9)))
        w, memory, phi = weights(method.net), copy.deepcopy(method.buffer.all()), method.phi.double()
        before = copy.deepcopy(method.net.state_dict())
        torch.manual_seed(11)
        noise = torch.rand(2, 3, 8, 8)
        torch.manual_seed(11)
        method.lr = 0.1 * LR
        leave(trainer, task)
        method.lr = LR
        ahead = descend(w, gradient(w, ce(w, augmented(memory["x"]), memory["y"])))
        for position, label in enumerate((2 * task, 2 * task + 1)):
            e, y = noise[position : position + 1].double(), torch.tensor([label])
            for _ in range(6):
                e = e.detach().requires_grad_()
                loss = -ce(ahead, e, y) + ce(w, e, y) + 0.4 * (features(w, e) - phi).square().sum()
                e = e - LR * torch.autograd.grad(loss, e)[0]
            change = method.anchors[2 * task + position].double() - noise[position].double()
            near(change.reshape(-1), (e[0].detach() - noise[position].double()).reshape(-1), 5e-3)
        after = method.net.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert type(method).Args().steps_on_anchors == 100
    assert torch.equal(method.state_dict()["_extra_state"]["anchors"], method.anchors)


@pytest.mark.parametrize("sizes", [(3, 5, 9), (1, 1, 1, 1, 1, 1), (20,), (2,), (4, 4)])
def test_hals_rings_hold_the_last_images_of_each_task(begin, sizes):
    """22 places and five tasks: four images of each, the oldest of which makes room."""
    trainer = begin("hal", buffer_size=22, minibatch_size=4, batch_size=16, steps_on_anchors=2, hal_memory="ring")
    rings = []
    for task in range(5):
        enter(trainer, task)
        rings.append(deque(maxlen=4))
        shown = 0
        for size in sizes:
            batch = rows_of(trainer, task, range(shown, shown + size))
            observe(trainer, batch)
            rings[-1].extend(batch.ids.tolist())
            shown += size
        assert sorted(trainer.method.buffer.all()["ids"].tolist()) == sorted(itertools.chain(*rings))
        memory, split = trainer.method.buffer.all(), trainer.benchmark[task].train
        place = {id: row for row, id in enumerate(split.ids.tolist())}
        for row in range(len(memory["ids"]) - len(rings[-1]), len(memory["ids"])):
            assert torch.equal(memory["x"][row], split.images[place[memory["ids"][row].item()]])
        leave(trainer, task)


def test_the_making_of_hals_anchors_keeps_nothing_of_its_steps(begin, monkeypatch):
    """A graph that reached the weights would grow with each of a hundred steps."""
    grows, real = [], torch.func.vmap

    def vmap(function, **kwargs):
        mapped = real(function, **kwargs)

        def watched(*args):
            found = mapped(*args)
            grows.append(found.requires_grad)
            return found

        return watched

    trainer = begin("hal", buffer_size=10, minibatch_size=4, steps_on_anchors=6)
    enter(trainer, 0)
    observe(trainer, rows_of(trainer, 0, range(4)))
    monkeypatch.setattr(torch.func, "vmap", vmap)
    leave(trainer, 0)
    assert grows == [False] * 6


# MER


@pytest.mark.parametrize(("beta", "gamma", "number"), [(0.3, 0.4, 3), (1.0, 0.4, 2), (0.3, 1.0, 3), (1.0, 1.0, 3)])
def test_mer_goes_a_part_of_each_step_and_of_all(begin, beta, gamma, number):
    trainer = begin("mer", buffer_size=9, minibatch_size=9, beta=beta, gamma=gamma, batch_num=number)
    method = trainer.method
    for row in range(9):
        observe(trainer, rows_of(trainer, 0, [12 * row]))
    assert method.buffer.num_seen == 9 and len(method.buffer) == 9
    for row in (0, 70):
        batch, memory = rows_of(trainer, 1, [row]), copy.deepcopy(method.buffer.all())
        x, y = augmented(torch.cat((memory["x"], batch.x))), torch.cat((memory["y"], batch.y))
        w = first = weights(method.net)
        for _ in range(number):
            there = descend(w, gradient(w, ce(w, x, y)))
            w = [
                (a.detach() + beta * (b.detach() - a.detach())).requires_grad_() for a, b in zip(w, there, strict=True)
            ]
        end = flat(first) + gamma * (flat(w) - flat(first))
        assert len(observe(trainer, batch)) == number
        near(direction(first, trainer), (flat(first) - end) / LR, 1e-4)
    assert method.buffer.num_seen == 11


def test_mer_draws_anew_for_each_of_its_steps(begin):
    trainer = begin("mer", buffer_size=60, minibatch_size=5, batch_num=4)
    observe(trainer, rows_of(trainer, 0, range(60)))
    sets = [tuple(sorted(blocks[0].ids[1:].tolist())) for blocks in trainer.method.steps(rows_of(trainer, 1, [0]))]
    assert len(sets) == len(set(sets)) == 4


# ER-ACE


def masked_ce(w, x, y, classes):
    z = logits(w, x)
    rest = [k for k in range(10) if k not in classes]
    return costs(z.index_fill(1, torch.tensor(rest, dtype=torch.int64), -math.inf), y).mean()


@pytest.mark.parametrize("backbone", NETS)
def test_er_ace_lets_the_stream_compete_with_itself_and_the_future(begin, backbone):
    trainer = begin("er_ace", backbone, buffer_size=12, minibatch_size=12)
    method = trainer.method
    zero_, one = range(0, 64, 8), range(64, 128, 8)
    plan = [  # task, rows, classes that compete; classes seen so far may be more than those of the batch
        (0, [*zero_, *one], range(10)),
        (0, zero_, range(10)),
        (0, one, range(10)),
        (1, zero_, range(2, 10)),  # class 2; the highest seen is 2
        (1, one, range(3, 10)),
        (1, zero_, (2, *range(3, 10))),  # the highest seen is 3 by now
        (3, one, range(7, 10)),
        (3, zero_, (6, *range(7, 10))),
        (4, zero_, (8, 9)),  # the highest seen is 8
        (4, one, (9,)),
        (4, zero_, (8,)),  # the last class has been seen
        (4, [*zero_, *one], (8, 9)),
    ]
    at = 0
    for task, rows, classes in plan:
        while at < task:
            leave(trainer, at)
            at += 1
            enter(trainer, at)
        batch, memory = rows_of(trainer, task, rows), copy.deepcopy(method.buffer.all())
        w = weights(method.net)
        loss = masked_ce(w, augmented(batch.x), batch.y, classes)
        if task > 0:
            loss = loss + ce(w, augmented(memory["x"]), memory["y"])
        expected = gradient(w, loss)
        ((objective, _),) = observe(trainer, batch)
        if flat(expected).abs().max() > 1e-6:
            near(direction(w, trainer), expected, 1e-3)
        assert objective.loss.total.item() == pytest.approx(loss.item(), rel=1e-4)
    assert method.buffer.num_seen == sum(len(rows) for _, rows, _ in plan)


def test_er_ace_without_tasks_begins_with_the_second_batch(begin):
    trainer = begin("er_ace", task_free=1, buffer_size=12, minibatch_size=12)
    for rows, classes in ((range(4), range(10)), (range(64, 70), range(1, 10)), ([0, 1], range(10))):
        batch, memory = rows_of(trainer, 0, rows), copy.deepcopy(trainer.method.buffer.all())
        w = weights(trainer.method.net)
        loss = masked_ce(w, augmented(batch.x), batch.y, classes)
        if memory:
            loss = loss + ce(w, augmented(memory["x"]), memory["y"])
        observe(trainer, batch)
        near(direction(w, trainer), gradient(w, loss), 1e-4)


def test_er_ace_remembers_after_loading_that_it_may_replay(begin):
    trainer = in_second_task(begin, "er_ace")
    fresh = begin("er_ace")
    fresh.method.load_state_dict(trainer.method.state_dict())
    batch = rows_of(trainer, 1, range(8))
    assert len(fresh.method.draw(batch)) == 2
    assert torch.equal(fresh.method.draw(batch)[0].competing[0], torch.arange(10) >= 2)


# CLS-ER


def softmax_of(z, y):
    return z.softmax(1)[torch.arange(len(y)), y]


@pytest.mark.parametrize("backbone", NETS)
def test_cls_er_follows_the_better_of_its_averages(begin, backbone):
    """f(x') is a forward of its own, as [x; x'] is: one BatchNorm batch each."""
    trainer = begin("cls_er", backbone, buffer_size=12, minibatch_size=12, reg_weight=1.7)
    method = trainer.method
    observe(trainer, rows_of(trainer, 0, range(0, 120, 10)))
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        for net in (method.stable, method.plastic):
            with torch.no_grad():
                for p in net.parameters():
                    p += 0.3 * torch.randn(p.shape, generator=generator)
        w, stable, plastic = (weights(net) for net in (method.net, method.stable, method.plastic))
        batch, memory = rows_of(trainer, 0, range(step, 128, 11)), copy.deepcopy(method.buffer.all())
        x, y = augmented(memory["x"]), memory["y"]
        z = [logits(average, x).detach() for average in (stable, plastic)]
        is_better = softmax_of(z[0], y) > softmax_of(z[1], y)
        assert 0 < is_better.sum() < 12
        target = torch.where(is_better[:, None], *z)
        loss = 1.7 * (logits(w, x) - target).square().mean()
        loss = loss + ce(w, augmented(torch.cat((batch.x, memory["x"]))), torch.cat((batch.y, y)))
        expected = gradient(w, loss)
        ((objective, _),) = observe(trainer, batch)
        near(direction(w, trainer), expected, 1e-3)
        assert objective.loss.total.item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("freqs", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_cls_er_averages_with_a_decay_that_grows(begin, freqs):
    trainer = begin(
        "cls_er", "tiny-bn", buffer_size=12, stable_freq=freqs[0], plastic_freq=freqs[1], stable_alpha=0.72,
        plastic_alpha=0.6,
    )  # fmt: skip
    method = trainer.method
    expected = {name: flat(getattr(method, name).parameters()) for name in ("stable", "plastic")}
    assert torch.equal(expected["stable"], flat(method.net.parameters()))
    for n in range(1, 6):
        observe(trainer, rows_of(trainer, 0, range(n, 128, 11)))
        for name, alpha, freq in (("stable", 0.72, freqs[0]), ("plastic", 0.6, freqs[1])):
            if freq:
                decay = min(1 - 1 / (n + 1), alpha)
                expected[name] = decay * expected[name] + (1 - decay) * flat(method.net.parameters())
            near(getattr(method, name).parameters(), expected[name])
    own, average = method.net[1], method.stable[1]
    assert method.stable.training and method.plastic.training
    assert not torch.equal(own.running_mean, average.running_mean) and average.num_batches_tracked == 4
    batch = rows_of(trainer, 0, range(6))
    method.eval()
    assert torch.equal(method(batch.inputs), method.stable(batch.inputs))
    assert not torch.allclose(method(batch.inputs), method.net(batch.inputs), atol=1e-3)
    assert all(not p.requires_grad for net in (method.stable, method.plastic) for p in net.parameters())


def test_cls_er_without_a_memory_has_the_statistics_of_the_network(begin):
    """A policy that chooses rows when a task ends leaves the averages without images until then."""
    trainer = begin("cls_er", "tiny-bn", buffer_policy="herding", buffer_size=20, stop_after=1)
    trainer.run()
    net, stable = (dict(part.named_buffers()) for part in (trainer.method.net, trainer.method.stable))
    means = [name for name in net if name.endswith("running_mean")]
    assert means and all(torch.equal(net[name], stable[name]) for name in net)
    assert all(net[name].abs().sum() > 0 for name in means)


def test_cls_er_averages_as_often_as_told(begin):
    trainer = begin("cls_er", stable_freq=0.3, plastic_freq=0.8, buffer_size=4, minibatch_size=1)
    method, moved = trainer.method, Counter()
    batch = rows_of(trainer, 0, [0, 1])
    for _ in range(300):
        before = {name: getattr(method, name).classifier.bias.clone() for name in ("stable", "plastic")}
        with torch.no_grad():
            method.net.classifier.bias += 1
        method.remember(batch, None)
        for name, bias in before.items():
            moved[name] += not torch.equal(bias, getattr(method, name).classifier.bias)
    for name, freq in (("stable", 0.3), ("plastic", 0.8)):
        assert stats.binomtest(moved[name], 300, freq).pvalue > 1e-4, moved


# all of them


METHODS = ("ewc_on", "si", "agem", "agem_r", "gem", "fdr", "gss", "hal", "mer", "er_ace", "cls_er")


@pytest.mark.parametrize("name", METHODS)
def test_cut_in_the_middle_of_a_task_it_goes_on_as_if_it_had_not_been(start, assert_same, name):
    flags = dict(optimizer="looksam", optim_mom=0.5, batch_size=32)
    flags |= dict(steps_on_anchors=3, hal_memory="ring") if name == "hal" else {}
    flags |= dict(batch_num=2) if name in ("gss", "mer") else {}
    flags |= {} if name in ("ewc_on", "si") else dict(buffer_size=30)
    one, other = start(name, seed=1, **flags), start(name, seed=2, **flags)

    def go(trainer, task, rows):
        observe(trainer, rows_of(trainer, task, rows))

    for task in (0, 1):
        enter(one, task)
        for step in range(3):
            go(one, task, range(step, 128, 8))
        if task == 0:
            leave(one, 0)
    file = io.BytesIO()
    torch.save({"method": one.method.state_dict(), "optimizer": one.optimizer.state_dict()}, file)
    random = seeding.global_state()
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.method.load_state_dict(state["method"])
    other.optimizer.load_state_dict(state["optimizer"])
    for trainer in (one, other):
        seeding.set_global_state(random)
        trainer.method.train()
        for step in range(3):
            go(trainer, 1, range(step, 128, 9))
        leave(trainer, 1)
        enter(trainer, 2)
        for step in range(3):
            go(trainer, 2, range(step, 128, 9))
        leave(trainer, 2)
    assert_same(one.method.state_dict(), other.method.state_dict())
    assert_same(one.optimizer.state_dict(), other.optimizer.state_dict())


HARD = {
    "one image a batch": dict(batch_size=1, buffer_size=5, minibatch_size=3, stop_after=2),
    "uneven": dict(batch_size=127, buffer_size=7, minibatch_size=50, stop_after=3),
    "all tasks at once": dict(joint=1, buffer_size=9),
    "a later start": dict(start_from=3, buffer_size=200),
    "bf16": dict(amp="bf16", backbone="mnistmlp", stop_after=2, optimizer="sam"),
    "shards": dict(optimizer="msam", batch_size=3, buffer_size=6, minibatch_size=5, stop_after=2),
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("name", METHODS)
def test_runs_under_hard_conditions(start, name, case):
    known = {"buffer_size": name not in ("ewc_on", "si"), "minibatch_size": name not in ("ewc_on", "si", "gem")}
    flags = {key: value for key, value in HARD[case].items() if known.get(key, True)}
    debug = dict(debug_mode=1) if case != "uneven" else {}
    trainer = start(name, seed=4, **flags, **debug, **(dict(steps_on_anchors=2) if name == "hal" else {}))
    summary = trainer.run()
    assert summary["status"] == "finished" and summary["cost"]["skipped_steps"] == 0
    assert all(np.isfinite(rows).all() for rows in summary["accuracy"].values())
    assert all(p.isfinite().all() for p in trainer.method.parameters())
    if known["buffer_size"]:
        assert 0 < len(trainer.method.buffer) <= flags.get("buffer_size", 100)
    done = len(trainer.progress.tasks)
    if name in ("agem", "gem") and not flags.get("joint"):
        assert len(trainer.method.buffer) == done * (flags.get("buffer_size", 100) // 5)
    if name == "fdr" and case == "uneven":
        assert Counter(trainer.method.buffer.all()["task"].tolist()) == {0: 2, 1: 2, 2: 2}
