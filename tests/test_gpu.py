"""On a CUDA device: every method and every optimizer trains there, and no step waits for it."""

import warnings

import pytest
import torch

import flatcl
from flatcl.utils.arguments import resolve
from flatcl.utils.engine.build import build as build_trainer
from flatcl.utils.engine.build import resolve_device
from flatcl.utils.registry import BACKBONES, METHODS, OPTIMIZERS

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

WAITS = {"gem": 1}  # of a step, said in the method's file


def waits(trainer) -> list[int]:
    """How often each step after the first task waits, at most a few of them; runs the trainer."""
    observe, counts = trainer.method.observe, []

    def watched(batch, optimizer, trace=False):
        is_late = trainer.progress.tasks or trainer.cost.batches > 50
        if trace or not is_late or len(counts) == 10:
            return observe(batch, optimizer, trace=trace)
        torch.cuda.set_sync_debug_mode("warn")  # it is a wait itself the first time that it is set
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            done = observe(batch, optimizer, trace=trace)
        torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(one.message) for one in seen))
        return done

    trainer.method.observe = watched
    trainer.run()
    return counts


def build(model: str, *words: str):
    words = words if "--cuda_graph" in words else (*words, "--cuda_graph", "0")
    argv = ["--model", model, "--dataset", "seq-synth", "--stop_after", "3", "--disable_log", "--non_verbose", *words]
    return build_trainer(resolve(argv), resolve_device("cuda"), None)


@pytest.mark.parametrize("model", [name for name in METHODS.names() if not METHODS.load(name).trains_jointly])
def test_no_step_of_a_method_waits_for_the_device(model):
    counts = waits(build(model))
    assert counts and max(counts) == WAITS.get(model, 0)


@pytest.mark.parametrize("model", ["derpp", "gss"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
def test_no_step_of_an_optimizer_waits_for_the_device(model, optimizer):
    counts = waits(build(model, "--optimizer", optimizer, "--n_epochs", "3"))
    assert counts and max(counts) == 0


def recorded(model: str, *words: str):
    return build(model, "--cuda_graph", "auto", "--n_epochs", "3", *words)


@pytest.mark.parametrize("model, optimizer", [("er", "sgd"), ("derpp", "adam"), ("mgser_sam", "sampa"), ("er", "esam")])
@pytest.mark.parametrize("backbone", ["mnistmlp", "resnet32"])
def test_recorded_steps_are_the_steps(model, optimizer, backbone):
    """The same kernels with the same numbers: in three tasks, each of which records anew. Deterministic kernels, since
    with others two ordinary runs differ too, by more than any bound once Adam has divided by small numbers."""
    words = ("--optimizer", optimizer, "--backbone", backbone, "--augmentation", "0", "--lr", "0.001")
    trainers = [recorded(model, *words), build(model, "--n_epochs", "3", *words)]
    for trainer in trainers:
        torch.manual_seed(0)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            trainer.run()
    programs = trainers[0].optimizer.programs
    assert programs.replayed > programs.others and not programs.ordinary
    one, other = ([p.detach() for p in trainer.method.parameters()] for trainer in trainers)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(one, other, strict=True))


class Waiting(torch.nn.Linear):
    """Its forward waits for the device, which no recording survives."""

    def __init__(self, shape, num_classes, args=None):
        super().__init__(shape[0] * shape[1] * shape[2], num_classes)

    def forward(self, x):
        z = super().forward(x.flatten(1))
        return z * 2 if z.sum().item() > 1e9 else z


def test_a_recording_that_fails_leaves_the_device_usable():
    BACKBONES.register("waiting")(Waiting)
    failing = recorded("xder", "--backbone", "waiting")  # it draws on the device
    failing.run()
    assert failing.optimizer.programs.replayed == 0
    assert any("cannot be recorded" in why for why in failing.optimizer.programs.ordinary)
    working = recorded("xder")
    working.run()
    assert working.optimizer.programs.replayed > 0


def test_a_recording_that_leaves_no_room_for_ordinary_steps_is_given_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    trainer = recorded("derpp")
    trainer.run()
    (why,) = trainer.optimizer.programs.ordinary
    assert trainer.optimizer.programs.replayed == 0 and "MiB beside an ordinary step, 0 are free" in why


def test_what_was_recorded_takes_no_memory_after_its_run():
    def reserved():
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    runs, sizes = [], []
    for _ in range(3):  # the first one makes the libraries' work spaces
        runs.append(
            flatcl.train(
                model="derpp",
                dataset="seq-synth",
                backbone="resnet32",
                device="cuda",
                n_epochs=3,
                disable_log=True,
                non_verbose=True,
            )
        )
        sizes.append(reserved())
    assert runs[0]._trainer.optimizer.programs.replayed > 0
    assert sizes[2] - sizes[1] < 32 * 2**20  # of the run itself, which is kept
