"""The benchmark of projections on a GPU."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

import int4_linear
from ktransformers.operators.kernels.int4_weight import Int4Format


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing() -> None:
    app = typer.Typer()
    app.command()(int4_linear.main)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert result.stderr == "this benchmark needs a GPU, and torch finds none here\n"
    assert result.stdout == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_result_is_checked_and_every_token_count_has_a_row() -> None:
    rows = int4_linear.measure("v3-kv_a_proj", [1, 64], Int4Format(128, True), 2)
    assert [row.tokens for row in rows] == [1, 64]
