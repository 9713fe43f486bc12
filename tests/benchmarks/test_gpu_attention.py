"""The benchmark of attention on a GPU, where there is none."""

from __future__ import annotations

import pytest
import torch
import typer

import gpu_attention


def test_without_a_gpu_it_says_so_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.Exit) as caught:
        gpu_attention.main()
    assert caught.value.exit_code == 2
    expected = "this benchmark needs a CUDA GPU, and torch finds none here\n"
    assert capsys.readouterr() == ("", expected)
