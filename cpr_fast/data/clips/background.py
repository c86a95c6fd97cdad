"""Runs an iterator ahead of its consumer, in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class _End:
    """The last entry of the queue: the iterator is exhausted, or has raised `error`."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def run_ahead(items: Generator[Item, None, None], depth: int) -> Iterator[Item]:
    """Yields `items`, computed up to `depth` items ahead in a background thread. An exception in that thread is raised
    again in the consumer.

    When the consumer stops early (break, an exception, KeyboardInterrupt, a dropped generator), the thread finishes the
    current item and closes `items`; then the thread is joined.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: Item | _End) -> None:
        while not stop.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        error = None
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    break
        except BaseException as caught:  # also KeyboardInterrupt, because the consumer waits for an entry
            error = caught
        finally:
            items.close()
        put(_End(error))

    thread = threading.Thread(target=work, name="cpr-fast-batches", daemon=True)
    thread.start()
    try:
        while not isinstance(entry := ready.get(), _End):
            yield entry
        if entry.error is not None:
            raise entry.error
    finally:
        stop.set()
        thread.join()
