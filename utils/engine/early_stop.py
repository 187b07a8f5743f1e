"""Early stopping: a task ends when held-out images are no longer classified better; its best weights come back."""

from typing import Any

import torch
from torch import Tensor, nn


class EarlyStop:
    """Of the task under way: the best accuracy on its held-out images, the weights that had it, and for how many epochs
    there was no better one. `patience`: so many end the task."""

    def __init__(self, patience: int):
        self.patience = patience
        self.begin()

    def begin(self) -> None:
        """A new task."""
        self.best, self.epochs_since = -1.0, 0
        self.weights: dict[str, Tensor] = {}

    def note(self, accuracy: float, module: nn.Module) -> bool:
        """An epoch has ended with this accuracy; returns whether the task ends with it."""
        if accuracy > self.best:
            self.best, self.epochs_since = accuracy, 0
            self.weights = {name: tensor.clone() for name, tensor in _weights(module).items()}
        else:
            self.epochs_since += 1
        return self.epochs_since >= self.patience

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Puts the best epoch's parameters and buffers (BatchNorm's averages) back, in place."""
        for name, tensor in _weights(module).items() if self.weights else ():
            tensor.copy_(self.weights[name])

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "epochs_since": self.epochs_since, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.best, self.epochs_since = state["best"], state["epochs_since"]
        self.weights = {name: tensor.to(device) for name, tensor in state["weights"].items()}


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
