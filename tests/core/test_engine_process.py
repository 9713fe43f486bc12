"""The standalone handle and its process: imports, fork, exit, Ctrl-C, rest, no memory."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from other_engine import run, start

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self, Linux's")


def test_neither_torch_nor_transformers_is_loaded() -> None:
    script = """
handle = make(weight="int4", group_size=32, threads="auto")
request = draw()
handle.submit(*request)
handle.sync()
print(computed(handle, *request), "torch" in sys.modules, "transformers" in sys.modules)
"""
    assert run(script) == "True False False\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_handle_does_not_work_in_a_child_and_does_not_hang_there() -> None:
    script = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
handle, late = make(), make()
function = handle.host_function(*draw())
requests = [draw(T=2000) for _ in range(10)]
for request in requests:
    handle.submit(*request)
child = os.fork()
if child == 0:
    import ctypes
    for use in (lambda: handle.submit(*draw()), handle.sync, lambda: handle.host_function(*draw())):
        try:
            use()
        except RuntimeError as error:
            print(error, flush=True)
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    callback(function.submit)(function.arguments)
    callback(function.sync)(function.arguments)
    own, request = make(), draw()
    own.submit(*request)
    own.sync()
    print(computed(own, *request), computed(handle, *request), flush=True)
    del function, handle
    sys.exit()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
handle.sync()
print(all(computed(handle, *request) for request in requests))
"""
    sentence = "this handle was made before a fork and works in the parent only: load one here\n"
    assert run(script) == f"{sentence * 3}True False\n0\nTrue\n"


@pytest.mark.parametrize("end", ["", "sys.exit()", "del handle", "function = None"])
def test_exit_with_work_in_flight_is_clean(end: str) -> None:
    script = f"""
import threading
handle = make()
function = handle.host_function(*draw(T=5000))
for _ in range(50):
    handle.submit(*draw(T=5000))
waiting = threading.Event()
def sync():
    waiting.set()
    handle.sync()
threading.Thread(target=sync, daemon=True).start()
waiting.wait()
{end}
"""
    assert run(script) == ""


def test_handle_refuses_work_once_the_interpreter_exits() -> None:
    script = """
class Last:
    def __del__(self, handle=make(), request=draw()):
        handle.submit(*request)
        try:
            handle.sync()
        except RuntimeError as error:
            print(error)
_last = Last()
"""
    assert run(script) == "the interpreter exits: what was not computed by then was dropped\n"


def test_ctrl_c_ends_the_wait_and_not_the_work() -> None:
    script = """
import timeit
handle = make(D=512, F=512)
request, last = draw(D=512, T=1024), draw(D=512)
handle.layer.forward(*request)
seconds = min(timeit.repeat(lambda: handle.layer.forward(*request), number=1, repeat=3))
for _ in range(int(2 / seconds) + 2):  # two seconds of work
    handle.submit(*request)
handle.submit(*last)
try:
    print("in flight", flush=True)
    handle.sync()
except KeyboardInterrupt:
    print("stopped", bool(np.isnan(last[3]).all()))
handle.sync()
print(computed(handle, *request), computed(handle, *last))
"""
    with start(script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in flight\n"
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert (out, error) == ("stopped True\nTrue True\n", "")


@linux
def test_dispatcher_at_rest_uses_no_processor_time() -> None:
    script = """
import time
before = set(os.listdir("/proc/self/task"))
handle, request = make(), draw()
handle.submit(*request)
handle.sync()
threads = set(os.listdir("/proc/self/task")) - before

def used_ns():
    return [int(open(f"/proc/self/task/{task}/schedstat").read().split()[0]) for task in threads]

now = used_ns()
for interval in range(50):  # see test_threads.py
    time.sleep(0.1)
    last, now = now, used_ns()
    if now == last:
        break
print(len(threads), now == last)
"""
    assert run(script) == "2 True\n"  # the dispatcher, and a worker of the pool


# Memory up to so many more bytes than the process has now, and back to what it was.
LIMIT = """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_AS)

def limit(extra):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))

def lift():
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
"""


@linux
def test_intermediates_that_find_no_memory_are_an_error_and_nothing_is_lost() -> None:
    script = """
handle = make(F=4096, D=32)
small, large = draw(D=32, T=64), draw(D=32, T=1024, K=8)
handle.submit(*small)
handle.sync()
limit(32 << 20)  # of the 128 MiB that a large chunk takes in fp32 alone
for use in (handle.layer.forward, lambda *request: (handle.submit(*request), handle.sync())):
    try:
        use(*large)
    except MemoryError:
        print("no memory", computed(handle, *small))
lift()
handle.submit(*large)
handle.sync()
print(computed(handle, *large))
"""
    assert run(LIMIT + script) == "no memory True\nno memory True\nTrue\n"


@linux
def test_weights_that_find_no_memory_are_an_error() -> None:
    script = """
weights = [np.ones(shape, np.float32) for shape in [(8, 512, 1024)] * 2 + [(8, 1024, 512)]]
limit(2 << 20)
try:
    load_experts(*weights)
except MemoryError:
    print("no memory")
lift()
handle, request = make(), draw()
handle.submit(*request)
handle.sync()
print(computed(handle, *request))
"""
    assert run(LIMIT + script) == "no memory\nTrue\n"
