"""The thread pool as Python meets it: callers at once, fork, signals, rest, exit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ktransformers import _native
from packed_layer import forward, random_layer, random_request, same_bits

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/task, Linux's")

# Without torch, which takes seconds to import: the extension alone, and numpy.
PREPARE = f"""
import os, signal, sys, time
import numpy as np
sys.path.insert(0, {str(Path(_native.__file__).parent)!r})
import _native
E, D, F = 3, 64, 64
random = np.random.default_rng(0)
weights = [random.integers(0, 127, (E, size * D * F), dtype=np.uint8) for size in (2, 1)]
scales = [np.full((E, 2, F), 1e-3, np.float32), np.full((E, D), 1e-3, np.float32)]

def make(threads):
    return _native.Experts(
        weights[0], scales[0], weights[1], scales[1],
        format='int8', hidden_size=D, moe_intermediate_size=F, threads=threads,
    )

x = random.standard_normal((9, D), dtype=np.float32)
index = random.integers(0, E, (9, 2))
top_k_weights = np.ones((9, 2), np.float32)

def forward(layer):
    out = np.empty_like(x)
    layer.forward(x, index, top_k_weights, out)
    return out.tobytes()
"""


def run(script: str) -> str:
    """Run a script in a process of its own and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_several_python_threads_may_call_at_once() -> None:
    layer = random_layer(8, 100, 50)
    requests = [random_request(layer, T, 3, seed=T) for T in (1, 5, 40, 300)]
    native = layer.native(threads=2)
    expected = [forward(native, request) for request in requests]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(20):
            if not same_bits(forward(native, requests[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_thread_does_not_touch_the_pool() -> None:
    assert run("forward(make(1)); print(_native.pool_threads())") == "0\n"


def test_pool_grows_to_what_was_asked_for() -> None:
    script = """
forward(make(3))
forward(make(2))
print(_native.pool_threads())
"""
    assert run(script) == "2\n"


@linux
def test_pool_at_rest_uses_no_processor_time() -> None:
    script = """
before = set(os.listdir("/proc/self/task"))
forward(make(4))
workers = set(os.listdir("/proc/self/task")) - before

def used_ns():
    return [int(open(f"/proc/self/task/{task}/schedstat").read().split()[0]) for task in workers]

# Workers that spin or poll use some in every interval; on a busy machine the first few may find
# workers that have had no processor to fall asleep on.
now = used_ns()
for interval in range(50):
    time.sleep(0.1)
    last, now = now, used_ns()
    if now == last:
        break
print(len(workers), now == last)
"""
    assert run(script) == "3 True\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_child_of_a_fork_computes_too() -> None:
    script = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
layer = make(3)
expected = forward(layer)
child = os.fork()
if child == 0:
    before = _native.pool_threads()
    os._exit(0 if before == 0 and forward(layer) == expected else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(forward(layer) == expected)
"""
    assert run(script) == "0\nTrue\n"


@linux
def test_workers_block_signals_but_those_of_faults() -> None:
    script = """
before = set(os.listdir("/proc/self/task"))
forward(make(3))
for task in set(os.listdir("/proc/self/task")) - before:
    blocked = ()
    for attempt in range(1000):  # until a worker's first instruction everything is blocked
        fields = dict(line.split(":", 1) for line in open(f"/proc/self/task/{task}/status"))
        mask = int(fields["SigBlk"], 16)
        blocked = [mask >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGILL)]
        if blocked == [1, 0]:
            break
        time.sleep(0.01)
    print(*blocked)
"""
    assert run(script) == "1 0\n1 0\n"


def test_signal_handler_runs_between_chunks() -> None:
    script = """
class Alarm(Exception): pass
def ring(*_): raise Alarm
signal.signal(signal.SIGALRM, ring)
T = 300_000
x = np.ones((T, D), np.float32)
index, top_k_weights = np.zeros((T, 1), np.int32), np.ones((T, 1), np.float32)
out = np.full((T, D), np.nan, np.float32)
layer = make(2)
signal.setitimer(signal.ITIMER_REAL, 0.02)
try:
    layer.forward(x, index, top_k_weights, out)
except Alarm:
    print(bool(np.isnan(out[-1]).all()))
"""
    assert run(script) == "True\n"


def test_exit_while_daemon_threads_compute_is_clean() -> None:
    script = """
import threading
def call(layer):
    while True:
        forward(layer)
for threads in (1, 2, 3):
    threading.Thread(target=call, args=(make(threads),), daemon=True).start()
time.sleep(0.05)
"""
    for _ in range(3):  # without parking, two of three runs abort
        assert run(script) == ""


def test_main_thread_computes_until_the_end() -> None:
    script = """
class Last:
    def __del__(self, layer=make(2), forward=forward):
        print(len(forward(layer)) == x.nbytes)
_last = Last()
"""
    assert run(script) == "True\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_child_of_a_fork_exits_while_its_parent_computes() -> None:
    script = """
import threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
layer = make(2)
stop = threading.Event()
def call():
    while not stop.is_set():
        forward(layer)
thread = threading.Thread(target=call)
thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        sys.exit()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
thread.join()
print("done")
"""
    assert run(script) == "done\n"


def test_bits_do_not_depend_on_flush_to_zero() -> None:
    layer = random_layer(3, 64, 32)
    request = random_request(layer, 5, 2)
    request.top_k_weights[:] = 2.0**-140
    expected = forward(layer.native(), request)
    assert expected.any()
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush denormals on this processor")
    try:
        for threads in (1, 2):
            assert same_bits(forward(layer.native(threads=threads), request), expected)
    finally:
        torch.set_flush_denormal(False)


# The CPUs that each worker is held to, and those of the process.
MASKS = """
def mask(task):
    fields = dict(line.split(":", 1) for line in open(f"/proc/self/task/{task}/status"))
    return fields["Cpus_allowed_list"].strip()

before = set(os.listdir("/proc/self/task"))
everywhere = mask(os.getpid())
cores = len(_native.topology().cores)

def worker_masks():
    return [mask(task) for task in sorted(set(os.listdir("/proc/self/task")) - before, key=int)]
"""


@linux
def test_as_many_threads_as_cores_have_a_core_each() -> None:
    if len(_native.topology().cores) < 2:
        pytest.skip("one core only")
    script = """
forward(make(cores))
held = worker_masks()
print(len(held) == len(set(held)) == cores - 1, everywhere not in held)
print(mask(os.getpid()) == everywhere)
"""
    assert run(MASKS + script) == "True True\nTrue\n"


@linux
def test_other_numbers_of_threads_are_not_held_to_cores() -> None:
    if len({node for node, _ in _native.topology().cores}) > 1:
        pytest.skip("they are held to nodes where there are several")
    script = """
for threads in (cores + 2, max(cores - 1, 1)):
    forward(make(threads))
print(set(worker_masks()) == {everywhere})
"""
    assert run(MASKS + script) == "True\n"


@linux
def test_workers_that_join_under_another_mask_are_not_held() -> None:
    if len(_native.topology().cores) < 3:
        pytest.skip("a pool of two threads does not grow to fewer than three cores")
    script = """
allowed = os.sched_getaffinity(0)
os.sched_setaffinity(0, {min(allowed)})
forward(make(2))
os.sched_setaffinity(0, allowed)
forward(make(cores))
print(set(worker_masks()[1:]) == {everywhere})
"""
    assert run(MASKS + script) == "True\n"


@linux
def test_mask_that_is_changed_later_stands() -> None:
    script = """
forward(make(max(cores, 2)))
workers = set(os.listdir("/proc/self/task")) - before
for task in workers:
    os.sched_setaffinity(int(task), os.sched_getaffinity(0))
forward(make(max(cores, 2)))
print(set(worker_masks()) == {everywhere})
"""
    assert run(MASKS + script) == "True\n"


def test_default_is_the_affinity_mask() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity masks")
    allowed = os.sched_getaffinity(0)
    assert 1 <= _native.default_threads() <= len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert _native.default_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)
