"""Your own images: `--data_folder DIR` with DIR/train/<class>/ and DIR/val/<class>/ (or test/), or DIR/<class>/.

The layout of torchvision's ImageFolder. Classes are the sub-folders, in the order of their names. Give --n_tasks, or
--classes_per_task 2,3,1 where tasks differ. Without val/ and test/, --val_fraction of each class is tested on, chosen
by the files' names; with both, val/ is read. Images: png, jpg, bmp, webp, gif, tif, ppm, pgm of any size and mode. They
are decoded once, to --image_size, and kept in the folder `cache` of --base_path. Defaults, no published ones:
ResNet-18, 10 epochs, batches of 32 and 32 of the memory, lr 0.03; random crop (padding: an eighth of the height), flip.
"""

from pathlib import Path
from typing import Any

from flatcl.datasets import _images
from flatcl.datasets._benchmark import Arrays, Benchmark
from flatcl.datasets._folders import FolderData
from flatcl.utils.files import user_path
from flatcl.utils.registry import DATASETS


@DATASETS.register("folder")
class Folder(FolderData):
    @classmethod
    def declared(cls, config: Any) -> type[Benchmark]:
        folder, size = cls.given(config)
        train, test = _images.parts_of(folder)
        classes = _images.sub_folders(train)
        cls.check_fraction(config, test is not None)
        if test is not None:
            _images.check_same(classes, train, _images.sub_folders(test), test)
        return cls.with_declared(num_classes=len(classes), shape=(3, *size), class_names=tuple(classes))

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        train, test = self.read(user_path(self.config.data_folder), root)
        self.mean, self.std = _images.mean_and_std(train[0])
        return train, test
