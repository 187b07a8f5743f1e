"""TensorBoard: names of runs that say what differs, hyperparameters that differ first, what belongs together in one
chart."""

import json
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from flatcl.utils.arguments import resolve
from flatcl.utils.commands.train import main
from flatcl.utils.engine import board, labels

SHORT = ("--dataset", "seq-synth", "--debug_mode", "1", "--n_tasks", "2", "--threads", "1", "--device", "cpu",
         "--non_verbose", "1")  # fmt: skip
ER = ("--model", "er", "--optimizer", "looksam", "--buffer_size", "50", "--seed", "1")


def start(folder, *argv):
    before = set(folder.rglob("config.json"))
    assert main([*argv, *SHORT, "--results_path", str(folder)]) == 0
    (file,) = set(folder.rglob("config.json")) - before
    return file.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of er, the second in a folder that has the first."""
    folder = tmp_path_factory.mktemp("results")
    return start(folder, "--model", "er", "--seed", "0"), start(folder, *ER, "--log_every", "2")


def events(folder):
    (place,) = (folder / "tensorboard").iterdir()
    return EventAccumulator(str(place), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def hyperparameters(folder):
    content = {tag: found.plugin_data.content for tag, found in events(folder).summary_metadata.items()}
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    return experiment, metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (ER, "er-looksam-50-s1-"),
        (("--model", "er"), "er-200-s0-"),
        (("--model", "mgser-sam"), "mgser_sam-200-s0-"),  # sam is its default
        (("--model", "mgser_sam", "--optimizer", "sgd"), "mgser_sam-sgd-200-s0-"),
        (("--model", "lwf", "--seed", "3"), "lwf-s3-"),  # has no memory
    ],
)
def test_a_run_is_named_after_what_differs(words, name):
    config = resolve([*words, *SHORT])
    size = config.values.get("buffer_size")
    assert labels.run_name(config) == name.replace("-200-", f"-{size}-") + config.hash[:6]


def test_the_event_file_lies_in_the_run_folder_below_the_name_of_the_run(runs):
    first, second = runs
    digest = second.name.rpartition("-")[2]
    (file,) = second.rglob("*tfevents*")
    assert file.parent == second / "tensorboard" / f"er-looksam-50-s1-{digest[:6]}"
    names = {path.parent.name for run in runs for path in run.rglob("*tfevents*")}
    assert len(names) == 2 and not list(second.glob("*tfevents*"))


def test_a_run_with_its_event_file_in_the_run_folder_itself_goes_on_there(runs, tmp_path):
    """As runs had it before they were named in TensorBoard; a part of a curve elsewhere would be a second run."""
    config = resolve([*ER, *SHORT])
    assert board.board_folder(tmp_path, config) == tmp_path / "tensorboard" / labels.run_name(config)
    folder = shutil.copytree(runs[1], tmp_path / "copy")
    (file,) = folder.rglob("*tfevents*")
    file.rename(folder / file.name)
    shutil.rmtree(folder / "tensorboard")
    assert board.board_folder(folder, config) == folder and board.HPARAMS in board.entries(folder)


def test_hparams_are_flags_that_change_a_number_and_mark_what_differs(runs):
    config = resolve([*ER, *SHORT])
    experiment, given = hyperparameters(runs[1])
    assert set(given.hparams) <= {name for name, flag in config.flags.items() if flag.result}
    assert given.hparams["seed"].number_value == 1 and given.hparams["optimizer"].string_value == "looksam"
    assert given.hparams["augmentation"].bool_value is True and not {"base_path", "notes"} & set(given.hparams)
    assert given.group_name == labels.run_name(config)
    differs = {info.name for info in experiment.hparam_infos if info.differs}
    assert {"model", "seed", "optimizer", "buffer_size", "debug_mode", "n_tasks", "rho"} <= differs  # rho: er has none
    assert not {"dataset", "lr", "batch_size", "amp"} & differs
    tags = {tag for tag in events(runs[1]).Tags()["scalars"] if tag.startswith("metrics/")}
    assert {info.name.tag for info in experiment.metric_infos} == tags and len(tags) == 16


def test_hparams_of_other_runs_have_columns_too(tmp_path):
    first = start(tmp_path, *ER)
    second = start(tmp_path, "--model", "sgd", "--lr", "0.02")
    (columns, given), before = hyperparameters(second), hyperparameters(first)[0]
    infos = {info.name: info.differs for info in columns.hparam_infos}
    assert infos["buffer_size"] and infos["lr"] and "buffer_size" not in given.hparams
    assert not {info.name: info.differs for info in before.hparam_infos}["lr"]


def test_damaged_runs_beside_it_cost_no_hyperparameters(tmp_path):
    for number, text in enumerate(("", "[]", '{"flags": {"lr": 3}}', '{"flags": {"lr": {"value": [1]}}}')):
        folder = tmp_path / "class-il" / "seq-synth" / "er" / f"20260101-00000{number}-0123456789ab"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
    assert len(hyperparameters(start(tmp_path, *ER))[1].hparams) > 20


def test_what_belongs_together_shares_a_chart(runs):
    found = events(runs[1])
    layout = layout_pb2.Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert [category.title for category in layout.category] == ["accuracy", "forgetting", "gradients"]
    assert charts["class-il: each task"] == [r"accuracy/class-il/task_\d+"]
    assert charts["task-il: forgetting_chaudhry18"] == ["forgetting/task-il"]


def test_forgetting_is_logged_as_tasks_end(runs):
    (point,) = events(runs[1]).Scalars("forgetting/class-il")
    matrix = json.loads((runs[1] / "summary.json").read_text())["accuracy"]["class-il"]
    assert point.step == 2 and point.value == pytest.approx(matrix[0][0] - matrix[1][0])


def test_titles_say_what_differs_from_the_defaults():
    words = ("--model", "er", "--dataset", "seq-synth")
    config = resolve(words)
    assert labels.title(config, "curves") == f"er on seq-synth, curves\nmemory {config.buffer_size}, seed 0"
    config = resolve([*words, "--optimizer", "sam", "--rho", "0.3", "--lr", "0.01", "--seed", "2", "--notes", "long"])
    expected = f"er on seq-synth, curves\nsam, memory {config.buffer_size}, seed 2, lr 0.01, rho 0.3"
    assert labels.title(config, "curves") == expected
    many = resolve([*words, "--lr", "0.01", "--n_epochs", "3", "--batch_size", "4", "--optim_wd", "0.1", "--clip_grad",
                    "1", "--warmup_epochs", "1"])  # fmt: skip
    assert labels.title(many, "curves").endswith(", ...") and len(labels.changed(many)) == 6
