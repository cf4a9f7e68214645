"""Tensors between workers with devices: straight from one to the other where that is possible, else by their hosts.

By the hosts: a tensor is copied to page-locked memory, travels through the host's network, and is copied to the other
device. That is the way between two workers that share a GPU, and of weights that are asked for (`sharding`), which NCCL
does not offer: the other worker does not know that it will be asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import final

import torch

from lightwork.device.base import Device
from lightwork.transport.base import Carrier, Pending, PointToPoint


@final
class _Sent(Pending):
    def __init__(self, pending: Pending, buffer: torch.Tensor) -> None:
        self._pending = pending
        self._buffer = buffer  # kept until it has left

    def wait(self) -> None:
        self._pending.wait()


@final
class _Received(Pending):
    def __init__(self, pending: Pending, buffer: torch.Tensor, tensor: torch.Tensor) -> None:
        self._pending = pending
        self._buffer = buffer
        self._tensor = tensor

    def wait(self) -> None:
        """Wait for the network, and let the current queue copy."""
        self._pending.wait()
        self._tensor.copy_(self._buffer.view(self._tensor.dtype).view(self._tensor.shape), non_blocking=True)


@final
class ByHosts(PointToPoint):
    """Tensors on a device by way of host buffers, and the hosts' network."""

    def __init__(self, device: Device, network: Carrier) -> None:
        self._device = device
        self._network = network

    def send(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Begin to send. The host waits for what the current queue was given before."""
        buffer = self._device.host_buffer(tensor.numel() * tensor.itemsize, torch.uint8)
        buffer.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
        self._device.synchronize(self._device.mark())
        return _Sent(self._network.send(host, buffer, tag), buffer)

    def receive(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Begin to receive."""
        buffer = self._device.host_buffer(tensor.numel() * tensor.itemsize, torch.uint8)
        return _Received(self._network.receive(host, buffer, tag), buffer, tensor)

    def close(self) -> None:
        """Do nothing: the network is another's."""


@final
class Relay(Carrier):
    """A carrier for tensors on the host and on a device with a memory of its own.

    Owns: both that it is made of.
    """

    def __init__(self, device: Device, network: Carrier, between_devices: PointToPoint) -> None:
        """`network` is the hosts'; `between_devices` is for tensors on the device."""
        super().__init__(network.host, network.leaders)
        self._device = device
        self._network = network
        self._between_devices = between_devices

    def send(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Begin to send."""
        return self._way_of(tensor).send(host, tensor, tag)

    def receive(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Begin to receive."""
        return self._way_of(tensor).receive(host, tensor, tag)

    def receive_from_any(self, tensor: torch.Tensor, tag: int) -> int:
        """Receive on the host."""
        return self._network.receive_from_any(tensor, tag)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let what is begun inside be on its way at once."""
        with self._network.together(), self._between_devices.together():
            yield

    def exchange(self, what: str, payload: bytes) -> list[bytes | None]:
        """Exchange by the hosts' network."""
        return self._network.exchange(what, payload)

    def close(self) -> None:
        """Close both."""
        self._network.close()
        self._between_devices.close()

    def _way_of(self, tensor: torch.Tensor) -> PointToPoint:
        return self._between_devices if self._device.is_here(tensor) else self._network
