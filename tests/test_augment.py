"""Augmentation: CropFlip against kornia and torchvision, normalisation, replay draws, and where none takes place."""

from collections import Counter

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from made import declared
from PIL import Image
from scipy import stats
from torch import nn
from torchvision import transforms as T

from flatcl.utils.arguments import resolve
from flatcl.utils.commands.train import main
from flatcl.utils.engine.augment import Augment, CropFlip
from flatcl.utils.engine.build import build as build_trainer
from flatcl.utils.registry import DATASETS, METHODS

CPU = torch.device("cpu")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2615)
BENCHMARKS = [DATASETS.load(name) for name in declared()]


def pattern(channels=1, height=8, width=8):
    """(C, H, W) uint8, no two pixels alike and none black."""
    count = channels * height * width
    assert count < 256
    return torch.arange(1, count + 1, dtype=torch.uint8).view(channels, height, width)


def moved(image, top, left, flip, padding):
    """Flip, pad with zeros, cut out: what one draw must give, by NumPy."""
    image = image.numpy()
    image = image[..., ::-1] if flip else image
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    height, width = image.shape[-2:]
    return padded[:, top : top + height, left : left + width]


def outcomes(image, padding):
    """{bytes of the result: (top, left, flip)} over all draws; no two draws give the same picture."""
    span = range(2 * padding + 1)
    draws = [(top, left, flip) for top in span for left in span for flip in (False, True)]
    found = {moved(image, *draw, padding).tobytes(): draw for draw in draws}
    assert len(found) == len(draws)
    return found


def build(*words):
    config = resolve(["--model", "er", "--dataset", "seq-synth", "--disable_log", "--non_verbose", *map(str, words)])
    return build_trainer(config, CPU, None)


# ------------------------------------------------------------------------------------------------ crop and flip


@pytest.mark.parametrize("padding", [1, 2])
def test_crop_flip_draws_each_position_equally_often(padding):
    image, draws = pattern(), 6000
    torch.manual_seed(0)
    results = CropFlip(padding).on_bytes(image.expand(draws, -1, -1, -1))
    known = outcomes(image, padding)
    counts = Counter(known[result.numpy().tobytes()] for result in results)
    assert set(counts) == set(known.values()), "every position, flipped and not"
    positions = Counter()
    for (top, left, _), count in counts.items():
        positions[top, left] += count
    assert len(positions) == (2 * padding + 1) ** 2
    assert stats.chisquare(list(positions.values())).pvalue > 1e-3
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3, "the flip does not depend on the position"
    flips = sum(count for (_, _, flip), count in counts.items() if flip)
    assert stats.binomtest(flips, draws, 0.5).pvalue > 1e-3


def test_crop_flip_is_torchvisions_crop_and_flip_in_distribution():
    image, padding, draws = pattern(), 1, 3000
    known = outcomes(image, padding)
    reference = T.Compose([T.RandomCrop(8, padding=padding), T.RandomHorizontalFlip()])
    torch.manual_seed(1)
    theirs = Counter(known[reference(image).numpy().tobytes()] for _ in range(draws))
    ours = Counter(
        known[result.numpy().tobytes()] for result in CropFlip(padding).on_bytes(image.expand(draws, -1, -1, -1))
    )
    table = [[counts[draw] for draw in known.values()] for counts in (theirs, ours)]
    assert len(theirs) == len(ours) == 18
    assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("flip, share", [(0.0, 0.0), (1.0, 1.0), (0.2, 0.2)])
def test_the_flip_rate_is_obeyed(flip, share):
    torch.manual_seed(0)
    image, draws = pattern(), 2000
    known = outcomes(image, 1)
    results = CropFlip(1, flip=flip).on_bytes(image.expand(draws, -1, -1, -1))
    flips = sum(known[result.numpy().tobytes()][2] for result in results)
    assert abs(flips / draws - share) < 4 * (share * (1 - share) / draws) ** 0.5 + 1e-12


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10), (3, 11, 7)])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_each_image_gets_the_parameters_drawn_for_it(shape, padding):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(1, 256, (40, *shape)).astype(np.uint8))
    kept = images.clone()
    crop = CropFlip(padding)
    torch.manual_seed(7)
    params = crop.generate_parameters(images.shape)
    torch.manual_seed(7)
    results = crop.on_bytes(images)
    assert results.shape == images.shape and results.dtype == torch.uint8
    for image, result, top, left, flip in zip(
        images, results, params["top"].tolist(), params["left"].tolist(), params["flip"].tolist(), strict=True
    ):
        assert np.array_equal(result.numpy(), moved(image, top, left, flip, padding))
    assert torch.equal(images, kept), "the stored images stay as they are"
    if padding:
        assert len(set(zip(params["top"].tolist(), params["left"].tolist(), strict=True))) > 5, "different per image"


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 9)])
def test_bytes_and_floats_give_the_same_to_the_bit(shape):
    images = torch.randint(0, 256, (50, *shape), dtype=torch.uint8)
    crop = CropFlip(2)
    torch.manual_seed(3)
    from_bytes, state_bytes = crop.on_bytes(images), torch.get_rng_state()
    torch.manual_seed(3)
    from_floats, state_floats = crop(images.float()), torch.get_rng_state()
    assert torch.equal(from_bytes.float(), from_floats)
    assert torch.equal(state_bytes, state_floats)
    torch.manual_seed(3)
    through_kornia = K.AugmentationSequential(crop, data_keys=["input"])(images.float())
    assert torch.equal(through_kornia, from_floats)


def test_the_whole_pipeline_is_the_same_on_bytes_and_on_floats():
    class Hidden(nn.Module):
        """CropFlip without its way to work on bytes."""

        def __init__(self):
            super().__init__()
            self.inner = CropFlip(2)

        def forward(self, x):
            return self.inner(x)

    images = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8)
    results = []
    for transform in (CropFlip(2), Hidden()):
        torch.manual_seed(5)
        results.append(Augment([transform], MEAN, STD, CPU)(images))
    assert results[0].dtype == torch.float32 and torch.equal(*results)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 9)])
def test_the_transformation_matrix_maps_pixels(shape):
    _, height, width = shape
    images = pattern(*shape).expand(30, -1, -1, -1).float()
    crop = CropFlip(2)
    torch.manual_seed(0)
    results = crop(images)
    matrices = crop.transform_matrix
    assert matrices.shape == (30, 3, 3)
    inside = 0
    for image, result, matrix in zip(images, results, matrices, strict=True):
        seen = torch.zeros(height, width, dtype=torch.bool)
        for y in range(height):
            for x in range(width):
                column, row, one = (matrix @ torch.tensor([x, y, 1.0])).tolist()
                assert one == 1 and column == int(column) and row == int(row)
                if 0 <= column < width and 0 <= row < height:
                    assert torch.equal(result[:, int(row), int(column)], image[:, y, x])
                    seen[int(row), int(column)] = True
                    inside += 1
        assert (result[:, ~seen] == 0).all(), "what no pixel moved to is black"
    assert 0 < inside < 30 * height * width


def test_crop_flip_composes_with_kornias_own():
    images = pattern().expand(20, -1, -1, -1).float() / 255
    corners = torch.tensor([[2.0, 3.0], [5.0, 4.0]]).expand(20, -1, -1)
    both = K.AugmentationSequential(
        CropFlip(1), K.RandomHorizontalFlip(p=1.0), data_keys=["input", "mask", "keypoints"], same_on_batch=False
    )
    torch.manual_seed(0)
    moved_images, masks, points = both(images, images.clone(), corners)
    assert torch.equal(moved_images, masks)
    for image, result, before, after in zip(images, moved_images, corners, points, strict=True):
        for (x, y), (column, row) in zip(before.int().tolist(), after.round().int().tolist(), strict=True):
            assert result[0, row, column] == image[0, y, x]
    alone = CropFlip(1)
    torch.manual_seed(0)
    assert torch.equal(moved_images, alone(images).flip(-1))


# ------------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("cls", BENCHMARKS, ids=lambda cls: cls.name)
def test_plain_inputs_equal_torchvisions_to_the_bit(cls):
    channels = cls.shape[0]
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, channels, 1, 1)
    for channel in range(channels):
        ramp[:, channel] = ramp[:, channel].roll(37 * channel)
    array = ramp[0].permute(1, 2, 0).numpy()
    steps = [T.ToTensor()] + ([T.Normalize(cls.mean, cls.std)] if cls.mean is not None else [])
    expected = T.Compose(steps)(Image.fromarray(array[..., 0] if channels == 1 else array))
    augment = Augment([], cls.mean, cls.std, CPU)
    assert torch.equal(augment.plain(ramp)[0], expected) and torch.equal(augment(ramp)[0], expected)
    assert ramp.dtype == torch.uint8 and ramp[0, 0, 0, 1] == 1, "the stored images stay as they are"


def test_published_normalisations():
    values = {cls.name: (cls.mean, cls.std) for cls in BENCHMARKS if cls.mean is not None}
    assert values["seq-cifar10"] == (MEAN, STD)
    assert values["seq-cifar100"] == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert values["seq-tinyimg"] == ((0.4802, 0.4480, 0.3975), (0.2770, 0.2691, 0.2821))
    assert not {"seq-mnist", "perm-mnist", "rot-mnist", "mnist-360"} & set(values)


def test_padding_is_black_before_normalisation():
    images = torch.full((200, 3, 8, 8), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    inputs = Augment([CropFlip(2)], MEAN, STD, CPU)(images)
    black = ((0 - torch.tensor(MEAN)) / torch.tensor(STD)).view(3, 1, 1)
    white = ((1 - torch.tensor(MEAN)) / torch.tensor(STD)).view(3, 1, 1)
    is_black, is_white = (torch.isclose(inputs, level, rtol=0, atol=1e-6) for level in (black, white))
    assert (is_black | is_white).all() and is_black.any() and is_white.any()
    assert not torch.isclose(inputs, torch.zeros(())).any()


# ------------------------------------------------------------------------------- where it is done, and where it is not


def batches(trainer, count=4):
    stream = trainer.stream.epoch(trainer.benchmark[0].train)
    return [next(stream) for _ in range(count)]


def test_augmentation_can_be_switched_off():
    trainer = build("--augmentation", 0)
    before = torch.get_rng_state()
    for batch in batches(trainer):
        assert torch.equal(batch.inputs, trainer.augment.plain(batch.x))
    assert torch.equal(before, torch.get_rng_state()), "no random number is drawn in vain"
    augmented = batches(build())
    assert any(not torch.equal(batch.inputs, trainer.augment.plain(batch.x)) for batch in augmented)
    for plain, batch in zip(batches(trainer), augmented, strict=True):
        assert batch.x.dtype == torch.uint8 and batch.x.shape == plain.x.shape


def test_evaluation_never_augments():
    trainer = build()
    seen = []
    trainer.method.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    before = torch.get_rng_state()
    trainer.evaluate(trainer.method, 10)
    assert torch.equal(before, torch.get_rng_state())
    tests = torch.cat([task.test.images for task in trainer.benchmark])
    assert torch.equal(torch.cat(seen), trainer.augment.plain(tests))


def test_each_replay_draw_is_augmented_anew():
    trainer = build("--buffer_size", 64, "--minibatch_size", 64)
    method, image = trainer.method, pattern(3)
    images = image.repeat(64, 1, 1, 1)
    method.buffer.add(x=images, y=torch.zeros(64, dtype=torch.int64))
    known = outcomes(image, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (trainer.benchmark.mean, trainer.benchmark.std))

    def draw_of(inputs):
        return known[((inputs * std + mean) * 255).round().to(torch.uint8).numpy().tobytes()]

    torch.manual_seed(0)
    blocks = [*method.replay(draws=2), *method.replay(draws=2)]
    draws = [tuple(draw_of(row) for row in block.x) for block in blocks]
    assert [len(block) for block in blocks] == [64] * 4 and len(set(draws)) == 4
    assert all(len(set(draw)) > 8 for draw in draws), "not one augmentation for the whole draw"
    assert torch.equal(method.buffer.columns["x"], images), "the memory keeps the image itself"


def test_the_stream_augments_each_image_and_each_epoch_anew():
    trainer = build("--batch_size", 1000)
    split = trainer.benchmark[0].train
    epochs = []
    for _ in range(2):
        (batch,) = trainer.stream.epoch(split)
        order = batch.ids.argsort()
        assert torch.equal(batch.x[order], split.images)
        epochs.append(batch.inputs[order])
    plain = trainer.augment.plain(split.images)
    for one, other in ((epochs[0], plain), (epochs[1], plain), (epochs[0], epochs[1])):
        changed = (one != other).flatten(1).any(1).float().mean()
        assert 0.85 < changed < 1.0, "one draw in 18 leaves an image as it is"


def test_a_benchmark_may_declare_kornias_own_modules(tmp_path, monkeypatch, capsys):
    plugin = tmp_path / "own.py"
    plugin.write_text(
        "import kornia.augmentation as K\n"
        "from flatcl.datasets.seq_synth import SeqSynth\n"
        "from flatcl.utils.engine.augment import CropFlip\n"
        "from flatcl.utils.registry import DATASETS\n"
        "@DATASETS.register('kornia-own')\n"
        "class Own(SeqSynth):\n"
        "    def augmentations(self):\n"
        "        return [K.RandomCrop((8, 8), padding=1), K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), CropFlip(1)]\n"
    )
    for registry in (DATASETS, METHODS):
        monkeypatch.setattr(registry, "_objects", dict(registry._objects))
    words = ["--plugin", plugin, "--dataset", "kornia-own", "--n_epochs", 1, "--debug_mode"]
    assert main(["--model", "er", "--disable_log", "--non_verbose", *map(str, words)]) == 0
    assert "Class-IL" in capsys.readouterr().out
    trainers = [build(*words), build(*words)]
    assert [len(trainer.augment.transforms) for trainer in trainers] == [3, 3]
    results = []
    for trainer in trainers:
        torch.manual_seed(4)
        results.append(batches(trainer, 3))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one.inputs, two.inputs) and one.inputs.shape == one.x.shape
        assert one.inputs.dtype == torch.float32 and one.inputs.isfinite().all()
        assert not torch.equal(one.inputs, trainers[0].augment.plain(one.x))
        low, high = ((np.array(edge) - np.array([0.5] * 3)) / 0.25 for edge in (0.0, 1.0))
        assert one.inputs.min() >= low.min() - 1e-5 and one.inputs.max() <= high.max() + 1e-5


def test_order_of_declared_augmentations_is_kept():
    """Inverted before the crop, the padding stays black; inverted after it, the padding is white."""
    images = torch.full((100, 3, 8, 8), 128, dtype=torch.uint8)
    for transforms in ([K.RandomInvert(p=1.0), CropFlip(2)], [CropFlip(2), K.RandomInvert(p=1.0)]):
        torch.manual_seed(0)
        inputs = Augment(transforms, None, None, CPU)(images)
        padding = 0.0 if isinstance(transforms[-1], CropFlip) else 1.0
        is_padding = torch.isclose(inputs, torch.tensor(padding))
        assert is_padding.any() and torch.isclose(inputs[~is_padding], torch.tensor(127 / 255), atol=1e-5).all()
