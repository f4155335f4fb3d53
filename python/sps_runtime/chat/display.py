"""An answer on a terminal: a bar while the prompt is read, then its text, then what it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TextIO

from tqdm import tqdm

from sps_runtime.chat.stream import Ended, Event, Prefilled, Text


@dataclass
class Display:
    """Writes text to `out`; the bar and the closing line go to `notes`.

    Attributes:
        notes: None for neither, as where the output is piped.
    """

    out: TextIO = field(default_factory=lambda: sys.stdout)
    notes: TextIO | None = field(default_factory=lambda: sys.stderr)
    clock: Callable[[], float] = time.monotonic

    def show(self, events: Iterable[Event]) -> None:
        """Until the answer has ended."""
        began, first, bar = self.clock(), 0.0, _Bar(self.notes)
        try:
            for event in events:
                if isinstance(event, Prefilled):
                    bar.move(event)
                elif isinstance(event, Text):
                    first = first or self.clock()
                    bar.close()
                    self.out.write(event.text)
                    self.out.flush()
                else:
                    bar.close()
                    self.out.write("\n")
                    self._close(event, (first or self.clock()) - began, self.clock() - began)
        finally:
            bar.close()

    def _close(self, event: Ended, first_s: float, all_s: float) -> None:
        if self.notes is None:
            return
        words = [f"{event.prompt_tokens:,} tokens read"]
        if event.cached_tokens:
            words[0] += f", {event.cached_tokens:,} of them cached"
        words.append(f"first token after {first_s:.2f} s")
        if event.completion_tokens > 1 and all_s > first_s:
            words.append(f"{(event.completion_tokens - 1) / (all_s - first_s):.1f} tokens/s")
        if event.reason == "length":
            words.append("cut off at --max-tokens")
        self.notes.write(f"({'; '.join(words)})\n")
        self.notes.flush()


class _Bar:
    """Shown from the first event of a prefill to the first piece of text, then wiped."""

    def __init__(self, notes: TextIO | None) -> None:
        self._notes = notes
        self._bar: tqdm[None] | None = None

    def move(self, event: Prefilled) -> None:
        if self._notes is None:
            return
        if self._bar is None:
            self._bar = tqdm(
                total=event.total,
                initial=event.done,
                desc="reading",
                unit=" tokens",
                leave=False,
                file=self._notes,
            )
        self._bar.total = event.total
        self._bar.update(event.done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
