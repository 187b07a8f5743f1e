"""Networks with convolutions in channels_last: the same numbers up to the last digits, and nothing else is touched."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flatcl.utils.engine import layout
from flatcl.utils.engine.layout import lay_out, rows_of_forward, wants_channels_last
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import BACKBONES

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = (3, 8, 8)
VIEWS = '''"""A map of several places that is taken as a vector by `view`."""

from torch import nn

from flatcl.utils.registry import BACKBONES


@BACKBONES.register("views")
class Views(nn.Module):
    def __init__(self, shape, num_classes, args=None):
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(36, num_classes)

    def forward(self, x):
        return self.classifier(self.conv(x).view(len(x), -1))
'''


def network(name="reduced-resnet18"):
    torch.manual_seed(0)
    backbone = BACKBONES.load(name)
    return backbone(SHAPE, 10, backbone.Args() if hasattr(backbone, "Args") else None)


def kernels(module):
    return [part.weight for part in module.modules() if isinstance(part, nn.Conv2d)]


def is_last(p):
    """Also of 1x1 kernels, for which torch's own question has two answers."""
    return p.stride() == torch.empty(p.shape, memory_format=torch.channels_last).stride()


def strides(module):
    return {name: value.stride() for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def steps(trainer, number):
    """Losses of so many steps of the first task."""
    batches = trainer.stream.epoch(trainer.benchmark[0].train)
    trainer.method.train()
    done = (trainer.method.observe(next(batches), trainer.optimizer) for _ in range(number))
    return [objective.loss.total.item() for ((objective, _),) in done]


def test_kernels_alone_are_laid_out_and_stay_the_same_parameters():
    net = network()
    params, values = list(net.parameters()), copy.deepcopy(net.state_dict())
    others = {name: stride for name, stride in strides(net).items() if len(stride) != 4}
    lay_out(net, channels_last=True)
    assert all(a is b for a, b in zip(net.parameters(), params, strict=True))
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())
    assert all(map(is_last, kernels(net))) and {p.shape[2] for p in kernels(net)} == {1, 3}
    assert others.items() <= strides(net).items()
    places = [p.data_ptr() for p in params]
    lay_out(net, channels_last=True)
    assert [p.data_ptr() for p in params] == places, "what is laid out is not copied again"


def test_without_the_layout_everything_stays():
    net = network()
    before = strides(net)
    lay_out(net, channels_last=False)
    assert strides(net) == before


def test_auto_is_for_convolutions_on_the_cpu():
    conv, mlp = network(), network("mnistmlp")
    assert wants_channels_last("auto", conv, SHAPE, CPU)
    assert not wants_channels_last("auto", mlp, SHAPE, CPU)
    assert not wants_channels_last("auto", conv, SHAPE, GPU)
    for device in (CPU, GPU):
        assert wants_channels_last("1", conv, SHAPE, device) and not wants_channels_last("0", conv, SHAPE, device)


def test_asked_for_in_vain():
    with pytest.raises(UsageError, match="no effect on a network without convolutions"):
        wants_channels_last("1", network("mnistmlp"), SHAPE, CPU)


def test_the_trial_leaves_no_trace():
    net = network()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert wants_channels_last("auto", net.train(), SHAPE, CPU)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and net.training and not any(map(is_last, kernels(net)))


@pytest.mark.parametrize("choice, expected", [("auto", True), ("1", True), ("0", False)])
def test_a_run_is_built_as_the_flag_says(start, choice, expected):
    """The averages that cls_er keeps of its network too."""
    trainer = start("cls_er", backbone="reduced-resnet18", channels_last=choice)
    found = kernels(trainer.method)
    assert len(found) == 60 and [is_last(p) for p in found] == [expected] * 60
    assert trainer.method.channels_last is expected


def test_a_network_that_views_its_maps_stays_as_it_is(start, tmp_path):
    file = tmp_path / "views.py"
    file.write_text(VIEWS)
    trainer = start("er", backbone="views", plugin=file)
    assert not trainer.method.channels_last and not any(map(is_last, kernels(trainer.method)))
    steps(trainer, 1)


@pytest.mark.parametrize("name", ["reduced-resnet18", "resnet32"])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-3)], ids=str)
def test_gradients_are_those_of_the_other_layout(name, dtype, close):
    """In float32 a last digit now and then decides whether a ReLU is open."""
    one, other = network(name).to(dtype), network(name).to(dtype)
    lay_out(other, channels_last=True)
    x, y, found = torch.randn(6, *SHAPE, dtype=dtype), torch.arange(6), []
    for net in (one, other):
        grads = torch.autograd.grad(cross_entropy(net(x), y), list(net.parameters()))
        assert [g.stride() for g in grads] == [p.stride() for p in net.parameters()]
        found.append(torch.cat([g.reshape(-1) for g in grads]))
    assert not torch.equal(*found), "the flag would have no effect"
    assert (found[0] - found[1]).norm() < close * found[0].norm()


def test_training_is_the_same_up_to_the_last_digits(start):
    """With small steps: in ten large ones, last digits grow to a tenth of the loss, whatever they come from."""
    losses = [steps(start("er", backbone="reduced-resnet18", lr=1e-3, channels_last=choice), 4) for choice in "01"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] != losses[1]


@pytest.mark.parametrize("optimizer", ["sam", "adam", "looksam"])
def test_a_run_goes_on_bit_by_bit(start, optimizer, assert_same):
    """From what a checkpoint holds; the layout of all weights and averages comes back with it."""

    def fresh():
        flags = {"optim_mom": 0.9} if optimizer != "adam" else {}
        return start("derpp", backbone="reduced-resnet18", optimizer=optimizer, **flags)

    def state(trainer):
        return {"method": trainer.method.state_dict(), "optimizer": trainer.optimizer.state_dict()}

    whole, resumed, file = fresh(), fresh(), io.BytesIO()
    steps(whole, 2)
    torch.save(state(whole), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.method.load_state_dict(saved["method"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    assert strides(resumed.method) == strides(whole.method)
    for trainer in (whole, resumed):
        torch.manual_seed(1)
        trainer.stream.rng = np.random.default_rng(1)
        steps(trainer, 2)
    assert_same(state(resumed), state(whole))
    for name, entries in whole.optimizer.state.items():
        pairs = zip(entries, resumed.optimizer.state[name], strict=True)
        assert all(a.stride() == b.stride() for a, b in pairs), name


def test_a_teacher_is_laid_out_as_its_network(start):
    method = start("lucir", backbone="reduced-resnet18", buffer_size=20).method
    method.keep_teacher()
    assert strides(method.teacher.net.body) == strides(method.net.body) and all(map(is_last, kernels(method.teacher)))


def test_a_column_that_comes_later_is_laid_out_by_another_call(start):
    trainer = start("pnn", backbone="reduced-resnet18")
    for index in (0, 1):
        trainer.method.begin_task(trainer.benchmark[index])
    new = kernels(trainer.method.net.laterals)
    assert new and not any(map(is_last, new))
    lay_out(trainer.method, trainer.method.channels_last)
    assert all(map(is_last, kernels(trainer.method)))
    trainer.optimizer.begin_task(trainer.benchmark[1])
    steps(trainer, 1)


def test_columns_that_a_state_brings_are_laid_out_too(start):
    trainer = start("pnn", stop_after=2, n_epochs=1)
    trainer.run()
    other = start("pnn", stop_after=2, n_epochs=1).method
    other.load_state_dict(trainer.method.state_dict())
    assert len(other.net.columns) == 2 and all(map(is_last, kernels(other)))


@pytest.mark.parametrize("model", ["er", "pnn"])
def test_evaluation_counts_the_same_images_whatever_passes_at_a_time(model, start, monkeypatch):
    trainer = start(model, backbone="reduced-resnet18")
    trainer.method.begin_task(trainer.benchmark[0])
    steps(trainer, 4)
    found = []
    for rows in (1, 7, 64, 10**6):
        monkeypatch.setattr(layout, "CPU_PIXELS", rows * 8 * 8), monkeypatch.setattr(layout, "FEWEST", 1)
        found.append(trainer.evaluate(trainer.method, 2))
    assert found[0] == found[1] == found[2] == found[3]
    assert 0 < sum(found[0]["task-il"]) < len(trainer.benchmark), "nothing would be compared"


def test_rows_of_a_forward():
    conv, mlp, shape = network(), network("mnistmlp"), (3, 32, 32)
    assert rows_of_forward(conv, shape, CPU, 341) == 64 and rows_of_forward(conv, shape, CPU, 5) == 5
    assert rows_of_forward(conv, (3, 64, 64), CPU, 85) == 32 and rows_of_forward(conv, (3, 999, 999), CPU, 1) == 1
    assert rows_of_forward(mlp, shape, CPU, 341) == 341 and rows_of_forward(conv, shape, GPU, 5461) == 5461


def test_what_passes_at_a_time_changes_no_random_draw(start, monkeypatch):
    """LUCIR's first weights of a class come from augmented images."""
    method = start("lucir", backbone="reduced-resnet18", buffer_size=20).method
    images = method.context.benchmark[0].train.images
    found = []
    for rows in (3, 10**6):
        monkeypatch.setattr(layout, "CPU_PIXELS", rows * 8 * 8), monkeypatch.setattr(layout, "FEWEST", 1)
        torch.manual_seed(0)
        found.append(method.outputs_of(method.net.features, images, method.context.augment))
    assert torch.allclose(*found, atol=1e-5)
