"""Steps that are recorded once and replayed: they are the steps that they stand for, and what cannot be is not."""

import random

import kills
import numpy as np
import pytest
import replays
import torch
from torch import nn

import flatcl
from flatcl.models._method import Block, Method
from flatcl.models.derpp import DerPP
from flatcl.models.er import ER
from flatcl.utils.arguments import resolve
from flatcl.utils.commands.train import main
from flatcl.utils.contracts._tape import Tape
from flatcl.utils.engine import program
from flatcl.utils.engine.build import build
from flatcl.utils.engine.phase import phase_of
from flatcl.utils.engine.program import Programs
from flatcl.utils.errors import UsageError
from flatcl.utils.optim import looksam, saf
from flatcl.utils.optim._base import Adam
from flatcl.utils.optim._driver import Driver
from flatcl.utils.registry import BACKBONES, METHODS, OPTIMIZERS, load_plugin

NEVER = {"gem"}  # methods none of whose steps is replayed


def built(*words, method=None, recorded=True):
    """A trainer on seq-synth, whose steps are recorded on a tape."""
    argv = ["--dataset", "seq-synth", "--stop_after", "2", "--disable_log", "--non_verbose", *words]
    trainer = build(resolve(argv), torch.device("cpu"), None)
    if method is not None:
        trainer.method.__class__ = method
    if recorded:
        trainer.optimizer.programs = Programs(trainer.method, trainer.optimizer, Tape())
    return trainer


def outcome(trainer):
    """Accuracies and weights of a whole run."""
    accuracy = trainer.run()["accuracy"]
    return accuracy, [p.detach().clone() for p in trainer.method.parameters()]


def same(a, b):
    return a[0] == b[0] and all(map(torch.equal, a[1], b[1]))


def is_exact(*words):
    """Whether a run with replays is the one without; at least half of its steps must be replays."""
    trainer = built(*words)
    done = outcome(trainer)
    assert trainer.optimizer.programs.replayed > trainer.cost.steps / 2
    return same(done, outcome(built(*words, recorded=False)))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The network of `tests/replays.py`, without dropout."""
    file = tmp_path_factory.mktemp("plugin") / "killable.py"
    file.write_text(kills.BACKBONE.replace("nn.Dropout(0.1)", "nn.Identity()"))
    return str(file)


PAIRS = kills.sample(max(len(METHODS.names()), len(OPTIMIZERS.names())), seed=0)


@pytest.mark.parametrize("model, optimizer", PAIRS)
def test_replayed_and_resumed_runs_are_the_ordinary_ones(model, optimizer, backbone):
    """Each method and each optimizer at least once; tests/records/replays has all pairs."""
    load_plugin(backbone)
    line = replays.check_pair(model, optimizer, backbone)
    assert line.get("equal"), replays.verdict(line)
    assert (line["replayed"] == 0) == (model in NEVER)
    assert line["replayed"] >= 0.4 * line["steps"] or model in NEVER  # gdumb has few


@pytest.mark.parametrize(
    "words",
    [
        ("--n_epochs", "3", "--lr_scheduler", "cosine"),  # a program for each epoch
        ("--amp", "bf16"),
        ("--optimizer", "adamw", "--optim_wd", "0.1"),
        ("--optimizer", "sgd", "--optim_mom", "0.9", "--optim_nesterov", "1", "--optim_wd", "0.01"),
        ("--optimizer", "sam", "--ascent_on", "memory", "--renormalize", "1", "--perturb", "no_norm_bias"),
        ("--optimizer", "cr_sam", "--cr_log", "1"),
        ("--optimizer", "msam", "--msam_shards", "3"),
    ],
)
def test_with_flags(words):
    assert is_exact("--model", "derpp", *words)


def test_a_program_for_each_learning_rate():
    trainer = built("--model", "er", "--n_epochs", "3", "--lr_scheduler", "cosine")
    trainer.run()
    rates = {make[0] for make in trainer.optimizer.programs.kept}
    assert len(rates) == 3


# what would go unnoticed if phases, numbers and draws were not what they are


def frozen_phase(monkeypatch):
    monkeypatch.setattr(looksam.LookSAM, "phase", lambda self: True)
    monkeypatch.setattr(looksam.LookSAM, "direction", lambda self, objective: DIRECTION(self, objective))
    return ("--optimizer", "looksam", "--looksam_every", "2")


def DIRECTION(self, objective):
    if self.clock["t"] % self.args.looksam_every == 0:
        return super(looksam.LookSAM, self).direction(objective)
    return objective.gradient()


def frozen_numbers(monkeypatch):
    update = Adam.update
    monkeypatch.setattr(Adam, "update", lambda self, p, g, rows, numbers: update(self, p, g, rows, Adam.numbers(self)))
    return ("--optimizer", "adam")


def no_tick(monkeypatch):
    monkeypatch.setattr(program.Program, "run", without_tick)
    return ("--optimizer", "looksam", "--looksam_every", "3")


RUN = program.Program.run


def without_tick(self, *arguments):
    clock = dict(self.optimizer.clock)
    objective = RUN(self, *arguments)
    self.optimizer.clock = clock
    return objective


@pytest.mark.parametrize("mistake", [frozen_phase, frozen_numbers, no_tick])
def test_the_comparison_notices(mistake, monkeypatch):
    words = mistake(monkeypatch)
    assert not is_exact("--model", "er", "--n_epochs", "2", *words)


# what is not replayed


def test_logged_steps_and_the_first_of_each_kind_are_ordinary():
    trainer = built("--model", "er", "--log_every", "2")
    trainer.run()
    programs = trainer.optimizer.programs
    assert programs.others > programs.replayed > 0 and not programs.ordinary


class Annealed(ER):
    """Its loss depends on what the host counts, and does not say so."""

    def loss(self, joint):
        self.calls = getattr(self, "calls", 0) + 1
        loss = super().loss(joint)
        return type(loss)({"replay": loss.costs["replay"] / self.calls})


class Centred(ER):
    """Its loss reads a tensor that `remember` replaces."""

    phase = ER.phase
    center = None

    def loss(self, joint):
        loss = super().loss(joint)
        return loss if self.center is None else type(loss)({"replay": loss.costs["replay"] * (1 + self.center)})

    def remember(self, batch, loss):
        super().remember(batch, loss)
        self.center = loss.total * 0.1


class Saying(Annealed):
    def phase(self):
        return getattr(self, "calls", 0)


class Stepwise(DerPP):
    """Two steps on each batch; the logits of the first are remembered."""

    phase = DerPP.phase

    def steps(self, batch):
        blocks = self.draw(batch)
        yield blocks
        yield blocks


def test_who_does_not_say_what_a_step_depends_on_is_not_replayed():
    trainer = built("--model", "er", method=Annealed)
    trainer.run()
    assert trainer.optimizer.programs.replayed == 0
    (why,) = trainer.optimizer.programs.ordinary
    assert "er does not say what its steps depend on" in why and "phase = ER.phase" in why
    with pytest.raises(UsageError, match="--cuda_graph 1: er does not say"):
        trainer.optimizer.programs.check()


@pytest.mark.parametrize("function", program.OF_METHOD)
def test_a_method_that_overrides_what_runs_within_a_task_has_to_say_its_phase(function):
    method = built("--model", "er", method=type("Own", (ER,), {function: getattr(ER, function)})).method
    assert "phase = ER.phase" in phase_of(method, program.OF_METHOD).why


@pytest.mark.parametrize("function", program.OF_OPTIMIZER)
def test_an_optimizer_that_overrides_what_runs_within_a_task_has_to_say_its_phase(function):
    optimizer = built("--model", "er", "--optimizer", "sam").optimizer
    assert phase_of(optimizer, program.OF_OPTIMIZER) == ()
    optimizer.__class__ = type("Own", (type(optimizer),), {function: getattr(type(optimizer), function)})
    assert "phase = SAM.phase" in phase_of(optimizer, program.OF_OPTIMIZER).why


def test_a_tensor_of_the_method_that_is_replaced_ends_its_programs():
    done = built("--model", "er", method=Centred)
    assert same(outcome(done), outcome(built("--model", "er", method=Centred, recorded=False)))
    assert any("center is replaced or changed between steps" in why for why in done.optimizer.programs.ordinary)


@pytest.mark.parametrize("model, flags", [("er", {"n_epochs": 4}), ("mer", {"batch_num": 3})])
def test_losses_that_a_callback_keeps_are_those_of_their_steps(model, flags, monkeypatch):
    class Keep(flatcl.Callback):
        def __init__(self):
            self.losses = []

        def after_step(self, state):
            self.losses.append((state.loss, *state.terms.values()))

    def trained(recorder):
        monkeypatch.setattr(program, "recorder", lambda device: recorder)
        keep = Keep()
        named = dict(model=model, dataset="seq-synth", stop_after=2, device="cpu", disable_log=True, non_verbose=True)
        run = flatcl.build(**named, **flags).run(callbacks=[keep])
        return [torch.stack(kept) for kept in keep.losses], run._trainer.optimizer.programs

    (replayed, programs), (ordinary, _) = trained(Tape()), trained(None)
    assert programs.replayed > 20 and not programs.kept  # of a run that has ended
    assert len(replayed) == len(ordinary) and all(map(torch.equal, replayed, ordinary))


@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
def test_what_is_ordinary_now_and_then_is_not_refused(optimizer):
    built("--model", "er", "--optimizer", optimizer).optimizer.programs.check()


def test_few_forms_and_phases_are_remembered(monkeypatch):
    monkeypatch.setattr(program, "KNOWN", 5)
    done = built("--model", "er", "--n_epochs", "2", method=Saying)
    done.run()
    assert 0 < len(done.optimizer.programs.known) <= 5 < done.cost.steps


def test_a_phase_that_is_always_another_is_never_replayed():
    done = built("--model", "er", method=Saying)
    assert same(outcome(done), outcome(built("--model", "er", method=Annealed, recorded=False)))
    assert done.optimizer.programs.replayed == 0 and not done.optimizer.programs.ordinary


def test_what_is_remembered_is_of_the_first_step_on_a_batch():
    words = ("--model", "derpp", "--n_epochs", "2")
    trainers = {}

    def done(recorded):
        trainers[recorded] = built(*words, method=Stepwise, recorded=recorded)
        return outcome(trainers[recorded])

    assert same(done(True), done(False)) and trainers[True].optimizer.programs.replayed > 0
    logits = [trainer.method.buffer.all()["logits"] for trainer in trainers.values()]
    assert torch.equal(*logits)


def test_networks_that_draw_are_not_replayed(tmp_path):
    file = tmp_path / "killable.py"
    file.write_text(kills.BACKBONE)
    words = ("--model", "er", "--plugin", str(file), "--backbone", "killable")
    done = built(*words)
    assert same(outcome(done), outcome(built(*words, recorded=False)))
    assert done.optimizer.programs.replayed == 0
    assert [*done.optimizer.programs.ordinary] == ["the network draws random numbers (dropout)"]


class Stateful(nn.Module):
    """A network of one layer; `scale` makes it depend on what Python keeps."""

    def __init__(self, shape, num_classes, args=None):
        super().__init__()
        self.layer = nn.Linear(shape[0] * shape[1] * shape[2], num_classes)
        self.passes, self.in_dict, self.mask = 0, {"passes": 0}, None
        self.register_buffer("mean", torch.ones(()))

    def forward(self, x):
        return self.layer(x.flatten(1)) * (self.scale(x) if self.training else 1.0)


class Counting(Stateful):
    def scale(self, x):
        self.passes += 1
        return 1 + 0.1 * (self.passes % 2)


class CountingInADict(Stateful):
    def scale(self, x):
        self.in_dict["passes"] += 1
        return 1 + 0.1 * (self.in_dict["passes"] % 2)


class Replacing(Stateful):
    def scale(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return 1 + self.mean


class DrawingFromPython(Stateful):
    def scale(self, x):
        return 1 + 0.1 * random.random()


class DrawingFromNumPy(Stateful):
    def scale(self, x):
        return 1 + 0.1 * np.random.rand()


class Caching(Stateful):
    """Keeps a tensor for the last number of rows, as some networks keep a mask."""

    def scale(self, x):
        if self.mask is None or len(self.mask) != len(x):
            self.mask = torch.linspace(0.5, 1, len(x))[:, None]
        return self.mask


DRAWS = "the network draws random numbers (dropout)"
CHANGES = "each pass changes net.{}, which Python keeps"


@pytest.mark.parametrize(
    "network, why",
    [
        (Counting, CHANGES.format("passes")),
        (CountingInADict, CHANGES.format("in_dict")),
        (Replacing, CHANGES.format("mean")),
        (DrawingFromPython, DRAWS),
        (DrawingFromNumPy, DRAWS),
    ],
)
def test_networks_that_decide_by_what_python_keeps_are_not_replayed(network, why):
    BACKBONES.register("stateful")(network)
    words = ("--model", "er", "--backbone", "stateful")
    done = built(*words)
    assert same(outcome(done), outcome(built(*words, recorded=False)))
    assert done.optimizer.programs.replayed == 0 and [*done.optimizer.programs.ordinary] == [why]


def test_a_network_that_keeps_a_tensor_for_each_number_of_rows_is_replayed_while_it_is_the_same():
    BACKBONES.register("stateful")(Caching)
    words = ("--model", "er", "--backbone", "stateful", "--n_epochs", "3", "--batch_size", "12")
    done = built(*words)
    assert same(outcome(done), outcome(built(*words, recorded=False)))
    assert done.optimizer.programs.replayed > 0


def test_a_recording_that_replaces_a_tensor_leaves_the_one_that_was_there():
    class Late(Stateful):
        def scale(self, x):
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:  # while it is recorded
                self.mean = self.mean * 2
            return 1 + self.mean

    BACKBONES.register("stateful")(Late)
    words = ("--model", "er", "--backbone", "stateful")
    done = built(*words)
    assert same(outcome(done), outcome(built(*words, recorded=False)))
    assert [*done.optimizer.programs.ordinary] == ["the step replaces net.mean"]
    assert done.method.net.mean == 1


class Waiting(nn.Module):
    def __init__(self, shape, num_classes, args=None):
        super().__init__()
        self.layer = nn.Linear(shape[0] * shape[1] * shape[2], num_classes)

    def forward(self, x):
        z = self.layer(x.flatten(1))
        return z * 2 if z.sum().item() > 1e9 else z


def test_a_step_that_waits_for_a_value_stays_ordinary():
    BACKBONES.register("waiting")(Waiting)
    words = ("--model", "er", "--backbone", "waiting")
    done = built(*words)
    assert same(outcome(done), outcome(built(*words, recorded=False)))
    assert done.optimizer.programs.replayed == 0
    (why,) = done.optimizer.programs.ordinary
    assert "cannot be recorded" in why and "_local_scalar_dense" in why


class Hoarder(Driver):
    """Makes a state that was not there in the ordinary steps."""

    phase = Driver.phase

    def direction(self, objective):
        g = objective.gradient()
        if objective.recorded:
            self.pending["late"] = g
        return g


def test_a_step_that_makes_new_state_stays_ordinary():
    trainer = built("--model", "er")
    optimizer = trainer.optimizer
    optimizer.__class__, optimizer.name = Hoarder, "hoarder"
    trainer.run()
    assert [*optimizer.programs.ordinary] == ["the step makes new state"]
    assert optimizer.programs.replayed == 0 and not optimizer.state


def test_programs_are_few_and_a_task_begins_without():
    trainer = built("--model", "er")
    trainer.run()
    programs, method = trainer.optimizer.programs, trainer.method
    assert programs.kept
    trainer.optimizer.begin_task(trainer.benchmark[1])
    assert not programs.kept and not programs.known
    for _ in range(3):
        for size in range(2, 2 + 2 * program.KEPT):
            x = torch.rand(size, *trainer.benchmark.shape)
            programs.step((Block(x, y=torch.zeros(size, dtype=torch.int64)),))
    assert len(programs.kept) == program.KEPT
    assert isinstance(method, Method)


def test_saf_has_a_phase_for_each_width_of_its_records():
    trainer = built("--model", "er", "--optimizer", "saf")
    before = trainer.optimizer.phase()
    trainer.run()
    assert trainer.optimizer.phase() != before
    assert isinstance(trainer.optimizer, saf.SAF)


# the flag


@pytest.mark.parametrize("wish, code, says", [("1", 2, "--cuda_graph 1 needs a CUDA device"), ("auto", 0, "")])
def test_the_flag_without_a_gpu(wish, code, says, capsys, tmp_path):
    argv = ["--model", "er", "--dataset", "seq-synth", "--stop_after", "1", "--debug_mode", "1", "--device", "cpu"]
    assert main([*argv, "--results_path", str(tmp_path), "--cuda_graph", wish]) == code
    assert says in capsys.readouterr().err
    assert code == 0 or not list(tmp_path.rglob("config.json"))


def test_gem_says_why_before_anything_is_trained(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(program, "recorder", lambda device: Tape())
    argv = ["--model", "gem", "--dataset", "seq-synth", "--results_path", str(tmp_path), "--cuda_graph", "1"]
    assert main(argv) == 2
    assert "gem solves its quadratic program on the host" in capsys.readouterr().err


def test_a_run_says_how_many_steps_were_replays(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(program, "recorder", lambda device: Tape())
    argv = ["--model", "er", "--dataset", "seq-synth", "--results_path", str(tmp_path), "--stop_after", "1"]
    assert main([*argv, "--cuda_graph", "auto"]) == 0
    assert "steps were replays of recorded ones" in capsys.readouterr().out


# the tape


def test_a_tape_repeats_on_the_same_memory_and_recording_changes_nothing():
    x, w = torch.arange(3.0), torch.ones(3)
    box = {}

    def operations():
        w.mul_(x + 1)
        box["sum"] = w.sum()

    replay = Tape()(operations)
    assert w.tolist() == [1, 1, 1]
    replay()
    assert w.tolist() == [1, 2, 3] and box["sum"] == 6
    x.fill_(1.0)
    replay()
    assert w.tolist() == [2, 4, 6] and box["sum"] == 12


def test_a_tape_takes_memory_not_names():
    w, other = torch.nn.Parameter(torch.ones(2)), torch.full((2,), 5.0)
    box = {}

    def operations():
        own = w.data
        w.data = other
        box["double"] = w.detach() * 2
        w.data = own

    replay = Tape()(operations)
    other.fill_(7.0)
    replay()
    assert box["double"].tolist() == [14, 14]


def test_a_tape_keeps_batchnorms_averages():
    norm, x = nn.BatchNorm1d(2), torch.rand(4, 2)
    replay = Tape()(lambda: norm(x))
    assert norm.running_mean.tolist() == [0, 0] and norm.num_batches_tracked == 0
    replay()
    assert torch.allclose(norm.running_mean, 0.1 * x.mean(0)) and norm.num_batches_tracked == 1


@pytest.mark.parametrize("wait", [lambda t: t.item(), lambda t: t.nonzero(), lambda t: torch.tensor(2.0)])
def test_a_tape_refuses_what_a_gpu_would(wait):
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        Tape()(lambda: wait(torch.ones(())))
