"""What a training needs to go on where it was stopped. No pickle: tensors and numbers in one safetensors file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from qcbguard_plugins.errors import CheckpointError

_SECONDS_BETWEEN_SAVES: Final = 30.0
_LOSSES: Final = "losses"
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """The last saved state of one training.

    Args:
        path: The file; it need not exist.
        seconds_between_saves: Least time between two saves.
    """

    def __init__(self, path: Path, seconds_between_saves: float = _SECONDS_BETWEEN_SAVES) -> None:
        self._path = path
        self._interval = seconds_between_saves
        self._last_save = time.monotonic()

    def load(self, model: nn.Module, optimizer: torch.optim.AdamW) -> list[float]:
        """Put the saved state into a model and its optimizer.

        Returns:
            The losses of the steps that are done: as many steps as losses; none where nothing was saved.

        Raises:
            CheckpointError: The file is of another model or training.
        """
        if not self._path.exists():
            return []
        named = _trained(model, optimizer)
        try:
            with safe_open(self._path, framework="pt") as file:
                losses: list[float] = file.get_tensor(_LOSSES).double().tolist()
                model.load_state_dict({name: file.get_tensor(f"model.{name}") for name in model.state_dict()})
                for name, parameter in named.items():
                    moments = {moment: file.get_tensor(f"{moment}.{name}") for moment in _MOMENTS}
                    optimizer.state[parameter] = {"step": torch.tensor(float(len(losses))), **moments}
        except Exception as error:  # a damaged file breaks in many ways, and each means: start again
            raise CheckpointError(
                f"{self._path.name} is not a state of this training: {error}", remedy="Delete it; training starts anew."
            ) from error
        return losses

    def save(self, model: nn.Module, optimizer: torch.optim.AdamW, losses: Sequence[float]) -> None:
        """Replace the saved state."""
        tensors = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
        for name, parameter in _trained(model, optimizer).items():
            for moment in _MOMENTS:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
        tensors[_LOSSES] = torch.tensor(losses, dtype=torch.float64)
        partial = self._path.with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(self._path)
        self._last_save = time.monotonic()

    def save_if_due(self, model: nn.Module, optimizer: torch.optim.AdamW, losses: Sequence[float]) -> None:
        """Replace the saved state if some time has passed since the last save."""
        if time.monotonic() - self._last_save >= self._interval:
            self.save(model, optimizer, losses)


def _trained(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer moves, by name."""
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in moved}
