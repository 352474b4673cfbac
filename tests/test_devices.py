"""Two devices on a machine that has one: the programs run on a stand-in for a GPU, on the CPU.

python -m pytest tests/test_devices.py
    training, encoding and ranking: nothing mixes the devices, and the numbers are the CPU's
python -m pytest -m slow tests/test_devices.py
    tests/test_gpu.py rehearsed, its kernels interpreted

A tensor on the stand-in reports torch's "meta" device, which no CPU kernel accepts, and holds a CPU
tensor with which its operations are computed. An operation on tensors of both devices raises an
error, as on a GPU. The stand-in cannot show what else differs on CUDA: streams, the random
generator, the kernels.
"""

import contextlib
import re

import pytest
import torch
from test_infonce import MASKS, batch, identical, seeded
from test_model import items_of
from test_train import flags_for, go, run, steps_of, weights
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import train
from embed import encode, top_k
from kernels.infonce import info_nce
from model import GVE, to_device
from support.cache import FeatureStore

FAR = torch.device("meta")


class Far(torch.Tensor):
    """A tensor on the stand-in: `held` has its values."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=FAR,
        )

    def __init__(self, held):
        self.held = held

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with ComputeOnCpu():
            return func(*args, **(kwargs or {}))


class ComputeOnCpu(TorchDispatchMode):
    """Compute operations of Far tensors with the tensors that they hold.

    The result is Far if an argument is, or if device=FAR asks for it.
    """

    # A real GPU, too, takes these arguments from the CPU: sources of copies, and indices.
    COPIES = ("aten::_to_copy", "aten::copy_")
    INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        far = [x for x in tensors if isinstance(x, Far)]
        near = [x for x in tensors if not isinstance(x, Far) and x.dim() > 0]

        indices_alone = name in self.INDEXING and isinstance(args[0], Far)
        if far and near and name not in self.COPIES and not indices_alone:
            raise RuntimeError(f"{name}: tensors on the CPU and on the device")

        is_far = bool(far)
        if kwargs.get("device") is not None:
            is_far = kwargs["device"].type == FAR.type
            kwargs["device"] = torch.device("cpu")
        if name == "aten::copy_":
            is_far = isinstance(args[0], Far)

        known = {id(x.held): x for x in far}  # in-place operations return their argument

        def unwrap(x):
            return x.held if isinstance(x, Far) else x

        def wrap(x):
            if not isinstance(x, torch.Tensor) or not is_far:
                return x
            return known[id(x)] if id(x) in known else Far(x)

        args, kwargs = tree_map(unwrap, (args, kwargs))
        return tree_map(wrap, func(*args, **kwargs))


class MakeFromNumbers(TorchFunctionMode):
    """Make tensors from Python numbers on the CPU first: made on meta they would have no values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None:
            return func(*args, **kwargs | {"device": None}).to(device)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            if isinstance(args[1], list):
                args = (args[0], torch.tensor(args[1], dtype=torch.int64), *args[2:])
        return func(*args, **kwargs)


@contextlib.contextmanager
def second_device(monkeypatch):
    """Let FAR be a device whose tensors have values."""
    load = GVE.from_pretrained

    def load_first(path, *, device, **options):
        # transformers prepares models on the meta device, without values, and must go on doing so.
        with _disable_current_modes():
            gve = load(path, **options)
        return gve.to(device).eval()

    def no_autocast(device_type, dtype=None, enabled=True):
        assert not enabled or device_type != FAR.type, "float32 alone"
        return contextlib.nullcontext()

    with monkeypatch.context() as patch, ComputeOnCpu(), MakeFromNumbers():
        patch.setattr(torch, "autocast", no_autocast)
        patch.setattr(GVE, "from_pretrained", load_first)
        yield


def test_the_stand_in_raises_as_a_gpu_would(monkeypatch):
    with second_device(monkeypatch):
        far = torch.arange(6, device=FAR).float()
        near = torch.arange(6).float()
        for mixed in (
            lambda: far + near,
            lambda: torch.cat([far, near]),
            lambda: near[far.long()],
            lambda: far.masked_fill(near > 2, 0),
            lambda: near.add_(far),
            lambda: far.numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                mixed()
        assert torch.equal((far + 1).cpu(), near + 1)
        assert (far[near.long()][[2, 4]] * torch.tensor(2)).tolist() == [4, 8]
        assert torch.tensor([3.0], device=FAR).item() == 3
        assert isinstance(far.to(FAR, non_blocking=True), Far)


def test_training_on_a_second_device_gives_the_numbers_of_the_cpu(
    tiny, mixture, tmp_path, monkeypatch
):
    """Probing, mining, features on disk, GradCache, the twin of the kernel, saving, resuming.

    In float64, since attention adds up in another order on the stand-in.
    """
    same = (
        "--dtype float64 --steps 2 --epochs 1 --seed 900 --remine --probe-pairs 2 --grad-cache "
        "--frames 2 --max-tokens 6 --device cpu"
    )
    go(*flags_for(tiny, mixture, tmp_path / "cpu", same, "--fused off"))
    flags = flags_for(tiny, mixture, tmp_path / "far", same, "--fused on")
    flags += ["--features", tmp_path / "features"]
    monkeypatch.setattr(train, "join_ranks", lambda device: (0, 1, FAR))
    with second_device(monkeypatch):
        gve = go(*flags)
        go(*flags, "--resume", "auto")
    assert gve.device == FAR
    assert any((tmp_path / "features").iterdir())
    assert [source for *_, source in steps_of(tmp_path / "far")] == ["t2v", "ti2v"]
    assert steps_of(tmp_path / "far") == steps_of(tmp_path / "cpu")
    ours = weights(tmp_path / "far")
    for name, tensor in weights(tmp_path / "cpu").items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-9)


def test_encoding_and_ranking_on_a_second_device_give_the_numbers_of_the_cpu(
    tiny, media, tmp_path, monkeypatch
):
    items = [item for kind in items_of(media).values() for item in kind]
    near, _ = encode(GVE.from_pretrained(tiny, dtype="float64"), items, batch_tokens=400)
    with second_device(monkeypatch):
        gve = GVE.from_pretrained(tiny, dtype="float64", device=FAR)
        far, failed = encode(gve, items, batch_tokens=400)
        collate = gve.collator(store=FeatureStore(tmp_path))
        for _ in range(2):  # features computed and kept, then read from the store
            batch = gve.encode_vision(to_device(collate(items), FAR))
            collate.store.keep(batch)
        with torch.no_grad():
            stored = gve(batch).cpu()
        ranked = top_k(far.to(FAR), far, 3)
        from_the_device = top_k(far.to(FAR), far.to(FAR), 3)
    assert not failed
    torch.testing.assert_close(far, near, rtol=0, atol=1e-6)
    torch.testing.assert_close(stored, near.double(), rtol=0, atol=1e-6)
    assert identical(ranked, from_the_device)
    assert torch.equal(ranked[1], top_k(near, near, 3)[1])


@pytest.mark.parametrize("known", ["with q_ids", "without q_ids"])
def test_losses_and_mining_on_a_second_device_give_the_numbers_of_the_cpu(known, monkeypatch):
    q, d, kw = batch(30, 50, 8, 3, MASKS["all"], shared=True, ignored=True)
    if known == "without q_ids":
        del kw["q_ids"]
    ids = kw["ids"]

    def results(device):
        moved = {name: x.to(device) for name, x in kw.items() if isinstance(x, torch.Tensor)}
        q_ids = moved.get("q_ids")
        a = q.to(device, copy=True).requires_grad_()
        b = d.to(device, copy=True).requires_grad_()
        loss = info_nce(a, b, 33.3, **moved, margin=kw["margin"], impl="torch")
        p, n = b.tensor_split([30])
        p_ids, n_ids = moved["ids"].tensor_split([30])
        options = dict(q_ids=q_ids, margin=kw["margin"])
        loss = loss + train.contrastive_loss(a, p, n, p_ids, n_ids, tau=0.03, **options)
        loss.backward()
        sums = train.curve_sums(a, p, n, p_ids, n_ids, q_ids)
        relevance = train.probe(a.detach(), p.detach())
        own_ids = p_ids if q_ids is not None else ids[:30]  # mining takes ids of either device
        mined = train.mine(a.detach(), p.detach(), own_ids, 4, 0.1, q_ids=q_ids)
        found = [loss.detach(), a.grad, b.grad, mined, *sums.values(), torch.tensor(relevance)]
        return [x.cpu() for x in found]

    near = results("cpu")
    with second_device(monkeypatch):
        far = results(FAR)
    for a, b in zip(far, near, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class OnSecondGpu(torch.Tensor):
    """A tensor of the CPU that says it lies on the GPU that is not the current one."""

    device = torch.device("cuda", 1)
    is_cuda = True


def test_grad_cache_replays_the_random_numbers_of_the_vectors_own_device(monkeypatch):
    generators = (torch.Generator(), torch.Generator().manual_seed(5))
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    weight = torch.ones(3, requires_grad=True)

    def encode(batch):
        dropout = torch.rand(batch.shape, generator=generators[1]) < 0.5
        return batch * weight * dropout

    cache = train.GradCache(encode, torch.zeros(0, 3).as_subclass(OnSecondGpu))
    g = seeded(0)
    vectors = cache.forward([torch.randn(4, 3, generator=g), torch.randn(4, 3, generator=g)])
    after = generators[1].get_state()
    (vectors**2).sum().backward()
    cache.backward()
    expected = 2 * (vectors.detach() ** 2).sum(0)
    torch.testing.assert_close(weight.grad, expected.as_subclass(torch.Tensor))
    assert torch.equal(generators[1].get_state(), after)


@pytest.mark.slow
def test_the_tests_of_a_gpu_pass_in_rehearsal():
    """Small sizes, the kernels interpreted, gloo for NCCL."""
    words = ["-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    done = run("-m", "pytest", *words, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 36, done.stdout[-2000:]
