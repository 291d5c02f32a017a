"""From a name to files, without a network: paths as they are, the shared cache, a Hub on this machine, every error."""

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save

from s3dit.errors import CheckpointError
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.sources import open_sources
from s3dit.weights.adapter import read_adapter
from s3dit.weights.hub import MODEL_FOLDERS, resolve, resolve_file

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import Hub  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODEL = {file.relative_to(EMBEDDED).as_posix(): file.read_bytes() for file in EMBEDDED.rglob("*") if file.is_file()}
# What the official repositories hold besides, and what others add to theirs.
OTHERS = dict.fromkeys(
    (
        "README.md", "LICENSE", ".gitattributes", "assets/showcase.jpg", "assets/deep/x.safetensors",
        "text_encoder/generation_config.json", "text_encoder/pytorch_model.bin", "transformer/model.onnx",
        "transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors",
        "vae/diffusion_pytorch_model.bin", "split_files/vae/ae.safetensors", "x.gguf", "pipeline.py",
        "transformer/deep/model.safetensors",
    ),
    b"x",
)  # fmt: skip
# What is read of a model.
READ = sorted(MODEL.keys() - {"sample.png", "score.json", "tokenizer/vocab.json", "tokenizer/merges.txt"})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with one model, in the place of the real one, and an empty cache."""
    from huggingface_hub import constants

    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        server.repositories["org/name"] = MODEL | OTHERS
        yield server


def offline(hub, monkeypatch):
    """As HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()


def lay(root, name, files, listed=None):
    """A cache entry as huggingface_hub lays it out: links into blobs. listed: the list of files that it keeps."""
    import hashlib

    entry = root / f"models--{name.replace('/', '--')}"
    commit = "0123456789" * 4
    snapshot = entry / "snapshots" / commit
    for file, data in files.items():
        blob = entry / "blobs" / hashlib.sha1(data + file.encode()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).symlink_to(os.path.relpath(blob, (snapshot / file).parent))
    (entry / "refs").mkdir(exist_ok=True)
    (entry / "refs" / "main").write_text(commit)
    if listed is not None:
        from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

        entries = {
            file: TreeCacheEntry(size=1, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
            for file in listed
        }
        write_tree_cache(str(entry), commit, entries)
    return snapshot


def test_existing_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"")
    assert resolve(str(tmp_path)) == tmp_path and resolve(str(file)) == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/x.safetensors") == file


def test_a_folder_goes_before_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("s3dit.weights.hub._fetch", lambda *_: pytest.fail("the Hub was asked"))
    assert resolve("org/name") == Path("org/name")


NAMELESS = (
    "",
    "nothing",
    "/nothing/here",
    "a/b/c",
    "a\\b/c",
    "org/name/../x.safetensors",
    "org/name//x.safetensors",
    "org/name/a\\b.safetensors",
    "org/name/\n.safetensors",
    "org/na--me",
    "org/name.git",
    "órg/name",
    "a/" + "b" * 96,
    "org/name/" + "x" * 5000 + ".safetensors",
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
    monkeypatch.setattr("s3dit.weights.hub._fetch", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(CheckpointError, match="needed a path") as error:
        resolve(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_only_what_is_read_is_fetched(hub):
    """Never other variants, other containers, other folders, or code; and it loads."""
    folder = resolve("org/name")
    assert sorted(hub.files()) == READ
    assert sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()) == READ
    assert open_sources("org/name", {}, None).config == open_sources(EMBEDDED, {}, None).config


def test_parts_that_come_from_elsewhere_are_not_fetched(hub):
    files = {part: str(next((EMBEDDED / part).glob("*.safetensors"))) for part in ("transformer", "text_encoder")}
    open_sources("org/name", files, EMBEDDED / "tokenizer")
    assert [file for file in hub.files() if not file.endswith(".json")] == ["vae/diffusion_pytorch_model.safetensors"]
    assert not any(file.startswith("tokenizer/") for file in hub.files())
    hub.asked.clear()
    hub.repositories["org/other"] = MODEL | OTHERS
    open_sources("embedded", {"transformer": "org/other"}, "org/other")
    weights = [file for file in hub.files() if file.endswith(".safetensors")]
    assert weights == ["transformer/diffusion_pytorch_model.safetensors"]
    assert {file for file in hub.files() if file.startswith("tokenizer/")} == {
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }


INDEXED = {
    "text_encoder/model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": '
    b'"model-00002-of-00002.safetensors"}}',
    "text_encoder/model-00001-of-00002.safetensors": b"1",
    "text_encoder/model-00002-of-00002.safetensors": b"2",
}
SHARDED = {name: data for name, data in MODEL.items() if name != "text_encoder/model.safetensors"} | INDEXED


def test_shards_are_those_of_the_official_index(hub):
    more = {
        "text_encoder/model.fp16-00001-of-00001.safetensors": b"x",
        "text_encoder/model.fp16.safetensors.index.json": b"{}",
        "text_encoder/consolidated.safetensors": b"x",
    }
    hub.repositories["org/name"] = SHARDED | more
    resolve("org/name", ["text_encoder"])
    assert {file for file in hub.files() if file.startswith("text_encoder/")} == {*INDEXED, "text_encoder/config.json"}


def test_an_older_tokenizer_is_fetched_whole(hub):
    del (model := dict(MODEL))["tokenizer/tokenizer.json"]
    hub.repositories["org/name"] = model
    folder = resolve("org/name", ["tokenizer"])
    assert sorted(hub.files()) == ["tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"]
    assert (folder / "tokenizer" / "vocab.json").is_file()


def test_one_part_at_the_root(hub):
    """As the repositories of transformers lie; another variant beside is not fetched, nor the weights for words."""
    root = {name.partition("/")[2]: data for name, data in MODEL.items() if name.startswith(("text_enc", "tokenizer"))}
    hub.repositories["org/qwen"] = root | {"model.fp16.safetensors": b"x", "README.md": b"x"}
    resolve("org/qwen", ["tokenizer"])
    assert sorted(hub.files()) == ["tokenizer.json", "tokenizer_config.json"]
    hub.asked.clear()
    found = open_sources("embedded", {"text_encoder": "org/qwen"}, "org/qwen")
    assert hub.files() == ["config.json", "model.safetensors"] or hub.files() == ["model.safetensors", "config.json"]
    assert found.config.text_encoder == open_sources("embedded", {}, None).config.text_encoder


@pytest.mark.parametrize(
    "files",
    (
        ["split_files/diffusion_models/z.safetensors", "split_files/vae/ae.safetensors", "README.md"],
        ["z-Q4_K_M.gguf", "z-Q8_0.gguf", "README.md"],
        ["a.safetensors", "b.safetensors"],
        ["transformer/a.safetensors", "transformer/b.safetensors"],
    ),
)
def test_another_layout_is_refused_before_a_byte_of_weights(hub, files):
    hub.repositories["org/files"] = dict.fromkeys(files, b"x")
    way = rf"{files[0]}.*--transformer org/files/{files[0]}".replace(".", "[.]").replace("[.]*", ".*")
    with pytest.raises(CheckpointError, match=way) as error:
        resolve("org/files")
    assert not hub.files() and "\n" not in str(error.value)


def test_what_has_no_weights_at_all(hub):
    hub.repositories["org/files"] = {"README.md": b"x", "vae/diffusion_pytorch_model.bin": b"x"}
    for parts in (MODEL_FOLDERS, ["vae"], ["transformer"]):
        with pytest.raises(CheckpointError, match="org/files: .*0 files .*needed one checkpoint; take another"):
            resolve("org/files", parts)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        resolve("org/files", ["tokenizer"])
    assert not hub.files()


def test_one_file_of_a_repository(hub):
    weights = MODEL["transformer/diffusion_pytorch_model.safetensors"]
    hub.repositories["org/files"] = {"split_files/a[1].safetensors": weights, "split_files/a1.safetensors": b"x"}
    found = open_sources("embedded", {"transformer": "org/files/split_files/a[1].safetensors"}, None)
    assert hub.files() == ["split_files/a[1].safetensors"] and found.mixed == ("transformer",)
    with pytest.raises(CheckpointError, match=r"holds no c\.safetensors; needed one of its files: split_files/a1\."):
        resolve("org/files/c.safetensors")


ALL_KINDS = [True, False]


@pytest.mark.parametrize("listed", ALL_KINDS)
@pytest.mark.parametrize("how", ("offline", "unreachable"))
def test_what_diffusers_has_fetched_loads(hub, tmp_path, monkeypatch, how, listed):
    """Its snapshots lack what diffusers does not read; newer huggingface_hub keeps the list of what there would be."""
    model = {name: data for name, data in MODEL.items() if "." in name and not name.startswith(("s3dit", "s", "score"))}
    model |= {name: MODEL[name] for name in MODEL if name.startswith("scheduler/")}
    snapshot = lay(tmp_path / "cache", "org/name", model, [*model, *OTHERS] if listed else None)
    _cut(hub, monkeypatch, how)
    assert resolve("org/name") == snapshot
    assert open_sources("org/name", {}, None).path == snapshot


def _cut(hub, monkeypatch, how):
    """No network: by setting, or because nothing answers."""
    if how == "offline":
        offline(hub, monkeypatch)
        return
    import httpx2

    def fail(*_, **__):
        raise httpx2.ConnectError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", fail)


@pytest.mark.parametrize("how", ("offline", "unreachable"))
def test_a_partial_download_is_called_that(hub, tmp_path, monkeypatch, how):
    part = {name: MODEL[name] for name in ("model_index.json", "transformer/config.json", "vae/config.json")}
    lay(tmp_path / "cache", "org/listed", part, MODEL.keys() | OTHERS.keys())
    lay(tmp_path / "cache", "org/unlisted", part)
    lay(tmp_path / "cache", "org/shard", SHARDED).joinpath("text_encoder/model-00002-of-00002.safetensors").unlink()
    broken = lay(tmp_path / "cache", "org/broken", MODEL)
    (broken / "vae" / "diffusion_pytorch_model.safetensors").resolve().unlink()
    _cut(hub, monkeypatch, how)
    for name, words in (
        ("org/listed", r"missing s3dit.json, scheduler/scheduler_config.json, transformer/.* \(8 of 11 files\)"),
        ("org/unlisted", r"missing transformer/diffusion_pytorch_model.safetensors, text_encoder/model.safetensors, "),
        ("org/shard", r"missing text_encoder/model-00002-of-00002.safetensors \(1 of 13 files\)"),
        ("org/broken", r"missing vae/diffusion_pytorch_model.safetensors \(1 of 11 files\)"),
    ):
        with pytest.raises(CheckpointError, match=f"^{name}: download incomplete: {words}.*run again online") as error:
            resolve(name)
        assert "\n" not in str(error.value)


def test_one_part_of_a_partial_download_is_enough(hub, tmp_path, monkeypatch):
    """As diffusers leaves it behind that fetched only a VAE."""
    vae = {name: data for name, data in MODEL.items() if name.startswith("vae/")}
    snapshot = lay(tmp_path / "cache", "org/name", vae)
    offline(hub, monkeypatch)
    assert open_sources("embedded", {"vae": "org/name"}, None).checkpoints["vae"].path.is_relative_to(snapshot)


def test_a_download_that_breaks_off(hub, monkeypatch):
    """What was fetched is kept; the next run fetches the rest."""
    hub.file_fault = 403
    with pytest.raises(
        CheckpointError, match=r"org/name: download incomplete: missing .* of 11 files\); the Hub refuses access .403"
    ):
        resolve("org/name")
    hub.file_fault = None
    assert (resolve("org/name") / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    offline(hub, monkeypatch)
    resolve("org/name")
    assert not hub.asked


STATUS = (
    (404, "RepoNotFound", "no such repository of a model on the Hub .*check the spelling"),
    (401, "RepoNotFound", "no such repository of a model on the Hub .*private"),
    (403, "GatedRepo", "gated; accept its terms"),
    (401, "", "no such repository|refuses access"),
    (403, "", "refuses access .403.*hf auth login"),
    (500, "", "did not give it .*500"),
    (400, "", "did not give it"),
)


@pytest.mark.parametrize(("status", "code", "words"), STATUS)
def test_every_answer_of_the_hub_is_one_line(hub, status, code, words):
    hub.fault, hub.code = status, code
    with pytest.raises(CheckpointError, match=f"^org/name: .*(?:{words})") as error:
        resolve("org/name")
    told = error.value
    assert "\n" not in str(told) and (told.__suppress_context__ or told.__context__ is None)


def _errors():
    from huggingface_hub import errors

    # The client that makes real responses is another one in each major version of the library.
    response = SimpleNamespace(headers={}, request=None, status_code=429)
    yield errors.LocalEntryNotFoundError("no"), "not whole in the Hugging Face cache.*HF_HUB_OFFLINE"
    yield errors.OfflineModeIsEnabled("no"), "not whole in the Hugging Face cache.*HF_HUB_OFFLINE"
    yield errors.HfHubHTTPError("\nserver on fire\nsecond line", response=response), r"\(server on fire\)"
    yield errors.HFValidationError("bad name"), "did not give it .bad name"
    yield errors.HTTPError("no route"), "was not reached .no route"
    yield TimeoutError("10 seconds"), "was not reached .10 seconds"
    yield OSError(errno.ENOSPC, "No space left on device"), "no room is left on the disk.*HF_HOME"
    yield PermissionError("cache"), "did not give it .cache"
    yield OSError(), r"\(OSError\)"
    yield RuntimeError("Data processing error"), "Data processing error"
    yield KeyError("sha"), "sha"


def test_every_error_of_the_client_is_one_line(hub, monkeypatch):
    for where in ("HfApi.model_info", "snapshot_download"):
        for fault, words in _errors():

            def fail(*_, fault=fault, **__):
                raise fault

            with monkeypatch.context() as patch:
                patch.setattr(f"huggingface_hub.{where}", fail)
                patch.setattr("s3dit.weights.hub._cached", lambda *_: None)
                with pytest.raises(CheckpointError, match=f"^org/name: .*{words}") as error:
                    resolve("org/name")
            told = error.value
            assert "\n" not in str(told) and (told.__suppress_context__ or told.__context__ is None)


OFFLINE = """
from s3dit.weights.hub import resolve
print(resolve("org/name"))
resolve("org/absent")
"""


def test_offline_cache(tmp_path):
    """HF_HOME says where the cache is, HF_HUB_OFFLINE that nobody is asked; what is not there is said to be not there.

    In a process of its own, because huggingface_hub reads its environment once, when it is imported.
    """
    snapshot = lay(tmp_path / "hub", "org/name", MODEL)
    hidden = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "HF_HUB_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.stdout.strip() == str(snapshot), done.stderr
    assert "org/absent" in done.stderr and "not whole in the Hugging Face cache" in done.stderr.splitlines()[-1]


LORA = b"\x02\x00\x00\x00\x00\x00\x00\x00{}"


@pytest.mark.parametrize(
    ("files", "name", "fetched"),
    (
        (["adapter_model.safetensors", "adapter_config.json", "x.safetensors"], "", [0, 1]),
        (["pytorch_lora_weights.safetensors", "README.md", "x.safetensors"], "", [0]),
        (["style v2.safetensors", "README.md", "sample.png"], "", [0]),
        (["sub/adapter_model.safetensors", "sub/adapter_config.json", "adapter_config.json"], "/0", [0, 1]),
        (["a.safetensors", "b.safetensors", "config.json"], "/0", [0, 2]),
        (["diffusion_pytorch_model.safetensors", "config.json", "x.safetensors"], "", [0, 1]),
    ),
)
def test_the_file_of_an_adapter(hub, files, name, fetched):
    # Of other bytes each: what is the same is fetched once.
    hub.repositories["org/lora"] = {file: file.encode() for file in files}
    path = resolve_file("org/lora" + name.replace("0", files[0]))
    assert sorted(hub.files()) == sorted(files[i] for i in fetched)
    # A folder whose config.json says more than the file is given as such.
    assert path.name == Path(files[0]).name or (path / files[0]).is_file() and (path / "config.json").is_file()


def test_a_repository_of_several_adapters(hub):
    hub.repositories["org/lora"] = {"a.safetensors": b"x", "deep/b.safetensors": b"x"}
    words = (
        r"holds 2 files \*\.safetensors \(a\.safetensors, deep/b.*needed one; name it, as in org/lora/a\.safetensors"
    )
    with pytest.raises(CheckpointError, match=words):
        resolve_file("org/lora")
    hub.repositories["org/lora"] = {"README.md": b"x"}
    with pytest.raises(CheckpointError, match=r"holds 0 files .* org/lora/file\.safetensors"):
        resolve_file("org/lora")
    with pytest.raises(CheckpointError, match=r"holds no c\.safetensors"):
        resolve_file("org/lora/c.safetensors")
    assert not hub.files()


def test_an_adapter_in_the_cache(hub, tmp_path, monkeypatch):
    files = {"adapter_model.safetensors": LORA, "adapter_config.json": b"{}"}
    snapshot = lay(tmp_path / "cache", "org/lora", files)
    lay(tmp_path / "cache", "org/half", {"adapter_model.safetensors": LORA}, files)
    offline(hub, monkeypatch)
    assert resolve_file("org/lora") == snapshot / "adapter_model.safetensors"
    assert resolve_file("org/lora/adapter_model.safetensors") == snapshot / "adapter_model.safetensors"
    # Without its settings the adapter would have another strength.
    for name in ("org/half", "org/half/adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match=r"incomplete: missing adapter_config\.json \(1 of 2 files\)"):
            resolve_file(name)


def test_files_here_go_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("s3dit.weights.hub._fetch", lambda *_: pytest.fail("the Hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "x.safetensors").write_bytes(b"x")
    assert resolve_file("loras/x.safetensors") == Path("loras/x.safetensors") and resolve_file("loras") == Path("loras")
    for missing in ("x.safetensors", "loras/y.safetensors", "org/name/x.bin", "org/name/../x.safetensors", "", "/no/x"):
        with pytest.raises(CheckpointError, match=r"no such file or folder; needed the path of a file of weights"):
            resolve_file(missing)


def test_a_pointer_in_the_place_of_weights(hub):
    """What a repository holds that somebody filled without Git LFS."""
    hub.repositories["org/lora"] = {"x.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        read_adapter(resolve_file("org/lora"))


def test_an_adapter_given_where_a_model_may_be(hub):
    """`convert` and `look` take both: without its settings it would have another strength."""
    hub.repositories["org/lora"] = {"adapter_model.safetensors": LORA, "adapter_config.json": b"{}", "README.md": b"x"}
    resolve("org/lora")
    assert sorted(hub.files()) == ["adapter_config.json", "adapter_model.safetensors"]


def looked(capsys, *argv):
    """What `look` says, and the words of its command."""
    from s3dit.cli.main import main

    capsys.readouterr()
    assert main(["inspect", *argv]) == 0
    said = capsys.readouterr().out
    last = said.splitlines()[-1]
    return said, shlex.split(last.removeprefix("use it: s3dit ")) if last.startswith("use it") else []


def drawn(words, tmp_path):
    from s3dit.cli.main import main

    small = ["--height", "64", "--width", "64", "--steps", "1", "--device", "cpu", "--dtype", "fp32"]
    words = [
        word.replace("Tongyi-MAI/Z-Image-Turbo", "embedded").replace("path/to/MODEL", "embedded") for word in words
    ]
    return main([*words, *small, "-o", str(tmp_path / "x.png")])


def test_look_downloads_no_weights(hub, tmp_path, capsys, monkeypatch):
    """Settings only; then the command that it prints draws, and after that the cache alone is looked at."""
    said, words = looked(capsys, "org/name")
    assert "a model on the Hub" in said and "ZImageTransformer2DModel" in said and words[-2:] == ["--model", "org/name"]
    assert hub.files() and all(name.endswith(".json") for name in hub.files())
    assert "tokenizer/tokenizer.json" not in hub.files()
    assert drawn(words, tmp_path) == 0
    hub.asked.clear()
    said, words = looked(capsys, "org/name")
    assert not hub.asked and "nothing, it is a whole model" in said and words[-2:] == ["--model", "org/name"]
    offline(hub, monkeypatch)
    assert looked(capsys, "org/name")[0] == said


def test_look_leaves_the_revision_that_is_there(hub, tmp_path, capsys, monkeypatch):
    """A cache without its transformer still serves, offline, who gives that, after the Hub has a newer revision."""
    from s3dit.weights.hub import resolve

    folder = resolve("org/name", [part for part in MODEL_FOLDERS if part != "transformer"])
    hub.repositories["org/name"] = MODEL | OTHERS | {"new.json": b"{}"}
    said, _ = looked(capsys, "org/name")
    assert "transformer/diffusion_pytorch_model.safetensors" in said
    offline(hub, monkeypatch)
    assert resolve("org/name", ["vae", "text_encoder", "tokenizer"]) == folder


def test_look_offline_at_what_is_not_there(hub, monkeypatch, capsys):
    from s3dit.cli.main import main

    offline(hub, monkeypatch)
    assert main(["inspect", "org/name"]) == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


def test_look_at_parts_files_and_adapters_of_the_hub(hub, tmp_path, capsys):
    weights = {name: data for name, data in MODEL.items() if name.startswith("transformer/")}
    hub.repositories |= {
        "org/part": weights,
        "org/one": {"deep/x.safetensors": weights["transformer/diffusion_pytorch_model.safetensors"]},
        "org/style": {"adapter_model.safetensors": adapter(), "adapter_config.json": b'{"peft_type": "LORA", "r": 4}'},
    }
    said, words = looked(capsys, "org/part")
    assert "parts of a model" in said and words[-2:] == ["--transformer", "org/part"] and drawn(words, tmp_path) == 0
    said, words = looked(capsys, "org/style")
    assert "an adapter on the Hub" in said and words[-2:] == ["--lora", "org/style"]
    assert "adapter_model.safetensors" not in hub.files() and drawn(words, tmp_path) == 0
    assert "rank                 4" in looked(capsys, "org/style")[0]
    said, words = looked(capsys, "org/one/deep/x.safetensors")
    assert "`hf download org/one deep/x.safetensors`" in said and not words
    resolve_file("org/one/deep/x.safetensors")
    said, words = looked(capsys, "org/one/deep/x.safetensors")
    assert words[-2:] == ["--transformer", "org/one/deep/x.safetensors"] and drawn(words, tmp_path) == 0


def test_convert_takes_one_file_of_a_repository(hub, tmp_path, monkeypatch):
    from s3dit.cli.main import main

    hub.repositories["org/one"] = {"deep/x.safetensors": MODEL["transformer/diffusion_pytorch_model.safetensors"]}
    assert main(["convert", "org/one/deep/x.safetensors", str(tmp_path / "a")]) == 0
    assert hub.files() == ["deep/x.safetensors"]
    offline(hub, monkeypatch)
    assert main(["convert", "org/one/deep/x.safetensors", str(tmp_path / "b")]) == 0


def adapter():
    tensors = {
        f"base_model.model.layers.0.attention.to_q.{leaf}.weight": torch.full(shape, 0.01)
        for leaf, shape in (("lora_A", (4, 192)), ("lora_B", (192, 4)))
    }
    return save(tensors)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae", "tokenizer"])
def test_embedded_is_a_name_for_every_part(part, hub):
    """The embedded model's own part, not a repository, beside another model."""
    other = EMBEDDED.parent / "tiny"
    given = {} if part == "tokenizer" else {part: "embedded"}
    found = open_sources(str(other), given, "embedded" if part == "tokenizer" else None)
    whole = open_sources("embedded", {}, None)
    assert found.tokenizer == whole.tokenizer and not hub.asked
    assert {name: one.path for name, one in found.checkpoints.items()} == {
        name: one.path for name, one in whole.checkpoints.items()
    }


@pytest.mark.parametrize("listed", ALL_KINDS)
def test_nobody_is_asked_where_the_cache_holds_what_is_read(hub, tmp_path, monkeypatch, listed):
    """Neither for the model nor for a newer one; a file that is missing is fetched still."""
    import socket

    model = MODEL if listed else {name: MODEL[name] for name in MODEL if name != "s3dit.json"}
    snapshot = lay(tmp_path / "cache", "org/name", model, model if listed else None)
    files = {"adapter_model.safetensors": LORA, "adapter_config.json": b"{}"}
    lora = lay(tmp_path / "cache", "org/lora", files, files)
    with monkeypatch.context() as cut:
        cut.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was used"))
        assert open_sources("org/name", {}, None).path == snapshot
        assert resolve(f"org/name@{snapshot.name}", ["vae"]) == snapshot
        assert resolve_file("org/lora") == resolve_file("org/lora/adapter_model.safetensors") == lora / [*files][0]
    assert not hub.asked
    (snapshot / "vae" / "config.json").unlink()
    assert (resolve("org/name") / "vae" / "config.json").is_file() and hub.asked


def test_a_branch_asks_for_its_newest_revision(hub, tmp_path, monkeypatch):
    old = resolve("org/name")
    hub.repositories["org/name"] = MODEL | OTHERS | {"new.json": b"{}"}
    assert resolve("org/name") == old
    new = resolve("org/name@main")
    assert new != old and resolve("org/name") == new
    assert resolve(f"org/name@{old.name}") == old
    assert resolve("org/name@main/vae/diffusion_pytorch_model.safetensors").is_relative_to(new)
    offline(hub, monkeypatch)
    assert resolve("org/name@main") == new
    for name in ("org/name@", "org/name@..", "org/name@a b"):
        with pytest.raises(CheckpointError, match="no revision; needed a branch, a tag or a commit"):
            resolve(name)


def test_a_part_that_no_list_names_is_asked_for(hub, tmp_path):
    """Of a cache without a list, which holds the weights of every folder that it has, others may be missing."""
    lay(tmp_path / "cache", "org/name", {name: MODEL[name] for name in MODEL if not name.startswith("tokenizer/")})
    assert (resolve("org/name") / "tokenizer" / "tokenizer.json").is_file()
    for i, index in enumerate((b"[]", b"{}", b'{"vae": [null, null]}', b"{")):
        model = {name: MODEL[name] for name in MODEL if name.startswith(("vae/", "scheduler/"))}
        hub.repositories[f"org/odd{i}"] = MODEL
        lay(tmp_path / "cache", f"org/odd{i}", model | {"model_index.json": index})
        hub.asked.clear()
        assert resolve(f"org/odd{i}", ["vae"]) and hub.asked
