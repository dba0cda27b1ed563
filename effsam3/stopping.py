# SPDX-License-Identifier: Apache-2.0
"""Requests to stop (SIGTERM, SIGUSR1, Ctrl-C): who hears them, who obeys and when.

Batch systems signal one process, a process group or everything in a container. So whoever can save hears a request and
obeys between two steps, and its helpers ignore what it hears: they end when it does.

Light: the standard library only, so that a request is heard before torch is there.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOPPED = os.EX_TEMPFAIL  # 75, the exit code: what was done is saved and the same command resumes
IMPATIENCE_S = 1.0  # `timeout` and launchers send the same request twice at once; a person needs longer than this
LAUNCHED = "EFFSAM3_LAUNCHED"  # number of the process of `effsam3 launch` that has started this one
RANK = "TORCHELASTIC_RUN_ID"  # set by torch's launcher
PARENT_CHECK_S = 1.0
PATIENCE = b"\nstopping: what is being done is finished and saved; Ctrl-C once more ends it at once\n"


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGUSR1 in work that is not saved half-way: it ends as by Ctrl-C."""


class Stop:
    """Whether this process was asked to stop. There is one, `STOP`, as a process has one handler per signal."""

    def __init__(self):
        self.asked = False
        self._first, self._since = None, 0.0

    @contextmanager
    def noted(self, react: Callable[[int], None] | None = None) -> Iterator[Stop]:
        """Note requests in `asked`, for a loop that looks there between two steps; `react` is given every one.

        After a Ctrl-C another request means now (KeyboardInterrupt). The death of a launcher is a request, too:
        nobody would hear of this process any more.
        """

        def note(number, frame):
            now = time.monotonic()
            if self._first == signal.SIGINT and now - self._since > IMPATIENCE_S and react is None:
                raise KeyboardInterrupt("ended at once by a second Ctrl-C")
            if not self.asked:
                self.asked, self._first, self._since = True, number, now
                if number == signal.SIGINT and react is None:
                    os.write(2, PATIENCE)  # print() is not for signal handlers
            if react is not None:
                react(number)

        self.asked, self._first = False, None
        if LAUNCHED in os.environ or RANK in os.environ:
            launcher = int(os.environ.get(LAUNCHED, os.getppid()))
            threading.Thread(target=_outlive_no_launcher, args=(os.getppid(), launcher), daemon=True).start()
        with _handlers(note):
            yield self


STOP = Stop()


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 raise `Stopped`, as Ctrl-C raises KeyboardInterrupt, so that what is open is closed."""

    def stop(number, frame):
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(signal.Signals(number).name)

    with _handlers(stop):
        yield


def leave_stopping_to_the_parent(*_) -> None:
    """Ignore all requests: what a helper process does first, so that it works on until its parent ends it."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)


@contextmanager
def requests_held_back() -> Iterator[None]:
    """Let requests wait while helper processes are started, which would die of one before they can ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)  # what is started inherits it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handlers(handler: Callable) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in REQUESTS}
    try:
        yield
    finally:
        for number, reaction in before.items():
            signal.signal(number, reaction)


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine is there, a zombie among them."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _outlive_no_launcher(parent: int, launcher: int) -> None:
    while os.getppid() == parent and is_alive(launcher):
        time.sleep(PARENT_CHECK_S)
    os.kill(os.getpid(), signal.SIGTERM)
