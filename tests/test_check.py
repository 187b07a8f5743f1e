"""`flatcl check`: what it finds in plugins with one fault each, and how it ends."""

import re

import pytest

from flatcl.__main__ import main

HEAD = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from flatcl.datasets import Benchmark
from flatcl.datasets.seq_synth import SeqSynth
from flatcl.models import Block, Loss, ReplayMethod
from flatcl.utils.optim import SharpnessAware
from flatcl.utils.engine.policies.reservoir import Reservoir
from flatcl.utils.registry import BACKBONES, DATASETS, METHODS, OPTIMIZERS, POLICIES

class Replay(ReplayMethod):
    phase = ReplayMethod.phase
    def draw(self, batch):
        return (self.replay_jointly(batch),)
    def loss(self, joint):
        return Loss({"replay": cross_entropy(self.net(joint.x), joint.y, reduction="none")})
    def remember(self, batch, loss):
        self.buffer.add(x=batch.x, y=batch.y, ids=batch.ids)

class Sam(SharpnessAware):
    phase = SharpnessAware.phase
    def ascent(self, g, objective):
        return torch._foreach_mul(g, self.args.rho)

class Net(nn.Module):
    def __init__(self, shape, num_classes, args=None):
        super().__init__()
        self.num_features = shape[0] * shape[1] * shape[2]
        self.classifier = nn.Linear(self.num_features, num_classes)
    def features(self, x):
        return x.flatten(1)
    def forward(self, x):
        return self.classifier(self.features(x))
"""
METHOD = HEAD + '\n@METHODS.register("mine")\nclass Mine(Replay):\n'
OPTIMIZER = HEAD + '\n@OPTIMIZERS.register("mine")\nclass Mine(Sam):\n'
NET = HEAD + '\n@BACKBONES.register("mine")\nclass Mine(Net):\n'
DATA = HEAD + '\n@DATASETS.register("mine")\nclass Mine(SeqSynth):\n'
POLICY = HEAD + '\n@POLICIES.register("mine")\nclass Mine(Reservoir):\n'
EXCEPTION = "an exception in a forward pass leaves weights and BatchNorm as they were"
LOSS = '        return Loss({"replay": cross_entropy(self.net(joint.x), joint.y, reduction="none")})\n'

FAULTS = {  # the fault: (text, the contract that finds it, what is said)
    "draws in the loss": (
        METHOD + "    def loss(self, joint):\n        joint.x.add_(0 * torch.rand(1))\n" + LOSS,
        "loss is pure", "Draw in draw",
    ),
    "counts in the loss": (
        METHOD + "    calls = 0\n    def loss(self, joint):\n        self.calls += 1\n" + LOSS,
        "loss is pure", "'calls'.* differs",
    ),
    "remembers in draw": (
        METHOD + "    def remember(self, batch, loss):\n        pass\n    def draw(self, batch):\n"
        "        blocks = super().draw(batch)\n        self.buffer.add(x=batch.x, y=batch.y, ids=batch.ids)\n"
        "        return blocks\n",
        "draw has no side effect", "Write what is kept in remember",
    ),
    "does not mark the memory": (
        METHOD + "    def draw(self, batch):\n        block = self.replay_jointly(batch)\n"
        "        return (Block(block.x, **block.columns),)\n",
        "blocks mark rows of the memory", "no block of a step .* has rows of the memory. Write: Block",
    ),
    "forgets rows": (
        METHOD + "    def remember(self, batch, loss):\n"
        "        self.buffer.add(x=batch.x[:3], y=batch.y[:3], ids=batch.ids[:3])\n",
        "the memory has images as they are, replayed ones are augmented", "has seen 30 of 160 images",
    ),
    "keeps state outside of the state_dict": (
        METHOD + "    weight = 1.0\n    def remember(self, batch, loss):\n        super().remember(batch, loss)\n"
        "        self.weight *= 0.9\n    def loss(self, joint):\n"
        "        z = self.net(joint.x)\n"
        '        return Loss({"replay": self.weight * cross_entropy(z, joint.y, reduction="none")})\n',
        "same seed, same run, also where it was stopped and resumed", "the resumed run's state.* get_extra_state",
    ),
    "saves an object": (
        METHOD + "    def get_extra_state(self):\n        return super().get_extra_state() | {'o': Block(None)}\n",
        "a saved state is all that the next step depends on", "its state cannot be read again",
    ),
    "learns from test images": (
        METHOD + "    def begin_task(self, task):\n        self.net(self.context.augment(task.test.images))\n",
        "test images are not learned from", "with other test images .*Use only task.train",
    ),
    "says a phase and has another": (
        METHOD + "    calls = 0\n    def remember(self, batch, loss):\n        super().remember(batch, loss)\n"
        "        self.calls += 1\n    phase = Replay.phase\n    def loss(self, joint):\n        z = self.net(joint.x)\n"
        '        return Loss({"replay": cross_entropy(z, joint.y, reduction="none") / (1 + self.calls)})\n',
        "steps that are recorded and replayed are the same", "recorded steps are not the ordinary ones",
    ),
    "knows three classes": (
        METHOD + "    def begin_task(self, task):\n        assert len(task.classes) == 2, 'two alone'\n",
        "tasks of unequal size", r"AssertionError: two alone \(.*mine.py, line \d+\)",
    ),
    "raises": (
        METHOD + "    def end_task(self, task):\n        {}['missing']\n",
        "trains two tasks under sgd", r"KeyError: 'missing' \(.*mine.py, line \d+\)",
    ),
    "an optimizer that moves weights for good": (
        OPTIMIZER + "    def direction(self, objective):\n        g = objective.gradient()\n"
        "        with torch.no_grad():\n            torch._foreach_add_(self.params, g)\n"
        "            g = objective.gradient()\n            torch._foreach_sub_(self.params, g)\n        return g\n",
        EXCEPTION, "with self.at",
    ),
    "an optimizer whose passes move BatchNorm": (
        OPTIMIZER + "    def direction(self, objective):\n        objective.method.loss(*objective.blocks)\n"
        "        return super().direction(objective)\n",
        EXCEPTION, "BatchNorm",
    ),
    "a network that is not of the seed": (
        NET + "    def __init__(self, *args):\n        super().__init__(*args)\n        import numpy as np\n"
        "        with torch.no_grad():\n            self.classifier.bias += float(np.random.default_rng().random())\n",
        "the seed makes the weights", "Draw only from torch's generator",
    ),
    "a network with idle weights": (
        NET + "    def __init__(self, *args):\n        super().__init__(*args)\n        self.spare = nn.Linear(2, 2)\n",
        "each parameter has a gradient", "spare.weight has no gradient",
    ),
    "a policy that leaves gaps": (
        POLICY + "    def place(self, buffer, n, labels):\n        return super().place(buffer, n, labels) + 1\n",
        "takes slots that are there", "where 0 comes next. Fill them in order",
    ),
    "a policy that draws from elsewhere": (
        POLICY + "    def place(self, buffer, n, labels):\n        import numpy as np\n"
        "        slots = super().place(buffer, n, labels)\n        full = slots >= buffer.capacity\n"
        "        slots[full] = np.random.randint(buffer.capacity, size=full.sum())\n        return slots\n",
        "decides by the buffer's generator alone", "Draw from buffer.rng alone",
    ),
    "a policy that keeps nothing": (
        POLICY + "    def place(self, buffer, n, labels):\n        return 0 * super().place(buffer, n, labels) + 999\n",
        "remembers the tasks", "the memory is empty",
    ),
    "a policy that returns a list": (
        POLICY + "    def place(self, buffer, n, labels):\n        return [buffer.capacity] * n\n",
        "takes slots that are there", "must return whole numbers",
    ),
    "a policy whose state is not kept": (
        POLICY + "    calls = 0\n    def place(self, buffer, n, labels):\n        self.calls += 1\n"
        "        slots = super().place(buffer, n, labels)\n"
        "        slots[slots < len(buffer)] = self.calls % buffer.capacity\n        return slots\n",
        "same seed, same run, also where it was stopped and resumed", "memory|buffer|columns|weight",
    ),
    "a benchmark with ids that are there twice": (
        DATA + "    def train_split(self, index):\n        split = super().train_split(index)\n"
        "        return type(split)(split.images, split.labels, torch.arange(len(split)))\n",
        "ids are unique", "512 ids of train images occur twice",
    ),
    "a benchmark that draws when it is indexed": (
        DATA + "    def train_split(self, index):\n        split = super().train_split(index)\n"
        "        rows = torch.randperm(len(split))\n"
        "        return type(split)(split.images[rows], split.labels[rows], split.ids[rows])\n",
        "indexing advances nothing", "Draw from flatcl.utils.engine.seeding.generator",
    ),
    "a benchmark with labels from 1": (
        DATA + "    def load(self, root):\n        (x, y), test = super().load(root)\n        return (x, 1 + y), test",
        "it can be loaded", "Return y - 1",
    ),
    "a benchmark that draws once for all images": (
        DATA + "    def augmentations(self):\n        return [lambda x: x * torch.rand(1)]\n",
        "augmentations draw for each image", "draws once for all images of a call",
    ),
}  # fmt: skip


@pytest.fixture
def check(tmp_path, capsys):
    """`check(text)` -> (exit code, lines on stdout) of a file with this text."""

    def check(text):
        file = tmp_path / "mine.py"
        file.write_text(text)
        code = main(["check", str(file)])
        return code, capsys.readouterr().out.splitlines()

    return check


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_the_others_are_checked(check, fault):
    text, title, said = FAULTS[fault]
    code, lines = check(text)
    assert code == 1
    (line,) = [line for line in lines if line.startswith(f"FAIL  {title}: ")]
    assert re.search(said, line.removeprefix(f"FAIL  {title}: ")), line
    assert lines[-1].endswith(" skipped") and f"{sum(line.startswith('FAIL') for line in lines)} failed" in lines[-1]
    assert len(lines) > 6 or title == "it can be loaded"


@pytest.mark.parametrize(
    "head", [METHOD, OPTIMIZER, NET, DATA, POLICY], ids=["method", "optimizer", "backbone", "benchmark", "policy"]
)
def test_a_part_without_a_fault_keeps_all(check, head):
    code, lines = check(head + "    pass\n")
    assert code == 0 and not [line for line in lines[1:-1] if not line.startswith("ok    ")], lines
    assert lines[-1] == f"{len(lines) - 2} ok, 0 failed, 0 skipped"


def test_a_method_that_is_not_recorded_says_why(check):
    code, lines = check(METHOD.replace("    phase = ReplayMethod.phase\n", "") + "    pass\n")
    (line,) = [line for line in lines if "recorded and replayed" in line]
    assert code == 0 and line.startswith("ok ") and "not recorded: mine does not say what its steps depend on" in line


def test_a_domain_incremental_method_is_checked_on_domains(check):
    code, lines = check(METHOD + '    settings = ("domain-il",)\n')
    assert code == 0 and "skip  tasks of unequal size: it learns no classes in tasks" in lines


def test_a_policy_that_forgets_old_tasks_is_told_so(check):
    code, lines = check(
        POLICY + "    def place(self, buffer, n, labels):\n        import numpy as np\n"
        "        return np.arange(buffer.num_seen, buffer.num_seen + n) % buffer.capacity\n"
    )
    assert code == 0 and any(
        "remembers the tasks: note: after two tasks it has rows of task 2 alone" in x for x in lines
    )


def test_one_fault_is_printed_once(check):
    code, lines = check(METHOD + "    def loss(self, joint):\n        return joint.nothing\n")
    faults = [line for line in lines if line.startswith("FAIL")]
    assert code == 1 and sum("no column 'nothing'" in line for line in faults) == 1
    assert len(faults) > 5 and sum("as in 'trains two tasks under" in line for line in faults) > 4


def test_each_part_of_a_file_is_checked(check):
    _, lines = check(NET + "    pass\n" + '@BACKBONES.register("other")\nclass Other(Net):\n    pass\n')
    assert [line for line in lines if line in ("backbone mine", "backbone other")] == [
        "backbone mine",
        "backbone other",
    ]


def test_a_network_of_a_family_is_checked_too(capsys):
    assert main(["check", "timm:test_resnet.r160_in1k"]) in (0, 1)
    assert capsys.readouterr().out.startswith("backbone timm:test_resnet.r160_in1k\nok    it can be loaded")
    assert main(["check", "timn:test_resnet"]) == 2 and "unknown backbone" in capsys.readouterr().err


def test_a_name_is_checked_too(capsys):
    assert main(["check", "mnistmlp"]) == 0
    assert capsys.readouterr().out.startswith("backbone mnistmlp\nok    it can be loaded")


def test_data_that_is_missing_is_not_downloaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FLATCL_DATA", str(tmp_path))
    assert main(["check", "seq-cifar10"]) == 0
    assert re.search(r"^skip  it can be loaded: data missing: put .* into ", capsys.readouterr().out, re.MULTILINE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, said",
    [
        (["absent.py"], r"absent.py: there is no such file"),
        (["text.txt"], r"text.txt: this is not a Python file"),
        (["empty.py"], r"empty.py registers nothing. Write above a class: @METHODS.register\('name'\)"),
        (["broken.py"], r"broken.py: it does not import: SyntaxError"),
        (["err"], r"there is no file 'err', and no part with that name. Did you mean er"),
        ([], r"the following arguments are required: FILE.py. See flatcl check --help"),
        (["er", "--fast"], r"unknown flag: --fast"),
    ],
)
def test_bad_input(words, said, tmp_path, monkeypatch, capsys):
    for name, text in {"empty.py": "", "broken.py": "def", "text.txt": ""}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(["check", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and re.search(said, line)
