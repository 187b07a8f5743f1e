"""What the parts of a run ask of each other, as types for mypy and for readers: nothing here does anything.

A class of a user's own needs to be derived from none of these. It fits where it has what is written here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the command line reads flags before torch is imported
    import torch
    from torch import Tensor, nn


class Split(Protocol):
    """Rows of a benchmark: images (N, C, H, W) uint8, labels (N,) int64, ids (N,) int64, unique over the benchmark."""

    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def ids(self) -> Tensor: ...
    @property
    def batch_lengths(self) -> tuple[int, ...] | None:
        """Rows of each batch, where the order of the rows and the batches are part of the data."""

    def __len__(self) -> int: ...


class Task(Protocol):
    """One task: `index` from 0, and the outputs `classes` that it uses."""

    index: int
    classes: range

    @property
    def train(self) -> Split: ...
    @property
    def monitor(self) -> Split:
        """What --early_stop holds out."""

    @property
    def test(self) -> Split: ...


class Benchmark(Protocol):
    """A sequence of tasks, and what is known of its data."""

    name: str
    setting: str
    num_classes: int
    shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    default_backbone: str
    defaults: dict[str, Any]
    protocols: dict[str, dict[str, Any]]
    draws_tasks: bool
    unofficial: str | None
    published_as: str | None

    @classmethod
    def check(cls, config: Any, /) -> list[str]: ...
    @classmethod
    def declared(cls, config: Any, /) -> type[Benchmark]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Task: ...
    def __iter__(self) -> Iterator[Task]: ...
    @property
    def joint_task(self) -> Task: ...
    def augmentations(self) -> list[nn.Module]: ...
    @property
    def num_bytes(self) -> int:
        """Of its images in memory."""

    def check_tasks(self) -> None: ...
    def test_size(self, index: int, /) -> int:
        """Images of a task's test set."""

    def class_order(self) -> list[int]: ...
    def decided(self) -> dict[str, Any]: ...
    def to(self, device: torch.device, /) -> None: ...


class Method(Protocol):
    """What is known of a method before it is built."""

    name: str
    settings: tuple[str, ...]
    published: Mapping[tuple[str, int | None], Mapping[str, tuple[Any, str]]]
    default_optimizer: str
    trains_jointly: bool
    learns_at_the_end: bool
    has_memory: bool
    revisits: bool
    rows_are_independent: bool

    @classmethod
    def check(cls, config: Any, benchmark: Any, /) -> list[str]: ...


class Optimizer(Protocol):
    """What is known of an optimizer before it is built."""

    name: str
    defaults: dict[str, Any]

    @classmethod
    def check(cls, config: Any, method: Any, /) -> list[str]: ...


class Ranks(Protocol):
    """The processes of a run that several train: which one this is, and what they exchange."""

    number: int
    size: int

    def sum(self, tensors: list[Tensor], /) -> list[Tensor]:
        """Each tensor summed over the ranks."""

    def greatest(self, value: int, /) -> int: ...
    def are_equal(self, tensor: Tensor, /) -> bool: ...
    def have_equal_generators(self) -> bool: ...


class Config(Protocol):
    """The flags of a run: those of every run with their types, those of its parts by name."""

    @property
    def values(self) -> Mapping[str, Any]: ...

    model: str
    dataset: str
    backbone: str
    optimizer: str
    protocol: str | None
    lr: float
    n_epochs: int
    batch_size: int
    optim_wd: float
    lr_scheduler: str
    lr_milestones: tuple[int, ...]
    lr_gamma: float
    seed: int
    class_order_seed: int | None
    data_order_seed: int | None
    init_seed: int | None
    n_tasks: int | None
    classes_per_task: tuple[int, ...]
    start_from: int
    stop_after: int | None
    pretrained_weights: str | None
    freeze_backbone: bool
    joint: bool
    validation: bool
    permute_classes: bool
    custom_class_order: tuple[int, ...]
    augmentation: bool
    class_il_argmax: str
    eval_tasks: str
    model_config: str
    warmup_epochs: int
    clip_grad: float | None
    early_stop: int | None
    budget_rows: int | None
    amp: str
    channels_last: str
    debug_mode: bool
    device: str
    data_device: str
    cuda_graph: str
    sync_bn: bool
    threads: int
    base_path: str
    results_path: str
    eval_every: int | None
    save_predictions: bool
    notes: str
    non_verbose: bool
    disable_log: bool
    log_every: int
    log_to: str | None
    checkpoint_minutes: float
    keep_checkpoint: bool
    dry_run: bool

    def __getattr__(self, name: str, /) -> Any: ...
    def view(self, cls: type, /) -> Any:
        """The `Args` of a part, filled in; None if it declares none."""

    @property
    def hash(self) -> str: ...
    @property
    def evaluated(self) -> str:
        """'all' or 'seen': the tasks that are evaluated."""

    @property
    def learner(self) -> type[Method]: ...
    @property
    def benchmark(self) -> type[Benchmark]: ...
