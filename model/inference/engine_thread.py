"""The engine in a thread of its own: for an asyncio program such as the server, which follows a
request, and for any other, which starts it and is told."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from model.inference.engine import Engine, Request


class EngineThread:
    """Runs an engine's steps while it has requests.

    All methods but `run` are for the program's own thread. An error in the model ends all requests
    with that error and not the thread.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.callbacks: dict[Request, Callable[[Exception | None], None]] = {}
        self.draining = False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    async def stream(self, request: Request) -> AsyncIterator[int]:
        """Have a request decoded; yields the number of its tokens whenever there are more, and ends
        with it. Whoever stops listening cancels it.

        Raises:
            ValueError, QueueFull: as Engine.submit, before anything is yielded.
        """
        loop, steps = asyncio.get_running_loop(), asyncio.Queue()

        def tell(error: Exception | None) -> None:
            step = len(request.tokens), request.finish_reason, error
            loop.call_soon_threadsafe(steps.put_nowait, step)

        try:
            self.start(request, tell)
            while True:
                count, reason, error = await steps.get()
                if error:
                    raise error
                yield count
                if reason:
                    return
        finally:
            self.cancel(request)

    def start(self, request: Request, tell: Callable[[Exception | None], None]) -> None:
        """Have a request decoded. `tell` is called in the engine's thread whenever there are more
        tokens, and with the error if one ended it.

        Raises:
            ValueError, QueueFull: as Engine.submit.
        """
        self.callbacks[request] = tell
        try:
            self.engine.submit(request)
        except Exception:
            del self.callbacks[request]
            raise
        self.calls.put(lambda: None)  # wakes the thread

    def cancel(self, request: Request) -> None:
        """Give up a request if it still runs, and tell no more of it."""
        self.calls.put(lambda: self.forget(request))

    def call(self, function: Callable[[], Any]) -> Any:
        """The result of something else that is done with the model, between two steps."""
        done: Future = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

        self.calls.put(run)
        return done.result()

    def stop(self, seconds: float) -> None:
        """Finish what runs, for at most so long, and end."""
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
                self.tell(request)
        except Exception as error:  # out of memory, most likely: the others can go on with others
            for request in list(self.callbacks):
                self.engine.cancel(request)
                self.tell(request, error)

    def tell(self, request: Request, error: Exception | None = None) -> None:
        if callback := self.callbacks.get(request):
            callback(error)

    def forget(self, request: Request) -> None:
        self.engine.cancel(request)
        self.callbacks.pop(request, None)
