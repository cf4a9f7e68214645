"""Weights that lie in a mapped file: their pages are read ahead before a module's forward, and unmapped after it."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightwork.engine.forward.fetching import Fetching
from lightwork.engine.forward.hooks import ModuleHook
from lightwork.state.places import Visits
from lightwork.state.weights import Weights


class WeightsOnDisk(Fetching):
    """Weights whose pages are read ahead before a module's forward, and unmapped after it and after their gradient.

    Owns: hooks on the modules, until `close`.
    """

    def __init__(self, weights: Weights, pages: Visits, inner: Fetching) -> None:
        """`pages` visit by parameter; `inner` brings weights that are not at home here."""
        super().__init__(weights)
        self._pages = pages
        self._inner = inner
        self.needs_mode = inner.needs_mode
        self._hooks: list[RemovableHandle] = []

    def watch_modules(self, model: nn.Module) -> None:
        """Let pages come before a module, and leave after it."""
        self._inner.watch_modules(model)
        index_of = {id(parameter): index for index, parameter in enumerate(self._weights.parameters)}
        owners = [(module, [index_of[id(p)] for p in module.parameters(recurse=False)]) for module in model.modules()]
        owners = [(module, indices) for module, indices in owners if indices]
        for position, (module, indices) in enumerate(owners):
            following = owners[(position + 1) % len(owners)][1]

            def before(_module: nn.Module, _inputs: object, following: list[int] = following) -> None:
                for index in following:
                    self._pages.ask(index)

            def after(_module: nn.Module, _inputs: object, _out: object, indices: list[int] = indices) -> None:
                for index in indices:
                    self._pages.leave(index, written=False)

            self._hooks += [
                module.register_forward_pre_hook(ModuleHook(before)),
                module.register_forward_hook(ModuleHook(after)),
            ]

    def active(self) -> contextlib.AbstractContextManager[None]:
        """As the inner one."""
        return self._inner.active()

    def in_backward(self) -> contextlib.AbstractContextManager[None]:
        """As the inner one."""
        return self._inner.in_backward()

    def bring_saved(self, tensor: torch.Tensor) -> torch.Tensor:
        """As the inner one."""
        return self._inner.bring_saved(tensor)

    def has_gradient(self, parameter: int) -> None:
        """Unmap the parameter's pages."""
        self._inner.has_gradient(parameter)
        self._pages.leave(parameter, written=False)

    def leave_written(self, parameter: int) -> None:
        """Unmap the parameter's pages."""
        self._pages.leave(parameter, written=False)

    def settle(self) -> None:
        """Unmap all."""
        self._inner.settle()
        self._pages.settle()

    def close(self) -> None:
        """Take the hooks off the modules."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._inner.close()
