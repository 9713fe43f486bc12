"""A deal as a rule file that people read and edit: what goes where, and why.

What people change is a variable: GPUs, ranges of layers, threads. With several GPUs the first one's
are `gpu0`, `layers0` and `experts0`; a lone one's have no number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ktransformers.research.dealing import Deal, Stage
from ktransformers.research.device_memory import GB, Machine, Need

COLUMNS = 100  # of a line
OPERATORS = "ktransformers.operators"
# Of attention, of shared experts and of dense layers.
PROJECTIONS = (
    r"^model\.layers\.\d+\.(self_attn\.(q|q_a|q_b|kv_a|o)_proj\w*"
    r"|mlp\.(shared_experts\.)?(gate|up|down)_proj)$"
)


@dataclass(frozen=True, slots=True)
class Family:
    """The classes of a kind of model."""

    layer: str
    attention: str
    moe: str
    experts: str


FAMILIES = {  # by model_type
    "deepseek_v2": Family(
        "DeepseekV2DecoderLayer", "DeepseekV2Attention", "DeepseekV2Moe", "DeepseekV2Experts"
    ),
    "deepseek_v3": Family(
        "DeepseekV3DecoderLayer", "DeepseekV3Attention", "DeepseekV3MoE", "DeepseekV3Experts"
    ),
}


@dataclass(frozen=True, slots=True)
class Style:
    """What is not a question of which device."""

    family: Family
    weight: str  # of what the CPU computes: int8 or int4
    group_size: int  # of weights on GPUs
    threads: int | None  # None: auto
    has_experts: tuple[int, ...]  # the layers with routed experts
    num_experts: int  # of each of them


def write_rules(dealt: Deal, style: Style) -> str:
    """Return the file, without the comment at its head."""
    return "\n".join(_Writer(dealt, style).lines()) + "\n"


def write_head(
    title: str, machine: Machine, dealt: Deal, style: Style, needs: Mapping[str, Need], made_by: str
) -> str:
    """Return the comment at a file's head: model, machine, and what each device will need.

    Args:
        title: of the model.
        machine: that it was made for.
        dealt: what was written.
        style: likewise.
        needs: as `predict` returns them.
        made_by: the command that makes the file.
    """
    gpus = machine.gpus_named()
    lines = [
        f"{title}: {gpus}, {_shares(dealt, style)}.",
        f"Machine: {gpus} and {machine.memory:g} GB of memory, for {machine.context:,} tokens.",
    ]
    sizes = {"cpu": machine.memory}
    sizes |= {f"cuda:{index}": size for index, size in enumerate(machine.gpus)}
    for device in sorted(sizes, key=lambda name: name == "cpu"):
        need = needs.get(device)
        lines.append(
            f"  {device}: not needed"
            if need is None or need.total == 0
            else f"  {device}: {need.total / GB:.1f} of {sizes[device]:g} GB: {need}"
        )
    lines += [f"Made by: {made_by}", "Tokens/s: not measured."]
    return "".join(f"# {line}\n" for line in lines)


def _shares(dealt: Deal, style: Style) -> str:
    """Say what is left to the CPU."""
    held = len(dealt.resident) + sum(dealt.partly_resident.values()) / style.num_experts
    left = 1 - held / len(style.has_experts) if style.has_experts else 0
    if left == 0 and not dealt.cpu_layers:
        return "with everything on it" if len(dealt.stages) == 1 else "with everything on them"
    parts = []
    if dealt.cpu_layers:
        parts.append(f"{dealt.cpu_layers} layer{'s' if dealt.cpu_layers > 1 else ''}")
    if left:
        parts.append(f"{100 * left:.0f} % of routed experts" if held else "routed experts")
    return f"with {' and '.join(parts)} in {style.weight} on the CPU"


class _Writer:
    """Writes rules one after the other: the specific ones first."""

    def __init__(self, dealt: Deal, style: Style):
        self.dealt, self.style = dealt, style
        self.many = len(dealt.stages) > 1
        self.cut = self.many or dealt.cpu_layers > 0  # whether a GPU has a part of the layers
        here = [layer for layer in style.has_experts if layer >= dealt.cpu_layers]
        self.on_cpu = len(here) > len(dealt.resident)  # whether any of their experts are
        self.all_on_cpu = len(here) > len(dealt.resident) + len(dealt.partly_resident)

    def lines(self) -> Iterator[str]:
        """Yield the file's lines."""
        groups = [", ".join(group) for group in self.variables()]
        together = f"vars: {{{', '.join(groups)}}}"
        if self.many or len(together) > COLUMNS:
            yield "vars: {"
            yield from (f"  {group}," for group in groups)
            yield "}"
        else:
            yield together
        yield "rules:"
        if self.dealt.cpu_layers:
            yield from self.whole_layers()
        yield from self.places()
        yield from self.attention()
        yield from self.experts()
        yield from self.head()

    def variables(self) -> Iterator[list[str]]:
        """Yield what people change, in groups: the CPU's layers, each GPU's, what all share."""
        if self.dealt.cpu_layers:
            yield [f"cpu_layers: '{_ranges(range(self.dealt.cpu_layers))}'"]
        for index, stage in enumerate(self.dealt.stages):
            number = self.number(index)
            group = [f"gpu{number}: 'cuda:{stage.gpu}'"]
            if self.cut:
                group.append(f"layers{number}: '{_ranges(stage.layers)}'")
            if self.on_cpu and stage.experts:
                group.append(f"experts{number}: '{_ranges(stage.experts)}'")
            if stage.some is not None:
                layer, count = stage.some
                group.append(f"some{number}: '{layer}', resident{number}: {count}")
            yield group
        common = [f"group_size: {self.style.group_size}"]
        if self.dealt.cpu_layers or self.on_cpu:
            common.insert(0, f"threads: {self.style.threads or 'auto'}")
        if self.on_cpu:
            common.append("stream_prefill: never")  # its buffers are not counted
        if self.many:
            yield [f"projections: '{PROJECTIONS}'"]
        yield common

    def number(self, index: int) -> str:
        """Return what the names of a GPU's variables end with."""
        return str(index) if self.many else ""

    def variable(self, name: str, index: int) -> str:
        """Return the reference to a variable of a GPU; -1 is the last one."""
        return f"${{{name}{self.number(index % len(self.dealt.stages))}}}"

    def gpu(self, index: int) -> str:
        """Return the device of a GPU, as kwargs have it."""
        return f"'{self.variable('gpu', index)}'"

    def stages(self) -> Iterator[tuple[int, Stage, str]]:
        """Yield each GPU with its number and what of a match says its layers."""
        for index, stage in enumerate(self.dealt.stages):
            layers = f", layers: '{self.variable('layers', index)}'" if self.cut else ""
            yield index, stage, layers

    def whole_layers(self) -> Iterator[str]:
        """Yield the rule for layers that no GPU has."""
        yield "  # No GPU has room for these layers: the CPU computes each in one native call. (So"
        yield "  # a token can't be one CUDA graph.)"
        name = rf"'^model\.layers\.\d+$', class: {self.style.family.layer}"
        yield f"  - match: {{name: {name}, layers: '${{cpu_layers}}'}}"
        kwargs = f"weight: {self.style.weight}, threads: '${{threads}}'"
        yield from _replace("decoder_layer.CpuDecoderLayer", kwargs)
        yield "    recursive: false"

    def places(self) -> Iterator[str]:
        """Yield rules for what no other rule takes."""
        parts = "embeddings, norms" if self.dealt.embedding_on_gpu else "norms"
        yield f"  # What no rule below takes: {parts}, routers."
        if not (self.dealt.embedding_on_gpu or self.dealt.cpu_layers):
            yield "  # No GPU has room for the embeddings: they stay with the CPU. (So a token"
            yield "  # can't be one CUDA graph.)"
        if not self.cut and self.dealt.embedding_on_gpu:
            yield from _keep(r"'^model\.(embed_tokens|layers\.\d+|norm|rotary_emb)$'", self.gpu(0))
            return
        if self.dealt.embedding_on_gpu:
            yield from _keep(r"'^model\.(embed_tokens|rotary_emb)$'", self.gpu(0))
        for index, _, layers in self.stages():
            yield from _keep(rf"'^model\.layers\.\d+$'{layers}", self.gpu(index))
        yield from _keep(r"'^model\.norm$'", self.gpu(-1))

    def attention(self) -> Iterator[str]:
        """Yield rules for attention and projections."""
        family = self.style.family
        for index, _, layers in self.stages():
            name = rf"'^model\.layers\.\d+\.self_attn$', class: {family.attention}"
            yield f"  - match: {{name: {name}{layers}}}"
            yield from _replace("gpu_attention.GpuMlaAttention", f"device: {self.gpu(index)}")
        yield "  # Projections of attention, of shared experts and of dense layers, in four bits."
        for index, _, layers in self.stages():
            if self.many:
                yield f"  - match: {{name: '${{projections}}', class: torch.nn.Linear{layers}}}"
            else:
                yield "  - match:"
                yield f"      name: '{PROJECTIONS}'"
                yield "      class: torch.nn.Linear"
                if layers:
                    yield f"      {layers.removeprefix(', ')}"
            yield from self.int4("linear.Int4Linear", index)

    def experts(self) -> Iterator[str]:
        """Yield rules for routed experts, here and there."""
        taken = rf"name: '^model\.layers\.\d+\.mlp\.experts$', class: {self.style.family.experts}"
        if self.dealt.resident:
            whose = "some layers'" if self.on_cpu else "all layers'"
            yield f"  # What is left of the GPU memory holds {whose} routed experts."
        for index, stage, layers in self.stages():
            if stage.experts:
                which = f", layers: '{self.variable('experts', index)}'" if self.on_cpu else layers
                yield f"  - match: {{{taken}{which}}}"
                yield from self.int4("experts.Int4Experts", index)
        if not self.on_cpu:
            return
        yield from self.hybrid()
        on_cpu = f"weight: {self.style.weight}, threads: '${{threads}}'"
        for index, stage, _ in self.stages():
            if stage.some is not None:
                yield f"  - match: {{{taken}, layers: '{self.variable('some', index)}'}}"
                yield "    replace:"
                yield f"      class: {OPERATORS}.resident_experts.ResidentExperts"
                yield f"      kwargs: {{device: {self.gpu(index)}, {on_cpu},"
                resident = f"resident: '{self.variable('resident', index)}'"
                yield f"        {resident}, group_size: '${{group_size}}'}}"
        if self.all_on_cpu:
            yield f"  - match: {{{taken}}}"
            yield from _replace("experts.CpuExperts", on_cpu)

    def hybrid(self) -> Iterator[str]:
        """Yield rules for MoE modules whose experts are the CPU's, or some of them."""
        moe = rf"name: '^model\.layers\.\d+\.mlp$', class: {self.style.family.moe}"
        whole = [index for index, stage, _ in self.stages() if stage.experts]
        if whole:
            names = ",".join(self.variable("experts", index) for index in whole)
            yield f"  - match: {{{moe}, layers: '{names}'}}"
            yield "    replace: {class: default}"
        which = "other routed" if self.dealt.resident else "routed"
        yield f"  # The CPU computes the {which} experts while the GPU does the shared ones"
        if self.dealt.partly_resident:
            yield "  # and those routed ones that it holds of a layer."
        yield "  # stream_prefill=auto: it computes the routed ones of long prompts, where that is"
        yield "  # faster, from weights that come to it meanwhile, in 4 GiB that must be free."
        yield f"  - match: {{{moe}}}"
        yield from _replace("hybrid.HybridMoE", "stream_prefill: '${stream_prefill}'")

    def head(self) -> Iterator[str]:
        """Yield the rule for the head."""
        yield "  - match: {name: '^lm_head$', class: torch.nn.Linear}"
        yield from self.int4("linear.Int4Linear", -1)

    def int4(self, operator: str, index: int) -> Iterator[str]:
        """Yield what a rule puts on a GPU in four bits."""
        yield from _replace(operator, f"device: {self.gpu(index)}, group_size: '${{group_size}}'")


def _replace(operator: str, kwargs: str) -> Iterator[str]:
    yield "    replace:"
    yield f"      class: {OPERATORS}.{operator}"
    yield f"      kwargs: {{{kwargs}}}"


def _keep(match: str, device: str) -> Iterator[str]:
    yield f"  - match: {{name: {match}}}"
    yield f"    replace: {{class: default, kwargs: {{device: {device}}}}}"


def _ranges(layers: Sequence[int]) -> str:
    """Return ascending layers as rules write them: 3-5,7."""
    runs = [
        [layer for _, layer in run]
        for _, run in groupby(enumerate(layers), key=lambda item: item[1] - item[0])
    ]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
