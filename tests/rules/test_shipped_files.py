"""The rule files that come for GPUs: what the generator makes, inside the machine they name."""

from __future__ import annotations

import re

import pytest

from ktransformers.rules import shipped_rules
from shipped_files import FOLDER, MODELS, shipped_files, text


@pytest.mark.parametrize("model", MODELS)
def test_shipped_files_are_what_the_generator_makes(model: str) -> None:
    # Making one plans it at its real size.
    for name, planned in shipped_files(model):
        written = (FOLDER / f"{name}.yaml").read_text()
        assert written == text(model, planned), f"{name}: run tests/support/shipped_files.py"
        sizes = re.search(r"Machine: (\d+) x (\d+) GB of GPU and (\d+) GB of memory", written)
        assert sizes is not None
        count, gpu, memory = map(int, sizes.groups())
        assert f"-{count}x{gpu}gb" in name
        needs = dict(planned.needs)
        assert needs.pop("cpu").total <= 0.9 * memory * 1e9
        assert set(needs) == {f"cuda:{index}" for index in range(count)}
        assert max(need.total for need in needs.values()) <= gpu * 1e9


def test_every_model_comes_for_every_machine() -> None:
    machines = ("1x12gb", "1x24gb", "2x24gb", "4x24gb")
    expected = {
        f"{model}-{machine}-cpu-{weight}"
        for model in ("deepseek-v2", "deepseek-v3")
        for machine in machines
        for weight in ("int8", "int4")
    }
    # The smallest GPU holds all of V2-Lite: larger machines would get the same file.
    assert {name for name in shipped_rules() if "gb" in name} == {
        *expected,
        "deepseek-v2-lite-1x12gb",
    }
