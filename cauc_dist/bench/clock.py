"""What the seconds of a step go to: a clock that turns to another part when the step does."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from cauc_dist.bench import rates

PARTS = ("data", "augment", "encode", "loss", "backward", "communication", "update", "other")
"""data: waiting for scans. encode: the forward pass. other: what is left. Nothing counts as communication by itself."""


@dataclass
class Clock:
    """Seconds by part. A part within another is taken out of it, so that they add up."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    _open: list[str] = field(default_factory=lambda: ["other"])
    _since: float = field(default_factory=time.perf_counter)

    def _turn(self) -> None:
        rates.wait(self.device)
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def enter(self, part: str) -> None:
        self._turn()
        self._open.append(part)

    def leave(self) -> None:
        self._turn()
        self._open.pop()

    def restart(self) -> dict[str, float]:
        """What was counted; from here on it counts anew."""
        self._turn()
        found, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return found

    def watch(self, thing: object, **parts: str) -> None:
        """From now on each call of thing.METHOD counts as its part: watch(engine, backward="backward")."""
        for method, part in parts.items():
            setattr(thing, method, self._around(part, getattr(thing, method)))

    def _around(self, part: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def acted(*arguments: Any) -> Any:
            self.enter(part)
            try:
                return act(*arguments)
            finally:
                self.leave()

        return acted

    @contextmanager
    def forward(self, module: torch.nn.Module) -> Iterator[None]:
        """Within, the module's forward pass counts as encode."""
        hooks = [
            module.register_forward_pre_hook(lambda module, x: self.enter("encode")),
            module.register_forward_hook(lambda module, x, z: self.leave()),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
