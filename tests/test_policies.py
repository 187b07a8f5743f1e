"""How a memory is filled: each policy against its definition, and under every method that leaves it open."""

import copy
import json
from collections import Counter, deque

import kills
import numpy as np
import pytest
import replays
import torch
from made import make_mnist
from scipy import stats
from test_buffer import items, rng

from flatcl.models._method import Batch
from flatcl.models._replay import ReplayMethod
from flatcl.utils.arguments import args_of, flags_of, resolve
from flatcl.utils.commands.train import main
from flatcl.utils.contracts import policies
from flatcl.utils.engine.buffer import Buffer
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import METHODS, POLICIES, load_plugin

NAMES = POLICIES.names()
STREAMING = [name for name in NAMES if name != "herding"]
FLAGS = {name: flags_of(args_of(METHODS.load(name)), name) if args_of(METHODS.load(name)) else {} for name in METHODS}
FREE = [name for name in METHODS if "buffer_policy" in FLAGS[name]]
LOGITS = [name for name in FREE if METHODS.load(name).keeps_logits]
SIZE = 40
QUICK = dict(debug_mode=1, stop_after=2, buffer_size=SIZE, model_config="default")


def memory(name, capacity, num_classes=10, seed=0):
    return Buffer(capacity, "cpu", rng(seed), POLICIES.load(name)(num_classes))


def present(buffer, labels, first=0, given=True):
    """Rows with these labels and the numbers first, first + 1, ..."""
    labels = np.asarray(labels, dtype=np.int64)
    rows = {**items(first, len(labels)), "row": torch.arange(first, first + len(labels)), "y": torch.tensor(labels)}
    buffer.add(labels if given else None, **rows)


def stored(buffer):
    """[(label, number)] of each slot; columns must belong together."""
    rows = buffer.all()
    if rows:
        assert torch.equal(rows["logits"], items(0, int(rows["row"].max()) + 1)["logits"][rows["row"]])
    return list(zip(rows["y"].tolist(), rows["row"].tolist(), strict=True)) if rows else []


def class_by_class(seed=3, number=60, classes=5):
    """Labels of a class-incremental stream: two classes at a time, mixed."""
    order = rng(seed)
    return np.concatenate([order.integers(first, first + 2, number) for first in range(0, 2 * classes, 2)])


STREAMS = {
    "class by class": class_by_class(),
    "mixed": rng(4).integers(0, 10, 300),
    "uneven": np.where(rng(5).random(300) < 0.85, 0, rng(6).integers(1, 6, 300)),
    "one class": np.zeros(100, np.int64),
}


# ------------------------------------------------------------------------------------------------- class-balanced


@pytest.mark.parametrize("capacity", (1, 2, 7, 23))
@pytest.mark.parametrize("stream", STREAMS)
def test_class_balanced_does_what_algorithm_1_allows(stream, capacity):
    """Row by row: who may be replaced, and with which probability (the same random numbers)."""
    buffer, draws = memory("class_balanced", capacity), rng(0)
    full, seen = set(), Counter()
    for row, label in enumerate(STREAMS[stream].tolist()):
        before, sizes = stored(buffer), Counter(other for other, _ in stored(buffer))
        present(buffer, [label], row)
        after = stored(buffer)
        seen[label] += 1
        if len(before) < capacity:
            assert after == [*before, (label, row)]
        else:
            u, largest = draws.random(), max(sizes.values())
            changed = [slot for slot in range(capacity) if before[slot] != after[slot]]
            enters = label not in full or u < sizes[label] / seen[label]
            assert len(changed) == enters
            for slot in changed:
                assert after[slot] == (label, row)
                loser = before[slot][0]
                assert loser == label if label in full else sizes[loser] == largest
        if len(after) == capacity:
            sizes = Counter(other for other, _ in after)
            full |= {other for other in sizes if sizes[other] == max(sizes.values())}


@pytest.mark.parametrize("capacity", (7, 20, 23))
@pytest.mark.parametrize("stream", STREAMS)
def test_class_balanced_keeps_classes_even(stream, capacity):
    """Within one of each other, but for classes that have not shown as many; and all rows of those are there."""
    buffer, labels = memory("class_balanced", capacity), STREAMS[stream]
    present(buffer, labels)
    sizes, shown = Counter(label for label, _ in stored(buffer)), Counter(labels.tolist())
    most = max(sizes.values())
    assert sum(sizes.values()) == min(capacity, len(labels))
    assert all(sizes[label] >= min(most - 1, shown[label]) for label in shown)


def test_class_balanced_prefers_no_row_of_a_class():
    """Of 30 rows of a class that has 5 places for good, each is as likely to be there; and so is each slot's."""
    runs, counts = 600, np.zeros(60)
    for seed in range(runs):
        buffer = memory("class_balanced", 10, seed=seed)
        for first in range(0, 60, 12):
            present(buffer, np.arange(first, first + 12) % 2, first)
        counts[[row for _, row in stored(buffer)]] += 1
    p = 5 / 30
    for label in (0, 1):  # hypergeometric, as for the reservoir
        chi2 = ((counts[label::2] - runs * p) ** 2).sum() / (runs * p * (1 - p)) * 29 / 30
        assert stats.chi2.sf(chi2, 29) > 1e-3 and stats.chi2.cdf(chi2, 29) > 1e-3


def test_class_balanced_takes_from_the_largest_classes_whichever_row():
    """A new class meets two of 5 rows each: each row is as likely to go."""
    runs, lost = 1500, np.zeros(10)
    for seed in range(runs):
        buffer = memory("class_balanced", 10, seed=seed)
        present(buffer, np.arange(10) % 2)
        present(buffer, [7], 10)
        (gone,) = set(range(10)) - {row for _, row in stored(buffer)}
        lost[gone] += 1
    assert stats.chisquare(lost).pvalue > 1e-3


# ----------------------------------------------------------------------------------------------------------- ring


@pytest.mark.parametrize("capacity", (10, 23, 65))
@pytest.mark.parametrize("stream", STREAMS)
def test_a_ring_has_the_last_rows_of_each_class(stream, capacity):
    buffer, room, first = memory("ring", capacity), capacity // 10, 0
    last = {label: deque(maxlen=room) for label in range(10)}
    for n in (1, 0, 5, 40, 200, 11):
        labels = STREAMS[stream][first : first + n]
        present(buffer, labels, first)
        for row, label in enumerate(labels.tolist(), first):
            last[label].append((label, row))
        first += n
        assert sorted(stored(buffer)) == sorted(pair for ring in last.values() for pair in ring)


def test_a_row_of_a_ring_takes_the_place_of_the_oldest_one():
    buffer = memory("ring", 30)
    present(buffer, [4, 4, 4, 1, 4, 4])
    assert stored(buffer) == [(4, 4), (4, 5), (4, 2), (1, 3)]


# -------------------------------------------------------------------------------------------------- all streaming


@pytest.mark.parametrize("capacity", (1, 10, 40))
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("name", STREAMING)
def test_batches_are_their_rows(name, stream, capacity):
    """One by one, in batches larger than the memory, all at once; with labels from the host and from the column."""
    labels, memories = STREAMS[stream], []
    for size, given in ((1, True), (7, False), (64, True), (len(labels), False)):
        buffer = memory(name, capacity, num_classes=1 if capacity < 10 else 10)
        for first in range(0, len(labels), size):
            present(buffer, labels[first : first + size], first, given)
        present(buffer, [], len(labels))
        assert len(buffer) <= capacity and buffer.num_seen == len(labels)
        memories.append((stored(buffer), buffer.rng.bit_generator.state))
    assert all(other == memories[0] for other in memories)


@pytest.mark.parametrize("seen", (0, 5, 40, 140))
@pytest.mark.parametrize("name", STREAMING)
def test_saved_and_loaded_it_goes_on(name, seen, tmp_path, assert_same):
    labels, buffer, other = STREAMS["class by class"], memory(name, 40), memory(name, 40, seed=9)
    present(buffer, labels[:seen])
    present(other, labels[:77])  # whatever it held before is gone
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    state = copy.deepcopy(buffer.state_dict())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for first in range(seen, len(labels), 16):
        for one in (buffer, other):
            present(one, labels[first : first + 16], first)
        assert torch.equal(buffer.draw(5)["row"], other.draw(5)["row"])
    assert_same(buffer.state_dict(), other.state_dict())
    other.load_state_dict(state)  # a loaded state is not the buffer's own
    present(other, labels[:50])
    assert_same(state, torch.load(tmp_path / "state.pt", weights_only=True))


def test_labels_are_asked_for_where_there_are_none():
    with pytest.raises(UsageError, match="--buffer_policy ring needs labels"):
        memory("ring", 10).add(row=torch.arange(3))


def test_a_checkpoint_from_before_there_were_policies_is_read():
    buffer = memory("reservoir", 5)
    present(buffer, range(9))
    state = buffer.state_dict()
    del state["policy"]
    other = memory("reservoir", 5)
    other.load_state_dict(state)
    assert stored(other) == stored(buffer) and other.num_seen == 9


# ------------------------------------------------------------------------------------------------ labels on the host


@pytest.mark.parametrize("flags", [{}, {"debug_mode": 1}, {"batch_size": 7}, {"dataset": "mnist-360"}], ids=str)
def test_batches_have_their_labels_on_the_host(start, tmp_path, flags):
    if "dataset" in flags:
        make_mnist(tmp_path, n_train=300)
        flags = {**flags, "backbone": "mnistmlp", "base_path": tmp_path}
    trainer = start("er", **flags)
    split, kept, state = trainer.benchmark[0].train, [], None
    for batch in trainer.stream.epoch(split):
        assert batch.labels.dtype == np.int64 and batch.labels.tolist() == batch.y.tolist()
        kept.append(batch)
        state = copy.deepcopy(trainer.stream.state_dict()) if len(kept) == 3 else state
    assert all(batch.labels.tolist() == batch.y.tolist() for batch in kept)  # also later
    trainer.stream.load_state_dict(state)
    rest = list(trainer.stream.epoch(split))
    assert [batch.labels.tolist() for batch in rest] == [batch.y.tolist() for batch in kept[3:]]
    made = Batch(batch.x, batch.y, batch.ids, None, trainer.augment)
    assert made.labels.tolist() == batch.y.tolist()


def test_labels_are_copied_once_an_epoch_and_only_where_a_policy_looks(start, monkeypatch):
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(len(self)) or cpu(self))
    for policy, expected in (("reservoir", 0), ("ring", 3)):
        trainer = start("er", buffer_policy=policy, n_epochs=3, stop_after=1, buffer_size=SIZE)
        copies.clear()
        trainer._train_task(trainer.benchmark[0])
        assert copies.count(len(trainer.benchmark[0].train)) == expected


# -------------------------------------------------------------------------------------------------------- herding


def brute_force(features, number):
    """iCaRL, algorithm 4, as it is written."""
    features = features.double()
    mean, chosen = features.mean(0), []
    for k in range(1, min(number, len(features)) + 1):
        gaps = [
            torch.inf if i in chosen else (mean - (features[i] + features[chosen].sum(0)) / k).norm().item()
            for i in range(len(features))
        ]
        chosen.append(int(np.argmin(gaps)))
    return chosen


def herded_by_hand(trainer, task, number):
    """Ids of each class, by the network as it is."""
    net, split = copy.deepcopy(trainer.method.net).eval(), trainer.benchmark[task].train
    found = []
    for label in trainer.benchmark[task].classes:
        rows = (split.labels == label).nonzero()[:, 0]
        with torch.no_grad():
            features = net.features(trainer.augment.plain(split.images[rows]))
        found.append(split.ids[rows[brute_force(features, number)]].tolist())
    return found


@pytest.mark.parametrize("name", ["er", *LOGITS])
def test_herding_chooses_by_the_features_at_the_end_of_a_task(start, name):
    trainer = start(name, buffer_policy="herding", buffer_size=50, stop_after=3, n_epochs=1)
    expected, ends = [], []
    finish = trainer._finish_task

    def watched(task):
        method, number = trainer.method, 50 // (2 * task.index + 2)
        expected.extend(herded_by_hand(trainer, task.index, number))
        expected[:] = [ids[:number] for ids in expected]
        rows = method.buffer.all()
        assert rows["ids"].tolist() == [i for ids in expected for i in ids]
        split = trainer.benchmark.joint_split()
        assert torch.equal(split.images[rows["ids"]], rows["x"]) and torch.equal(split.labels[rows["ids"]], rows["y"])
        if name in LOGITS:
            net = copy.deepcopy(method.net).eval()
            with torch.no_grad():
                logits = net(trainer.augment.plain(rows["x"]))
            new = rows["y"] >= task.classes.start
            assert torch.allclose(rows["logits"][new], logits[new], atol=1e-5)
            assert task.index == 0 or not torch.allclose(rows["logits"][~new], logits[~new], atol=1e-3)
        ends.append(len(method.buffer))
        finish(task)

    trainer._finish_task = watched
    trainer.run()
    assert ends == [50, 48, 48] and all(part.training for part in trainer.method.net.modules())


def test_herdings_passes_are_counted(start):
    """All 128 images of a task for features, the chosen ones for logits where they are kept."""
    for name, chosen in (("er", 0), ("der", 40 + 20)):
        costs = []
        for policy in ("ring", "herding"):
            trainer = start(name, buffer_policy=policy, buffer_size=SIZE, stop_after=2, n_epochs=1)
            trainer.run()
            costs.append((trainer.cost.forward_rows, trainer.cost.backward_rows))
        extra = costs[1][0] - costs[1][1] - (costs[0][0] - costs[0][1])
        assert extra == 2 * 128 + chosen


def test_until_the_first_task_ends_a_herded_memory_is_empty(start):
    trainer = start("derpp", buffer_policy="herding", **QUICK)
    for batch in trainer.stream.epoch(trainer.benchmark[0].train):
        trainer.method.observe(batch, trainer.optimizer)
    assert len(trainer.method.buffer) == 0 and len(trainer.method.draw(batch)) == 1
    assert trainer.method.remembered_ids() is None


def test_herding_keeps_rows_of_each_task_where_classes_come_back(start, tmp_path):
    make_mnist(tmp_path)
    flags = dict(dataset="perm-mnist", backbone="mnistmlp", base_path=tmp_path, n_tasks=3, model_config="default")
    trainer = start("er", buffer_policy="herding", buffer_size=70, batch_size=16, **flags)
    trainer.run()
    rows = trainer.method.buffer.all()
    counts = Counter(zip((rows["ids"] // 10**7).tolist(), rows["y"].tolist(), strict=True))
    assert counts == {(task, label): 2 for task in range(3) for label in range(10)}


def test_herding_does_without_a_class_whose_images_are_all_held_out(start):
    from flatcl.datasets._benchmark import Split

    trainer = start("er", buffer_policy="herding", buffer_size=30, stop_after=1)
    task = trainer.benchmark[0]
    kept = task.train.labels == 1
    task.__dict__["train"] = Split(task.train.images[kept], task.train.labels[kept], task.train.ids[kept])
    trainer.method.end_task(task)
    assert trainer.method.buffer.all()["y"].tolist() == [1] * 15
    trainer.method.end_task(trainer.benchmark[1])
    assert Counter(trainer.method.buffer.all()["y"].tolist()) == {1: 7, 2: 7, 3: 7}


# -------------------------------------------------------------------------------------------------------- methods


def test_every_method_with_a_memory_leaves_the_policy_open_or_says_what_it_is():
    for name in METHODS:
        is_free = "buffer_size" in FLAGS[name] and not METHODS.load(name).fixed_policy
        assert ("buffer_policy" in FLAGS[name]) == is_free
    assert {"er", "er_ace", "der", "derpp", "mgser_sam", "cls_er", "agem_r", "mer", "hal"} <= set(FREE)
    assert FLAGS["er"]["buffer_policy"].default == "reservoir"


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("name", FREE)
def test_every_method_learns_two_tasks_under_every_policy(start, name, policy):
    trainer = start(name, buffer_policy=policy, seed=2, **{**QUICK, "debug_mode": 0, "n_epochs": 1})
    summary = trainer.run()
    assert summary["status"] == "finished" and summary["cost"]["skipped_steps"] == 0
    rows, sizes = trainer.method.buffer.all(), Counter(trainer.method.buffer.all()["y"].tolist())
    assert ("logits" in rows) == (name in LOGITS) and set(sizes) == {0, 1, 2, 3}
    split = trainer.benchmark.joint_split()
    assert torch.equal(split.images[rows["ids"]], rows["x"]) and torch.equal(split.labels[rows["ids"]], rows["y"])
    expected = {"ring": [4] * 4, "class_balanced": [10] * 4, "herding": [10] * 4}.get(policy)
    assert expected is None or sorted(sizes.values()) == pytest.approx(expected, abs=1)
    assert expected is None or len(rows["y"]) == sum(expected)


@pytest.mark.parametrize("policy", ("class_balanced", "ring"))
def test_streaming_policies_know_no_tasks(start, tmp_path, policy):
    """A stream without boundaries, and tasks whose classes come back."""
    make_mnist(tmp_path, n_train=300)
    for dataset in ("mnist-360", "rot-mnist"):
        flags = dict(dataset=dataset, backbone="mnistmlp", base_path=tmp_path, model_config="default", n_epochs=1)
        trainer = start("derpp", buffer_policy=policy, buffer_size=90, stop_after=1, **flags)
        trainer.run()
        shown = set(trainer.benchmark[0].train.labels.tolist())  # a class of mnist-360 has no images
        sizes = Counter(trainer.method.buffer.all()["y"].tolist())
        assert set(sizes) == shown and max(sizes.values()) - min(sizes.values()) <= (policy == "class_balanced")
        assert sum(sizes.values()) == (9 * len(shown) if policy == "ring" else 90)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    file = tmp_path_factory.mktemp("plugin") / "killable.py"
    file.write_text(kills.BACKBONE.replace("nn.Dropout(0.1)", "nn.Identity()"))
    return str(file)


@pytest.mark.parametrize("policy", [name for name in NAMES if name != "reservoir"])
@pytest.mark.parametrize("model, optimizer", [("er", "sgd"), ("derpp", "sam"), ("er_ace", "sgd"), ("hal", "sgd")])
def test_resumed_runs_and_recorded_steps_are_those_of_an_ordinary_run(model, optimizer, policy, backbone):
    """Stopped in the last task and resumed; and with steps that are recorded once and replayed."""
    load_plugin(backbone)
    line = replays.check_pair(model, optimizer, backbone, f"--buffer_policy={policy}")
    assert line.get("equal"), replays.verdict(line)
    assert line["replayed"] >= 0.4 * line["steps"]


# -------------------------------------------------------------------------------------------------------- plugins

PLUGIN = '''"""A policy of ours, and a method as the README writes them."""

import numpy as np
from torch.nn.functional import cross_entropy

from flatcl.models import Loss, ReplayMethod
from flatcl.utils.engine.policies import Policy
from flatcl.utils.registry import METHODS, POLICIES


@POLICIES.register("newest")
class Newest(Policy):
    """The last rows of all."""

    def place(self, buffer, n, labels):
        return (buffer.num_seen + np.arange(n)) % buffer.capacity


@METHODS.register("plain_er")
class PlainEr(ReplayMethod):
    def draw(self, batch):
        return (self.replay_jointly(batch),)

    def loss(self, joint):
        return Loss({"replay": cross_entropy(self.net(joint.x), joint.y, reduction="none")})

    def remember(self, batch, loss):
        self.buffer.add(x=batch.x, y=batch.y, ids=batch.ids)
'''


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "ours.py"
    file.write_text(PLUGIN)
    return str(file)


@pytest.mark.parametrize("policy", [*NAMES, "newest"])
def test_a_method_that_adds_rows_itself_has_the_memory_of_er(start, plugin, policy, assert_same):
    load_plugin(plugin)
    memories = []
    for name in ("er", "plain_er"):
        trainer = start(name, buffer_policy=policy, **QUICK)
        trainer.run()
        memories.append(trainer.method.buffer.state_dict())
    assert_same(*memories)


def test_a_plugins_policy_is_chosen_by_its_name_and_is_part_of_the_run(plugin, tmp_path, capsys):
    argv = ["--plugin", plugin, "--model", "er", "--dataset", "seq-synth", "--debug_mode", "--device", "cpu"]
    assert main([*argv, "--buffer_policy", "newest", "--results_path", str(tmp_path / "results"), "--non_verbose"]) == 0
    (file,) = (tmp_path / "results").rglob("config.json")
    config = json.loads(file.read_text())
    assert config["flags"]["buffer_policy"] == {"value": "newest", "origin": "argv"}
    assert config["plugins"] and "plugin ours.py" in config["code"]
    assert main([*argv, "--help"]) == 0
    assert "newest" in capsys.readouterr().out
    assert resolve([*argv, "--buffer_policy", "newest"]).hash != resolve(argv).hash


def test_the_policys_file_is_part_of_the_code_of_a_run():
    argv = ["--model", "er", "--dataset", "seq-synth"]
    assert "utils/engine/policies/reservoir.py" in resolve(argv).code
    assert "utils/engine/policies/ring.py" in resolve([*argv, "--buffer_policy", "ring"]).code
    assert not any("policies" in file for file in resolve(["--model", "gss", "--dataset", "seq-synth"]).code)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "words, says",
    [
        (("--model", "er", "--buffer_policy", "rign"), "got 'rign'. Did you mean ring?"),
        (("--model", "er", "--buffer_policy", "zzz"), "Choose from: class_balanced, herding, reservoir, ring."),
        (("--model", "er", "--buffer_policy", "ring", "--buffer_size", "9"), "each of the 10 classes of seq-synth"),
        (("--model", "er", "--buffer_policy", "herding", "--buffer_size", "9"), "each of the 10 classes of all tasks"),
        (("--model", "er", "--buffer_policy", "herding", "--joint"), "a joint run has one task only"),
        (
            ("--model", "er", "--buffer_policy", "herding", "--dataset", "mnist-360"),
            "mnist-360 has one task only",
        ),
        (
            ("--model", "er", "--buffer_policy", "herding", "--dataset", "rot-mnist", "--buffer_size", "199"),
            "each of the 200 classes of all tasks of rot-mnist",
        ),
        (("--model", "hal", "--buffer_policy", "ring", "--hal_memory", "ring"), "no effect with --hal_memory ring"),
        (("--model", "sgd", "--buffer_policy", "ring"), "unknown flag: --buffer_policy"),
    ],
)
def test_what_does_not_fit_is_refused(words, says, tmp_path, capsys):
    words = words if "--dataset" in words else (*words, "--dataset", "seq-synth")
    assert main([*words, "--results_path", str(tmp_path / "results")]) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err and err.count("error:") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS.load(name).fixed_policy])
def test_a_method_whose_paper_fixes_its_memory_says_so(name):
    for policy in ("reservoir", "ring"):
        with pytest.raises(UsageError) as caught:
            resolve(["--model", name, "--dataset", "seq-synth", "--buffer_policy", policy])
        (problem,) = caught.value.problems
        method = METHODS.load(name)
        assert problem == (
            f"--buffer_policy has no effect on --model {name}, whose paper fixes its memory ({method.fixed_policy}). "
            "Drop it."
        )


def test_a_backbone_without_features_cannot_herd(tmp_path):
    (tmp_path / "bare.py").write_text(
        "from torch import nn\nfrom flatcl.utils.registry import BACKBONES\n\n\n"
        '@BACKBONES.register("bare")\nclass Bare(nn.Sequential):\n'
        "    def __init__(self, shape, num_classes, args=None):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], num_classes))\n"
    )
    argv = ["--plugin", str(tmp_path / "bare.py"), "--model", "er", "--dataset", "seq-synth", "--backbone", "bare"]
    with pytest.raises(UsageError, match="--buffer_policy herding needs a backbone with `features`, bare has none"):
        resolve([*argv, "--buffer_policy", "herding"])


def test_a_run_cannot_be_continued_with_another_policy(tmp_path, capsys):
    argv = ["--model", "er", "--dataset", "seq-synth", "--stop_after", "1", "--non_verbose", "--device", "cpu"]
    assert main([*argv, "--results_path", str(tmp_path)]) == 0
    (folder,) = (file.parent for file in tmp_path.rglob("config.json"))
    words = ["--from", str(folder), "--continue", "1", "--stop_after", "2", "--buffer_policy", "ring"]
    assert main([*words, "--results_path", str(tmp_path)]) == 2
    assert "--buffer_policy must be reservoir, as in the run that is continued, got ring" in capsys.readouterr().err


def test_replay_methods_share_one_way_to_remember():
    """A method that only keeps rows has no `remember` of its own."""
    assert all(METHODS.load(name).remember is ReplayMethod.remember for name in ("er", "der", "derpp", "agem_r"))


@pytest.mark.parametrize("title", policies.CONTRACTS)
@pytest.mark.parametrize("name", POLICIES.names())
def test_each_policy_keeps_the_contracts(name, title):
    policies.CONTRACTS[title](name)
