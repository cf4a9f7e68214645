"""A carrier where there are no other hosts, or another worker speaks to them: nothing is to be moved."""

from __future__ import annotations

from typing import final

import torch

from lightwork.transport.base import Carrier, Pending


@final
class NullCarrier(Carrier):
    """The carrier of one host."""

    def __init__(self, rank: int) -> None:
        """`rank` is that of its worker."""
        super().__init__(0, [rank])

    def send(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Raise ValueError: there is nobody."""
        raise ValueError(f"there is no host {host} to send to")

    def receive(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Raise ValueError: there is nobody."""
        raise ValueError(f"there is no host {host} to receive from")

    def receive_from_any(self, tensor: torch.Tensor, tag: int) -> int:
        """Raise ValueError: there is nobody."""
        raise ValueError("there is no other host to receive from")

    def close(self) -> None:
        """Do nothing."""
