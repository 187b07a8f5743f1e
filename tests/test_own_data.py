"""A user's own data: folders of images of any kind, domains, arrays; what is refused, cached, and part of a run's
identity."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flatcl
from flatcl.datasets import _images
from flatcl.utils.arguments import SELECTORS, args_of, flags_of, resolve
from flatcl.utils.commands.train import main
from flatcl.utils.engine.build import build as build_trainer
from flatcl.utils.errors import DataError, UsageError
from flatcl.utils.registry import DATASETS
from flatcl.utils.studies.study import read

SIZES = {"ant": 7, "bee": 5, "cat": 9, "dog": 4, "eel": 6}  # images of each class
KINDS = (("RGB", "png"), ("L", "png"), ("P", "gif"), ("RGBA", "webp"), ("CMYK", "jpg"), ("1", "bmp"), ("LA", "png"))
QUICK = ("--backbone", "mnistmlp", "--image_size", "16", "--n_epochs", "1", "--device", "cpu", "--non_verbose")


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("flatcl.utils.engine.logs.Logs.finish", lambda *args, **options: [])


def draw_class(folder, name, number, seed=0):
    """Images of unequal sizes and modes, of one colour and noise, below folder/name."""
    rng = np.random.default_rng([seed, *name.encode()])
    colour = rng.integers(0, 200, 3)
    (folder / name / "deeper").mkdir(parents=True)
    for k in range(number):
        height, width = rng.integers(9, 50, 2)
        pixels = Image.fromarray((colour + rng.integers(0, 55, (height, width, 3))).astype(np.uint8))
        mode, kind = KINDS[k % len(KINDS)]
        pixels.convert(mode).save(folder / name / ("deeper" if k == 2 else ".") / f"{k}.{kind}")


def draw_tree(folder, sizes=SIZES, seed=0):
    for name, number in sizes.items():
        draw_class(folder, name, number, seed)
    (folder / "ant" / "notes.txt").write_text("no image")
    (folder / "ant" / ".hidden.png").write_bytes(b"no image either")
    (folder / ".git").mkdir()
    return folder


@pytest.fixture
def own(tmp_path):
    return draw_tree(tmp_path / "own")


@pytest.fixture
def split(tmp_path):
    """With train/ and val/."""
    draw_tree(tmp_path / "split" / "train")
    draw_tree(tmp_path / "split" / "val", dict.fromkeys(SIZES, 2), seed=1)
    return tmp_path / "split"


@pytest.fixture
def many(tmp_path):
    """Three domains, one of which has train/ and val/."""
    draw_tree(tmp_path / "many" / "photo" / "train", {"ant": 4, "bee": 5})
    draw_tree(tmp_path / "many" / "photo" / "val", {"ant": 2, "bee": 1}, seed=1)
    draw_tree(tmp_path / "many" / "art", {"ant": 5, "bee": 3}, seed=2)
    draw_tree(tmp_path / "many" / "sketch", {"ant": 2, "bee": 10}, seed=3)
    return tmp_path / "many"


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    y = {"train": np.arange(30) % 5, "test": np.arange(10) % 5}
    x = {part: (40 * labels[:, None, None] + rng.integers(0, 40, (len(labels), 8, 6))) for part, labels in y.items()}
    return {f"{part}_x": x[part].astype(np.uint8) for part in y} | {f"{part}_y": y[part] for part in y}


@pytest.fixture
def npz(tmp_path, arrays):
    np.savez(tmp_path / "own.npz", **arrays)
    return tmp_path / "own.npz"


def words(dataset, path, *more):
    flag = "--data_file" if dataset == "npz" else "--data_folder"
    return ["--dataset", dataset, flag, str(path), "--base_path", str(path.parent / "data"), *map(str, more)]


def configure(dataset, path, *more, model="sgd"):
    return resolve(["--model", model, *words(dataset, path, *more)])


def load(dataset, path, *more):
    config = configure(dataset, path, *more)
    return config.benchmark(config)


def refused(dataset, path, *more):
    with pytest.raises(UsageError) as caught:
        load(dataset, path, *more)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


def no_decoding(monkeypatch):
    monkeypatch.setattr(_images, "rgb", lambda *args: pytest.fail("decoded again"))


# -------------------------------------------------------------------------------------------------------- folders


def test_a_folder_without_a_split_is_split_by_names(own):
    benchmark = load("folder", own, "--image_size", "12,20", "--classes_per_task", "2,1,2")
    assert benchmark.shape == (3, 12, 20) and benchmark.class_names == tuple(SIZES)
    assert [task.classes for task in benchmark] == [range(2), range(2, 3), range(3, 5)]
    tests = [max(1, round(0.2 * number)) for number in SIZES.values()]
    assert benchmark._test.labels.bincount().tolist() == tests
    assert benchmark._train.labels.bincount().tolist() == [n - t for n, t in zip(SIZES.values(), tests, strict=True)]
    assert benchmark.decided()["class_names"] == list(SIZES)
    pixels = benchmark._train.images.double() / 255
    assert benchmark.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert benchmark.std == pytest.approx(pixels.std((0, 2, 3), unbiased=False).tolist())
    again = load("folder", own, "--image_size", "12,20", "--n_tasks", 1, "--seed", 5)
    assert torch.equal(again._test.images, benchmark._test.images), "not by the run's seed"
    half = load("folder", own, "--image_size", "12,20", "--n_tasks", 1, "--val_fraction", "0.99")
    assert half._train.labels.bincount().tolist() == [1] * 5


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_folder_with_its_own_split_keeps_it(split, part):
    (split / "val").rename(split / part)
    benchmark = load("folder", split, "--image_size", "16", "--n_tasks", "5")
    assert benchmark._train.labels.bincount().tolist() == list(SIZES.values())
    assert benchmark._test.labels.bincount().tolist() == [2] * 5
    problem = refused("folder", split, "--n_tasks", "5", "--val_fraction", "0.3")
    assert problem.startswith("--val_fraction has no effect on")


def test_every_kind_of_image_becomes_rgb_of_the_size(tmp_path):
    """The middle of the image, by shape, depth and orientation."""
    folder = tmp_path / "kinds" / "a"
    folder.mkdir(parents=True)
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = (250, 100, 50)  # the middle third
    Image.fromarray(wide).save(folder / "0_wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(folder / "1_high.PNG")
    Image.fromarray(np.full((10, 10), 51400, np.uint16)).save(folder / "2_deep.png")  # 200 * 257
    Image.fromarray(np.full((10, 10), 51400, np.uint16)).save(folder / "3_deep.tif")
    (folder / "4_deep.pgm").write_bytes(b"P5\n10 10\n65535\n" + np.full(100, 51400, ">u2").tobytes())
    turned = np.zeros((10, 10, 3), np.uint8)
    turned[:5] = 240  # the upper half; the EXIF data turns it to the right
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(turned).save(folder / "5_turned.png", exif=exif)
    palette = Image.new("P", (10, 10), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(folder / "6_palette.gif", transparency=0)
    images, labels, names = _images.read_folder(folder.parent, ["a"], (10, 10), tmp_path / "data")
    assert names == sorted(names) and labels.tolist() == [0] * 7 and images.dtype == np.uint8
    for row in (0, 1):
        assert (images[row] == np.array([250, 100, 50])[:, None, None]).all(), names[row]
    for row in (2, 3, 4):
        assert (images[row] == 200).all(), names[row]
    assert (images[5][:, :, 5:] == 240).all() and (images[5][:, :, :5] == 0).all()
    assert (images[6] == np.array([10, 200, 30])[:, None, None]).all()


def test_an_image_of_the_size_is_taken_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    (tmp_path / "plain" / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "plain" / "a" / "0.png")
    images, _, _ = _images.read_folder(tmp_path / "plain", ["a"], (16, 12), tmp_path / "data")
    assert np.array_equal(images[0], pixels.transpose(2, 0, 1))


def test_broken_images_are_counted_named_and_left_out(own):
    whole = (own / "cat" / "0.png").read_bytes()
    for k in range(6):
        (own / "cat" / f"z{k}.png").write_bytes(whole[: 20 + k])
    (own / "bee" / "gone.jpg").symlink_to(own / "nowhere.jpg")
    svg = own / "bee" / "not.png"
    svg.write_text("<svg/>")
    for _ in range(2):  # decoded, and from the cache
        with pytest.warns(UserWarning) as warned:
            benchmark = load("folder", own, "--image_size", "16", "--n_tasks", "1")
        (line,) = [str(warning.message) for warning in warned]
        assert "8 of 39 images cannot be read and are left out: bee/gone.jpg" in line and line.endswith("and 3 more")
        assert len(benchmark._train) + len(benchmark._test) == sum(SIZES.values())
    for file in (own / "dog").rglob("*.*"):
        file.write_bytes(b"broken")
    (own / "eel" / "a.txt").write_text("")
    with pytest.warns(UserWarning, match="12 of 39 images cannot be read"):
        problem = refused("folder", own, "--image_size", "16", "--n_tasks", "1")
    assert "no image of the class(es) dog can be read (4 other or broken file(s); images are .png" in problem


def test_an_image_that_would_fill_the_memory_is_left_out(own, monkeypatch):
    monkeypatch.setattr(_images, "MAX_PIXELS", 50 * 50)
    Image.new("RGB", (51, 50)).save(own / "bee" / "large.png")
    with pytest.warns(UserWarning, match=r"1 of 32 .*bee/large.png \(51x50, more than 2,500 pixels\)"):
        load("folder", own, "--image_size", "16", "--n_tasks", "1")


def test_images_are_decoded_once_for_each_size_and_again_when_they_change(own, monkeypatch):
    flags = ("--image_size", "16", "--n_tasks", "1")
    first = load("folder", own, *flags)
    with monkeypatch.context() as patch:
        no_decoding(patch)
        again = load("folder", own, *flags, "--val_fraction", "0.5")
        assert len(again._test) > len(first._test)
        with pytest.raises(pytest.fail.Exception):
            load("folder", own, "--image_size", "17", "--n_tasks", "1")
    assert load("folder", own, "--image_size", "17", "--n_tasks", "1").shape == (3, 17, 17)
    file = own / "ant" / "0.png"
    Image.new("RGB", (20, 20), (255, 0, 0)).save(file)
    assert any(len(image.unique()) == 2 for image in load("folder", own, *flags).joint_split().images[:7])
    assert len(list((own.parent / "data" / "cache").iterdir())) == 2
    file.unlink()
    changed = load("folder", own, *flags)
    assert len(changed._train) + len(changed._test) == sum(SIZES.values()) - 1
    assert not [path for path in own.rglob("*") if "cache" in path.name], "nothing is written into the user's folder"


def test_a_folder_that_links_to_the_images_is_followed(own, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in SIZES:
        (linked / name).symlink_to(own / name)
    assert len(load("folder", linked, "--image_size", "16", "--n_tasks", "5").joint_split()) == 25


def test_folders_that_cannot_be_used_are_refused(own, split, tmp_path):
    classes = ("--n_tasks", "5")
    assert "there is no such folder" in refused("folder", tmp_path / "nowhere", *classes)
    (tmp_path / "empty").mkdir()
    assert "no sub-folders" in refused("folder", tmp_path / "empty", *classes)
    assert (
        "folder does not say into how many tasks its 5 classes are split. Give --classes_per_task or --n_tasks"
        in refused("folder", own)
    )
    assert "must divide the 5 classes of folder, got 2" in refused("folder", own, "--n_tasks", "2")
    assert "add up to the 5 classes of folder, got 6" in refused("folder", own, "--classes_per_task", "2,4")
    with pytest.raises(UsageError) as caught:
        resolve(["--model", "sgd", "--dataset", "folder", "--image_size", "1,2,3"])
    assert "--image_size must be at least 8" in caught.value.problems[0]
    with pytest.raises(UsageError) as caught:
        resolve(["--model", "sgd", "--dataset", "folder", "--image_size", "16,16,16"])
    assert "needs --data_folder, got none" in caught.value.problems[0] and "got 3" in caught.value.problems[1]
    shutil.rmtree(split / "val" / "dog")
    (split / "val" / "extra").mkdir()
    problem = refused("folder", split, *classes)
    assert f"{split / 'val'} lacks dog" in problem and f"{split / 'train'} lacks extra" in problem
    shutil.rmtree(split / "val")
    assert "neither val/ nor test/" in refused("folder", split, *classes)
    for file in list((own / "bee").rglob("*.*"))[1:]:
        file.unlink()
    assert "training and test images: bee" in refused("folder", own, "--image_size", "16", *classes)


def test_checks_of_methods_know_the_classes_of_a_folder(own):
    with pytest.raises(UsageError, match="one exemplar of each of the 5 classes of folder, got 4"):
        configure("folder", own, "--n_tasks", "5", "--buffer_size", "4", model="icarl")
    with pytest.raises(UsageError, match="--custom_class_order must name each class 0..4 of folder once"):
        configure("folder", own, "--n_tasks", "5", "--custom_class_order", "0,1,2,3")
    assert configure("folder", own, "--n_tasks", "5", "--perturb", "norm_only", "--optimizer", "sam").perturb


def test_a_folder_can_have_a_class_that_is_called_train(tmp_path):
    draw_tree(tmp_path / "traffic", {"ant": 2, "car": 4, "train": 4})
    assert load("folder", tmp_path / "traffic", "--n_tasks", "3", "--image_size", "8").class_names[2] == "train"


# -------------------------------------------------------------------------------------------------------- domains


def test_each_domain_is_a_task_with_all_classes(many):
    benchmark = load("domains", many, "--image_size", "16")
    assert benchmark.config.n_tasks == 3 and benchmark.config.origins["n_tasks"] == "dataset domains"
    assert benchmark.decided()["domains"] == ["art", "photo", "sketch"]
    assert [(len(task.train), len(task.test)) for task in benchmark] == [(6, 2), (9, 3), (9, 3)]
    assert [benchmark.num_rows(index) for index in range(3)] == [(6, 2), (9, 3), (9, 3)]
    for task in benchmark:
        assert task.classes == range(2) and set(task.train.labels.tolist()) == {0, 1}
    for part in ("train", "test"):
        ids = torch.cat([getattr(task, part).ids for task in benchmark])
        assert len(ids.unique()) == len(ids)
    joint = benchmark.joint_task.train
    assert torch.equal(joint.images, torch.cat([task.train.images for task in benchmark]))
    turned = load("domains", many, "--image_size", "16", "--domain_order", "sketch,art,photo")
    assert torch.equal(turned[0].train.images, benchmark[2].train.images)
    photo, _, _ = _images.read_folder(many / "photo" / "val", ["ant", "bee"], (16, 16), many)
    assert torch.equal(benchmark[1].test.images, torch.from_numpy(photo))


def test_names_of_domains_may_have_spaces(many, tmp_path):
    (many / "photo").rename(many / "Real World")
    order, given = (
        ("sketch", "Real World", "art"),
        ["--model", "sgd", "--dataset", "domains", "--data_folder", str(many)],
    )
    forms = [order, (" sketch,Real World, art",), ("sketch,", "Real World", ",", "art")]
    configs = [resolve([*given, "--domain_order", *form]) for form in forms]
    study = {"models": ["sgd"], "datasets": ["domains"], "flags": {"domain_order": list(order)}}
    (tmp_path / "study.json").write_text(json.dumps(study))
    configs.append(resolve([*given, *read(tmp_path / "study.json").words()]))
    configs.append(flatcl.build(model="sgd", dataset="domains", data_folder=many, domain_order=list(order)).config)
    (tmp_path / "config.json").write_text(json.dumps(configs[0].to_json()))
    configs.append(resolve(["--from", str(tmp_path / "config.json")]))
    assert [config.domain_order for config in configs] == [order] * len(configs)
    assert configs[0].benchmark.domains == order and len({config.hash for config in configs}) == 1


def test_validation_holds_out_images_of_their_own_domains(many):
    plain, held = load("domains", many, "--image_size", "16"), load("domains", many, "--image_size", 16, "--validation")
    assert sum(len(task.test) for task in held) == 24 // 10
    for whole, task in zip(plain, held, strict=True):
        ids = torch.cat((task.train.ids, task.test.ids)).sort().values
        assert torch.equal(ids, whole.train.ids)
        assert held.num_rows(task.index) == (len(task.train), len(task.test))
        for split in (task.train, task.test):
            rows = split.ids - whole.train.ids[0]
            assert torch.equal(split.images, whole.train.images[rows])


def test_domains_that_do_not_fit_are_refused(many):
    assert "--n_tasks must be 3, the number of domains" in refused("domains", many, "--n_tasks", "2")
    assert "--domain_order must name each domain" in refused("domains", many, "--domain_order", "art,photo")
    assert "--classes_per_task has no effect on domains" in refused("domains", many, "--classes_per_task", "1,1,1")
    assert "--permute_classes has no effect on domains" in refused("domains", many, "--permute_classes")
    assert "--model icarl cannot learn domains" in str(
        pytest.raises(UsageError, configure, "domains", many, model="icarl").value
    )
    (many / "sketch" / "bee").rename(many / "sketch" / "wasp")
    problem = refused("domains", many)
    assert f"{many / 'sketch'} lacks bee; {many / 'art'} lacks wasp" in problem


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("model", ["mgser_sam", "icarl", "lwf", "xder"])
def test_methods_train_on_a_folder(own, model, tmp_path, capsys):
    memory = ("--buffer_size", "10") if model != "lwf" else ()
    argv = ["--model", model, *words("folder", own, "--classes_per_task", "2,1,2"), *QUICK, *memory]
    assert main([*argv, "--results_path", str(tmp_path / "results")]) == 0
    (folder,) = [file.parent for file in tmp_path.rglob("accuracy.json")]
    assert len(json.loads((folder / "accuracy.json").read_text())["accuracy"]["class-il"]) == 3
    assert json.loads((folder / "benchmark.json").read_text())["class_names"] == list(SIZES)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["folder", "domains"])
def test_a_run_is_not_resumed_with_other_pixels_in_files_of_the_same_size(dataset, own, many, tmp_path, capsys):
    data = {"folder": own, "domains": many}[dataset]
    argv = ["--model", "sgd", *words(dataset, data), *(["--n_tasks", "5"] if dataset == "folder" else []), *QUICK]
    assert main([*argv, "--stop_after", "1", "--results_path", str(tmp_path / "results")]) == 0
    (folder,) = [file.parent for file in tmp_path.rglob("accuracy.json")]

    def resumed(*more):
        file = folder / "summary.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "status": "interrupted"}))
        capsys.readouterr()
        code = main(["--resume", str(folder), *more])
        *_, last = ["", *capsys.readouterr().err.splitlines()]  # after what is said of the cache
        return code, last

    assert resumed() == (0, "")
    picture = next(data.rglob("5.bmp"))
    content = picture.read_bytes()
    picture.write_bytes(content[:62] + bytes(255 - byte for byte in content[62:]))  # after header and palette
    before = (folder / "benchmark.json").read_text()
    code, line = resumed()
    assert code == 2 and "--keep_changed 1" in line and "--from" in line
    assert f"error: {folder} was begun with other images of {dataset} (crc32 " in line
    assert (folder / "benchmark.json").read_text() == before
    code, line = resumed("--keep_changed", "1")
    assert code == 0 and line.startswith("note: ") and "it goes on with the present ones" in line
    assert resumed() == (0, "")


def test_mgser_sam_trains_on_domains_and_on_arrays(many, npz):
    flags = [*QUICK, "--disable_log", "--buffer_size", "10", "--debug_mode"]
    argv = ["--model", "mgser_sam", *words("domains", many), *flags]
    assert len(build_trainer(resolve(argv), torch.device("cpu"), None).run()["accuracy"]["domain-il"]) == 3
    flags.remove("--image_size")
    flags.remove("16")
    argv = ["--model", "mgser_sam", *words("npz", npz, "--classes_per_task", "4,1"), *flags]
    assert len(build_trainer(resolve(argv), torch.device("cpu"), None).run()["accuracy"]["class-il"]) == 2


def test_the_defaults_train(own):
    argv = ["--model", "er", *words("folder", own, "--n_tasks", "5"), "--debug_mode", "--disable_log", "--non_verbose"]
    trainer = build_trainer(resolve(argv), torch.device("cpu"), None)
    assert trainer.benchmark.shape == (3, 64, 64) and trainer.config.backbone == "resnet18"
    assert [part.padding for part in trainer.augment.transforms] == [8]


CHANGES = {  # of each flag, words that change what is trained on
    ("folder", "data_folder"): None,
    ("folder", "image_size"): ("--image_size", "24"),
    ("folder", "val_fraction"): ("--val_fraction", "0.5"),
    ("domains", "data_folder"): None,
    ("domains", "image_size"): ("--image_size", "24"),
    ("domains", "val_fraction"): ("--val_fraction", "0.5"),
    ("domains", "domain_order"): ("--domain_order", "sketch,photo,art"),
    ("npz", "data_file"): None,
}


def brought():
    for name in DATASETS.names():
        args_type = args_of(DATASETS.load(name))
        yield from ((name, flag) for flag in (flags_of(args_type, name) if args_type else ()))


@pytest.mark.parametrize("dataset, flag", list(brought()))
def test_every_flag_of_a_benchmark_changes_its_images_and_the_hash(dataset, flag, own, many, npz, arrays, tmp_path):
    assert (dataset, flag) in CHANGES, f"--{flag} of {dataset} is new: add words that change what it changes"
    path = {"folder": own, "domains": many, "npz": npz}[dataset]
    change, other = CHANGES[dataset, flag], path
    if change is None and dataset == "npz":
        other = tmp_path / "other.npz"
        np.savez(other, **arrays | {"train_x": 255 - arrays["train_x"]})
    elif change is None:
        other = tmp_path / "other"
        shutil.copytree(path, other)
        draw_class(other, "fox", 4) if dataset == "folder" else shutil.rmtree(other / "art")
    common = () if dataset == "domains" else ("--n_tasks", "1")
    before, after = load(dataset, path, *common), load(dataset, other, *common, *(change or ()))
    assert before.config.hash != after.config.hash
    first, second = before[0].train.images, after[0].train.images
    assert first.shape != second.shape or not torch.equal(first, second)


# ------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("dataset", ["folder", "domains", "npz"])
def test_other_data_is_other_code(dataset, own, many, npz, arrays, tmp_path, capsys):
    path = {"folder": own, "domains": many, "npz": npz}[dataset]
    tasks = () if dataset == "domains" else ("--n_tasks", "5")
    quick = QUICK if dataset != "npz" else (*QUICK[:2], *QUICK[4:])
    argv = ["--model", "er", *words(dataset, path, *tasks), *quick, "--results_path", str(tmp_path / "results")]
    assert main([*argv, "--stop_after", "1", "--debug_mode"]) == 0
    (run,) = [file.parent for file in tmp_path.rglob("config.json")]
    code = json.loads((run / "config.json").read_text())["code"]
    assert code[f"data {path}"] == resolve(argv).code[f"data {path}"] and f"datasets/{dataset}.py" in code
    (run / "summary.json").unlink()
    if dataset == "npz":
        np.savez(npz, **arrays | {"train_x": 255 - arrays["train_x"]})
    else:
        shutil.copy(next(path.rglob("0.png")), path / ("ant" if dataset == "folder" else "art/ant") / "new.png")
    assert resolve(argv).code[f"data {path}"] != code[f"data {path}"]
    capsys.readouterr()
    assert main(["--resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"data {path} changed since" in error and "Traceback" not in error


@pytest.mark.parametrize("kind", SELECTORS)
def test_what_any_part_names_as_its_source_counts_as_code(kind):
    chosen = {"model": "er", "dataset": "seq-synth", "backbone": "mnistmlp", "optimizer": "sgd"}
    registry = SELECTORS[kind]

    @registry.register("sourced")
    class Sourced(registry.load(chosen[kind])):
        @classmethod
        def sources(cls, config):
            return {"weights of it": f"digest {config.seed}"}

    argv = [word for name, value in (chosen | {kind: "sourced"}).items() for word in (f"--{name}", value)]
    code = resolve([*argv, "--seed", "3"]).code
    assert code["weights of it"] == "digest 3" and list(code) == sorted(code)


def test_the_digest_is_of_names_and_sizes_not_of_times(own):
    before = _images.digest(own)
    os.utime(own / "ant" / "0.png", (1, 1))
    (own / "ant" / "notes.txt").write_text("other words")
    assert _images.digest(own) == before
    (own / "ant" / "0.png").rename(own / "ant" / "1000.png")
    assert _images.digest(own) != before


# --------------------------------------------------------------------------------------------------------- arrays


def test_arrays_of_every_layout_are_the_same_images(npz, arrays, tmp_path):
    grey = load("npz", npz, "--n_tasks", "5")
    assert grey.shape == (1, 8, 6) and grey.num_classes == 5
    assert torch.equal(grey._train.images[:, 0], torch.from_numpy(arrays["train_x"]))
    assert grey.mean == pytest.approx([float(grey._train.images.double().mean()) / 255]) and not grey.augmentations()
    colour = {name: np.stack([x, 255 - x, x // 2], -1) for name, x in arrays.items() if name.endswith("x")}
    np.savez_compressed(
        tmp_path / "last.npz", **{f"{name[-1]}_{name[:-2]}": value for name, value in (arrays | colour).items()}
    )
    np.savez(
        tmp_path / "first.npz",
        **arrays | {name: value.transpose(0, 3, 1, 2) for name, value in colour.items()}
        | {name: arrays[name][:, None].astype(np.uint8) for name in ("train_y", "test_y")},
    )  # fmt: skip
    last, first = (load("npz", tmp_path / f"{name}.npz", "--n_tasks", "1") for name in ("last", "first"))
    assert last.shape == first.shape == (3, 8, 6)
    for name in ("images", "labels"):
        assert torch.equal(getattr(last._test, name), getattr(first._test, name))


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"test_y": None}, "must have the arrays train_x, train_y, test_x, test_y, got train_x, test_x, train_y."),
        ({"train_y": np.array([Trap()] * 30)}, "train_y must be numbers, got Python objects"),
        ({"test_x": np.array([Trap()] * 10)}, "test_x must be numbers, got Python objects"),
        ({"train_y": np.arange(30) % 5 / 2}, "train_y must be whole numbers (N,), got float64 (30,). Save y.astype"),
        ({"train_y": np.eye(5, dtype=int)[np.arange(30) % 5]}, "got int64 (30, 5). Save y.argmax(1)"),
        ({"train_y": np.arange(30) % 5 + 1}, "number its 5 classes from 0 to 4, got 1 to 5. Save np.searchsorted"),
        ({"train_y": np.arange(30) % 5 * 10**12}, "classes from 0 to 4, got 0 to 4000000000000."),
        ({"test_y": np.arange(10)}, "load's test labels must be 0..4, since num_classes is 5, got 0..9"),
        ({"train_x": np.zeros((30, 48), np.uint8)}, "(N, H, W), (N, C, H, W) or (N, H, W, C), got (30, 48)"),
        ({"train_x": np.random.rand(30, 8, 6)}, "must be uint8 in 0..255, got float64"),
        ({"test_x": np.full((10, 9, 6), 7, np.uint8)}, "with (C, H, W) = (1, 8, 6), got (10, 1, 9, 6)"),
        ({"train_x": np.full((29, 8, 6), 7, np.uint8)}, "29 training images and 30 training labels"),
        ({"train_y": np.zeros(0, int)}, "train_y must be whole numbers (N,), got int64 (0,)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, tmp_path, monkeypatch, change, expected):
    monkeypatch.chdir(tmp_path)
    kept = {name: value for name, value in (arrays | change).items() if value is not None}
    np.savez(tmp_path / "odd.npz", **kept)
    assert expected in refused("npz", tmp_path / "odd.npz", "--n_tasks", "5")
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_no_arrays_are_refused(npz, tmp_path):
    assert "there is no such file" in refused("npz", tmp_path / "none.npz", "--n_tasks", "5")
    (tmp_path / "text.npz").write_text("no arrays")
    assert "this is not an .npz file" in refused("npz", tmp_path / "text.npz", "--n_tasks", "5")
    np.save(tmp_path / "one.npy", np.zeros(3))
    assert "this is not an .npz file" in refused("npz", tmp_path / "one.npy", "--n_tasks", "5")
    with pytest.raises(UsageError, match="--dataset npz needs --data_file, got none"):
        resolve(["--model", "sgd", "--dataset", "npz", "--n_tasks", "5"])
    assert "npz does not say into how many tasks its 5 classes are split" in refused("npz", npz)
    sound = npz.read_bytes()
    for at in range(40, len(sound), len(sound) // 40):
        npz.write_bytes(sound[:at] + bytes([sound[at] ^ 0x55]) + sound[at + 1 :])
        with contextlib.suppress(DataError):  # a byte may be one that nobody reads
            load("npz", npz, "--n_tasks", "5")
    npz.write_bytes(sound[: len(sound) // 2])
    assert "npz file, or it is damaged" in refused("npz", npz, "--n_tasks", "5")


def test_early_stopping_holds_out_images_of_each_domain(many):
    argv = ["--model", "er", "--dataset", "domains", "--data_folder", str(many), *QUICK, "--n_epochs", "3"]
    trainer = build_trainer(resolve([*argv, "--early_stop", "1", "--disable_log"]), torch.device("cpu"), None)
    whole = build_trainer(resolve([*argv, "--disable_log"]), torch.device("cpu"), None).benchmark
    for task, all_of_it in zip(trainer.benchmark, whole, strict=True):
        ids = {*task.train.ids.tolist()}, {*task.monitor.ids.tolist()}
        assert not ids[0] & ids[1] and ids[0] | ids[1] == {*all_of_it.train.ids.tolist()}
    assert trainer.run()["status"] == "finished"


def test_an_error_of_the_disk_is_not_taken_for_a_broken_image(own, monkeypatch):
    def refused(path, limit):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(_images, "read_file", refused)
    config = resolve(["--model", "er", "--dataset", "folder", "--data_folder", str(own), "--n_tasks", "5", *QUICK])
    with pytest.raises(DataError, match="Input/output error"):
        config.benchmark(config)
