"""The packed cache: what is written, what is used, what is refused, and what a kill leaves."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from ktransformers import optimize_and_load, packing
from ktransformers.checkpoint.canonical import CanonicalCheckpoint
from ktransformers.checkpoint.packed import PAGE, Entry, Mode, check_file, open_tensors, read_index
from ktransformers.checkpoint.packed_writer import PackedWriter
from ktransformers.load import LoadError
from ktransformers.operators.experts import CpuExperts
from ktransformers.packing import pack, verify
from tiny_models import random_model, v3_config

KILL_POINTS = Path(__file__).parents[1] / "support/kill_points.py"
IDS = torch.arange(24).reshape(2, 12)
FIRST = "model.layers.1.mlp.experts"
BOTH = r"\.mlp\.experts$"


def rules(name: str = BOTH, **kwargs: Any) -> list[dict[str, Any]]:
    replace = {"class": "ktransformers.operators.experts.CpuExperts", "kwargs": kwargs}
    return [{"match": {"name": name}, "replace": replace}]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def model(save: Callable[..., Path]) -> Path:
    return save(random_model(v3_config()))


@pytest.fixture
def cache(model: Path, tmp_path: Path) -> Path:
    pack(model, rules(), tmp_path / "cache")
    return tmp_path / "cache"


def first_file(cache: Path) -> Path:
    return cache / f"{FIRST}.safetensors"


def refusal(model: Path, cache: Path | str = "auto", **kwargs: Any) -> str:
    with pytest.raises(LoadError) as caught:
        optimize_and_load(model, kwargs.pop("rules", rules()), cache=cache, **kwargs)
    return str(caught.value)


# What is written


def test_files_are_safetensors_whose_tensors_begin_on_pages(model: Path, cache: Path) -> None:
    operator = optimize_and_load(model, rules(), cache=None).get_submodule(FIRST)
    data = first_file(cache).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % PAGE == 0
    header = json.loads(data[8:start])
    with safe_open(first_file(cache), framework="pt") as file:
        for name, buffer in operator.named_buffers():
            begin, end = header[name]["data_offsets"]
            assert (header[name]["dtype"], header[name]["shape"]) == ("U8", [end - begin])
            assert (begin % PAGE, end % PAGE) == (0, 0)
            flat = buffer.reshape(-1).view(torch.uint8)
            assert torch.equal(file.get_tensor(name)[: flat.numel()], flat)
            assert not file.get_tensor(name)[flat.numel() :].any()
        assert set(file.keys()) == {name for name, _ in operator.named_buffers()}


def test_bytes_depend_neither_on_threads_nor_on_the_instruction_set(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KTRANSFORMERS_ISA", "portable")
    pack(model, rules(threads=1), tmp_path / "portable")
    assert contents(tmp_path / "portable") == contents(cache)


def test_operators_are_let_go_once_they_are_written(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = CpuExperts.load_weights
    seen: list[weakref.ref[CpuExperts]] = []
    loaded: list[int] = []  # operators that hold weights, each time that one more has got some

    def counted(self: CpuExperts, checkpoint: Any) -> None:
        seen.append(weakref.ref(self))
        plain(self, checkpoint)
        alive = (ref() for ref in seen)
        loaded.append(sum(o is not None and not o.gate_up_packed.is_meta for o in alive))

    monkeypatch.setattr(CpuExperts, "load_weights", counted)
    monkeypatch.setattr(packing, "_fitting", lambda largest: 1)
    pack(save(random_model(v3_config(num_hidden_layers=6))), rules(), tmp_path / "cache")
    assert loaded == [1] * 5


def test_as_many_operators_are_packed_at_once_as_fit_in_memory() -> None:
    assert packing._fitting(1 << 60) == 1
    assert packing._fitting(1 << 12) > 1000


def test_rules_that_pack_nothing_are_refused(model: Path, tmp_path: Path) -> None:
    nothing = [{"match": {"name": "^lm_head$"}, "replace": {"class": "default"}}]
    with pytest.raises(ValueError, match="these rules pack nothing"):
        pack(model, nothing, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# What is used


@pytest.mark.parametrize("mode", ["map", "copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_gives_the_same_bits_as_packing_anew(
    config: PreTrainedConfig, dtype: torch.dtype, mode: Any, save: Callable[..., Path]
) -> None:
    model = save(random_model(config, dtype=dtype))
    want: Any = optimize_and_load(model, rules())
    pack(model, rules())
    got: Any = optimize_and_load(model, rules(threads=1), cache=model / "packed", cache_mode=mode)
    assert torch.equal(logits(got), logits(want))
    made = {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(got.generate(IDS, **made), want.generate(IDS, **made))


@pytest.mark.parametrize("mode", ["map", "copy"])
def test_originals_of_packed_weights_are_not_read(
    model: Path, cache: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = CanonicalCheckpoint.read

    def watched(self: CanonicalCheckpoint, name: str) -> torch.Tensor:
        read.append(name)
        return plain(self, name)

    monkeypatch.setattr(CanonicalCheckpoint, "read", watched)
    optimize_and_load(model, rules(), cache=cache, cache_mode=mode)
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in read
    assert not [name for name in read if ".mlp.experts." in name]


def test_rules_may_take_fewer_modules_than_are_packed(model: Path, cache: Path) -> None:
    fewer = rules(r"\.1\.mlp\.experts$")
    used: Any = optimize_and_load(model, fewer, cache=cache)
    assert torch.equal(logits(used), logits(optimize_and_load(model, fewer)))
    assert " of 1 operators mapped from " in used.ktransformers_report.cache


def test_a_cache_beside_the_weights_is_used_and_told_of(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert pack(model, rules()).folder == model / "packed"
    with caplog.at_level(logging.INFO, logger="ktransformers"):
        used: Any = optimize_and_load(model, rules())
    mib = sum(path.stat().st_size for path in (model / "packed").glob("*.safetensors")) / 2**20
    line = f"packed cache: {mib:,.1f} MiB of 2 operators mapped from {model / 'packed'}"
    assert line in caplog.messages
    assert f"\n{line}\n" in str(used.ktransformers_report)
    without: Any = optimize_and_load(model, rules(), cache=None)
    assert without.ktransformers_report.cache is None


def test_a_cache_beside_the_weights_that_is_for_other_rules_is_left_alone_and_told_of(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack(model, rules(r"\.1\.mlp\.experts$"))
    with caplog.at_level(logging.INFO, logger="ktransformers"):
        loaded: Any = optimize_and_load(model, rules())
    line = (
        f"not used: {model / 'packed'} was packed for other rules: model.layers.2.mlp.experts is "
        "not in it"
    )
    assert loaded.ktransformers_report.cache == line
    assert f"packed cache: {line}" in caplog.messages


def test_a_cache_for_rules_that_pack_nothing_is_told_of(model: Path, cache: Path) -> None:
    nothing = [{"match": {"name": "^lm_head$"}, "replace": {"class": "default"}}]
    loaded: Any = optimize_and_load(model, nothing, cache=cache)
    assert loaded.ktransformers_report.cache == f"not used: {cache}: these rules pack nothing"


def test_model_and_cache_may_be_moved(model: Path, cache: Path, tmp_path: Path) -> None:
    want = logits(optimize_and_load(model, rules()))
    moved, moved_cache = model.rename(tmp_path / "m"), cache.rename(tmp_path / "c")
    assert torch.equal(logits(optimize_and_load(moved, rules(), cache=moved_cache)), want)


def test_a_cache_that_cannot_be_written_to_is_used(model: Path, cache: Path) -> None:
    want = logits(optimize_and_load(model, rules()))
    for path in [*cache.iterdir(), cache]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        for mode in get_args(Mode):
            got = optimize_and_load(model, rules(), cache=cache, cache_mode=mode)
            assert torch.equal(logits(got), want)
    finally:
        cache.chmod(0o755)


# Memory


def mapped(file: Path) -> dict[str, int]:
    """Add up, in KiB, what the kernel says of this process's mappings of a file."""
    totals: dict[str, int] = {}
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(file))
        elif ours and line.endswith(" kB"):
            name, size, _ = line.split()
            totals[name] = totals.get(name, 0) + int(size)
    return totals


TOUCH = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_packed import FIRST, mapped, open_tensors, read_index
folder = Path(sys.argv[1])
entry = read_index(folder).entries[FIRST]
tensors = open_tensors(folder, entry, "map", print)
sum(int(tensor.view(torch.uint8).sum()) for tensor in tensors.values())
pages = mapped(folder / entry.file_name)
# Dirty are those that wait to be written to the disk: no less shared.
print(pages["Shared_Clean:"] + pages["Shared_Dirty:"], pages["Anonymous:"], flush=True)
sys.stdin.read()
"""


def test_two_processes_share_the_pages_of_a_mapped_cache(cache: Path) -> None:
    command = [sys.executable, "-c", TOUCH, str(cache), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as one:
        assert one.stdout is not None
        one.stdout.readline()
        two = subprocess.run(command, env=environment, input="", capture_output=True, text=True)
        one.communicate("")
    shared, anonymous = map(int, two.stdout.split())
    tensors = open_tensors(cache, entry_of(cache), "map", print).values()
    # The kernel also maps neighbours of a touched page where it has them in memory: the header's
    # or a gap's page may be mapped by one process alone, a tensor's by both.
    assert shared >= sum(-(-tensor.nbytes // PAGE) for tensor in tensors) * (PAGE >> 10)
    assert anonymous == 0


def entry_of(cache: Path) -> Entry:
    return read_index(cache).entries[FIRST]


def test_mapped_tensors_lie_in_the_file_and_live_as_long_as_one_of_them(cache: Path) -> None:
    entry = entry_of(cache)
    tensors = open_tensors(cache, entry, "map", print)
    assert mapped(first_file(cache))["Size:"] == entry.file_bytes() >> 10
    assert all(tensor.data_ptr() % PAGE == 0 for tensor in tensors.values())
    last = tensors.pop("down_scale")
    tensors.clear()
    assert mapped(first_file(cache))["Size:"] == entry.file_bytes() >> 10
    assert last.sum() > 0
    del last
    assert not mapped(first_file(cache))


@pytest.mark.parametrize("mode", ["map", "copy"])
def test_no_write_to_a_tensor_reaches_the_file(cache: Path, mode: Any) -> None:
    before = first_file(cache).read_bytes()
    for tensor in open_tensors(cache, entry_of(cache), mode, lambda _: None).values():
        tensor.fill_(7)
    assert first_file(cache).read_bytes() == before


def test_a_copy_needs_the_file_no_more(cache: Path) -> None:
    entry = entry_of(cache)
    done: list[int] = []
    copied = open_tensors(cache, entry, "copy", done.append)
    want = {name: tensor.clone() for name, tensor in copied.items()}
    first_file(cache).write_bytes(b"")
    assert not mapped(first_file(cache))
    assert all(torch.equal(copied[name], tensor) for name, tensor in want.items())
    assert sum(done) == entry.file_bytes()


def test_opening_ten_gigabytes_takes_less_than_a_second(tmp_path: Path) -> None:
    entries = [
        Entry(f"layers.{i}.experts", "a.B", "int8", {"packed": ((1 << 30,), torch.uint8)})
        for i in range(10)
    ]
    for entry in entries:
        with (tmp_path / entry.file_name).open("wb") as file:  # sparse: takes no disk
            file.write(entry.header())
            file.truncate(entry.file_bytes())
    start = time.process_time()  # of this process: neighbours don't count
    opened = []
    for entry in entries:
        check_file(tmp_path, entry)
        opened.append(open_tensors(tmp_path, entry, "map", print))
    assert time.process_time() - start < 1
    assert sum(tensors["packed"].nbytes for tensors in opened) == 10 << 30


# What is refused


def test_another_layout_version_is_refused(model: Path, cache: Path) -> None:
    index = json.loads((cache / "packed.json").read_text())
    (cache / "packed.json").write_text(json.dumps({**index, "layout_version": 2}))
    want = (
        f"{cache}/packed.json: layout version 2, but this ktransformers reads 1; delete the folder "
        f"and pack again: `ktransformers pack MODEL --rules FILE --out {cache}`"
    )
    assert refusal(model, cache) == want
    with pytest.raises(ValueError, match="layout version 2"):
        pack(model, rules(), cache)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layout_version": 1}', "\xff"])
def test_a_damaged_index_is_refused(text: str, model: Path, cache: Path) -> None:
    (cache / "packed.json").write_text(text, "latin-1")
    assert refusal(model, cache).startswith(f"{cache}/packed.json: damaged (")


def test_another_revision_of_the_model_is_refused(
    model: Path, cache: Path, save: Callable[..., Path]
) -> None:
    other = save(random_model(v3_config(), seed=1), "other")
    assert refusal(other, cache) == (
        f"{cache}: packed from another checkpoint ({model}) than {other}: model.safetensors has "
        "other contents; delete the folder and pack again: "
        f"`ktransformers pack {other} --rules FILE --out {cache}`"
    )
    with pytest.raises(ValueError, match="choose another --out, or delete the folder"):
        pack(other, rules(), cache)


def test_another_model_is_refused(cache: Path, save: Callable[..., Path]) -> None:
    other = save(random_model(v3_config()), "other", max_shard_size="100KB")
    text = refusal(other, cache)
    assert "model-00001-of-" in text
    assert " is new, " in text


def test_a_cache_beside_weights_that_have_changed_is_refused(
    model: Path, save: Callable[..., Path]
) -> None:
    pack(model, rules())
    save(random_model(v3_config(), seed=1))
    assert refusal(model).endswith(
        f"\n{model / 'packed'} was found beside the weights; cache=None (--cache none) ignores it"
    )
    optimize_and_load(model, rules(), cache=None)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        (
            "packed_format",
            lambda self: "int4",
            "packed as int8, gate before up, but the rules want int4",
        ),
        (
            "__module__",
            "elsewhere",
            "packed by ktransformers.operators.experts.CpuExperts, but the rules want "
            "elsewhere.CpuExperts",
        ),
    ],
)
def test_what_was_packed_otherwise_is_refused(
    attribute: str,
    value: Any,
    message: str,
    model: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CpuExperts, attribute, value)
    assert refusal(model, cache) == (
        f"{cache}: packed for other rules: {FIRST} is {message} and 1 more; pack again into "
        "another folder: `ktransformers pack MODEL --rules FILE --out DIR`"
    )
    with pytest.raises(ValueError, match=re.escape(f"packed for other rules: {FIRST} is packed")):
        pack(model, rules(), cache)


@pytest.mark.parametrize(("packed", "wanted"), [(BOTH, "1" + BOTH), ("1" + BOTH, BOTH)])
def test_packing_for_other_modules_into_the_same_folder_is_refused(
    packed: str, wanted: str, model: Path, tmp_path: Path
) -> None:
    pack(model, rules(packed), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.experts is (not )?in it"):
        pack(model, rules(wanted), tmp_path / "cache")


def test_a_cache_of_too_few_operators_is_refused(model: Path, tmp_path: Path) -> None:
    pack(model, rules(r"\.1\.mlp\.experts$"), tmp_path / "cache")
    assert "model.layers.2.mlp.experts is not in it" in refusal(model, tmp_path / "cache")


def test_a_folder_without_a_cache_is_refused(model: Path, tmp_path: Path) -> None:
    assert refusal(model, tmp_path / "none") == (
        f"{tmp_path}/none: no packed cache (there is no packed.json); make one: "
        f"`ktransformers pack MODEL --rules FILE --out {tmp_path}/none`"
    )


def test_a_loaded_module_has_nothing_to_compare(cache: Path) -> None:
    with pytest.raises(LoadError, match="the weights are a loaded module's"):
        optimize_and_load(random_model(v3_config()), rules(), cache=cache)


def test_an_unknown_mode_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="cache_mode 'mmap': expected auto, map or copy"):
        optimize_and_load(model, rules(), cache_mode="mmap")  # type: ignore[arg-type]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "bytes, expected"),
        (Path.unlink, "No such file or directory"),
        (lambda path: flip(path, 300), "its header is damaged, or of another operator"),
    ],
    ids=["cut", "missing", "header"],
)
def test_a_damaged_file_is_refused_found_by_verify_and_mended(
    damage: Callable[[Path], None], message: str, model: Path, cache: Path
) -> None:
    want = contents(cache)
    damage(first_file(cache))
    command = f"`ktransformers pack {model} --rules FILE --out {cache}`"
    text = refusal(model, cache)
    assert text.startswith(f"{first_file(cache)}: ")
    assert message in text
    assert text.endswith(f"\npack again, which mends it: {command}")
    with pytest.raises(ValueError) as caught:
        verify(cache)
    assert str(caught.value) == text
    packed = pack(model, rules(), cache)
    assert (packed.written, packed.kept) == (1, 1)
    assert message in packed.damaged[0]
    assert contents(cache) == want


@pytest.mark.parametrize("place", ["weights", "padding", "last byte"])
def test_a_flipped_byte_is_found_by_verify_and_mended(place: str, model: Path, cache: Path) -> None:
    want = contents(cache)
    size = first_file(cache).stat().st_size
    offset = {"weights": PAGE + 5, "padding": size - 20, "last byte": size - 1}[place]
    flip(first_file(cache), offset)
    optimize_and_load(model, rules(), cache=cache)  # does not read what it maps
    with pytest.raises(ValueError, match=f"{FIRST}.safetensors: checksum .*: damaged\n"):
        verify(cache)
    assert pack(model, rules(), cache).written == 1
    assert contents(cache) == want


def test_verify_tells_the_bytes_of_a_sound_cache(cache: Path) -> None:
    assert verify(cache) == sum(path.stat().st_size for path in cache.glob("*.safetensors"))


# What is written again, and where not


def test_packing_again_reads_and_keeps_what_is_whole(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = {path: path.stat().st_ino for path in cache.glob("*.safetensors")}
    monkeypatch.setattr(CpuExperts, "load_weights", None)
    packed = pack(model, rules(), cache)
    assert (packed.written, packed.kept, packed.damaged) == (0, 2, ())
    assert {path: path.stat().st_ino for path in cache.glob("*.safetensors")} == want


def test_a_folder_of_other_things_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.partial").write_text("mine")
    with pytest.raises(ValueError, match="holds other things, such as "):
        pack(model, rules(), tmp_path)
    with pytest.raises(ValueError, match=r"holds other things, such as config\.json; choose a"):
        pack(model, rules(), model)
    assert (tmp_path / "notes.partial").read_text() == "mine"


def test_two_processes_do_not_pack_into_one_folder(model: Path, cache: Path) -> None:
    with (
        PackedWriter(cache, read_index(cache)),
        pytest.raises(ValueError, match="another process is packing into it"),
    ):
        pack(model, rules(), cache)


# What goes wrong on the way


def test_free_disk_is_checked_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=12_345))
    with pytest.raises(ValueError) as caught:
        pack(model, rules(), tmp_path / "cache")
    assert re.fullmatch(
        rf"{tmp_path}/cache: 0\.\d{{3}} GB are to be written, where 0\.000 GB are free; make room, "
        "or choose an --out on a larger disk",
        str(caught.value),
    )
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_gets_full_leaves_nothing_that_looks_whole(
    call: str, model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = getattr(os, call)
    left = 9 if call == "write" else 5
    lock = threading.Lock()

    def full(*args: Any) -> Any:
        nonlocal left
        with lock:
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(ValueError) as caught:
            pack(model, rules(), tmp_path / "again")
    assert re.fullmatch(
        rf"{tmp_path}/again: No space left on device\n{tmp_path}/again: [01] of 2 operators are "
        "packed; the same command goes on with the rest",
        str(caught.value),
    )
    assert not [*(tmp_path / "again").glob("*.partial")]
    assert "packing was not finished: " in refusal(model, tmp_path / "again")
    pack(model, rules(), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(cache)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_ends_packing_early_leaves_whole_operators(
    error: type[BaseException],
    model: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = CpuExperts.load_weights

    def fail(self: CpuExperts, checkpoint: Any) -> None:
        if self.site.layer == 2:
            raise error
        plain(self, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(CpuExperts, "load_weights", fail)
        patch.setattr(packing, "_fitting", lambda largest: 1)
        with pytest.raises(error):
            pack(model, rules(), tmp_path / "again")
    with pytest.raises(ValueError) as caught:
        verify(tmp_path / "again")
    assert f"{tmp_path}/again: model.layers.2.mlp.experts is not packed yet" in str(caught.value)
    assert "model.layers.2.mlp.experts of 2 operators not packed; go on" in refusal(
        model, tmp_path / "again"
    )
    assert pack(model, rules(), tmp_path / "again").kept == 1
    assert contents(tmp_path / "again") == contents(cache)


def test_weights_that_are_not_finite_are_not_packed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = CanonicalCheckpoint.read
    bad = "model.layers.2.mlp.experts.3.up_proj.weight"

    def poisoned(self: CanonicalCheckpoint, name: str) -> torch.Tensor:
        return plain(self, name) * (torch.nan if name == bad else 1)

    monkeypatch.setattr(CanonicalCheckpoint, "read", poisoned)
    with pytest.raises(ValueError, match=re.escape(bad)):
        pack(model, rules(), tmp_path / "cache")
    assert read_index(tmp_path / "cache").unpacked()[-1] == "model.layers.2.mlp.experts"


def test_a_kill_at_any_moment_is_made_good_by_packing_again(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    model = save(random_model(v3_config()))
    runs = subprocess.run(
        [sys.executable, str(KILL_POINTS), str(model), str(tmp_path / "runs"), "100"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    outcomes = [json.loads(line) for line in runs.splitlines()]
    assert len(outcomes) == 100
    assert [outcome["seed"] for outcome in outcomes if not outcome["same"]] == []
    kills = [kill for outcome in outcomes for kill in outcome["kills"]]
    assert {kill["wrong"] for kill in kills} == {None}
    moments = [(kill["call"], kill["moment"]) for kill in kills]
    between = [("fsync", "after"), ("replace", "before")]  # what is written has not its name yet
    for moment in (*between, ("replace", "after"), ("write", "half-way")):
        assert moment in moments
