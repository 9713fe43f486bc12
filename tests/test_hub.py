"""A model's folder, local or from a hub that is faked at huggingface_hub's API."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import DryRunFileInfo

from ktransformers import hub
from ktransformers.hub import resolve_model

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {  # of a repository, with their sizes
    "config.json": 1_000,
    "generation_config.json": 100,
    "tokenizer.json": 7_000_000,
    "tokenizer_config.json": 2_000,
    "chat_template.jinja": 3_000,
    "model-00001-of-00002.safetensors": 5_000_000_000,
    "model-00002-of-00002.safetensors": 4_000_000_000,
    "model.safetensors.index.json": 9_000,
    "pytorch_model-00001-of-00001.bin": 9_000_000_000,
    "consolidated.safetensors": 9_000_000_000,
    "original/model.safetensors": 9_000_000_000,
    "model-Q4_K_M.gguf": 2_000_000_000,
    "modeling_deepseek.py": 50_000,
    "configuration_deepseek.py": 5_000,
    "README.md": 10_000,
}
DESCRIPTION = {name for name in FILES if name.startswith(("config.", "gen", "tok", "chat"))}
WEIGHTS = {name for name in FILES if name.startswith("model") and "safetensors" in name}


class FakeHub:
    """Stands for `huggingface_hub.snapshot_download`."""

    def __init__(self, folder: Path, files: Mapping[str, int]) -> None:
        self.folder = folder
        self.files = files
        self.cached: set[str] = set()
        self.down: Exception | None = None  # why the hub cannot be asked
        self.breaks: Exception | None = None  # why a download breaks off

    def __call__(
        self,
        repo_id: str,
        *,
        allow_patterns: list[str],
        dry_run: bool = False,
        local_files_only: bool = False,
        tqdm_class: Any = None,
    ) -> str | list[DryRunFileInfo]:
        wanted = {n for n in self.files if any(fnmatch.fnmatch(n, p) for p in allow_patterns)}
        if dry_run:
            if self.down is not None:
                raise DryRunError("cannot be accessed") from self.down
            return [
                DryRunFileInfo(SHA, self.files[n], n, n, n in self.cached, n not in self.cached)
                for n in sorted(wanted)
            ]
        if not local_files_only:
            if self.breaks is not None:
                raise self.breaks
            self.cached |= wanted
        elif not wanted <= self.cached:
            raise LocalEntryNotFoundError("not in the cache")
        return str(self.folder)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "snapshot", FILES)
    monkeypatch.setattr(hub, "snapshot_download", fake)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    set_free_disk(monkeypatch, 10**12)
    return fake


def set_free_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    def disk_usage(path: Path) -> SimpleNamespace:
        assert path.exists()
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)


def http_error(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None)
    return kind("404", response=response)


def error_of(model: str) -> str:
    with pytest.raises(ValueError) as caught:
        resolve_model(model)
    return str(caught.value)


def test_local_folder_never_touches_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", None)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve_model(str(tmp_path / "owner/name")) == tmp_path / "owner/name"
    assert resolve_model("owner/name") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/owner/name") == tmp_path / "owner/name"


def test_local_folder_without_config_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", None)
    assert error_of(str(tmp_path)) == (
        f"{tmp_path}: no folder with a config.json; pass a model's whole folder"
    )
    file = tmp_path / "model.safetensors"
    file.touch()
    assert error_of(str(file)).startswith(f"{file}: no folder with a config.json")


@pytest.mark.parametrize("model", ["./v3", "/models/v3", "a/b/c", "a b", "C:\\v3"])
def test_neither_path_nor_hub_id_is_an_error(model: str) -> None:
    assert (
        error_of(model) == f"{model}: no such folder, and no hub id (expected the form owner/name)"
    )


def test_only_what_a_model_is_made_of_is_fetched(fake_hub: FakeHub) -> None:
    assert resolve_model("deepseek-ai/DeepSeek-V3") == fake_hub.folder
    assert fake_hub.cached == DESCRIPTION | WEIGHTS


def test_weights_that_are_not_needed_are_not_fetched(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free_disk(monkeypatch, 8_000_000)
    assert resolve_model("deepseek-ai/DeepSeek-V3", needs_weights=False) == fake_hub.folder
    assert fake_hub.cached == DESCRIPTION


def test_disk_that_is_too_small_is_told_before_the_download(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free_disk(monkeypatch, 6_000_000_000)
    assert error_of("deepseek-ai/DeepSeek-V3") == (
        "deepseek-ai/DeepSeek-V3: 9.0 GB are to be downloaded to "
        f"{constants.HF_HUB_CACHE}, where 6.0 GB are free; make room, or set HF_HOME to a folder "
        "on a larger disk"
    )
    assert not fake_hub.cached


def test_files_in_the_cache_need_no_disk(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free_disk(monkeypatch, 6_000_000_000)
    fake_hub.cached = {"model-00001-of-00002.safetensors"}
    assert resolve_model("deepseek-ai/DeepSeek-V3") == fake_hub.folder


def test_unknown_id_is_an_error(fake_hub: FakeHub) -> None:
    fake_hub.down = http_error(RepositoryNotFoundError)
    assert error_of("deepseek/V3") == (
        "deepseek/V3: no such folder, and the hub has no such model; check the name, or log in "
        "with `hf auth login` if it is private"
    )


def test_gated_model_is_an_error(fake_hub: FakeHub) -> None:
    fake_hub.down = http_error(GatedRepoError)
    assert error_of("owner/gated") == (
        "owner/gated: its owner grants access to each user: accept the terms at "
        f"{constants.ENDPOINT}/owner/gated, then log in with `hf auth login`"
    )


def test_without_a_network_the_cache_is_used(fake_hub: FakeHub) -> None:
    fake_hub.down = ConnectionError()
    fake_hub.cached = set(FILES)
    assert resolve_model("deepseek-ai/DeepSeek-V3") == fake_hub.folder


def test_without_a_network_and_cache_is_an_error(fake_hub: FakeHub) -> None:
    fake_hub.down = ConnectionError()
    fake_hub.cached = DESCRIPTION
    assert error_of("deepseek-ai/DeepSeek-V3") == (
        "deepseek-ai/DeepSeek-V3: no such folder, the hub cannot be reached, and "
        f"{constants.HF_HUB_CACHE} does not hold all of it; connect (and unset HF_HUB_OFFLINE), or "
        "pass a local folder"
    )
    assert resolve_model("deepseek-ai/DeepSeek-V3", needs_weights=False) == fake_hub.folder


@pytest.mark.parametrize("error", [http_error(HfHubHTTPError), OSError("disk on fire")])
def test_download_that_breaks_off_is_an_error(fake_hub: FakeHub, error: Exception) -> None:
    fake_hub.breaks = error
    assert error_of("deepseek-ai/DeepSeek-V3") == (
        f"deepseek-ai/DeepSeek-V3: the download broke off ({error}); run the same again, and it "
        "goes on where it was"
    )


def test_repository_without_safetensors_is_an_error(fake_hub: FakeHub) -> None:
    fake_hub.files = {name: size for name, size in FILES.items() if name not in WEIGHTS}
    assert error_of("owner/old") == (
        "owner/old: the repository has no model.safetensors, whole or in shards; choose one "
        "that has"
    )
    assert not fake_hub.cached
    assert resolve_model("owner/old", needs_weights=False) == fake_hub.folder


def test_repository_without_config_is_an_error(fake_hub: FakeHub) -> None:
    fake_hub.files = {"model.safetensors": 1, "README.md": 1}
    assert error_of("owner/adapter") == (
        "owner/adapter: the repository has no config.json; it is no transformers model"
    )


def test_hf_hub_offline_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "the hub cannot be reached" in error_of("owner/name")
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    assert resolve_model("owner/name") == snapshot


def test_planning_a_download_draws_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with hub._Silent(total=2, desc="Fetching 2 files") as bar:
        bar.update(2)
        bar.set_description_str("Download complete")
    assert capfd.readouterr() == ("", "")
