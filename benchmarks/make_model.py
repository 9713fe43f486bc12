"""Write a model of any size with random weights, as the checkpoint that HuggingFace would write.

One tensor per expert, a shard per layer, bf16. Weights are scaled so that activations stay sane.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from ktransformers.load import build_on_meta


def write_model(folder: Path, config: PreTrainedConfig) -> int:
    """Write config, shards and index to `folder`; return the bytes of all tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = torch.bfloat16
    model = build_on_meta(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    shards: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for key, meta in model.state_dict().items():
        part = key.split(".")[2] if ".layers." in key else "rest"
        shards[f"model-{part}.safetensors"].update(_canonical(key, tuple(meta.shape)))
    generator = torch.Generator().manual_seed(0)
    total = 0
    for file, shapes in shards.items():
        tensors = {name: _random(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _canonical(key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name what a fused tensor of transformers 5 is in a checkpoint: one per expert."""
    prefix = key.rpartition(".")[0]
    if key.endswith("experts.gate_up_proj"):
        for expert in range(shape[0]):
            for projection in ("gate_proj", "up_proj"):
                yield f"{prefix}.{expert}.{projection}.weight", (shape[1] // 2, shape[2])
    elif key.endswith("experts.down_proj"):
        for expert in range(shape[0]):
            yield f"{prefix}.{expert}.down_proj.weight", shape[1:]
    else:
        yield key, shape


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    values = torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5)
    return values.to(torch.bfloat16)
