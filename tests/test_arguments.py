"""The command line: layers and origins, messages, listings, and that every flag changes something observable."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from made import declared, make_mnist

from flatcl.utils import arguments, protocols
from flatcl.utils.arguments import PROTOCOL, SELECTORS, EngineArgs, Request, args_of, flags_of, resolve
from flatcl.utils.commands.train import main
from flatcl.utils.contracts._tape import Tape
from flatcl.utils.elsewhere import ELSEWHERE
from flatcl.utils.engine import checkpoint, program
from flatcl.utils.engine.build import _place, resolve_device
from flatcl.utils.engine.build import build as build_trainer
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import DATASETS, METHODS, OPTIMIZERS, POLICIES, REGISTRIES, ROOT
from flatcl.utils.saved import read_saved

FAST = ("--model", "er", "--dataset", "seq-synth")
SAM, SPARSE = ("--optimizer", "sam"), ("--optimizer", "sparse_sam")
ENGINE = flags_of(EngineArgs, "engine")


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch):
    """Threads and the user's settings must not leak from test to test."""
    monkeypatch.delenv("FLATCL_DATA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fails(capsys):
    """Runs a command line that must be refused; returns the lines on stderr."""

    def check(*argv):
        code = main(list(argv))
        out, err = capsys.readouterr()
        assert code == 2, f"exit code {code}: {err}{out}"
        assert "Traceback" not in err
        lines = err.splitlines()
        assert lines and all(line.startswith("error: ") for line in lines), err
        return [line.removeprefix("error: ") for line in lines]

    return check


@pytest.fixture
def prints(capsys):
    """Runs a command line that must succeed; returns what it prints."""

    def check(*argv):
        code = main(list(argv))
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return check


def plugin(folder, name, text):
    file = folder / f"{name}.py"
    file.write_text(text)
    return str(file)


def build(*argv):
    """(config, trainer) of a run that writes nothing."""
    config = resolve(list(argv))
    return config, build_trainer(config, resolve_device(config.device), None)


def write_config(path, values=None, **changed):
    """A config.json as a run leaves it, with some flags' values replaced."""
    content = resolve(list(FAST)).to_json()
    for name, value in {**(values or {}), **changed}.items():
        content["flags"][name] = {"value": value, "origin": "argv"}
    path.write_text(json.dumps(content))
    return str(path)


# layers


def test_a_field_default_is_the_lowest_layer():
    config = resolve([*FAST])
    assert (config.optim_wd, config.origins["optim_wd"]) == (0.0, "default")


def test_the_datasets_default_beats_the_field_default():
    config = resolve([*FAST])
    assert config.lr == DATASETS.load("seq-synth").defaults["lr"] != ENGINE["lr"].default
    assert config.origins["lr"] == "dataset seq-synth"


def test_published_values_beat_the_datasets_default():
    dataset = DATASETS.load("seq-mnist").defaults
    config = resolve(["--model", "er", "--dataset", "seq-mnist", "--buffer_size", "200"])
    assert config.lr == 0.01 != dataset["lr"]
    assert config.origins["lr"].startswith("published: ")


def test_published_values_are_for_exactly_one_buffer_size():
    rates = {
        size: resolve(["--model", "er", "--dataset", "seq-mnist", "--buffer_size", str(size)]).lr for size in (200, 500)
    }
    unknown = resolve(["--model", "er", "--dataset", "seq-mnist", "--buffer_size", "201"])
    assert rates == {200: 0.01, 500: 0.1}
    assert unknown.origins["lr"] == "dataset seq-mnist"


def test_the_optimizers_default_beats_published_values():
    config = resolve(["--model", "er", "--dataset", "seq-mnist", "--buffer_size", "200", "--optimizer", "adam"])
    assert (config.lr, config.origins["lr"]) == (OPTIMIZERS.load("adam").defaults["lr"], "optimizer adam")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_argv_beats_every_other_layer(optimizer):
    argv = ["--model", "er", "--dataset", "seq-mnist", "--buffer_size", "200", "--optimizer", optimizer]
    config = resolve([*argv, "--lr", "0.777", "--batch_size", "9"])
    assert (config.lr, config.origins["lr"]) == (0.777, "argv")
    assert (config.batch_size, config.origins["batch_size"]) == (9, "argv")
    assert config.origins["optimizer"] == "argv"


@pytest.mark.parametrize("name", METHODS.names())
def test_no_published_value_of_any_method_beats_argv(name):
    for key, size in METHODS.load(name).published:
        dataset, _, protocol = key.partition(":")
        argv = ["--model", name, "--dataset", dataset, *(["--buffer_size", str(size)] if size else [])]
        argv += ["--protocol", protocol] if protocol else []
        config = resolve(argv)
        applied = [key for key, origin in config.origins.items() if origin.startswith(("published: ", "ours: "))]
        assert applied, f"the published values for {key} are never used"
        for flag in applied:
            value = config.values[flag]
            if isinstance(value, int | float) and flag != "n_epochs":  # a stream takes no other
                typed = value / 2 if isinstance(value, float) else value * 2
                again = resolve([*argv, f"--{flag}", str(typed)])
                assert (again.values[flag], again.origins[flag]) == (typed, "argv")


ONLINE = ("--dataset", "seq-cifar10", "--protocol", "online")


@pytest.mark.parametrize("dataset", ["seq-cifar10", "seq-cifar100", "seq-tinyimg"])
def test_a_protocol_gives_network_epochs_batches_and_rate_and_argv_beats_it(dataset):
    argv = ["--model", "er", "--dataset", dataset, "--protocol", "online", "--buffer_size", "500"]
    config = resolve(argv)
    assert (config.backbone, config.n_epochs, config.batch_size, config.minibatch_size, config.lr_scheduler) == (
        "reduced-resnet18", 1, 10, 10, "none",
    )  # fmt: skip
    of = f"protocol online of {dataset}"
    assert [config.origins[name] for name in ("backbone", "n_epochs", "batch_size")] == [of] * 3
    assert config.n_tasks == resolve(["--model", "er", "--dataset", dataset]).n_tasks
    other = resolve([*argv, "--backbone", "resnet32", "--n_epochs", "2"])
    assert (other.backbone, other.n_epochs, other.origins["backbone"]) == ("resnet32", 2, "argv")
    if dataset != "seq-cifar100":  # whose milestones cannot be dropped in another way
        explicit = [word for name in ("backbone", "n_epochs", "batch_size", "minibatch_size", "lr")
                    for word in (f"--{name}", str(config.values[name]))]  # fmt: skip
        typed = resolve(["--model", "er", "--dataset", dataset, "--buffer_size", "500", *explicit])
        assert typed.hash == config.hash


@pytest.mark.parametrize("dataset", ["seq-cifar10", "seq-cifar100", "seq-tinyimg"])
def test_methods_under_sam_have_a_rho_for_the_online_protocol(dataset):
    for model, guide in (("er_sam", None), ("derpp_sam", None), ("mgser_sam", 0.5)):
        config = resolve(["--model", model, "--dataset", dataset, "--protocol", "online", "--buffer_size", "500"])
        assert config.rho == 0.01 and config.origins["rho"].startswith("ours: ")
        assert guide is None or config.guide == guide
    assert resolve(["--model", "er_sam", "--dataset", dataset, "--buffer_size", "500"]).rho == 0.1


def test_what_a_protocol_leaves_open_comes_from_the_published_values_as_ours():
    plain = resolve(["--model", "derpp", "--dataset", "seq-cifar10", "--buffer_size", "500"])
    config = resolve(["--model", "derpp", *ONLINE, "--buffer_size", "500"])
    assert plain.batch_size == 32 and config.batch_size == 10
    assert config.alpha == plain.alpha and config.origins["alpha"].startswith("ours: as on seq-cifar10 (published: ")
    config = resolve(["--model", "derpp", *ONLINE, "--buffer_size", "500", "--model_config", "default"])
    assert not [origin for origin in config.origins.values() if origin.startswith(("ours", "published"))]


def test_values_chosen_for_a_protocol_lie_over_the_published_ones(tmp_path):
    text = (
        "from flatcl.models._method import published\nfrom flatcl.models.derpp import DerPP\n"
        "from flatcl.utils.registry import METHODS\n@METHODS.register('mine')\nclass Mine(DerPP):\n"
        "    published = published('a', {('seq-cifar10', 500): dict(lr=0.5, alpha=0.9, beta=0.8)}) | published(\n"
        "        'b', {('seq-cifar10:online', 500): dict(lr=0.07, alpha=0.6)})\n"
    )
    argv = ["--plugin", plugin(tmp_path, "mine", text), "--model", "mine", "--buffer_size", "500"]
    config = resolve([*argv, *ONLINE])
    assert (config.lr, config.alpha, config.beta) == (0.07, 0.6, 0.8)
    origins = [config.origins[name] for name in ("lr", "beta")]
    assert origins == ["published: b", "ours: as on seq-cifar10 (published: a)"]
    config = resolve([*argv, "--dataset", "seq-cifar10"])
    assert (config.lr, config.alpha, config.beta) == (0.5, 0.9, 0.8)


def test_a_protocol_is_kept_by_from(tmp_path):
    config = resolve(["--model", "derpp", *ONLINE, "--buffer_size", "500"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_json()))
    again = resolve(["--from", str(file)])
    assert again.protocol == "online" and again.hash == config.hash
    with pytest.raises(UsageError, match="--protocol online cannot be used with seq-mnist, .* Give --protocol none"):
        resolve(["--from", str(file), "--dataset", "seq-mnist"])
    assert resolve(["--from", str(file), "--dataset", "seq-mnist", "--protocol", "none"]).protocol is None


@pytest.mark.parametrize("first, second", [((), "online"), (ONLINE[2:], "none")])
def test_the_protocol_of_a_run_cannot_be_changed_by_from(tmp_path, first, second):
    """Its file has all values already: another name would only be a wrong label."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(resolve(["--model", "er", "--dataset", "seq-cifar10", *first]).to_json()))
    with pytest.raises(UsageError, match=f"--protocol {second} cannot be given with the file of a run"):
        resolve(["--from", str(file), "--protocol", second])
    damaged = json.loads(file.read_text())
    damaged["flags"]["protocol"]["value"] = ["online"]
    file.write_text(json.dumps(damaged))
    with pytest.raises(UsageError, match="'protocol' expects one value"):
        resolve(["--from", str(file)])


BENCHMARK = (
    "from flatcl.datasets.seq_cifar10 import SeqCifar10\nfrom flatcl.utils.registry import DATASETS\n"
    "@DATASETS.register('mine')\nclass Mine(SeqCifar10):\n    protocols = {}\n    {}\n"
)


def test_a_protocol_of_a_plugin_is_found_by_either_spelling_and_takes_values_of_its_kin(tmp_path):
    text = BENCHMARK.format("dict(few_shot=dict(n_epochs=3), online=SeqCifar10.protocols['online'])",
                            "published_as = 'seq-cifar10'")  # fmt: skip
    argv = ["--plugin", plugin(tmp_path, "mine", text), "--model", "derpp", "--dataset", "mine"]
    config = resolve([*argv, "--buffer_size", "500", "--protocol", "few-shot"])
    assert (config.n_epochs, config.batch_size) == (3, 32)
    assert config.origins["alpha"].startswith("ours: as on mine (as on seq-cifar10 (published: ")


@pytest.mark.parametrize("value", ["None", "('quick',)", "{'quick': None}", "{'quick': {'optimizer': 'msam'}}",
                                   "{'quick': {'backbone': 5}}", "{'none': {}}"])  # fmt: skip
def test_a_protocol_that_is_none_is_refused(tmp_path, value):
    argv = ["--plugin", plugin(tmp_path, "mine", BENCHMARK.format(value, "num_classes = 10")), "--model", "er"]
    with pytest.raises(UsageError, match=r"protocols of mine must be \{name: \{flag: value\}\}"):
        resolve([*argv, "--dataset", "mine", "--protocol", "quick"])


def test_an_unknown_protocol_is_said_before_anything_is_imported(fails):
    assert "--protocol must be one of online, got 'onlin'. Did you mean online?" in fails(
        "--model", "er", "--dataset", "seq-cifar10", "--protocol", "onlin"
    )
    assert "--protocol online cannot be used with seq-mnist, which has only its own. Drop it." in fails(
        "--model", "er", "--dataset", "seq-mnist", "--protocol", "online"
    )


def test_model_config_default_drops_published_values():
    argv = ["--model", "er", "--dataset", "seq-mnist", "--buffer_size", "200"]
    assert resolve([*argv, "--model_config", "default"]).origins["lr"] == "dataset seq-mnist"


def test_selectors_keep_their_origins():
    config = resolve([*FAST])
    assert [config.origins[name] for name in ("model", "dataset", "backbone", "optimizer")] == [
        "argv", "argv", "dataset seq-synth", "model er",
    ]  # fmt: skip


def test_the_environment_gives_the_data_folder_and_argv_beats_it(monkeypatch):
    monkeypatch.setenv("FLATCL_DATA", "/somewhere/data")
    config = resolve([*FAST])
    assert (config.base_path, config.origins["base_path"]) == ("/somewhere/data", "$FLATCL_DATA")
    config = resolve([*FAST, "--base_path", "here"])
    assert (config.base_path, config.origins["base_path"]) == ("here", "argv")


def test_describe_prints_published_values_with_their_source(prints):
    out = prints("--model", "er", "--dataset", "seq-mnist", "--buffer_size", "200", "--dry_run")
    line = next(line for line in out.splitlines() if line.split()[0] == "lr")
    assert "0.01" in line and "published: " in line and "Buzzega" in line


@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.parametrize("dataset", declared())
def test_every_method_has_usable_defaults_on_every_benchmark(name, dataset):
    try:
        resolve(["--model", name, "--dataset", dataset])
    except UsageError as error:
        assert DATASETS.load(dataset).setting not in METHODS.load(name).settings, error


# words


def test_hyphen_and_underscore_are_equal_in_flags_and_names():
    a = resolve(["--model", "mgser-sam", "--dataset", "seq_synth", "--buffer-size", "7", "--optim-mom", "0.5"])
    b = resolve(["--model", "mgser_sam", "--dataset", "seq-synth", "--buffer_size", "7", "--optim_mom", "0.5"])
    assert a.values == b.values and a.hash == b.hash
    assert a.model == "mgser_sam" and a.dataset == "seq-synth"


@pytest.mark.parametrize(
    "words, expected", [([], True), (["1"], True), (["0"], False), (["true"], True), (["False"], False)]
)
def test_booleans_take_0_1_or_nothing(words, expected):
    assert resolve([*FAST, "--joint", *words]).joint is expected


def test_a_boolean_without_a_value_may_come_before_another_flag():
    config = resolve(["--joint", *FAST])
    assert config.joint is True and config.model == "er"


@pytest.mark.parametrize("words", [["1,2"], ["1", "2"], ["1,", "2"], ["1 2"]])
def test_tuples_by_comma_or_blank(words):
    config = resolve([*FAST, "--lr_scheduler", "multistep", "--n_epochs", "3", "--lr_milestones", *words])
    assert config.lr_milestones == (1, 2)


def test_equals_sign_gives_a_value():
    config = resolve(["--model=er", "--dataset=seq-synth", "--lr=0.25", "--notes=a=b", "--joint=1"])
    assert (config.lr, config.notes, config.joint) == (0.25, "a=b", True)


def test_negative_numbers_are_values_not_flags(fails):
    assert "must be at least 0, got -1" in fails(*FAST, "--seed", "-1")[0]


def test_none_is_a_value_where_a_flag_is_optional():
    assert resolve([*FAST, "--stop_after", "none"]).stop_after is None


@pytest.mark.parametrize(
    "words, what, got",
    [
        (["--lr", "abc"], "--lr expects a number", "'abc'"),
        (["--lr", "nan"], "--lr expects a finite number", "'nan'"),
        (["--lr", "inf"], "--lr expects a finite number", "'inf'"),
        (["--lr", "-inf"], "--lr expects a finite number", "'-inf'"),
        (["--lr", "1e999"], "--lr expects a finite number", "'1e999'"),
        (["--lr", ""], "--lr expects a number", "''"),
        (["--lr"], "--lr expects one value", "got 0"),
        (["--lr", "1", "2"], "--lr expects one value", "got 2"),
        (["--lr", "0"], "--lr must be greater than 0", "got 0"),
        (["--lr", "-0.1"], "--lr must be greater than 0", "got -0.1"),
        (["--seed", "1.5"], "--seed expects a whole number", "'1.5'"),
        (["--seed", "4294967296"], "--seed must be at most", "got 4.29497e+09"),
        (["--seed", "9" * 310], "--seed is a number that is too large", "It is: seed of"),
        (["--seed", "9" * 5000], "--seed is a number that is too large", "It is: seed of"),
        (["--seed=+-5"], "--seed expects a whole number, got '+-5'", "It is: seed of"),
        (["--lr_milestones", "5", "-" + "9" * 400], "--lr_milestones is a number that is too large", "It is: epochs"),
        (["--batch_size", "0"], "--batch_size must be at least 1", "got 0"),
        (["--n_epochs", "0"], "--n_epochs must be at least 1", "got 0"),
        (["--n_epochs", "1e3"], "--n_epochs expects a whole number", "'1e3'"),
        (["--buffer_size", "0"], "--buffer_size must be at least 1", "got 0"),
        (["--minibatch_size", "-3"], "--minibatch_size must be at least 1", "got -3"),
        (["--optimizer", "sam", "--rho", "-0.05"], "--rho must be at least 0", "got -0.05"),
        (["--optim_mom", "1"], "--optim_mom must be less than 1", "got 1"),
        (["--optim_wd", "-1"], "--optim_wd must be at least 0", "got -1"),
        (["--n_tasks", "3"], "--n_tasks must divide the 10 classes", "got 3"),
        (["--start_from", "5"], "--start_from must be less than the number of tasks 5", "got 5"),
        (["--stop_after", "6"], "--stop_after must lie between", "got 6"),
        (["--start_from", "2", "--stop_after", "2"], "--stop_after must lie between", "got 2"),
        (["--custom_class_order", "1,2"], "--custom_class_order must name each class", "got 2 numbers"),
        (["--custom_class_order", "0,0,1,2,3,4,5,6,7,8"], "--custom_class_order must name each class", "got 10"),
        (["--lr_scheduler", "multi"], "--lr_scheduler must be one of none, multistep, cosine", "'multi'"),
        (["--lr_scheduler", "multistep"], "--lr_scheduler multistep needs --lr_milestones", "got none"),
        (["--lr_milestones", "5"], "--lr_milestones has no effect", "--lr_scheduler none"),
        (["--lr_gamma", "0.5"], "--lr_gamma has no effect", "--lr_scheduler none"),
        (["--optim_nesterov"], "--optim_nesterov 1 needs --optim_mom", "got 0"),
        (["--model_config", "bst"], "--model_config must be one of best, default", "'bst'"),
        (["--joint", "maybe"], "--joint expects 0 or 1", "'maybe'"),
        (["--joint", "--stop_after", "2"], "--joint trains all tasks at once", "--stop_after"),
        (["--budget_rows", "0"], "--budget_rows must be at least 1", "got 0"),
        (
            ["--budget_rows", "1000", "--n_epochs", "2"],
            "--n_epochs and --budget_rows exclude each other",
            "one of them",
        ),
        (["--budget_rows", "1000", "--early_stop", "2"], "--early_stop and --budget_rows exclude", "Give one"),
        (["--early_stop", "2"], "--early_stop has no effect in 1 epoch", "--n_epochs"),
        (["--warmup_epochs", "2"], "--warmup_epochs must be at most --n_epochs 1, got 2", "Give less"),
        (["--eval_every", "1"], "--eval_every must be less than --n_epochs 1", "got 1"),
        (["--clip_grad", "0"], "--clip_grad must be greater than 0", "got 0"),
        (
            ["--budget_rows", "1000", "--debug_mode"],
            "--debug_mode and --budget_rows exclude each other",
            "--budget_rows",
        ),
        (["--budget_rows", "1000", "--lr_scheduler", "cosine"], "--lr_scheduler cosine needs a number of", "multistep"),
        (["--amp", "fp16"], "--amp must be one of none, bf16", "'fp16'"),
        (["--ascent_on", "memory"], "unknown flag: --ascent_on. It belongs to optimizer asam", "more"),
        ([*SAM, "--ascent_on", "past"], "--ascent_on must be one of all, current, memory", "'past'"),
        (
            [*SAM, "--model", "sgd", "--ascent_on", "memory"],
            "--ascent_on memory needs a method whose loss has rows of the memory",
            "sgd has",
        ),
        ([*SAM, "--model", "joint", "--ascent_on", "current"], "--ascent_on current needs a method whose", "joint has"),
        ([*SAM, "--model", "gem", "--ascent_on", "memory"], "--ascent_on memory needs a method whose", "gem has"),
        ([*SAM, "--model", "sgd", "--sharp_on", "memory"], "--sharp_on memory needs a method whose", "sgd has none"),
        (["--model", "mgser_sam", "--align_beta", "0.1"], "--align_beta has no effect with --guide_mode add", "align"),
        (
            ["--model", "mgser_sam", "--guide", "0", "--guide_mode", "align"],
            "--guide_mode has no effect with",
            "weight",
        ),
        (["--model", "mgser_sam", "--guide", "0", "--guide_on", "logits"], "--guide_on has no effect with", "weight"),
        (["--model", "gem", "--buffer_size", "4"], "--buffer_size must be at least the number of tasks 5", "got 4"),
        (["--model", "fdr", "--buffer_size", "4"], "--buffer_size must be at least the number of tasks 5", "got 4"),
        (["--model", "hal", "--hal_memory", "ring", "--buffer_size", "4"], "--buffer_size must be at least", "got 4"),
        (["--model", "icarl", "--buffer_size", "9"], "--buffer_size must have room for one exemplar of each", "got 9"),
        (["--model", "lwf", "--budget_rows", "1000"], "--budget_rows cannot be used with lwf", "--n_epochs"),
        (
            ["--model", "icarl", "--early_stop", "2", "--n_epochs", "3"],
            "--early_stop cannot be used with icarl",
            "Drop it",
        ),
        (["--model", "gdumb", "--warmup_epochs", "1"], "--warmup_epochs has no effect on gdumb", "Drop it"),
        (["--model", "gdumb", "--budget_rows", "1000"], "--budget_rows has no effect on gdumb", "--fitting_epochs"),
        (["--model", "pnn", "--class_il_argmax", "seen"], "--class_il_argmax has no effect on pnn", "Drop it"),
        (["--model", "mer", "--beta", "0"], "--beta must be greater than 0", "got 0"),
        (["--model", "si", "--xi", "0"], "--xi must be greater than 0", "got 0"),
        (["--model", "si", "--si_gradient", "both"], "--si_gradient must be one of total, task", "'both'"),
        (["--model", "cls_er", "--stable_alpha", "1"], "--stable_alpha must be less than 1", "got 1"),
        (["--model", "gss", "--gss_minibatch_size", "0"], "--gss_minibatch_size must be at least 1", "got 0"),
        ([*SAM, "--perturb", "bias"], "--perturb must be one of all, no_norm_bias, norm_only", "'bias'"),
        ([*SAM, "--perturb", "norm_only"], "--perturb norm_only needs normalisation layers", "mnistmlp has none"),
        ([*SAM, "--sam_from_task", "-1"], "--sam_from_task must be at least 0", "got -1"),
        ([*SAM, "--sam_from_task", "5"], "--sam_from_task must be less than the number of tasks 5", "got 5"),
        ([*SAM, "--sam_from_task", "1", "--joint"], "--sam_from_task must be less than the number of tasks 1", "got 1"),
        ([*SAM, "--renormalize", "2"], "--renormalize expects 0 or 1", "'2'"),
        (["--optimizer", "asam", "--asam_eta", "-1"], "--asam_eta must be at least 0", "got -1"),
        (["--optimizer", "sampa", "--sampa_lambda", "1.5"], "--sampa_lambda must be at most 1", "got 1.5"),
        (["--optimizer", "friendly_sam", "--friendly_lambda", "2"], "--friendly_lambda must be at most 1", "got 2"),
        (["--optimizer", "friendly_sam", "--friendly_sigma", "-1"], "--friendly_sigma must be at least 0", "got -1"),
        (["--optimizer", "cr_sam", "--cr_gamma", "-1"], "--cr_gamma must be at least 0", "got -1"),
        (["--optimizer", "cr_sam", "--cr_beta", "x"], "--cr_beta expects a number", "'x'"),
        (["--optimizer", "cr_sam", "--cr_log", "yes"], "--cr_log expects 0 or 1", "'yes'"),
        (["--optimizer", "msam", "--msam_shards", "0"], "--msam_shards must be at least 1", "got 0"),
        (["--optimizer", "looksam", "--looksam_every", "0"], "--looksam_every must be at least 1", "got 0"),
        (["--optimizer", "looksam", "--looksam_alpha", "-1"], "--looksam_alpha must be at least 0", "got -1"),
        (["--optimizer", "esam", "--esam_beta", "0"], "--esam_beta must be greater than 0", "got 0"),
        (["--optimizer", "esam", "--esam_gamma", "1.1"], "--esam_gamma must be at most 1", "got 1.1"),
        (["--optimizer", "esam", "--renormalize"], "--renormalize needs the whole clean gradient", "--esam_beta 0.6"),
        (["--optimizer", "gsam", "--gsam_alpha", "-1"], "--gsam_alpha must be at least 0", "got -1"),
        (["--optimizer", "gsam", "--gsam_rho_min", "0.01"], "--gsam_rho_min has no effect", "--lr_scheduler none"),
        (
            ["--optimizer", "gsam", "--gsam_rho_min", "1", "--lr_scheduler", "cosine", "--n_epochs", "2"],
            "--gsam_rho_min must be at most --rho 0.05",
            "got 1",
        ),
        (["--optimizer", "c_flat", "--cflat_lambda", "-1"], "--cflat_lambda must be at least 0", "got -1"),
        (["--optimizer", "saf", "--saf_lag", "0"], "--saf_lag must be at least 1", "got 0"),
        (["--optimizer", "saf", "--saf_start", "-1"], "--saf_start must be at least 0", "got -1"),
        (["--optimizer", "saf", "--saf_tau", "0"], "--saf_tau must be greater than 0", "got 0"),
        (["--optimizer", "saf", "--saf_lambda", "-1"], "--saf_lambda must be at least 0", "got -1"),
        (["--optimizer", "saf", "--rho", "0.1"], "unknown flag: --rho", "optimizer"),
        (["--optimizer", "mesa", "--mesa_decay", "1.5"], "--mesa_decay must be at most 1", "got 1.5"),
        (["--optimizer", "mesa", "--mesa_start", "1"], "--mesa_start must be less than the 1 epoch(s)", "got 1"),
        (["--optimizer", "mesa", "--mesa_tau", "0"], "--mesa_tau must be greater than 0", "got 0"),
        (["--optimizer", "mesa", "--mesa_lambda", "-1"], "--mesa_lambda must be at least 0", "got -1"),
        (["--optimizer", "mesa", "--mesa_carry", "2"], "--mesa_carry expects 0 or 1", "'2'"),
        ([*SPARSE, "--sparse_mask", "half"], "--sparse_mask must be one of fisher, dynamic, nm", "'half'"),
        ([*SPARSE, "--sparsity", "1"], "--sparsity must be less than 1", "got 1"),
        (
            [*SPARSE, "--sparsity", "0.5", "--sparse_mask", "nm"],
            "--sparsity has no effect with --sparse_mask nm",
            "Use",
        ),
        ([*SPARSE, "--drop_rate", "0.5"], "--drop_rate has no effect with --sparse_mask fisher", "Use dynamic"),
        ([*SAM, "--sam_from_task", "1", "--start_from", "1"], "--sam_from_task 1 has no effect", "--start_from 1"),
        ([*SPARSE, "--drop_rate", "2"], "--drop_rate must be at most 1", "got 2"),
        ([*SPARSE, "--fisher_rows", "0"], "--fisher_rows must be at least 1", "got 0"),
        ([*SPARSE, "--sparse_every", "0"], "--sparse_every must be at least 1", "got 0"),
        ([*SPARSE, "--sparse_n", "1"], "--sparse_n has no effect with --sparse_mask fisher", "Use nm"),
        ([*SPARSE, "--sparse_mask", "nm", "--sparse_n", "4"], "--sparse_n must be less than --sparse_m 4", "got 4"),
        (["--device", "cuda:99"], "--device cuda:99 is not available", "cpu"),
        (["--device", "abacus"], "--device abacus is not available", "cpu"),
        (["--device", "meta"], "--device meta cannot train", "cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_value_gives_one_line_with_what_got_and_do(words, what, got, fails, tmp_path):
    lines = fails(*FAST, *words, "--results_path", str(tmp_path / "out"))
    assert len(lines) == 1, lines
    assert what in lines[0] and got in lines[0]
    assert len([part for part in lines[0].split(". ") if part.strip()]) >= 2, "says nothing about what to do"
    assert not (tmp_path / "out").exists()


def test_milestones_that_no_epoch_reaches_are_refused(fails):
    """A flag that is accepted does something observable."""
    words = ("--n_epochs", "2", "--lr_scheduler", "multistep", "--lr_milestones", "5", "--dry_run")
    assert "lr_milestones" in fails(*FAST, *words)[0]


def test_start_from_is_refused_with_a_method_that_trains_jointly(fails):
    for word in ("--start_from", "--stop_after"):
        assert word in fails("--model", "joint", "--dataset", "seq-synth", word, "1", "--dry_run")[0]


@pytest.mark.parametrize("name", ["buffer_size", "minibatch_size", "batch_size", "threads", "hidden", "lr"])
def test_numbers_too_large_for_the_machine_give_no_traceback(name, capsys):
    value = "1e300" if name == "lr" else str(10**19)
    code = main([*FAST, f"--{name}", value, "--debug_mode", "--disable_log"])
    err = capsys.readouterr().err
    assert code == 0 or (code in (1, 2) and f"--{name}" in err and len(err.splitlines()) == 1)


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["--model", "derp", "--dataset", "seq-synth"], "unknown model: 'derp'. Did you mean derpp"),
        (["--model", "er", "--dataset", "seq-sinth"], "unknown dataset: 'seq-sinth'. Did you mean seq-synth"),
        ([*FAST, "--backbone", "resnet81"], "unknown backbone: 'resnet81'. Did you mean resnet18"),
        ([*FAST, "--optimizer", "adamv"], "unknown optimizer: 'adamv'. Did you mean adam"),
        ([*FAST, "--bufer_size", "3"], "unknown flag: --bufer_size. Did you mean --buffer_size"),
        ([*FAST, "--n-epoch", "3"], "unknown flag: --n_epoch. Did you mean --n_epochs"),
        (["--list", "modles"], "there is no list of 'modles'. Did you mean models"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_did_you_mean(argv, hint, fails):
    lines = fails(*argv)
    assert len(lines) == 1 and hint in lines[0]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_flags_of_other_programs_get_a_sentence(name, fails):
    (line,) = fails(*FAST, f"--{name}", "1")
    assert line == f"unknown flag: --{name}. {ELSEWHERE[name]}"
    assert ELSEWHERE[name].endswith(".") and not list(arguments._owners(name))


def test_sentences_about_flags_of_other_programs_name_flags_that_are_there():
    named = {flag for sentence in ELSEWHERE.values() for flag in re.findall(r"--(\w+)", sentence)}
    of_the_program = {field.name for field in dataclasses.fields(EngineArgs)} | {"from", "resume", "continue"}
    of_parts = {name for name in named if list(arguments._owners(name))}
    assert named - of_the_program - of_parts <= {"format", "nproc_per_node"}  # those of report and torchrun
    assert {"buffer_size", "from", "n_tasks"} <= named


def test_what_is_wrong_with_names_and_flags_is_said_before_anything_is_imported():
    """torch takes seconds; most mistakes are typing mistakes."""
    code = (
        "import sys; from flatcl.utils.commands.train import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'kornia'} & {*sys.modules}; sys.exit(f'{code}: {heavy}')"
    )
    argv = ["--model", "derpp", "--dataset", "seq-mnist"]
    for words, said in [
        ([*argv, "--bufer_size", "3", "--rho", "1", "--lr", "x"], 3),
        ([*argv[:2], "--dataset", "seq-minst", "--bufer_size", "3", "--alpha", "x"], 2),
        ([*argv, "--loadcheck", "x"], 1),
        ([*argv, "--backbone", "resnet81", "--optimizer", "adma"], 2),
        ([], 2),
    ]:
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        *lines, end = done.stderr.splitlines()
        assert end == "2: set()" and len(lines) == said, done.stderr


def test_a_name_that_is_near_to_nothing_lists_all_names(fails):
    (line,) = fails("--model", "zzzzzzzz", "--dataset", "seq-synth")
    assert all(name in line for name in METHODS.names())


def test_missing_selectors_list_the_choices(fails):
    model, dataset = fails()
    assert model.startswith("--model is missing") and all(name in model for name in METHODS.names())
    assert dataset.startswith("--dataset is missing") and all(name in dataset for name in DATASETS.names())
    assert fails("--model", "er")[0].startswith("--dataset is missing")


def test_every_problem_is_reported_at_once(fails):
    words = ("--lr", "x", "--n_epochs", "0", "--bufer_size", "3", "--seed", "-1", "--joint", "7")
    text = "\n".join(fails(*FAST, *words))
    for name in ("--lr", "--n_epochs", "--bufer_size", "--seed", "--joint"):
        assert name in text
    assert len(text.splitlines()) == 5


def test_a_wrong_model_does_not_hide_a_wrong_number(fails):
    text = "\n".join(fails("--model", "errr", "--dataset", "nope", "--lr", "x"))
    assert "errr" in text and "nope" in text and "--lr" in text


@pytest.mark.parametrize("argv", [["er"], ["-lr", "0.1"], ["--"]])
def test_what_is_not_a_flag_is_refused(argv, fails):
    assert "is not a flag" in fails(*argv)[0]


@pytest.mark.parametrize("word", ["--from", "--resume", "--plugin"])
def test_path_flags_take_one_path(word, fails):
    assert f"{word} expects one path, got 0" in fails(*FAST, word)[0]
    assert f"{word} expects one path, got 2" in fails(*FAST, word, "a", "b")[0]


def test_a_flag_of_an_optimizer_that_is_not_chosen_is_refused(fails):
    OPTIMIZERS.load("sam")
    (line,) = fails(*FAST, "--rho", "0.1")
    assert "--rho" in line and "sam" in line


# folders and plugins


def test_a_file_in_the_place_of_the_results_folder(tmp_path, fails):
    (tmp_path / "taken").write_text("")
    for path in ("taken", "taken/deeper"):
        (line,) = fails(*FAST, "--results_path", str(tmp_path / path))
        assert line.startswith("--results_path") and "cannot write there" in line
    (tmp_path / "class-il").write_text("")
    assert "cannot write there" in fails(*FAST, "--results_path", str(tmp_path))[0]


def test_a_file_in_the_place_of_the_data_folder(tmp_path, fails):
    (tmp_path / "taken").write_text("")
    argv = ("--model", "er", "--dataset", "seq-mnist", "--base_path", str(tmp_path / "taken"))
    (line,) = fails(*argv, "--results_path", str(tmp_path / "out"))
    assert "--base_path" in line
    assert not list((tmp_path / "out").rglob("config.json")), "a run that never began left a folder"


@pytest.mark.parametrize("word", ["--from", "--resume"])
def test_unreadable_configs_give_one_line(word, tmp_path, fails):
    (tmp_path / "not.json").write_text("{")
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    for name in ("absent", "not.json", "other.json", "binary.json", "empty"):
        lines = fails(word, str(tmp_path / name))
        assert len(lines) == 1 and "config.json" in lines[0]


def test_a_config_of_another_protocol_is_refused(tmp_path, fails):
    file = Path(write_config(tmp_path / "config.json"))
    file.write_text(file.read_text().replace(f'"protocol": {PROTOCOL}', f'"protocol": {PROTOCOL + 1}'))
    (line,) = fails("--from", str(file))
    assert f"protocol {PROTOCOL + 1}" in line


@pytest.mark.parametrize(
    "name, value",
    [("lr", "fast"), ("lr", None), ("lr_milestones", 3), ("lr_milestones", ["a"]), ("seed", 1.5), ("joint", "yes"),
     ("notes", 3), ("model", 3), ("n_epochs", [1]), ("lr", True)],
)  # fmt: skip
def test_a_config_edited_into_another_type_is_refused(name, value, tmp_path, fails):
    lines = fails("--from", write_config(tmp_path / "config.json", {name: value}), "--dry_run")
    assert name in lines[0]


def test_a_plugin_that_is_absent_or_does_not_import(tmp_path, fails):
    assert "there is no such file" in fails(*FAST, "--plugin", str(tmp_path / "absent.py"))[0]
    (tmp_path / "text.txt").write_text("x = 1")
    assert ".py" in fails(*FAST, "--plugin", str(tmp_path / "text.txt"))[0]
    broken = plugin(tmp_path, "broken", "import a_package_that_is_not_there\n")
    for argv in ((*FAST, "--plugin", broken), ("--list", "--plugin", broken), ("--help", "--plugin", broken)):
        (line,) = fails(*argv)
        assert "broken.py" in line and "ModuleNotFoundError" in line
    (line,) = fails(*FAST, "--plugin", plugin(tmp_path, "syntax", "def f(:\n"))
    assert "SyntaxError" in line


def test_a_plugin_that_was_corrected_can_be_loaded_in_the_same_process(tmp_path, fails, prints):
    file = plugin(tmp_path, "corrected", "raise RuntimeError('not yet')\n")
    assert "not yet" in fails("--list", "--plugin", file)[0]
    plugin(tmp_path, "corrected", "from flatcl.models.er import ER\nfrom flatcl.utils.registry import METHODS\n"
           "@METHODS.register('my_er')\nclass MyEr(ER):\n    'Mine.'\n")  # fmt: skip
    assert "my_er" in prints("--list", "models", "--plugin", file)


def test_a_plugin_cannot_take_a_name_of_the_house(tmp_path, fails, monkeypatch):
    """Whether or not the house's own file has been imported before."""
    monkeypatch.setitem(METHODS._objects, "er", METHODS.load("er"))
    del METHODS._objects["er"]
    text = (
        "from flatcl.models.sgd import SGD\nfrom flatcl.utils.registry import METHODS\n"
        "@METHODS.register('er')\nclass Mine(SGD): ..."
    )
    lines = fails(*FAST, "--plugin", plugin(tmp_path, "thief", text), "--dry_run")
    assert "registered twice" in lines[0]


def test_a_method_on_a_benchmark_that_it_cannot_do(tmp_path, fails):
    text = (
        "from flatcl.models.sgd import SGD\nfrom flatcl.utils.registry import METHODS\n@METHODS.register('picky')\n"
        "class Picky(SGD):\n    settings = ('class-il',)\n"
    )
    file = plugin(tmp_path, "picky", text)
    argv = ("--model", "picky", "--plugin", file, "--base_path", str(tmp_path / "no data"))
    (line,) = fails(*argv, "--dataset", "perm-mnist")
    assert "picky cannot learn perm-mnist" in line and "class-il" in line and "domain-il" in line
    resolve([*argv, "--dataset", "seq-mnist"])


def test_two_owners_of_one_flag_are_refused(tmp_path, fails):
    text = (
        "from dataclasses import dataclass\nfrom flatcl.models.sgd import SGD\n"
        "from flatcl.utils.arguments import flag\nfrom flatcl.utils.registry import METHODS\n"
        "@METHODS.register('clash')\nclass Clash(SGD):\n"
        "    @dataclass(frozen=True)\n    class Args:\n        optim_mom: float = flag(0.5, 'mine')\n"
    )
    lines = fails("--model", "clash", "--dataset", "seq-synth", "--plugin", plugin(tmp_path, "clash", text))
    assert "--optim_mom" in lines[0] and "Rename" in lines[0]


def test_flags_of_a_plugin_are_resolved_like_all_others(tmp_path, fails):
    text = (
        "from dataclasses import dataclass\nfrom flatcl.models._method import published\n"
        "from flatcl.models.er import ER\n"
        "from flatcl.utils.arguments import flag\nfrom flatcl.utils.registry import METHODS\n"
        "@METHODS.register('tuned')\nclass Tuned(ER):\n"
        "    published = published('a paper', {('seq-synth', 7): dict(gain=3.0)})\n"
        "    @dataclass(frozen=True)\n    class Args(ER.Args):\n        gain: float = flag(1.0, 'gain', above=0)\n"
    )
    argv = ("--model", "tuned", "--dataset", "seq-synth", "--plugin", plugin(tmp_path, "tuned", text))
    assert resolve([*argv]).gain == 1.0
    config = resolve([*argv, "--buffer_size", "7"])
    assert (config.gain, config.origins["gain"]) == (3.0, "published: a paper")
    assert "--gain must be greater than 0, got 0" in fails(*argv, "--gain", "0")[0]


# listings


def test_list_prints_every_name_and_what_it_is(prints):
    out = prints("--list")
    for registry in REGISTRIES:
        for name in registry.names():
            line = next(line for line in out.splitlines() if line.split() and line.split()[0] == name)
            assert len(line.split()) > 2, f"{name} has no summary"


@pytest.mark.parametrize(
    "word, registry",
    [("datasets", DATASETS), ("models", METHODS), ("optimizers", OPTIMIZERS), ("policies", POLICIES)],
)
def test_list_of_one_registry(word, registry, prints):
    out = prints("--list", word)
    names = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert names[word == "optimizers" :] == registry.names()  # whose table has a head
    assert out.splitlines()[0] == f"{word}:"


def test_help_names_every_engine_flag_and_the_selectors_words(prints):
    out = prints("--help")
    for name in ENGINE:
        assert f"--{name} " in out
    for word in ("--list", "--from", "--resume", "--plugin"):
        assert word in out
    assert "%%" not in out and "buffer_size" not in out


def test_help_of_a_pair_has_the_flags_of_all_four_and_the_datasets_defaults(prints):
    out = prints("--model", "mgser_sam", "--dataset", "seq-synth", "--help")
    for name in ("buffer_size", "guide", "rho", "optim_mom", "hidden"):
        assert f"--{name} " in out
    assert "(default 0.05)" in next(line for line in out.splitlines() if line.split()[:1] == ["--lr"])
    assert prints("-h", "--model", "mgser_sam", "--dataset", "seq-synth") == out


def test_help_shows_published_values_of_no_flag_as_missing(prints):
    assert "None" not in prints("--help")


def owners():
    yield "engine", EngineArgs
    for registry in SELECTORS.values():
        for name in registry.names():
            args_type = args_of(registry.load(name))
            if args_type is not None:
                yield f"{registry.kind} {name}", args_type


def test_the_help_text_of_every_flag_says_something():
    for owner, args_type in owners():
        for name, flag in flags_of(args_type, owner).items():
            assert len(flag.help.split()) >= 2, f"--{name} of {owner}"
            assert flag.help.strip() == flag.help and not flag.help.removesuffix("...").endswith("."), (
                f"--{name} of {owner}"
            )
            assert flag.check(flag.default) is None, f"the default of --{name} of {owner} is out of its own bounds"


@pytest.mark.parametrize("word", ["--list", "--help"])
def test_start_up_imports_neither_torch_nor_numpy(word):
    code = (
        f"import sys; from flatcl.utils.commands.train import main; code = main(['{word}']); "
        "print(code, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "0 False False", done.stderr


def test_a_reader_that_goes_away_is_no_crash():
    """`python main.py --list | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import time, sys; sys.stdout.flush(); "
         "from flatcl.utils.commands.train import main; time.sleep(0.5); "
         "sys.exit(main(['--list']))"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(timeout=300)


# repeating runs


def test_from_repeats_a_run_with_identical_accuracy(tmp_path, prints):
    words = (
        "--model",
        "derpp",
        "--dataset",
        "seq-synth",
        "--debug_mode",
        "--lr",
        "0.03",
        "--seed",
        "5",
        "--notes",
        "x",
    )
    prints(*words, "--n_tasks", "1", "--results_path", str(tmp_path / "a"))
    (first,) = (tmp_path / "a").rglob("summary.json")
    prints("--from", str(first.parent), "--results_path", str(tmp_path / "b"))
    (second,) = (tmp_path / "b").rglob("summary.json")
    one, two = json.loads(first.read_text()), json.loads(second.read_text())
    for key in ("accuracy", "metrics", "config_hash", "notes"):
        assert one[key] == two[key]


def test_from_with_overrides_keeps_the_rest(tmp_path):
    file = write_config(tmp_path / "config.json", lr=0.3, buffer_size=33, seed=4)
    config = resolve(["--from", file, "--lr", "0.4"])
    assert (config.lr, config.buffer_size, config.seed) == (0.4, 33, 4)
    assert config.origins["lr"] == "argv" and config.origins["seed"].startswith("from ")
    assert resolve(["--from", file]).hash != config.hash
    assert resolve(["--from", str(tmp_path)]).values == resolve(["--from", file]).values


def test_from_can_change_the_model_and_drops_the_flags_that_it_lacks(tmp_path):
    config = resolve(["--from", write_config(tmp_path / "config.json", lr=0.3), "--model", "sgd"])
    assert config.model == "sgd" and config.lr == 0.3 and "buffer_size" not in config.values


def test_from_with_a_flag_that_does_not_exist_any_more(tmp_path, fails):
    (line,) = fails("--from", write_config(tmp_path / "config.json", gone_flag=1))
    assert "gone_flag" in line


def test_from_resolves_to_the_very_same_values(tmp_path):
    words = ("--model", "mgser_sam", "--dataset", "seq-mnist", "--buffer_size", "500", "--lr_scheduler", "multistep")
    config = resolve([*words, "--lr_milestones", "1", "2", "--n_epochs", "3", "--custom_class_order",
                      "9,8,7,6,5,4,3,2,1,0"])  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    again = resolve(["--from", str(tmp_path)])
    assert again.values == config.values and again.hash == config.hash
    assert read_saved(str(tmp_path)).plugins == ()


def test_a_config_remembers_its_plugins_wherever_it_is_read(tmp_path, monkeypatch):
    text = (
        "from flatcl.models.er import ER\nfrom flatcl.utils.registry import METHODS\n"
        "@METHODS.register('mine')\nclass Mine(ER): ..."
    )
    plugin(tmp_path, "mine", text)
    monkeypatch.chdir(tmp_path)
    config = resolve(["--model", "mine", "--dataset", "seq-synth", "--plugin", "mine.py"])
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resolve(["--from", str(tmp_path)]).values == config.values


# the hash


@pytest.mark.parametrize("name", [*ENGINE, "buffer_size", "hidden", "optim_mom", "guide_on", "rho"])
def test_the_hash_covers_the_flags_that_can_change_a_number(name):
    config = resolve(["--model", "mgser_sam", "--dataset", "seq-synth"])
    other = dataclasses.replace(config, values={**config.values, name: "another value"})
    assert (other.hash != config.hash) == config.flags[name].result
    origin = dataclasses.replace(config, origins={**config.origins, name: "argv"})
    assert origin.hash == config.hash


def test_typing_a_default_does_not_change_the_hash():
    assert resolve([*FAST, "--lr", "0.05", "--seed", "0"]).hash == resolve([*FAST]).hash


# every flag changes something observable


def fingerprint(*argv):
    """Everything that a run computes: accuracies, weights and state, costs."""
    return _fingerprint(argv)


@functools.lru_cache(maxsize=256)
def _fingerprint(argv):
    config, trainer = build(*argv, "--device", "cpu")  # where runs repeat bit for bit
    with contextlib.redirect_stdout(None):
        trainer.run()
    digest = hashlib.sha256(json.dumps(vars(trainer.progress)).encode())

    def feed(item):
        if isinstance(item, torch.Tensor):
            digest.update(item.contiguous().numpy().tobytes())
        elif isinstance(item, dict):
            for key in item:
                feed(item[key])
        else:
            digest.update(repr(item).encode())

    feed(dict(trainer.method.state_dict()))
    digest.update(repr((trainer.cost.steps, trainer.cost.forward_rows, trainer.cost.backward_rows)).encode())
    return digest.hexdigest()


SMALL = ("--dataset", "seq-synth", "--debug_mode", "--threads", "1", "--stop_after", "3")
LONG = ("--debug_mode", "0", "--stop_after", "1")
COMPANIONS = {  # without which a flag is refused or has nothing to act on
    "optim_nesterov": ("--optim_mom", "0.9"),
    "perturb": ("--backbone", "reduced-resnet18"),
    "gsam_rho_min": (*LONG, "--lr_scheduler", "cosine", "--n_epochs", "3"),
    "mesa_start": (*LONG, "--n_epochs", "3"),
    "saf_start": (*LONG, "--n_epochs", "12"),
    "saf_lag": (*LONG, "--n_epochs", "12"),
    "sparse_every": (*LONG, "--n_epochs", "3"),
    "drop_rate": ("--sparse_mask", "dynamic"),
    "align_beta": ("--guide_mode", "align"),
    "sparse_n": ("--sparse_mask", "nm"),
    "sparse_m": ("--sparse_mask", "nm", "--sparse_n", "1"),
    ("gdumb", "fitting_epochs"): LONG,
    "minlr": (*LONG, "--fitting_epochs", "4"),
    "cutmix_prob": (*LONG, "--fitting_epochs", "4", "--cutmix_alpha", "1"),
    ("esam", "renormalize"): ("--esam_beta", "1"),
    "mr_margin": ("--debug_mode", "0", "--n_epochs", "4"),
}


def brought_flags():
    """Those of benchmarks need data: see test_own_data.py."""
    for kind, registry in SELECTORS.items():
        if kind == "dataset":
            continue
        for name in registry.names():
            args_type = args_of(registry.load(name))
            for flag in flags_of(args_type, kind).values() if args_type else ():
                yield pytest.param(kind, name, flag.name, id=f"{kind}-{name}-{flag.name}")


def other_values(flag, value):
    """Values that a flag would take in place of its present one."""
    if flag.choices:
        return [choice for choice in flag.choices if choice != value]
    if flag.kind is bool:
        return [not value]
    if flag.kind is int:
        tries = [(value or 0) // 2, (value or 0) * 2, (value or 0) + 1]
    elif flag.kind is float:
        tries = [(value or 0) / 2, (value or 0) * 2, 0.5, 0.1, 2.0]
    else:
        pytest.fail(f"--{flag.name}: no rule for another value of a {flag.kind.__name__}")
    return [new for new in tries if new != value and flag.check(new) is None][:1]


@pytest.mark.parametrize("kind, name, flag_name", list(brought_flags()))
def test_every_flag_of_every_registered_name_changes_a_result(kind, name, flag_name):
    chosen = {"model": "er", "dataset": "seq-synth", kind: name}
    argv = ["--model", chosen["model"], *([f"--{kind}", name] if kind != "model" else []), *SMALL]
    argv += COMPANIONS.get((name, flag_name), COMPANIONS.get(flag_name, ()))
    config = resolve(argv)
    values = other_values(config.flags[flag_name], config.values[flag_name])
    assert values
    for value in values:
        changed = [*argv, f"--{flag_name}", str(int(value) if isinstance(value, bool) else value)]
        assert fingerprint(*changed) != fingerprint(*argv), f"--{flag_name} {value} of {name} changes nothing"


def differs(*words, base=()):
    def check(tmp_path, capsys, monkeypatch):
        argv = ("--model", "er", *SMALL, *base)
        assert fingerprint(*argv, *words) != fingerprint(*argv)

    return check


def check_model(tmp_path, capsys, monkeypatch):
    assert fingerprint("--model", "sgd", *SMALL) != fingerprint("--model", "er", *SMALL)


def check_dataset(tmp_path, capsys, monkeypatch):
    _, synth = build("--model", "er", "--dataset", "seq-synth")
    _, digits = build("--model", "er", "--dataset", "seq-digits")
    assert synth.benchmark.shape != digits.benchmark.shape


def check_backbone(tmp_path, capsys, monkeypatch):
    names = {type(build(*FAST, "--backbone", name)[1].method.net).__name__ for name in ("mnistmlp", "resnet32")}
    assert len(names) == 2


def check_n_tasks(tmp_path, capsys, monkeypatch):
    argv = ("--model", "er", "--dataset", "seq-synth", "--debug_mode", "--disable_log")
    assert main([*argv, "--n_tasks", "2"]) == 0
    assert "Accuracy for 2 task(s)" in capsys.readouterr().out
    assert len(build(*argv, "--n_tasks", "2")[1].benchmark) == 2


def check_classes_per_task(tmp_path, capsys, monkeypatch):
    _, trainer = build("--model", "er", "--dataset", "seq-synth", "--classes_per_task", "7,1,2")
    assert [len(task.classes) for task in trainer.benchmark] == [7, 1, 2]


def check_start_from(tmp_path, capsys, monkeypatch):
    _, trainer = build("--model", "er", *SMALL, "--start_from", "1")
    trainer.run()
    assert trainer.progress.tasks == [1, 2]


def check_stop_after(tmp_path, capsys, monkeypatch):
    _, trainer = build("--model", "er", *SMALL[:-1], "2")
    trainer.run()
    assert trainer.progress.tasks == [0, 1]


def check_joint(tmp_path, capsys, monkeypatch):
    _, trainer = build(*FAST, "--debug_mode", "--joint")
    summary = trainer.run()
    assert [len(rows) for rows in summary["accuracy"].values()] == [1, 1]


def check_validation(tmp_path, capsys, monkeypatch):
    _, full = build(*FAST)
    _, held = build(*FAST, "--validation")
    sizes = [len(task.train) for task in full.benchmark], [len(task.train) for task in held.benchmark]
    assert sum(sizes[1]) == round(0.9 * sum(sizes[0]))
    assert sum(len(task.test) for task in held.benchmark) == sum(sizes[0]) - sum(sizes[1])


def check_custom_class_order(tmp_path, capsys, monkeypatch):
    _, plain = build(*FAST)
    _, turned = build(*FAST, "--custom_class_order", "9,8,7,6,5,4,3,2,1,0")
    first, last = turned.benchmark[0].train, plain.benchmark[4].train  # classes 9, 8 and classes 8, 9
    assert torch.equal(first.images[first.labels == 0], last.images[last.labels == 9])
    differs("--custom_class_order", "9,8,7,6,5,4,3,2,1,0")(tmp_path, capsys, monkeypatch)


def check_class_il_argmax(tmp_path, capsys, monkeypatch):
    rows = {}
    for choice in ("all", "seen"):
        _, trainer = build("--model", "er", *SMALL, "--lr", "1e-6", "--class_il_argmax", choice)
        rows[choice] = trainer.run()["accuracy"]
    assert rows["seen"]["class-il"][0][0] == rows["seen"]["task-il"][0][0]
    assert rows["seen"]["class-il"] != rows["all"]["class-il"]
    assert rows["seen"]["task-il"] == rows["all"]["task-il"]


def test_no_augmentation_where_there_is_none_is_said_and_goes_on():
    """A sweep over several benchmarks gives it to all."""
    words = ["--model", "er", "--dataset", "seq-digits", "--augmentation"]
    with pytest.warns(UserWarning, match="--augmentation 0 has no effect on seq-digits, which has none"):
        resolve([*words, "0"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve([*words, "1"])


def check_model_config(tmp_path, capsys, monkeypatch):
    argv = ["--model", "er", "--dataset", "seq-mnist", "--buffer_size", "200", "--dry_run"]
    assert main(argv) == 0 and "published" in capsys.readouterr().out
    assert main([*argv, "--model_config", "default"]) == 0 and "published" not in capsys.readouterr().out


def check_device(tmp_path, capsys, monkeypatch):
    _, trainer = build(*FAST, "--device", "cpu")
    assert trainer.device.type == "cpu" and next(trainer.method.parameters()).device.type == "cpu"
    if torch.cuda.is_available():
        assert build(*FAST, "--device", "auto")[1].device.type == "cuda"
    else:
        assert main([*FAST, "--device", "cuda"]) == 2


def check_data_device(tmp_path, capsys, monkeypatch):
    """On a device without memory of its own, which any machine has."""
    for choice, expected in (("cpu", "cpu"), ("device", "meta")):
        _, trainer = build(*FAST, "--data_device", choice)
        _place(trainer.benchmark, choice, torch.device("meta"))
        assert trainer.benchmark._train.images.device.type == expected


def check_threads(tmp_path, capsys, monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    for threads in (1, 3):
        argv = [*FAST, "--debug_mode", "--n_tasks", "1", "--threads", str(threads), "--results_path", str(tmp_path)]
        assert main(argv) == 0
    found = [json.loads(file.read_text())["threads"] for file in tmp_path.rglob("environment.json")]
    assert sorted(found) == [1, 3] and torch.get_num_threads() == 2
    assert main([*FAST, "--threads", "4"]) == 2
    assert "at most the number of this machine's cores 3, got 4" in capsys.readouterr().err


def check_cuda_graph(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "recorder", lambda device: Tape())
    for wish in ("0", "auto", "1"):
        assert main([*FAST, "--n_tasks", "1", "--cuda_graph", wish, "--results_path", str(tmp_path)]) == 0
        assert ("were replays of recorded ones" in capsys.readouterr().out) == (wish != "0")


def check_pretrained_weights(tmp_path, capsys, monkeypatch):
    _, other = build(*FAST, "--seed", "1")
    torch.save(other.method.net.state_dict(), tmp_path / "weights.pt")
    _, trainer = build(*FAST, "--pretrained_weights", str(tmp_path / "weights.pt"))
    pairs = zip(trainer.method.net.parameters(), other.method.net.parameters(), strict=True)
    assert all(torch.equal(one, another) for one, another in pairs)
    assert f"6 tensors of {tmp_path / 'weights.pt'} loaded into mnistmlp" in capsys.readouterr().out


def check_sync_bn(tmp_path, capsys, monkeypatch):
    assert main([*FAST, "--sync_bn", "1"]) == 2
    assert "--sync_bn 1 has no effect in one process" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*FAST, "--sync_bn", "1", "--device", "cpu"]) == 2
    assert "--sync_bn 1 needs GPUs" in capsys.readouterr().err


def check_base_path(tmp_path, capsys, monkeypatch):
    images = []
    for seed in (0, 1):
        make_mnist(tmp_path / str(seed), seed=seed)
        _, trainer = build("--model", "er", "--dataset", "seq-mnist", "--base_path", str(tmp_path / str(seed)))
        images.append(trainer.benchmark[0].train.images)
    assert images[0].shape != images[1].shape or not torch.equal(*images)


def test_a_flag_that_is_younger_than_a_file_has_its_default(tmp_path):
    """It is what the program did then, whatever has been published for the flag since."""
    words = ["--model", "gdumb", "--dataset", "seq-cifar100", "--buffer_size", "500"]
    of_then = resolve([*words, "--cutmix_prob", "0.5"])
    content = of_then.to_json()
    del content["flags"]["cutmix_prob"], content["flags"]["clip_grad"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    again = resolve(["--from", str(tmp_path)])
    assert (again.cutmix_prob, again.origins["cutmix_prob"], again.clip_grad) == (0.5, "default", None)
    assert again.hash == of_then.hash and resolve(words).cutmix_prob == 1.0
    assert resolve(["--from", str(tmp_path), "--dataset", "seq-cifar10"]).cutmix_prob == 0.5


def finished_run(tmp_path, *words):
    """The folder of a short run with one task."""
    argv = [*FAST, "--debug_mode", "--n_tasks", "1", "--results_path", str(tmp_path), *words]
    with contextlib.redirect_stdout(None):
        assert main(argv) == 0
    (file,) = tmp_path.rglob("summary.json")
    return file.parent


def check_results_path(tmp_path, capsys, monkeypatch):
    assert finished_run(tmp_path / "a" / "b").is_relative_to(tmp_path / "a" / "b" / "class-il" / "seq-synth" / "er")


def check_notes(tmp_path, capsys, monkeypatch):
    folder = finished_run(tmp_path, "--notes", "two words")
    assert json.loads((folder / "summary.json").read_text())["notes"] == "two words"


def check_log_every(tmp_path, capsys, monkeypatch):
    lines = (finished_run(tmp_path, "--log_every", "2") / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "train/loss" in line] == [2, 4]


def check_log_to(tmp_path, capsys, monkeypatch):
    """With the package there, tests/test_trackers.py looks at what is logged."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*FAST, "--log_to", "wandb", "--results_path", str(tmp_path)]) == 2
    assert 'pip install "flatcl[wandb]"' in capsys.readouterr().err and not list(tmp_path.iterdir())


def check_non_verbose(tmp_path, capsys, monkeypatch):
    argv = [*FAST, "--debug_mode", "--disable_log"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(argv) == 0 and "Task 1" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main([*argv, "--non_verbose"]) == 0 and capsys.readouterr().err == ""


def check_disable_log(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*FAST, "--debug_mode", "--disable_log", "1"]) == 0
    assert list(tmp_path.iterdir()) == [] and "run folder" not in capsys.readouterr().out


def check_dry_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*FAST, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and "er on seq-synth" in out and "Accuracy" not in out


def check_checkpoint_minutes(tmp_path, capsys, monkeypatch):
    """What a run that dies in its second task has left."""
    text = (
        "from flatcl.models.er import ER\nfrom flatcl.utils.registry import METHODS\n"
        "@METHODS.register('mortal')\nclass Mortal(ER):\n"
        "    def remember(self, batch, loss):\n        super().remember(batch, loss)\n"
        "        if self.buffer.num_seen == 12 * 16: raise OSError('pulled the plug')\n"
    )
    argv = ["--model", "mortal", "--dataset", "seq-synth", "--plugin", plugin(tmp_path, "mortal", text)]
    for minutes, steps in (("0", 8), ("1e-9", 11)):
        folder = tmp_path / minutes
        with pytest.raises(OSError, match="pulled the plug"):
            main([*argv, "--results_path", str(folder), "--checkpoint_minutes", minutes])
        (file,) = folder.rglob("state.pt")
        assert checkpoint.load(file.parent)["cost"]["steps"] == steps


def check_keep_checkpoint(tmp_path, capsys, monkeypatch):
    """What a finished run leaves: its last checkpoint, or weights that torch alone can read."""
    for choice in ("1", "0"):
        assert (
            main(["--model", "er", *SMALL, "--keep_checkpoint", choice, "--results_path", str(tmp_path / choice)]) == 0
        )
    kept, dropped = (next((tmp_path / choice).rglob("config.json")).parent for choice in ("1", "0"))
    assert [path.name for path in (kept / "checkpoint").iterdir()] == ["state.pt"] and not (kept / "model.pt").exists()
    assert not (dropped / "checkpoint").exists()
    weights, state = torch.load(dropped / "model.pt", weights_only=True), checkpoint.load(kept / "checkpoint")["method"]
    assert weights.keys() == state.keys() - {"_extra_state"} and {"net.classifier.weight"} <= weights.keys()
    assert all(torch.equal(value, state[name]) for name, value in weights.items())


def check_eval_every(tmp_path, capsys, monkeypatch):
    lines = (finished_run(tmp_path, "--n_tasks", "5", "--stop_after", "1", "--debug_mode", "0", "--n_epochs", "3",
                          "--eval_every", "1") / "metrics.jsonl").read_text().splitlines()  # fmt: skip
    assert [json.loads(line)["epochs"] for line in lines if "accuracy_inside" in line] == [1, 2]


def check_save_predictions(tmp_path, capsys, monkeypatch):
    assert (finished_run(tmp_path, "--save_predictions", "1") / "predictions.npz").is_file()


def check_protocol(tmp_path, capsys, monkeypatch):
    config = resolve(["--model", "er", *ONLINE])
    assert config.batch_size == 10 != resolve(["--model", "er", "--dataset", "seq-cifar10"]).batch_size


OBSERVED = {
    "model": check_model,
    "dataset": check_dataset,
    "backbone": check_backbone,
    "optimizer": differs("--optimizer", "adam"),
    "protocol": check_protocol,
    "lr": differs("--lr", "0.06"),
    "n_epochs": differs("--n_epochs", "2", base=("--debug_mode", "0")),
    "batch_size": differs("--batch_size", "8"),
    "optim_wd": differs("--optim_wd", "0.01"),
    "lr_scheduler": differs("--lr_scheduler", "cosine", base=("--debug_mode", "0", "--n_epochs", "2")),
    "lr_milestones": differs(
        "--lr_milestones",
        "2",
        base=("--debug_mode", "0", "--n_epochs", "3", "--lr_scheduler", "multistep", "--lr_milestones", "1"),
    ),  # fmt: skip
    "lr_gamma": differs(
        "--lr_gamma",
        "0.5",
        base=("--debug_mode", "0", "--n_epochs", "2", "--lr_scheduler", "multistep", "--lr_milestones", "1"),
    ),  # fmt: skip
    "seed": differs("--seed", "1"),
    "class_order_seed": differs("--class_order_seed", "1", base=("--permute_classes",)),
    "data_order_seed": differs("--data_order_seed", "1"),
    "init_seed": differs("--init_seed", "1"),
    "n_tasks": check_n_tasks,
    "classes_per_task": check_classes_per_task,
    "start_from": check_start_from,
    "stop_after": check_stop_after,
    "pretrained_weights": check_pretrained_weights,
    "freeze_backbone": differs("--freeze_backbone", "1"),
    "joint": check_joint,
    "validation": check_validation,
    "permute_classes": differs("--permute_classes"),
    "custom_class_order": check_custom_class_order,
    "augmentation": differs("--augmentation", "0"),
    "class_il_argmax": check_class_il_argmax,
    "eval_tasks": differs("--eval_tasks", "seen"),
    "model_config": check_model_config,
    "warmup_epochs": differs("--warmup_epochs", "1"),
    "clip_grad": differs("--clip_grad", "0.1"),
    "early_stop": differs("--early_stop", "1", base=("--debug_mode", "0", "--n_epochs", "4")),
    "eval_every": check_eval_every,
    "save_predictions": check_save_predictions,
    "budget_rows": differs("--budget_rows", "20000", base=("--debug_mode", "0")),
    "amp": differs("--amp", "bf16"),
    "channels_last": differs("--channels_last", "0", base=("--backbone", "reduced-resnet18")),
    "debug_mode": differs("--debug_mode", "0"),
    "device": check_device,
    "data_device": check_data_device,
    "cuda_graph": check_cuda_graph,
    "sync_bn": check_sync_bn,
    "threads": check_threads,
    "base_path": check_base_path,
    "results_path": check_results_path,
    "notes": check_notes,
    "non_verbose": check_non_verbose,
    "disable_log": check_disable_log,
    "log_every": check_log_every,
    "log_to": check_log_to,
    "checkpoint_minutes": check_checkpoint_minutes,
    "keep_checkpoint": check_keep_checkpoint,
    "dry_run": check_dry_run,
}


@pytest.mark.parametrize("name", sorted({*ENGINE, *OBSERVED}))
def test_every_engine_flag_changes_something_observable(name, tmp_path, capsys, monkeypatch):
    assert name in ENGINE, f"--{name} is no flag any more: drop its entry"
    assert name in OBSERVED, f"--{name} is new: add an entry that observes what it changes"
    OBSERVED[name](tmp_path, capsys, monkeypatch)


def test_the_same_command_line_gives_the_same_fingerprint():
    """Else the tests above would prove nothing."""
    _fingerprint.cache_clear()
    argv = ("--model", "derpp", *SMALL)
    first = fingerprint(*argv)
    _fingerprint.cache_clear()
    assert fingerprint(*argv) == first


def test_parse_keeps_the_last_of_a_repeated_flag():
    assert Request.parse(["--seed", "1", "--seed=2"]).words == {"seed": ["2"]}


def test_from_with_another_optimizer_takes_that_optimizers_own_defaults(tmp_path):
    """A radius belongs to the optimizer that it was chosen for; momentum is the base's."""
    sam = resolve([*FAST, *SAM, "--rho", "0.3", "--optim_mom", "0.9", "--lr", "0.07"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(sam.to_json()))
    again = resolve(["--from", str(file)])
    assert again.rho == 0.3
    other = resolve(["--from", str(file), "--optimizer", "c_flat"])
    assert (other.rho, other.origins["rho"]) == (0.2, "default")
    assert (other.optim_mom, other.lr) == (0.9, 0.07)


def test_list_of_optimizers_has_passes_and_memory_of_all_plugins_too(tmp_path, prints):
    text = (
        '"""Mine: a variant.\n\nPasses: 7 forward, 7 backward\nMemory: 9 P\n"""\n'
        "from flatcl.utils.optim._sharpness import SharpnessAware\nfrom flatcl.utils.registry import OPTIMIZERS\n"
        "@OPTIMIZERS.register('mine')\nclass Mine(SharpnessAware):\n    pass\n"
    )
    out = prints("--plugin", plugin(tmp_path, "mine", text), "--list", "optimizers")
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for name in (*SELECTORS["optimizer"].names(), "mine"):
        assert "forward" in rows[name] and "backward" in rows[name]
    assert "7 forward, 7 backward" in rows["mine"] and "9 P" in rows["mine"] and "Mine: a variant." in rows["mine"]


def test_the_type_of_a_configuration_has_the_flags_of_every_run():
    declared_types = {name: eval(text, {}) for name, text in protocols.Config.__annotations__.items()}
    assert declared_types == {field.name: field.type for field in dataclasses.fields(EngineArgs)}


def test_a_value_counts_as_the_flags_own_type(tmp_path):
    """A default of 1 for a number is 1.0, in the hash too: it comes back from a file so."""
    text = (
        "from flatcl.datasets.seq_synth import SeqSynth\nfrom flatcl.utils.registry import DATASETS\n"
        "@DATASETS.register('whole')\nclass Whole(SeqSynth):\n"
        "    defaults = {**SeqSynth.defaults, 'lr': 1, 'lr_milestones': [1]}\n"
    )
    config = resolve(["--plugin", plugin(tmp_path, "whole", text), "--model", "er", "--dataset", "whole"])
    assert isinstance(config.lr, float) and config.lr_milestones == (1,)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_json()))
    assert resolve(["--from", str(file)]).hash == config.hash


def test_tasks_of_a_file_and_of_the_command_line(tmp_path):
    argv = ["--model", "er", "--dataset", "seq-synth"]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(resolve([*argv, "--classes_per_task", "6,4"]).to_json()))
    again = resolve(["--from", str(file), "--n_tasks", "2"])
    assert (again.n_tasks, again.classes_per_task) == (2, ())
    assert resolve([*argv, "--classes_per_task", "none"]).classes_per_task == ()
    assert resolve([*argv, "--buffer-policy", "Class-Balanced"]).buffer_policy == "class_balanced"
