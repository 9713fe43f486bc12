"""The tool that draws a token: what it says of the stand-in, and how a picture looks."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import token_trace
from graph_models import attention_in_torch
from ktransformers.operators.gpu_attention import GpuMlaAttention

pytestmark = pytest.mark.skipif(
    not (token_trace.FOLDER / "model.safetensors").is_file(),
    reason="examples/tiny-deepseek-v3/model.safetensors is not here (an sdist leaves it out)",
)


@pytest.mark.parametrize("deferred", [0, 1])
def test_a_trace_has_every_layer_and_the_experts_between_submission_and_join(
    deferred: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(GpuMlaAttention, "compute", attention_in_torch)
    token_trace.main(token_trace.FOLDER, None, deferred, 3, tmp_path / "trace", save=False)
    *_, title, line = capsys.readouterr().out.splitlines()
    report, found = json.loads(line), json.loads((tmp_path / "trace.json").read_text())
    assert report["stands_in"] == found["stands_in"] == (not torch.cuda.is_available())
    assert ("says nothing about a GPU" in title) == report["stands_in"]
    parts = found["parts"]
    labels = [part["label"] for part in parts if part["kind"] == "layer"]
    assert list(dict.fromkeys(labels)) == ["embedding", *(f"layer {n}" for n in range(4))]
    experts = [part for part in parts if part["kind"] == "experts"]
    deferring = 2 if deferred else 0  # two of three layers have one after them
    assert len(experts) == 3 + deferring
    assert 0 < report["cpu_busy_share"] <= 1
    for layer in range(1, 4):
        gpu = [p for p in parts if p["label"] == f"beside the experts of layer {layer}"][-1]
        job = next(p for p in experts if p["label"] == f"experts of layer {layer}")
        waits = [p for p in parts if p["label"] == f"waits in layer {layer}"]
        assert job["end"] <= waits[0]["end"] + 50  # us, of two clocks on a GPU
        assert gpu["end"] <= waits[0]["end"]
    root = ElementTree.parse(tmp_path / "trace.svg").getroot()
    drawn = root.findall(".//{*}rect/{*}title")
    assert len(drawn) == len(parts)
    assert any(title in (text.text or "") for text in root.findall(".//{*}text"))
