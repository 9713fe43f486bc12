"""llama.cpp: its graph of a MoE layer, through the shared libraries of llama-cpp-python.

Per expert `mul_mat_id` with gate and up, `swiglu_split`, `mul_mat_id` with down, then products with
the experts' weights and their sum, as llama.cpp's own `build_moe_ffn` has it. Weights lie in an
ordinary buffer, or repacked where llama.cpp can do that ("repacking", on by default there).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from moe_layer import Sizes, Weights
from peer_layer import FOLDER, Call, CannotRun, PeerLayer, Variant

# What quantising the weights costs, and activations to its Q8_0 or Q8_K.
MAX_ERROR = {"int8": 0.05, "int4": 0.2, "bf16": 0.02}

F32, I32 = 0, 26  # of ggml's types
TYPES = {"Q4_0": 2, "Q5_0": 6, "Q8_0": 8, "Q4_K": 12, "BF16": 30}
REPACKED = ("Q4_0", "Q4_K")
K_BLOCK = (
    256  # inputs that share a block of Q4_K; llama.cpp falls back to Q5_0 where there are fewer
)
GRAPH_TENSORS = 64


def variants(weight_format: str, threads: int) -> list[Variant]:
    """List the counterpart, as it is and repacked."""
    kind = weight_format.partition("-")[0]
    name = {"int8": "Q8_0", "int4": "Q4_K", "bf16": "BF16"}[kind]
    repack = (False, True) if name in REPACKED else (False,)
    return [Variant(name, threads, choice) for choice in repack]


def make_layer(sizes: Sizes, experts: list[Weights], variant: Variant) -> PeerLayer:
    """Quantise a few experts and copy them to all. Raises CannotRun."""
    ggml = load_library()
    D, F = sizes.hidden_size, sizes.moe_intermediate_size
    gate = _experts_tensor(ggml, [w.gate for w in experts], sizes.num_experts, variant, D)
    up = _experts_tensor(ggml, [w.up for w in experts], sizes.num_experts, variant, D)
    down = _experts_tensor(ggml, [w.down for w in experts], sizes.num_experts, variant, F)
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, variant.threads)
    return LlamaExperts(ggml, backend, gate, up, down)


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Library:
    """ggml's functions, wherever they are: what they return has been declared."""

    def __init__(self, libraries: list[ctypes.CDLL]):
        self._libraries = libraries

    def __getattr__(self, name: str) -> Any:
        for library in self._libraries:
            try:
                function = library[name]
            except AttributeError:
                continue
            # Every function used here takes pointers, integers and a struct, as ctypes passes them.
            function.restype = ctypes.c_size_t if name in SIZES else ctypes.c_void_p
            function.argtypes = ARGUMENTS.get(name, [])
            return function
        raise CannotRun(f"this llama.cpp has no {name}")


_P, _I, _L, _S = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
# What returns a number, and not a pointer.
SIZES = (
    "ggml_row_size",
    "ggml_quantize_chunk",
    "ggml_tensor_overhead",
    "ggml_graph_overhead",
    "ggml_backend_graph_compute",
    "ggml_gallocr_alloc_graph",
)
ARGUMENTS: dict[str, list[Any]] = {
    "ggml_init": [InitParams],
    "ggml_row_size": [_I, _L],
    "ggml_quantize_chunk": [_I, _P, _P, _L, _L, _L, _P],
    "ggml_new_tensor_2d": [_P, _I, _L, _L],
    "ggml_new_tensor_3d": [_P, _I, _L, _L, _L],
    "ggml_mul_mat_id": [_P, _P, _P, _P],
    "ggml_swiglu_split": [_P, _P, _P],
    "ggml_mul": [_P, _P, _P],
    "ggml_add": [_P, _P, _P],
    "ggml_view_2d": [_P, _P, _L, _L, _S, _S],
    "ggml_new_graph": [_P],
    "ggml_build_forward_expand": [_P, _P],
    "ggml_get_data": [_P],
    "ggml_gallocr_new": [_P],
    "ggml_gallocr_alloc_graph": [_P, _P],
    "ggml_backend_cpu_set_n_threads": [_P, _I],
    "ggml_backend_graph_compute": [_P, _P],
    "ggml_backend_alloc_ctx_tensors_from_buft": [_P, _P],
    "ggml_backend_tensor_set": [_P, _P, _S, _S],
    "ggml_backend_reg_dev_get": [_P, _S],
    "ggml_backend_reg_get_proc_address": [_P, ctypes.c_char_p],
}


def load_library() -> Library:
    """Load ggml in the order in which its libraries need one another. Raises CannotRun."""
    folder = FOLDER / "llama_cpp" / "lib"
    try:
        loaded = [
            ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu", "ggml")
        ]
    except OSError as error:
        raise CannotRun(f"llama.cpp's libraries: {error}") from None
    return Library(loaded)


def _context(ggml: Library, tensors: int, graphs: int = 0) -> int:
    size = tensors * ggml.ggml_tensor_overhead() + graphs * ggml.ggml_graph_overhead()
    context: int = ggml.ggml_init(InitParams(size, None, True))
    return context


def _buffer_type(ggml: Library, *, repack: bool) -> int:
    ordinary: int = ggml.ggml_backend_cpu_buffer_type()
    if not repack:
        return ordinary
    registry = ggml.ggml_backend_cpu_reg()
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        raise CannotRun("this llama.cpp can't repack")
    get = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)
    extra = get(ggml.ggml_backend_reg_dev_get(registry, 0))
    name_of = ggml.ggml_backend_buft_name
    name_of.argtypes, name_of.restype = [_P], ctypes.c_char_p
    number = 0
    while extra[number]:
        if name_of(extra[number]) == b"CPU_REPACK":
            return int(extra[number])
        number += 1
    raise CannotRun("this llama.cpp can't repack")


def _experts_tensor(
    ggml: Library, weights: list[torch.Tensor], experts: int, variant: Variant, k: int
) -> int:
    """Make a weight `[k, n, experts]` (ggml counts from the innermost) of a few matrices."""
    name = "Q5_0" if variant.format == "Q4_K" and k % K_BLOCK else variant.format
    number, n = TYPES[name], weights[0].shape[0]
    row_bytes = ggml.ggml_row_size(number, k)
    whole = torch.empty(experts, n * row_bytes, dtype=torch.uint8)
    for e, weight in enumerate(weights):
        source = weight.float().contiguous()
        ggml.ggml_quantize_chunk(number, source.data_ptr(), whole[e].data_ptr(), 0, n, k, None)
    for e in range(len(weights), experts):
        whole[e] = whole[e % len(weights)]
    context = _context(ggml, 1)
    tensor: int = ggml.ggml_new_tensor_3d(context, number, k, n, experts)
    buffer_type = _buffer_type(ggml, repack=variant.repack and name in REPACKED)
    if not ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type):
        raise CannotRun(f"llama.cpp has no memory for {whole.nbytes / 1e9:.1f} GB")
    ggml.ggml_backend_tensor_set(tensor, whole.data_ptr(), 0, whole.nbytes)
    return tensor


@dataclass(frozen=True, slots=True)
class LlamaExperts:
    """ggml's tensors of all experts, and what computes with them: pointers, never freed."""

    ggml: Library
    backend: int
    gate: int
    up: int
    down: int

    def prepare(self, x: torch.Tensor, weights: torch.Tensor) -> Call:
        """Build the graph for these tokens."""
        ggml, (T, D), K = self.ggml, x.shape, weights.shape[1]
        inputs = _context(ggml, 3)
        x_in = ggml.ggml_new_tensor_3d(inputs, F32, D, 1, T)
        index_in = ggml.ggml_new_tensor_2d(inputs, I32, K, T)
        weights_in = ggml.ggml_new_tensor_3d(inputs, F32, 1, K, T)
        ordinary = _buffer_type(ggml, repack=False)
        ggml.ggml_backend_alloc_ctx_tensors_from_buft(inputs, ordinary)
        _set(ggml, x_in, x.float())
        _set(ggml, weights_in, weights)

        context = _context(ggml, GRAPH_TENSORS, graphs=1)
        out = self._build(context, (x_in, index_in, weights_in), (T, D, K))
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, out)
        if not ggml.ggml_gallocr_alloc_graph(ggml.ggml_gallocr_new(ordinary), graph):
            raise CannotRun("llama.cpp has no memory for the graph")
        data = (ctypes.c_float * (T * D)).from_address(ggml.ggml_get_data(out))
        result = torch.frombuffer(data, dtype=torch.float32).view(T, D)

        def call(index: torch.Tensor) -> torch.Tensor:
            _set(ggml, index_in, index.to(torch.int32))
            status = ggml.ggml_backend_graph_compute(self.backend, graph)
            if status & 0xFFFFFFFF:  # GGML_STATUS_SUCCESS is 0, an int
                raise CannotRun(f"llama.cpp's graph ended with status {status}")
            return result

        return call

    def _build(
        self, context: int, inputs: tuple[int, int, int], sizes: tuple[int, int, int]
    ) -> int:
        """Return the layer's output, `[D, T]` in ggml's order."""
        ggml, (x, index, weights), (T, D, K) = self.ggml, inputs, sizes
        up = ggml.ggml_mul_mat_id(context, self.up, x, index)
        gate = ggml.ggml_mul_mat_id(context, self.gate, x, index)
        hidden = ggml.ggml_swiglu_split(context, gate, up)
        experts = ggml.ggml_mul_mat_id(context, self.down, hidden, index)
        experts = ggml.ggml_mul(context, experts, weights)
        item = ctypes.sizeof(ctypes.c_float) * D
        parts = [
            ggml.ggml_view_2d(context, experts, D, T, item * K, item * slot) for slot in range(K)
        ]
        total: int = parts[0]
        for part in parts[1:]:
            total = ggml.ggml_add(context, total, part)
        return total


def _set(ggml: Library, tensor: int, values: torch.Tensor) -> None:
    values = values.contiguous()
    ggml.ggml_backend_tensor_set(tensor, values.data_ptr(), 0, values.nbytes)
