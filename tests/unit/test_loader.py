# SPDX-License-Identifier: Apache-2.0
"""A data worker's death, however it shows, is an error that says what to do."""

import signal

import pytest

from effsam3.data.loader import worker_failures_explained
from effsam3.errors import UserError


def test_a_worker_that_dies_while_it_hands_over_a_batch():
    """Its end of the connection closes first; torch hears of its death by a signal, a moment later."""

    def heard(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    before = signal.signal(signal.SIGALRM, heard)
    try:
        with pytest.raises(UserError, match="is killed by signal: Killed. A worker without memory .* data.workers=0"):
            with worker_failures_explained():
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                raise ConnectionResetError("Connection reset by peer")
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ConnectionResetError, match="of something else"):
        with worker_failures_explained():
            raise ConnectionResetError("of something else")
