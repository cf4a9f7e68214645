"""What modules keep beside tensors, and say by `get_extra_state`: saved as it is, and the same on every worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightwork.state.parameters import plain_name

#: The last part of the name that torch gives it in a state dict.
_KEY = "_extra_state"


def is_extra(name: str) -> bool:
    """Return whether a name in a state dict is that of something which a module keeps beside tensors."""
    return name.rpartition(".")[2] == _KEY


class ExtraState:
    """What the modules of a model keep so."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def read(self) -> dict[str, Any]:
        """Return it by its names in the state dict of the model that is not compiled."""
        return {name: module.get_extra_state() for name, module in self._modules()}

    def write(self, values: Mapping[str, Any]) -> None:
        """Give it to the modules. Every worker does."""
        for name, module in self._modules():
            module.set_extra_state(values[name])

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self._model.named_modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                yield plain_name(f"{name}.{_KEY}" if name else _KEY), module
