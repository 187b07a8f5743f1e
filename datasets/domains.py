"""Your own domains: `--data_folder DIR` with DIR/<domain>/<class>/, one task for each domain.

All domains have the same classes. A domain may have train/ and val/ (or test/) inside, with the classes in them. Tasks
follow the domains' names, or --domain_order. All else as in `folder`: images of any kind, --image_size, --val_fraction,
defaults.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatcl.datasets import _images
from flatcl.datasets._benchmark import Arrays, Benchmark, DomainBenchmark, Split
from flatcl.datasets._folders import FolderData
from flatcl.utils.arguments import flag
from flatcl.utils.errors import UsageError
from flatcl.utils.files import user_path
from flatcl.utils.registry import DATASETS


@DATASETS.register("domains")
class Domains(FolderData, DomainBenchmark):
    domains: tuple[str, ...]

    @dataclass(frozen=True)
    class Args(FolderData.Args):
        domain_order: tuple[str, ...] = flag((), "names of the domains in the order of the tasks; default: sorted")

    @classmethod
    def declared(cls, config: Any) -> type[Benchmark]:
        folder, size = cls.given(config)
        domains = _images.sub_folders(folder)
        if not _images.has_sub_folders(folder / domains[0]):
            raise UsageError(
                f"--dataset domains expects {folder}/<domain>/<class>/, but {folder / domains[0]} has no sub-folders. "
                f"For {folder}/<class>/ use --dataset folder."
            )
        if config.domain_order and sorted(config.domain_order) != domains:
            raise UsageError(
                f"--domain_order must name each domain of {folder} once ({', '.join(domains)}), got "
                f"{', '.join(config.domain_order)}. Give all of them."
            )
        domains = config.domain_order or tuple(domains)
        parts = [_images.parts_of(folder / domain) for domain in domains]
        cls.check_fraction(config, all(test is not None for _, test in parts))
        first, *others = [part for pair in parts for part in pair if part is not None]
        classes = _images.sub_folders(first)
        for other in others:
            _images.check_same(classes, first, _images.sub_folders(other), other)
        return cls.with_declared(
            num_classes=len(classes), shape=(3, *size), class_names=tuple(classes), domains=domains,
            defaults=cls.defaults | {"n_tasks": len(domains)},
        )  # fmt: skip

    @classmethod
    def check_classes(cls, config: Any) -> list[str]:
        problems = super().check_classes(config)
        if config.n_tasks != len(cls.domains):
            problems.append(
                f"--n_tasks must be {len(cls.domains)}, the number of domains in {config.data_folder}, got "
                f"{config.n_tasks}. Drop it, or give --n_tasks none."
            )
        return problems

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        """The domains' images, one after the other."""
        folder = user_path(self.config.data_folder)
        read = [self.read(folder / domain, root) for domain in self.domains]
        train, test = (tuple(map(np.concatenate, zip(*part, strict=True))) for part in zip(*read, strict=True))
        self._ends = [np.cumsum([len(part[1]) for part in own]) for own in zip(*read, strict=True)]
        self.mean, self.std = _images.mean_and_std(train[0])
        return train, test

    def decided(self) -> dict[str, Any]:
        """With the domain of each task."""
        return super().decided() | {"domains": list(self.domains)}

    def num_rows(self, index: int) -> tuple[int, int]:
        return len(self._rows(self._train, index)), len(self._rows(self._test, index))

    def train_split(self, index: int) -> Split:
        return self._of_rows(self._train, index)

    def monitor_split(self, index: int) -> Split:
        return self._of_rows(self._monitor, index)

    def make_test(self, index: int) -> Split:
        return self._of_rows(self._test, index)

    def joint_split(self) -> Split:
        return self._train

    def _of_rows(self, split: Split, index: int) -> Split:
        rows = self._rows(split, index)
        return Split(split.images[rows], split.labels[rows], split.ids[rows])

    def _rows(self, split: Split, index: int):
        """The rows of a domain: ids count the images that `load` gave, of training also where they are held out."""
        are_tests = split is self._test and not self.config.validation
        ends = self._ends[are_tests]
        start = ends[index - 1] if index else 0
        return ((split.ids >= int(start)) & (split.ids < int(ends[index]))).nonzero().squeeze(1)
