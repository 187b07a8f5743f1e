"""What a plugin's benchmark hands over, through the command line: what is wrong ends in one line, not in a traceback or
in a wrong number."""

import json
import subprocess
import sys
from pathlib import Path

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from made import declared
from torch import nn

from flatcl.datasets._benchmark import DomainBenchmark, Split
from flatcl.datasets.seq_synth import SeqSynth
from flatcl.utils.arguments import resolve
from flatcl.utils.commands.train import main
from flatcl.utils.engine.augment import Augment, CropFlip
from flatcl.utils.engine.augment_check import look_at, pipeline
from flatcl.utils.registry import DATASETS, METHODS

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = '''"""Three classes, two channels, in one task each; (x, y) are its training images and labels."""

import random

import kornia.augmentation as K
import numpy as np
import torch
from kornia.augmentation import auto
from torch import nn
from torchvision import transforms as T
from torchvision.transforms import v2

from flatcl.datasets._benchmark import Benchmark, DomainBenchmark
from flatcl.models.er import ER
from flatcl.utils.engine.augment import CropFlip
from flatcl.utils.registry import DATASETS, METHODS


class Each(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, images):
        return self.change(images)


@DATASETS.register("odd")
class Odd(Benchmark):
    num_classes = 3
    shape = (2, 6, 5)
    defaults = dict(n_tasks=3, n_epochs=1, batch_size=8, minibatch_size=8, lr=0.1)
    {declared}

    def load(self, root):
        rng = np.random.default_rng(0)
        x = torch.from_numpy(rng.integers(0, 256, (30, 2, 6, 5)).astype(np.uint8))
        y = torch.arange(30) % 3
        test = x[:9], y[:9]
        {load}
        return (x, y), test

    def augmentations(self):
        return {augmentations}


@METHODS.register("odd_er")
class OddEr(ER):
    {method}
'''


def plugin(folder, load="pass", declared="", augmentations="[]", method="pass"):
    """A file with these parts, in place of one that was loaded before."""
    for module in [name for name in sys.modules if name.startswith("flatcl_plugin_odd")]:
        del sys.modules[module]
        for registry in (DATASETS, METHODS):
            registry.forget(module)
    file = folder / "odd.py"
    text = PLUGIN
    for name, value in (("load", load), ("declared", declared), ("augmentations", augmentations), ("method", method)):
        text = text.replace("{" + name + "}", value)
    file.write_text(text)
    return file


def words(folder, model="er", **parts):
    return [
        *("--plugin", str(plugin(folder, **parts)), "--model", model, "--dataset", "odd", "--device", "cpu"),
        *("--threads", "1", "--non_verbose", "--results_path", str(folder / "results")),
    ]


@pytest.fixture
def refused(tmp_path, capsys):
    """`refused(load=..., ...)` -> the one line that the command line prints."""

    def refused(model="er", **parts):
        assert main(words(tmp_path, model, **parts)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return refused


@pytest.fixture
def accepted(tmp_path, capsys):
    """`accepted(load=..., ...)` -> (what the run printed of accuracies, what it wrote to stderr)."""

    def accepted(model="er", **parts):
        assert main([*words(tmp_path, model, **parts), "--disable_log"]) == 0, capsys.readouterr().err
        printed, errors = capsys.readouterr()
        return printed[printed.index("Accuracy in %") : printed.index(" steps, ")], errors

    return accepted


# ---------------------------------------------------------------------------------------------------- images, labels

IMAGES = {
    "float in 0..1": ("x = x.float() / 255", "(255 * x).round().to(torch.uint8)", "float32 from 0 to 1"),
    "float in 0..255": ("x = x.float()", "x.round().to(torch.uint8)", "float32 from 0 to 255"),
    "double NumPy in 0..1": ("x = x.numpy() / 255", "(255 * x).round().astype(np.uint8)", "float64"),
    "normalised": ("x = (x.float() - 128) / 64", "before normalisation", "from -2 to"),
    "not finite": ("x = x.float() / 0", "before normalisation", "nan"),
    "int64": ("x = x.long()", "Return x.to(torch.uint8)", "int64 from 0 to 255"),
    "int16 NumPy": ("x = x.numpy().astype(np.int16)", "Return x.astype(np.uint8)", "int16"),
    "uint16 NumPy": ("x = x.numpy().astype(np.uint16)", "Return x.astype(np.uint8)", "uint16 from 0 to 255"),
    "bool": ("x = x > 100", "Return 255 * x.to(torch.uint8)", "bool from 0 to 1"),
    "bytes cut from 0..1": ("x = (x.float() / 255).to(torch.uint8)", "(255 * x).round()", "only 0 and 1"),
    "HWC": ("x = x.permute(0, 2, 3, 1)", "x.permute(0, 3, 1, 2)", "(30, 6, 5, 2)"),
    "HWC NumPy": ("x = x.numpy().transpose(0, 2, 3, 1)", "x.transpose(0, 3, 1, 2)", "(30, 6, 5, 2)"),
    "flat": ("x = x.flatten(1)", "x.reshape(-1, 2, 6, 5)", "(30, 60)"),
    "another size": ("x = x[:, :, :5]", "`shape`", "(30, 2, 5, 5)"),
    "a list": ("x = list(x)", "must be a tensor", "a list of 30"),
    "text": ("x = np.array(['a.png'] * 30)", "must be a tensor", "<U5"),
    "no rows": ("x, y = x[:0], y[:0]", "at least one", "no training images"),
    "one label too few": ("y = y[1:]", "one label for each image", "30 training images and 29 training labels"),
}
LABELS = {
    "from 1": ("y = y + 1", "Return y - 1", "1..3"),
    "-1": ("y[:4] = -1", "4 below 0", "-1..2"),
    "beyond": ("y = y + 5", "num_classes to 8", "5..7"),
    "float": ("y = y.float()", "y.to(torch.int64)", "float32"),
    "float NumPy": ("y = y.numpy() * 1.0", "y.astype(np.int64)", "float64"),
    "bool": ("y = y > 1", "y.to(torch.int64)", "bool"),
    "a column": ("y = y[:, None]", "y[:, 0]", "(30, 1)"),
    "one-hot": ("y = torch.eye(3)[y]", "y.argmax(1)", "(30, 3)"),
    "2-D": ("y = y.repeat(4, 1)", "number of each image's class", "(4, 30)"),
    "a list": ("y = y.tolist()", "must be a tensor", "a list of 30"),
}


@pytest.mark.parametrize("load, do, got", IMAGES.values(), ids=IMAGES)
def test_images_that_could_mean_several_things_are_refused(refused, load, do, got):
    line = refused(load=load)
    assert line.startswith("error: odd: load") and do in line and got in line


@pytest.mark.parametrize("load, do, got", LABELS.values(), ids=LABELS)
def test_labels_that_are_not_the_classes_are_refused(refused, load, do, got):
    line = refused(load=load)
    assert line.startswith("error: odd: load") and do in line and got in line


@pytest.mark.parametrize(
    "load, got",
    [
        ("test = test[0].float(), test[1]", "load's test images must be uint8"),
        ("test = test[0], test[1] + 1", "load's test labels must be 0..2"),
        ("test = test[0], test[1][:4]", "9 test images and 4 test labels"),
        ("test = test[0][:0], test[1][:0]", "no test images"),
    ],
)
def test_test_data_is_checked_too(refused, load, got):
    assert got in refused(load=load)


@pytest.mark.parametrize(
    "returned, got",
    [
        ("None", "None"),
        ("x, y", "a tuple of 2 (Tensor, Tensor)"),
        ("x, y, *test", "a tuple of 4"),
        ("(x, y, y), test", "a tuple of 2 (a tuple of 3, a tuple of 2)"),
        ("{'train': (x, y), 'test': test}", "dict"),
        ("torch.utils.data.TensorDataset(x, y), torch.utils.data.TensorDataset(*test)", "TensorDataset"),
    ],
)
def test_load_returns_two_pairs(refused, returned, got):
    line = refused(load=f"return {returned}")
    assert "((train_x, train_y), (test_x, test_y))" in line and got in line


def test_a_class_without_training_images_must_be_meant(refused, accepted):
    load = "x, y = x[y != 1], y[y != 1]"
    line = refused(load=load, declared="defaults = Benchmark.defaults | dict(n_tasks=1)")
    assert "no training images for 1 of 3 classes: 1." in line and "empty_classes = (1,)" in line
    accepted(load=load, declared="defaults, empty_classes = Benchmark.defaults | dict(n_tasks=1, lr=0.1), (1,)")


SAME = {
    "tensor": "pass",
    "int32": "y = y.int()",
    "uint8 labels": "y = y.to(torch.uint8)",
    "NumPy": "x, y = x.numpy(), y.numpy()",
    "NumPy, read only": "x = x.numpy(); x.setflags(write=False); y = y.numpy().astype('>i4')",
    "uint16 NumPy labels": "y = y.numpy().astype(np.uint16)",
    "not contiguous": "x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)",
    "lists of two": "return [[x, y], list(test)]",
}


def test_what_can_be_meant_in_one_way_only_is_converted(accepted):
    results = {name: accepted(load=load) for name, load in SAME.items()}
    for name, (accuracy, errors) in results.items():
        assert errors == "" and accuracy == results["tensor"][0], name


DECLARED = {
    "mean of 3": ("mean, std = (0.5,) * 3, (0.5,) * 3", "a number for each channel of shape (2, 6, 5), 2, got 3"),
    "mean of 1": ("mean, std = (0.5,), (0.5,)", "2, got 1"),
    "a number": ("mean, std = 0.5, 0.5", "must be a tuple of numbers"),
    "a text": ("mean, std = 'ab', (1, 1)", "must be a tuple of numbers"),
    "std 0": ("mean, std = (0.5, 0.5), (0.5, 0.0)", "above 0 and finite, got (0.5, 0.0)"),
    "std below 0": ("mean, std = (0.5, 0.5), (0.5, -1)", "above 0 and finite"),
    "std infinite": ("mean, std = (0.5, 0.5), (0.5, float('inf'))", "above 0 and finite"),
    "std not a number": ("mean, std = (0.5, 0.5), (0.5, float('nan'))", "above 0 and finite"),
    "mean not a number": ("mean, std = (0.5, float('nan')), (0.5, 0.5)", "pixels in 0..1"),
    "mean in 0..255": ("mean, std = (125.3, 123.0), (63.0, 62.1)", "Divide mean and std by 255"),
    "mean alone": ("mean = (0.5, 0.5)", "mean is given without the other"),
    "std alone": ("std = (0.5, 0.5)", "std is given without the other"),
    "shape of two": ("shape = (6, 5)", "(channels, height, width)"),
    "shape of floats": ("shape = (2, 6.0, 5)", "(channels, height, width)"),
    "no num_classes": ("del num_classes", "has no `num_classes`"),
    "no shape": ("del shape", "has no `shape`"),
    "no load": ("load = Benchmark.load", "has no `load`"),
    "no n_tasks": ("defaults = dict(batch_size=8, minibatch_size=8)", "can set one of them in its `defaults`"),
}


@pytest.mark.parametrize("declared, got", DECLARED.values(), ids=DECLARED)
def test_what_a_class_declares_is_checked(refused, declared, got):
    if declared.startswith("load"):  # after the method, so that it stays
        line = refused(augmentations="[]\n\n    " + declared)
    else:
        line = refused(declared=declared)
    assert line.startswith("error: odd") and got in line


@pytest.mark.parametrize(
    "given, got",
    [
        ("torch.arange(30) - 1", "got -1..28"),
        ("torch.arange(30) + 2", "got 2..31"),
        ("torch.arange(29)", "got (29,)"),
        ("torch.arange(30.0)", "got float32"),
        ("np.arange(30)", "got ndarray"),
    ],
)
def test_pixel_maps_are_checked(refused, given, got):
    declared = f"transform = DomainBenchmark._transformed\n\n    def pixel_map(self, index):\n        return {given}\n"
    domain = (
        "train_split = lambda self, index: self.transform(self._train, index)\n"
        "    make_test = lambda self, index: self.transform(self._test, index)"
    )
    line = refused(declared=f"{declared}\n    {domain}")
    assert "pixel_map(0) must be an int64 tensor (30,) of numbers in 0..30" in line and got in line


def test_checks_cannot_be_switched_off(tmp_path):
    command = [sys.executable, "-O", str(ROOT / "main.py"), *words(tmp_path, load="y = y - 1")]
    done = subprocess.run(command, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: odd: load") and "got -1..1 (10 below 0)" in line
    assert done.stdout == ""


# ----------------------------------------------------------------------------------------------------- augmentations

REFUSED = {
    "torchvision's flip": ("[T.RandomHorizontalFlip()]", "Use kornia.augmentation.RandomHorizontalFlip"),
    "torchvision's rare draw": ("[T.RandomErasing(p=0.02)]", "Use kornia.augmentation.RandomErasing"),
    "torchvision's Compose": (
        "T.Compose([T.RandomCrop((6, 5), padding=1), T.RandomHorizontalFlip()])",
        "RandomCrop of torchvision draws once for all images",
    ),
    "v2's Compose": ("v2.Compose([v2.RandomHorizontalFlip()])", "RandomHorizontalFlip of torchvision draws once"),
    "torchvision's choice, by Python": (
        "[T.RandomChoice([T.RandomHorizontalFlip(1.0), T.RandomVerticalFlip(1.0)])]",
        "RandomChoice of torchvision draws once",
    ),
    "torchvision's blur": ("[T.GaussianBlur(3)]", "Use kornia.augmentation.RandomGaussianBlur"),
    "torchvision within kornia": (
        "K.ImageSequential(K.RandomHorizontalFlip(), T.RandomVerticalFlip())",
        "RandomVerticalFlip of torchvision draws once",
    ),
    "ToTensor": ("[T.ToTensor()]", "ToTensor fails on images (1, 2, 6, 5) float32: TypeError"),
    "one draw of one's own": (
        "[Each(lambda x: x.flip(-1) if torch.rand(()) < 0.5 else x)]",
        "Each draws once for all images",
    ),
    "same_on_batch": ("[K.RandomHorizontalFlip(same_on_batch=True)]", "same_on_batch=True). Leave it out"),
    "same_on_batch of a container": (
        "[K.AugmentationSequential(K.RandomHorizontalFlip(), CropFlip(1), same_on_batch=True)]",
        "same_on_batch=True). Leave it out",
    ),
    "random_apply": (
        "[K.ImageSequential(K.RandomHorizontalFlip(), K.RandomVerticalFlip(), random_apply=1)]",
        "ImageSequential with random_apply",
    ),
    "a crop for all or none": ("[K.RandomCrop((6, 5), padding=1, p=0.5)]", "RandomCrop with p_batch=0.5"),
    "kornia's policies": ("[auto.TrivialAugment()]", "TrivialAugment with its policy"),
    "mixup": ("[K.RandomMixUpV2()]", "RandomMixUpV2 mixes images"),
    "BatchNorm": ("[nn.BatchNorm2d(2)]", "BatchNorm2d mixes images"),
    "NumPy's generator": ("[Each(lambda x: x * np.random.rand())]", "which a resumed run would not repeat"),
    "Python's generator": ("[Each(lambda x: x * random.random())]", "which a resumed run would not repeat"),
    "a generator of its own": (
        "[Each(lambda x: x * torch.from_numpy(np.random.default_rng().random(len(x))).float().view(-1, 1, 1, 1))]",
        "which a resumed run would not repeat",
    ),
    "fewer rows": ("[Each(lambda x: x[::2])]", "must return as many images"),
    "half": ("[Each(lambda x: x.half())]", "(1, 2, 6, 5) float16"),
    "bytes": ("[Each(lambda x: (255 * x).byte())]", "(1, 2, 6, 5) uint8"),
    "a pair": ("[Each(lambda x: (x, None))]", "into a tuple"),
    "not finite": ("[Each(lambda x: x / 0)]", "not finite"),
    "an error": ("[Each(lambda x: x + torch.ones(7))]", "fails on images (1, 2, 6, 5) float32: RuntimeError"),
    "another size": ("[K.RandomCrop((4, 4))]", "images of (2, 4, 4), and the network expects (2, 6, 5)"),
    "None": ("None", "Return [] for none"),
    "a class": ("[K.RandomHorizontalFlip]", "Write RandomHorizontalFlip(...)"),
    "a text": ("'flip'", "got 'flip'"),
}


@pytest.mark.parametrize("augmentations, got", REFUSED.values(), ids=REFUSED)
def test_augmentations_that_do_not_serve_each_image_are_refused(refused, augmentations, got):
    line = refused(augmentations=augmentations)
    assert line.startswith("error: odd: ") and got in line


def test_single_modules_and_containers_stand_for_the_list_of_their_parts(accepted):
    alone = accepted(augmentations="[CropFlip(1)]")
    for given in ("CropFlip(1)", "nn.Sequential(CropFlip(1))", "T.Compose([CropFlip(1)])", "[[CropFlip(1)]]"):
        assert accepted(augmentations=given) == alone, given
    own = accepted(augmentations="[K.RandomHorizontalFlip(), K.RandomErasing(p=0.1)]")
    for given in (
        "nn.Sequential(K.RandomHorizontalFlip(), nn.Sequential(K.RandomErasing(p=0.1)))",
        "(K.RandomHorizontalFlip(), K.RandomErasing(p=0.1))",
    ):
        assert accepted(augmentations=given) == own, given


GOOD = {
    "AugmentationSequential": "K.AugmentationSequential(K.RandomCrop((6, 5), padding=1), K.RandomHorizontalFlip())",
    "ImageSequential": "K.ImageSequential(K.RandomHorizontalFlip(), K.RandomAffine(10.0))",
    "rare": "[K.RandomErasing(p=0.01)]",
    "resized": "[K.Resize((8, 8)), K.RandomCrop((6, 5))]",
    "noise for each pixel by torchvision": "[v2.GaussianNoise()]",
    "a function": "[lambda x: x.clamp(0, 1)]",
}


@pytest.mark.parametrize("augmentations", GOOD.values(), ids=GOOD)
def test_augmentations_that_serve_each_image_pass_in_silence(accepted, augmentations):
    assert accepted(augmentations=augmentations)[1] == ""


def test_a_transform_without_a_draw_passes_with_a_warning(accepted):
    """It changes the training images, and not the test images."""
    _, errors = accepted(augmentations="T.Compose([T.Normalize((0.5, 0.5), (0.25, 0.25))])")
    (line,) = errors.splitlines()
    assert line.startswith("warning: odd: the augmentation Normalize") and "declare mean and std" in line


def test_augmentations_that_are_off_are_not_looked_at(tmp_path):
    assert main([*words(tmp_path, augmentations="[T.RandomHorizontalFlip()]"), "--augmentation", "0"]) == 0


class Shown(SeqSynth):
    name = "shown"

    def __init__(self, *transforms):
        self.transforms = transforms

    def augmentations(self):
        return list(self.transforms)


def test_a_look_leaves_the_generators_alone(assert_same):
    import random

    shown = Shown(CropFlip(1), K.ColorJitter(0.4, 0.4, 0.4, 0.1), K.RandomErasing(p=0.1))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    look_at(Augment(pipeline(shown), None, None, "cpu"), shown)
    assert_same((torch.get_rng_state(), random.getstate(), np.random.get_state()), before)
    with pytest.raises(ValueError, match="Python's"):
        noisy = Shown(lambda x: x * random.random() * np.random.rand() * torch.rand(()))
        look_at(Augment(pipeline(noisy), None, None, "cpu"), noisy)
    assert_same((torch.get_rng_state(), random.getstate(), np.random.get_state()), before)


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_a_shared_draw_is_found_whatever_the_seed(p):
    for seed in range(40):
        torch.manual_seed(seed)
        shared = Shown(lambda x: x.flip(-1) if torch.rand(()) < p else x)
        with pytest.raises(ValueError, match="draws once"):
            look_at(Augment(pipeline(shared), None, None, "cpu"), shared)
        for good in (K.RandomHorizontalFlip(p=p), K.RandomHorizontalFlip(p=1 - p), K.RandomErasing(p=p / 10)):
            shown = Shown(good)
            look_at(Augment(pipeline(shown), None, None, "cpu"), shown)


# --------------------------------------------------------------------------------------------- images from a method


@pytest.mark.parametrize(
    "method, where",
    [
        ("def remember(self, batch, loss):\n        self.buffer.add(x=batch.inputs, y=batch.y)", "the memory"),
        ("def remember(self, batch, loss):\n        self.buffer.add(x=batch.x / 255, y=batch.y)", "the memory"),
        (
            "def draw(self, batch):\n        self.context.augment(batch.inputs)\n        return (batch.block,)",
            "the aug",
        ),
        ("def draw(self, batch):\n        self.context.augment.plain(batch.x.int())\n        return ()", "the aug"),
    ],
    ids=["inputs remembered", "floats remembered", "inputs augmented", "int32 converted"],
)
def test_images_that_are_not_stored_ones_are_refused_at_the_first_step(refused, method, where):
    line = refused(model="odd_er", method=method)
    assert line.startswith(f"error: images given to {where}") and "must be uint8" in line and "batch.x" in line


# ------------------------------------------------------------------------------------------------ what was decided


def decided(folder, *flags, dataset="seq-synth", plugins=()):
    argv = ["--model", "sgd", "--dataset", dataset, "--device", "cpu", "--threads", "1", "--non_verbose"]
    argv += [*plugins, "--debug_mode", "--results_path", str(folder), *map(str, flags)]
    assert main(argv) == 0
    (file,) = folder.rglob("benchmark.json")
    return json.loads(file.read_text())


def test_class_order_and_task_sizes_are_written_down(tmp_path):
    content = decided(tmp_path, "--permute_classes", "--seed", 3)
    config = resolve(["--model", "sgd", "--dataset", "seq-synth", "--permute_classes", "--seed", "3"])
    order = SeqSynth(config).class_order()
    assert list(content) == ["class_order", "tasks"] and content["class_order"] == order != sorted(order)
    assert [task["classes"] for task in content["tasks"]] == [order[2 * t : 2 * t + 2] for t in range(5)]
    assert {(task["train_rows"], task["test_rows"]) for task in content["tasks"]} == {(128, 32)}


def test_the_held_out_rows_are_those_of_load(tmp_path):
    content = decided(tmp_path, "--validation", "--permute_classes")
    config = resolve(["--model", "sgd", "--dataset", "seq-synth", "--permute_classes", "--validation"])
    benchmark = SeqSynth(config)
    images, labels = benchmark.load(Path())[0]
    held = content["held_out"]
    assert len(held) == 64 and held == sorted(set(held))
    for task, written in zip(benchmark, content["tasks"], strict=True):
        rows = [row for row in held if labels[row] in written["classes"]]
        assert torch.equal(task.test.images, images[rows])
        assert (written["train_rows"], written["test_rows"]) == (len(task.train), len(task.test))


def test_a_file_lies_there_before_training_and_is_left_by_a_run_that_fails(tmp_path):
    """Even a run that is stopped at once says what its seed decided."""
    file = plugin(tmp_path, method="def draw(self, batch):\n        raise KeyboardInterrupt")
    argv = ["--plugin", str(file), "--model", "odd_er", "--dataset", "odd", "--results_path", str(tmp_path / "r")]
    assert main([*argv, "--non_verbose", "--device", "cpu"]) == 130
    (found,) = (tmp_path / "r").rglob("benchmark.json")
    assert [task["train_rows"] for task in json.loads(found.read_text())["tasks"]] == [10, 10, 10]


def own(folder, base, body):
    file = folder / "own.py"
    file.write_text(
        "import torch\nfrom flatcl.datasets._benchmark import DomainBenchmark, Split\n"
        "from flatcl.datasets.seq_synth import SeqSynth\nfrom flatcl.utils.registry import DATASETS\n\n\n"
        f"@DATASETS.register('own')\nclass Own({base}):\n    {body}\n"
    )
    return "--plugin", str(file)


def test_splits_of_ones_own_are_counted(tmp_path):
    body = (
        "def train_split(self, index):\n"
        "        split, rows = super().train_split(index), slice(None, None, index + 1)\n"
        "        return Split(split.images[rows], split.labels[rows], split.ids[rows])"
    )
    content = decided(tmp_path, dataset="own", plugins=own(tmp_path, "SeqSynth", body))
    assert [task["train_rows"] for task in content["tasks"]] == [128, 64, 43, 32, 26]
    assert {task["test_rows"] for task in content["tasks"]} == {32}


DOMAIN = "pixel_map = lambda self, index: torch.arange(64).roll(index)"


def test_domains_are_counted_without_making_their_images(tmp_path):
    content = decided(tmp_path / "a", dataset="own", plugins=own(tmp_path, "DomainBenchmark, SeqSynth", DOMAIN))
    assert [(task["train_rows"], task["test_rows"]) for task in content["tasks"]] == [(640, 160)] * 5
    assert content["tasks"][0]["classes"] == list(range(10))


def test_domains_made_in_another_way_are_not_made_to_be_counted():
    made = []

    class Own(DomainBenchmark, SeqSynth):
        def train_split(self, index):
            made.append(index)
            return Split(self._train.images, self._train.labels, self._train.ids)

    class Known(Own):
        def num_rows(self, index):
            return 640, 160

    config = resolve(["--model", "sgd", "--dataset", "seq-synth"])
    assert {task["train_rows"] for task in Own(config).decided()["tasks"]} == {None} and made == []
    assert {task["train_rows"] for task in Known(config).decided()["tasks"]} == {640} and made == []


def test_decisions_that_json_cannot_hold_are_refused(tmp_path, capsys):
    plugins = own(tmp_path, "SeqSynth", "decided = lambda self: super(Own, self).decided() | {'a': torch.ones(2)}")
    argv = [*plugins, "--model", "sgd", "--dataset", "own", "--results_path", str(tmp_path / "results")]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "own: decided must return" in line and "Tensor" in line and ".tolist()" in line
    assert not list((tmp_path / "results").rglob("config.json")), "nothing is left of a run that never began"


@pytest.mark.parametrize("name", declared())
def test_no_registered_benchmark_needs_a_conversion_or_a_warning(name, recwarn):
    """Their augmentations, at their own shapes."""
    cls = DATASETS.load(name)
    shown = cls.__new__(cls)
    look_at(Augment(pipeline(shown), None, None, "cpu"), shown)
    assert not [warning for warning in recwarn if "augmentation" in str(warning.message)]
    assert not any(isinstance(part, nn.Sequential) for part in shown.augmentations())
