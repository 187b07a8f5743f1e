"""Networks of timm and torchvision, pretrained weights, and backbones that are frozen but for their classifier."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn
from torch.nn.functional import interpolate

from flatcl.models._incremental import classifier_of
from flatcl.utils.arguments import resolve
from flatcl.utils.commands.train import main
from flatcl.utils.engine import checkpoint, weights
from flatcl.utils.engine.build import _synced
from flatcl.utils.engine.layout import rows_of_forward
from flatcl.utils.engine.trainer import Trainer
from flatcl.utils.errors import UsageError
from flatcl.utils.files import sha256_of
from flatcl.utils.registry import BACKBONES, ROOT, load_plugin

SMALL = ("timm:test_resnet", "timm:test_vit.r160_in1k", "torchvision:resnet18", "torchvision:mobilenet_v3_small")
SYNTH = ("--dataset", "seq-synth", "--non_verbose", "--threads", "1", "--device", "cpu")
SHORT = dict(n_tasks=5, stop_after=2, debug_mode=1)


@pytest.fixture(autouse=True)
def unpictured(monkeypatch):
    monkeypatch.setattr("flatcl.utils.engine.logs.Logs.finish", lambda *args, **options: [])


def make(name, shape=(3, 8, 8), num_classes=10, seed=0):
    torch.manual_seed(seed)
    return BACKBONES.load(name)(shape, num_classes, None)


def theirs(name, num_classes=10):
    """The network as its own package makes it."""
    family, _, variant = name.partition(":")
    if family == "timm":
        return timm.create_model(variant, num_classes=num_classes)
    return torchvision.models.get_model(variant, num_classes=num_classes)


def problems_of(*argv):
    with pytest.raises(UsageError) as caught:
        resolve([str(word) for word in argv])
    return caught.value.problems


def refused(capsys, *argv):
    """The one line that a command line is refused with."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def run(folder, *argv, code=0):
    """A run's folder."""
    before = {*folder.rglob("config.json")}
    assert main([*map(str, argv), "--results_path", str(folder), "--non_verbose"]) == code
    (file,) = {*folder.rglob("config.json")} - before
    return file.parent


# networks of other packages


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 28, 28)])
@pytest.mark.parametrize("name", SMALL)
def test_they_are_backbones_as_ours_are(name, shape):
    cls, net = BACKBONES.load(name), make(name, shape).eval()
    assert cls is BACKBONES.load(f" {name} ") and type(net) is cls and cls.name == name
    x = torch.rand(2, *shape)
    with torch.no_grad():
        logits, features = net(x), net.features(x)
    assert features.shape == (2, net.num_features) and logits.shape == (2, 10) and logits.isfinite().all()
    assert torch.equal(net.classifier(features), logits) and classifier_of(net) == ("classifier", net.classifier)
    assert net.training is False and make(name, shape).body.training, "a new network is in train mode"


@pytest.mark.parametrize("name", SMALL[:3])
def test_they_compute_what_the_packages_networks_compute(name, tmp_path):
    ours, reference = make(name, (3, 160, 160)).eval(), theirs(name).eval()
    weights.put(reference.state_dict(), ours, "a file", name)
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(ours(x), reference(x))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("name", ["googlenet", "densenet121"])
def test_files_with_the_older_names_of_torchvision_are_taken(name):
    """As torchvision's own: with classifiers half way, and with `norm.1` for `norm1`."""
    models = pytest.importorskip("torchvision").models
    plain = {"init_weights": False} if name == "googlenet" else {}
    state = models.get_model(name, weights=None, num_classes=10, **plain).state_dict()
    file = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): value for key, value in state.items()}
    assert any(key.startswith("aux1.") or ".norm.1." in key for key in file)
    ours = BACKBONES.load(f"torchvision:{name}")((3, 32, 32), 10, None)
    assert weights.put(file, ours, "a file", name).startswith("note: ")
    first = "body.conv1.conv.weight" if name == "googlenet" else "body.features.denseblock1.denselayer1.norm1.weight"
    assert torch.equal(ours.state_dict()[first], state[first.removeprefix("body.")])


def test_the_seed_makes_the_weights():
    one, two, other = (make("timm:test_vit", seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_images_are_resized_where_the_network_demands_a_size_and_nowhere_else():
    x = torch.rand(2, 3, 8, 8)
    vit, resnet = make("timm:test_vit").eval(), make("timm:test_resnet").eval()
    assert vit.resizes_to == (160, 160) and resnet.resizes_to is None
    with torch.no_grad():
        large = interpolate(x, (160, 160), mode="bilinear", antialias=True)
        assert torch.equal(vit.features(x), vit.body(large)) and torch.equal(vit(large), vit(x))
        assert torch.equal(resnet.features(x), resnet.body(x))
    cpu, large = torch.device("cpu"), (3, 160, 160)
    assert rows_of_forward(vit, (3, 8, 8), cpu, 400) == rows_of_forward(resnet, large, cpu, 1), "memory has its bounds"
    assert rows_of_forward(resnet, (3, 8, 8), cpu, 400) == 400


def test_grey_images():
    grey = torch.rand(2, 1, 28, 28)
    net = make("torchvision:resnet18", (1, 28, 28)).eval()
    with torch.no_grad():
        assert torch.equal(net(grey), net(grey.repeat(1, 3, 1, 1)))
    assert make("timm:test_resnet", (1, 28, 28)).body.conv1[0].in_channels == 1
    with pytest.raises(UsageError, match="torchvision:resnet18 takes images of 3 channels, got 2"):
        make("torchvision:resnet18", (2, 28, 28))


def test_auxiliary_classifiers_are_left_out():
    net = make("torchvision:googlenet", (3, 28, 28))
    assert net(torch.rand(2, 3, 28, 28)).shape == (2, 10), "in train mode too"


@pytest.mark.parametrize("model", ["er", "mgser_sam", "icarl"])
def test_methods_learn_with_them_under_sam(model, start):
    trainer = start(model, backbone="timm:test_resnet", optimizer="sam", **SHORT)
    before = {name: p.clone() for name, p in trainer.method.net.named_parameters()}
    summary = trainer.run()
    assert summary["backbone"] == "timm:test_resnet" and len(summary["accuracy"]["class-il"]) == 2
    assert all(not torch.equal(p, before[name]) for name, p in trainer.method.net.named_parameters())


def test_gradients_of_single_rows_of_a_resized_network(start):
    start("ewc_on", backbone="timm:test_vit", **{**SHORT, "stop_after": 1, "batch_size": 2}).run()


def test_a_network_that_draws_draws_the_same_in_both_passes_of_a_step(start):
    """Dropout and stochastic depth: with a radius of 0, the second pass is the first one."""
    trainer = start("er", backbone="torchvision:efficientnet_b0", optimizer="sam", rho=0, lr=1e-9)
    net, batch = trainer.method.train().net, next(trainer.stream.epoch(trainer.benchmark[0].train))
    kinds = {type(part).__name__ for part in net.modules()}
    assert {"Dropout", "StochasticDepth"} <= kinds and not torch.equal(net(batch.inputs), net(batch.inputs))
    ((objective, _),) = trainer.method.observe(batch, trainer.optimizer, trace=True)
    (first, _), (second, _) = objective.passes
    assert torch.allclose(first.total, second.total, rtol=1e-5)
    assert not torch.allclose(trainer.method.loss(*objective.blocks).total, first.total, rtol=1e-3)


def test_names_that_are_none():
    for name, near in {
        "timm:resnet81": "Did you mean timm:resnet18",
        "timm:resnet18.a1_in2k": "resnet18.a1_in1k",
        "timm:hf-hub:timm/resnet18": "unknown backbone",
        "timm:qqqqqqqq": "timm has",
        "torchvision:vit_b_61": "vit_b_16",
        "timn:resnet18": "timm:NAME",
        "resnet18:large": "write it without",
        "timm": "timm:NAME",
        "timm:": "timm:NAME",
        "torchvision": "torchvision:NAME",
    }.items():
        (problem,) = problems_of("--model", "er", "--dataset", "seq-synth", "--backbone", name)
        assert near in problem and len(problem) < 300
    assert (
        resolve(["--model", "er", "--dataset", "seq-synth", "--backbone", "TIMM:test_vit"]).backbone == "timm:test_vit"
    )


def test_networks_that_cannot_be_used_are_refused_before_training(capsys):
    argv = ("--model", "er", *SYNTH, "--disable_log", "--backbone")
    assert "does not end in a Linear layer" in refused(capsys, *argv, "torchvision:squeezenet1_0")
    line = refused(capsys, *argv, "torchvision:densenet121")
    assert "cannot take images of (3, 8, 8)" in line and "too small" in line
    (problem,) = problems_of("--model", "pnn", *SYNTH, "--backbone", "timm:test_resnet")
    assert "timm:test_resnet has none" in problem
    with pytest.raises(UsageError, match="--sync_bn does not support the layers BatchNormAct2d of --backbone timm:x"):
        _synced(timm.create_model("test_efficientnet"), "timm:x")


def test_norm_only_knows_their_normalisation_layers():
    argv = ("--model", "er", *SYNTH, "--optimizer", "sam", "--perturb", "norm_only", "--backbone")
    for name in ("timm:test_vit", "torchvision:regnet_x_400mf"):
        assert resolve([*argv, name]).perturb == "norm_only"


def test_without_timm_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "flatcl.backbone.timm", raising=False)
    monkeypatch.delitem(BACKBONES._objects, "timm", raising=False)
    (problem,) = problems_of("--model", "er", "--dataset", "seq-synth", "--backbone", "timm:resnet18")
    assert "--backbone timm:NAME needs the package timm" in problem and "flatcl[timm]" in problem


def test_listing_and_help_import_neither_package():
    code = (
        "import sys; from flatcl.utils.commands.train import main\n"
        "assert main(['--list']) == main(['--help']) == 0\n"
        "assert main(['--model', 'er', '--dataset', 'seq-synth', '--help']) == 0\n"
        "print({'timm', 'torchvision'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "set()", done.stderr
    assert {"timm:NAME", "torchvision:NAME"} <= {line.split()[0] for line in lines if line.startswith("  t")}


def test_a_plugin_can_add_a_family(tmp_path, capsys):
    file = tmp_path / "zoo.py"
    file.write_text(
        '"""Networks of a zoo."""\n'
        "from flatcl.backbone.mnistmlp import MnistMlp\nfrom flatcl.utils.registry import BACKBONES\n"
        "@BACKBONES.register('zoo')\nclass Zoo(MnistMlp):\n    @classmethod\n    def variant(cls, name):\n"
        "        return type('Zoo', (cls,), {'name': f'zoo:{name}'})\n"
    )
    argv = (
        "--plugin",
        str(file),
        "--model",
        "er",
        *SYNTH,
        "--backbone",
        "zoo:Ape_1",
        "--debug_mode",
        "--stop_after",
        "1",
    )
    config = json.loads((run(tmp_path, *argv) / "config.json").read_text())
    assert config["flags"]["backbone"]["value"] == "zoo:Ape_1" and "plugin zoo.py" in config["code"]
    load_plugin(str(file))
    assert "zoo" not in BACKBONES.names() and "zoo:NAME" in BACKBONES.choices()


def test_a_run_says_which_version_made_its_network_and_goes_on_with_no_other(tmp_path, monkeypatch, capsys):
    folder = stopped(tmp_path, monkeypatch, "--model", "er", "--backbone", "timm:test_resnet")
    code = json.loads((folder / "config.json").read_text())["code"]
    assert code["timm"] == version("timm") and {"backbone/timm.py", "backbone/_packaged.py"} <= code.keys()
    packages = json.loads((folder / "environment.json").read_text())["packages"]
    assert packages["timm"] == version("timm") and packages["safetensors"] == version("safetensors")
    monkeypatch.setattr("flatcl.backbone._packaged.version", lambda name: "0.9.0+cpu")
    assert resolve(["--from", str(folder)]).code["timm"] == "0.9.0", "a build is no other version"
    assert "made by other code or data: timm changed since" in refused(capsys, "--resume", folder)


# pretrained weights


def stopped(tmp_path, monkeypatch, *argv):
    """The folder of a run that a signal has stopped in its first task."""
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_checkpoint_is_due", lambda self: setattr(self, "_stop_signal", 15))
        return run(tmp_path, *argv, *SYNTH, code=143)


def given(net, file, form):
    """Writes a network's weights, in one of the forms in which they are found."""
    state = net.state_dict()
    if form == "safetensors":
        safetensors.torch.save_file(state, file)
    elif form == "state_dict":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, file)
    elif form == "model":
        torch.save({"model": {f"module.backbone.{name}": value for name, value in state.items()}}, file)
    else:
        torch.save(state, file)
    return file


@pytest.mark.parametrize("form", ["torch", "safetensors", "state_dict", "model"])
@pytest.mark.parametrize("name", ["resnet32", "mnistmlp", "timm:test_resnet", "timm:test_vit", "torchvision:resnet18"])
def test_weights_come_back_from_each_form_of_file(name, form, tmp_path):
    reference = theirs(name) if ":" in name else resolved(name, seed=1)
    file = given(reference, tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pt'}", form)
    net = resolved(name)
    note = weights.put(weights.read(str(file)), net, str(file), name)
    tensors = len(reference.state_dict())
    assert note == f"note: {tensors} tensors of {file} loaded into {name}"
    for one, other in zip(net.state_dict().values(), reference.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def resolved(name, num_classes=10, seed=0):
    """A network with the flags that it has by default."""
    config = resolve(["--model", "er", "--dataset", "seq-synth", "--backbone", name])
    torch.manual_seed(seed)
    return BACKBONES.load(name)((3, 8, 8), num_classes, config.view(BACKBONES.load(name)))


@pytest.mark.parametrize("name", ["resnet32", "timm:test_resnet"])
def test_a_classifier_of_other_classes_or_none_is_left_as_drawn(name, tmp_path):
    reference, net = resolved(name, 7, seed=1), resolved(name)
    drawn = net.classifier.weight.clone()
    state = reference.state_dict()
    for there in ("7", "none"):
        note = weights.put(state, net, "f.pt", name)
        assert f"the classifier keeps its random weights (in the file {there}" in note and "here 10x" in note
        assert torch.equal(net.classifier.weight, drawn)
        others = [key for key in state if not key.startswith("classifier.")]
        assert all(torch.equal(net.state_dict()[key], state[key]) for key in others)
        state = {key: state[key] for key in others if "num_batches_tracked" not in key}  # as old files are


def test_a_finished_runs_weights_begin_another_run(tmp_path, capsys):
    """Of a method that keeps a second network too."""
    words = (*SYNTH, "--debug_mode", "--stop_after", "1", "--keep_checkpoint", "0")
    for model in ("cls_er", "lucir"):
        first = run(tmp_path, "--model", model, "--backbone", "resnet32", *words)
        capsys.readouterr()
        argv = ["--model", "er", "--backbone", "resnet32", "--pretrained_weights", first / "model.pt", *words]
        second = run(tmp_path, *argv, "--freeze_backbone", "1")
        assert f"tensors of {first / 'model.pt'} loaded into resnet32" in capsys.readouterr().out
        old, new = (torch.load(folder / "model.pt", weights_only=True) for folder in (first, second))
        inner = "net.body." if model == "lucir" else "net."
        assert torch.equal(old[f"{inner}layers.7.conv1.weight"], new["net.layers.7.conv1.weight"])


def test_what_does_not_fit_is_named(capsys, tmp_path):
    state = resolved("resnet32").state_dict()
    del state["bn1.weight"]
    state["conv1.weight"] = torch.zeros(16, 3, 5, 5)
    state |= {f"extra.{number}": torch.zeros(()) for number in range(7)}
    torch.save(state, tmp_path / "odd.pt")
    argv = ("--model", "er", *SYNTH, "--disable_log", "--backbone", "resnet32", "--pretrained_weights")
    line = refused(capsys, *argv, tmp_path / "odd.pt")
    assert (
        f"--pretrained_weights {tmp_path}/odd.pt does not match --backbone resnet32: 1 missing (bn1.weight); " in line
    )
    assert "7 unexpected (extra.0, extra.1, extra.2, extra.3, extra.4 ...)" in line
    assert "1 of another shape (conv1.weight 16x3x5x5, here 16x3x3x3)" in line
    torch.save(theirs("torchvision:resnet18").state_dict(), tmp_path / "other.pt")
    assert "missing (" in refused(capsys, *argv, tmp_path / "other.pt")


class Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_files_that_are_no_weights_are_refused_in_one_line(tmp_path, capsys, monkeypatch):
    argv = ("--model", "er", *SYNTH, "--disable_log", "--pretrained_weights")
    whole = given(resolved("mnistmlp"), tmp_path / "whole.pt", "torch").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"epoch": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "numbers.pt")
    for name in ("cut.pt", "text.pt", "text.safetensors", "empty.pt", "trap.pt", "trap.pkl", "list.pt", "numbers.pt"):
        line = refused(capsys, *argv, tmp_path / name)
        assert f"--pretrained_weights {tmp_path / name}: " in line and len(line) < 400, name
        assert "weights_only" not in line and "\x1b" not in line
    assert not (tmp_path / "sprung").exists(), "no code of a file is run"
    assert "code would have to be run" in refused(capsys, *argv, tmp_path / "trap.pt")
    assert "must be a state dict, got list" in refused(capsys, *argv, tmp_path / "list.pt")
    assert "epoch, lr is not a tensor" in refused(capsys, *argv, tmp_path / "numbers.pt")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "needs the package safetensors" in refused(capsys, *argv, tmp_path / "text.safetensors")


def test_files_that_cannot_be_read_are_found_before_any_work(tmp_path):
    argv = ("--model", "er", "--dataset", "seq-mnist", "--base_path", tmp_path / "none", "--pretrained_weights")
    assert "it cannot be read (No such file or directory)" in problems_of(*argv, tmp_path / "none.pt")[0]
    assert "it cannot be read (" in problems_of(*argv, tmp_path)[0]
    problems = problems_of(*argv, tmp_path / "none.pt", "--lr_scheduler", "multistep")
    assert len(problems) == 2, "with all other problems"


def test_the_files_digest_is_part_of_what_made_a_run(tmp_path):
    words = ["--model", "er", "--dataset", "seq-synth", "--pretrained_weights", str(tmp_path / "w.pt")]
    codes = []
    for seed in (0, 1):
        given(resolved("mnistmlp", seed=seed), tmp_path / "w.pt", "torch")
        codes.append(resolve(words).code)
        assert codes[-1]["weights w.pt"] == sha256_of(tmp_path / "w.pt")
    assert codes[0] != codes[1] and resolve(words).hash != resolve(words[:-2]).hash


def test_a_run_that_goes_on_needs_its_file_no_more(tmp_path, monkeypatch, capsys):
    file = given(resolved("mnistmlp", seed=1), tmp_path / "w.pt", "torch")
    argv = ("--model", "er", "--pretrained_weights", str(file), "--stop_after", "1")
    whole = run(tmp_path / "whole", *argv, *SYNTH)
    part = stopped(tmp_path / "part", monkeypatch, *argv)
    again = stopped(tmp_path / "again", monkeypatch, *argv)
    (tmp_path / "w.pt").unlink()
    assert main(["--resume", str(part)]) == 0
    states = [checkpoint.load(folder / "checkpoint")["method"] for folder in (whole, part)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] if name != "_extra_state")
    later = run(tmp_path / "later", "--from", whole, "--continue", "1", "--stop_after", "2")
    code = [json.loads((folder / "config.json").read_text())["code"] for folder in (whole, later)]
    assert code[0]["weights w.pt"] == code[1]["weights w.pt"]
    assert "it cannot be read" in refused(capsys, "--from", whole)
    shutil.rmtree(again / "checkpoint")  # as where it was stopped before its first
    assert "it cannot be read" in refused(capsys, "--resume", again)
    given(resolved("mnistmlp", seed=2), tmp_path / "w.pt", "torch")
    assert "weights w.pt changed since" in refused(capsys, "--resume", again)


# frozen backbones

METHODS = (
    "er",
    "derpp",
    "mgser_sam",
    "lucir",
    "icarl",
    "ewc_on",
    "lwf",
    "xder",
    "cls_er",
    "bic",
    "gss",
    "hal",
    "agem",
    "si",
)


def body_of(method, net):
    """{name: tensor} of all but the classifier, wherever a method has put it."""
    state = {name.removeprefix("body."): value for name, value in net.state_dict().items()}
    return {name: value.clone() for name, value in state.items() if re.match(r"[01]\.", name)}


@pytest.mark.parametrize("model", METHODS)
def test_only_the_classifier_learns(model, start):
    """The convolution and BatchNorm of tiny-bn, with its running statistics, stay bit for bit."""
    words = {"fitting_epochs": 1} if model == "lucir" else {}
    trainer = start(model, freeze_backbone=1, **SHORT, **words)
    names, net = {*trainer.optimizer.names}, trainer.method.net
    assert names and not any(re.search(r"net\.(body\.)?[01]\.", name) for name in names)
    before, head = body_of(trainer.method, net), [p.clone() for p in trainer.optimizer.params]
    trainer.run()
    after = body_of(trainer.method, trainer.method.net)
    assert len(before) == 7 and all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(old, new) for old, new in zip(head, trainer.optimizer.params, strict=True))
    copies = [part for part in trainer.method.modules() if isinstance(part, nn.BatchNorm2d)]
    assert all(torch.equal(part.running_mean, after["1.running_mean"]) for part in copies), "of other networks too"


def test_dropout_of_a_frozen_part_is_off_and_that_of_others_is_not(start):
    trainer = start("er", backbone="torchvision:mobilenet_v3_small", freeze_backbone=1)
    net, x = trainer.method.train().net, torch.rand(2, 3, 8, 8)
    assert torch.equal(net(x), net(x)) and net.classifier.training and not net.body.training
    assert [p for p in net.parameters() if p.requires_grad] == [*net.classifier.parameters()]
    trainer.evaluate(trainer.method, 2)
    assert net.classifier.training and not net.body.training
    loose = start("er", backbone="torchvision:mobilenet_v3_small").method.train().net
    assert not torch.equal(loose(x), loose(x)) and all(part.training for part in loose.modules())


def test_what_a_frozen_backbone_does_not_fit(tiny_bn, tmp_path, capsys):
    words = ("--freeze_backbone", "1", *SYNTH)
    sam = ("--optimizer", "sam", "--perturb", "norm_only", "--plugin", tiny_bn, "--backbone", "tiny-bn")
    (problem,) = problems_of("--model", "er", *words, *sam)
    assert "--perturb norm_only needs normalisation layers to train, --freeze_backbone 1 leaves none" in problem
    given(resolved("mnistmlp"), tmp_path / "w.pt", "torch")
    problems = problems_of("--model", "pnn", *words, "--pretrained_weights", tmp_path / "w.pt")
    assert (
        "--freeze_backbone cannot be used with pnn" in problems[0]
        and "--pretrained_weights cannot be used with" in problems[1]
    )
    flat = tmp_path / "flat.py"
    flat.write_text(
        '"""Flat."""\nfrom torch import nn\nfrom flatcl.utils.registry import BACKBONES\n'
        "@BACKBONES.register('flat')\nclass Flat(nn.Sequential):\n    def __init__(self, shape, num_classes, args):\n"
        "        super().__init__(nn.Conv2d(3, num_classes, 8), nn.Flatten())\n"
    )
    line = refused(capsys, "--model", "er", *words, "--plugin", flat, "--backbone", "flat", "--disable_log")
    assert "--freeze_backbone 1 needs a network with a Linear layer" in line


@pytest.mark.parametrize("model", ["mgser_sam", "lucir"])
def test_a_run_with_a_frozen_backbone_resumes_exactly(model, tmp_path, monkeypatch, assert_same):
    argv = ("--model", model, "--backbone", "timm:test_resnet", "--freeze_backbone", "1", "--n_tasks", "2")
    argv += ("--buffer_size", "20", "--stop_after", "1") + (("--fitting_epochs", "1") if model == "lucir" else ())
    whole, part = run(tmp_path / "whole", *argv, *SYNTH), stopped(tmp_path / "part", monkeypatch, *argv)
    assert main(["--resume", str(part)]) == 0
    one, two = (checkpoint.load(folder / "checkpoint") for folder in (whole, part))
    for name in ("method", "optimizer", "random", "order"):
        assert_same(one[name], two[name])
