"""What an optimizer sees of a method: parts, shards and hardest rows of a loss, its precision, terms added to it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flatcl.models._blocks import tensor_of
from flatcl.models._method import Block, Loss, Method, Objective
from flatcl.utils.contracts._steps import CLASSES, batches, conv_bn_linear
from flatcl.utils.registry import OPTIMIZERS


class Replay(Method):
    """Stream and memory in one block, or in two; the second one at half weight, and a penalty."""

    has_memory = True

    def loss(self, *blocks):
        rows, first = {}, None
        for weight, name, block in zip((1.0, 0.5), ("current", "memory"), blocks, strict=False):
            logits = self.net(block.x)
            first = logits[: len(block) - block.memory] if first is None else first
            rows[name] = (block, weight * cross_entropy(logits, block.y, reduction="none"))
        return Loss(rows, first, {"size": 0.01 * sum(p.square().sum() for p in self.parameters())})


def plain():
    """A network whose rows do not see each other."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def block(n, memory, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64)
    return Block(x, memory, y=torch.randint(0, CLASSES, (n,), generator=generator), ids=torch.arange(n) + 100 * seed)


LAYOUTS = {
    "joint": lambda: (block(11, 4, 1),),
    "apart": lambda: (block(7, 0, 1), block(5, 5, 2)),
    "stream": lambda: (block(7, 0, 1),),
}
SPLIT = pytest.mark.parametrize("layout", list(LAYOUTS))


def objective(layout, net=None, trace=False):
    method = Replay(net or plain(), None, None)
    return Objective(method, LAYOUTS[layout](), list(method.parameters()), trace)


def near(a, b, tolerance=1e-13):
    return all((x - y).abs().max() < tolerance for x, y in zip(a, b, strict=True))


@SPLIT
def test_stream_and_memory_are_the_whole_gradient(layout):
    whole = objective(layout).gradient()
    found = {climb: objective(layout).gradients(climb) for climb in ("current", "memory")}
    for gradient, _ in found.values():
        assert near(gradient, whole)
    both = torch._foreach_add(found["current"][1], found["memory"][1])
    assert near(both, whole)
    one = objective(layout)
    parts = []
    for b, weight in zip(one.blocks, (1.0, 0.5), strict=False):
        stream = slice(0, len(b) - b.memory)
        logits = one.method.net(b.x[stream])
        if len(logits):
            parts.append(weight * cross_entropy(logits, b.y[stream], reduction="sum") / len(b))
    assert near(found["current"][1], torch.autograd.grad(sum(parts), one.params))


@SPLIT
@pytest.mark.parametrize("number", (1, 2, 3, 4, 50))
def test_shards_together_are_the_whole(layout, number):
    """Their gradients, and what they leave to be remembered, in the order of the rows; for uneven parts too."""
    whole = objective(layout)
    gradient = whole.gradient()
    one = objective(layout)
    total, shares, sizes = None, [], []
    for share, shard in one.shards(one.num_shards(number)):
        part = torch._foreach_mul(shard.gradient(), share)
        total = part if total is None else torch._foreach_add(total, part)
        shares.append(share)
        sizes.append([len(rows) for b in shard.blocks for rows in b.sources])
    expected = {"joint": min(number, 4), "apart": min(number, 5), "stream": min(number, 7)}[layout]
    assert len(shares) == expected == one.num_shards(number) and sum(shares) == pytest.approx(1)
    for part in zip(*sizes, strict=True):
        assert max(part) - min(part) <= 1 and min(part) > 0
    assert near(total, gradient)
    assert one.loss.rows.keys() == whole.loss.rows.keys()
    for name, (about, _) in whole.loss.rows.items():
        assert (one.loss.costs[name] - whole.loss.costs[name]).abs().max() < 1e-13
        assert one.loss.rows[name][0] is one.blocks[whole.blocks.index(about)]
    assert (one.loss.logits - whole.loss.logits).abs().max() < 1e-13
    assert one.loss.total.item() == pytest.approx(whole.loss.total.item(), abs=1e-13)
    assert one.forward_rows == one.backward_rows == one.num_rows


@SPLIT
def test_the_hardest_rows_are_those_that_have_grown_most_in_each_source(layout):
    one = objective(layout)
    before = one()
    with torch.no_grad():
        for p in one.params:
            p.mul_(2.0)
    after = one()
    for fraction in (0.01, 0.5, 0.76, 1.0):
        worst = one.hardest(fraction, before, after)
        for position, (full, chosen) in enumerate(zip(one.blocks, worst.blocks, strict=True)):
            name = list(after.rows)[position]
            growth = (after.costs[name] - before.costs[name]).detach().numpy()
            expected = []
            for rows in full.sources:
                q = max(1, int(np.floor(fraction * len(rows) + 1e-9)))
                ranked = sorted(rows, key=lambda row: -growth[row])[:q]
                expected += sorted(ranked)
            assert chosen.ids.tolist() == full.ids[expected].tolist()
            assert torch.equal(chosen.x, full.x[expected]) and torch.equal(chosen.y, full.y[expected])
            assert chosen.memory == sum(row >= len(full) - full.memory for row in expected)


class Several(Method):
    """Two terms about each block, one of them between those of the other, and an output of each."""

    def loss(self, first, second):
        z, z2 = self.net(first.x), self.net(second.x)
        rows = {
            "a": (first, z.square().mean(1)),
            "b": (second, z2.square().mean(1)),
            "c": (first, z.abs().mean(1)),
            "d": (second, z2.abs().mean(1)),
        }
        return Loss(rows, z, outputs={"second": (second, z2), "first": (first, z)})


@pytest.mark.parametrize("sizes", ((7, 5), (6, 6)), ids=["unequal", "equal"])
def test_terms_say_which_block_they_are_about_in_any_order(sizes):
    """Also where the sizes of the blocks would not give it away."""
    method = Several(plain(), None, None)
    one = Objective(method, (block(sizes[0], 0, 1), block(sizes[1], sizes[1], 2)), list(method.parameters()))
    loss = method.loss(*one.blocks)
    for climb, names in (("current", "ac"), ("memory", "bd")):
        own = sum(loss.terms[name] for name in names)
        climbed = Objective(method, one.blocks, one.params).gradients(climb)[1]
        assert near(climbed, torch.autograd.grad(own, one.params, retain_graph=True))


def test_what_several_terms_and_outputs_are_about_is_kept_in_shards():
    method = Several(plain(), None, None)
    blocks = (block(7, 0, 1), block(5, 5, 2))
    whole, one = (Objective(method, blocks, list(method.parameters())) for _ in range(2))
    whole.gradient()
    for _, shard in one.shards(3):
        shard.gradient()
    for given in ("rows", "outputs"):
        for name, (about, tensor) in getattr(whole.loss, given).items():
            found, joined = getattr(one.loss, given)[name]
            assert found is about and (joined - tensor).abs().max() < 1e-13


def test_the_hardest_rows_of_a_block_are_those_of_the_sum_of_its_terms():
    method = Several(plain(), None, None)
    one = Objective(method, (block(7, 0, 1), block(5, 5, 2)), list(method.parameters()))
    before = one()
    with torch.no_grad():
        for p in one.params:
            p.mul_(2.0)
    after = one()
    worst = one.hardest(0.5, before, after)
    for full, chosen, names in zip(one.blocks, worst.blocks, ("ac", "bd"), strict=True):
        growth = sum(after.costs[name] - before.costs[name] for name in names)
        rows = growth.topk(len(full) // 2).indices.sort().values
        assert torch.equal(chosen.ids, full.ids[rows])


def test_parameters_that_are_not_wanted_have_no_gradient_but_count_as_used_later():
    one = objective("apart")
    wanted = [False, True, True, False]
    gradient, _ = one.gradients(wanted=wanted)
    whole = objective("apart").gradient()
    for part, full, is_wanted in zip(gradient, whole, wanted, strict=True):
        assert torch.equal(part, full if is_wanted else torch.zeros_like(full))
    assert one.used == wanted
    one.gradient()
    assert all(one.used)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_a_guide_is_the_memorys_whole_gradient_at_the_clean_weights(name):
    """Whatever parameters or rows a variant leaves out, and in whatever shards it goes."""
    kind = OPTIMIZERS.load(name)
    method = Replay(plain(), None, None).train()
    method.guides = {"memory": ("memory",)}
    seen = {}
    method.combine = lambda update, guides: seen.update(update=update, guides=guides) or update
    optimizer = kind(method, 0.1, 0.0, kind.Args())
    optimizer.begin_task(type("Task", (), {"index": 0, "train": type("Split", (), {"ids": torch.arange(300)})}))
    optimizer.begin_epoch(0, 1)
    for number in range(3):
        blocks = (block(7, 0, 3 * number), block(5, 5, 3 * number + 1))
        loss = method.loss(*blocks)
        direct = torch.autograd.grad(loss.terms["memory"], list(method.parameters()))
        one = Objective(method, blocks, optimizer.params)
        update = optimizer.step(one)
        assert seen["update"] is update and list(seen["guides"]) == ["memory"]
        if name == "sampa" and number > 0:  # whose clean pass is at the look-ahead
            assert not near(seen["guides"]["memory"], direct, 1e-6)
        else:
            assert near(seen["guides"]["memory"], direct)
        assert one.loss.total.item() == pytest.approx(loss.total.item(), rel=0.05)


def test_under_autocast_a_second_pass_sees_the_perturbed_weights():
    """Autocast keeps the casts of weights while a context lasts: one context for two passes would miss the move."""
    method = Replay(plain().float(), None, None)
    method.amp = torch.bfloat16
    (b,) = LAYOUTS["stream"]()
    b = Block(b.x.float(), y=b.y)
    optimizer = OPTIMIZERS.load("sam")(method, 0.1, 0.0, OPTIMIZERS.load("sam").Args())
    one = Objective(method, (b,), optimizer.params)
    clean = one.gradient()
    offset = [torch.full_like(p, 0.5) for p in optimizer.params]
    with optimizer.at(offset):
        moved = one.gradient()
        fresh = Objective(method, (b,), optimizer.params).gradient()
    assert near(moved, fresh, 1e-9) and not near(moved, clean, 1e-3)
    assert all(g.dtype == torch.float32 for g in moved)


def test_under_autocast_the_network_is_in_bfloat16_and_what_is_kept_in_float32():
    method = Replay(plain().float(), None, None)
    method.amp = torch.bfloat16
    inside = []
    method.net[3].register_forward_hook(lambda net, inputs, output: inside.append(output.dtype))
    (b,) = LAYOUTS["stream"]()
    b = Block(b.x.float(), y=b.y)
    one = Objective(method, (b,), list(method.parameters()))
    one.gradient()
    assert inside == [torch.bfloat16]
    assert one.loss.logits.dtype == one.loss.total.dtype == torch.float32
    assert {costs.dtype for costs in one.loss.costs.values()} == {torch.float32}


def test_under_autocast_whole_numbers_and_flags_stay_what_they_are():
    class Noting(Replay):
        def loss(self, block):
            logits = self.net(block.x)
            rows, large = torch.arange(len(block)) + 2**24 + 1, logits > 0
            outputs = {"rows": rows, "large": (block, large), "logits": logits}
            return Loss({"current": cross_entropy(logits, block.y, reduction="none")}, logits, outputs=outputs)

    method = Noting(plain().float(), None, None)
    method.amp = torch.bfloat16
    (b,) = LAYOUTS["stream"]()
    found = Objective(method, (Block(b.x.float(), y=b.y),), list(method.parameters()))().outputs
    assert [tensor_of(found[name]).dtype for name in found] == [torch.int64, torch.bool, torch.float32]
    assert found["rows"].tolist() == [2**24 + 1 + i for i in range(len(b))]


class Featured(Method):
    """Reaches its logits by the features, not by the network as a whole, and predicts in a way of its own."""

    def forward(self, x, task=None):
        return torch.zeros(len(x), CLASSES)

    def loss(self, stream):
        logits = self.net[4](self.net[:4](stream.x))
        return Loss({"current": cross_entropy(logits, stream.y, reduction="none")}, logits)


def test_an_added_term_gets_the_logits_of_every_block_however_the_method_reaches_them():
    x, y = next(batches())
    runs = []
    for kind in (Featured, Replay):
        method = kind(conv_bn_linear(), None, None).train()
        one = Objective(method, (Block(x, y=y),), list(method.parameters()))
        seen = []
        one.add("own", lambda logits, seen=seen: seen.extend(logits) or [0.1 * z.square().mean(1) for z in logits])
        one.gradient()
        runs.append((seen[0].detach(), method.net[1].num_batches_tracked.item(), one))
    (z1, tracked1, one1), (z2, tracked2, one2) = runs
    assert (z1 - z2).abs().max() < 1e-12 and tracked1 == tracked2 == 1
    assert one1.forward_rows == 2 * one2.forward_rows == 2 * len(y)  # the other way costs a forward, and says so
    assert set(one1.loss.rows) == {"current", "own"}
    assert one1.loss.terms["own"].item() == pytest.approx(0.1 * z1.square().mean().item())
    assert not method.net._forward_hooks
