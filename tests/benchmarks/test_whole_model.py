"""A whole model in other engines: files, figures and counts; nothing here is measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch

import end_to_end
import model_limits
import model_memory
import model_worker
import peer_layer
import peer_llama_model
import target_rows
import targets
import whole_model
from end_to_end import Compared
from gguf_model import stored_name, write_gguf
from ktransformers import _native, optimize_and_load
from ktransformers.checkpoint import open_checkpoint
from make_model import real_config, write_model
from peer_layer import CannotRun
from whole_model import ModelVariant, load_model_peer

SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 160,
    "moe_intermediate_size": 96,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
H, C, DN, DV = 2, 32, 16, 16
Q8, Q4, Q4_K = (ModelVariant(name, 2, flash=True) for name in ("Q8_0", "Q4_0", "Q4_K_M"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", real_config("v2-lite", 2, **SIZES))
    return tmp_path / "model"


def values(tensor: Any) -> torch.Tensor:
    """Return what a GGUF tensor holds, rows last, in fp32."""
    shape = [int(n) for n in reversed(tensor.shape)]
    found = torch.from_numpy(tensor.data.copy())
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        found = found.view(torch.bfloat16)
    return found.reshape(shape).float()


def test_every_tensor_of_a_model_is_in_its_gguf_file(folder: Path, tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "model.gguf")
    stored = {t.name: values(t) for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    checkpoint = open_checkpoint(folder)
    left = set(stored)
    for name in checkpoint.infos():
        if ".experts." in name or "kv_b_proj" in name:
            continue
        assert torch.equal(stored[stored_name(name)], checkpoint.read(name).float()), name
        left.remove(stored_name(name))
    for layer in range(2):
        kv_b = checkpoint.read(f"model.layers.{layer}.self_attn.kv_b_proj.weight").float()
        for h in range(H):
            head = kv_b[h * (DN + DV) : (h + 1) * (DN + DV)]
            assert torch.equal(stored[f"blk.{layer}.attn_k_b.weight"][h], head[:DN].T)
            assert torch.equal(stored[f"blk.{layer}.attn_v_b.weight"][h], head[DN:])
        left -= {f"blk.{layer}.attn_{half}_b.weight" for half in "kv"}
    for of in ("gate", "up", "down"):
        for e in range(16):
            name = f"model.layers.1.mlp.experts.{e}.{of}_proj.weight"
            expert = stored[f"blk.1.ffn_{of}_exps.weight"][e]
            assert torch.equal(expert, checkpoint.read(name).float())
        left.remove(f"blk.1.ffn_{of}_exps.weight")
    assert not left


def test_a_gguf_file_says_what_llama_cpp_asks_of_a_model(folder: Path, tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    said = {name: field.contents() for name, field in fields.items()}
    for key, expected in {
        "attention.key_length": C + 8,
        "attention.value_length": C,
        "attention.key_length_mla": DN + 8,
        "attention.q_lora_rank": 24,
        "attention.head_count_kv": 1,
        "leading_dense_block_count": 1,
        "expert_used_count": 2,
        "rope.scaling.type": "yarn",
    }.items():
        assert said[f"deepseek2.{key}"] == expected, key
    assert said["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    assert said["general.architecture"] == "deepseek2"


def test_a_tensor_without_a_counterpart_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.bias: has no counterpart"):
        stored_name("model.layers.0.mlp.bias")


def test_transformers_steps_from_its_cache(folder: Path) -> None:
    engine = load_model_peer("transformers").load(folder, ModelVariant("bf16", 1), 64)
    ids = [5, 6, 7, 8]
    whole = engine.prefill(ids).float()
    engine.prefill(ids[:-1])
    step = engine.step(ids[-1]).float()
    assert torch.nn.functional.cosine_similarity(whole, step, dim=0) > 0.999


def test_logits_of_another_model_are_a_wrong_result(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, generator=generator)
    whole_model.keep_reference(folder, logits)
    near = logits + 0.01 * torch.randn(3, 50, generator=generator)
    assert 0.99 < end_to_end.check(folder, "ours", "int8", near) < 1
    far = torch.randn(3, 50, generator=generator)
    with pytest.raises(SystemExit, match=r"it, Q4_K_M: wrong result, cosine -?0\.\d+ with"):
        end_to_end.check(folder, "it", "Q4_K_M", far)


class Counting:
    """An engine whose favourite is always the next token, and which notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def logits(self, ids: list[int]) -> torch.Tensor:
        self.asked.append(ids)
        return torch.nn.functional.one_hot(torch.tensor(ids[-1] + 1), 2000).float()

    prefill = logits

    def step(self, token: int) -> torch.Tensor:
        return self.logits([token])


def test_a_worker_does_what_it_is_asked() -> None:
    engine = Counting()
    assert len(model_worker.answer(engine, 1000, "logits")) == len(whole_model.CHECKED_PROMPTS)  # type: ignore[arg-type]  # a list
    engine.asked.clear()
    assert model_worker.answer(engine, 1000, "prefill 5") > 0  # type: ignore[operator]  # seconds
    assert [len(ids) for ids in engine.asked] == [5]
    prompt = engine.asked.pop()
    assert model_worker.answer(engine, 1000, "decode 5 4") > 0  # type: ignore[operator]  # seconds
    last = prompt[-1]
    assert engine.asked == [prompt, [last + 1], [last + 2], [last + 3]]


def test_prompts_are_the_same_in_every_process_and_of_ordinary_tokens() -> None:
    ids = whole_model.random_ids(300, 50)
    assert ids == whole_model.random_ids(300, 50)
    assert set(ids) == set(range(3, 50))


def test_a_model_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_model, "CACHE", tmp_path)
    small = real_config("v2-lite", 2, **SIZES)
    monkeypatch.setattr(whole_model, "real_config", lambda *_, **__: small)
    made = whole_model.model_folder(2)
    assert (made / "tokenizer.json").exists()
    assert whole_model.vocab_size(made) == small.vocab_size
    (made / "config.json").write_text(json.dumps({"vocab_size": 7}))
    assert whole_model.vocab_size(whole_model.model_folder(2)) == 7


def test_of_the_ways_to_run_a_format_the_fastest_counts() -> None:
    def compared(variant: ModelVariant, ours: float, theirs: float) -> list[Compared]:
        return [Compared(f.name, variant, [ours], [theirs]) for f in end_to_end.FIGURES]

    slow = ModelVariant("Q4_0", 2)
    results = compared(Q4, 12, 4) + compared(slow, 40, 2) + compared(Q4_K, 10, 5)
    report = end_to_end.ratios(results)
    assert report["prefill_512_over_Q4_0"] == 3
    assert report["decode_of_Q4_0"] == [4, "Q4_0, flash"]
    assert report["decode_over_Q4_K_M"] == report["decode_over_best"] == 2
    assert report["decode_tok_s"] == 10


def test_llama_cpp_stands_in_for_a_faster_fork() -> None:
    report = {f"{f.name}_over_{of}": 8.0 for f in end_to_end.FIGURES for of in ("best", "Q4_0")}
    report["prefill_512_over_Q4_0"] = 16.0  # of a format that is not its best
    turned = end_to_end.stand_in(report, "int4")
    assert turned["prefill_512_over_Q4_0"] == turned["prefill_512_over_best"] == 8 / 2.2
    assert turned["decode_over_Q4_0"] == 8
    assert turned["stands_in"] == "llama.cpp"


def test_a_fork_that_cannot_be_had_is_replaced_and_one_that_is_not_there_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_layer, "FOLDER", tmp_path)
    measured: list[str] = []

    def pretend(name: str, *_: Any) -> dict[str, float]:
        measured.append(name)
        return {f"{f.name}_over_best": 7.8 for f in end_to_end.FIGURES}

    monkeypatch.setattr(end_to_end, "measured", pretend)
    with pytest.raises(end_to_end.Missing) as error:
        end_to_end.report_of("ik_llama.cpp", "int8", 2, 1)
    assert error.value.args == ("ik-llama-cpp-python is not installed: make peers", False)
    (tmp_path / "ik-llama-cpp-python==1.absent").write_text("no\n")
    (tmp_path / ".llama-cpp-python==1").touch()
    report = end_to_end.report_of("ik_llama.cpp", "int8", 2, 1)
    assert report["prefill_512_over_best"] == pytest.approx(2)
    assert measured == ["llama.cpp"]
    with pytest.raises(end_to_end.Missing):  # nobody knows how much faster the fork would be there
        end_to_end.report_of(
            "ik_llama.cpp", "int8", 2, 1, (end_to_end.Figure("decode_at_9", 9, 2),)
        )
    row = next(t for t in target_rows.TARGETS if t.promise.endswith("ik_llama.cpp: prefill 512"))
    assert targets.judge(row, report) == (0, "2, llama.cpp stands in", "yes")


def test_peers_have_counterparts_of_both_formats() -> None:
    names = {
        (peer, weight): {v.format for v in load_model_peer(peer).variants(weight, 2)}
        for peer in whole_model.MODEL_PEERS
        for weight in ("int8", "int4")
    }
    for peer in ("llama.cpp", "ik_llama.cpp"):
        assert names[peer, "int8"] == {"Q8_0"}
        assert names[peer, "int4"] == {"Q4_0", "Q4_K_M"}
    assert names["transformers", "int8"] == {"bf16"}
    assert [str(v) for v in load_model_peer("llama.cpp").variants("int8", 2)] == [
        "Q8_0, flash, repack",
        "Q8_0, repack",
    ]
    assert {bits: whole_model.bits(bits) for bits in ("Q8_0", "int4", "bf16")} == {
        "Q8_0": "8",
        "int4": "4",
        "bf16": "bf16",
    }


def test_bindings_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_llama_model, "FOLDER", tmp_path)
    with pytest.raises(CannotRun, match="no_such_llama: No module named"):
        peer_llama_model.bindings("no_such_llama", "it")


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(CannotRun, match=r"a GGUF file takes 0\.\d GB while it is made, but"):
        peer_llama_model.quantised(folder, "Q8_0", 1)
    assert not list(folder.glob("*.gguf"))


def test_operations_of_matrices_are_those_that_a_prompt_needs() -> None:
    config = real_config("v2-lite", 3, **SIZES)
    D, V = 192, config.vocab_size
    q, kv_a, o = D * 24 + 24 * 2 * (16 + 8), D * (32 + 8), 2 * 16 * D
    dense, moe = 3 * D * 160, D * 16 + 3 * D * 96 * (2 + 2)
    layers = (q + kv_a + o + dense) + (q + kv_a + o + moe)
    last = q + o + moe
    for T in (1, 10):
        expected = 2 * (T * layers + T * kv_a + last + D * V)
        assert model_limits.matrix_operations(config, T) == expected
    plain = real_config("v2-lite", 3, **SIZES | {"q_lora_rank": None})
    less = 3 * (D * 24 + 24 * 48 - D * 48)
    changed = model_limits.matrix_operations(config, 1) - 2 * less
    assert model_limits.matrix_operations(plain, 1) == changed


def test_operations_of_attention_are_those_of_the_cheaper_form() -> None:
    config = real_config("v2-lite", 3, q_lora_rank=24)
    for T in (2, 2048):
        expanded = (T * (T + 1) // 2) * (128 + 64 + 128) + T * 512 * 256
        last = T * (512 + 512 + 64) + 512 * 256
        expected = 2 * 16 * (2 * expanded + last)
        assert model_limits.attention_operations(config, T) == expected


@pytest.mark.parametrize(("cache_format", "nbytes"), [(None, 80), ("int8", 32 + 4 + 16)])
def test_a_decoded_token_reads_the_cache_in_the_format_of_its_rules(
    folder: Path, cache_format: str | None, nbytes: int
) -> None:
    operator = "ktransformers.operators.attention.MlaAttention"
    replace = {"class": operator, "kwargs": {"cache_format": cache_format}}
    model = optimize_and_load(folder, [{"match": {"name": "self_attn$"}, "replace": replace}])
    short, long = (model_limits.decode_bytes(model, context) for context in (100, 201))
    assert long - short == 2 * 101 * nbytes


def test_native_calls_are_noted_and_the_module_is_left_as_it_was() -> None:
    before = dict(vars(_native)), _native.Linear.forward
    with model_limits.native_calls() as calls:
        _native.silu_mul(torch.ones(1, 16), torch.ones(1, 16), torch.empty(1, 16))
    ((name, start, end),) = calls
    assert name == "silu_mul"
    assert start < end
    assert (dict(vars(_native)), _native.Linear.forward) == before


def test_a_share_is_of_what_the_limit_allows() -> None:
    samples = model_limits.Samples()
    samples.add(tokens=10, seconds=2, bound=1.5)
    assert samples.cells("it") == ["it", "5 (5 to 5)", "75% (75% to 75%)"]


def test_memory_is_held_to_what_is_needed_and_a_little() -> None:
    found = {"imported": 2e8, "weights": 5e8, "loading": 5e8, "reading": 2.2e9, "cache": 1e8}
    assert model_memory.shares(found) == {
        "loading_share_of_bound": 0.5,
        "reading_share_of_bound": 2,
    }
