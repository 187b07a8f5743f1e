"""What an author of a plugin may get wrong: one line that names the method and its file, and exit code 2.

Each mistake goes through the command line as a new user would make it. Most of them once gave a traceback, the others
wrong numbers without a word.
"""

import json
import re

import pytest

from flatcl.utils.commands.train import main

HEAD = """
import dataclasses, torch
from dataclasses import dataclass
from typing import Optional
from torch.nn.functional import cross_entropy
from flatcl.datasets.seq_synth import SeqSynth
from flatcl.models._method import Block, Loss, Method, published
from flatcl.models._replay import ReplayMethod
from flatcl.utils.arguments import flag
from flatcl.utils.optim._sharpness import SharpnessAware
from flatcl.utils.registry import DATASETS, METHODS, OPTIMIZERS

def costs_of(method, block):
    return cross_entropy(method.net(block.x), block.y, reduction="none")

class Plain(Method):
    def loss(self, stream):
        return Loss({"current": costs_of(self, stream)})

class Two(ReplayMethod):  # stream and memory apart
    def draw(self, batch):
        return (batch.block, *self.replay())
    def loss(self, stream, memory=None):
        rows = {"current": (stream, costs_of(self, stream))}
        if memory is not None:
            rows["memory"] = (memory, costs_of(self, memory))
        return Loss(rows)
    def remember(self, batch, loss):
        self.buffer.add(x=batch.x, y=batch.y, ids=batch.ids)
"""


@pytest.fixture
def go(tmp_path, capsys):
    """`go(text, flag, ...)` -> (exit code, lines on stderr, status of the run folder, the file's path)."""

    def go(text, *words):
        file = tmp_path / "mine.py"
        file.write_text(HEAD + text)
        argv = ["--plugin", str(file), "--model", "mine", "--dataset", "seq-synth", "--stop_after", "2"]
        argv += ["--debug_mode", "--non_verbose", "--device", "cpu", "--results_path", str(tmp_path / "out"), *words]
        code = main(argv)
        err = capsys.readouterr().err
        (*_, status) = [None, *(json.loads(f.read_text())["status"] for f in (tmp_path / "out").rglob("summary.json"))]
        return code, err.splitlines(), status, str(file)

    return go


def method(body, base="Plain"):
    """The text of a plugin with one method."""
    lines = "\n".join("    " + line for line in body.strip("\n").splitlines())
    return f'\n@METHODS.register("mine")\nclass Mine({base}):\n{lines}\n'


def loss(returned, base="Plain"):
    """A method whose loss returns this, from `z`, the logits, and `c`, the costs."""
    return method(
        "def loss(self, stream):\n    z = self.net(stream.x)\n"
        '    c = cross_entropy(z, stream.y, reduction="none")\n'
        f"    return {returned}",
        base,
    )


def draw(returned):
    return method(f"def draw(self, batch):\n    return {returned}")


LOSSES = {  # what the loss returns: what is said
    "c.mean()": r"loss\(\) must return a Loss, got a tensor of shape \(\).* Write: return Loss",
    "c": r"loss\(\) must return a Loss, got a tensor of shape \(16,\)",
    "None": r"loss\(\) must return a Loss, got None",
    "Loss(c, z)": r"Loss\(rows=...\) must be a dict, .*got a tensor of shape \(16,\)",
    "Loss({}, z)": r"the loss has no terms",
    'Loss({"a": c.mean()}, z)': r"the loss term 'a' must have a cost for each of the 16 rows of its block",
    'Loss({"a": c[:3]}, z)': r"the loss term 'a' must have the shape \(16,\), .*got a tensor of shape \(3,\)",
    'Loss({"a": c[:, None]}, z)': r"the loss term 'a' must have the shape \(16,\), .*got a tensor of shape \(16, 1\)",
    'Loss({"a": c, "b": (z.argmax(1) != stream.y)}, z)': r"the loss term 'b' must be floats, .*torch.bool",
    'Loss({"a": c, "b": (z.argmax(1) != stream.y).long()}, z)': r"the loss term 'b' must be floats, .*torch.int64",
    'Loss({"a": 1.0}, z)': r"the loss term 'a' must be a pair \(block, tensor\), got a float",
    'Loss({"a": (c, stream)}, z)': r"the loss term 'a' must be a pair \(block, tensor\), got \(a tensor .*, a Block\)",
    'Loss({"a": (0, c)}, z)': r"the loss term 'a' must be a pair \(block, tensor\), got \(a int, a tensor",
    'Loss({"a": (Block(stream.x), c)}, z)': r"the loss term 'a' names a block that loss\(\) was not given.*\(stream\)",
    'Loss({"a": c.detach()}, z)': r"no term of the loss depends on a weight that is trained: nothing would be learned",
    'Loss({"a": c}, z, {"p": c})': r"the penalty 'p' must be a scalar tensor of floats, got a tensor of shape \(16,\)",
    'Loss({"a": c}, z, {"p": 0.5})': r"the penalty 'p' must be a scalar tensor of floats, got a float",
    'Loss({"a": c}, z, {"a": c.sum()})': r"'a' is a term of the loss's rows and one of its penalties. Rename",
    'Loss({"a": c}, {"p": c.sum()})': r"Loss\(logits=...\) must be the stream's logits \(N, K\), got a dict",
    'Loss({"a": c}, z, outputs={0: z[:2]})': r"the output '0' must have the shape \(16, ...\)",
    'Loss({"a": c}, z[:3])': r"Loss\(logits=...\) must have only the 16 rows of the stream, got .*\(3, 10\)",
    'Loss({"a": c}, z, blocks={"a": 0})': r"no argument 'blocks'. Each term names its own block \(one of stream\)",
    'Loss({"a": c}, z, penalty={"p": c.sum()})': r"no argument 'penalty'. Its arguments are rows, logits, penalties",
}

DRAWS = {  # what draw returns: what is said
    "batch.block": r"draw\(\) must return a tuple of blocks, .*got a Block. Write: \(block,\)",
    "None": r"draw\(\) must return a tuple of blocks, .*got None",
    "(batch,)": r"draw\(\) must return a tuple of blocks, got a Batch in it",
    "()": r"draw\(\) has given no block for the loss",
    "(batch.block.as_reference(),)": r"draw\(\) has given no block for the loss",
    "(Block(batch.x, y=batch.y),)": r"block 0 .*inputs x of floats, got a tensor .*torch.uint8. Use batch.inputs",
    "(Block(batch.inputs.numpy(), y=batch.y),)": r"block 0 .*inputs x of floats, got a ndarray",
    "(Block(batch.inputs, y=batch.y[:3]),)": r"block 0 of draw\(\) has 16 rows, its column 'y' is a tensor .*\(3,\)",
    "(Block(batch.inputs, y=batch.y, way='a'),)": r"block 0 of draw\(\) has 16 rows, its column 'way' is a str",
    "(Block(batch.inputs, memory=17, y=batch.y),)": r"block 0 of draw\(\) has 16 rows, but memory=17 of them",
    "(Block(batch.inputs.to('meta'), y=batch.y),)": r"block 0 of draw\(\) has 'x' on meta, the weights are on cpu",
    "(batch.block, batch.block)": r"draw\(\) has given 2 block\(s\) for the loss, which loss\(stream\) cannot take",
}

OTHERS = {
    "steps that do not yield": (
        method("def steps(self, batch):\n    return self.draw(batch)"),
        r"steps\(\) must yield the blocks of each step, got a tuple. Write: yield self.draw\(batch\)",
    ),
    "steps that yield a block": (
        method("def steps(self, batch):\n    yield batch.block"),
        r"steps\(\) yield them, got a Block. Write: \(block,\)",
    ),
    "no loss": (method("pass", "Method"), r"it has no loss\(\)"),
    "no references": (
        method("def draw(self, batch):\n    return (batch.block, batch.block.as_reference())"),
        r"it draws reference blocks, but has no references\(\)",
    ),
    "references that do not yield": (
        method(
            "def draw(self, batch):\n    return (batch.block, batch.block.as_reference())\n"
            "def references(self, memory):\n    return ('memory', costs_of(self, memory).mean())"
        ),
        r"references\(\) must yield \(name, loss\), it returns a tuple",
    ),
    "references of a cost for each row": (
        method(
            "def draw(self, batch):\n    return (batch.block, batch.block.as_reference())\n"
            "def references(self, memory):\n    yield 'memory', costs_of(self, memory)"
        ),
        r"references\(\) must yield \(name, loss\), the loss one number, got a str, a tensor of shape \(16,\)",
    ),
    "guides without a comma": (
        method("guides = {'memory': ('current')}"),
        r"guides must be a dict of tuples of terms, got \{'memory': 'current'\}. Write",
    ),
    "a term in two guides": (
        method("guides = {'a': ('current',), 'b': ('current',)}"),
        r"guides has the term 'current' twice",
    ),
    "combine without return": (
        method("def combine(self, update, guides):\n    torch._foreach_mul(update, 2.0)"),
        r"what combine\(\) returns must be a list of \d+ tensors, one for each parameter, got None",
    ),
    "combine that returns fewer": (
        method("def combine(self, update, guides):\n    return update[1:]"),
        r"what combine\(\) returns must be a list of \d+ tensors, .*got \d+ entries",
    ),
    "combine that returns other shapes": (
        method("def combine(self, update, guides):\n    return [part.sum() for part in update]"),
        r"what combine\(\) returns must have the shapes of the parameters, .*got a tensor of shape \(\)",
    ),
    "combine in place": (
        method("def combine(self, update, guides):\n    torch._foreach_mul_(update, 2.0)\n    return update"),
        r"it changes the update or a guide in place. Make a new list",
    ),
    "combine that puts entries into the update": (
        method("def combine(self, update, guides):\n    update[0] = 2 * update[0]\n    return update"),
        r"it changes the update or a guide in place. Make a new list",
    ),
    "combine that changes a guide": (
        method(
            "guides = {'memory': ('memory',)}\ndef combine(self, update, guides):\n    for guide in guides.values():\n"
            "        torch._foreach_mul_(guide, 0.5)\n        update = torch._foreach_add(update, guide)\n"
            "    return update",
            "Two",
        ),
        r"it changes the update or a guide in place. Make a new list",
    ),
    "logits of stream and memory": (
        method(
            "def draw(self, batch):\n    return (self.replay_jointly(batch),)\n"
            "def loss(self, joint):\n    z = self.net(joint.x)\n"
            "    return Loss({'a': cross_entropy(z, joint.y, reduction='none')}, z)",
            "Two",
        ),
        r"Loss\(logits=...\) must have only the 16 rows of the stream, got a tensor of shape \(32, 10\)",
    ),
    "observe": (
        method("def observe(self, inputs, labels, not_aug_inputs, epoch=None):\n    return 0.0"),
        r"Mine \(.*\): observe\(\) belongs to the engine and cannot be overridden. Write draw\(\)",
    ),
    "settings misspelt": (
        method("settings = ('class_il', 'domain-il')"),
        r"settings must be a tuple of some of class-il, .*, got \('class_il', 'domain-il'\)",
    ),
    "settings without a comma": (method("settings = ('class-il')"), r"settings must be a tuple of .*, got 'class-il'"),
    "a flag that is none": (
        method("@dataclass(frozen=True)\nclass Args:\n    beta: float = 1.0"),
        r"Args \(.*\): 'beta' of model mine is not a flag. Write: beta: ... = flag\(default, help\)",
    ),
    "Args that are no dataclass": (
        method("class Args(ReplayMethod.Args):\n    beta: float = flag(1.0, 'weight')", "Two"),
        r"Args \(.*\): the flags of model mine must be a dataclass. Write @dataclass\(frozen=True\) above it",
    ),
    "a flag of another type": (
        method("@dataclass(frozen=True)\nclass Args:\n    beta: dict = flag(None, 'weight')"),
        r"Args \(.*\): the flag 'beta' of model mine cannot be of the type <class 'dict'>. Use int, float",
    ),
    "a default of another type": (
        method("@dataclass(frozen=True)\nclass Args:\n    beta: float = flag('1', 'weight', low=0)"),
        r"Args \(.*\): the flag 'beta' of model mine must have a default of float, got '1'",
    ),
    "a published flag that is none": (
        method("published = published('a paper', {('seq-synth',): dict(lr=0.1, batchsize=16)})"),
        r"its published values for seq-synth name 'batchsize', which is not a flag. Did you mean batch_size",
    ),
    "a published value of another type": (
        method("published = published('a paper', {('seq-synth',): dict(lr='0.1')})"),
        r"its published values for seq-synth must give lr a value of float, got '0.1'",
    ),
    "published values without a source": (
        method("published = {('seq-synth', None): dict(lr=0.1)}"),
        r"its published values for seq-synth must be \(value, source\). Use published\(source, table\)",
    ),
}


def refused(result, said, status="crashed"):
    code, lines, found, file = result
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and re.search(said, lines[0]), lines[0]
    assert found == status
    return file in lines[0]


@pytest.mark.parametrize("returned", LOSSES)
def test_a_loss_that_is_none_is_refused_in_the_first_step(go, returned):
    assert refused(go(loss(returned)), LOSSES[returned])


@pytest.mark.parametrize("returned", DRAWS)
def test_blocks_that_are_none_are_refused_in_the_first_step(go, returned):
    assert refused(go(draw(returned)), DRAWS[returned])


@pytest.mark.parametrize("name", OTHERS)
def test_other_mistakes_of_a_method_are_refused(go, name):
    text, said = OTHERS[name]
    is_built = not re.search("observe|settings|Args|flag|default|published", name)
    assert refused(go(text), said, "crashed" if is_built else None)


# terms and the blocks that they are about

HALF = method(
    "def loss(self, stream, memory=None):\n    loss = super().loss(stream, memory)\n"
    "    margin = self.net(stream.x).square().mean(1)\n"
    "    names = ('current', 'memory') if memory is not None else ('current',)\n"
    "    return Loss({'current': loss.rows['current'], 'margin': NAMED, **{n: loss.rows[n] for n in names[1:]}})",
    "Two",
)
UNDER = [
    ("sgd",), ("sam",), ("sam", "--ascent_on", "current"), ("sam", "--ascent_on", "memory"), ("msam",), ("esam",),
    ("mesa",), ("saf",), ("c_flat", "--ascent_on", "memory"), ("adam",),
]  # fmt: skip


@pytest.mark.parametrize("words", UNDER, ids=" ".join)
def test_a_term_that_does_not_say_its_block_is_refused_under_every_optimizer(go, words):
    """A term of the stream's between others: by position it would be the memory's."""
    result = go(HALF.replace("NAMED", "margin"), "--optimizer", *words)
    assert refused(result, r"the loss term 'margin' does not say which block it is about.*\(one of stream, memory\)")


@pytest.mark.parametrize("words", UNDER, ids=" ".join)
def test_the_same_term_with_its_block_is_trained(go, words):
    code, lines, status, _ = go(HALF.replace("NAMED", "(stream, margin)"), "--optimizer", *words)
    assert code == 0 and status == "finished", lines


def test_losses_that_go_by_position_are_told_the_new_line(go):
    text = method(
        "def loss(self, stream, *memory):\n    rows = {'current': costs_of(self, stream)}\n"
        "    if memory:\n        rows['memory'] = costs_of(self, memory[0])\n    return Loss(rows)",
        "Two",
    )
    said = r"'current' does not say which block it is about, and the step has 2. Write the block \(one of "
    assert refused(go(text), said + r"stream, \*memory\) in each term: \{'name': \(block, costs\), ...\}")


# what an optimizer makes of it


def optimizer(body):
    return f'\n@OPTIMIZERS.register("my_sam")\nclass MySam(SharpnessAware):\n{body}\n'


OPTIMIZERS = {
    "ascent in place": (
        "    def ascent(self, g, objective):\n        torch._foreach_mul_(g, self.args.rho)\n        return g",
        r"my_sam \(.*\): it changes a gradient of the objective's in place. Make a new list",
    ),
    "descent without return": (
        "    def descent(self, g, g_adv):\n        torch._foreach_add(g, g_adv)",
        r"my_sam \(.*\): its update must be a list of \d+ tensors, one for each parameter, got None",
    ),
    "descent to one number": (
        "    def descent(self, g, g_adv):\n        return [part.mean() for part in g]",
        r"my_sam \(.*\): its update must have the shapes of the parameters",
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mistakes_of_an_optimizer_are_refused(go, name):
    body, said = OPTIMIZERS[name]
    assert refused(go(method("pass", "Two") + optimizer(body), "--optimizer", "my_sam"), said)


def test_gradients_may_be_changed_in_place_where_they_are_ones_own(go):
    body = (
        "    def ascent(self, g, objective):\n        offset = torch._foreach_mul(g, self.args.rho)\n"
        "        torch._foreach_mul_(offset, 0.5)\n        return offset"
    )
    assert go(method("pass", "Two") + optimizer(body), "--optimizer", "my_sam")[0] == 0


@pytest.mark.parametrize("name", ["saf", "mesa"])
def test_a_term_with_the_name_of_the_optimizers_is_refused(go, name):
    said = f"'{name}' is a term of the optimizer's. Rename the method's"
    assert refused(go(loss(f'Loss({{"{name}": c}})', "Two"), "--optimizer", name), said)


# what a benchmark gives to flags


@pytest.mark.parametrize(
    "defaults, said",
    [
        ("n_epoch=3", "its defaults name 'n_epoch', which is not a flag. Did you mean n_epochs"),
        ("lr='fast'", "its defaults must give lr a value of float, got 'fast'"),
    ],
)
def test_defaults_of_a_benchmark_for_flags_that_are_none_are_refused(go, defaults, said):
    text = '\n@DATASETS.register("my-data")\nclass MyData(SeqSynth):\n'
    text += f"    defaults = SeqSynth.defaults | dict({defaults})\n"
    assert refused(go(method("pass") + text, "--dataset", "my-data"), said, status=None)


# what is right


def test_flags_of_other_parts_may_have_defaults_and_published_values(go):
    """The radius of another optimizer, the draws of a memory that this method lacks; Optional as well as `| None`."""
    text = method(
        "published = published('a paper', {('seq-synth',): dict(rho=0.1, minibatch_size=4)})\n"
        "@dataclass(frozen=True)\nclass Args:\n    top: Optional[float] = flag(None, 'a number')"
    )
    assert go(text, "--optimizer", "adam", "--top", "0.5")[0] == 0


def test_blocks_may_come_as_a_list_and_the_costs_of_the_only_one_alone(go):
    assert go(draw("[batch.block]"))[0] == 0


# what only the run shows: a warning


def test_a_guide_of_a_term_that_never_comes_is_told(go):
    text = method("guides = {'memory': ('memory', 'replay')}", "Two")
    code, lines, _, _ = go(text)
    assert code == 0 and len(lines) == 1
    assert lines[0] == (
        "warning: mine: the guide 'memory' names the term 'replay', which the loss has not had so far. Its terms are "
        "current, "
        "memory."
    )


MEMORY = """
@METHODS.register("mine")
class Mine(Two):
    remember = ReplayMethod.remember
"""


def test_a_memory_that_stays_empty_is_told(go):
    text = MEMORY + "    def end_task(self, task):\n        pass\n"
    code, lines, status, _ = go(text, "--buffer_policy", "herding", "--buffer_size", "20")
    assert (code, status) == (0, "finished")
    assert any("mine: its memory is still empty. `remember` and `end_task` of ReplayMethod fill it" in line
               for line in lines)  # fmt: skip
    assert not any("memory" in line for line in go(MEMORY, "--buffer_policy", "herding", "--buffer_size", "20")[1])


def test_logits_that_are_kept_must_be_handed_over(go):
    code, lines, _, file = go(MEMORY + "    keeps_logits = True\n")
    assert code == 2 and len(lines) == 1
    assert f"mine ({file}): `keeps_logits` is True, but there are no logits of these rows. Write: Loss(" in lines[0]


def test_a_domain_benchmark_without_a_map_of_pixels_is_told(go):
    text = """
from flatcl.datasets import DomainBenchmark
@DATASETS.register("turned")
class Turned(DomainBenchmark):
    num_classes, shape, defaults = 2, (1, 4, 4), dict(n_tasks=2)
    def load(self, root):
        rows = torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 2
        return rows, rows
"""
    code, lines, _, file = go(MEMORY + text, "--dataset", "turned")
    assert code == 2 and f"turned ({file}): it has no `pixel_map`, which says how" in lines[-1]


def test_a_memory_whose_rows_are_not_told_is_told(go):
    text = method(
        "def draw(self, batch):\n    return (batch.block, *(Block(block.x, y=block.y) for block in self.replay()))",
        "Two",
    )
    code, lines, _, _ = go(text, "--optimizer", "sam", "--ascent_on", "memory")
    assert code == 0 and len(lines) == 1 and "no block has had rows of the memory so far" in lines[0]
