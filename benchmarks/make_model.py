"""Write a model with DeepSeek's real layer sizes and random weights: speed claims need no download.

    python benchmarks/make_model.py build/lite-8 --model v2-lite --layers 8
    python benchmarks/make_model.py build/v3-4 --model v3 --layers 4 --experts 32 --format fp8

The folder is a checkpoint as HuggingFace would write it: one tensor per expert, in shards, with the
tokenizer of examples/tiny-deepseek-v3 and its small vocabulary. Weights are normal, scaled so that
each layer's output is about as large as its input; they are cut from one long row of random
numbers, which takes seconds where drawing each would take minutes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV3Config, PreTrainedConfig

from ktransformers.checkpoint.fp8 import DEFAULT_BLOCK, SCALE_SUFFIX, scale_shape
from ktransformers.load import build_on_meta
from ktransformers.progress import byte_progress

TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny-deepseek-v3"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
SHARD_BYTES = 2 << 30  # memory, too: a shard is made whole before it is written
NOISE = (1 << 24) + 1  # random numbers
FP8_MAX = 448.0  # of e4m3

Format = Literal["bf16", "fp8"]
Shapes = dict[str, tuple[int, ...]]

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

# What the official configs say, but for sizes that the command sets.
V2_LITE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 163840,
    "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
V3: dict[str, Any] = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,  # of 3: a model of few layers should have experts in most
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 163840,
    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}


def real_config(model: str, layers: int, **changes: Any) -> PreTrainedConfig:
    """Return a config of `v2-lite` or `v3` with the bundled tokenizer's vocabulary.

    Raises ValueError where the experts don't make groups that can be routed by.
    """
    bundled = json.loads((TOKENIZER / "config.json").read_text())
    tokens = {key: bundled[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    sizes = V2_LITE if model == "v2-lite" else V3
    kind = DeepseekV2Config if model == "v2-lite" else DeepseekV3Config
    settings = {**sizes, **tokens, "num_hidden_layers": layers, **changes}
    experts, groups = settings["n_routed_experts"], settings["n_group"]
    if groups > 1 and (experts % groups or experts < 2 * groups):
        raise ValueError(
            f"{experts} experts: {model} routes by {groups} groups of 2 or more; take a multiple "
            f"of {groups}, {2 * groups} at least"
        )
    built: PreTrainedConfig = kind(**settings)
    return built


def write_model(folder: Path, config: PreTrainedConfig, format: Format = "bf16") -> int:
    """Write config, shards and index to `folder`; return the bytes of all tensors.

    Raises ValueError where the disk has not enough room.
    """
    config.dtype = torch.bfloat16
    model = build_on_meta(config)
    config.architectures = [type(model).__name__]
    shapes = {
        name: shape
        for key, meta in model.state_dict().items()
        for name, shape in _canonical(key, tuple(meta.shape))
    }
    total = sum(_nbytes(name, shape, format) for name, shape in shapes.items())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < total:
        raise ValueError(
            f"{folder}: the model takes {total / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; "
            "take fewer layers or experts, or another disk"
        )
    if format == "fp8":
        config.quantization_config = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(DEFAULT_BLOCK),
        }
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    with byte_progress("Writing weights", total) as advance:
        _write_shards(folder, shapes, format, weight_map, advance)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_shards(
    folder: Path, shapes: Shapes, format: Format, weight_map: dict[str, str],
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    """Write tensors in order, a new file whenever one is full; enters them in `weight_map`."""
    random = _Random()
    shard: dict[str, torch.Tensor] = {}
    names = list(shapes)
    for number, name in enumerate(names):
        shard.update(_tensors(name, shapes[name], format, random))
        nbytes = sum(tensor.nbytes for tensor in shard.values())
        if nbytes >= SHARD_BYTES or number == len(names) - 1:
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            weight_map.update(dict.fromkeys(shard, file))
            advance(nbytes)
            shard = {}


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


def _is_fp8(name: str, shape: tuple[int, ...], format: Format) -> bool:
    """Tell what official FP8 checkpoints quantise: all projections, but not the router."""
    return format == "fp8" and len(shape) == 2 and "_proj" in name


def _nbytes(name: str, shape: tuple[int, ...], format: Format) -> int:
    numel = torch.Size(shape).numel()
    if _is_fp8(name, shape, format):
        return numel + 4 * torch.Size(scale_shape(shape, DEFAULT_BLOCK)).numel()
    return (4 if name.endswith("e_score_correction_bias") else 2) * numel


class _Random:
    """Normal numbers, the same in every run."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._noise = torch.randn(NOISE, generator=generator)
        self._next = 0

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return fp32 numbers; each tensor's begin where the last one's ended."""
        start = self._next
        end = start + torch.Size(shape).numel()
        self._next = end % NOISE
        noise = self._noise if end <= NOISE else self._noise.repeat(-(-end // NOISE))
        return noise[start:end].view(shape)


def _tensors(
    name: str, shape: tuple[int, ...], format: Format, random: _Random
) -> dict[str, torch.Tensor]:
    """Make one tensor, and its scales where it is FP8."""
    if name.endswith("e_score_correction_bias"):
        return {name: torch.zeros(shape)}
    if len(shape) == 1:
        return {name: torch.ones(shape, dtype=torch.bfloat16)}
    values = random.normal(shape) * shape[-1] ** -0.5
    if not _is_fp8(name, shape, format):
        return {name: values.to(torch.bfloat16)}
    weight, scale = quantise_fp8(values)
    return {name: weight, name + SCALE_SUFFIX: scale}


def quantise_fp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise `[n, k]` in blocks of 128 x 128: weights in e4m3, and fp32 scales."""
    rows, columns = DEFAULT_BLOCK
    scale = torch.empty(scale_shape(tuple(values.shape), DEFAULT_BLOCK))
    weight = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        band = values[i * rows : (i + 1) * rows]
        pieces = band.abs().amax(dim=0).split(columns)
        scale[i] = torch.stack([piece.amax() for piece in pieces]) / FP8_MAX
        by_column = scale[i].repeat_interleave(columns)[: values.shape[1]]
        weight[i * rows : (i + 1) * rows] = (band / by_column).to(torch.float8_e4m3fn)
    return weight, scale


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write it; must not exist.")],
    model: Annotated[Literal["v2-lite", "v3"], typer.Option(help="Whose layer sizes.")] = "v2-lite",
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers; the first is dense.")] = 8,
    experts: Annotated[
        int | None, typer.Option(help="Routed experts of a layer. Default: the model's, 64 or 256.")
    ] = None,
    q_lora_rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the queries' projection, 0 for none. Default: the model's, none or 1536. "
            "llama.cpp takes a V2 of other than 27 layers only with one."
        ),
    ] = None,
    format: Annotated[
        Format, typer.Option(help="fp8: e4m3 in blocks of 128 x 128, as V3 is published.")
    ] = "bf16",
) -> None:
    """Write a model with DeepSeek's real layer sizes and random weights.

    A layer of V2-Lite takes 1.2 GB in bf16, one of V3 23 GB, or 0.09 GB for each of its experts. To
    measure it: ktransformers pack FOLDER --rules deepseek-v2-cpu-int8, then chat or generate.
    """
    if folder.exists():
        raise SystemExit(f"{folder} exists: name another, or remove it")
    changes: dict[str, Any] = {}
    if experts is not None:
        changes["n_routed_experts"] = experts
    if q_lora_rank is not None:
        changes["q_lora_rank"] = q_lora_rank or None
    try:
        written = write_model(folder, real_config(model, layers, **changes), format)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, folder)
    print(f"{folder}: {written / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    typer.run(main)
