"""The table that justifies kernels/infonce.py: forward + backward of symmetric InfoNCE beside every other way to compute it.

    python kernels/bench.py                       on a GPU: N = M in 1k .. 128k, D in 768 .. 3584, bf16; minutes
    python kernels/bench.py --sizes 8192          on a CPU: fp32, D = 1536; two minutes on 2 idle cores
    python kernels/bench.py --out records/x.md    also writes the table there

Methods that are not installed, or do not fit the device, are listed as such; losing cases stay in. Times are medians of runs
taken in turn, so that a shared machine slows all methods alike. Extra memory is the peak less inputs and returned gradients.
TFLOP/s count four units of 2 N M D (infonce.py), whatever a method really does; the last column is their share of a plain
matmul's rate measured between the methods.
"""

import argparse
import ctypes
import gc
import importlib.util
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not kernels/ itself, whose files are no top-level modules

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from kernels.infonce import info_nce, info_nce_ref  # noqa: E402

SCALE = 1 / 0.03
TARGETS = {}


def both_ways(one_way):
    """Symmetric loss by two calls of a cross entropy over candidates: one_way(q scaled, d, target)."""
    return lambda q, d: (one_way(q * SCALE, d, target(q)) + one_way(d * SCALE, q, target(q))) / 2


def target(q):
    return TARGETS.setdefault((len(q), q.device), torch.arange(len(q), device=q.device))


def plain(logits_dtype):
    def loss(q, d):
        z = (q @ d.T).to(logits_dtype) * SCALE
        return (F.cross_entropy(z, target(q)) + F.cross_entropy(z.T, target(q))) / 2

    return loss


def torch_linear(x, w, t):
    return F.linear_cross_entropy(x, w, t, options=torch.nn.LinearCrossEntropyOptions())


def inf_cl(q, d):
    from inf_cl import cal_flash_loss

    return (cal_flash_loss(q, d, scale=SCALE).mean() + cal_flash_loss(d, q, scale=SCALE).mean()) / 2


def liger(x, w, t):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, w, t, accum_dtype=torch.float32)


def cce(x, w, t):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(
        x, w, t, filter_eps=None
    )  # its default filter drops the gradients InfoNCE lives on


def methods(device, dtype):
    """{name: (loss(q, d), bytes per logit at the peak, for sizes that would not fit a CPU)}"""
    found = (
        {"ours (triton)": (lambda q, d: info_nce(q, d, SCALE, impl="triton"), 0)}
        if device == "cuda"
        else {}
    )
    found["ours (torch twin)"] = lambda q, d: info_nce(q, d, SCALE, impl="torch"), 0
    found["plain, fp32 logits"] = plain(torch.float32), 24
    found["the definition, info_nce_ref"] = lambda q, d: info_nce_ref(q, d, SCALE), 40
    if dtype != torch.float32:
        found["plain, half logits"] = plain(dtype), 14
    if device == "cuda":
        found["plain, torch.compile"] = torch.compile(plain(torch.float32)), 24
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy x 2"] = both_ways(torch_linear), 0
    if device == "cuda":
        others = {
            "inf_cl": inf_cl,
            "liger_kernel": both_ways(liger),
            "cut_cross_entropy": both_ways(cce),
        }
        found |= {
            f"{name} x 2": (loss, 0) if importlib.util.find_spec(name) else None
            for name, loss in others.items()
        }
    return found


def resident(key):
    return int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) * 1024


def measure(run, cuda):
    """Seconds and peak extra bytes of run()."""
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, (start, end) = (
            torch.cuda.memory_allocated(),
            (torch.cuda.Event(enable_timing=True) for _ in range(2)),
        )
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory
    before, start = resident("VmRSS"), time.perf_counter()
    run()
    return time.perf_counter() - start, resident("VmHWM") - before


def compare(n, dim, dtype, device, repeats, only):
    """Rows of (method, seconds, extra bytes, TFLOP/s of a matmul, loss) for one size; seconds None: says why instead."""
    g, cuda = torch.Generator(device).manual_seed(0), device == "cuda"
    q, noise = (
        F.normalize(torch.randn(n, dim, generator=g, device=device), dim=1) for _ in range(2)
    )
    d, q = (x.to(dtype).requires_grad_() for x in (F.normalize(q + 5 * noise, dim=1), q))
    del noise
    every = {
        name: m
        for name, m in methods(device, dtype).items()
        if not only or any(word in name for word in only)
    }
    free = (
        torch.cuda.mem_get_info()[0]
        if cuda
        else int(open("/proc/meminfo").read().split("MemAvailable:")[1].split()[0]) * 1024
    )
    why = {
        name: "not installed" if m is None else "does not fit"
        for name, m in every.items()
        if not m or m[1] * n * n > free
    }
    runs, rates, rows, values = {name: [] for name in every}, [], min(n, 8192), {}
    for turn in range(repeats + 1):  # the first warms up: compilation, the allocator
        rates.append(
            2 * rows * n * dim / measure(lambda: q.detach()[:rows] @ d.detach().T, cuda)[0] / 1e12
        )
        for name in [name for name in every if name not in why]:

            def step(name=name):
                values[name] = every[name][0](q, d)
                values[name].backward()

            q.grad = d.grad = None
            try:
                seconds, extra = measure(step, cuda)
                runs[name] += (
                    [(seconds, extra - sum(x.grad.numel() * x.grad.element_size() for x in (q, d)))]
                    if turn
                    else []
                )
            except Exception as error:  # one package that fails must not cost the others' rows
                why[name] = (
                    "does not fit"
                    if isinstance(error, torch.cuda.OutOfMemoryError)
                    else type(error).__name__
                )
                print(f"{name}: {error}", file=sys.stderr)
            values[name] = values[name].item() if name in values and name not in why else None
    for name in every:
        seconds, extra = (
            (statistics.median(x) for x in zip(*runs[name], strict=True))
            if name not in why
            else (None, None)
        )
        yield (
            name,
            seconds,
            extra,
            statistics.median(rates[1:]),
            why.get(name) or f"{values[name]:.5f}",
        )


def main():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes, dims = (
        ([1024, 8192, 32768, 131072], [768, 1536, 2048, 3584]) if cuda else ([1024, 8192], [1536])
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, help="N = M")
    parser.add_argument("--dims", type=int, nargs="+", default=dims, help="D")
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp16", "fp32"],
        default="bf16" if cuda else "fp32",
        help="of q and d",
    )
    parser.add_argument(
        "--methods", nargs="+", help="only those whose name contains one of these words"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5 if cuda else 3,
        help="runs per method after one that warms up",
    )
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    device, dtype = (
        "cuda" if cuda else "cpu",
        dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[args.dtype],
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"`python kernels/bench.py {' '.join(sys.argv[1:])}` at commit {commit}; {where}; torch {torch.__version__}; "
        f"{args.dtype}, median of {args.repeats} runs",
        "",
        "| N = M | D | method | ms | extra MiB | TFLOP/s | of matmul | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    best = {}
    for dim, n in itertools.product(args.dims, args.sizes):
        for name, seconds, extra, matmul, loss in compare(
            n, dim, dtype, device, args.repeats, args.methods
        ):
            cells, rate = ["-"] * 4, 8 * n * n * dim / (seconds or 1) / 1e12
            if seconds:
                cells = [
                    f"{seconds * 1e3:,.2f}",
                    f"{extra / 2**20:,.0f}",
                    f"{rate:,.2f}",
                    f"{rate / matmul:.0%}",
                ]
            lines.append("| " + " | ".join([f"{n:,}", str(dim), name, *cells, loss]) + " |")
            print(lines[-1], flush=True)
            key = dim, n, name.startswith("ours")
            best[key] = min(best.get(key, float("inf")), seconds or float("inf"))
    for dim in args.dims:
        pays = [
            f"{n:,}"
            for n in args.sizes
            if best.get((dim, n, True), 0) < best.get((dim, n, False), 0)
        ]
        lines.append(
            f"\nD = {dim}: ours is faster than every other method at N = {', '.join(pays) or 'none of these sizes'}."
        )
        print(lines[-1])
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
