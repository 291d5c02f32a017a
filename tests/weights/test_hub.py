"""From a name to a folder, without a network: paths as they are, the shared cache, and one line for every error."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from s3dit.weights.checkpoint import CheckpointError
from s3dit.weights.hub import ADAPTERS, FILES, NOT_READ, resolve, resolve_file

ROOT = Path(__file__).resolve().parents[2]


def test_existing_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"")
    assert resolve(str(tmp_path)) == tmp_path and resolve(str(file)) == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/x.safetensors") == file


def test_a_folder_goes_before_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    assert resolve("org/name") == Path("org/name")


NAMELESS = (
    "",
    "nothing",
    "/nothing/here",
    "a/b/c",
    "org/",
    "../x",
    "org/..",
    "org/na me",
    "x" * 5000,
    "a\0b",
    "~nobody/x",
)


@pytest.mark.parametrize("name", NAMELESS)
def test_neither_a_path_nor_a_repository(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(CheckpointError, match="needed a path") as error:
        resolve(name)
    assert "\n" not in str(error.value)


def _errors():
    from huggingface_hub import errors

    # The client that makes real responses is another one in each major version of the library.
    response = SimpleNamespace(headers={}, request=None)
    yield errors.GatedRepoError("no", response=response), "gated; accept its terms"
    yield errors.RepositoryNotFoundError("no", response=response), "no such repository on the Hub .*check the spelling"
    yield errors.LocalEntryNotFoundError("no"), "not in the Hugging Face cache.*HF_HUB_OFFLINE"
    yield errors.OfflineModeIsEnabled("no"), "not in the Hugging Face cache.*HF_HUB_OFFLINE"
    yield errors.HfHubHTTPError("\nserver on fire\nsecond line", response=response), r"\(server on fire\)"
    yield errors.HFValidationError("bad name"), "bad name"
    yield errors.HTTPError("no route"), "no route"
    yield OSError("disk full"), "disk full"
    yield OSError(), r"\(OSError\)"


def test_every_error_of_the_hub_is_one_line(monkeypatch):
    for fault, words in _errors():

        def fail(*_, fault=fault, **__):
            raise fault

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(CheckpointError, match=f"^org/name: .*{words}") as error:
            resolve("org/name")
        assert "\n" not in str(error.value) and error.value.__suppress_context__


def test_only_what_is_read_is_asked_for(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **more: asked.update(more) or str(tmp_path))
    assert resolve("org/name") == tmp_path
    assert asked == {"allow_patterns": list(FILES), "ignore_patterns": list(NOT_READ)}
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["model_index.json", "vae/config.json", "transformer/a-00001-of-00003.safetensors", "tokenizer/merges.txt"]
    others = ["README.md", "assets/x.json", "assets/deep/x.safetensors", "text_encoder/pytorch_model.bin", "x.gguf"]
    kept = filter_repo_objects(wanted + others, allow_patterns=list(FILES), ignore_patterns=list(NOT_READ))
    assert list(kept) == wanted


OFFLINE = """
from s3dit.weights.hub import resolve
print(resolve("org/name"))
resolve("org/absent")
"""


def test_offline_cache(tmp_path):
    """HF_HOME says where the cache is, HF_HUB_OFFLINE that nobody is asked; what is not there is said to be not there.

    In a process of its own, because huggingface_hub reads its environment once, when it is imported.
    """
    entry = tmp_path / "hub" / "models--org--name"
    snapshot = entry / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0" * 40)
    (snapshot / "model_index.json").write_text("{}")
    hidden = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "HF_HUB_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.stdout.strip() == str(snapshot), done.stderr
    assert "org/absent" in done.stderr and "not in the Hugging Face cache" in done.stderr.splitlines()[-1]


def test_adapters_are_files_folders_or_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns, **_):
        asked.append((name, allow_patterns))
        folder = tmp_path / "cache"
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        for file in ("adapter_model.safetensors", "sub/style.safetensors"):
            (folder / file).write_bytes(b"x")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "x.safetensors").write_bytes(b"x")
    assert resolve_file("loras/x.safetensors") == Path("loras/x.safetensors") and resolve_file("loras") == Path("loras")
    assert resolve_file("org/name/sub/style.safetensors") == tmp_path / "cache" / "sub" / "style.safetensors"
    assert resolve_file("org/name") == tmp_path / "cache"
    assert asked == [("org/name", ["sub/style.safetensors"]), ("org/name", list(ADAPTERS))]
    with pytest.raises(CheckpointError, match="the repository holds no other.safetensors"):
        resolve_file("org/name/other.safetensors")
    asked.clear()
    for missing in ("x.safetensors", "loras/y.safetensors", "org/name/x.bin", "org/name/../x.safetensors", "", "/no/x"):
        with pytest.raises(CheckpointError, match=r"no such file or folder; needed the path of a file of weights"):
            resolve_file(missing)
    assert asked == []


def test_a_repository_without_an_adapter_under_the_usual_names(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match="no file of weights under the usual names; .* org/name/file.safetensors"):
        resolve_file("org/name")
