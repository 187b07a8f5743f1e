"""The optimizers against computations of our own over one flat vector, and what every optimizer must keep."""

import gc
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatcl.models._method import Batch, Block, Context, Loss, Objective
from flatcl.utils.contracts import optimizers
from flatcl.utils.contracts._steps import (
    CLASSES,
    DECAY,
    LR,
    SIZES,
    TASK,
    Noisy,
    TwoHeads,
    Watched,
    batches,
    conv_bn_linear,
    copies,
    flat,
    make,
    step,
)
from flatcl.utils.contracts.optimizers import Trip
from flatcl.utils.engine.augment import Augment
from flatcl.utils.optim._sharpness import dot, frozen_statistics
from flatcl.utils.registry import BACKBONES, METHODS, OPTIMIZERS

MOMENTUM, RHO, ETA = 0.9, 0.2, 0.01


class Oracle:
    """`conv_bn_linear` as a function of one float64 vector w; BatchNorm, cross entropy and base SGD by hand."""

    SHAPES = ((4, 2, 3, 3), (4,), (4,), (4,), (CLASSES, 64), (CLASSES,))
    SCALED = (True, False, True, False, True, False)  # names that contain `weight`

    def __init__(self, net):
        self.w, self.momentum_buffer = flat(net), None
        self.mean, self.var, self.tracked = torch.zeros(4).double(), torch.ones(4).double(), 0
        sizes = [math.prod(shape) for shape in self.SHAPES]
        self.sizes = sizes
        self.scaled = torch.cat([torch.full((n,), s) for n, s in zip(sizes, self.SCALED, strict=True)])

    def logits(self, w, x, track):
        parts = [part.view(shape) for part, shape in zip(w.split(self.sizes), self.SHAPES, strict=True)]
        kernel, bias, gamma, beta, matrix, offset = parts
        windows = x.unfold(2, 3, 1).unfold(3, 3, 1)  # (N, C, 4, 4, 3, 3)
        maps = torch.einsum("nchwij,ocij->nohw", windows, kernel) + bias[:, None, None]
        mean = maps.mean((0, 2, 3))
        centred = maps - mean[:, None, None]
        var = centred.square().mean((0, 2, 3))
        if track:
            n = maps.numel() // 4
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
            self.var = 0.9 * self.var + 0.1 * var.detach() * n / (n - 1)
            self.tracked += 1
        hidden = centred / (var + 1e-5).sqrt()[:, None, None] * gamma[:, None, None] + beta[:, None, None]
        return hidden.clamp(min=0).flatten(1) @ matrix.T + offset

    @staticmethod
    def cross_entropy(logits, y):
        return (logits.exp().sum(1).log() - logits[torch.arange(len(y)), y]).mean()

    def gradient(self, w, x, y, track):
        w = w.clone().requires_grad_()
        return torch.autograd.grad(self.cross_entropy(self.logits(w, x, track), y), w)[0]

    def base(self, u, decay=DECAY, momentum=MOMENTUM, nesterov=False):
        d = u + decay * self.w
        self.momentum_buffer = d if self.momentum_buffer is None else momentum * self.momentum_buffer + d
        self.w = self.w - LR * (d + momentum * self.momentum_buffer if nesterov else self.momentum_buffer)

    def offset(self, name, g):
        if name == "sam":
            return RHO * g / (g.square().sum().sqrt() + 1e-12)
        t = torch.where(self.scaled, self.w.abs() + ETA, torch.ones_like(self.w))
        return RHO * t * t * g / ((t * g).square().sum().sqrt() + 1e-16)

    def assert_equal(self, net):
        assert (flat(net) - self.w).abs().max() < 1e-12
        assert (net[1].running_mean - self.mean).abs().max() < 1e-12
        assert (net[1].running_var - self.var).abs().max() < 1e-12
        assert net[1].num_batches_tracked == self.tracked


@pytest.mark.parametrize("nesterov", (False, True))
@pytest.mark.parametrize("name, flags", [("sam", dict(rho=RHO)), ("asam", dict(rho=RHO, asam_eta=ETA))])
def test_sam_and_asam_equal_their_equations_after_every_step(name, flags, nesterov):
    net = conv_bn_linear()
    oracle = Oracle(net)
    method, optimizer = make(name, net, optim_mom=MOMENTUM, optim_nesterov=nesterov, **flags)
    for number, (x, y) in enumerate(batches(), start=1):
        g = oracle.gradient(oracle.w, x, y, track=True)
        u = oracle.gradient(oracle.w + oracle.offset(name, g), x, y, track=False)
        oracle.base(u, nesterov=nesterov)
        objective, update = step(method, optimizer, x, y)
        oracle.assert_equal(net)
        assert (torch.cat([part.flatten() for part in update]) - u).abs().max() < 1e-12
        assert objective.forward_rows == objective.backward_rows == 2 * len(y)
        assert oracle.tracked == number


def test_the_equations_tell_the_variants_apart():
    """The comparison above would notice unscaled weights, scaled biases or another eta."""
    net = conv_bn_linear()
    oracle = Oracle(net)
    x, y = next(batches())
    g = oracle.gradient(oracle.w, x, y, track=False)
    right = oracle.offset("asam", g)
    everything = Oracle(net)
    everything.scaled = torch.ones_like(oracle.scaled)
    assert (right - everything.offset("asam", g)).abs().max() > 1e-4
    assert (right - oracle.offset("sam", g)).abs().max() > 1e-4


class ByHand(nn.Module):
    """A linear layer, a scale and biases, most of them not called so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.matrix = nn.Parameter(0.1 * torch.randn(72, CLASSES))
        self.heads = nn.ParameterList([0.1 * torch.randn(CLASSES, CLASSES)])
        self.weight_g, self.sigma = nn.Parameter(torch.full((CLASSES,), 2.0)), nn.Parameter(torch.tensor(0.7))
        self.bias, self.bias_map = nn.Parameter(torch.ones(CLASSES)), nn.Parameter(torch.ones(1, CLASSES))

    def forward(self, x):
        hidden = x.flatten(1) @ self.matrix * self.weight_g + self.bias
        return self.sigma * (hidden @ self.heads[0] + self.bias_map)


def test_asam_scales_weights_whatever_they_are_called_and_no_bias():
    net = ByHand()
    method, optimizer = make("asam", net, rho=RHO, asam_eta=ETA)
    x, y = next(batches(torch.float32, (6,)))
    g = Objective(method, (Block(x, y=y),), optimizer.params).gradient()
    weights = {"net.matrix", "net.heads.0", "net.weight_g"}
    t = [p.detach().abs() + ETA if name in weights else torch.ones_like(p) for name, p in method.named_parameters()]
    length = sum((a * b).square().sum() for a, b in zip(t, g, strict=True)).sqrt()  # |T g|
    assert optimizer.names == [name for name, _ in method.named_parameters()]
    for found, scale, part in zip(optimizer.ascent(g, None), t, g, strict=True):
        assert torch.allclose(found, RHO * scale**2 * part / length, rtol=1e-4, atol=1e-8)


def test_asam_that_trains_nothing_but_biases_is_sam():
    results = []
    for name in ("sam", "asam"):
        net = ByHand()
        for parameter in (net.matrix, net.heads[0], net.weight_g):
            parameter.requires_grad_(False)
        method, optimizer = make(name, net, rho=RHO)
        for x, y in batches(torch.float32, (6, 6)):
            step(method, optimizer, x, y)
        results.append(flat(net))
    assert torch.allclose(*results, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", BACKBONES.names())
def test_asam_scales_what_the_backbones_call_weights(start, name):
    """As the authors' code, which goes by the names alone: kernels, matrices and BatchNorm's scales."""
    trainer = start("sgd", backbone=name, optimizer="asam", rho=RHO, asam_eta=ETA)
    g = [torch.ones_like(p) for p in trainer.optimizer.params]
    offset, by_name = trainer.optimizer.ascent(g, None), []
    for key, p in trainer.method.named_parameters():
        by_name.append((p.detach().abs() + ETA) ** 2 if "weight" in key else torch.ones_like(p))
    length = sum(t.sum() for t in by_name) ** 0.5  # |T g|
    for found, t2 in zip(offset, by_name, strict=True):
        assert torch.allclose(found, RHO * t2 / length, rtol=1e-4)


@pytest.mark.parametrize(
    "name, flags, reference",
    [
        ("sgd", {}, lambda p: torch.optim.SGD(p, LR, weight_decay=DECAY)),
        ("sgd", dict(optim_mom=0.9), lambda p: torch.optim.SGD(p, LR, 0.9, weight_decay=DECAY)),
        (
            "sgd",
            dict(optim_mom=0.9, optim_nesterov=True),
            lambda p: torch.optim.SGD(p, LR, 0.9, weight_decay=DECAY, nesterov=True),
        ),
        ("adam", {}, lambda p: torch.optim.Adam(p, LR, weight_decay=DECAY)),
        (
            "adam",
            dict(optim_beta1=0.5, optim_beta2=0.9),
            lambda p: torch.optim.Adam(p, LR, (0.5, 0.9), weight_decay=DECAY),
        ),
        ("adamw", {}, lambda p: torch.optim.AdamW(p, LR, weight_decay=DECAY)),
    ],
)
def test_plain_optimizers_equal_a_torch_loop_bit_for_bit(name, flags, reference, assert_same):
    net, other = conv_bn_linear(dtype=torch.float32), conv_bn_linear(dtype=torch.float32)
    method, optimizer = make(name, net, **flags)
    torch_optimizer = reference(other.parameters())
    for x, y in batches(torch.float32):
        objective, _ = step(method, optimizer, x, y)
        torch_optimizer.zero_grad()
        nn.functional.cross_entropy(other(x), y).backward()
        torch_optimizer.step()
        assert_same(net.state_dict(), other.state_dict())
        assert objective.forward_rows == objective.backward_rows == len(y)


@pytest.mark.parametrize("name", ("sam", "asam"))
@pytest.mark.parametrize("model, flags", [("er", {}), ("derpp", {}), ("mgser_sam", dict(guide=0))])
def test_rho_zero_is_sgd_bit_for_bit(start, assert_same, name, model, flags):
    """Weights, BatchNorm statistics, buffer with its logits and generator, momentum: after two tasks."""
    flags = dict(debug_mode=1, stop_after=2, optim_mom=0.9, optim_wd=5e-4, buffer_size=30, **flags)
    plain = start(model, optimizer="sgd", **flags)
    plain.run()
    moved = start(model, optimizer=name, rho=0, **flags)
    moved.run()
    assert plain.method.state_dict()["_extra_state"]["num_seen"] > 30
    assert_same(plain.method.state_dict(), moved.method.state_dict())
    assert_same(plain.optimizer.state_dict(), moved.optimizer.state_dict())
    assert moved.cost.forward_rows == 2 * plain.cost.forward_rows


class Doubles(Augment):
    """Network inputs in float64."""

    def __call__(self, images):
        return super().__call__(images).double()


class MgserOracle(Oracle):
    """MGSER-SAM with a reservoir of its own: lists of (image, label, logits)."""

    def __init__(self, net, capacity, minibatch, seed, alpha, beta, guide, guide_on="memory", guide_mode="add",
                 align_beta=0.0, sharp_on="all", renormalize=False):  # fmt: skip
        super().__init__(net)
        self.capacity, self.minibatch, self.rng = capacity, minibatch, np.random.default_rng(seed)
        self.alpha, self.beta, self.guide, self.guide_on = alpha, beta, guide, guide_on
        self.guide_mode, self.align_beta, self.sharp_on = guide_mode, align_beta, sharp_on
        self.renormalize = renormalize
        self.rows, self.seen, self.usual, self.aligned = [], 0, 0.0, 0

    def step(self, x, y):
        """x uint8; returns the rows of one pass."""
        as_input = lambda images: (images.float() / 255).double()  # noqa: E731
        draws = []
        if self.rows:
            n = min(self.minibatch, len(self.rows))
            for _ in range(2):
                picked = [self.rows[i] for i in self.rng.choice(len(self.rows), n, replace=False)]
                draws.append([torch.stack(column) for column in zip(*picked, strict=True)])

        def terms(w, track):
            """[current, logits, labels], each with a forward of its own."""
            stream = self.logits(w, as_input(x), track)
            parts = [self.cross_entropy(stream, y)]
            if draws:
                (image1, _, past), (image2, label, _) = draws
                parts.append(self.alpha * (self.logits(w, as_input(image1), track) - past).square().mean())
                parts.append(self.beta * self.cross_entropy(self.logits(w, as_input(image2), track), label))
            return parts, stream.detach()

        w = self.w.clone().requires_grad_()
        parts, stream = terms(w, track=True)
        gradients = [torch.autograd.grad(part, w)[0] for part in parts]
        moved = (self.w + self.offset("sam", sum(gradients))).requires_grad_()
        perturbed = [torch.autograd.grad(part, moved)[0] for part in terms(moved, track=False)[0]]
        if draws and self.sharp_on == "memory":
            perturbed[0] = gradients[0]
        elif draws and self.sharp_on == "current":
            perturbed[1:] = gradients[1:]
        u = sum(perturbed) if draws or self.sharp_on != "memory" else sum(gradients)
        scale = sum(gradients).norm() / (u.norm() + 1e-12) if self.renormalize else 1.0
        u = u * scale
        if draws:
            _, on_logits, on_labels = gradients if self.guide_mode == "add" else perturbed
            guide = {"memory": on_logits + on_labels, "logits": on_logits, "labels": on_labels}[self.guide_on]
            guide = guide * scale if self.guide_mode == "align" else guide
            u = u + self.guide * guide if self.guide_mode == "add" else sum(self.align(u - guide, guide))
        self.base(u)
        for row in zip(x, y, stream, strict=True):
            if self.seen < self.capacity:
                self.rows.append(row)
            else:
                slot = int(self.rng.random() * (self.seen + 1))
                if slot < self.capacity:
                    self.rows[slot] = row
            self.seen += 1
        return len(y) + sum(len(draw[0]) for draw in draws)

    def align(self, a, b):
        """Each turned towards the other, in the plane of the two, until the angle between them is the usual one."""
        length = torch.linalg.vector_norm
        angle = (a @ b / (length(a) * length(b))).arccos()
        usual = torch.tensor(self.usual, dtype=torch.float64).arccos()
        self.usual += self.align_beta * (float(angle.cos()) - self.usual)
        if angle <= usual:
            return a, b

        def turned(a, b):
            along = b / length(b)
            across = a - (a @ along) * along  # stays, so that the length along b follows from the angle
            new = across + length(across) / usual.tan() * along
            assert abs(new @ b / (length(new) * length(b)) - usual.cos()) < 1e-12
            return a + self.guide * (new - a)

        self.aligned += 1
        return turned(a, b), turned(b, a)


@pytest.mark.parametrize("flags", [
    dict(guide=1.0), dict(guide=0.5), dict(guide=0.7, guide_on="logits"), dict(guide=2.0, guide_on="labels"),
    dict(guide=1.0, sharp_on="memory"), dict(guide=0.5, sharp_on="current"),
    dict(guide=1.0, guide_mode="align", align_beta=0.3), dict(guide=0.6, guide_mode="align", align_beta=0.5),
    dict(guide=1.0, guide_mode="align", align_beta=0.3, guide_on="labels", sharp_on="memory"),
    dict(guide=1.0, guide_mode="align", align_beta=0.3, sharp_on="current"),
    dict(guide=1.0, guide_mode="align", align_beta=0.3, renormalize=True),
])  # fmt: skip
def test_mgser_sam_equals_its_equations_after_every_step(flags):
    net = conv_bn_linear()
    oracle = MgserOracle(net, 20, 7, seed=5, alpha=0.3, beta=0.6, **flags)
    augment = Doubles([], None, None, "cpu")
    kind, sam = METHODS.load("mgser_sam"), OPTIMIZERS.load("sam")
    of_sam = {name: flags[name] for name in ("sharp_on", "renormalize") if name in flags}
    own, sharp_on = {name: flags[name] for name in flags.keys() - of_sam.keys()}, flags.get("sharp_on", "all")
    args = kind.Args(buffer_size=20, minibatch_size=7, alpha=0.3, beta=0.6, **own)
    context = Context(SimpleNamespace(num_classes=CLASSES), augment, torch.device("cpu"), np.random.default_rng(5))
    method = kind(net, args, context).train()
    optimizer = sam(method, LR, DECAY, sam.Args(rho=RHO, optim_mom=MOMENTUM, **of_sam))
    generator = torch.Generator().manual_seed(3)
    for number, n in enumerate(SIZES):
        x = torch.randint(0, 256, (n, 2, 6, 6), generator=generator, dtype=torch.uint8)
        y = torch.randint(0, CLASSES, (n,), generator=generator)
        rows = oracle.step(x, y)
        ((objective, _),) = method.observe(Batch(x, y, torch.arange(n), inputs=None, augment=augment), optimizer)
        oracle.assert_equal(net)
        passes = 1 if number == 0 and sharp_on == "memory" else 2
        unmoved = {"all": 0, "memory": n if number else 0, "current": rows - n}[sharp_on]
        assert objective.forward_rows == passes * rows and objective.backward_rows == passes * rows - unmoved
        stored = method.buffer.all()
        images, labels, logits = (torch.stack(column) for column in zip(*oracle.rows, strict=True))
        assert torch.equal(stored["x"], images) and torch.equal(stored["y"], labels)
        assert (stored["logits"] - logits).abs().max() < 1e-12
    assert oracle.seen > 2 * oracle.capacity  # the reservoir was at work
    assert oracle.tracked == 3 * len(SIZES) - 2
    if oracle.guide_mode == "align":
        assert 0 < oracle.aligned < len(SIZES) - 1 and abs(method.usual_cosine - oracle.usual) < 1e-12


def test_guide_zero_is_derpp_sam_bit_for_bit_and_the_guide_costs_nothing(start, assert_same):
    flags = dict(debug_mode=1, stop_after=2, optim_mom=0.9, optim_wd=5e-4, buffer_size=40)
    runs = []
    for model, guide in [("derpp_sam", {}), ("mgser_sam", dict(guide=0)), ("mgser_sam", dict(guide=1))]:
        runs.append(start(model, **guide, **flags))
        runs[-1].run()
    plain, unguided, guided = runs
    assert plain.config.optimizer == unguided.config.optimizer == "sam"
    assert_same(plain.method.state_dict(), unguided.method.state_dict())
    assert_same(plain.optimizer.state_dict(), unguided.optimizer.state_dict())
    assert not torch.equal(flat(plain.method.net), flat(guided.method.net))
    # 10 steps of 16 rows, all but the first with two draws of 16; two passes
    assert {(t.cost.forward_rows, t.cost.backward_rows) for t in runs} == {(896, 896)}


@pytest.mark.parametrize("stage", ("forward", "backward"))
@pytest.mark.parametrize("momentum", (0.1, None))
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_an_exception_in_any_pass_leaves_weights_and_batchnorm_as_they_were(name, momentum, stage):
    optimizers.weights_come_back(name, stage, momentum)


@pytest.mark.parametrize("title", [title for title in optimizers.CONTRACTS if "exception" not in title])
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_keeps_the_contracts(name, title):
    optimizers.CONTRACTS[title](optimizers.subject(name))


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_dropout_by_a_function_is_the_same_in_all_passes_too(name):
    optimizers.keeps_dropout(name, "function")


@pytest.mark.parametrize("name", ("sam", "asam"))
def test_the_second_pass_is_at_perturbed_weights_and_an_accident_there_changes_no_later_step(name, assert_same):
    x, y = next(batches())
    nets = []
    for accident in (False, True):
        net = conv_bn_linear()
        method, optimizer = make(name, net, optim_mom=MOMENTUM)
        start, seen = flat(net), []

        def watch(number, logits, net=net, seen=seen, accident=accident):
            seen.append(flat(net))
            if accident and number == 2:
                raise Trip

        method.watch = watch
        if accident:
            with pytest.raises(Trip):
                step(method, optimizer, x, y)
            assert torch.equal(flat(net), start)
        step(method, optimizer, x, y)
        assert torch.equal(seen[0], start) and not torch.equal(seen[1], start)
        nets.append(net)
    assert torch.equal(flat(nets[0]), flat(nets[1]))


@pytest.mark.parametrize("momentum", (0.1, None))
def test_frozen_statistics_nest_and_thaw(momentum, assert_same):
    net = conv_bn_linear(momentum)
    never = nn.BatchNorm2d(4, track_running_stats=False).double()
    both = nn.ModuleList([net, never])
    x, _ = next(batches())
    before = copies(net)
    with frozen_statistics(both):
        net(x)
        with frozen_statistics(both):
            net(x)
        net(x)  # still frozen after the inner one has ended
        assert_same(before, copies(net))
        with pytest.raises(Trip), frozen_statistics(both):
            raise Trip
        net(x)
        assert_same(before, copies(net))
    assert net[1].track_running_stats and not never.track_running_stats
    with frozen_statistics(both):  # a second time
        frozen = net(x)
    assert_same(before, copies(net))
    assert torch.equal(frozen, net(x))  # it normalised with the batch, as now
    assert net[1].num_batches_tracked == 1 and not torch.equal(net[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize(
    "name, flags, reference",
    [
        ("sgd", dict(optim_mom=0.9), lambda p: torch.optim.SGD(p, LR, 0.9, weight_decay=0.1)),
        ("adam", {}, lambda p: torch.optim.Adam(p, LR, weight_decay=0.1)),
        ("adamw", {}, lambda p: torch.optim.AdamW(p, LR, weight_decay=0.1)),
    ],
    ids=("sgd", "adam", "adamw"),
)
def test_a_parameter_that_pauses_keeps_its_state_as_in_torch(name, flags, reference):
    """Momentum and the step count of a head belong to the steps in which it was used."""
    net, other = TwoHeads(), TwoHeads()
    method, optimizer = make(name, net, weight_decay=0.1, **flags)
    torch_optimizer = reference([p for p in other.parameters() if p.requires_grad])
    for (x, y), head in zip(batches(torch.float32), (0, 0, 1, 0, 1, 1, 0), strict=True):
        net.head = other.head = head
        step(method, optimizer, x, y)
        torch_optimizer.zero_grad()
        nn.functional.cross_entropy(other(x), y).backward()
        torch_optimizer.step()
        assert torch.equal(flat(net), flat(other))


class Referring(Watched):
    """Its second block is a reference, that passes first."""

    references_first = True

    def references(self, memory):
        yield "memory", nn.functional.cross_entropy(self.net(memory.x), memory.y)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_references_that_pass_first_have_noise_of_their_own(name):
    """The clean pass draws after them, and the passes at moved weights what the clean one drew."""
    net, kind = Noisy("module"), OPTIMIZERS.load(name)
    method = Referring(net, None, None).train()
    optimizer = kind(method, LR, DECAY, kind.Args(**({"msam_shards": 1} if name == "msam" else {})))
    optimizer.begin_task(TASK)
    optimizer.begin_epoch(0)
    batch = list(batches(torch.float32, (12,) * 6))
    for (x, y), (old_x, old_y) in zip(batch[:3], batch[3:], strict=True):
        blocks = (Block(x, y=y, ids=torch.arange(12)), Block(old_x, 12, reference=True, y=old_y))
        objective = Objective(method, blocks, optimizer.params)
        before = len(net.passes)
        optimizer.step(objective)
        (first, noise), *others = net.passes[before:]
        assert torch.equal(first, old_x) and list(objective.guides) == ["memory"]
        clean = [mask for inputs, mask in others if inputs.shape == x.shape and torch.equal(inputs, x)]
        assert clean and all(torch.equal(mask, clean[0]) for mask in clean) and not torch.equal(noise, clean[0])


@pytest.mark.parametrize("name", ("sam", "asam"))
def test_with_rho_zero_both_passes_have_the_same_loss_under_dropout(name):
    method, optimizer = make(name, Noisy("module"), lr=0.0, rho=0.0)
    x, y = next(batches(torch.float32))
    losses = []
    for _ in range(2):
        objective, _ = step(method, optimizer, x, y, trace=True)
        clean, moved = (loss.total for loss, _ in objective.passes)
        assert torch.equal(clean, moved) and torch.equal(clean, objective.loss.total)
        losses.append(clean)
    assert not torch.equal(*losses)  # same weights, same images: the mask is another


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_a_step_without_dropout_draws_nothing(name):
    method, optimizer = make(name, conv_bn_linear())
    before = torch.get_rng_state()
    step(method, optimizer, *next(batches()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wanted", (True, False))
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_a_method_may_want_a_new_optimizer_with_each_task(name, wanted, assert_same):
    """Then its next task is that of an optimizer which has just been made; else momentum goes on."""
    kind = OPTIMIZERS.load(name)
    flags = {"optim_mom": 0.9} if hasattr(kind.Args(), "optim_mom") else {}
    second = SimpleNamespace(index=1, classes=range(CLASSES), train=SimpleNamespace(ids=torch.arange(100, 200)))
    stream = list(batches(torch.float32))
    method, optimizer = make(name, conv_bn_linear(dtype=torch.float32), **flags)
    method.new_optimizer = wanted
    for x, y in stream[:3]:
        step(method, optimizer, x, y)
    other, fresh = make(name, conv_bn_linear(dtype=torch.float32), **flags)
    other.load_state_dict(method.state_dict())
    fresh.rng.bit_generator.state = optimizer.rng.bit_generator.state
    assert any(entry is not None for entries in optimizer.base.state.values() for entry in entries) == bool(
        optimizer.base.state
    )
    for each in (optimizer, fresh):
        each.begin_task(second)
        each.begin_epoch(0)
    for x, y in stream[3:]:
        for side in ((method, optimizer), (other, fresh)):
            step(*side, x, y)
    if wanted or not optimizer.base.state:
        assert_same(method.state_dict(), other.state_dict())
        assert_same(optimizer.state_dict(), fresh.state_dict())
    else:
        assert not torch.equal(flat(method.net), flat(other.net))


def test_momentum_is_what_a_resumed_run_would_miss():
    """The test above sees a forgotten momentum."""
    results = []
    for forget in (False, True):
        net = conv_bn_linear()
        method, optimizer = make("sam", net, optim_mom=0.9)
        for number, (x, y) in enumerate(batches()):
            if forget and number == 3:
                _, optimizer = make("sam", net, optim_mom=0.9)
            step(method, optimizer, x, y)
        results.append(flat(net))
    assert not torch.allclose(*results)


class Flat(Watched):
    """A loss with a gradient of exactly zero everywhere."""

    def loss(self, stream):
        logits = self.net(stream.x)
        return Loss({"current": 0.0 * logits.sum(1)}, logits)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_a_gradient_of_zero_moves_nothing(name, dtype):
    kind = OPTIMIZERS.load(name)
    net = conv_bn_linear(dtype=dtype)
    method = Flat(net, None, None).train()
    optimizer = kind(method, LR, 0.0, kind.Args(**({"mesa_lambda": 0.0} if name == "mesa" else {})))
    optimizer.begin_task(TASK)
    optimizer.begin_epoch(0)
    before = flat(net)
    for x, y in batches(dtype, (4, 4, 4)):
        _, update = step(method, optimizer, x, y)
        assert all((part == 0).all() for part in update)
        assert torch.equal(flat(net), before)


def whole_state(method, optimizer):
    """Weights, BatchNorm and the optimizer's state, but for its random choices and counts."""
    state = optimizer.state_dict()
    for name in ("skips", "rng"):
        del state[name]
    return {"method": copies(method), "optimizer": state}


@pytest.mark.parametrize("where", ("clean", "last"))
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_a_step_with_a_loss_that_is_not_finite_is_not_taken(name, where, assert_same):
    """The bad pass is the clean one, or the last one of the step; it is counted, and training goes on."""
    momentum = {"optim_mom": 0.9} if hasattr(OPTIMIZERS.load(name).Args(), "optim_mom") else {}
    method, optimizer = make(name, conv_bn_linear(), **momentum)
    stream = list(batches(sizes=(12,) * 8))
    for x, y in stream[:3]:
        step(method, optimizer, x, y)
    passes = method.passes
    step(method, optimizer, *stream[3])
    number = 1 if where == "clean" else method.passes - passes  # of the bad pass, counted in its step
    if name == "looksam":  # the fifth step is one of a single pass, as the fourth was
        number = 1

    before, begun = whole_state(method, optimizer), method.passes
    plain = Watched.loss

    def spoilt(stream):
        loss = plain(method, stream)
        bad = float("inf") if method.passes - begun == number else 1.0
        return Loss({key: rows * bad for key, rows in loss.rows.items()}, loss.logits)

    method.loss = spoilt
    objective, _ = step(method, optimizer, *stream[4])
    del method.loss
    assert objective.skipped and optimizer.skips.tolist() == [1, 1]
    assert_same(before, whole_state(method, optimizer))
    objective, _ = step(method, optimizer, *stream[5])
    assert not objective.skipped and optimizer.skips.tolist() == [1, 0]
    assert not torch.equal(before["method"]["net.4.weight"], method.net[4].weight)
    assert all(tensor.isfinite().all() for tensor in copies(method).values())


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_where_the_host_does_not_wait_the_device_takes_the_same_decisions(name, assert_same):
    """The code for other devices than the CPU, run on the CPU: good steps are the same, a bad one changes nothing."""
    momentum = {"optim_mom": 0.9} if hasattr(OPTIMIZERS.load(name).Args(), "optim_mom") else {}
    pairs = [make(name, conv_bn_linear(), **momentum) for _ in range(2)]
    pairs[1][1].device = SimpleNamespace(type="elsewhere")
    stream = list(batches(sizes=(12,) * 8))
    for x, y in stream[:4]:
        for method, optimizer in pairs:
            step(method, optimizer, x, y)
        assert_same(*(whole_state(*pair) for pair in pairs))
    method, optimizer = pairs[1]
    before = whole_state(method, optimizer)
    x, y = stream[4]
    step(method, optimizer, x.fill_(float("nan")), y)
    after = whole_state(method, optimizer)
    assert optimizer.skips.tolist() == [1, 1]
    assert_same(before["method"], after["method"])
    assert_same(before["optimizer"]["state"], after["optimizer"]["state"])
    if name not in ("adam", "adamw"):  # which count their steps on the host
        assert_same(before["optimizer"]["base"], after["optimizer"]["base"])
    for x, y in stream[5:7]:
        step(method, optimizer, x, y)
    assert optimizer.skips.tolist() == [2 if name == "sampa" else 1, 0]  # which meets the bad batch once more
    assert not torch.equal(before["method"]["net.4.weight"], method.net[4].weight)


class Lists(TorchDispatchMode):
    """Counts the operations on lists of tensors, and notes those on several types of numbers, which a GPU cannot do in
    one kernel."""

    def __init__(self):
        super().__init__()
        self.number, self.mixed = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("aten::_foreach"):
            self.number += 1
            if len({tensor.dtype for tensor in args[0]}) > 1:
                self.mixed.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_an_operation_on_a_list_is_on_one_type_of_numbers(name):
    for device in ("cpu", "elsewhere"):
        method, optimizer = make(name, conv_bn_linear())
        optimizer.device = SimpleNamespace(type=device)
        (x, y), *good = list(batches(sizes=(12,) * 3))
        with Lists() as lists:
            for batch in (*good, (x * float("inf"), y)):
                step(method, optimizer, *batch)
        assert lists.number > 6 and not lists.mixed


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_the_first_step_of_all_can_be_a_bad_one(name):
    for device in ("host", "device"):
        method, optimizer = make(name, conv_bn_linear())
        if device == "device":
            optimizer.device = SimpleNamespace(type="elsewhere")
        start = flat(method.net)
        (x, y), *good = list(batches(sizes=(12,) * 3))
        step(method, optimizer, x * float("inf"), y)
        assert torch.equal(flat(method.net), start)
        for x, y in good:
            step(method, optimizer, x, y)
        moved = flat(method.net)
        assert moved.isfinite().all() and not torch.equal(moved, start)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_the_passes_are_those_that_the_file_states(name):
    """`--list optimizers` prints them; here they are counted, over enough steps for those that take turns."""
    stated = OPTIMIZERS.note(name, "Passes").split(" (")[0]
    parts = [part.strip() for part in stated.split(",")]
    assert [part.rpartition(" ")[2] for part in parts] == ["forward", "backward"] and OPTIMIZERS.note(name, "Memory")
    kind = OPTIMIZERS.load(name)
    values = {"k": getattr(kind.Args(), "looksam_every", 0), "gamma": getattr(kind.Args(), "esam_gamma", 0)}
    forward, backward = (eval(part.rpartition(" ")[0], {}, values) for part in parts)
    method, optimizer = make(name, conv_bn_linear())
    counts = []
    for x, y in batches(sizes=(12,) * 11):
        objective, _ = step(method, optimizer, x, y)
        counts.append((objective.forward_rows / 12, objective.backward_rows / 12))
    later = np.array(counts[1:])  # the first step of a task may have passes of its own
    assert later.mean(0).tolist() == pytest.approx([forward, backward])


class Rigged:
    """Draws that leave out every tensor."""

    def random(self, number):
        return np.linspace(0.9, 1.0, number)


def test_esam_always_keeps_a_tensor():
    method, optimizer = make("esam", conv_bn_linear(), esam_beta=0.1)
    optimizer.rng = Rigged()
    objective = Objective(method, (Block(torch.zeros(2, 1, 6, 6)),), optimizer.params)
    assert optimizer.draw(objective) == {}  # a task's first step
    optimizer.tick(objective)
    assert optimizer.draw(objective)["perturbed"].tolist() == [True, False, False, False, False, False]


def test_saf_takes_an_image_that_is_there_twice_as_one_visit_and_keeps_its_last_logits():
    method, optimizer = make("saf", conv_bn_linear())
    ids = torch.tensor([3, 7, 3, 99, 1000])  # 1000 is not of this task
    z = torch.arange(5.0).double()[:, None].expand(5, CLASSES)
    optimizer._seen = {0: optimizer._slots(ids)}, {0: z}
    optimizer.settle(Objective(method, (), optimizer.params))
    assert optimizer.visits[:-1].nonzero().flatten().tolist() == [3, 7, 99]
    assert optimizer.visits.max() == 1
    assert [optimizer.logits[i, 0, 0].item() for i in (3, 7, 99)] == [2.0, 1.0, 3.0]


def test_the_fisher_information_is_of_stream_and_memory_and_moves_nothing(assert_same):
    """Rows are taken evenly from all blocks that have labels, sample by sample, in eval mode."""
    method, optimizer = make("sparse_sam", conv_bn_linear(), fisher_rows=4)
    (x, y), (x2, y2) = list(batches(sizes=(7, 5)))
    blocks = Block(x, y=y), Block(x2, memory=5, y=y2), Block(x2, memory=5)
    objective = Objective(method, blocks, optimizer.params)
    before = copies(method)
    found = optimizer._fisher(objective)
    assert_same(before, copies(method))
    assert method.training and method.net[1].training
    assert objective.forward_rows == objective.backward_rows == 4
    method.eval()
    expected = [torch.zeros_like(p) for p in optimizer.params]
    for image, label in [(x[0], y[0]), (x[3], y[3]), (x[6], y[6]), (x2[2], y2[2])]:
        cost = nn.functional.cross_entropy(method.net(image[None]), label[None])
        torch._foreach_add_(expected, [g.square() for g in torch.autograd.grad(cost, optimizer.params)])
    for part, own in zip(found, expected, strict=True):
        assert (part - own).abs().max() < 1e-12


def test_a_mask_that_a_bad_first_step_would_have_made_moves_all():
    """On the device: not a mask of zeros until the next one is made, and no logits that are not finite."""
    method, optimizer = make("sparse_sam", conv_bn_linear())
    optimizer.device = SimpleNamespace(type="elsewhere")
    x, y = next(batches())
    objective, _ = step(method, optimizer, x * float("nan"), y)
    assert optimizer.skips.tolist() == [1, 1]
    assert all((part == 1).all() for part in optimizer.state["mask"])
    assert torch.equal(objective.loss.logits, torch.zeros_like(objective.loss.logits))


class WithConstant(Watched):
    """A regulariser that has nothing to say yet."""

    def loss(self, stream):
        loss = super().loss(stream)
        return Loss(loss.rows, loss.logits, {"nothing": torch.zeros((), dtype=torch.float64)})


@pytest.mark.parametrize("climb", ("current", "memory"))
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS.names() if hasattr(OPTIMIZERS.load(name).Args(), "rho")])
def test_a_term_that_depends_on_no_weight_has_no_part_in_the_ascent(name, climb):
    kind = OPTIMIZERS.load(name)
    method = WithConstant(conv_bn_linear(), None, None).train()
    optimizer = kind(method, LR, DECAY, kind.Args(ascent_on=climb))
    optimizer.begin_task(TASK)
    optimizer.begin_epoch(0)
    start = flat(method.net)
    for x, y in batches(sizes=(12, 12)):
        step(method, optimizer, x, y)
    assert not torch.equal(flat(method.net), start) and flat(method.net).isfinite().all()


def test_dot_takes_tensors_in_any_memory_order():
    a = torch.randn(2, 3, 4, 5).double()
    b = torch.randn(2, 3, 4, 5).double().contiguous(memory_format=torch.channels_last)
    assert dot([a, a], [b, b]).item() == pytest.approx(2 * (a * b).sum().item())


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_nothing_of_a_step_stays_alive_but_what_the_next_one_needs(name):
    """Without the garbage collector: no cycle through a closure holds batches and gradients."""
    method, optimizer = make(name, conv_bn_linear())
    gc.collect()
    gc.disable()
    try:
        alive = []
        for x, y in batches():
            objective, _ = step(method, optimizer, x, y)
            alive.append(weakref.ref(objective))
            del objective
        assert [ref() for ref in alive] == [None] * len(alive)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_a_state_of_other_parameters_is_refused_and_named(name):
    method, optimizer = make(name, conv_bn_linear())
    step(method, optimizer, *next(batches()))
    frozen = conv_bn_linear()
    frozen[0].weight.requires_grad_(False)
    _, other = make(name, frozen)
    with pytest.raises(ValueError, match=r"it trains other parameters: net\.0\.weight"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", ("msam", "esam"))
def test_a_part_of_a_batch_is_never_a_single_row_for_batchnorm(name):
    """On 1 x 1 maps BatchNorm would normalise one row by its running averages, not as the batch is normalised."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)).double()
    method, optimizer = make(name, net)
    sizes = []
    net[2].register_forward_pre_hook(lambda layer, inputs: sizes.append(len(inputs[0])))
    for x, y in batches(sizes=(12, 2, 3, 5)):
        step(method, optimizer, x, y)
    assert flat(net).isfinite().all() and min(sizes) == 2


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_no_variant_changes_a_gradient_that_was_handed_to_it(name, monkeypatch):
    """Guides, the ratio of --renormalize and kept averages share their tensors."""
    handed = []
    gradients = Objective.gradients

    def watched(self, *args, **kwargs):
        found = gradients(self, *args, **kwargs)
        handed.extend((tensor, tensor.clone()) for part in found for tensor in part)
        return found

    monkeypatch.setattr(Objective, "gradients", watched)
    method, optimizer = make(name, conv_bn_linear())
    for x, y in batches(sizes=(12,) * 4):
        step(method, optimizer, x, y)
    assert handed and all(torch.equal(tensor, copy) for tensor, copy in handed)


@pytest.mark.parametrize("perturb", ("no_norm_bias", "norm_only"))
def test_an_ascent_of_any_kind_is_kept_to_the_parameters_that_are_to_be_perturbed(perturb):
    class Anywhere(OPTIMIZERS.load("sam")):
        def ascent(self, g, objective):
            return [torch.ones_like(part) for part in g]

    net = conv_bn_linear()
    method = Watched(net, None, None).train()
    optimizer = Anywhere(method, LR, DECAY, Anywhere.Args(perturb=perturb))
    start, seen = copies(net), []
    method.watch = lambda number, logits: seen.append(copies(net))
    step(method, optimizer, *next(batches()))
    moved = {key for key, _ in net.named_parameters() if not torch.equal(seen[1][key], start[key])}
    assert moved == ({"0.weight", "4.weight"} if perturb == "no_norm_bias" else {"1.weight", "1.bias"})
