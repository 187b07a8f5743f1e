"""gdumb, pnn and xder against small computations of their defining steps, row by row and in float64."""

import colorsys
import copy
import math

import numpy as np
import pytest
import torch
from made import make_mnist
from torch import nn

from flatcl.models._views import strong_views, supcon
from flatcl.utils.arguments import args_of, resolve
from flatcl.utils.errors import UsageError
from flatcl.utils.optim._sharpness import frozen_statistics
from flatcl.utils.registry import BACKBONES

NAMES = ("gdumb", "pnn", "xder")
ODD = '''"""One channel, not square."""

from flatcl.datasets.seq_synth import SeqSynth
from flatcl.utils.registry import DATASETS


@DATASETS.register("odd-shape")
class OddShape(SeqSynth):
    shape = (1, 6, 9)
    mean = std = None

    def load(self, root):
        self.shape, shape = (3, 8, 8), self.shape
        arrays = super().load(root)
        self.shape = shape
        flat = [(images.flatten(1)[:, :54].reshape(-1, 1, 6, 9), labels) for images, labels in arrays]
        return tuple(flat)
'''


def cost(logits, label):
    """Cross entropy of one row, from its logits in float64."""
    return math.log(sum(math.exp(z) for z in logits)) - logits[label]


def rows_of(tensor):
    return tensor.detach().double().tolist()


def batches(trainer, task, number):
    for count, batch in enumerate(trainer.stream.epoch(trainer.benchmark[task].train)):
        if count == number:
            return
        yield batch


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flags", [{"amp": "bf16"}, {"dataset": "odd-shape"}], ids=str)
def test_in_bfloat16_and_on_grey_images_that_are_not_square(start, tmp_path, name, flags):
    from flatcl.utils.registry import load_plugin

    (tmp_path / "odd.py").write_text(ODD)
    load_plugin(str(tmp_path / "odd.py"))
    trainer = start(name, debug_mode=1, stop_after=3, optimizer="sam", **flags)
    summary = trainer.run()
    assert summary["status"] == "finished" and summary["cost"]["skipped_steps"] == 0
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in trainer.method.parameters())


@pytest.mark.parametrize("name, least", [("gdumb", 0.7), ("xder", 0.7), ("pnn", 0.95)])
def test_learns_all_tasks_of_real_digits(start, name, least):
    """Fine-tuning ends at 0.2 in class-il."""
    flags = {"fitting_epochs": 40} if name == "gdumb" else {}
    metrics = start(name, dataset="seq-digits", backbone="mnistmlp", **flags).run()["metrics"]
    assert metrics.keys() == ({"task-il"} if name == "pnn" else {"class-il", "task-il"})
    assert metrics["task-il" if name == "pnn" else "class-il"]["final_average_accuracy"] > least


# ----------------------------------------------------------------------------------------------------------- gdumb


def test_gdumb_only_collects_until_the_last_task_has_passed(start):
    """Two tasks of 128 images in batches of 16, memory 40: 16 batches without a step, then 3 an epoch of the fit."""
    trainer = start("gdumb", buffer_size=40, stop_after=2, fitting_epochs=5)
    before = copy.deepcopy(trainer.method.net.state_dict())
    seen = []
    observe = trainer.method.observe

    def watched(batch, optimizer, trace=False):
        done = observe(batch, optimizer, trace)
        same = all(torch.equal(before[key], value) for key, value in trainer.method.net.state_dict().items())
        seen.append((len(done), same, optimizer.base.lr, batch.ids))
        return done

    trainer.method.observe = watched
    trainer.run()
    assert [entry[0] for entry in seen] == [0] * 16 + [1] * 15
    assert all(entry[1] for entry in seen[:16]) and not any(entry[1] for entry in seen[16:])
    assert trainer.cost.forward_rows == trainer.cost.backward_rows == 5 * 40
    memory = sorted(trainer.method.remembered_ids().tolist())
    assert len(memory) == 40
    orders = [torch.cat([entry[3] for entry in seen[first : first + 3]]).tolist() for first in range(16, 31, 3)]
    assert all(sorted(order) == memory for order in orders), "an epoch of the fit is one pass over the memory"
    assert len({tuple(order) for order in orders}) == 5, "in another order each time"


@pytest.mark.parametrize("joint", (0, 1))
def test_gdumb_fits_after_the_last_task_of_the_run(start, joint):
    trainer = start("gdumb", fitting_epochs=2, **({"joint": 1} if joint else {"start_from": 1, "stop_after": 4}))
    trainer.run()
    tasks = 1 if joint else 3
    collected = 640 if joint else 384
    assert trainer.cost.forward_rows == 200 and len(trainer.progress.tasks) == tasks
    assert (trainer.cost.batches, trainer.cost.steps) == (
        collected // 16 + 2 * 7,
        2 * 7,
    ) and trainer.method.buffer.num_seen == collected


def test_gdumb_may_be_evaluated_between_the_epochs_of_its_fit():
    assert resolve(["--model", "gdumb", "--dataset", "seq-synth", "--eval_every", "16"]).eval_every == 16


def test_a_resumed_gdumb_keeps_the_points_of_its_tasks(tmp_path, monkeypatch):
    """It has taken no step while it collects, so that its tasks are more than its steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from flatcl.utils.commands.train import main
    from flatcl.utils.engine.trainer import Trainer

    words = ["--model", "gdumb", "--dataset", "seq-synth", "--buffer_size", "20", "--fitting_epochs", "1"]
    finish = Trainer._finish_task

    def stopping(self, task):
        finish(self, task)
        if len(self.progress.tasks) == 3:
            self._stop_signal = 15

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish_task", stopping)
        assert main([*words, "--non_verbose", "--results_path", str(tmp_path)]) == 143
    (folder,) = [file.parent for file in tmp_path.rglob("config.json")]
    assert main(["--resume", str(folder), "--non_verbose"]) == 0
    (board,) = (folder / "tensorboard").iterdir()
    points = EventAccumulator(str(board), size_guidance={"scalars": 0}).Reload().Scalars("accuracy/class-il")
    assert [point.step for point in points] == [1, 2, 3, 4, 5]


def test_gdumb_fits_after_a_stream_without_tasks(start, tmp_path):
    make_mnist(tmp_path)
    trainer = start(
        "gdumb", dataset="mnist-360", backbone="mnistmlp", base_path=tmp_path, fitting_epochs=3, buffer_size=30
    )
    before = copy.deepcopy(trainer.method.net.state_dict())
    trainer.run()
    assert trainer.cost.forward_rows == 90
    assert trainer.cost.batches == len(trainer.benchmark[0].train.batch_lengths) + 3 * 2 and trainer.cost.steps == 3 * 2
    assert not torch.equal(before["classifier.weight"], trainer.method.net.classifier.weight)


def test_gdumb_follows_cosine_restarts_after_two_epochs_of_warm_up(start):
    trainer = start("gdumb", maxlr=0.4, minlr=0.002, lr=0.3)
    task = trainer.benchmark[4]
    ours = [trainer.method.learning_rate(task, epoch, 0.3) for epoch in range(1, 65)]
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(reference, T_0=1, T_mult=2, eta_min=0.002)
    theirs = [0.04, 0.4]
    for _ in range(62):
        restarts.step()
        theirs.append(reference.param_groups[0]["lr"])
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert [epoch for epoch, rate in enumerate(ours) if rate == pytest.approx(0.4)] == [1, 2, 4, 8, 16, 32]


def test_gdumb_peaks_at_the_runs_rate_unless_told_otherwise(start):
    trainer = start("gdumb", optimizer="adam")
    assert trainer.method.learning_rate(trainer.benchmark[4], 2, 7.0) == pytest.approx(1e-3)


def test_gdumbs_reservoir_gives_each_task_its_share(start):
    """Hypergeometric: 40 of 256, half of which are of the first task: mean 20, variance 10 * 216 / 255."""
    shares = []
    for seed in range(6):
        trainer = start("gdumb", seed=seed, buffer_size=40, stop_after=2, fitting_epochs=1)
        trainer.run()
        shares.append((trainer.method.buffer.all()["y"] < 2).sum().item())
    assert abs(np.mean(shares) - 20) < 4 * (8.47 / 6) ** 0.5, shares


def test_gdumbs_greedy_sampler_is_algorithm_1(start):
    """Row by row: a row enters if its class has less than memory / classes; a full memory loses one of the largest."""
    trainer = start("gdumb", buffer_size=21, gdumb_sampler="greedy", permute_classes=1)
    method, classes, lost = trainer.method, set(), []
    for task in range(5):
        for batch in batches(trainer, task, 8):
            for row in range(len(batch.y)):
                label, image = batch.y[row].item(), batch.ids[row].item()
                before = method.buffer.all().get("ids", torch.empty(0)).tolist()
                labels = method.buffer.all()["y"].tolist() if before else []
                part = copy.copy(batch)
                part.x, part.y, part.ids = batch.x[row : row + 1], batch.y[row : row + 1], batch.ids[row : row + 1]
                method.remember(part, None)
                after = method.buffer.all()["ids"].tolist()
                classes.add(label)
                enters = labels.count(label) < 21 / len(classes)
                assert (image in after) == enters
                gone = set(before) - set(after)
                assert len(after) == min(21, len(before) + enters) and len(gone) == (enters and len(before) == 21)
                for slot, old in enumerate(before):
                    if old in gone:
                        assert labels.count(labels[slot]) == max(labels.count(c) for c in classes)
                        lost.append(labels[:slot].count(labels[slot]))  # which of its class
    stored = method.buffer.all()
    counts = torch.bincount(stored["y"], minlength=10)
    assert counts.min() >= 2 and counts.max() <= 3 and counts.sum() == 21
    assert len(set(lost)) > 3, "any one of the class may go"
    images = trainer.benchmark.joint_split()
    assert torch.equal(images.images[stored["ids"]], stored["x"])
    assert torch.equal(images.labels[stored["ids"]], stored["y"])


def test_gdumbs_greedy_sampler_takes_batches_as_it_takes_rows(start):
    """The same rows, one by one and in batches, are the same memory: what is drawn is drawn in the same order."""
    memories = []
    for one_by_one in (True, False):
        trainer = start("gdumb", buffer_size=21, gdumb_sampler="greedy", seed=4)
        for task in range(5):
            for batch in batches(trainer, task, 8):
                parts = [slice(i, i + 1) for i in range(16)] if one_by_one else [slice(None)]
                for rows in parts:
                    part = copy.copy(batch)
                    part.x, part.y, part.ids = batch.x[rows], batch.y[rows], batch.ids[rows]
                    trainer.method.remember(part, None)
        memories.append(sorted(trainer.method.buffer.all()["ids"].tolist()))
    assert memories[0] == memories[1]


def test_gdumbs_cutmix_is_a_box_of_other_images_and_their_share_of_the_loss(start):
    trainer = start("gdumb", cutmix_alpha=1.0)
    method, (batch,) = trainer.method, batches(trainer, 0, 1)
    mixed, number, areas = 0, 600, []
    for _ in range(number):
        (block,) = method.draw(batch)
        assert torch.equal(block.y, batch.y)
        if "share" not in block.columns:
            assert torch.equal(block.x, batch.inputs) and torch.equal(block.ids, batch.ids)
            continue
        assert "ids" not in block.columns, "a mixture is no image whose outputs are recorded"
        mixed += 1
        share = block.share[0].item()
        differs = (block.x != batch.inputs).any(1).any(0)  # (H, W)
        rows, columns = differs.any(1).nonzero()[:, 0], differs.any(0).nonzero()[:, 0]
        areas.append(share)
        if len(rows) == 0:
            continue
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        assert len(rows) * len(columns) / 64 == pytest.approx(share) and (block.share == share).all()
        piece = block.x[:, :, box[0], box[1]].flatten(1)
        sources = batch.inputs[:, :, box[0], box[1]].flatten(1)
        partner = (piece[:, None] == sources[None]).all(2).int().argmax(1)
        assert torch.equal(piece, sources[partner])
        if piece.shape[1] >= 3 * 9:  # too many pixels for two images to agree
            assert sorted(partner.tolist()) == list(range(16)) and torch.equal(block.other, batch.y[partner])
    assert abs(mixed - number / 2) < 4 * (number / 4) ** 0.5
    assert np.mean(areas) > 0.15 and max(areas) > 0.5 and min(areas) < 0.1
    with frozen_statistics(method):
        while "share" not in block.columns or block.share[0] == 0:
            (block,) = method.draw(batch)
        loss, z = method.loss(block), rows_of(method.net(block.x))
    share = block.share[0].item()
    wanted = [
        (1 - share) * cost(z[i], block.y[i].item()) + share * cost(z[i], block.other[i].item()) for i in range(16)
    ]
    assert rows_of(loss.costs["memory"]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("probability, least, most", [(0.0, 0, 0), (0.2, 39, 81), (1.0, 300, 300)])
def test_gdumb_mixes_batches_with_the_probability_given(start, probability, least, most):
    """300 batches; at 0.2 within three standard deviations (6.9) of 60."""
    trainer = start("gdumb", cutmix_alpha=1.0, cutmix_prob=probability)
    (batch,) = batches(trainer, 0, 1)
    blocks = [trainer.method.draw(batch)[0] for _ in range(300)]
    assert least <= sum("share" in block.columns for block in blocks) <= most


@pytest.mark.parametrize(
    "dataset, size, probability",
    [("seq-cifar100", 500, 1.0), ("seq-cifar100", 2000, 1.0), ("seq-cifar10", 500, 0.5), ("seq-synth", 500, 0.5)],
)
def test_gdumbs_published_runs_on_cifar100_mix_every_batch(dataset, size, probability):
    config = resolve(["--model", "gdumb", "--dataset", dataset, "--buffer_size", str(size)])
    assert config.cutmix_prob == probability


@pytest.mark.parametrize(
    "words, problem",
    [
        (("--budget_rows", "1000"), "--budget_rows has no effect on gdumb"),
        (("--n_epochs", "3"), "--n_epochs has no effect on gdumb"),
        (("--lr_scheduler", "cosine", "--n_epochs", "1"), "--lr_scheduler"),
        (("--cutmix_prob", "1"), "--cutmix_prob has no effect without CutMix. Give --cutmix_alpha too"),
        (("--maxlr", "0.1", "--minlr", "0.2"), "--minlr must be at most --maxlr 0.1, got 0.2"),
        (("--lr", "0.1", "--minlr", "0.2"), "--minlr must be at most --lr 0.1, got 0.2"),
    ],
)
def test_gdumb_refuses_what_would_have_no_effect(words, problem):
    with pytest.raises(UsageError, match=problem):
        resolve(["--model", "gdumb", "--dataset", "seq-synth", *words])


# ------------------------------------------------------------------------------------------------------------- pnn


def test_pnn_is_equation_2_of_progressive_networks(start):
    """Three columns of an MLP, in float64, from the weights alone."""
    trainer = start("pnn", backbone="mnistmlp", hidden=7, debug_mode=1, stop_after=3)
    trainer.run()
    net = trainer.method.net.double()
    state = {name: tensor.double() for name, tensor in net.state_dict().items()}
    (batch,) = batches(trainer, 3, 1)
    x = batch.inputs.double().flatten(1)

    def linear(name, h):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    layers = ("body.1", "body.3", "classifier")
    outputs = []  # column, layer
    for k in range(3):
        h, own = x, []
        for i, layer in enumerate(layers):
            z = linear(f"columns.{k}.{layer}", h)
            if k > 0 and i > 0:
                side = f"laterals.{k}.{i - 1}"
                past = torch.cat([state[f"{side}.alpha"][j] * outputs[j][i - 1] for j in range(k)], 1)
                z = z + linear(f"{side}.expand", linear(f"{side}.reduce", past).clamp(min=0))
            h = z.clamp(min=0) if i < 2 else z
            own.append(h)
        outputs.append(own)
        assert torch.allclose(net(batch.inputs.double(), index=k), own[-1], rtol=0, atol=1e-12)
        assert torch.equal(trainer.method(batch.inputs.double(), k), net(batch.inputs.double(), index=k))
    assert torch.allclose(net(batch.inputs.double()), outputs[-1][-1], rtol=0, atol=1e-12)
    for untrained in (3, 4, None):
        assert torch.equal(trainer.method(batch.inputs.double(), untrained), net(batch.inputs.double()))


def test_pnn_never_forgets_and_only_its_newest_column_learns(start):
    trainer = start("pnn", n_epochs=2, optimizer="sam", optim_mom=0.9, seed=1)
    method, states, names = trainer.method, [], []
    end_task = method.end_task

    def kept(task):
        states.append({key: value.clone() for key, value in method.net.state_dict().items()})
        names.append(set(trainer.optimizer.names))
        end_task(task)

    method.end_task = kept
    matrix = np.array(trainer.run()["accuracy"]["task-il"])
    for task in range(5):
        assert (matrix[task:, task] == matrix[task, task]).all()
        assert all(f".{task}." in name for name in names[task])
    assert matrix.diagonal().mean() > 0.85
    for state in states:
        for key, value in state.items():
            if f".{len(method.net.columns) - 1}." not in key[:12]:
                assert torch.equal(value, states[int(key.split(".")[1])][key]), key
    assert any("running_mean" in key for key in states[0]), "statistics are frozen with their column"
    assert not torch.equal(states[0]["columns.0.1.running_mean"], torch.zeros(4))


def test_pnns_step_learns_every_adapter_and_counts_the_frozen_columns(start):
    trainer = start("pnn", debug_mode=1, stop_after=3)
    trainer.run()
    method, (batch,) = trainer.method, batches(trainer, 2, 1)
    method.rows = [0, 0]
    (block,) = method.draw(batch)
    assert method.rows == [2 * 16, 0]
    with frozen_statistics(method):
        loss = method.loss(block)
        assert torch.equal(loss.logits, method.net(batch.inputs))
    assert rows_of(loss.costs["current"]) == pytest.approx(
        [cost(z, y) for z, y in zip(rows_of(loss.logits), batch.y.tolist(), strict=True)], rel=1e-5
    )
    learnt = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert all(name.startswith(("net.columns.2.", "net.laterals.2.")) for name in learnt)
    gradients = torch.autograd.grad(loss.total, list(learnt.values()))
    silent = [name for name, g in zip(learnt, gradients, strict=True) if not g.any()]
    assert silent in ([], ["net.columns.2.0.bias"]), "a bias before BatchNorm has no effect"


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 6)], ids=str)
@pytest.mark.parametrize("name", BACKBONES.names())
def test_the_stages_of_a_backbone_are_its_forward(name, shape):
    cls = BACKBONES.load(name)
    net = cls(shape, 10, args_of(cls)() if args_of(cls) else None)
    x = torch.rand(4, *shape)
    for training in (True, False):
        h = x
        net.train(training)
        with frozen_statistics(net):
            for weigh, activation in net.stages:
                h = activation(weigh(h))
            assert torch.equal(h, net(x))


@pytest.mark.parametrize("name", [*BACKBONES.names(), "tiny-bn"])
def test_pnn_makes_columns_of_every_backbone(start, name):
    """The first column is the backbone itself; a later one is, where its adapters give nothing."""
    trainer = start("pnn", backbone=name, debug_mode=1, stop_after=2, batch_size=4)
    trainer.run()
    net, (batch,) = trainer.method.net.eval(), batches(trainer, 1, 1)
    with torch.no_grad():
        assert torch.equal(net(batch.inputs, index=0), net.columns[0](batch.inputs))
        joined = net(batch.inputs)
        for lateral in net.laterals[1]:
            lateral.expand.weight.zero_(), lateral.expand.bias.zero_()
        assert len(net.laterals[1]) == len(net.columns[1].stages) - 1
        assert torch.allclose(net(batch.inputs), net.columns[1](batch.inputs), atol=1e-5)
        assert not torch.allclose(net(batch.inputs), joined, atol=1e-5)


def test_pnn_refuses_a_backbone_that_shows_no_stages(tmp_path):
    (tmp_path / "closed.py").write_text(
        '"""Closed."""\nfrom torch import nn\nfrom flatcl.utils.registry import BACKBONES\n'
        "@BACKBONES.register('closed')\nclass Closed(nn.Module):\n    pass\n"
    )
    argv = ["--plugin", str(tmp_path / "closed.py"), "--model", "pnn", "--dataset", "seq-synth"]
    with pytest.raises(UsageError, match="closed has none"):
        resolve([*argv, "--backbone", "closed"])
    assert resolve([*argv, "--backbone", "mnistmlp"]).model == "pnn"


# ------------------------------------------------------------------------------------------------------------ xder


@pytest.fixture
def xder(start):
    """An X-DER run in the third of five tasks of two classes, with a memory of the first two."""
    trainer = start(
        "xder", stop_after=2, buffer_size=24, minibatch_size=9, simclr_batch_size=5, n_epochs=2, lr=0.1,
        alpha=0.4, beta=0.7, gamma=0.8, lambd=0.3, eta=0.2, m=0.5, simclr_temp=2.0, simclr_num_aug=3,
    )  # fmt: skip
    trainer.run()
    trainer.method.begin_task(trainer.benchmark[2])
    return trainer


def test_xders_loss_is_that_of_the_paper_term_by_term(xder):
    method, (batch,) = xder.method, batches(xder, 2, 1)
    stream, first, second, views = method.draw(batch)
    with frozen_statistics(method), torch.no_grad():
        loss = method.loss(stream, first, second, views)
        z, z1, z2, zv = (rows_of(method.net(block.x)) for block in (stream, first, second, views))
    y, y1, y2 = (block.y.tolist() for block in (stream, first, second))
    assert set(y) == {4, 5} and {*y1, *y2} == {0, 1, 2, 3} and torch.equal(loss.logits.double(), torch.tensor(z))
    want = {"current": np.mean([cost(row[4:6], label - 4) for row, label in zip(z, y, strict=True)])}
    stored = rows_of(first.logits)
    want["logits"] = 0.4 * np.mean(
        [(a - b) ** 2 for r, s in zip(z1, stored, strict=True) for a, b in zip(r, s, strict=True)]
    )
    want["labels"] = 0.7 * np.mean([cost(row[:4], label) for row, label in zip(z2, y2, strict=True)])

    def violators(gaps):
        return [gap for gap in gaps if gap > 0]

    past = []
    for row in z:
        p = [math.exp(a) for a in row[:6]]
        past.append((max(p[:4]) - max(p[4:])) / sum(p) + 0.5)
    want["past"] = 0.2 * np.mean(violators(past)) if violators(past) else 0.0
    known, gaps = set(first.slot.tolist()), []
    rows = [*zip(z, y, strict=True), *zip(z1, y1, strict=True)]
    rows += [(r, label) for r, label, slot in zip(z2, y2, second.slot.tolist(), strict=True) if slot not in known]
    assert 16 + 9 < len(rows) < 16 + 18, "some rows were drawn twice"
    for row, label in rows:
        own = label // 2 * 2
        gaps.append(max(row[6:]) + 0.5 - max(row[own : own + 2]))
    assert 0 < len(violators(gaps)) < len(gaps)
    future = 0.2 * np.mean(violators(gaps))

    images, labels = len(views) // 3, views.y.tolist()
    assert images == 16 + 5 and views.memory == 15
    total = 0.0
    for head in (6, 8):
        f = [np.array(row[head : head + 2]) / np.linalg.norm(row[head : head + 2]) for row in zv]
        for i in range(len(f)):
            others = [j for j in range(len(f)) if j != i]
            norm = math.log(sum(math.exp(f[i] @ f[j] / 2.0) for j in others))
            same = [j for j in others if labels[j] == labels[i]]
            total += np.mean([norm - f[i] @ f[j] / 2.0 for j in same]) / 3  # of an image, the mean over its views
    want["views"] = 0.3 * total / (2 * images)

    found = {name: term.item() for name, term in loss.terms.items()}
    parts = [found.pop(name) for name in ("future", "future_logits", "future_labels")]
    assert sum(parts) == pytest.approx(future, rel=1e-4)
    assert found == pytest.approx(want, rel=1e-4)
    assert loss.total.item() == pytest.approx(sum(want.values()) + future, rel=1e-4)


def test_xders_past_heads_are_not_pushed_down_by_the_past_constraint(xder):
    """The maximum over the past is a constant: only through the softmax of the current heads do logits move."""
    method, (batch,) = xder.method, batches(xder, 2, 1)
    blocks = method.draw(batch)
    with frozen_statistics(method):
        loss = method.loss(*blocks)
    (given,) = torch.autograd.grad(loss.terms["past"], loss.logits, retain_graph=True)
    z = loss.logits.detach().double().requires_grad_()
    p = z[:, :6].softmax(1)
    gap = p[:, :4].max(1).values.detach() + 0.5 - p[:, 4:].max(1).values
    (wanted,) = torch.autograd.grad(0.2 * gap[gap > 0].mean(), z)
    assert (gap > 0).any() and torch.allclose(given.double(), wanted, rtol=0, atol=1e-7)


def test_xder_leaves_the_statistics_of_batchnorm_to_stream_and_replay(xder):
    method, (batch,) = xder.method, batches(xder, 2, 1)
    stream, first, second, views = method.draw(batch)
    other = copy.deepcopy(method.net)
    method.loss(stream, first, second, views)
    for block in (stream, first, second):
        other(block.x)
    for ours, theirs in zip(method.net.buffers(), other.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_saf_records_what_xder_gave_for_the_stream_and_not_for_its_strong_views(start):
    trainer = start("xder", optimizer="saf", stop_after=2, buffer_size=24, minibatch_size=9, simclr_batch_size=5)
    trainer.run()
    method, optimizer, task = trainer.method, trainer.optimizer, trainer.benchmark[2]
    method.begin_task(task), optimizer.begin_task(task)
    (batch,) = batches(trainer, 2, 1)
    ((objective, _),) = method.observe(batch, optimizer)
    rows = torch.searchsorted(optimizer.ids, batch.ids)
    assert torch.equal(optimizer.ids[rows], batch.ids) and (optimizer.visits[rows] == 1).all()
    assert len(objective.blocks) == 4, "stream, two draws, views"
    assert torch.equal(optimizer.logits[rows, 0], objective.loss.logits)


def test_xder_writes_what_is_due_and_only_heads_from_the_present_on(xder):
    method, columns = xder.method, xder.method.buffer.columns
    written = skipped = 0
    for batch in batches(xder, 2, 8):
        before, drawn = columns["logits"].clone(), columns["drawn"].clone()
        blocks = method.draw(batch)
        _, first, second, _ = blocks
        with frozen_statistics(method):
            loss = method.loss(*blocks).detach()
            z = {1: rows_of(method.net(first.x)), 2: rows_of(method.net(second.x))}
        method.remember(batch, loss)
        want, times = before.double(), drawn.clone()
        for index, block in ((1, first), (2, second)):
            for i, slot in enumerate(block.slot.tolist()):
                if index == 2 and slot in first.slot.tolist():
                    assert not block.due[i]
                    continue
                times[slot] += 1
                assert block.due[i] or drawn[slot] > 0, "the first draw of a task always writes"
                if not block.due[i]:
                    skipped += 1
                    continue
                written += 1
                s, truth = torch.tensor(z[index][i][4:], dtype=torch.float64), before[slot, block.y[i]].double()
                if s.max() > truth > 0:
                    s = s * 0.8 * truth / s.max()
                want[slot, 4:] = s
        assert torch.equal(columns["drawn"], times)
        assert torch.allclose(columns["logits"].double(), want, rtol=0, atol=1e-5)
        assert torch.equal(columns["logits"][:, :4], before[:, :4])
    assert written >= 24 and skipped > 20


def test_xder_writes_with_probability_one_over_the_draws_of_the_task(xder):
    method, (batch,) = xder.method, batches(xder, 2, 1)
    method.buffer.columns["drawn"].fill_(3)
    due = torch.cat([method.draw(batch)[1].due for _ in range(300)])
    assert abs(due.double().mean().item() - 1 / 4) < 4 * (3 / 16 / len(due)) ** 0.5


def stays_below(peak, truth):
    """Either it was, or it is gamma times the true logit now; a negative one limits nothing."""
    return ((peak <= truth + 1e-6) | torch.isclose(peak, 0.8 * truth, atol=1e-5) | (truth <= 0)).all()


def test_xders_memory_is_cut_down_filled_evenly_and_renewed_when_a_task_ends(xder):
    method, task = xder.method, xder.benchmark[2]
    for _ in range(3):
        for batch in batches(xder, 2, 8):
            method.observe(batch, xder.optimizer)
    before = {name: column.clone() for name, column in method.buffer.all().items()}
    assert torch.bincount(before["y"]).tolist() == [6, 6, 6, 6]
    statistics = [buffer.clone() for buffer in method.net.buffers()]
    weights = [p.clone() for p in method.parameters()]
    method.buffer.columns["drawn"].fill_(5)
    method.end_task(task)
    after = method.buffer.all()
    assert torch.bincount(after["y"]).tolist() == [4] * 6, "24 of 6 classes"
    assert torch.equal(after["slot"], torch.arange(24)) and not after["drawn"].any()
    images = xder.benchmark.joint_split()
    assert torch.equal(images.images[after["ids"]], after["x"]) and len(after["ids"].unique()) == 24
    assert torch.equal(images.labels[after["ids"]], after["y"])
    for label in range(4):
        old, new = ({name: c[rows["y"] == label] for name, c in rows.items()} for rows in (before, after))
        assert torch.equal(new["ids"], old["ids"][:4]), "the first ones of a class stay"
        assert torch.equal(new["logits"][:, :4], old["logits"][:4, :4])
        assert not torch.equal(new["logits"][:, 4:], old["logits"][:4, 4:])
        truth, peak = new["logits"][:, label], new["logits"][:, 4:].max(1).values
        assert (truth > 0).any() and stays_below(peak, truth)
    new = after["logits"][after["y"] >= 4]
    truth, peak = new.gather(1, after["y"][after["y"] >= 4][:, None])[:, 0], new[:, :4].max(1).values
    assert (truth > 0).any() and stays_below(peak, truth)
    assert all(torch.equal(a, b) for a, b in zip(statistics, method.net.buffers(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, method.parameters(), strict=True))


@pytest.mark.parametrize("size, shares", [(25, (8, 8, 9)), (23, (7, 8, 8))])
def test_xders_memory_is_full_where_the_classes_do_not_divide_it(start, size, shares):
    """25 of 2 classes: 12 and 13; then 6 and 6 stay, and 13 are left for two new ones."""
    trainer = start("xder", buffer_size=size, stop_after=2)
    trainer.run()
    counts = sorted(torch.bincount(trainer.method.buffer.all()["y"]).tolist())
    quarter, rest = size // 4, size - 2 * (size // 4)
    assert counts == sorted([quarter, quarter, rest // 2, rest - rest // 2]) and sum(counts) == size


def test_xder_refuses_a_memory_without_room_for_each_class():
    with pytest.raises(UsageError, match="--buffer_size must have room for one image of each of the 10 classes"):
        resolve(["--model", "xder", "--dataset", "seq-synth", "--buffer_size", "9"])


def test_xder_in_the_first_and_the_last_task(start):
    trainer = start("xder", debug_mode=1, n_tasks=2)
    method, (batch,) = trainer.method, batches(trainer, 0, 1)
    blocks = method.draw(batch)
    assert [block.memory for block in blocks] == [0, 0]
    assert method.loss(*blocks).terms.keys() == {"current", "future", "views"}
    trainer.run()
    method.classes = trainer.benchmark[1].classes
    (batch,) = batches(trainer, 1, 1)
    method.buffer.columns["y"].clamp_(max=4)
    assert method.loss(*method.draw(batch)).terms.keys() == {"current", "logits", "labels", "past"}
    joint = start("xder", debug_mode=1, joint=1)
    joint.method.begin_task(joint.benchmark.joint_task)
    (block,) = joint.method.draw(batch)
    assert joint.method.loss(block).terms.keys() == {"current"}


# ----------------------------------------------------------------------------------------------------------- views


def test_supcon_of_an_image_without_a_partner_is_nothing():
    f = torch.nn.functional.normalize(torch.randn(4, 3), dim=1).requires_grad_()
    costs = supcon(f, torch.tensor([0, 1, 1, 2]), 0.5)
    (gradient,) = torch.autograd.grad(costs.sum(), f)
    assert costs[0] == costs[3] == 0 and costs[1] > 0 and gradient.isfinite().all()


def test_views_are_crops_of_a_fifth_to_all_of_the_image_and_half_are_flipped():
    """Images whose three channels say where a pixel was; where colour was jittered as well, channels are no places."""
    n, size = 4000, 16
    axis = (torch.arange(size) + 0.5) / size
    grey = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))  # rows, columns
    torch.manual_seed(0)
    from flatcl.models import _views

    views = _views._cropped(grey.expand(n, 2, size, size))
    y, x = views[:, 0].mean(2), views[:, 1].mean(1)  # (n, size): inner pixels are bilinear, hence exact
    height, width = ((p[:, 10] - p[:, 5]) / 5 * size for p in (y, x))
    flipped = width < 0
    area, ratio = height * width.abs(), width.abs() / height
    assert abs(flipped.double().mean().item() - 0.5) < 4 * (0.25 / n) ** 0.5
    assert (height > 0).all() and area.min() > 0.19 and area.max() < 1.01 and area.max() > 0.95 and area.min() < 0.22
    assert ratio.min() > 0.74 and ratio.max() < 1.35
    assert abs(ratio.log().mean().item()) < 0.02
    # area a fits with probability min(1, -ln a / ln(4/3)): mean (.26125 + .0990) / (.55 + .1190)
    assert area.mean().item() == pytest.approx(0.5385, abs=0.014)
    centre = (x[:, 7] + x[:, 8]) / 2
    assert centre.mean().item() == pytest.approx(0.5, abs=0.02)


def test_hue_turns_the_colour_wheel():
    from flatcl.models import _views

    images = torch.rand(60, 3, 4, 5)
    torch.manual_seed(3)
    turned = _views._hue(images).double()
    angles = set()
    for n in range(60):
        shifts = set()
        for i in range(4):
            for j in range(5):
                h, s, v = colorsys.rgb_to_hsv(*images[n, :, i, j].double().tolist())
                h2, s2, v2 = colorsys.rgb_to_hsv(*turned[n, :, i, j].tolist())
                assert (s2, v2) == pytest.approx((s, v), abs=1e-5)
                shifts.add(round((h2 - h + 0.5) % 1 - 0.5, 3))
        assert max(shifts) - min(shifts) < 0.004 and abs(max(shifts)) < 0.102
        angles.add(min(shifts))
    assert min(angles) < -0.085 and max(angles) > 0.085


@pytest.mark.parametrize("channels", (1, 2, 3))
def test_views_keep_shape_and_range_and_come_from_the_global_generator(channels):
    images = torch.rand(50, channels, 7, 11)
    torch.manual_seed(1)
    one, two = strong_views(images), strong_views(images)
    torch.manual_seed(1)
    again = strong_views(images)
    assert one.shape == images.shape and one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, again) and not torch.equal(one, two)


def test_a_fifth_of_the_views_is_grey_and_a_fifth_of_the_rest_keeps_its_colours():
    """Of images of one colour each, which crops and flips leave as they are."""
    n = 3000
    images = torch.rand(n, 3, 1, 1).expand(n, 3, 6, 6).contiguous()
    torch.manual_seed(2)
    views = strong_views(images)
    grey = (views.amax((1, 2, 3)) - views.amin((1, 2, 3))) < 1e-5
    same = (views - images).abs().amax((1, 2, 3)) < 1e-5
    assert abs(grey.double().mean().item() - 0.2) < 4 * (0.16 / n) ** 0.5 + 0.01
    assert abs((same & ~grey).double().sum().item() / (~grey).sum().item() - 0.2) < 4 * (0.16 / (0.8 * n)) ** 0.5 + 0.01
