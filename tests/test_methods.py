"""What every method must keep, over the registry; and what the replay methods store, draw and minimise."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from flatcl.models._method import Block, Loss, Method, Objective
from flatcl.models._replay import ReplayMethod
from flatcl.models.der import Der
from flatcl.utils.arguments import resolve
from flatcl.utils.contracts import methods
from flatcl.utils.contracts._runs import Skipped, flags_for, next_batch
from flatcl.utils.errors import UsageError
from flatcl.utils.optim._sharpness import frozen_statistics
from flatcl.utils.registry import METHODS, OPTIMIZERS

NAMES = METHODS.names()
IN_CLASS_IL = [name for name in NAMES if "class-il" in METHODS.load(name).settings]
REPLAY = [name for name in IN_CLASS_IL if issubclass(METHODS.load(name), ReplayMethod)]
WITH_LOGITS = [name for name in REPLAY if issubclass(METHODS.load(name), Der)]
JOINT_FORWARD = ("er", "er_sam")
RESERVOIRS = [name for name in REPLAY if not METHODS.load(name).own_memory]
PUBLISHED = ("published: ", "ours: ")  # how the origin of such a value begins
QUICK = dict(debug_mode=1, stop_after=2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
@pytest.mark.parametrize("name", IN_CLASS_IL)
def test_learns_two_tasks_under_every_optimizer(name, optimizer):
    methods.trains_two_tasks(name, optimizer)


@pytest.mark.parametrize("title", [title for title in methods.CONTRACTS if " under " not in title])
@pytest.mark.parametrize("name", IN_CLASS_IL)
def test_keeps_the_contracts(name, title):
    try:
        methods.CONTRACTS[title](methods.subject(name))
    except Skipped as why:
        pytest.skip(str(why))


def test_a_contract_is_skipped_only_for_what_has_no_sense():
    """The methods whose rows of the memory are marked, and those with a reservoir, are all that there are."""
    assert set(RESERVOIRS) >= {"er", "derpp", "mgser_sam", "agem_r", "hal"}
    for contract, names in (
        (methods.marks_memory, ["er", "gss", "derpp"]),
        (methods.stores_images_as_they_are, RESERVOIRS),
    ):
        for name in names:
            contract(name)  # raises where it is skipped


SETTINGS_PLUGIN = '''"""A setting that nobody learns in, and a method that learns in one setting only."""

from flatcl.datasets.seq_synth import SeqSynth
from flatcl.models.sgd import SGD
from flatcl.utils.registry import DATASETS, METHODS


@DATASETS.register("odd-data")
class OddData(SeqSynth):
    setting = "odd-il"


@METHODS.register("only_domains")
class OnlyDomains(SGD):
    settings = ("domain-il",)
'''


@pytest.fixture
def odd(tmp_path):
    (tmp_path / "odd.py").write_text(SETTINGS_PLUGIN)
    return str(tmp_path / "odd.py")


@pytest.mark.parametrize("name", NAMES)
def test_refuses_a_setting_that_it_does_not_learn_in(odd, name):
    with pytest.raises(UsageError) as caught:
        resolve(["--plugin", odd, "--model", name, "--dataset", "odd-data"])
    (problem,) = caught.value.problems
    assert name in problem and "odd-data" in problem and "odd-il" in problem


def test_a_method_of_one_setting_is_refused_elsewhere(odd):
    with pytest.raises(UsageError, match="only_domains cannot learn seq-synth"):
        resolve(["--plugin", odd, "--model", "only_domains", "--dataset", "seq-synth"])
    assert resolve(["--plugin", odd, "--model", "only_domains", "--dataset", "perm-mnist"]).model == "only_domains"


# what the replay methods remember and draw


@pytest.mark.parametrize("name", [name for name in REPLAY if not METHODS.load(name).loss_needs_task])
def test_after_the_first_task_every_step_replays_old_classes(start, name):
    trainer = start(name, debug_mode=1, stop_after=1, **flags_for(name, minibatch_size=7))
    fresh = trainer.method.draw(next_batch(trainer, 0))
    assert len(fresh) == 1 and fresh[0].memory == 0  # there is nothing to replay yet
    trainer.run()
    batch = next_batch(trainer, task=1)
    blocks = trainer.method.draw(batch)
    assert set(batch.y.tolist()) == {2, 3}
    memory = [block for block in blocks if block.memory and "ids" in block.columns]  # no made images
    assert memory and sum(len(block) - block.memory for block in blocks) == len(batch.y)
    for block in memory:
        assert block.memory == 7 or "minibatch_size" not in flags_for(name, minibatch_size=7)
        assert set(block.y[-7:].tolist()) <= {0, 1}
    assert torch.equal(blocks[0].x[: len(batch.y)], batch.inputs)
    assert torch.equal(blocks[0].y[: len(batch.y)], batch.y)


@pytest.mark.parametrize("name", RESERVOIRS)
def test_the_memory_has_all_classes_that_have_passed(start, name):
    trainer = start(name, buffer_size=30, **QUICK)
    trainer.run()
    assert set(trainer.method.buffer.all()["y"].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("optimizer", ("sgd", "sam"))
@pytest.mark.parametrize("name", WITH_LOGITS)
def test_stored_logits_are_those_of_the_clean_pass_before_the_update(start, name, optimizer):
    """In train mode, on the augmented images, at the unmoved weights; in the first step and with a memory."""
    trainer = start(name, optimizer=optimizer, buffer_size=64, lr=0.5, **({"rho": 0.5} if optimizer == "sam" else {}))
    method = trainer.method.train()
    for number, batch in enumerate(trainer.stream.epoch(trainer.benchmark[0].train)):
        if number == 3:
            break
        before = copy.deepcopy(method.net).train()
        with torch.no_grad():
            expected = before(batch.inputs)
            wrong = [before.eval()(batch.inputs), before.train()(trainer.augment.plain(batch.x))]
        method.observe(batch, trainer.optimizer)
        wrong.append(method.net(batch.inputs).detach())
        rows = method.buffer.all()
        part = slice(16 * number, 16 * number + 16)
        assert torch.equal(rows["x"][part], batch.x) and torch.equal(rows["y"][part], batch.y)
        assert torch.allclose(rows["logits"][part], expected, rtol=0, atol=1e-6)
        assert not rows["logits"].requires_grad
        assert all((expected - other).abs().max() > 1e-3 for other in wrong)


@pytest.mark.parametrize("name", [name for name in JOINT_FORWARD if name in REPLAY])
def test_er_minimises_one_mean_over_stream_and_memory(start, name):
    trainer = start(name, minibatch_size=5, **QUICK)
    trainer.run()
    method, batch = trainer.method, next_batch(trainer)
    (block,) = method.draw(batch)
    assert (len(block), block.memory) == (21, 5)
    with frozen_statistics(method):
        loss = method.loss(block)
        logits = method.net(block.x)  # one forward, one BatchNorm batch
    rows = logits.logsumexp(1) - logits[torch.arange(21), block.y]
    assert loss.total.item() == pytest.approx(rows.sum().item() / 21, rel=1e-5)
    two_means = (rows[:16].mean() + rows[16:].mean()).item()
    assert loss.total.item() != pytest.approx(two_means, rel=1e-2)


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_der_and_derpp_minimise_their_equations(start, name):
    """Separate forwards; the squared distance is a mean over rows and the ten classes."""
    flags = flags_for(name, alpha=0.3, beta=0.7)
    trainer = start(name, minibatch_size=6, **flags, **QUICK)
    trainer.run()
    method = trainer.method
    blocks = method.draw(next_batch(trainer))
    stream, memory = blocks[:2]
    assert len(blocks) == 1 + len(flags) and [block.memory for block in blocks] == [0] + [6] * len(flags)
    with frozen_statistics(method), torch.no_grad():
        loss = method.loss(*blocks)
        logits, replayed = method.net(stream.x), method.net(memory.x)
        expected = {"current": (logits.logsumexp(1) - logits[torch.arange(16), stream.y]).sum() / 16}
        expected["logits"] = 0.3 * (replayed - memory.logits).square().sum() / (6 * 10)
        if "beta" in flags:
            labelled = method.net(blocks[2].x)
            expected["labels"] = 0.7 * (labelled.logsumexp(1) - labelled[torch.arange(6), blocks[2].y]).sum() / 6
    assert torch.equal(loss.logits, logits)
    assert {term: value.item() for term, value in loss.terms.items()} == pytest.approx(
        {term: value.item() for term, value in expected.items()}, rel=1e-4
    )
    assert loss.total.item() == pytest.approx(sum(expected.values()).item(), rel=1e-4)


@pytest.mark.parametrize("name", [name for name in WITH_LOGITS if "beta" in flags_for(name, beta=1)])
def test_derpp_draws_twice_independently(start, name):
    """Rows are told apart by their logits. Two independent draws of 10 of 40 share 2.5 rows on average."""
    trainer = start(name, buffer_size=40, minibatch_size=10, **QUICK)
    trainer.run()
    batch, shared = next_batch(trainer), []
    for _ in range(200):
        _, first, second = trainer.method.draw(batch)
        ids = [{row.numpy().tobytes() for row in block.logits} for block in (first, second)]
        assert len(ids[0]) == len(ids[1]) == 10
        shared.append(len(ids[0] & ids[1]))
    # hypergeometric variance: 10 * 1/4 * 3/4 * 30/39 = 1.442
    assert abs(np.mean(shared) - 2.5) < 4 * (1.442 / 200) ** 0.5


@pytest.mark.parametrize("name", RESERVOIRS)
def test_both_tasks_have_their_share_of_the_memory(start, name):
    """Two tasks of 128 images, memory 40: a hypergeometric share of mean 20 and variance 40 / 4 * 216 / 255 = 8.47."""
    shares = []
    for seed in range(4):
        trainer = start(name, seed=seed, buffer_size=40, stop_after=2, n_epochs=1, optimizer="sgd")
        trainer.run()
        labels = trainer.method.buffer.all()["y"]
        assert trainer.method.buffer.num_seen == 256 and len(labels) == 40
        shares.append((labels < 2).sum().item())
    assert abs(np.mean(shares) - 20) < 4 * (8.47 / 4) ** 0.5, shares


# published values


@pytest.mark.parametrize("name", NAMES)
def test_published_values_apply_exactly_where_they_were_published(name):
    method = METHODS.load(name)
    assert method.published
    for (key, size), row in method.published.items():
        dataset, _, protocol = key.partition(":")
        argv = ["--model", name, "--dataset", dataset, *(["--protocol", protocol] if protocol else [])]
        if size is not None:
            argv += ["--buffer_size", str(size)]
        config = resolve(argv)
        assert row and config.optimizer == method.default_optimizer
        for flag, (value, source) in row.items():
            assert config.values[flag] == value, (key, size, flag)
            assert config.origins[flag] == source and source.startswith(PUBLISHED) and len(source) > 20
        if size is not None:
            assert config.origins["buffer_size"] == "argv" and config.buffer_size == size

        plain = resolve([*argv, "--model_config", "default"])
        assert not [origin for origin in plain.origins.values() if origin.startswith(PUBLISHED)]
        given = resolve([*argv, *(f"--{flag}={_other(config.flags[flag], value)}" for flag, (value, _) in row.items())])
        for flag, (value, _) in row.items():
            assert given.origins[flag] == "argv" and (given.values[flag] != value or flag == "n_epochs")


def _other(flag, value):
    """Another value in the flag's bounds; streams insist on one epoch."""
    if flag.name == "n_epochs":
        return value
    others = flag.choices or (value + 1, value / 2)
    return next(other for other in others if other != value and flag.check(other) is None)


@pytest.mark.parametrize("name", [name for name in REPLAY if METHODS.load(name).published])
def test_values_published_for_one_memory_do_not_speak_for_another(name):
    method = METHODS.load(name)
    dataset = next(iter(method.published))[0]
    assert (dataset, 177) not in method.published and (dataset, None) not in method.published
    config = resolve(["--model", name, "--dataset", dataset, "--buffer_size", "177"])
    assert not [origin for origin in config.origins.values() if origin.startswith(PUBLISHED)]


def test_values_for_one_optimizer_do_not_speak_for_another():
    argv = ["--model", "mgser_sam", "--dataset", "seq-cifar10", "--buffer_size", "500"]
    row = METHODS.load("mgser_sam").published["seq-cifar10", 500]
    assert resolve(argv).rho == row["rho"][0]
    other = resolve([*argv, "--optimizer", "asam"])
    assert other.origins["rho"] == "default" and other.rho == OPTIMIZERS.load("asam").Args().rho
    assert other.origins["alpha"] == row["alpha"][1] and other.guide == row["guide"][0]
    assert resolve([*argv, "--optimizer", "adam"]).lr == 1e-3


# the engine's side of a method


class Two(Method):
    """Two terms, one of them a penalty; guides take parts of the gradient."""

    def loss(self, stream):
        logits = self.net(stream.x)
        rows = {"a": logits.square().mean(1), "b": logits.abs().mean(1)}
        return Loss(rows, logits, {"c": sum((p.square() if self.squares else p).sum() for p in self.parameters())})


class SumOfWeights(nn.Module):
    """Its two weights have one gradient between them, which autograd may hand out as one tensor."""

    def __init__(self):
        super().__init__()
        self.slow, self.fast = (nn.Parameter(0.1 * torch.randn(3, 12)) for _ in range(2))

    def forward(self, x):
        return x.flatten(1) @ (self.slow + self.fast).T


GUIDES = [
    {}, {"one": ("a",)}, {"one": ("a",), "two": ("b", "c")}, {"all": ("a", "b", "c")}, {"none": ("missing",)},
    {"one": ("b", "c")}, {"one": ("a", "b")}, {"one": ("b",), "two": ("c",)},
]  # fmt: skip


@pytest.mark.parametrize("squares", (True, False))
@pytest.mark.parametrize("shared", (False, True))
@pytest.mark.parametrize("guides", GUIDES)
def test_guides_are_parts_of_the_clean_gradient(guides, shared, squares):
    """Also where autograd's tensors share memory: a sum's gradient is one number, a sum of weights has one gradient."""
    torch.manual_seed(0)
    net = (SumOfWeights() if shared else nn.Sequential(nn.Flatten(), nn.Linear(12, 3))).double()
    method = Two(net, None, None)
    method.guides, method.squares = guides, squares
    block = Block(torch.randn(5, 3, 2, 2).double())
    objective = Objective(method, (block,), list(net.parameters()))
    gradient = objective.gradient()

    def direct(terms):
        loss = method.loss(block)
        return torch.autograd.grad(sum(loss.terms[term] for term in terms), list(net.parameters()))

    def near(a, b):
        return all(torch.allclose(x, y, rtol=0, atol=1e-12) for x, y in zip(a, b, strict=True))

    assert near(gradient, direct(("a", "b", "c")))
    assert objective.guides.keys() == guides.keys() - {"none"}
    for guide, part in objective.guides.items():
        assert near(part, direct(guides[guide]))
    rest = {"a", "b", "c"} - {term for terms in guides.values() for term in terms}
    parts = [part for part in (rest, *guides.values()) if set(part) & {"a", "b"}]  # the penalty costs no rows
    assert objective.forward_rows == 5 and objective.backward_rows == 5 * len(parts)
    assert near(objective.gradient(), direct(("a", "b", "c")))  # a later pass has no guides, and the same gradient
