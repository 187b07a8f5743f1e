"""The run folder. Every file in it is whole at any moment: a killed run keeps what it had finished."""

import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from utils.arguments import Config
from utils.errors import UsageError
from utils.registry import ROOT

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "kornia", "tensorboard", "matplotlib", "tqdm", "scikit-learn")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_lines(path: Path, content: dict[str, Any]) -> None:
    """One line for each key: readable where the values are long lists of numbers."""
    lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items())
    write_text(path, "{\n " + ",\n ".join(lines) + "\n}\n")


def write_text(path: Path, text: str) -> None:
    """Atomically: a reader sees the old file or the new one."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    os.replace(fresh, path)


class RunFolder:
    """`results/<setting>/<dataset>/<model>/<time>-<hash>/` and the files in it."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, config: Config) -> "RunFolder":
        """A new folder with config.json in it. Raises `UsageError` where nothing can be written."""
        parent = Path(config.results_path).expanduser() / config.benchmark.setting / config.dataset / config.model
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        for attempt in range(1000):
            path = parent / f"{stamp}-{config.hash}{f'-{attempt}' if attempt else ''}"
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                if not path.is_dir():  # a file lies where one of the folders should be
                    raise UsageError(_unwritable(config.results_path, "a file is in its place")) from None
            except OSError as error:
                raise UsageError(_unwritable(config.results_path, error.strerror)) from None
        folder = cls(path)
        try:
            write_json(path / "config.json", config.to_json())
        except OSError as error:
            raise UsageError(_unwritable(config.results_path, error.strerror)) from None
        return folder

    def write(self, name: str, content: Any) -> None:
        write_json(self.path / name, content)

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def metrics_size(self) -> int:
        file = self.path / "metrics.jsonl"
        return file.stat().st_size if file.exists() else 0

    def truncate_metrics(self, size: int) -> None:
        """Drops lines that were written after a checkpoint, since they will be written again."""
        file = self.path / "metrics.jsonl"
        if file.exists():
            os.truncate(file, size)


def _unwritable(folder: str, reason: str | None) -> str:
    return f"--results_path {folder}: cannot write there ({reason}). Give a folder that can be written."


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on besides the configuration."""
    import torch

    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "device": device,
        "device_name": name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
