# SPDX-License-Identifier: Apache-2.0
"""Who hears a request to stop and who obeys it, with real signals to real processes; whole runs are in tests/e2e."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from effsam3.stopping import LAUNCHED, RANK, STOP, Stopped, stopped_at_once

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start():
    """Start Python code in a process group of its own; it is up when it has printed a line."""
    started = []

    def run(code, **environment):
        own = {name: value for name, value in os.environ.items() if name not in (LAUNCHED, RANK)}
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=own | environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def hour(monkeypatch):
    """A clock that the test moves by hand: `hour[0]` in seconds."""
    now = [0.0]
    monkeypatch.setattr("effsam3.stopping.time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_is_noted_however_often_it_is_sent_at_once(number, hour):
    before = signal.getsignal(number)
    with STOP.noted() as stop:
        assert not stop.asked
        for _ in range(3):  # `timeout` signals its child, then its group
            signal.raise_signal(number)
        assert stop.asked
    assert signal.getsignal(number) is before
    with STOP.noted() as stop:
        assert not stop.asked


@pytest.mark.parametrize(
    ("first", "then", "now"),
    [
        (signal.SIGINT, signal.SIGINT, True),
        (signal.SIGINT, signal.SIGTERM, True),  # what torch's launcher makes of a second Ctrl-C
        (signal.SIGTERM, signal.SIGTERM, False),  # a batch system's reminder
        (signal.SIGUSR1, signal.SIGTERM, False),  # Slurm: the time is nearly up, then it is up
    ],
)
def test_only_a_person_is_impatient(first, then, now, hour):
    with STOP.noted():
        signal.raise_signal(first)
        hour[0] = 5.0
        if now:
            with pytest.raises(KeyboardInterrupt, match="second Ctrl-C"):
                signal.raise_signal(then)
        else:
            signal.raise_signal(then)


def test_work_that_is_not_saved_half_way_ends_at_once():
    for number, kind in ((signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)):
        with pytest.raises(KeyboardInterrupt) as caught, stopped_at_once():
            signal.raise_signal(number)
        assert caught.type is kind


WATCH = """
import time
from effsam3.stopping import STOP
with STOP.noted():
    print("up", flush=True)
    while not STOP.asked: time.sleep(0.01)
    print("asked", flush=True)
"""


@pytest.mark.parametrize("variable", [LAUNCHED, RANK])
def test_the_death_of_its_launcher_is_a_request(start, variable):
    """Killed by SIGKILL the launcher cannot pass on anything: its rank must not train on unheard."""
    value = "str(os.getpid())" if variable == LAUNCHED else "'run'"
    launcher = start(
        "import os, subprocess, sys\n"
        f"os.environ[{variable!r}] = {value}\n"
        f"subprocess.run([sys.executable, '-c', {WATCH!r}])"
    )
    assert launcher.stdout.readline() == "up\n"
    launcher.kill()
    assert launcher.stdout.readline() == "asked\n"


def test_a_process_of_its_own_outlives_its_shell(start):
    shell = start(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {WATCH!r}])")
    assert shell.stdout.readline() == "up\n"
    (child,) = psutil.Process(shell.pid).children()
    shell.kill()
    time.sleep(2)
    assert child.is_running()
    child.terminate()
    assert shell.stdout.readline() == "asked\n"


BORN = """
import os, signal, sys
from effsam3.data.loader import loader
from effsam3.stopping import REQUESTS, STOP

class Samples:
    def __len__(self): return 4
    def __getitems__(self, positions): return {"positions": positions}

def record():
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    os.write(1, b"born safe\\n" if set(REQUESTS) <= blocked else b"born exposed\\n")

os.register_at_fork(after_in_child=record)
with STOP.noted():
    for batch in loader(Samples(), [[0], [1], [2], [3]], 2, pin=False): pass
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
"""


def test_data_workers_are_born_where_no_request_reaches_them(start):
    """A worker is signalled with its group before it can ignore that; this process's other threads may hear it."""
    printed, _ = start(BORN).communicate(timeout=60)
    assert printed == "born safe\n" * 2


SLOW = """
import time
from effsam3.stopping import STOP
with STOP.noted():
    print("up", flush=True)
    time.sleep(1000)  # a step that takes long
"""


@pytest.mark.parametrize("launched", [False, True])
def test_a_second_ctrl_c_means_now(start, tmp_path, launched):
    """Of a terminal's group; torch's launcher has its ranks in other groups, and makes SIGTERM of the second."""
    (tmp_path / "slow.py").write_text(SLOW)
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2".split() if launched else []
    line = [sys.executable, *launcher, str(tmp_path / "slow.py")]
    process = start(f"import os\nos.execv({sys.executable!r}, {line})")
    printed = ""
    while printed.count("up") < 1 + launched:  # two ranks may write "upup" and two ends of lines
        said = process.stdout.readline()
        assert said, printed
        printed += said
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None and all(member.is_running() for member in family)
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=30)[0]
    assert "ended at once by a second Ctrl-C" in printed
    assert psutil.wait_procs(family, timeout=10)[1] == []


# ---- data workers


LOADING = """
import sys, time
from effsam3.data.loader import loader, worker_failures_explained
from effsam3.stopping import STOP

class Samples:
    def __len__(self): return 10_000
    def __getitems__(self, positions):
        time.sleep(STUCK if positions[0] == 40 else 0.01)
        return {"positions": positions}

with STOP.noted(), worker_failures_explained():
    iterator = iter(loader(Samples(), [[n] for n in range(10_000)], 2, pin=False))
    for n in range(10_000):
        next(iterator)
        if n == 3: print("up", flush=True)
        if STOP.asked and n > 20: sys.exit(75)  # `iterator` is alive: its workers are there at exit
"""


@pytest.mark.parametrize(("number", "stuck"), [(signal.SIGTERM, 1000), (signal.SIGUSR1, 0), (signal.SIGINT, 0)])
def test_workers_load_on_when_all_are_signalled_and_end_with_their_parent(start, number, stuck):
    """Also one that is stuck: it ignores SIGTERM, with which multiprocessing would end it and then wait for it."""
    process = start(f"STUCK = {stuck}\n{LOADING}")
    assert process.stdout.readline() == "up\n"
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert psutil.wait_procs(workers, timeout=20)[1] == []


def test_workers_end_when_their_parent_is_killed(start):
    process = start(f"STUCK = 0\n{LOADING}")
    assert process.stdout.readline() == "up\n"
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert psutil.wait_procs(workers, timeout=30)[1] == []


# ---- pools


POOL = """
import sys, time
from pathlib import Path
from effsam3.data.workers import worker_pool

def work(file):
    Path(file).touch()
    time.sleep(1000)

if __name__ == "__main__":
    with worker_pool(2) as submit:
        futures = [submit(work, sys.argv[1] + str(n)) for n in range(2)]
        while not all(Path(sys.argv[1] + str(n)).exists() for n in range(2)): time.sleep(0.01)
        print("up", flush=True)
        futures[0].result()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_pool_ends_with_its_parent_and_without_a_word_of_memory(tmp_path, number):
    (tmp_path / "pool.py").write_text(POOL)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "pool.py", tmp_path / "at-"], env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=60)
    assert "memory" not in printed
    assert ("Stopped: SIGTERM" in printed) == (number == signal.SIGTERM)
    assert psutil.wait_procs(workers, timeout=20)[1] == []
