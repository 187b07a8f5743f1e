"""The sharpness-aware family against float64 formulas of our own over one flat vector, after every step."""

import dataclasses
import io
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_optimizers import MOMENTUM, RHO, Oracle
from torch import nn

from flatcl.models._method import Block, Loss, Objective
from flatcl.utils.arguments import resolve
from flatcl.utils.contracts._steps import CLASSES, DECAY, LR, SIZES, Watched, batches, conv_bn_linear, flat
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import OPTIMIZERS

ROWS, EPOCHS = 12, 4  # of a batch, of a task
SOURCES = ((1.0, "current"), (0.5, "memory"))  # weight and name of the term of each block
FAMILY = (
    "sam", "asam", "sampa", "friendly_sam", "stable_sam", "cr_sam", "sparse_sam", "msam", "saf", "mesa", "looksam",
    "esam", "gsam", "c_flat",
)  # fmt: skip


# The other side: what the optimizer under test sees.


class Sources(Watched):
    """A term for each block, the second at half weight, and where asked for a penalty on all parameters."""

    penalty, kept = 0.0, None

    def loss(self, *blocks):
        rows, stream = {}, None
        for (weight, name), block in zip(SOURCES, blocks, strict=False):
            logits = self.net(block.x)
            stream = logits if stream is None else stream
            self.watch(None, logits)
            rows[name] = (block, weight * nn.functional.cross_entropy(logits, block.y, reduction="none"))
        if self.penalty:
            return Loss(rows, stream, {"size": self.penalty * sum(p.square().sum() for p in self.net.parameters())})
        return Loss(rows, stream)

    def remembered_ids(self):
        return self.kept


def task(index=0, ids=range(ROWS)):
    return SimpleNamespace(index=index, classes=range(CLASSES), train=SimpleNamespace(ids=torch.tensor(list(ids))))


def build(name, net, penalty=0.0, seed=7, **flags):
    kind = OPTIMIZERS.load(name)
    method = Sources(net, None, None).train()
    method.penalty = penalty
    flags = {"optim_mom": MOMENTUM, **flags}
    optimizer = kind(method, LR, DECAY, kind.Args(**flags), rng=np.random.default_rng(seed))
    optimizer.begin_task(task())
    optimizer.begin_epoch(0, EPOCHS)
    return method, optimizer


def step(method, optimizer, blocks, trace=False):
    objective = Objective(method, tuple(blocks), optimizer.params, trace)
    return objective, optimizer.step(objective)


def state(optimizer, name):
    return torch.cat([part.flatten() for part in optimizer.state[name]])


def stream(sizes=(*SIZES, 12)):
    """One block a step; the same ids come back in each."""
    return [[Block(x, y=y, ids=torch.arange(len(y)))] for x, y in batches(sizes=sizes)]


def mixed(layout, sizes=((8, 0), (8, 4), (6, 3), (8, 4), (8, 4), (5, 4), (8, 4))):
    """Current and memory rows in one forward (`er`) or in a forward each (`der`); the memory is empty at first."""
    steps = []
    for (n, k), (x, y) in zip(sizes, batches(sizes=[n + k for n, k in sizes]), strict=True):
        ids = torch.arange(n + k)
        if layout == "er" or k == 0:
            steps.append([Block(x, memory=k, y=y, ids=ids)])
        else:
            steps.append([Block(x[:n], y=y[:n], ids=ids[:n]), Block(x[n:], memory=k, y=y[n:])])
    return steps


def some(block, rows):
    return Block(block.x[rows], **{name: column[rows] for name, column in block.columns.items()})


def enlarge(net, rows=2):
    """More classifier rows; the old ones stay as they are."""
    old = net[4]
    torch.manual_seed(9)
    new = nn.Linear(64, old.out_features + rows).double()
    with torch.no_grad():
        new.weight[: old.out_features], new.bias[: old.out_features] = old.weight, old.bias
    net[4] = new


# Our side: vectors, the loss, and one function for each update rule.


def length(vector):
    return vector.square().sum().sqrt()


def log_probability(logits, tau):
    z = logits / tau
    z = z - z.max(1, keepdim=True).values.detach()
    return z - z.exp().sum(1, keepdim=True).log()


def divergence(past, logits, tau):
    """KL(softmax(past / tau) || softmax(logits / tau)) of each row."""
    p, q = log_probability(past, tau), log_probability(logits, tau)
    return (p.exp() * (p - q)).sum(1)


class Flags(dict):
    __getattr__ = dict.__getitem__


DEFAULTS = dict(
    rho=RHO, ascent_on="all", sharp_on="all", perturb="all", sam_from_task=0, renormalize=False, optim_nesterov=False,
    asam_eta=0.01, sampa_lambda=0.2, friendly_sigma=1.0, friendly_lambda=0.6, cr_gamma=0.1, cr_beta=0.01, cr_log=False,
    sparsity=0.5, sparse_mask="fisher", sparse_every=1, fisher_rows=64, drop_rate=0.5, sparse_n=2, sparse_m=4,
    msam_shards=4, saf_lambda=0.3, saf_tau=5.0, saf_start=1, saf_lag=2, mesa_lambda=0.8, mesa_tau=5.0, mesa_start=1,
    mesa_decay=0.9, mesa_carry=False, looksam_every=3, looksam_alpha=0.5, esam_beta=0.6, esam_gamma=0.5,
    gsam_rho_min=None, gsam_alpha=0.4, cflat_lambda=0.2,
)  # fmt: skip


class Family(Oracle):
    """The flat oracle with losses of blocks, parts of a loss, counted passes, base steps at any rate, a larger head."""

    def __init__(self, net, rule, penalty=0.0, seed=7, **flags):
        super().__init__(net)
        self.rule, self.penalty, self.rng = rule, penalty, np.random.default_rng(seed)
        self.flags = Flags(DEFAULTS | flags)
        self.lr, self.task, self.epoch = LR, 0, 0
        self.memory = SimpleNamespace(h=None, previous=None, m=None, t=0, g_v=None, first=True)
        self.mask = None  # of sparse_sam; the comparison reads it from the optimizer, but for the first random one
        self.past = defaultdict(list)  # id -> the logits of all its visits
        self.reset_teacher()
        self.forward_rows = self.backward_rows = 0

    # the network

    def logits(self, w, x, track=False, statistics=None, momentum=0.1):
        """Batch statistics, or `statistics` (mean, var) as in eval mode."""
        kernel, bias, gamma, beta, matrix, offset = self.split(w)
        windows = x.unfold(2, 3, 1).unfold(3, 3, 1)
        maps = torch.einsum("nchwij,ocij->nohw", windows, kernel) + bias[:, None, None]
        if statistics is None:
            mean, var = maps.mean((0, 2, 3)), maps.var((0, 2, 3), correction=0)
        else:
            mean, var = statistics
        if track:
            unbiased = maps.detach().var((0, 2, 3), correction=1)
            self.mean = (1 - momentum) * self.mean + momentum * mean.detach()
            self.var = (1 - momentum) * self.var + momentum * unbiased
            self.tracked += 1
        hidden = (maps - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
        hidden = hidden * gamma[:, None, None] + beta[:, None, None]
        return hidden.clamp(min=0).flatten(1) @ matrix.T + offset

    def split(self, w):
        return [part.view(shape) for part, shape in zip(w.split(self.sizes), self.SHAPES, strict=True)]

    def mask_of(self, kept):
        """A 0/1 vector from one choice for each tensor."""
        return torch.cat([torch.full((n,), float(k)).double() for n, k in zip(self.sizes, kept, strict=True)])

    @property
    def perturbed(self):
        kept = {
            "all": (1, 1, 1, 1, 1, 1), "no_norm_bias": (1, 0, 0, 0, 1, 0), "norm_only": (0, 0, 1, 1, 0, 0)
        }  # fmt: skip
        return self.mask_of(kept[self.flags.perturb])

    # the loss

    def costs(self, w, blocks, **how):
        """[(n,)] for each block, and its logits."""
        logits = [self.logits(w, block.x, **how) for block in blocks]
        costs = []
        for (weight, _), z, block in zip(SOURCES, logits, blocks, strict=False):
            costs.append(-weight * log_probability(z, 1.0)[torch.arange(len(block)), block.y])
        return costs, logits

    def total(self, w, blocks, part="all", **how):
        costs, _ = self.costs(w, blocks, **how)
        total = 0.0 * w.sum()
        for cost, block in zip(costs, blocks, strict=True):
            current = len(block) - block.memory
            chosen = {"all": cost, "current": cost[:current], "memory": cost[current:]}[part]
            total = total + chosen.sum() / len(block)
        if part != "current":
            total = total + self.penalty * w.square().sum()
        return total

    def g(self, w, blocks, track=False, part="all", count=True, with_loss=False):
        if count:
            self.forward_rows += rows_of(blocks)
            self.backward_rows += rows_of(blocks)
        w = w.clone().requires_grad_()
        total = self.total(w, blocks, part, track=track)
        gradient = torch.autograd.grad(total, w)[0]
        return (gradient, total.detach()) if with_loss else gradient

    def clean(self, blocks):
        self.clean_gradient = self.g(self.w, blocks, track=True)
        return self.clean_gradient

    def climbed(self, blocks):
        """The gradient of the ascent, None where there is no ascent."""
        part = self.flags.ascent_on
        if part == "memory" and not any(block.memory for block in blocks):
            return None
        if part != "all":  # a joint forward is gone back through once for each source
            self.backward_rows += sum(len(block) for block in blocks if 0 < block.memory < len(block))
        return self.g(self.w, blocks, part=part, count=False)

    def moved(self, w, blocks, at=None, rest=None, with_loss=False):
        """The gradient at perturbed weights. Rows that --sharp_on leaves out (of `rest`) have theirs at the others."""
        part = self.flags.sharp_on
        if part == "all":
            return self.g(w, blocks, with_loss=with_loss)
        others = {"current": "memory", "memory": "current"}[part]
        self.forward_rows += rows_of(blocks)
        self.backward_rows += sum(len(block) for block in blocks if has(block, part))
        u, high = self.g(w, blocks, part=part, count=False, with_loss=True)
        rest = blocks if rest is None else rest
        g, low = self.g(self.w if at is None else at, rest, part=others, count=False, with_loss=True)
        return (u + g, high + low) if with_loss else u + g

    def ball(self, d, delta=1e-12, rho=None):
        d = d * self.perturbed
        return (self.flags.rho if rho is None else rho) * d / (length(d) + delta)

    def fisher(self, blocks):
        """The sum over rows of squared gradients, in eval mode."""
        total = torch.zeros_like(self.w)
        for block in blocks:
            for row in range(len(block)):
                w = self.w.clone().requires_grad_()
                (cost,), _ = self.costs(w, [some(block, [row])], statistics=(self.mean, self.var))
                total += torch.autograd.grad(cost.sum(), w)[0].square()
        return total

    # the step

    @property
    def ascends(self):
        return self.task >= self.flags.sam_from_task

    def is_sharp(self, blocks):
        return self.ascends and (self.flags.sharp_on != "memory" or any(block.memory for block in blocks))

    def step(self, blocks):
        self.forward_rows = self.backward_rows = 0
        if not self.is_sharp(blocks):
            u = self.clean(blocks)
        else:
            reuses = self.rule is looksam and self.memory.t % self.flags.looksam_every  # and so has one pass
            u = self.rule(self, blocks)
            if self.flags.renormalize:
                u = u * length(self.clean_gradient) / (length(u) + 1e-12)
            if self.flags.sharp_on != "all" and self.flags.ascent_on == "all" and not reuses:
                self.backward_rows += sum(len(block) for block in blocks if 0 < block.memory < len(block))
            self.memory.first = False
        self.base(u)
        v, decay = self.teacher, self.flags.mesa_decay
        for name in ("w", "mean", "var"):
            setattr(v, name, decay * getattr(v, name) + (1 - decay) * getattr(self, name))
        v.tracked = self.tracked
        return u

    def base_direction(self, u):
        """(step direction, next momentum buffer) of torch's SGD."""
        d = u + DECAY * self.w
        buffer = d if self.momentum_buffer is None else MOMENTUM * self.momentum_buffer + d
        return (d + MOMENTUM * buffer if self.flags.optim_nesterov else buffer), buffer

    def base(self, u):
        direction, self.momentum_buffer = self.base_direction(u)
        self.w = self.w - self.lr * direction

    # boundaries

    def reset_teacher(self):
        self.teacher = SimpleNamespace(w=self.w, mean=self.mean, var=self.var, tracked=self.tracked)

    def begin_task(self, index, ids=range(ROWS), kept=()):
        self.task, self.epoch = index, 0
        self.memory = SimpleNamespace(h=None, previous=None, m=None, t=0, g_v=None, first=True)
        for stale in set(self.past) - set(ids) - set(kept):
            del self.past[stale]
        if not self.flags.mesa_carry:
            self.reset_teacher()

    def grow(self, net):
        """Takes in the larger head: new weights from the net, the rest of the state padded with 0."""
        before, shapes = self.sizes, [tuple(p.shape) for p in net.parameters()]
        self.SHAPES, self.sizes = shapes, [math.prod(shape) for shape in shapes]
        self.scaled = torch.cat([torch.full((n,), s) for n, s in zip(self.sizes, self.SCALED, strict=True)])

        def pad(vector, fill):
            if vector is None:
                return None
            parts = [p.clone() for p in fill.split(self.sizes)]
            for new, old in zip(parts, vector.split(before), strict=True):
                new[: len(old)] = old  # rows are appended, so the old entries are a prefix
            return torch.cat(parts)

        zeros, fresh = torch.zeros(sum(self.sizes)).double(), flat(net)
        self.w, self.teacher.w = pad(self.w, fresh), pad(self.teacher.w, fresh)
        self.momentum_buffer = pad(self.momentum_buffer, zeros)
        self.mask = pad(self.mask, zeros + 1)
        for name in ("h", "m"):
            setattr(self.memory, name, pad(getattr(self.memory, name), zeros))
        self.memory.t, self.memory.g_v = 0, None  # the next step is a SAM step


def rows_of(blocks):
    return sum(len(block) for block in blocks)


def has(block, part):
    return block.memory > 0 if part == "memory" else block.memory < len(block)


def sgd(o, blocks):
    return o.clean(blocks)


def sam(o, blocks):
    g, climbed = o.clean(blocks), o.climbed(blocks)
    return g if climbed is None else o.moved(o.w + o.ball(climbed), blocks)


def asam(o, blocks):
    g = o.clean(blocks)
    t = torch.where(o.scaled, o.w.abs() + o.flags.asam_eta, torch.ones_like(o.w))
    return o.moved(o.w + o.flags.rho * t * t * g / (length(t * g) + 1e-16), blocks)


def sampa(o, blocks):
    s = o.memory
    if s.h is None:
        s.h, s.previous, s.y = o.clean(blocks), blocks, o.w
        return s.h
    y = o.w - o.lr * o.base_direction(s.h)[0]
    h = o.clean_gradient = o.g(y, blocks, track=True)
    a = o.moved(o.w + o.ball(s.h), s.previous, at=s.y)
    s.h, s.previous, s.y = h, blocks, y
    return (1 - o.flags.sampa_lambda) * a + o.flags.sampa_lambda * h


def friendly_sam(o, blocks):
    g, s = o.clean(blocks), o.memory
    if s.m is None:
        s.m = d = g
    else:
        d = g - o.flags.friendly_sigma * s.m
        s.m = o.flags.friendly_lambda * s.m + (1 - o.flags.friendly_lambda) * g
    return o.moved(o.w + o.ball(d), blocks)


def stable_sam(o, blocks):
    g = o.clean(blocks)
    moved = o.moved(o.w + o.ball(g), blocks)
    return length(g) / (length(moved) + 1e-12) * moved


def cr_sam(o, blocks):
    g, low = o.g(o.w, blocks, track=True, with_loss=True)
    o.clean_gradient = g
    up, high = o.moved(o.w + o.ball(g), blocks, with_loss=True)
    down, other = o.moved(o.w - o.ball(g), blocks, with_loss=True)
    curvature, slope = high + other - 2 * low, high - other
    if not o.flags.cr_log:
        curvature = slope = torch.tensor(1.0)
    u = up
    if curvature.abs() >= 1e-8:
        u = u + o.flags.cr_gamma * (up + down - 2 * g) / curvature
    if slope.abs() >= 1e-8:
        u = u + o.flags.cr_beta * (up - down) / slope
    return u


def sparse_sam(o, blocks):
    g = o.clean(blocks)
    return o.moved(o.w + o.flags.rho * g / (length(g) + 1e-7) * o.mask, blocks)


def portions(n, m):
    """m contiguous sizes, the larger ones first."""
    return [n // m + (j < n % m) for j in range(m)]


def shards(blocks, m):
    """[[block, ...], ...]: each source of each block evenly over the shards, two rows to a forward at least."""
    parts = [n for block in blocks for n in (len(block) - block.memory, block.memory) if n]
    m = max(1, min(m, *parts, *(len(block) // 2 for block in blocks)))
    cut = [[] for _ in range(m)]
    for block in blocks:
        at, end = 0, len(block) - block.memory
        sizes = zip(portions(end, m), portions(block.memory, m), strict=True)
        for j, (n, k) in enumerate(sizes):
            rows = [*range(at, at + n), *range(end, end + k)]
            cut[j].append((Block(block.x[rows], memory=k, y=block.y[rows]), len(rows) / len(block)))
            at, end = at + n, end + k
    return cut


def chosen(block, part):
    """(n,): 1 for the rows of this part."""
    current = torch.arange(len(block)) < len(block) - block.memory
    return {"all": torch.ones(len(block)), "current": current, "memory": ~current}[part].double()


def msam(o, blocks, weighted=True, adjusted=True):
    cut, whole = shards(blocks, o.flags.msam_shards), rows_of(blocks)
    momentum = 1 - 0.9 ** (1 / len(cut)) if adjusted else 0.1
    update, o.clean_gradient = 0.0, 0.0
    for shard in cut:
        pieces, weights = zip(*shard, strict=True)
        share = rows_of(pieces) / whole if weighted else 1 / len(cut)

        def gradient(w, part="all", pieces=pieces, weights=weights, share=share, **how):
            w = w.clone().requires_grad_()
            costs, _ = o.costs(w, pieces, **how)
            costs = [c * chosen(piece, part) for c, piece in zip(costs, pieces, strict=True)]
            terms = [c.mean() * weight / share for c, weight in zip(costs, weights, strict=True)]
            if not weighted:
                terms = [c.mean() for c in costs]
            penalty = o.penalty * w.square().sum() if part != "current" else 0.0 * w.sum()
            return torch.autograd.grad(sum(terms) + penalty, w)[0]

        sharp = o.flags.sharp_on
        g = gradient(o.w, track=True, momentum=momentum)
        o.clean_gradient = o.clean_gradient + share * g
        u = gradient(o.w + o.ball(g), sharp)
        if sharp != "all":
            u = u + gradient(o.w, {"current": "memory", "memory": "current"}[sharp])
        update = update + share * u
        o.forward_rows += 2 * rows_of(pieces)
        o.backward_rows += rows_of(pieces) + sum(len(p) for p in pieces if sharp == "all" or has(p, sharp))
    return update


def saf(o, blocks, square=True, shift=0, over_active=False):
    f = o.flags
    w = o.w.clone().requires_grad_()
    costs, logits = o.costs(w, blocks, track=True)
    total, active = sum(c.mean() for c in costs) + o.penalty * w.square().sum(), 0
    extra = 0.0
    for block, z in zip(blocks, logits, strict=True):
        if "ids" not in block.columns:
            continue
        for row, key in enumerate(block.ids.tolist()):
            visit = len(o.past[key])
            if visit > f.saf_start and visit >= f.saf_lag + shift:
                past = o.past[key][visit - f.saf_lag - shift]
                extra = extra + divergence(past[None], z[row : row + 1, : len(past)], f.saf_tau).sum()
                active += 1
    for block, z in zip(blocks, logits, strict=True):
        if "ids" in block.columns:
            for row, key in enumerate(block.ids.tolist()):
                o.past[key].append(z[row].detach())
    rows = max(1, active) if over_active else rows_of(blocks)
    total = total + f.saf_lambda * (f.saf_tau**2 if square else 1) * extra / rows
    o.forward_rows, o.backward_rows = rows_of(blocks), rows_of(blocks)
    return torch.autograd.grad(total, w)[0]


def mesa(o, blocks, batch_statistics=False):
    f, v = o.flags, o.teacher
    if o.epoch < f.mesa_start:
        return o.clean(blocks)
    w = o.w.clone().requires_grad_()
    costs, logits = o.costs(w, blocks, track=True)
    total = sum(c.mean() for c in costs) + o.penalty * w.square().sum()
    for block, z in zip(blocks, logits, strict=True):
        past = o.logits(v.w, block.x, statistics=None if batch_statistics else (v.mean, v.var))
        rows = divergence(past, z, f.mesa_tau)
        total = total + f.mesa_lambda * f.mesa_tau**2 * rows.sum() / rows_of(blocks)
    o.forward_rows, o.backward_rows = 2 * rows_of(blocks), rows_of(blocks)
    return torch.autograd.grad(total, w)[0]


def looksam(o, blocks, per_tensor=False):
    s, g = o.memory, o.clean(blocks)
    groups = o.sizes if per_tensor else [len(g)]
    if s.t % o.flags.looksam_every == 0:
        u = o.moved(o.w + o.ball(g), blocks)
        pairs = zip(g.split(groups), u.split(groups), strict=True)
        s.g_v = torch.cat([b - (a @ b) / (a @ a) * a for a, b in pairs])
    else:
        pairs = zip(g.split(groups), s.g_v.split(groups), strict=True)
        u = g + torch.cat([o.flags.looksam_alpha * length(a) / (length(b) + 1e-12) * b for a, b in pairs])
    s.t += 1
    return u


def esam(o, blocks, strict=False, jointly=False, masked_norm=True):
    f = o.flags
    g = o.clean(blocks)
    kept = torch.ones_like(g)
    if not o.memory.first:
        draw = o.rng.random(len(o.sizes)) < f.esam_beta
        assert draw.any()
        kept = o.mask_of(draw)
    offset = f.rho / f.esam_beta * g * kept / (length(g * kept if masked_norm else g) + 1e-7)
    moved = o.w + offset
    if f.esam_gamma == 1:
        return o.moved(moved, blocks)
    with torch.no_grad():
        before, after = o.costs(o.w, blocks)[0], o.costs(moved, blocks)[0]
    o.forward_rows += rows_of(blocks)
    chosen = []
    for block, a, b in zip(blocks, after, before, strict=True):
        rise, current, rows, k = a - b, len(block) - block.memory, [], 0
        for start, n in ((0, len(block)),) if jointly else ((0, current), (current, block.memory)):
            if n:
                alone = n == len(block)  # a forward has two rows at least, for BatchNorm
                q = min(n, max(2 if alone else 1, math.floor(f.esam_gamma * n)))
                ranked, order = rise[start : start + n].sort(descending=True)
                assert q == n or ranked[q - 1] - ranked[q] > 1e-9  # the batch has no tie to break
                best = (order[: q - 1 if strict else q] + start).tolist()
                rows += best
                k += sum(row >= current for row in best)
        chosen.append(Block(block.x[rows], memory=k, y=block.y[rows]))
    return o.moved(moved, chosen, rest=blocks)


def gsam(o, blocks, swapped=False):
    f = o.flags
    least = f.rho if f.gsam_rho_min is None else f.gsam_rho_min
    g, climbed = o.clean(blocks), o.climbed(blocks)
    if climbed is None:
        return g
    moved = o.moved(o.w + o.ball(climbed, rho=least + (f.rho - least) * o.lr / LR), blocks)
    if swapped:
        return moved - f.gsam_alpha * (moved - (g @ moved) / (g @ g) * g)
    return moved - f.gsam_alpha * (g - (g @ moved) / (moved @ moved) * moved)


def c_flat(o, blocks, from_first=True):
    g0 = o.clean(blocks)
    g1 = o.moved(o.w + o.ball(g0), blocks)
    e1 = o.ball(g1 - g0)
    g2 = o.moved(o.w + e1, blocks)
    g3 = o.moved(o.w + (e1 if from_first else 0) + o.ball(g2), blocks)
    return g1 + o.flags.cflat_lambda * (g3 - g2)


RULES = {name: globals()[name] for name in ("sgd", *FAMILY)}


# Side by side


class Comparison:
    """An optimizer and its oracle, compared after every step."""

    def __init__(self, name, penalty=0.0, **flags):
        self.name, self.net = name, conv_bn_linear()
        known = OPTIMIZERS.load(name).Args()
        shared = {key: value for key, value in DEFAULTS.items() if hasattr(known, key)}
        if name == "stable_sam":
            del shared["renormalize"]  # on by default, and the oracle's rule already does it
        self.oracle = Family(self.net, RULES[name], penalty, **flags)
        self.method, self.optimizer = build(name, self.net, penalty, **(shared | flags))
        self.epoch_begins = True

    def step(self, blocks):
        o, sparse = self.oracle, self.name == "sparse_sam" and self.oracle.is_sharp(blocks)
        if sparse:
            fisher = o.fisher(blocks)
            old, due = o.mask, o.memory.first or (self.epoch_begins and o.epoch % o.flags.sparse_every == 0)
        self.epoch_begins = False
        objective, update = step(self.method, self.optimizer, blocks)
        if sparse:
            new = state(self.optimizer, "mask")
            if o.flags.sparse_mask == "dynamic" and old is None:
                ones = len(o.w) - math.ceil(o.flags.sparsity * len(o.w))
                old = torch.zeros_like(o.w)
                old[np.argsort(-o.rng.random(len(o.w)))[:ones].copy()] = 1
            o.mask = old if o.flags.sparse_mask == "dynamic" else new
        u = o.step(blocks)
        if sparse:
            assert_mask(o, old, new, due, fisher)
            o.mask = new
            if due and o.flags.sparse_mask != "dynamic":
                o.forward_rows += rows_of(blocks)
                o.backward_rows += rows_of(blocks)
        assert distance(torch.cat([part.flatten() for part in update]), u) < 1e-12 * max(1.0, u.abs().max())
        o.assert_equal(self.net)
        self.assert_state_equal()
        assert self.net.training and all(p.requires_grad for p in self.net.parameters())
        assert self.net[1].momentum == 0.1 and self.net[1].track_running_stats
        assert (objective.forward_rows, objective.backward_rows) == (o.forward_rows, o.backward_rows)

    def assert_state_equal(self):
        for name in ("h", "m", "g_v"):
            vector = getattr(self.oracle.memory, name)
            if vector is not None:
                used = self.oracle.perturbed if name == "m" else 1  # m is for the ascent alone
                assert ((state(self.optimizer, name) - vector) * used).abs().max() < 1e-12, name
        if self.name == "mesa":
            v, copy = self.oracle.teacher, self.optimizer.teacher
            (norm,) = [module for module in copy.modules() if isinstance(module, nn.BatchNorm2d)]
            assert (flat(copy) - v.w).abs().max() < 1e-12
            assert (norm.running_mean - v.mean).abs().max() < 1e-12
            assert (norm.running_var - v.var).abs().max() < 1e-12
            assert norm.num_batches_tracked == v.tracked

    def set_lr(self, lr):
        self.optimizer.set_lr(lr)
        self.oracle.lr = lr

    def begin_epoch(self, epoch, n_epochs=EPOCHS):
        self.optimizer.begin_epoch(epoch, n_epochs)
        self.oracle.epoch, self.epoch_begins = epoch, True

    def begin_task(self, index, ids=range(ROWS), kept=()):
        self.method.kept = torch.tensor(list(kept)) if kept else None
        self.optimizer.begin_task(task(index, ids))
        self.oracle.begin_task(index, ids, kept)
        self.begin_epoch(0)

    def run(self, steps):
        """Two steps an epoch, at a learning rate that falls with each."""
        for number, blocks in enumerate(steps):
            if number and number % 2 == 0:
                self.begin_epoch(number // 2)
            self.set_lr(LR * 0.9**number)
            self.step(blocks)


def assert_top(mask, scores, count):
    """`mask` holds the `count` largest scores."""
    assert mask.sum() == count
    if 0 < count < len(mask):
        assert scores[mask == 1].min() >= scores[mask == 0].max() * (1 - 1e-9)


def assert_mask(o, old, new, due, fisher):
    f, n = o.flags, len(o.w)
    assert ((new == 0) | (new == 1)).all()
    if f.sparse_mask == "fisher" and due:
        assert_top(new, fisher, math.floor(n * (1 - f.sparsity)))
    elif f.sparse_mask == "nm" and due:
        for part, score in zip(o.split(new), o.split(fisher), strict=True):
            if part.dim() == 1:
                assert (part == 1).all()
                continue
            # consecutive along the output channels of a kernel, along a row of a matrix
            part, score = (t.movedim(0, -1).flatten(0, -2) if t.dim() == 4 else t for t in (part, score))
            for row, row_score in zip(part, score, strict=True):
                for group, values in zip(row.split(f.sparse_m), row_score.split(f.sparse_m), strict=True):
                    assert_top(group, values, min(f.sparse_n, len(group)))
    elif f.sparse_mask == "dynamic" and due:
        budget = n - f.sparsity * n
        rate = f.drop_rate * (1 + math.cos(math.pi * o.epoch / EPOCHS)) / 2
        grown = math.floor(min(budget * rate, f.sparsity * n))
        stay = math.floor(budget - min(budget * rate, f.sparsity * n))
        free = int((1 - old).sum())  # fewer, where the head has grown: what was dropped comes back then
        if grown <= free:
            assert_top((new * old)[old == 1], o.clean_gradient.abs()[old == 1], stay)
        assert new.sum() == stay + grown and (new * (1 - old)).sum() == min(grown, free) > 0
    else:
        assert torch.equal(new, old)


CASES = [
    ("sam", {}),
    ("sam", dict(optim_nesterov=True)),
    ("asam", dict(asam_eta=0.05)),
    ("sampa", {}),
    ("sampa", dict(sampa_lambda=0.0)),
    ("sampa", dict(sampa_lambda=0.5, optim_nesterov=True)),
    ("sampa", dict(renormalize=True)),
    ("friendly_sam", {}),
    ("friendly_sam", dict(friendly_sigma=0.7, friendly_lambda=0.9, optim_nesterov=True)),
    ("stable_sam", {}),
    ("cr_sam", {}),
    ("cr_sam", dict(cr_gamma=0.5, cr_beta=0.1, renormalize=True)),
    ("cr_sam", dict(cr_log=True)),
    ("sparse_sam", dict(sparse_mask="fisher")),
    ("sparse_sam", dict(sparse_mask="fisher", sparsity=0.8, sparse_every=2)),
    ("sparse_sam", dict(sparse_mask="dynamic")),
    ("sparse_sam", dict(sparse_mask="dynamic", sparsity=0.8, sparse_every=2, drop_rate=0.9)),
    ("sparse_sam", dict(sparse_mask="dynamic", sparsity=0.2)),  # less to grow than to drop
    ("sparse_sam", dict(sparse_mask="nm")),
    ("sparse_sam", dict(sparse_mask="nm", sparse_m=3, sparse_every=3)),
    ("msam", dict(msam_shards=1)),
    ("msam", dict(msam_shards=3)),
    ("msam", dict(msam_shards=4)),
    ("msam", dict(msam_shards=3, renormalize=True)),
    ("saf", {}),
    ("saf", dict(saf_start=3, saf_lag=1, saf_tau=2.0)),
    ("saf", dict(saf_start=0, saf_lag=3, saf_tau=2.0)),
    ("mesa", dict(mesa_start=0)),
    ("mesa", dict(mesa_start=0, mesa_carry=True)),
    ("mesa", dict(mesa_start=1, mesa_tau=2.0)),
    ("looksam", {}),
    ("looksam", dict(looksam_every=2, looksam_alpha=0.1)),
    ("looksam", dict(renormalize=True)),
    ("esam", dict(esam_beta=1.0, esam_gamma=1.0)),
    ("esam", dict(esam_beta=0.6, esam_gamma=1.0)),
    ("esam", dict(esam_beta=0.6, esam_gamma=0.5)),
    ("gsam", {}),
    ("gsam", dict(gsam_rho_min=0.05)),
    ("gsam", dict(renormalize=True)),
    ("c_flat", {}),
    ("c_flat", dict(renormalize=True)),
]


def cases(entries):
    label = lambda name, flags: "-".join([name, *(f"{key}={value}" for key, value in flags.items())])  # noqa: E731
    return pytest.mark.parametrize("name, flags", [pytest.param(n, f, id=label(n, f)) for n, f in entries])


def test_the_cases_reach_the_whole_family():
    assert {name for name, _ in CASES} == set(FAMILY) <= set(OPTIMIZERS.names())


@cases(CASES)
def test_every_step_equals_the_equations(name, flags):
    """Weights, statistics, state and passes."""
    Comparison(name, **flags).run(stream())


@cases(CASES)
def test_a_task_boundary_forgets_what_is_of_the_old_task_and_nothing_else(name, flags):
    """As the oracle, which drops h, m, g_v, counters and v, and keeps momentum, the random mask and rows in memory."""
    both = Comparison(name, **flags)
    steps = stream()
    both.run(steps[:5])
    known = [1, *range(3, ROWS)]
    both.begin_task(1, ids=known[1:], kept=known[:1])
    both.run([[some(block, [row for row in known if row < len(block)]) for block in blocks] for blocks in steps[:3]])
    both.begin_task(2)
    both.run(steps[5:])


@pytest.mark.parametrize("boundary", (False, True), ids=("follow", "begin_task"))
@cases([(name, flags) for name, flags in CASES if "renormalize" not in flags])
def test_after_the_head_has_grown_the_steps_equal_the_equations(name, flags, boundary):
    """Momentum, h, m and v keep the old corner; new entries are 0 (v: the new weights; masks: 1)."""
    both = Comparison(name, **flags)
    steps = stream()
    both.run(steps[:5])
    enlarge(both.net)
    both.oracle.grow(both.net)
    if boundary:
        both.begin_task(1)
    else:
        both.optimizer.follow()
        both.assert_state_equal()
    for blocks in steps[5:7]:
        (block,) = blocks
        both.step([Block(block.x, y=(block.y + torch.arange(len(block))) % 5, ids=block.ids)])
    assert flat(both.net[4]).shape == (5 * 65,) and (both.oracle.momentum_buffer.split(both.oracle.sizes)[5] != 0).all()


# Two sources


@pytest.mark.parametrize("penalty", (0.0, 0.01))
@pytest.mark.parametrize("layout", ("er", "der"))
@cases(
    [("esam", dict(esam_gamma=gamma)) for gamma in (0.5, 0.3)]
    + [("msam", dict(msam_shards=m)) for m in (2, 3, 8)]
    + [(name, {}) for name in ("saf", "sampa", "cr_sam")]
    + [("mesa", dict(mesa_start=0))]
)
def test_stream_and_memory_together(name, flags, layout, penalty):
    Comparison(name, penalty, **flags).run(mixed(layout))


@pytest.mark.parametrize("penalty", (0.0, 0.01))
@pytest.mark.parametrize("layout", ("er", "der"))
@pytest.mark.parametrize("part", ("current", "memory"))
@pytest.mark.parametrize("name", ("sam", "gsam"))
def test_the_ascent_is_on_a_part_of_the_loss_and_the_descent_on_the_whole(name, part, layout, penalty):
    """Before there is memory, a step with an ascent on it alone is the base step in one pass."""
    Comparison(name, penalty, ascent_on=part).run(mixed(layout))


@pytest.mark.parametrize("penalty", (0.0, 0.01))
@pytest.mark.parametrize("layout", ("er", "der"))
@pytest.mark.parametrize("part", ("current", "memory"))
@cases(
    [(name, {}) for name in FAMILY if name not in ("saf", "mesa")]
    + [("cr_sam", dict(cr_log=True)), ("esam", dict(esam_beta=1.0, esam_gamma=1.0)), ("msam", dict(msam_shards=2))]
    + [("sam", dict(renormalize=True)), ("sparse_sam", dict(sparse_mask="dynamic"))]
)
def test_some_rows_are_taken_at_the_perturbed_weights_and_the_others_where_they_were(
    name, flags, part, layout, penalty
):
    Comparison(name, penalty, sharp_on=part, **flags).run(mixed(layout))


@pytest.mark.parametrize("climb", ("current", "memory"))
@pytest.mark.parametrize("sharp", ("current", "memory"))
@pytest.mark.parametrize("layout", ("er", "der"))
@pytest.mark.parametrize("name", ("sam", "gsam"))
def test_the_loss_of_the_ascent_and_the_rows_at_perturbed_weights_are_two_choices(name, layout, sharp, climb):
    Comparison(name, ascent_on=climb, sharp_on=sharp).run(mixed(layout))


@cases([(name, {}) for name in FAMILY if name not in ("saf", "mesa")])
def test_without_memory_sharp_rows_of_it_are_plain_descent(name, flags):
    plain = trajectory("sgd", stream())
    assert distance(plain, trajectory(name, stream(), sharp_on="memory", **flags)) == 0
    whole = trajectory(name, stream(), **flags)
    assert distance(whole, trajectory(name, stream(), sharp_on="current", **flags)) < 1e-12


@cases([("sam", {}), ("gsam", {}), ("friendly_sam", {}), ("c_flat", {}), ("looksam", {}), ("sparse_sam", {})])
def test_without_memory_its_ascent_is_plain_descent(name, flags):
    plain = trajectory("sgd", stream())
    assert distance(plain, trajectory(name, stream(), ascent_on="memory", **flags)) == 0
    assert distance(plain, trajectory(name, stream(), ascent_on="current", **flags)) > 1e-3


# Which parameters, and which tasks


@pytest.mark.parametrize("perturb, kept", [("no_norm_bias", (1, 0, 0, 0, 1, 0)), ("norm_only", (0, 0, 1, 1, 0, 0))])
@pytest.mark.parametrize("name", ("sam", "friendly_sam"))
def test_some_parameters_are_perturbed_and_all_are_stepped(name, perturb, kept):
    both = Comparison(name, perturb=perturb)
    start, seen = flat(both.net), []
    both.method.watch = lambda number, logits: seen.append(flat(both.net))
    for number, blocks in enumerate(stream((12, 9, 12, 12))):
        both.step(blocks)
        clean, moved = seen[2 * number :]
        offset, chosen = moved - clean, both.oracle.mask_of(kept) == 1
        assert (offset[~chosen] == 0).all() and abs(length(offset[chosen]) - RHO) < 1e-11
    assert ((flat(both.net) - start) != 0).float().mean() > 0.95


@pytest.mark.parametrize("perturb", ("no_norm_bias", "norm_only"))
@pytest.mark.parametrize("name", ("stable_sam", "sampa", "cr_sam", "msam", "looksam", "gsam", "c_flat"))
def test_every_offset_of_a_variant_leaves_the_other_parameters_alone(name, perturb):
    Comparison(name, perturb=perturb).run(stream())


@cases([(name, {}) for name in FAMILY if name not in ("saf", "mesa")] + [("sparse_sam", dict(sparse_mask="dynamic"))])
def test_tasks_before_sam_from_task_are_plain_descent_in_one_pass(name, flags):
    both = Comparison(name, sam_from_task=1, **flags)
    steps = stream()
    both.run(steps[:3])
    assert both.oracle.forward_rows == rows_of(steps[2])
    both.begin_task(1)
    both.run(steps[3:4])
    assert (both.oracle.forward_rows > rows_of(steps[3])) == (name != "sampa")
    both.run(steps[4:6])


# Masks, the visit clock, the teacher


def test_fisher_counts_the_rows_that_it_took():
    method, optimizer = build("sparse_sam", conv_bn_linear(), sparse_mask="fisher", sparsity=0.3, fisher_rows=5)
    counts = []
    for blocks in stream((12, 12)):
        objective, _ = step(method, optimizer, blocks)
        counts.append((objective.forward_rows, objective.backward_rows))
    assert counts == [(29, 29), (24, 24)]
    assert state(optimizer, "mask").sum() == math.floor(279 * (1 - 0.3))


def test_a_dynamic_mask_changes_in_a_task_of_one_epoch(start):
    """Once a task, by drop_rate; it is as large as it was."""
    masks = []
    trainer = start("er", optimizer="sparse_sam", sparse_mask="dynamic", drop_rate=0.4, stop_after=2)
    update = trainer.optimizer.step

    def watched(objective):
        result = update(objective)
        masks.append(state(trainer.optimizer, "mask").clone())
        return result

    trainer.optimizer.step = watched
    assert trainer.config.n_epochs == 1
    trainer.run()
    changes = [(number, (a > b).sum().item()) for number, (a, b) in enumerate(zip(masks, masks[1:], strict=False))]
    moved = masks[0].sum().item()
    assert [change for change in changes if change[1]] == [(7, int(0.4 * moved))] and len(masks) == 16
    assert all(mask.sum() == moved for mask in masks)


def test_the_random_mask_depends_on_the_generator_alone():
    masks = []
    for seed in (1, 1, 2):
        method, optimizer = build("sparse_sam", conv_bn_linear(), seed=seed, sparse_mask="dynamic")
        drawn = []
        for epoch, blocks in enumerate(stream((12, 12, 12))):
            optimizer.begin_epoch(epoch, EPOCHS)
            step(method, optimizer, blocks)
            drawn.append(state(optimizer, "mask").clone())
        masks.append(torch.stack(drawn))
    assert torch.equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).float().mean((1,)).min() > 0.2
    assert (masks[0][0] != masks[0][1]).sum() > 20 and (masks[0][1] != masks[0][2]).sum() > 20


@pytest.mark.parametrize("start", (0, 2))
def test_saf_and_mesa_begin_when_their_help_says(start):
    (blocks,) = stream((12,))
    shown = {"saf": "visited more often than this", "mesa": "epoch of a task, from 0, in which it begins"}
    for name, flags in (("saf", dict(saf_lag=1)), ("mesa", {})):
        field = next(f for f in dataclasses.fields(OPTIMIZERS.load(name).Args) if f.name == f"{name}_start")
        assert shown[name] in field.metadata["help"]
        method, optimizer = build(name, conv_bn_linear(), **{f"{name}_start": start}, **flags)
        active = []
        for epoch in range(5):  # one step each: as many visits before it
            optimizer.begin_epoch(epoch, 5)
            objective, _ = step(method, optimizer, blocks)
            active.append(bool(objective.loss.terms.get(name, torch.zeros(())).abs() > 1e-9))
        begins = start + 1 if name == "saf" else start
        assert active == [epoch >= begins for epoch in range(5)], name


def test_rows_without_ids_take_no_part_in_the_trajectory_loss():
    bare = [[Block(block.x, y=block.y)] for (block,) in stream()]
    assert distance(trajectory("saf", bare, saf_start=0, saf_lag=1), trajectory("sgd", bare)) < 1e-12
    assert distance(trajectory("saf", stream(), saf_start=0, saf_lag=1), trajectory("sgd", bare)) > 1e-4


# Identities


def trajectory(name, steps, **flags):
    """The weights after each step of an optimizer of the registry."""
    method, optimizer = build(name, conv_bn_linear(), **flags)
    weights = []
    for blocks in steps:
        step(method, optimizer, blocks)
        weights.append(flat(method.net))
    return torch.stack(weights)


def distance(a, b):
    return (a - b).abs().max()


@pytest.mark.parametrize(
    "name, flags, tolerance",
    [
        ("friendly_sam", dict(friendly_sigma=0.0), 1e-12),
        ("msam", dict(msam_shards=1), 1e-12),
        ("looksam", dict(looksam_every=1), 1e-12),
        ("gsam", dict(gsam_alpha=0.0), 1e-12),
        ("c_flat", dict(cflat_lambda=0.0), 1e-12),
        ("cr_sam", dict(cr_gamma=0.0, cr_beta=0.0), 1e-12),
        ("cr_sam", dict(cr_gamma=0.0, cr_beta=0.0, cr_log=True), 1e-12),
        ("esam", dict(esam_beta=1.0, esam_gamma=1.0), 1e-6),  # 1e-7 beside the norm, not 1e-12
        ("sparse_sam", dict(sparsity=0.0, sparse_mask="fisher"), 1e-6),
        ("sparse_sam", dict(sparsity=0.0, sparse_mask="dynamic"), 1e-6),
    ],
)
def test_with_its_own_part_off_a_variant_is_sam(name, flags, tolerance):
    plain = trajectory("sam", stream(), rho=RHO)
    assert distance(trajectory(name, stream(), rho=RHO, **flags), plain) < tolerance
    assert distance(trajectory("sgd", stream()), plain) > 1e-3


@pytest.mark.parametrize(
    "name, flags",
    [
        ("sam", {}),
        ("sam", dict(renormalize=True)),
        ("asam", {}),
        ("friendly_sam", {}),
        ("stable_sam", {}),
        ("cr_sam", {}),
        ("cr_sam", dict(cr_log=True)),
        ("sparse_sam", {}),
        ("msam", dict(msam_shards=1)),
        ("esam", dict(esam_beta=0.6, esam_gamma=1.0)),
        ("gsam", {}),
        ("c_flat", {}),
    ],
)
def test_with_radius_zero_a_variant_is_sgd(name, flags):
    assert distance(trajectory(name, stream(), rho=0.0, **flags), trajectory("sgd", stream())) < 1e-12


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_looksam_of_radius_zero_is_sgd_and_does_not_amplify_rounding(dtype):
    """g_v is zero there, and its reuse divides by its norm."""
    weights = []
    for name, flags in [("sgd", {}), ("looksam", dict(rho=0.0, looksam_every=3))]:
        net = conv_bn_linear(dtype=dtype)
        method, optimizer = build(name, net, **flags)
        for x, y in batches(dtype):
            step(method, optimizer, [Block(x, y=y)])
        weights.append(flat(net))
    assert distance(*weights) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", ("saf", "mesa"))
def test_without_its_term_a_free_variant_is_sgd(name):
    flags = {f"{name}_start": 0}
    off = trajectory(name, stream(), **flags, **{f"{name}_lambda": 0.0})
    assert distance(off, trajectory("sgd", stream())) < 1e-12
    assert distance(off, trajectory(name, stream(), **flags)) > 1e-5


def test_sampa_of_radius_zero_is_not_sgd():
    """The delayed batch remains."""
    assert distance(trajectory("sampa", stream(), rho=0.0), trajectory("sgd", stream())) > 1e-3


def test_sampa_goes_on_after_a_step_whose_gradient_at_the_previous_batch_is_not_finite():
    """It depends on what a step that is not taken leaves as it was, and would be the same again."""
    method, optimizer = build("sampa", conv_bn_linear())
    steps = stream()[:6]
    passes, bad, plain = [], [], type(method).loss

    def spoilt(*blocks):
        loss = plain(method, *blocks)
        passes.append(loss)
        factor = float("inf") if len(passes) in bad else 1.0
        return Loss({key: (block, factor * rows) for key, (block, rows) in loss.rows.items()}, loss.logits)

    method.loss = spoilt
    for blocks in steps[:3]:
        step(method, optimizer, blocks)
    bad.append(len(passes) + 2)  # the second pass of the fourth step: at the previous batch
    step(method, optimizer, steps[3])
    assert optimizer.skips.tolist() == [1, 1]
    step(method, optimizer, steps[4])
    assert optimizer.skips.tolist() == [1, 0]


def test_sampa_looks_as_far_ahead_as_a_step_may_go():
    method, optimizer = build("sampa", conv_bn_linear(), rho=0.0)
    optimizer.clip = 0.01
    ahead = []
    look = optimizer.base.look_ahead
    optimizer.base.look_ahead = lambda h, used: (
        ahead.append(length(torch.cat([part.flatten() for part in h]))) or look(h, used)
    )
    for blocks in stream():
        step(method, optimizer, blocks)
    assert ahead and max(ahead) <= 0.01 * (1 + 1e-4)


def test_a_mask_is_there_for_the_first_step_that_needs_it(start):
    """Which may be in an epoch in which none is due, where the memory is empty before."""
    flags = {"sparse_every": 2, "ascent_on": "memory", "batch_size": 100000, "n_epochs": 2, "buffer_size": 50}
    start("er", optimizer="sparse_sam", stop_after=1, debug_mode=0, **flags).run()


def test_esam_leaves_one_of_the_perturbed_tensors():
    method, optimizer = build("esam", conv_bn_linear(), perturb="no_norm_bias", esam_beta=0.1)
    objective = SimpleNamespace()
    optimizer.clock["started"], optimizer.is_sharp = 1, lambda objective: True
    perturbed = [i for i in range(len(optimizer.params)) if i not in optimizer._unperturbed]
    draws = [optimizer.draw(objective)["perturbed"] for _ in range(50)]
    assert perturbed and all(
        drawn[perturbed].any() and not drawn[list(optimizer._unperturbed)].any() for drawn in draws
    )
    optimizer.args = dataclasses.replace(optimizer.args, esam_beta=1.0)
    assert optimizer.draw(objective) == {}, "--renormalize 1 needs the whole clean gradient"


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["c_flat", "--ascent_on", "current", "--sharp_on", "memory"],
            "needs the gradient of the ascent's rows",
        ),
        (["gsam", "--gsam_rho_min", "0.01"], "--gsam_rho_min has no effect with --lr_scheduler none"),
        (["gsam", "--gsam_rho_min", "0.01", "--warmup_epochs", "1", "--n_epochs", "2"], None),
        (["gsam", "--gsam_rho_min", "0.01", "--model", "gdumb"], None),
    ],
)
def test_flags_of_a_variant_that_would_do_nothing_are_refused(words, message):
    argv = [*([] if "--model" in words else ["--model", "er"]), "--dataset", "seq-synth", "--optimizer", *words]
    if message is None:
        assert resolve(argv)
    else:
        with pytest.raises(UsageError, match=message):
            resolve(argv)


def test_stable_sam_is_renormalized_sam_and_has_the_norm_of_the_clean_gradient():
    stable = trajectory("stable_sam", stream(), rho=RHO)
    assert distance(stable, trajectory("sam", stream(), rho=RHO, renormalize=True)) < 1e-12
    assert distance(stable, trajectory("sam", stream(), rho=RHO)) > 1e-3
    method, optimizer = build("stable_sam", conv_bn_linear(), rho=RHO)
    for blocks in stream():
        objective, update = step(method, optimizer, blocks, trace=True)
        g, u = (torch.cat([part.flatten() for part in parts]) for parts in (objective.passes[0][1], update))
        assert abs(length(u) / length(g) - 1) < 1e-11


def test_renormalizing_needs_the_whole_clean_gradient(start):
    flags = dict(optimizer="esam", renormalize=1, buffer_size=20, debug_mode=1)
    start("er", esam_beta=1.0, **flags)
    with pytest.raises(UsageError, match="esam_beta 0.6"):
        start("er", esam_beta=0.6, **flags)


# Save and load


@pytest.mark.parametrize("at", (3, 6), ids=("before_growth", "after_growth"))
@cases([(name, flags) for name, flags in CASES if "renormalize" not in flags])
def test_a_file_in_mid_run_goes_on_bit_for_bit(name, flags, at, assert_same):
    """With what the generic test does not reach: epochs, random masks, v carried over, a batch of the past, growth."""
    first = build(name, conv_bn_linear(), **flags)
    steps = stream()
    go_on(*first, steps[:at])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    go_on(*first, steps[at:], start=at)

    net = conv_bn_linear()
    if at > 5:
        enlarge(net)
    nn.init.zeros_(net[4].weight)
    second = build(name, net, seed=8, **flags)
    file.seek(0)
    for part, saved in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    go_on(*second, steps[at:], start=at)
    for left, right in zip(first, second, strict=True):
        assert_same(left.state_dict(), right.state_dict())


def go_on(method, optimizer, steps, start=0):
    """An epoch every two steps, and a larger head after the fifth."""
    for number, blocks in enumerate(steps, start=start):
        if number % 2 == 0 and number:
            optimizer.begin_epoch(number // 2, EPOCHS)
        if number == 5:
            enlarge(method.net)
            optimizer.follow()
        step(method, optimizer, blocks)


@cases([("sampa", {}), ("friendly_sam", {}), ("looksam", {}), ("sparse_sam", dict(sparse_mask="dynamic"))])
def test_a_resumed_run_would_miss_its_state(name, flags):
    """The test above sees a forgotten h, m, g_v or mask."""
    weights = []
    for forget in (False, True):
        method, optimizer = build(name, conv_bn_linear(), **flags)
        go_on(method, optimizer, stream()[:4])
        if forget:
            momentum = optimizer.state_dict()["base"]
            _, optimizer = build(name, method.net, **flags)
            optimizer.base.load_state_dict(momentum)
        go_on(method, optimizer, stream()[4:5], start=4)
        weights.append(flat(method.net))
    assert distance(*weights) > 1e-6


# A package


def test_sam_and_gsam_equal_pytorch_optimizer():
    """Its norms are float32, hence the tolerance."""
    package = pytest.importorskip("pytorch_optimizer")
    sgd = dict(lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    for name in ("sam", "gsam"):
        net, other = conv_bn_linear(), conv_bn_linear()
        flags = dict(gsam_alpha=0.4) if name == "gsam" else {}
        method, optimizer = build(name, net, rho=RHO, **flags)
        if name == "sam":
            theirs = package.SAM(other.parameters(), torch.optim.SGD, rho=RHO, **sgd)
        else:
            base = torch.optim.SGD(other.parameters(), **sgd)
            constant = SimpleNamespace(step=lambda: RHO)
            theirs = package.GSAM(other.parameters(), base, other, constant, alpha=0.4)
        for blocks in stream():
            step(method, optimizer, blocks)
            (block,) = blocks
            if name == "sam":
                theirs.zero_grad()
                nn.functional.cross_entropy(other(block.x), block.y).backward()
                theirs.first_step(zero_grad=True)
                nn.functional.cross_entropy(other(block.x), block.y).backward()
                theirs.second_step(zero_grad=True)
            else:
                theirs.set_closure(nn.functional.cross_entropy, block.x, block.y)
                theirs.step()
            assert distance(flat(net), flat(other)) < 1e-7
        assert distance(flat(net), trajectory("sgd", stream())[-1]) > 1e-3


# The oracle tells wrong variants apart


def wander(rule, steps, **flags):
    """(weights, BatchNorm means) of the oracle alone, after each step."""
    oracle = Family(conv_bn_linear(), rule, **flags)
    oracle.mask = (torch.arange(len(oracle.w)) % 2).double()
    weights, means = [], []
    for number, blocks in enumerate(steps):
        oracle.epoch, oracle.lr = number // 2, LR * 0.9**number
        oracle.step(blocks)
        weights.append(oracle.w)
        means.append(oracle.mean)
    return torch.stack(weights), torch.stack(means)


def sam_of_each_tensor(o, blocks):
    g = o.clean(blocks)
    return o.g(o.w + torch.cat([RHO * part / length(part) for part in g.split(o.sizes)]), blocks)


def sam_with_decay_in_the_ascent(o, blocks):
    return o.g(o.w + o.ball(o.clean(blocks) + DECAY * o.w), blocks)


def sampa_on_the_present_batch(o, blocks):
    if o.memory.h is not None:
        o.memory.previous = blocks
    return sampa(o, blocks)


def sampa_that_looks_ahead_without_momentum(o, blocks):
    kept, o.momentum_buffer = o.momentum_buffer, None
    u = sampa(o, blocks)
    o.momentum_buffer = kept
    return u


def friendly_average_of_the_difference(o, blocks):
    """As in some ports: the average is fed with d."""
    old, lam = o.memory.m, o.flags.friendly_lambda
    u = friendly_sam(o, blocks)
    if old is not None:
        o.memory.m = lam * old + (1 - lam) * (o.clean_gradient - old)
    return u


def friendly_from_zero(o, blocks):
    if o.memory.m is None:
        o.memory.m = torch.zeros_like(o.w)
    return friendly_sam(o, blocks)


def cr_without_the_centre(o, blocks):
    g = o.clean(blocks)
    up, down = o.g(o.w + o.ball(g), blocks), o.g(o.w - o.ball(g), blocks)
    return up + o.flags.cr_gamma * (up + down) + o.flags.cr_beta * (up - down)


def sparse_with_the_norm_of_what_is_left(o, blocks):
    g = o.clean(blocks) * o.mask
    return o.g(o.w + RHO * g / (length(g) + 1e-7), blocks)


WRONG = {
    "one norm a tensor": ("sam", {}, sam_of_each_tensor),
    "decay in the ascent": ("sam", {}, sam_with_decay_in_the_ascent),
    "the present batch": ("sampa", {}, sampa_on_the_present_batch),
    "no momentum ahead": ("sampa", {}, sampa_that_looks_ahead_without_momentum),
    "m of d": ("friendly_sam", {}, friendly_average_of_the_difference),
    "m from 0": ("friendly_sam", {}, friendly_from_zero),
    "as long as SAM": ("stable_sam", {}, sam),
    "no centre": ("cr_sam", {}, cr_without_the_centre),
    "norm of the masked": ("sparse_sam", {}, sparse_with_the_norm_of_what_is_left),
    "equal shards": ("msam", {}, lambda o, blocks: msam(o, blocks, weighted=False)),
    "no tau^2": ("saf", {}, lambda o, blocks: saf(o, blocks, square=False)),
    "a visit too old": ("saf", {}, lambda o, blocks: saf(o, blocks, shift=1)),
    "mean of active rows": ("saf", {}, lambda o, blocks: saf(o, blocks, over_active=True)),
    "v on the batch": ("mesa", {}, lambda o, blocks: mesa(o, blocks, batch_statistics=True)),
    "g_v of each tensor": ("looksam", {}, lambda o, blocks: looksam(o, blocks, per_tensor=True)),
    "strictly greater": ("esam", {}, lambda o, blocks: esam(o, blocks, strict=True)),
    "one ranking": ("esam", {}, lambda o, blocks: esam(o, blocks, jointly=True)),
    "norm of all": ("esam", {}, lambda o, blocks: esam(o, blocks, masked_norm=False)),
    "roles swapped": ("gsam", {}, lambda o, blocks: gsam(o, blocks, swapped=True)),
    "constant radius": ("gsam", dict(gsam_rho_min=0.05), lambda o, blocks: gsam(fixed(o), blocks)),
    "not from w + e1": ("c_flat", {}, lambda o, blocks: c_flat(o, blocks, from_first=False)),
}


def fixed(o):
    o.flags["gsam_rho_min"] = o.flags.rho
    return o


@pytest.mark.parametrize("mistake", WRONG)
def test_the_equations_tell_mistakes_apart(mistake):
    name, flags, rule = WRONG[mistake]
    steps = mixed("er")
    right, wrong = wander(RULES[name], steps, **flags)[0], wander(rule, steps, **flags)[0]
    assert torch.isfinite(wrong).all() and distance(right, wrong) > 1e-6


def test_the_statistics_tell_shards_that_move_them_too_fast():
    right, wrong = (wander(rule, stream())[1] for rule in (msam, lambda o, blocks: msam(o, blocks, adjusted=False)))
    assert distance(right, wrong) > 1e-3
