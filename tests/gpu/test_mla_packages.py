"""Latent attention by FlashInfer and FlashMLA: on a GPU that has them, or by their stand-ins.

Sizes are those that the packages are made for.
"""

from __future__ import annotations

import copy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ktransformers import optimize_and_load
from ktransformers.cache import Format, LatentCache, LatentPages
from ktransformers.cache_file import load_cache, save_cache
from ktransformers.cache_pages import PAGE_TOKENS as PAGE
from ktransformers.operators.kernels import mla_flashmla
from ktransformers.operators.kernels.mla_append import mla_append, mla_append_reference
from ktransformers.operators.kernels.mla_flashinfer import FlashInferMla
from ktransformers.operators.kernels.mla_flashmla import FlashMla
from ktransformers.operators.kernels.mla_kernel import MlaKernel
from ktransformers.operators.kernels.mla_prefill import mla_prefill, mla_prefill_reference
from ktransformers.rules import RuleError
from ktransformers.streams import CpuStream
from latent_pages import random_pages, random_queries, tolerance
from mla_packages import BatchMLAPagedAttentionWrapper, install, stand_in
from tiny_models import random_model, v2_config, v3_config

C, R = 512, 64
SIZES = {"kv_lora_rank": C, "qk_rope_head_dim": R, "num_hidden_layers": 2}
SIZES |= {"first_k_dense_replace": 2}
KINDS: dict[str, type[MlaKernel]] = {"flashinfer": FlashInferMla, "flash_mla": FlashMla}
PACKAGES = ("flashinfer", "flash_mla", "real flashinfer", "real flash_mla")
IDS = torch.randint(3, 96, (2, PAGE + 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have a package, or its stand-in; return its name."""
    name: str = request.param.removeprefix("real ")
    if name == request.param:
        stand_in(monkeypatch, name)
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    elif find_spec(name) is None:
        pytest.skip(f"needs {name}")
    elif name == "flash_mla" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a CUDA GPU of compute capability 9.0")
    return name.removesuffix(" of 2025")


def in_rows(pages: LatentPages) -> LatentPages:
    """Lay pages out with latents and rope parts side by side."""
    rows = torch.cat((pages.latent, pages.rope), dim=-1)
    latent, rope = rows.split((C, R), dim=-1)
    return LatentPages(latent, None, rope, pages.block_table, pages.lengths, rows)


def rules(kernel: str, device: object, **kwargs: Any) -> list[dict[str, Any]]:
    operator = "ktransformers.operators.gpu_attention.GpuMlaAttention"
    kwargs = {"device": str(device), "kernel": kernel, **kwargs}
    return [{"match": {"name": r"\.self_attn$"}, "replace": {"class": operator, "kwargs": kwargs}}]


@cache
def optimised(kernel: str, device: torch.device, version: str = "v3") -> PreTrainedModel:
    """Load a model, once for all tests: what stands in is looked up by every call."""
    config = {"v2": v2_config, "v3": v3_config}[version](**SIZES)
    model = random_model(config, dtype=torch.bfloat16)
    return optimize_and_load(model, rules(kernel, device))


@cache
def logits_of(version: str, dtype: torch.dtype) -> torch.Tensor:
    """Return what transformers computes in a dtype with the same weights."""
    config = {"v2": v2_config, "v3": v3_config}[version](**SIZES)
    model = random_model(config, dtype=torch.bfloat16)
    nn.Module.to(model, dtype)  # transformers' own is wrapped in a wrong type
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits.float()
    return logits


@pytest.mark.parametrize("package", [*PACKAGES, "flash_mla of 2025"], indirect=True)
@pytest.mark.parametrize(
    ("T", "H", "lengths"),
    [
        (1, 16, (1, PAGE, PAGE + 1, 3 * PAGE - 1)),
        (1, 128, (PAGE + 7,)),
        (5, 16, (5, PAGE - 1, 2 * PAGE + 3)),
        (PAGE + 2, 2, (PAGE + 2, 2 * PAGE)),
    ],
)
def test_packages_compute_what_the_reference_does(
    T: int, H: int, lengths: tuple[int, ...], package: str, device: torch.device
) -> None:
    pages = random_pages(lengths, C, R, "bf16", device)
    q_latent, q_rope = random_queries((len(lengths), T, H, C), R, torch.bfloat16, device)
    kernel, scaling = KINDS[package](), 0.3 * (C + R) ** -0.5
    read = in_rows(pages) if kernel.in_rows else pages
    got = kernel.attend(q_latent, q_rope, read, scaling=scaling, valid=None)
    want = mla_prefill_reference(q_latent, q_rope, pages, scaling=scaling)
    assert got.shape == q_latent.shape
    assert (got.float() - want).abs().max() <= tolerance(q_latent, q_rope, pages, scaling)


def test_long_chunks_are_cut_where_the_package_would_need_much_memory(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    stand_in(monkeypatch, "flash_mla")
    pages = in_rows(random_pages((PAGE + 5, 9), C, R, "bf16", device))
    queries = random_queries((2, 7, 2, C), R, torch.bfloat16, device)
    whole = FlashMla().attend(*queries, pages, scaling=0.02, valid=None)
    monkeypatch.setattr(mla_flashmla, "ROWS", 6)  # three tokens of two heads
    assert torch.equal(FlashMla().attend(*queries, pages, scaling=0.02, valid=None), whole)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(
    version: str, package: str, device: torch.device
) -> None:
    model: Any = optimised(KINDS[package].name, device, version)
    want = logits_of(version, torch.float32)
    named = {"flashinfer": "FlashInfer fa", "flash_mla": "FlashMLA "}[package]
    assert model.ktransformers_report.kernels[0].startswith(named)
    obstacle = model.model.layers[0].self_attn.graph_obstacle()
    assert (obstacle is None) == (package == "flash_mla")
    caches: list[Cache] = [LatentCache.for_model(model, 2 * PAGE)]
    if version == "v3":
        caches.append(DynamicCache(config=model.config))
    for filled in caches:
        with torch.no_grad():
            pieces = [
                model(IDS[:, begin:end], past_key_values=filled).logits
                for begin, end in ((0, 5), (5, PAGE + 8), (PAGE + 8, PAGE + 9))
            ]
        got, other = torch.cat(pieces, dim=1).float(), logits_of(version, torch.bfloat16)
        # Rounded as often as in transformers' own attention, in other places.
        assert (got - want).abs().max() <= 2 * (other - want).abs().max()


def test_flashinfer_plans_once_for_all_layers_of_a_step(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    stand_in(monkeypatch, "flashinfer")
    model = optimised("flashinfer", device)
    made, filled = BatchMLAPagedAttentionWrapper.plans.made, LatentCache.for_model(model, 2 * PAGE)
    made.clear()  # what the probe of the load needed
    with torch.no_grad():
        model(IDS[:, :-2], past_key_values=filled)
        assert len(made) == 1
        model(IDS[:, -2:-1], past_key_values=filled)
        model(IDS[:, -1:], past_key_values=filled)
        assert [plan["kv_len_arr"].tolist() for plan in made] == [
            [length] * 2 for length in (PAGE + 7, PAGE + 8, PAGE + 9)
        ]
        filled.crop(-1)
        filled.reorder_cache(torch.tensor([1, 1]))  # the same length over other pages
        model(IDS[:, -1:], past_key_values=filled)
        assert len(made) == 4
        assert not torch.equal(made[2]["kv_indices"], made[3]["kv_indices"])


def test_padding_is_refused_before_anything_is_cached(package: str, device: torch.device) -> None:
    model = optimised(KINDS[package].name, device)
    filled, mask = LatentCache.for_model(model, PAGE), torch.ones(2, 5, dtype=torch.long)
    with torch.no_grad():
        model(IDS[:, :5], attention_mask=mask, past_key_values=filled)  # there is none
        filled.reset()
        mask[1, :2] = 0
        with pytest.raises(
            RuntimeError, match=r"at model\.layers\.0\.self_attn: kernel flash.* ta"
        ):
            model(IDS[:, :5], attention_mask=mask, past_key_values=filled)
    assert filled.get_seq_length() == 0


def test_a_cache_in_another_format_is_refused(package: str, device: torch.device) -> None:
    model = optimised(KINDS[package].name, device)
    formats: tuple[Format, ...] = ("fp32", "fp8")
    for each in formats:
        filled = LatentCache(model.config, PAGE, each)
        with torch.no_grad(), pytest.raises(ValueError, match=r"in torch\.bfloat16|in rows"):
            model(IDS[:, :5], past_key_values=filled)


@pytest.mark.parametrize(
    ("kernel", "changes", "kwargs", "reason"),
    [
        (
            "flashinfer",
            {"dtype": torch.float32},
            {},
            "flashinfer takes bfloat16, not torch.float32",
        ),
        ("flashmla", {"dtype": torch.float32}, {}, "flashmla takes bfloat16, not torch.float32"),
        ("flashinfer", {"kv_lora_rank": 96}, {}, "multiple of 64, not 96 and 64: take triton"),
        ("flashmla", {"qk_rope_head_dim": 32}, {}, "rope parts of 64 values, not 512 and 32"),
        ("flashinfer", {"num_attention_heads": 3}, {}, "heads that divides 128, not 3"),
        ("flashmla", {}, {"cache_format": "fp8"}, "a cache in bf16, not in fp8 with a scale"),
        ("flashinfer", {}, {"cache_format": "fp8"}, "a cache in bf16, not in fp8 with a scale"),
        ("flashinfer", {}, {}, "kernel flashinfer is not installed: pip install flashinfer-python"),
        ("flashmla", {}, {}, "kernel flashmla is not installed: pip install git+https://"),
    ],
)
def test_what_a_package_cannot_do_is_said_before_anything_is_loaded(
    kernel: str, changes: dict[str, Any], kwargs: Any, reason: str, device: torch.device
) -> None:
    if "not installed" in reason and find_spec({"flashmla": "flash_mla"}.get(kernel, kernel)):
        pytest.skip(f"needs a machine without {kernel}")
    heads = changes.get("num_attention_heads", 2)
    config = v3_config(
        **{"dtype": torch.bfloat16, **SIZES, **changes, "num_key_value_heads": heads}
    )
    with pytest.raises(RuleError) as caught:
        optimize_and_load(config, rules(kernel, device, **kwargs), checkpoint="/nowhere")
    assert reason in str(caught.value)


def test_an_old_or_broken_package_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    install(monkeypatch, "flashinfer", "0.6.18")
    with pytest.raises(ValueError, match=r"flashinfer needs 0\.7 or later, not 0\.6\.18: pip"):
        FlashInferMla().check_machine(device)

    def broken(name: str) -> None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr("ktransformers.operators.kernels.mla_kernel.import_module", broken)
    with pytest.raises(ValueError, match="kernel flashmla does not load: libcudart"):
        FlashMla().check_machine(torch.device("cpu"))


def test_flashmla_is_refused_where_the_gpu_is_no_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flash_mla")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "B200")
    with pytest.raises(ValueError, match=r"of compute capability 9\.0 .* cuda:0 is a B200 with 10"):
        FlashMla().check_machine(torch.device("cuda:0"))


def test_flashinfer_chooses_its_implementation_by_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flashinfer")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for capability, variant in (((9, 0), "fa3"), ((8, 9), "fa2"), ((10, 0), "fa2")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        named = FlashInferMla().named(torch.device("cuda:0"))
        assert named.startswith(f"FlashInfer {variant} 0.7.2.post1 beside Triton 3.")
        assert named.endswith(" on cuda:0, a GPU")


def test_flashmla_is_recorded_and_replayed_for_other_lengths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(monkeypatch, "flash_mla")
    pages = in_rows(random_pages((2 * PAGE, 2 * PAGE), C, R, "bf16", torch.device("cpu")))
    queries = random_queries((2, 1, 2, C), R, torch.bfloat16, torch.device("cpu"))
    pages.lengths.fill_(3)
    with CpuStream().capture() as graph:
        out = FlashMla().attend(*queries, pages, scaling=0.02, valid=None)
    for length in (4, PAGE, 2 * PAGE):
        pages.lengths.fill_(length)
        graph.replay()
        want = FlashMla().attend(*queries, pages, scaling=0.02, valid=None)
        assert torch.equal(out, want)


def test_flashinfer_refuses_to_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flashinfer")
    pages = random_pages((PAGE,), C, R, "bf16", torch.device("cpu"))
    queries = random_queries((1, 1, 2, C), R, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="plans each step on the host"), CpuStream().capture():
        FlashInferMla().attend(*queries, pages, scaling=0.02, valid=None)


def test_rows_survive_what_is_done_to_a_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: torch.device
) -> None:
    stand_in(monkeypatch, "flash_mla")
    model = optimised("flashmla", device)
    filled = LatentCache.for_model(model, 2 * PAGE)
    with torch.no_grad():
        model(IDS, past_key_values=filled)
        save_cache(filled, tmp_path / "cache", model)
        restored = load_cache(tmp_path / "cache", model, 2 * PAGE)  # apart, until it is used
        assert restored.layers[0].rows is None
        twin = copy.deepcopy(filled)
        assert twin.layers[1].rows is not None
        twin.layers[1].rows.view(torch.int16)[:] += 0  # its own memory
        outputs = []
        for each in (filled, twin, restored):
            assert [layer.nbytes for layer in each.layers[0].tensors().values()]
            each.batch_repeat_interleave(2)
            each.reorder_cache(torch.tensor([3, 0, 0, 1]))
            outputs.append(model(IDS[:1, :1].expand(4, 1), past_key_values=each).logits)
            rows = each.layers[1].rows
            assert rows is not None
            assert rows.data_ptr() == each.layers[1].latent.data_ptr()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert filled.layers[1].latent.data_ptr() != twin.layers[1].latent.data_ptr()


def test_a_layer_is_laid_out_for_whoever_comes(device: torch.device) -> None:
    filled = LatentCache(v3_config(**SIZES, dtype=torch.bfloat16), 2 * PAGE)
    generator = torch.Generator().manual_seed(0)

    def new(T: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = (torch.randn(2, T, width, generator=generator) for width in (C, R))
        latent, rope = (part.bfloat16().to(device) for part in parts)
        return latent, rope

    told = []
    for T, wanted in ((PAGE - 1, False), (2, True), (3, True), (1, False)):
        told.append(new(T))
        pages = filled.make_room(0, 2, T, C, R, device, in_rows=wanted)
        assert (pages.rows is not None) == wanted
        assert pages.latent.is_contiguous() != wanted
        mla_append(*told[-1], pages)
        filled.wrote(0, T)
    latent, rope = filled.layers[0].gather(torch.bfloat16)
    assert torch.equal(latent[:, 0], torch.cat([part for part, _ in told], dim=1))
    assert torch.equal(rope[:, 0], torch.cat([part for _, part in told], dim=1))


def test_tokens_are_written_into_rows_as_the_reference_does(device: torch.device) -> None:
    written = [in_rows(random_pages((PAGE + 2, 7), C, R, "bf16", device)) for _ in range(2)]
    latent, rope = (torch.randn(2, 3, width, device=device).bfloat16() for width in (C, R))
    mla_append(latent, rope, written[0])
    mla_append_reference(latent, rope, written[1])
    got, want = (pages.rows for pages in written)
    assert got is not None
    assert want is not None
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))


def test_triton_refuses_rows_that_it_would_misread(device: torch.device) -> None:
    pages = in_rows(random_pages((PAGE,), C, R, "bf16", device))
    queries = random_queries((1, 2, 2, C), R, torch.bfloat16, device)
    with pytest.raises(ValueError, match="lie in rows of both, expected them apart"):
        mla_prefill(*queries, pages, scaling=0.02)
