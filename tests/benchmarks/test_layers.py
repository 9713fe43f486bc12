"""The layers that benchmarks measure compute what they should, in our engine and in peers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import linear
import moe_layer
import packing
import peer_layer
import peers
import results
from ktransformers import _native
from moe_layer import Calls, Sizes, decode_routing, fitting, random_layer, random_weights
from peer_kt_kernel import raw_int4
from peer_layer import CannotRun, Variant, load_peer, why_absent

SMALL = Sizes(256, 128, 16, 2)


@pytest.mark.parametrize("weight", _native.formats())
def test_the_layer_is_checked_against_a_reference(weight: str) -> None:
    torch.manual_seed(0)
    layer = random_layer(SMALL, weight)
    assert moe_layer.check(layer, layer.native(1, None)) <= 1
    layer.gate_up.random_(0, 100)
    with pytest.raises(SystemExit, match="wrong result"):
        moe_layer.check(random_layer(SMALL, weight), layer.native(1, None))


@pytest.mark.parametrize("weight", _native.formats())
def test_a_projection_is_checked_against_a_reference(weight: str) -> None:
    torch.manual_seed(0)
    projection = linear.random_projection(256, 96, weight)
    assert linear.check(projection, 1) <= 1
    assert len(projection.packed) * projection.nbytes() >= linear.COPIES_BYTES


def test_onednn_is_measured_in_the_rounds_of_a_projection() -> None:
    projection = linear.random_projection(7168, 4096, "int8")
    works = linear.works_of(projection, [1, 4], 1, None, onednn=True)
    isa = _native.isa()
    assert [(work.isa, work.tokens) for work in works] == [
        (isa, 1),
        ("onednn", 1),
        (isa, 4),
        ("onednn", 4),
    ]
    assert all(work.seconds(0.0) for work in works)


def test_a_ratio_is_that_of_the_medians_and_the_least_is_named() -> None:
    def row(isa: str, tokens: int, ms: float) -> Any:
        return SimpleNamespace(isa=isa, tokens=tokens, ms=(0.0, ms, 9.0))

    rows = [row("avx2", 1, 2.0), row("onednn", 1, 6.0), row("avx2", 4, 5.0), row("onednn", 4, 4.0)]
    assert linear.over_onednn(rows) == {
        "over_onednn": {"1": 3.0, "4": 0.8},
        "least_over_onednn": 0.8,
    }
    assert linear.over_onednn(rows[::2]) == {}


def test_a_single_token_walks_through_all_experts() -> None:
    calls = decode_routing(SMALL)
    assert len(calls) == 8
    assert torch.equal(torch.cat(calls).flatten().sort().values, torch.arange(16))


def test_fewer_experts_are_taken_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    each = moe_layer.expert_bytes(SMALL, "int8")
    available = (int(moe_layer.SPARE_BYTES) + 10 * each) // 1024 + 1
    monkeypatch.setattr(Path, "read_text", lambda _: f"MemAvailable:   {available} kB\n")
    assert fitting(SMALL, "int8").num_experts == 10
    assert fitting(SMALL, "int8", copies=2).num_experts == 5
    assert fitting(SMALL, "int8", copies=100).num_experts == 2 * SMALL.top_k


@pytest.mark.parametrize(("name", "weight"), [("onednn", "int8"), ("grouped_mm", "bf16")])
def test_a_peer_computes_the_layer(name: str, weight: str) -> None:
    torch.manual_seed(0)
    peer = load_peer(name)
    experts = [random_weights(SMALL) for _ in range(moe_layer.CHECKED)]
    (variant,) = peer.variants(weight, torch.get_num_threads())
    with torch.inference_mode():
        layer = peer.make_layer(SMALL, experts, variant)
        error = moe_layer.relative_error(experts, lambda x, i, w: layer.prepare(x, w)(i))
        assert error < peer.MAX_ERROR[weight]
        calls = Calls.draw(SMALL, 5)
        assert layer.prepare(calls.x, calls.weights)(calls.indices[0]).shape == (5, 256)


def test_peers_say_what_they_have_no_counterpart_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_peer("onednn").variants("bf16", 2) == []
    assert [str(v) for v in load_peer("llama.cpp").variants("int4-128", 2)] == [
        "Q4_K, 2 threads",
        "Q4_K, repacked, 2 threads",
    ]
    kt_kernel = load_peer("kt-kernel")
    assert kt_kernel.variants("bf16", 2) == [Variant("BF16", 2), Variant("BF16", 1)]
    monkeypatch.setattr(_native, "isas", lambda: ["avx2", "portable"])
    with pytest.raises(CannotRun, match="kt-kernel's AMXINT8 needs AVX-512; this machine has"):
        kt_kernel.variants("int8", 2)
    assert kt_kernel.variants("int4-128", 1) == [Variant("RAWINT4", 1)]


def test_int4_for_kt_kernel_has_the_low_nibble_first() -> None:
    weight = torch.zeros(2, 64, dtype=torch.bfloat16)
    weight[0, 0], weight[0, 1], weight[1, 63] = 7.0, -3.0, 14.0
    packed, scale = raw_int4(weight)
    assert (packed.shape, scale.shape) == ((2, 32), (2, 2))
    assert int(packed[0, 0]) == (8 + 7) | (8 - 3) << 4
    assert int(packed[1, 31]) == 8 | (8 + 7) << 4
    assert scale[0, 0] == 1
    assert scale[1, 1] == 2


def test_an_absent_peer_says_whether_it_can_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_layer, "FOLDER", tmp_path)
    assert why_absent("onednn") == (None, False)
    assert why_absent("kt-kernel") == ("kt-kernel is not installed: make peers", False)
    (tmp_path / "kt-kernel==1.absent").write_text("talk\nno wheel for this Python\n\n")
    assert why_absent("kt-kernel") == (
        "kt-kernel can't be installed: no wheel for this Python",
        True,
    )
    (tmp_path / ".kt-kernel==1").touch()
    assert why_absent("kt-kernel") == (None, False)


def test_a_peer_that_is_gone_is_shown_with_its_last_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_layer, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    app = typer.Typer()
    app.command()(peers.main)

    def shown() -> dict[str, object]:
        done = CliRunner().invoke(app, ["llama.cpp"])
        assert done.exit_code == 0, done.output
        line: dict[str, object] = json.loads(done.output.splitlines()[-1])
        return line

    assert shown()["status"] == "absent"
    kept = {"ratio_1": 2.5, "status": "measured", "date": "2026", "commit": "c", "machine": {}}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "peer-llama.cpp-v2-lite-int8.json").write_text(json.dumps(kept))
    reason = "llama-cpp-python is not installed: make peers"
    assert shown() == kept | {"status": "stale", "reason": reason}


def test_a_worker_answers_with_seconds_until_it_is_told_no_more() -> None:
    sizes, variant = Sizes(2048, 1408, 12, 6), Variant("int8", 1)
    with peers.worker("onednn", "v2-lite", "int8", sizes, variant) as peer:
        assert 0 < peer.ready["relative_error"] < 0.05
        assert all(seconds > 0 for seconds in peer.seconds(1, 0.0))
    assert peer.process.returncode is not None


def test_a_worker_that_dies_says_why() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE, text=True) as process:
        talk = io.StringIO("first\nno luck\n")
        with pytest.raises(CannotRun, match="its process ended with 0: first\nno luck"):
            peers.Worker(process, talk)


def test_the_sparse_cache_of_ten_gigabytes_opens(tmp_path: Path) -> None:
    assert packing.write_sparse_cache(tmp_path) > 10e9
    operators = packing.lite_operators()
    assert packing.opening_seconds(tmp_path, operators) > 0
    some = next(iter(operators.values()))
    assert all(tensor.numel() for tensor in some.buffers())
