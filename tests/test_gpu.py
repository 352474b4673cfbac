"""What only a GPU can show: the kernels compiled at true sizes, NCCL, training, encoding, captions.

    python -m pytest -m gpu tests/test_gpu.py
    TRITON_INTERPRET=1 python -m pytest -m gpu tests/test_gpu.py

The second line rehearses on the CPU: the same tests at small sizes, the kernels interpreted and
gloo for NCCL. tests/test_devices.py runs it (-m slow). CUDA graphs, streams and a second device
have no CPU form; their tests are skipped there. Expected values come from the definition of the
loss in fp64, from the same code on the CPU, or from a second run.
"""

import contextlib
import json
import os
import re
import socket

# cuBLAS gives the same bits twice only with this variable, which it reads at its first call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from test_infonce import (  # noqa: E402
    MASKS,
    assert_as_good_as_plain,
    batch,
    evaluate,
    identical,
    seeded,
)
from test_model import items_of  # noqa: E402
from test_train import (  # noqa: E402
    assert_same_weights,
    events,
    flags_for,
    go,
    losses_of,
    run,
    steps_of,
    weights,
)

import caption  # noqa: E402
import kernels.infonce as infonce  # noqa: E402
import train  # noqa: E402
from embed import encode, top_k  # noqa: E402
from kernels.infonce import info_nce, info_nce_dist, info_nce_ref  # noqa: E402
from model import GVE, to_device  # noqa: E402
from support.cache import FeatureStore  # noqa: E402
from support.files import load_jsonl  # noqa: E402
from support.ranks import (  # noqa: E402
    all_gather_object,
    fail_together,
    join_ranks,
    leave_ranks,
    sum_over_ranks,
)

REHEARSAL = infonce.INTERPRET
DEVICE = "cpu" if REHEARSAL else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not REHEARSAL and not torch.cuda.is_available(),
        reason="no GPU; with TRITON_INTERPRET=1 these tests run on the CPU",
    ),
]
no_cpu_form = pytest.mark.skipif(REHEARSAL, reason="the CPU has no graphs, streams or peers")

SCALE = 33.3
# A tile is 128 x 256 (interpreted: 32 x 64), and no side is a multiple of it.
N, M = (40, 70) if REHEARSAL else (300, 550)
# TMA reads multiples of 8; other D go through pointers. The largest two are the models'.
DIMS = [77, 200] if REHEARSAL else [77, 200, 1537, 2048, 3584]
HALF = [torch.float16, torch.bfloat16]


@pytest.fixture
def deterministic():
    """Let torch take deterministic kernels, and raise an error where it has none."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def no_waiting():
    """Raise an error where the host waits for the GPU."""
    if REHEARSAL:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def unit_rows(n, D, dtype=torch.bfloat16, seed=0):
    """Return random unit rows (n, D) on the device."""
    rows = torch.randn(n, D, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)
    return F.normalize(rows, dim=1).to(dtype)


def run_kernels(q, d, dtype, scale=SCALE, device=DEVICE, **kw):
    """Return [loss, dq, dd, dscale] of the Triton kernels."""
    return evaluate(info_nce, q, d, scale, dtype, device, impl="triton", **kw)


# The kernels against the definition


@pytest.mark.parametrize("blocks", ["one block", "many blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("D", DIMS)
def test_kernels_equal_the_definition_at_true_tile_sizes(D, dtype, blocks, monkeypatch):
    if blocks == "many blocks":
        monkeypatch.setattr(infonce, "WORKSPACE", 256 * 256 * 4)
        monkeypatch.setattr(infonce, "CPU_BLOCK", 48)

    # masks, candidates, symmetric, whether some rows share a target and some are ignored
    cases = [
        ("none", N, True, False),
        ("ids", M, True, True),
        ("margin", M, False, False),
        ("all", M, True, True),
        ("all", N, False, True),
    ]
    for seed, case in enumerate(cases):
        masks, candidates, symmetric, shared = case
        q, d, kw = batch(N, candidates, D, seed, MASKS[masks], shared, ignored=shared)
        kw |= dict(symmetric=symmetric, reduction="none", impl="triton", device=DEVICE)
        assert_as_good_as_plain(q, d, SCALE, dtype, f"D {D} {dtype} {blocks} {case}", **kw)


def shifted(x):
    """Return x as a view whose first element is not aligned to 16 bytes."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def odd_rows(x):
    """Return x as a view with rows one element longer than they are wide."""
    return F.pad(x, (0, 1))[:, :-1]


def padded_rows(x):
    """Return x as a view with rows that are 8 elements longer."""
    return F.pad(x, (0, 8))[:, :-8]


def every_second(x):
    """Return x as every second row of a longer matrix."""
    return x.repeat_interleave(2, 0)[::2]


def transposed(x):
    """Return x as a view with neighbours in a column, not in a row."""
    return x.T.contiguous().T


# (view, can TMA read it?); transposed matrices are copied first.
VIEWS = [
    (shifted, False),
    (odd_rows, False),
    (padded_rows, True),
    (every_second, True),
    (transposed, True),
]


@pytest.mark.parametrize("view,tma", VIEWS, ids=lambda x: getattr(x, "__name__", None))
def test_kernels_read_any_address_and_strides(view, tma):
    q, d, _ = batch(N, M, 200)
    straight = run_kernels(q, d, torch.float16)
    x = q.to(DEVICE, torch.float16)
    assert torch.equal(view(x), x)
    if REHEARSAL or torch.cuda.get_device_capability()[0] >= 9:
        assert infonce._prepare_launch(view(x), x).settings["TMA"] == tma
        assert infonce._prepare_launch(x, x).settings["TMA"]

    def seen_through(of_q, of_d):
        def loss(q, d, scale, **kw):
            return info_nce(of_q(q), of_d(d), scale, **kw)

        return evaluate(loss, q, d, SCALE, torch.float16, DEVICE, impl="triton")

    def as_it_is(x):
        return x

    for result in (
        seen_through(view, as_it_is),
        seen_through(as_it_is, view),
        seen_through(view, view),
    ):
        for a, b in zip(straight, result, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_kernels_equal_the_twin_on_70k_by_70k_and_the_host_never_waits():
    """Past 2^31 logits and in bounded memory."""
    rows, D = (300, 40) if REHEARSAL else (70_000, 96)
    dtype = torch.float16 if REHEARSAL else torch.bfloat16
    q = unit_rows(rows, D, dtype, seed=0)
    d = unit_rows(rows, D, dtype, seed=1)
    ids = torch.arange(rows, device=DEVICE) // 2
    q_ids = torch.arange(rows, device=DEVICE) // 3

    def both_passes(impl):
        own_q = q.clone().requires_grad_()
        own_d = d.clone().requires_grad_()
        loss = info_nce(own_q, own_d, SCALE, ids=ids, q_ids=q_ids, margin=0.1, impl=impl)
        loss.backward()
        return [loss.detach(), own_q.grad, own_d.grad]

    first = both_passes("triton")  # compiles the kernels
    twin = both_passes("torch")
    if not REHEARSAL:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with no_waiting():
        again = both_passes("triton")
    if not REHEARSAL:
        assert torch.cuda.max_memory_allocated() - before < 1.5e9

    assert identical(first, again)
    for a, b in zip(first, twin, strict=True):
        assert (a.float() - b.float()).abs().max() <= 0.01 * b.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_kernels_give_the_same_bits_twice(dtype):
    """Shared targets add up in a fixed order, too."""
    q, d, kw = batch(N, M, 200, 1, MASKS["all"], shared=True, ignored=True)
    first = run_kernels(q, d, dtype, **kw)
    for _ in range(3):
        assert identical(first, run_kernels(q, d, dtype, **kw))


def test_autocast_does_not_change_the_kernels():
    q, d, kw = batch(N, M, 200, 1, MASKS["all"])
    plain = run_kernels(q, d, torch.float32, **kw)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert identical(plain, run_kernels(q, d, torch.float32, **kw))


# 77 goes through pointers, 200 through TMA.
@no_cpu_form
@pytest.mark.parametrize("D", [77, 200])
def test_a_cuda_graph_of_both_passes_replays_with_new_inputs(D):
    q = unit_rows(N, D, seed=0).requires_grad_()
    d = unit_rows(M, D, seed=1).requires_grad_()
    ids = torch.arange(M, device="cuda") // 2
    q_ids = torch.arange(N, device="cuda") // 3

    def both_passes():
        q.grad = d.grad = None
        loss = info_nce(q, d, SCALE, ids=ids, q_ids=q_ids, margin=0.1, impl="triton")
        loss.backward()
        return loss.detach()

    # Compile and fill the caches on a stream of its own, as torch.cuda.graph does.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            both_passes()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = both_passes()
    in_graph = [loss, q.grad, d.grad]

    for seed in (2, 4):
        with torch.no_grad():
            q.copy_(unit_rows(N, D, seed=seed))
            d.copy_(unit_rows(M, D, seed=seed + 1))
        ids.copy_(torch.arange(M, device="cuda") // seed)
        graph.replay()
        replayed = [x.clone() for x in in_graph]
        eager = [both_passes(), q.grad, d.grad]
        for a, b in zip(replayed, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)


@no_cpu_form
def test_two_streams_at_once_do_not_disturb_each_other():
    pairs = []
    for seed in (0, 2):
        pairs.append((unit_rows(3000, 200, seed=seed), unit_rows(5000, 200, seed=seed + 1)))

    def both_passes(q, d):
        q = q.detach().requires_grad_()
        d = d.detach().requires_grad_()
        loss = info_nce(q, d, SCALE, margin=0.1, impl="triton")
        loss.backward()
        return loss.detach(), q.grad, d.grad

    alone = [both_passes(*pair) for pair in pairs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(10):
        together = []
        for stream, pair in zip(streams, pairs, strict=True):
            with torch.cuda.stream(stream):
                together.append(both_passes(*pair))
        torch.cuda.synchronize()
        for expected, result in zip(alone, together, strict=True):
            assert identical(expected, result)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_kernels_run_on_a_device_that_is_not_the_current_one():
    q, d, kw = batch(N, M, 200, 1, MASKS["all"])
    for dtype in (torch.float32, torch.bfloat16):
        with torch.cuda.device(0):
            here = run_kernels(q, d, dtype, device="cuda:0", **dict(kw))
            there = run_kernels(q, d, dtype, device="cuda:1", **dict(kw))
        assert identical(here, there)


def test_the_triton_tests_of_infonce_pass_compiled():
    """All masks, poisoned buffers, offsets past 2^31: tests/test_infonce.py on this device."""
    chosen = "triton and not interpreter" if not REHEARSAL else "triton and (strides or frozen)"
    options = ["--noconftest", "-p", "no:cacheprovider", "-k", chosen]
    done = run("-m", "pytest", *options, "tests/test_infonce.py")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= (2 if REHEARSAL else 25), done.stdout[-8000:]


# One rank over NCCL


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_rank(_, port):
    """Join a group of one, and put every collective that the project uses through it."""
    os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    rank, world, device = join_ranks(DEVICE)
    assert (rank, world, device.type) == (0, 1, DEVICE)
    if not REHEARSAL:
        assert "nccl" in dist.get_backend_config()

    # Objects, errors and sums
    assert all_gather_object({"a": 1}) == [{"a": 1}]
    with pytest.raises(ValueError, match="on purpose"), fail_together():
        raise ValueError("on purpose")
    parameter = torch.ones(3, device=device, requires_grad=True)
    parameter.sum().backward()
    sums = sum_over_ranks([parameter], {"rows": torch.tensor(5, device=device)})
    assert sums == {"rows": 5.0}
    assert torch.equal(parameter.grad, torch.ones_like(parameter))

    # The kernel's own collectives
    q, d, _ = batch(24, 40, 64)
    q = q.to(device, torch.float32)
    d = d.to(device, torch.float32)
    assert torch.equal(infonce._all_gather(d), d)
    assert torch.equal(infonce._reduce_scatter(d), d)

    # Both losses against the definition
    ids = torch.arange(40, device=device) // 2
    q_ids = torch.arange(24, device=device) // 3
    options = dict(q_ids=q_ids, margin=0.1)
    expected = info_nce_ref(q.double(), d.double(), SCALE, ids=ids, **options)
    parts = [x.clone().requires_grad_() for x in (q, d[:24], d[24:])]
    fused = info_nce_dist(
        parts[0], parts[1], SCALE, n=parts[2], p_ids=ids[:24], n_ids=ids[24:], **options
    )
    plain = train.contrastive_loss(*parts, ids[:24], ids[24:], tau=1 / SCALE, **options)
    gradients = []
    for loss in (fused, plain):
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        gradients.append(torch.autograd.grad(loss, parts))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    leave_ranks()


def test_one_rank_over_nccl_computes_both_losses():
    torch.multiprocessing.spawn(one_rank, (free_port(),), 1)


def flags_here(tiny, mixture, out, *more):
    """Return train.py's flags for a small run on DEVICE."""
    return flags_for(tiny, mixture, out, "--schedule uniform --device", DEVICE, *more)


def test_torchrun_with_one_rank_trains_over_nccl_as_without_it(tiny, mixture, tmp_path):
    more = "--dtype float64 --steps 3 --dropout 0 --fused on"
    alone = flags_here(tiny, mixture, tmp_path / "alone", more)
    go(*alone)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1]
    done = run(*torchrun, "train.py", *flags_here(tiny, mixture, tmp_path / "rank", more))
    assert done.returncode == 0, done.stderr[-4000:]

    losses = losses_of(tmp_path / "alone")
    assert len(losses) == 3
    assert losses_of(tmp_path / "rank") == pytest.approx(losses, rel=1e-4)


# Training


@pytest.mark.parametrize("fused", ["on", "off"])
def test_a_step_in_bfloat16_moves_every_lora_tensor_and_nothing_else(
    tiny, mixture, tmp_path, fused
):
    start = GVE.from_pretrained(tiny, dtype="bfloat16").state_dict()
    torch.manual_seed(42)
    untrained = GVE.from_pretrained(tiny, dtype="bfloat16", lora={"lora_dropout": 0.1})
    fresh = {name: p.detach().clone() for name, p in untrained.lora_parameters().items()}

    more = "--dtype bfloat16 --lr 3e-5 --steps 3 --warmup 0 --checkpointing --grad-cache"
    gve = go(*flags_here(tiny, mixture, tmp_path, more, f"--fused {fused}"))
    assert gve.device.type == DEVICE

    moved = gve.lora_parameters()
    assert moved.keys() == fresh.keys()
    for name, p in moved.items():
        assert p.dtype == torch.float32, name
        assert p.isfinite().all(), name
        assert not torch.equal(p.cpu(), fresh[name]), f"{name} stood still"

    # The base's weights, under the names that they have without peft
    frozen = 0
    for name, p in gve.named_parameters():
        if ".lora_" in name:
            continue
        name = name.removeprefix("backbone.base_model.model.").replace(".base_layer", "")
        assert torch.equal(p.cpu(), start["backbone." + name.removeprefix("backbone.")]), name
        frozen += 1
    assert frozen == len(start)


def curve(out):
    """Return (source, loss, gradient norm) of each step in a run's log."""
    steps = events(load_jsonl(out / "log.jsonl"), "step")
    return [(line["source"], line["loss"], line["grad_norm"]) for line in steps]


def test_training_follows_the_cpu(tiny, mixture, tmp_path):
    """Six steps in float64, and the first one in float32 with the kernel.

    Longer float32 runs diverge: AdamW makes as large a step for a gradient of 1e-7 as for one of 1.
    """
    more = "--dtype float64 --steps 6 --dropout 0 --fused off"
    go(*flags_for(tiny, mixture, tmp_path / "cpu", "--schedule uniform", more, "--device cpu"))
    go(*flags_here(tiny, mixture, tmp_path / "here", more))
    go(*flags_here(tiny, mixture, tmp_path / "fused", "--steps 6 --dropout 0 --fused on"))
    expected = curve(tmp_path / "cpu")
    assert len(expected) == 6
    for ours, theirs in zip(curve(tmp_path / "here"), expected, strict=True):
        assert ours[0] == theirs[0]
        assert ours[1:] == pytest.approx(theirs[1:], rel=1e-4)
    first = curve(tmp_path / "fused")[0]
    assert first[0] == expected[0][0]
    assert first[1:] == pytest.approx(expected[0][1:], rel=1e-3)


def test_grad_cache_replays_dropout(tiny, mixture, tmp_path):
    """Dropout masks come from the device's own generator: replayed graphs must agree with kept."""
    same = "--dtype float64 --steps 3 --micro-batch 2 --dropout 0.3 --fused off"
    go(*flags_here(tiny, mixture, tmp_path / "kept", same))
    go(*flags_here(tiny, mixture, tmp_path / "cached", same, "--grad-cache"))
    kept = weights(tmp_path / "kept")
    cached = weights(tmp_path / "cached")
    for name, tensor in kept.items():
        # float64: only another mask could move a weight by more
        assert (tensor - cached[name]).abs().max() <= 1e-6 * tensor.abs().max(), name


class Stopped(Exception):
    """Ends a run in the middle of a step, as a kill would."""


def stop_and_resume(flags, step, monkeypatch):
    """Stop a run in its step number `step` and resume it from the last state."""
    done = []

    def stop_here(parameters, sums):
        done.append(1)
        if len(done) == step:
            raise Stopped
        return sum_over_ranks(parameters, sums)

    with monkeypatch.context() as patch:
        patch.setattr(train, "sum_over_ranks", stop_here)
        with pytest.raises(Stopped):
            go(*flags)
    go(*flags, "--resume", "auto")


RESUMED = "--steps 6 --save-every 2 --dropout 0.1 --fused on --dtype bfloat16"


def test_a_run_resumes_bit_for_bit_with_deterministic_kernels(
    tiny, mixture, tmp_path, monkeypatch, deterministic
):
    go(*flags_here(tiny, mixture, tmp_path / "whole", RESUMED))
    flags = flags_here(tiny, mixture, tmp_path / "resumed", RESUMED)
    stop_and_resume(flags, 4, monkeypatch)
    assert_same_weights(tmp_path / "resumed", tmp_path / "whole")
    assert steps_of(tmp_path / "resumed") == steps_of(tmp_path / "whole")


def test_a_run_resumes_closely_without_deterministic_kernels(tiny, mixture, tmp_path, monkeypatch):
    """On a GPU the backward pass of attention adds up in any order: only last digits may differ.

    That holds for the flash and memory-efficient kernels; use_deterministic_algorithms takes slower
    ones. All else in a step has a fixed order. A larger learning rate would amplify the difference.
    """
    go(*flags_here(tiny, mixture, tmp_path / "whole", RESUMED, "--lr 1e-4"))
    flags = flags_here(tiny, mixture, tmp_path / "resumed", RESUMED, "--lr 1e-4")
    stop_and_resume(flags, 4, monkeypatch)
    losses = losses_of(tmp_path / "whole")
    assert len(losses) == 6
    assert losses_of(tmp_path / "resumed") == pytest.approx(losses, rel=2e-2)


# Encoding, ranking, captions


def model_with_lora(tiny, dtype, device=DEVICE):
    """Load the tiny model with a LoRA adapter that changes its vectors."""
    torch.manual_seed(0)
    gve = GVE.from_pretrained(tiny, dtype=dtype, lora=True)
    generator = seeded(1)
    with torch.no_grad():
        for name, p in gve.lora_parameters().items():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return gve.to(device).eval()


def test_vectors_equal_those_of_the_cpu_to_rounding(tiny, media):
    kinds = items_of(media)
    items = kinds["text"] + kinds["image"] + kinds["video"] + kinds["mixed"]

    def vectors(dtype, device):
        made, failed = encode(model_with_lora(tiny, dtype, device), items, batch_tokens=400)
        assert not failed
        return made

    exact = vectors("float32", "cpu")
    assert (vectors("float32", DEVICE) - exact).abs().max() < 1e-4

    # In bf16 a GPU may err as the CPU does. Means, since the largest error is a matter of luck.
    rounding = (vectors("bfloat16", "cpu") - exact).abs().mean()
    error = (vectors("bfloat16", DEVICE) - exact).abs().mean()
    assert error <= 2 * rounding, f"{error} beside the CPU's {rounding}"
    assert rounding < 0.02


def test_the_feature_store_changes_no_vector(tiny, media, tmp_path):
    items = items_of(media)["mixed"] + items_of(media)["video"]
    gve = model_with_lora(tiny, "bfloat16")
    collate = gve.collator(store=FeatureStore(tmp_path))

    @torch.no_grad()
    def embed_with_store():
        batch = gve.encode_vision(to_device(collate(items), gve.device))
        collate.store.keep(batch)
        return gve(batch)

    with torch.no_grad():
        plain = gve(to_device(gve.collator()(items), gve.device))
    assert torch.equal(embed_with_store(), plain), "computed and kept"
    assert list(tmp_path.rglob("*.safetensors"))
    gve.core.visual.forward = None  # may not be called any more
    assert torch.equal(embed_with_store(), plain), "from the store"


def test_ranking_and_mining_equal_those_of_the_cpu():
    rows, D = 300, 40
    g = seeded(3)
    # Small whole numbers: every product is exact, and many scores are equal.
    q = torch.randint(-3, 4, (rows, D), generator=g).float()
    d = torch.randint(-3, 4, (rows, D), generator=g).float()
    d[7] = d[3]
    expected = top_k(q, d, 20, block=128)
    assert identical(expected, top_k(q.to(DEVICE), d, 20, block=128))
    assert identical(expected, top_k(q.to(DEVICE), d.to(DEVICE), 20, block=128))

    q = F.normalize(q.double(), dim=1)
    d = F.normalize(d.double(), dim=1)
    ids = torch.randint(0, 200, (rows,), generator=g)
    q_ids = torch.randint(0, 100, (rows,), generator=g)
    mined = train.mine(q, d, ids, 5, 0.1, q_ids=q_ids)
    here = train.mine(q.to(DEVICE), d.to(DEVICE), ids, 5, 0.1, q_ids=q_ids)
    assert torch.equal(here.cpu(), mined)


def test_a_captioner_answers_on_this_device(media):
    ask = caption.transformers_captioner(
        "mini/base", frames=2, max_tokens=16, max_new_tokens=8, device=DEVICE, workers=0
    )
    requests = []
    for name in ("a.mp4", "wide.mp4"):
        shown = [{"video": str(media / name)}]
        want = {"caption": (1, 8)}
        requests.append({"media": shown, "prompt": "Say it.", "want": want, "plain": True})
    for reply in ask(requests):
        assert reply.failure is None
        assert reply.text.strip() and 0 < reply.tokens_written <= 8


def test_embed_py_decodes_in_processes_forked_while_the_device_is_in_use(tiny, media, tmp_path):
    """A decoder must not touch the GPU, which a forked process cannot use."""
    items = items_of(media)["mixed"] + items_of(media)["video"]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    out = ["--out", tmp_path / "out", "--root", media, "--device", DEVICE, "--workers", 2]
    done = run("embed.py", tmp_path / "items.jsonl", "--ckpt", tiny, *out)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "error" not in (tmp_path / "out" / "items.jsonl").read_text()
