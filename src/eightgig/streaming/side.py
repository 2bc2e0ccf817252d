"""A stream for copies, beside the one that computes."""

from __future__ import annotations

import torch


class SideStream:
    """Work queued inside `with` runs on a stream of its own.

    torch's own context looks the current stream up on every entry and exit, which takes as long as
    starting a copy. Here what computes is the stream that was current when this was made.

    Attributes:
        stream: The stream.
        compute: The stream that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.compute = torch.cuda.current_stream(device)

    def __enter__(self) -> SideStream:
        torch.cuda.set_stream(self.stream)
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_stream(self.compute)

    def follow(self) -> None:
        """Order later work of the stream behind all that was queued for computing so far."""
        self.stream.wait_stream(self.compute)

    def mark(self) -> torch.cuda.Event:
        """An event behind the stream's work so far."""
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def mark_compute(self) -> torch.cuda.Event:
        """An event behind what was queued for computing so far."""
        event = torch.cuda.Event()
        event.record(self.compute)
        return event
