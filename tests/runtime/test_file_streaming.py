"""A budget of a process on a CPU: blocks compute in their file and leave memory, with the same bits."""

import sys
from pathlib import Path

import pytest
import torch

from s3dit import Pipeline
from s3dit.errors import BackendError, RequestError
from s3dit.runtime import budget
from s3dit.runtime.block_streaming import tensors
from s3dit.runtime.budget import PROCESS, Need, budget_of
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.file_streaming import FileStreamer, stream_files

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
from mapped_pages import held  # noqa: E402

REQUEST = {"prompt": "a red star", "seed": 1, "height": 64, "width": 64, "num_inference_steps": 2}


@pytest.fixture(autouse=True)
def small_process(monkeypatch):
    """The process counts as one that has drawn nothing yet, however many tests it has run."""
    monkeypatch.setattr(budget, "resident", lambda: 0)


def load(more=None, **options):
    """A pipeline; more: MiB of --ram besides those that are set aside for the process."""
    return Pipeline.load(device="cpu", **({} if more is None else {"ram": PROCESS + int(more * 2**20)}), **options)


@pytest.fixture(scope="module")
def expected():
    """Latents without a budget, by dtype."""
    return {
        d: Pipeline.load(device="cpu", dtype=d)(**REQUEST, output_type="latent").latents[0] for d in ("bf16", "fp32")
    }


def watched(pipe):
    """Bytes of each block that was streamed, while it computes and after, as two lists that fill while pipe draws."""
    during, after = [], []
    for block in pipe.parts.component("transformer").streamer._blocks:
        own = [tensor for *_, tensor in tensors(block)]
        # The end of the block's own forward, when its tensors may be casts, and then its streamer has left it.
        block.feed_forward.register_forward_hook(lambda *_, own=own: during.append(held(*own)))
        block.register_forward_hook(lambda *_, own=own: after.append(held(*own)))
    return during, after


@pytest.mark.parametrize("dtype, more", [("bf16", 9.5), ("fp32", 11)])
def test_blocks_leave_memory_and_the_bits_are_the_same(expected, dtype, more):
    pipe = load(more, dtype=dtype)
    plan = pipe.plan(**REQUEST, output_type="latent")
    assert plan.memory.mode == "staged" and 0 < plan.memory.kept["transformer"] < 8
    assert torch.equal(pipe(plan).latents[0], expected[dtype])
    streamer = pipe.parts.component("transformer").streamer
    (during, after), before = watched(pipe), streamer.copies
    assert torch.equal(pipe(plan).latents[0], expected[dtype])
    (stage,) = (stage for stage in plan.stages if stage.part == "transformer")
    assert isinstance(streamer, FileStreamer) and streamer.copies - before == len(after) > 0
    assert not any(after), "each block has left when the next one begins"
    assert dtype == "fp32" or all(during), "where nothing is cast, it computes in its file"
    assert stage.again and stage.again < stage.reads


def test_without_giving_back_all_of_it_would_stay(monkeypatch):
    """That the test above can fail."""
    monkeypatch.setattr("s3dit.runtime.file_streaming.give_back", lambda *_: None)
    pipe = load(9.5, dtype="bf16")
    pipe(**REQUEST, output_type="latent")
    _, after = watched(pipe)
    pipe(**REQUEST, output_type="latent")
    assert after and all(after)


def test_what_a_user_changes_is_used_and_stays():
    """In place, between two pictures, in a streamed block and in the same of a pipeline that is not streamed."""
    pictures = []
    for pipe in (load(9.5, dtype="bf16"), load(dtype="bf16", residency="resident")):
        transformer = pipe.transformer
        pipe(**REQUEST, output_type="latent")
        with torch.no_grad():
            transformer.layers[1].attention.to_q.weight.mul_(0.5)
            transformer.layers[2].attention.to_k.weight = torch.nn.Parameter(
                torch.zeros_like(transformer.layers[2].attention.to_k.weight), requires_grad=False
            )
        pictures += [pipe(**REQUEST, output_type="latent").latents[0] for _ in range(2)]
    assert all(torch.equal(picture, pictures[0]) for picture in pictures[1:])


def test_gradients_flow_through_streamed_blocks():
    """To a parameter that is cast on the way, as to one that is not streamed; and a stop leaves the file's tensors."""

    def model():
        torch.manual_seed(0)
        made = torch.nn.Sequential(torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3)))
        return made.bfloat16().requires_grad_(False)

    def run(made, x):
        for layer in made[0]:
            x = layer(x)
        return x.sum()

    plain, streamed = model().float(), model()
    stream_files(streamed, 0, torch.float32)
    for made in (plain, streamed):
        made[0][1].weight.requires_grad_(True)
        run(made, torch.ones(4)).backward()
    assert torch.allclose(plain[0][1].weight.grad, streamed[0][1].weight.grad.float(), rtol=1e-2)
    homes = [tensor for *_, tensor in tensors(streamed)]
    with pytest.raises(RuntimeError, match="shape"):
        run(streamed, torch.ones(5))
    assert all(a is b for a, b in zip(homes, (tensor for *_, tensor in tensors(streamed)), strict=True))


def test_uneven_blocks_are_counted_as_they_are():
    need = Need(10, (50, 50, 400, 50), ((None, 5),), passing=1)
    # Kept are the last, then every other one, then all but the first.
    assert [need.held(k) for k in range(5)] == [10 + 400, 60 + 400, 110 + 400, 510 + 50, 560]
    assert Need(10, (50, 50), ((None, 5),), 1, stays=30).held(0) == 90
    assert Need(10, (50, 50), ((None, 5),), 1, stays=300).held(0) == 110, "never more than all of it"


def test_what_is_encoded_while_it_is_loaded_stays(tmp_path):
    """A view of a file leaves memory, codes that were made in memory do not, and count."""
    from s3dit.kernels.schemes import SCHEMES
    from s3dit.weights.quantize import quantize

    quantize(EMBEDDED, tmp_path / "int8", {"transformer": SCHEMES["int8"]}, version="test")
    made, stored = (Pipeline.load(m, device="cpu", quantize=q) for m, q in ((None, "int8"), (tmp_path / "int8", None)))
    stays, none = (pipe.parts.need("transformer").stays for pipe in (made, stored))
    codes = sum(t.nbytes for *_, t in tensors(made.parts["transformer"].layers) if t.dtype == torch.int8)
    assert none == 0 and stays >= codes
    assert Pipeline.load(device="cpu", disable_mmap=True).parts.need("transformer").stays > codes


@pytest.mark.parametrize(
    "error, message, given",
    [
        (RequestError, "both vram and ram are given", ("1GiB", "1GiB", None, "cpu")),
        (RequestError, "both ram and residency streamed are given", (None, "1GiB", "streamed", "cpu")),
        (RequestError, "ram is 'some'; needed a size such as 4GiB", (None, "some", None, "cpu")),
        (RequestError, "ram is 4; needed a size with its unit", (None, "4", None, "cpu")),
        (
            BackendError,
            "ram is a budget for computing on a CPU, and this is cuda; give vram",
            (None, "1GiB", None, "cuda"),
        ),
    ],
)
def test_what_is_refused(error, message, given):
    with pytest.raises(error, match=message):
        budget_of(*given)


def test_the_least_is_said_and_does(expected):
    with pytest.raises(BackendError, match=r"the smallest budget is [\d.]+ MiB") as refused:
        load(1, dtype="bf16").plan(**REQUEST, output_type="latent")
    least = str(refused.value).split("smallest budget is ")[1].split(" (")[0].replace(" ", "")
    pipe = Pipeline.load(device="cpu", dtype="bf16", ram=least)
    assert torch.equal(pipe(**REQUEST, output_type="latent").latents[0], expected["bf16"])


def test_a_process_that_holds_more_has_less_left(monkeypatch, tmp_path):
    monkeypatch.setattr(budget, "resident", lambda: 3 << 30)
    assert budget_of(None, "4GiB", None, "cpu").reserve == (3 << 30) + budget.PROCESS_ROOM
    monkeypatch.setattr(budget, "PAGEMAP", tmp_path / "none")
    with pytest.raises(BackendError, match="leave ram out"):
        budget_of(None, "4GiB", None, "cpu")
    monkeypatch.undo()
    assert 50 << 20 < budget.resident() < 1 << 40
