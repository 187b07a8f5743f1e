"""The commands in README and pages resolve, and the example files run as they are printed."""

import importlib
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flatcl.utils.commands.train import main
from flatcl.utils.registry import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "tests/records").glob("*/README.md")),
]
REGISTERS = re.compile(r'@(METHODS|DATASETS|BACKBONES|OPTIMIZERS|POLICIES)\.register\("([^"]+)"\)')
SELECTOR = {
    "METHODS": "model",
    "DATASETS": "dataset",
    "BACKBONES": "backbone",
    "OPTIMIZERS": "optimizer",
    "POLICIES": "buffer_policy",
}
SAMPLE = """
Some text with `python main.py --list` in a line, and `python main.py` alone, which is no command.

```
python main.py --model er \\
    --dataset seq-synth   # with a comment
$ FLATCL_DATA=data .venv/bin/python main.py --model sgd --notes "two words" && echo done
tensorboard --logdir results
```

- in a list:

  ```bash
  for seed in 0 1; do python main.py --model er --seed $seed; done
  python -m flatcl report results --pivot dataset
  ```

```python
@METHODS.register("one")
class One: ...
```

```python
print("registers nothing")
```
"""


def fences(text):
    """(language, content) of the fenced blocks, dedented."""
    found = re.findall(r"^([ \t]*)```(\w*)[^\n]*\n(.*?)^\1```[ \t]*$", text, re.MULTILINE | re.DOTALL)
    return [
        (language, "\n".join(line.removeprefix(indent) for line in content.splitlines()))
        for indent, language, content in found
    ]


def shell_lines(text):
    """The commands of a page: lines of its blocks that are no Python, and inline code."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = re.findall(r"`([^`\n]+)`", prose)
    for language, content in fences(text):
        if language != "python":
            lines += content.replace("\\\n", " ").splitlines()
    return lines


def commands(text, start):
    """The words after `python <start>`, of every command that has any. Shell variables become 0."""
    found = []
    for line in shell_lines(text):
        for part in re.split(r"&&|\|\||[;|]", line):
            match = re.search(rf"python3?\s+{re.escape(start)}(.*)", part)
            if match:
                words = shlex.split(re.sub(r"\$\{?\w+\}?", "0", match[1]), comments=True)
                if words:
                    found.append(words)
    return found


def examples(text):
    """(selector, name, code) of the complete example files."""
    found = []
    for language, content in fences(text):
        match = REGISTERS.search(content)
        if language == "python" and match:
            found.append((SELECTOR[match[1]], match[2], content + "\n"))
    return found


def collected(of):
    """The items of each page as parameters of a test, named by the page (a record: by its folder)."""
    return [pytest.param(item, id=f"{page.stem if page.parent.parent.name != 'records' else page.parent.name}-{number}")
            for page in PAGES for number, item in enumerate(of(page.read_text()))]  # fmt: skip


def test_the_parser_finds_commands_and_examples():
    assert commands(SAMPLE, "main.py") == [
        ["--list"],
        ["--model", "er", "--dataset", "seq-synth"],
        ["--model", "sgd", "--notes", "two words"],
        ["--model", "er", "--seed", "0"],
    ]
    assert commands(SAMPLE, "-m flatcl") == [["report", "results", "--pivot", "dataset"]]
    ((selector, name, code),) = examples(SAMPLE)
    assert (selector, name) == ("model", "one") and code.startswith("@METHODS") and code.endswith("...\n")


def test_the_readme_is_short_and_the_pages_have_an_example_of_each_kind():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(commands(text, "main.py")) >= 3 and commands(text, "-m flatcl")
    text = (ROOT / "docs/extending.md").read_text()
    assert {selector for selector, _, _ in examples(text)} == set(SELECTOR.values())


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working folder of its own, with the pages' example files as plugins."""
    monkeypatch.chdir(tmp_path)
    words = []
    for page in PAGES:
        for _, name, code in examples(page.read_text()):
            file = tmp_path / f"{name.replace('-', '_')}.py"
            file.write_text(code)
            words += ["--plugin", str(file)]
    draw_images(tmp_path)
    return words


def draw_images(folder):
    """The files of a user's own that the pages speak of."""
    image = Image.new("RGB", (9, 7))
    trees = [f"birds/class {number}" for number in range(10)]
    trees += [f"office/{domain}/class {number}" for domain in ("art", "photo", "sketch") for number in range(2)]
    for tree in trees:
        (folder / tree).mkdir(parents=True)
        for number in range(2):
            image.save(folder / tree / f"{number}.png")
    x, y = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 10
    np.savez(folder / "data.npz", train_x=x, train_y=y, test_x=x, test_y=y)
    for name in ("vit.safetensors", "r50.safetensors"):
        (folder / name).write_bytes(b"weights")


@pytest.mark.parametrize("words", collected(lambda text: commands(text, "main.py")))
def test_command_resolves(words, elsewhere, tmp_path, capsys):
    if {word.partition("=")[0] for word in words} & {"--resume", "--from"}:
        pytest.skip("needs a run of the reader's own")
    before = sorted(tmp_path.iterdir())
    words = [*words[: words.index("--plugin")], *words[words.index("--plugin") + 2 :]] if "--plugin" in words else words
    extra = [] if {"--list", "--help", "-h"} & set(words) else ["--dry_run"]
    assert main([*words, *elsewhere, *extra]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before, "a dry run wrote something"


COMMANDS = sorted({words[0] for page in PAGES for words in commands(page.read_text(), "-m flatcl")})


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists_and_answers_help(command):
    done = subprocess.run(
        [sys.executable, "-m", "flatcl", command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "--" in done.stdout, done.stderr


def with_parser(text):
    return [words for words in commands(text, "-m flatcl") if words[0] in ("export", "report", "reproduce")]


@pytest.mark.parametrize("words", collected(with_parser))
def test_flags_of_these_commands_are_known(words):
    command = importlib.import_module(f"flatcl.utils.commands.{words[0]}")
    words = words[: words.index("--")] if "--" in words else words
    assert command._parser().parse_args(words[1:])


def test_targets_of_make_exist():
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {word for page in PAGES for line in shell_lines(page.read_text()) if line.startswith("make ")
             for word in line.split("#")[0].split()[1:] if "=" not in word}  # fmt: skip
    assert {"run", "test", "docs"} <= named <= {*rules}


def sweeps(text):
    return [words for words in commands(text, "-m flatcl") if words[0] == "sweep"]


@pytest.mark.parametrize("words", collected(sweeps))
def test_sweep_resolves(words):
    from flatcl.utils.commands import sweep

    jobs, *_ = sweep._prepare(words[1:])
    assert jobs


@pytest.mark.parametrize("example", collected(examples))
def test_example_trains_two_tasks(example, tmp_path, capsys):
    selector, name, code = example
    file = tmp_path / f"{name.replace('-', '_')}.py"
    file.write_text(code)
    chosen = {"model": "er", "dataset": "seq-synth", selector: name}
    argv = [word for key, value in chosen.items() for word in (f"--{key}", value)]
    argv += ["--plugin", str(file), "--debug_mode", "--stop_after", "2", "--results_path", str(tmp_path / "out")]
    assert main(argv) == 0, capsys.readouterr().err
    assert "Accuracy for 2 task(s)" in capsys.readouterr().out
    folder = next((tmp_path / "out").rglob("summary.json")).parent
    assert json.loads((folder / "config.json").read_text())["flags"][selector]["value"] == name
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("example", collected(examples))
def test_example_is_listed_with_its_first_line(example, tmp_path, capsys):
    """In a folder of a registry, the file says what it is, as every other file there does."""
    _, name, code = example
    assert re.match(r'"""[^"\n]+', code), "no docstring"
    file = tmp_path / "example.py"
    file.write_text(code)
    assert main(["--list", "--plugin", str(file)]) == 0
    assert re.search(rf"^  {re.escape(name)} ", capsys.readouterr().out, re.MULTILINE)


def test_the_table_of_optimizers_is_that_of_their_files():
    from flatcl.utils.registry import OPTIMIZERS

    text = (ROOT / "docs/optimizers.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", text, re.MULTILINE
    )
    found = {name: (passes, memory) for name, passes, memory in rows}
    assert len(found) == len(rows)
    assert found == {
        name: tuple(OPTIMIZERS.note(name, key) for key in ("Passes", "Memory")) for name in OPTIMIZERS.names()
    }
