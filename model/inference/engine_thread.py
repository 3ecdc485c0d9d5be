"""The engine in a thread of its own: `stream` for asyncio programs such as the server, `start`
with a callback for all others."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from model.inference.engine import Engine, Request


class EngineThread:
    """Runs the steps of an engine while it has requests.

    The methods above `run` may be called from other threads. An error in the model ends all
    requests with that error, and the thread goes on.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.callbacks: dict[Request, Callable[[Exception | None], None]] = {}
        self.draining = False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    async def stream(self, request: Request) -> AsyncIterator[int]:
        """Decode a request; yields its number of tokens whenever there are more, and ends with it.
        Closing this iterator cancels the request.

        Raises:
            ValueError, QueueFull: as Engine.submit, before anything is yielded.
        """
        loop, updates = asyncio.get_running_loop(), asyncio.Queue()

        def on_update(error: Exception | None) -> None:
            update = len(request.tokens), request.finish_reason, error
            loop.call_soon_threadsafe(updates.put_nowait, update)

        try:
            self.start(request, on_update)
            while True:
                count, reason, error = await updates.get()
                if error:
                    raise error
                yield count
                if reason:
                    return
        finally:
            self.cancel(request)

    def start(self, request: Request, on_update: Callable[[Exception | None], None]) -> None:
        """Decode a request. `on_update` is called in the engine's thread whenever there are more
        tokens, with the error if one ended the request, else with None.

        Raises:
            ValueError, QueueFull: as Engine.submit.
        """
        self.callbacks[request] = on_update
        try:
            self.engine.submit(request)
        except Exception:
            del self.callbacks[request]
            raise
        self.calls.put(lambda: None)  # wakes the thread

    def cancel(self, request: Request) -> None:
        """Stop a request if it still runs; its callback is not called any more."""
        self.calls.put(lambda: self.drop(request))

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function that uses the model between two steps; returns its result."""
        done: Future = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

        self.calls.put(run)
        return done.result()

    def stop(self, seconds: float) -> None:
        """Finish all requests, for at most `seconds`, and end the thread."""
        self.calls.put(None)
        self.thread.join(seconds)

    # -- in the thread -------------------------------------------------------------------------

    def run(self) -> None:
        while not self.draining or self.engine.busy:
            while not self.calls.empty() or not (self.engine.busy or self.draining):
                call = self.calls.get()
                if call:
                    call()
                else:
                    self.draining = True
            if self.engine.busy:
                self.step()

    def step(self) -> None:
        try:
            for request in self.engine.step():
                self.notify(request)
        except Exception as error:  # most likely out of memory: later requests may fit
            for request in list(self.callbacks):
                self.engine.cancel(request)
                self.notify(request, error)

    def notify(self, request: Request, error: Exception | None = None) -> None:
        if callback := self.callbacks.get(request):
            callback(error)

    def drop(self, request: Request) -> None:
        self.engine.cancel(request)
        self.callbacks.pop(request, None)
