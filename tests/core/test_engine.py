"""The standalone handle, by a test that plays another engine: numpy and C, no transformers."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from ktransformers import _native, optimize_and_load
from ktransformers.engine import ExpertsHandle, load_experts
from other_engine import D, E, F, K, T, computed, draw, make, random
from packed_layer import same_bits
from tiny_models import random_model, v3_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"weight": "int8"}, {"weight": "int4"}, {"weight": "bf16"}])
def test_torch_tensors_give_the_bits_of_the_operator(options: Any, dtype: torch.dtype) -> None:
    model = random_model(v3_config(), dtype=dtype)
    experts = model.model.layers[1].mlp.experts
    gate, up = (half.contiguous() for half in experts.gate_up_proj.detach().chunk(2, dim=1))
    handle = load_experts(gate, up, experts.down_proj.detach(), threads=2, **options)
    rule = {
        "match": {"name": r"\.mlp\.experts$"},
        "replace": {"class": "ktransformers.operators.experts.CpuExperts", "kwargs": options},
    }
    optimize_and_load(model, [rule])
    x = torch.randn(7, handle.layer.hidden_size).to(dtype)
    index = torch.randint(0, handle.layer.num_experts, (7, 3))
    weights, out = torch.rand(7, 3), torch.full_like(x, torch.nan)
    handle.submit(x, index, weights, out)
    handle.sync()
    assert same_bits(out, model.model.layers[1].mlp.experts(x, index, weights))


def test_several_handles_take_several_submissions_before_one_sync() -> None:
    handles = [make(weight=weight) for weight in ("int8", "int4", "bf16")]
    submitted = [(handle, draw(T=1 + i)) for i in range(20) for handle in handles]
    for handle, request in submitted:
        handle.submit(*request)
    for handle in handles:
        handle.sync()
        handle.sync()  # nothing left: returns at once
    assert all(computed(handle, *request) for handle, request in submitted)


def test_submissions_of_a_handle_are_computed_in_order() -> None:
    handle = make()
    x, index, weights, _ = draw()
    chain, expected = [x.copy() for _ in range(6)], x.copy()
    for before, after in itertools.pairwise(chain):
        after[:] = np.nan
        handle.submit(before, index, weights, after)  # of what the one before has written
    handle.sync()
    for link in chain[1:]:
        handle.layer.forward(expected, index, weights, expected)
        assert link.tobytes() == expected.tobytes()


def test_python_threads_may_share_a_handle() -> None:
    handle = make()
    requests = [[draw(T=1 + i) for i in range(20)] for _ in range(4)]
    wrong: list[int] = []

    def call(caller: int) -> None:
        for i in range(20):
            handle.submit(*requests[caller][i])
            handle.sync()
            if not computed(handle, *requests[caller][i]):
                wrong.append(caller)

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class ForeignThread:
    """A thread of which Python knows nothing, in which C calls C."""

    libc = ctypes.PyDLL(None)  # calls hold the GIL: what waits for it in the thread would hang

    def __init__(self, function: int, arguments: int):
        self.id = ctypes.c_ulong()
        pointers = [ctypes.c_void_p(value) for value in (None, function, arguments)]
        assert self.libc.pthread_create(ctypes.byref(self.id), *pointers) == 0

    def join(self) -> None:
        assert self.libc.pthread_join(self.id, None) == 0


def test_host_callbacks_work_on_any_thread_while_another_holds_the_gil() -> None:
    handle = make()
    requests = [draw(T=i) for i in (1, 700, 0)]
    functions = [handle.host_function(*request) for request in requests]
    for _ in range(3):  # as a graph that is launched again and again
        for function, request in zip(functions, requests, strict=True):
            request[3][:] = np.nan
            ForeignThread(function.submit, function.arguments).join()
        ForeignThread(functions[0].sync, functions[0].arguments).join()
        assert all(computed(handle, *request) for request in requests)
    handle.sync()


def test_error_in_a_host_callback_is_raised_by_the_next_sync() -> None:
    handle = make()
    x, index, weights, out = draw()
    function = handle.host_function(x, index, weights, out)
    index[4, 1] = E + 1  # known only when the callback runs
    ForeignThread(function.submit, function.arguments).join()
    ForeignThread(function.sync, function.arguments).join()
    assert np.isnan(out).all()
    with pytest.raises(ValueError, match=r"^top_k_index: token 4, slot 1 names expert 9, expected"):
        handle.sync()
    index[4, 1] = E
    ForeignThread(function.submit, function.arguments).join()
    handle.sync()
    assert computed(handle, x, index, weights, out)


def test_word_in_memory_says_when_the_work_of_a_host_callback_has_ended() -> None:
    handle = make()
    request, slow = draw(), draw(T=3000)
    done = np.empty(1, np.int32)
    function = handle.host_function(*request, done)
    for index, ends_well in ((0, True), (E + 1, False), (0, True)):
        request[1][:] = index
        request[3][:] = np.nan
        done[:] = 7
        handle.submit(*slow)  # so that the other hardly has ended at once
        ForeignThread(function.submit, function.arguments).join()
        assert done[0] in (0, 1)
        while done[0] != 1:  # as a device would: nobody is asked
            os.sched_yield()
        assert np.isnan(request[3]).all() != ends_well
        if ends_well:
            assert computed(handle, *request)
            handle.sync()
        else:
            with pytest.raises(ValueError, match=r"^top_k_index: token 0, slot 0 names expert 9"):
                handle.sync()


def test_times_of_host_work_are_on_the_clock_of_python() -> None:
    handle, request = make(), draw()
    times = np.zeros(2, np.int64)
    function = handle.host_function(*request, None, times)
    for _ in range(2):
        before = time.monotonic_ns()
        ForeignThread(function.submit, function.arguments).join()
        handle.sync()
        assert before <= times[0] <= times[1] <= time.monotonic_ns()


@pytest.mark.parametrize(
    ("done", "error", "message"),
    [
        (np.zeros(2, np.int32), ValueError, "done: expected shape [1], got [2]"),
        (np.zeros(1, np.int64), TypeError, "done: expected int32, got int64"),
    ],
)
def test_word_in_memory_that_does_not_fit_is_refused(
    done: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        make().host_function(*draw(), done)
    assert str(caught.value) == message


def test_first_error_is_raised_once_and_the_other_submissions_are_computed() -> None:
    handle, other = make(), make()
    bad, worse, good = draw(), draw(), draw()
    bad[1][2, 0], worse[1][3, 1] = -1, 99
    for request in (bad, worse, good):
        handle.submit(*request)
    other.submit(*draw())
    other.sync()
    with pytest.raises(ValueError) as caught:
        handle.sync()
    assert str(caught.value) == (
        "top_k_index: token 2, slot 0 names expert -1, expected 0 to 7, or 8 to skip the slot"
    )
    handle.sync()
    assert computed(handle, *good)


@pytest.mark.parametrize(
    ("position", "tensor", "error", "message"),
    [
        (0, np.ones((T, D - 1), np.float32), ValueError, "hidden_states: expected shape [*, 96], "),
        (0, np.ones((T, D)), TypeError, "hidden_states: expected bfloat16 or float32, got another"),
        (1, np.ones((T, K), np.float32), TypeError, "top_k_index: expected int64 or int32, got "),
        (2, np.ones((T, K + 1), np.float32), ValueError, "top_k_weights: expected shape [9, 3], "),
        (3, np.ones((D, T), np.float32).T, ValueError, "out: expected a contiguous tensor"),
        (3, np.ones((T, D), np.int32), TypeError, "out: expected float32, got int32"),
        (3, "text", TypeError, "out: expected a tensor, got str"),
    ],
)
def test_tensor_that_does_not_fit_is_refused_by_submit(
    position: int, tensor: Any, error: type[Exception], message: str
) -> None:
    handle = make()
    request = [*draw()]
    request[position] = tensor
    for take in (handle.submit, handle.host_function):
        with pytest.raises(error) as caught:
            take(*request)
        assert str(caught.value).startswith(message)
    handle.sync()


def test_only_the_output_must_be_writable() -> None:
    handle = make()
    request = draw()
    for tensor in request:
        tensor.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out: expected a tensor that is not read-only$"):
        handle.submit(*request)
    request[3].flags.writeable = True
    handle.submit(*request)
    handle.sync()
    assert computed(handle, *request)


def test_tensors_live_until_the_sync_and_no_longer() -> None:
    handle = make()
    request = draw(T=2000)
    held = [weakref.ref(tensor) for tensor in request]
    handle.submit(*request)
    del request
    assert handle.layer.num_experts == E
    handle.sync()
    assert [reference() for reference in held] == [None] * 4


def test_weights_are_not_needed_after_loading_and_may_be_read_only() -> None:
    weights = [random.standard_normal(s, dtype=np.float32) for s in [(E, F, D)] * 2]
    weights.append(random.standard_normal((E, D, F), dtype=np.float32))
    request, outputs = draw(), []
    for writable in (True, False):
        for weight in weights:
            weight.flags.writeable = writable
        handle = load_experts(*weights, threads=2)
        if not writable:
            for weight in weights:
                weight.flags.writeable = True
                weight[:] = 0
        handle.submit(*request)
        handle.sync()
        outputs.append(request[3].tobytes())
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up_proj": np.ones((E, F, D + 1), np.float32)}, "up_proj: expected shape [8, 64, 96], "),
        ({"down_proj": np.ones((E, F, D), np.float32)}, "down_proj: expected shape [8, 96, 64], "),
        ({"gate_proj": np.ones((0, F, D), np.float32)}, "num_experts=0: expected 1 to 1048576"),
        ({"weight": "int3"}, "weight 'int3' is not supported (expected int8, int4, bf16)"),
        ({"group_size": 32}, "group_size 32 is for weight int4, not int8"),
        ({"threads": 0}, "threads 0 is not 'auto' or a number from 1 to 1024"),
    ],
)
def test_weights_and_options_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    weights = {"gate_proj": (E, F, D), "up_proj": (E, F, D), "down_proj": (E, D, F)}
    tensors = {name: np.ones(shape, np.float32) for name, shape in weights.items()}
    with pytest.raises(ValueError) as caught:
        load_experts(**{**tensors, **change})
    assert str(caught.value).startswith(message)


def test_handle_stands_on_a_layer_of_experts() -> None:
    handle = ExpertsHandle(make().layer)
    request = draw()
    handle.submit(*request)
    handle.sync()
    assert computed(handle, *request)
    other: Any = "a layer"
    with pytest.raises(TypeError, match=r"^layer: expected an Experts$"):
        ExpertsHandle(other)


@pytest.mark.parametrize("weight", ["int8", "int4", "bf16"])
def test_weight_that_is_not_finite_is_named(weight: Any) -> None:
    gate, up = (np.ones((E, F, D), np.float32) for _ in range(2))
    down = np.ones((E, D, F), np.float32)
    down[5, 90, 7] = np.inf
    up[5, 3, 2:4] = np.nan
    with pytest.raises(ValueError) as caught:
        load_experts(gate, up, down, weight=weight, threads=3)
    assert str(caught.value) == (
        "up_proj of expert 5 holds 2 values that are not finite, the first at [3, 2]"
    )


def test_handle_that_is_freed_drops_its_work() -> None:
    for _ in range(20):
        handle = make()
        for _ in range(5):
            handle.submit(*draw(T=500))
        del handle
    handle, request = make(), draw()
    handle.submit(*request)
    handle.sync()
    assert computed(handle, *request)  # the dispatcher is at work as before


def test_host_function_that_is_freed_drops_its_work_and_says_so() -> None:
    handle = make()
    function = handle.host_function(*draw())
    handle.submit(*draw(T=50_000))
    ForeignThread(function.submit, function.arguments).join()
    del function
    with pytest.raises(RuntimeError, match=r"^a host function was freed before the sync: its work"):
        handle.sync()
    handle.sync()


@pytest.mark.parametrize("mode", ["interleave", "shard", "replicate"])
@pytest.mark.parametrize("weight", ["int8", "int4-32", "bf16"])
def test_weights_on_several_nodes_give_the_same_bits(weight: str, mode: str) -> None:
    bound: list[list[int]] = []
    gate, up, down = (
        torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
        for shape in ((E, F, D), (E, F, D), (E, D, F))
    )
    here = _native.pack_experts(gate, up, down, weight, threads=2)
    there = _native.pack_experts(
        gate,
        up,
        down,
        weight,
        threads=2,
        numa=mode,
        nodes=[3, 1, 4],  # two panels of 32: a node stays without any
        bind=lambda address, nbytes, nodes: bound.append(nodes),
    )
    nodes = {tuple(nodes) for nodes in bound}
    assert nodes == ({(3, 1, 4)} if mode == "interleave" else {(3,), (1,), (4,)})
    for name in ("gate_up_packed", "gate_up_scale", "down_packed", "down_scale"):
        parts = there[name] if mode != "interleave" else [there[name]]
        whole = from_dlpack(here[name]).numel()
        copies = 3 if mode == "replicate" else 1
        assert sum(from_dlpack(part).numel() for part in parts) == copies * whole
    x, index, weights, out = draw()
    _native.Experts(**there, threads=2).forward(x, index, weights, out)
    assert computed(ExpertsHandle(_native.Experts(**here, threads=2)), x, index, weights, out)


def test_a_handle_takes_a_numa_mode() -> None:
    x, index, weights, out = draw()
    for numa in ("interleave", "shard", "replicate"):  # on one node, all the same
        handle = make(numa=numa)
        handle.submit(x, index, weights, out)
        handle.sync()
        assert computed(handle, x, index, weights, out)
    with pytest.raises(ValueError, match="expected interleave, shard or replicate"):
        make(numa="spread")


def test_a_missing_tensor_is_named() -> None:
    wide = np.zeros((2, 64, 64), np.float32)
    with pytest.raises(TypeError, match=r"^down_proj: expected a tensor, got NoneType"):
        load_experts(wide, wide, None)
