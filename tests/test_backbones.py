"""Every registered backbone on every registered benchmark's shape; sizes, structure and initialisation of each."""

from math import sqrt

import pytest
import torch
import torchvision
from made import declared
from torch import nn
from torch.nn.functional import cross_entropy

from flatcl.backbone import resnet32
from flatcl.utils.arguments import args_of
from flatcl.utils.contracts import backbones
from flatcl.utils.registry import BACKBONES, DATASETS

NAMES = BACKBONES.names()
SHAPES = sorted({(DATASETS.load(name).shape, DATASETS.load(name).num_classes) for name in declared()})
RESNETS = {"resnet18": (512, 8), "reduced-resnet18": (160, 8), "resnet32": (64, 4)}  # last map: planes, total stride


def make(name, shape=(3, 32, 32), num_classes=10, **args):
    cls = BACKBONES.load(name)
    torch.manual_seed(0)
    return cls(shape, num_classes, args_of(cls)(**args) if args_of(cls) else None)


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


# ----------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "name, shape, num_classes, expected",
    [
        # 784 * 100 + 100, 100 * 100 + 100, 100 * 10 + 10
        ("mnistmlp", (1, 28, 28), 10, 89_610),
        ("resnet18", (3, 32, 32), 10, 11_173_962),
        ("resnet18", (3, 32, 32), 100, 11_220_132),
        ("resnet18", (3, 64, 64), 200, 11_271_432),
        # stem 3 * 20 * 9 + 40 = 580. A block of w planes has 2 * 9 * w * w + 4 * w; the first one of a stage that
        # doubles w / 2 to w has 9 * w * w / 2 + 9 * w * w + 4 * w, and w * w / 2 + 2 * w in its shortcut.
        # 20: 7,280 + 7,280. 40: 22,640 + 28,960. 80: 90,080 + 115,520. 160: 359,360 + 461,440. Classifier 1,610.
        ("reduced-resnet18", (3, 32, 32), 10, 1_094_750),
        # stem 3 * 16 * 9 + 32 = 464. Blocks have 2 * 9 * w * w + 4 * w, the first of a stage 13.5 * w * w + 4 * w.
        # 16: 5 * 4,672. 32: 13,952 + 4 * 18,560. 64: 55,552 + 4 * 73,984. Classifier 64 * 10 + 10.
        ("resnet32", (3, 32, 32), 10, 464_154),
    ],
)
def test_parameter_counts(name, shape, num_classes, expected):
    assert count(make(name, shape, num_classes)) == expected


def test_the_width_of_the_mlp_is_a_flag():
    net = make("mnistmlp", (1, 28, 28), 10, hidden=7)
    assert count(net) == 784 * 7 + 7 + 7 * 7 + 7 + 7 * 10 + 10 and net.num_features == 7


# ------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("shape, num_classes", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_shapes_on_every_benchmark(name, shape, num_classes):
    net = make(name, shape, num_classes).eval()
    x = torch.rand(3, *shape)
    with torch.no_grad():
        logits, features = net(x), net.features(x)
        assert logits.shape == (3, num_classes) and features.shape == (3, net.num_features)
        assert logits.dtype == torch.float32 and logits.isfinite().all()
        assert torch.equal(net.classifier(features), logits)
        assert isinstance(net.classifier, nn.Linear) and net.classifier.bias is not None
        assert torch.allclose(net(x[1:2]), logits[1:2], atol=1e-4), "in eval mode an image stands for itself"


@pytest.mark.parametrize("title", backbones.CONTRACTS)
@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_contracts(name, title):
    backbones.CONTRACTS[title](backbones.subject(name))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    net = make(name)
    loss = cross_entropy(net(torch.rand(8, 3, 32, 32)), torch.arange(8))
    loss.backward()
    for key, parameter in net.named_parameters():
        assert parameter.requires_grad and parameter.grad is not None, key
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, key


# ------------------------------------------------------------------------------------------------------ structure


def last_map(net, x):
    """What goes into the global average: the output of the last block."""
    found = []
    hook = net.layers.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        features = net.features(x)
    hook.remove()
    assert torch.allclose(found[0].mean((2, 3)), features)
    return found[0]


@pytest.mark.parametrize("size", [8, 28, 32, 64])
@pytest.mark.parametrize("name", RESNETS)
def test_there_is_no_max_pool(name, size):
    planes, stride = RESNETS[name]
    net = make(name, (3, size, size)).eval()
    assert last_map(net, torch.rand(2, 3, size, size)).shape == (2, planes, -(-size // stride), -(-size // stride))
    assert not any(isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)) for module in net.modules())


@pytest.mark.parametrize("training", [True, False])
def test_resnet18_is_torchvisions_with_a_small_stem(training):
    net = make("resnet18", (3, 16, 16), 10)
    reference = torchvision.models.resnet18(num_classes=10)
    reference.conv1, reference.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    ours, theirs = net.state_dict(), reference.state_dict()
    assert [tensor.shape for tensor in ours.values()] == [tensor.shape for tensor in theirs.values()]
    reference.load_state_dict(dict(zip(theirs, ours.values(), strict=True)))
    net.train(training), reference.train(training)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(net(x), reference(x), atol=1e-5)
        assert torch.allclose(net.bn1.running_var, reference.bn1.running_var)
    assert all(bn.eps == 1e-5 and bn.momentum == 0.1 for bn in net.modules() if isinstance(bn, nn.BatchNorm2d))


def test_resnet32_ends_without_relu_and_begins_with_relu_before_batchnorm():
    net, x = make("resnet32"), torch.randn(4, 3, 32, 32)
    into_norm = []
    net.bn1.register_forward_hook(lambda module, inputs, output: into_norm.append(inputs[0]))
    assert last_map(net, x).min() < 0
    assert into_norm[0].min() == 0 and into_norm[0].max() > 0
    assert last_map(make("resnet18"), x).min() == 0
    for number, block in enumerate(net.layers):
        with torch.no_grad():
            output = block(torch.randn(2, block.conv1.in_channels, 8, 8))
        assert (output.min() < 0) == (number == 14), "the last block alone has no ReLU"
    assert all(bn.eps == 1e-4 for bn in net.modules() if isinstance(bn, nn.BatchNorm2d))


@pytest.mark.parametrize("size", [8, 7])
def test_resnet32_shortcut_strides_and_adds_black_channels(size):
    block = resnet32.Block(4, 8, 2, last=True)
    nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    x = torch.randn(2, 4, size, size)
    with torch.no_grad():
        output = block(x)
    assert torch.equal(output[:, :4], x[:, :, ::2, ::2]) and not output[:, 4:].any()
    assert output.shape[1] == 8 and len(list(block.parameters())) == 6, "the shortcut has no parameters"


def test_resnet32_block_is_conv_norm_relu_conv_norm():
    block = resnet32.Block(4, 4, 1, last=False)
    x = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        expected = block.bn2(block.conv2(block.bn1(block.conv1(x)).clamp(min=0))) + x
        assert torch.allclose(block(x), expected.clamp(min=0), atol=1e-6)
    planes = [(block.conv1.in_channels, block.conv2.out_channels) for block in make("resnet32").layers]
    assert planes == [(16, 16)] * 5 + [(16, 32)] + [(32, 32)] * 4 + [(32, 64)] + [(64, 64)] * 4
    assert [block.conv1.stride[0] for block in make("resnet32").layers] == [1] * 5 + [2] + [1] * 4 + [2] + [1] * 4


# ------------------------------------------------------------------------------------------------- initialisation


def uniform_within(weight, bound):
    """Reaches the bounds, does not pass them, and is as spread out as a uniform distribution."""
    assert weight.abs().max() <= bound
    if weight.numel() > 500:
        assert weight.abs().max() > 0.97 * bound
        assert weight.std().item() == pytest.approx(bound / sqrt(3), rel=0.06)


def test_the_mlp_is_xavier_uniform_with_zero_biases():
    net = make("mnistmlp", (1, 28, 28), 10)
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(784, 100), (100, 100), (100, 10)]
    for layer in layers:
        uniform_within(layer.weight, sqrt(6 / (layer.in_features + layer.out_features)))
        assert not layer.bias.any()


@pytest.mark.parametrize("name", ["resnet18", "reduced-resnet18"])
def test_resnet18_has_torchs_default_initialisation(name):
    net = make(name)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            uniform_within(module.weight, 1 / sqrt(module.weight[0].numel()))
        elif isinstance(module, nn.Linear):
            uniform_within(module.weight, 1 / sqrt(module.in_features))
            assert module.bias.any() and module.bias.abs().max() <= 1 / sqrt(module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()


def test_resnet32_is_he_normal():
    net = make("resnet32")
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 31
    for module in convolutions:
        scaled = module.weight.detach() / sqrt(2 / module.weight[0].numel())
        error = 5 / sqrt(2 * scaled.numel())
        assert module.bias is None and scaled.std().item() == pytest.approx(1, abs=error)
        assert abs(scaled.mean().item()) < 2 * error
        if scaled.numel() > 2000:
            assert scaled.pow(4).mean().item() == pytest.approx(3, abs=0.6), "normal, not uniform (1.8)"
    assert net.classifier.weight.std().item() == pytest.approx(1 / 8, rel=0.12)
    assert not net.classifier.bias.any()
