"""What wrappers of a training set have in common: they look like the dataset they wrap."""
from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset


class DatasetWrapper(Dataset):
    """A map-style dataset of timm in another dress: what a subclass does not define is the wrapped dataset's."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset' or name.startswith('__'):  # not there yet while a worker unpickles this
            raise AttributeError(name)
        return getattr(self.dataset, name)

    # timm's loader sets the transform after the dataset is made.
    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform
