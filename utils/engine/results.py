"""The run folder. Every file in it is whole at any moment: a killed run keeps what it had finished."""

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import flatcl
from flatcl.utils import launch
from flatcl.utils.arguments import Config, EngineArgs
from flatcl.utils.console import complain, reason
from flatcl.utils.engine.lock import Lock
from flatcl.utils.errors import UsageError
from flatcl.utils.files import open_regular, read_json, user_path, write_json
from flatcl.utils.identity import DATA, beside_plugins, named
from flatcl.utils.registry import IS_CLONE, ROOT

PACKAGES = (
    "torch", "torchvision", "timm", "safetensors", "numpy", "scipy", "kornia", "tensorboard", "matplotlib", "tqdm",
    "scikit-learn",
)  # fmt: skip
NEIGHBOURS = 100


class RunFolder:
    """`results/<setting>/<dataset>/<model>/<time>-<hash>/` and the files in it. Whoever writes there holds its lock."""

    def __init__(self, path: Path):
        self.path = path
        self.lock = Lock(path / "lock", f"the run in {path}")

    @classmethod
    def create(cls, config: Config) -> "RunFolder":
        """A new folder with config.json in it, locked. Raises `UsageError` where nothing can be written."""
        parent = _parent(config)
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        for attempt in range(1000):
            path = parent / f"{stamp}-{config.hash}{f'-{attempt}' if attempt else ''}"
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                if not path.is_dir():  # a file lies where one of the folders should be
                    raise UsageError(_unwritable(config.results_path, "there is a file with this name")) from None
            except OSError as error:
                raise UsageError(_unwritable(config.results_path, error.strerror)) from None
        folder = cls(path)
        try:
            folder.lock.acquire()
            copies = {name: file.read_bytes() for name, file in beside_plugins(config.plugins).items()}
            copies |= {name: plugin.source for name, plugin in named(config.plugins).items()}
            for name, content in copies.items():
                (path / "plugins" / name).parent.mkdir(parents=True, exist_ok=True)
                (path / "plugins" / name).write_bytes(content)
            folder.write("config.json", config.to_json(), durable=True)
        except OSError as error:
            folder.lock.release()
            folder.remove()
            raise UsageError(_unwritable(config.results_path, error.strerror)) from None
        return folder

    @classmethod
    def of(cls, config: Config) -> list[Path]:
        """The run folders of this configuration, the newest first."""
        folders = (path for path in _parent(config).glob(f"*-{config.hash}*") if path.is_dir())
        return sorted(folders, key=lambda path: path.name, reverse=True)

    def neighbours(self, config: Config) -> list[dict[str, Any]]:
        """{flag: value} of the newest `NEIGHBOURS` other runs on this benchmark in the results folder; of what can
        change a number. What cannot be read is passed over."""
        without = {field.name for field in dataclasses.fields(EngineArgs) if not field.metadata["result"]}
        files = sorted(_parent(config).parent.glob("*/*/config.json"), key=lambda file: file.parent.name)
        found = []
        for file in files[-NEIGHBOURS:]:
            if file.parent.name == self.path.name:
                continue
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
                flags = read_json(file)["flags"].items()
                found.append({name: entry["value"] for name, entry in flags if name not in without})
        return found

    @classmethod
    @contextmanager
    def claimed(cls, config: Config) -> Iterator[None]:
        """Inside, no other process that asks for it is at this configuration. Raises `Busy`, and `UsageError` where
        nothing can be written."""
        parent = _parent(config)
        claim = Lock(parent / f".{config.hash}.lock", f"{config.model} on {config.dataset}, config {config.hash},")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            claim.acquire()
        except OSError as error:
            raise UsageError(_unwritable(config.results_path, error.strerror)) from None
        try:
            yield
        finally:
            claim.release()

    def note_changed_code(self, steps: int, code: dict[str, str]) -> None:
        """Adds to config.json that the run goes on with this code after so many steps."""
        content = read_json(self.path / "config.json")
        content.setdefault("changed_code", []).append({"after_step": steps, "code": code})
        self.write("config.json", content, durable=True)

    def note_data(self, data: dict[str, str]) -> None:
        """Adds to the code in config.json what `identity.data_of` says."""
        content = read_json(self.path / "config.json")
        if content.get("code") is None:  # of a version that did not write it down
            return
        code = {name: digest for name, digest in content["code"].items() if not name.startswith(DATA)} | data
        if code != content["code"]:
            self.write("config.json", {**content, "code": dict(sorted(code.items()))}, durable=True)

    def note_environment(self, now: dict[str, Any], steps: int | None) -> dict[str, Any]:
        """environment.json: where the run began, and under `resumed` where else it went on, after so many `steps`
        (None: it begins). Returns the environment before."""
        content = None
        with contextlib.suppress(OSError, ValueError):
            content = read_json(self.path / "environment.json") if steps is not None else None
        if not isinstance(content, dict):  # it begins, or the file is damaged
            self.write("environment.json", now)
            return {}
        others = content.pop("resumed", [])
        others = [entry for entry in others if isinstance(entry, dict)] if isinstance(others, list) else []
        *_, last = [content, *others]
        before = {name: value for name, value in last.items() if name != "after_step"}
        if before != now:
            self.write("environment.json", {**content, "resumed": [*others, {"after_step": steps, **now}]})
        return before

    @contextmanager
    def held(self) -> Iterator[None]:
        """The lock of a folder that is there already, for as long as the block lasts; what a killed run has left half
        written is removed."""
        try:
            self.lock.acquire()
        except OSError as error:
            raise UsageError(
                f"{self.path}: cannot write there ({error.strerror}). Copy the folder to a place where you can write."
            ) from None
        try:
            for pattern in ("*.tmp", "checkpoint/*.tmp", "*.new", "checkpoint/*.new"):
                for left in self.path.glob(pattern):
                    if not left.name.startswith("lock."):  # of somebody who is about to find the lock taken
                        with contextlib.suppress(OSError):
                            left.unlink()
            yield
        finally:
            self.lock.release()

    def write(self, name: str, content: Any, durable: bool = False) -> None:
        write_json(self.path / name, content, durable)

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl: the whole of it, or nothing and an `OSError`."""
        content = (json.dumps(line, allow_nan=False) + "\n").encode()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(self.path / "metrics.jsonl", flags, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            if os.write(descriptor, content) < len(content):  # the disk became full within the line
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl, which are on the disk when this returns."""
        with contextlib.suppress(OSError, ValueError), open_regular(self.path / "metrics.jsonl") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size
        return 0

    def truncate_metrics(self, size: int) -> None:
        """Drops lines that were written after a checkpoint, since they will be written again. Where lines from before
        it are missing, says so."""
        file, there = self.path / "metrics.jsonl", self.metrics_size()
        try:
            if there > size:
                os.truncate(file, size)
            elif there < size:
                complain(
                    f"warning: {file} has {there:,} bytes, but had {size:,} at the checkpoint: the missing lines "
                    "cannot be written again. The run continues; its results do not depend on them."
                )
                if there:
                    os.truncate(file, file.read_bytes().rfind(b"\n") + 1)  # a line that is cut
        except OSError as error:
            complain(f"warning: {file} cannot be shortened to its size at the checkpoint ({reason(error)})")

    def remove(self) -> None:
        """Nothing has been computed: no trace of a run that never began."""
        shutil.rmtree(self.path, ignore_errors=True)


def _parent(config: Config) -> Path:
    return user_path(config.results_path) / config.benchmark.setting / config.dataset / config.model


def _unwritable(folder: str, reason: str | None) -> str:
    return f"--results_path {folder}: cannot write there ({reason}). Give a folder that can be written."


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on besides the configuration."""
    import torch

    changes = _git("status", "--porcelain", "--untracked-files=no")
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {
        "version": flatcl.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "device": device,
        "device_name": name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": launch.size(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*words: str) -> str | None:
    if not IS_CLONE or not (ROOT / ".git").exists():  # it would be the repository of whoever has us in theirs
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
