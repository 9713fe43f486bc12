"""Reading a large checkpoint tensor by tensor leaves no trace in the process's memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

MIB = 1 << 20
ALLOWANCE_MIB = 200

READER = """
import sys
from pathlib import Path
from ktransformers.checkpoint import open_checkpoint

def peak_mib():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024

checkpoint = open_checkpoint(sys.argv[1])
before = peak_mib()
read = 0
for name in checkpoint.infos():
    read += checkpoint.read(name).nbytes
print(read, peak_mib() - before)
"""


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Write bf16 zeros that take no disk; return their bytes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return end


def test_memory_stays_flat_while_a_gigabyte_is_read(tmp_path: Path) -> None:
    one_by_one = {f"layers.{i}.weight": (4096, 4096) for i in range(20)}  # 32 MiB each
    fused = {  # 256 and 128 MiB, each expert 12 MiB
        "experts.gate_up_proj": (32, 2048, 2048),
        "experts.down_proj": (32, 2048, 1024),
    }
    size = write_sparse(tmp_path / "1.safetensors", one_by_one)
    size += write_sparse(tmp_path / "2.safetensors", fused)
    assert size >= 1024 * MIB
    weight_map = dict.fromkeys(one_by_one, "1.safetensors") | dict.fromkeys(fused, "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    command = [sys.executable, "-c", READER, str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    read, growth_mib = map(int, output.split())
    assert read == size
    assert growth_mib < ALLOWANCE_MIB
