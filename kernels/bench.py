"""Time the fused InfoNCE, forward and backward, beside every other way to compute it.

    python kernels/bench.py                      on a GPU: N 1k to 128k, D 768 to 3584, bf16
    python kernels/bench.py --sizes 8192         on a CPU: D = 1536, fp32; 2 minutes on 2 idle cores
    python kernels/bench.py --out records/x.md   also writes the table to a file

The table justifies kernels/infonce.py, so losing cases stay in, and methods that are not installed
or do not fit the device are listed as such. Times are medians of runs taken in turn, so that a
shared machine slows all methods alike. Extra memory is the peak less inputs and returned gradients.
TFLOP/s count the four units of 2 N M D that infonce.py needs, for every method; the column after it
is their share of the rate of a plain matrix product, measured between the methods.
"""

import ctypes
import dataclasses
import gc
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not kernels/ itself, whose files are no top-level modules

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from kernels.infonce import info_nce, info_nce_ref  # noqa: E402
from support.files import git_commit  # noqa: E402
from support.flags import flag, parse_flags  # noqa: E402

SCALE = 1 / 0.03
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GPU_SIZES = [1024, 8192, 32768, 131072]
GPU_DIMS = [768, 1536, 2048, 3584]
OURS = "ours"  # how our methods' names begin


@dataclasses.dataclass
class Flags:
    """What to time, and how often."""

    sizes: list[int] = flag(GPU_SIZES if CUDA else [1024, 8192], "N = M")
    dims: list[int] = flag(GPU_DIMS if CUDA else [1536], "D")
    dtype: str = flag("bf16" if CUDA else "fp32", "of q and d", choices=list(DTYPES))
    methods: list[str] = flag([], "run only methods whose name contains one of these words")
    repeats: int = flag(5 if CUDA else 3, "runs per method, after one that warms up")
    out: str = flag("", "also write the table to this file")


# The methods. Each is a function (q, d) -> symmetric loss, 0-dim, row i's positive being d[i].


def ours_triton(q, d):
    """Run the Triton kernels."""
    return info_nce(q, d, SCALE, impl="triton")


def ours_torch(q, d):
    """Run the kernels' torch twin."""
    return info_nce(q, d, SCALE, impl="torch")


def definition(q, d):
    """Run the definition, which stores the similarities and the masks."""
    return info_nce_ref(q, d, SCALE)


def plain(logits_dtype):
    """Return the usual torch code, whose logits are stored in `logits_dtype`."""

    def loss(q, d):
        logits = (q @ d.T).to(logits_dtype) * SCALE  # (N, N)
        target = torch.arange(len(q), device=q.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return loss


def both_ways(cross_entropy):
    """Return a symmetric loss made of two calls of cross_entropy(queries, candidates, target)."""

    def loss(q, d):
        target = torch.arange(len(q), device=q.device)
        forward = cross_entropy(q * SCALE, d, target)
        return (forward + cross_entropy(d * SCALE, q, target)) / 2

    return loss


def torch_linear(queries, candidates, target):
    """Run torch 2.13's chunked cross entropy."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(queries, candidates, target, options=options)


def inf_cl(q, d):
    """Run Inf-CL (arXiv 2410.17243), which has its own scale."""
    from inf_cl import cal_flash_loss

    forward = cal_flash_loss(q, d, scale=SCALE).mean()
    return (forward + cal_flash_loss(d, q, scale=SCALE).mean()) / 2


def liger(queries, candidates, target):
    """Run Liger's fused linear cross entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(queries, candidates, target, accum_dtype=torch.float32)


def cut_cross_entropy(queries, candidates, target):
    """Run CCE without its default filter, which drops the small gradients that InfoNCE lives on."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(queries, candidates, target, filter_eps=None)


@dataclasses.dataclass
class Method:
    name: str
    loss: Callable | None  # None: not installed
    bytes_per_logit: int = 0  # at the peak; a size that would not fit is not tried


def list_methods(dtype):
    """List all methods for inputs of `dtype` on this device."""
    methods = []
    if CUDA:
        methods.append(Method(f"{OURS} (triton)", ours_triton))
    methods.append(Method(f"{OURS} (torch twin)", ours_torch))
    methods.append(Method("plain, fp32 logits", plain(torch.float32), 24))
    methods.append(Method("the definition, info_nce_ref", definition, 40))
    if dtype != torch.float32:
        methods.append(Method("plain, half logits", plain(dtype), 14))
    if CUDA:
        methods.append(Method("plain, torch.compile", torch.compile(plain(torch.float32)), 24))
    if hasattr(F, "linear_cross_entropy"):
        methods.append(Method("F.linear_cross_entropy x 2", both_ways(torch_linear)))

    if CUDA:
        packages = {
            "inf_cl": inf_cl,
            "liger_kernel": both_ways(liger),
            "cut_cross_entropy": both_ways(cut_cross_entropy),
        }
        for package, loss in packages.items():
            installed = importlib.util.find_spec(package) is not None
            methods.append(Method(f"{package} x 2", loss if installed else None))
    return methods


def read_bytes(path, key):
    """Return the bytes that a line "key: number kB" of a /proc file states."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{path}: no line {key}")


def free_memory():
    """Return the device's free bytes."""
    if CUDA:
        return torch.cuda.mem_get_info()[0]
    return read_bytes("/proc/meminfo", "MemAvailable")


def measure(run):
    """Call run() and return (seconds, bytes by which memory peaked above its level before)."""
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory
    before = read_bytes("/proc/self/status", "VmRSS")
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return seconds, read_bytes("/proc/self/status", "VmHWM") - before


@dataclasses.dataclass
class Run:
    """One measured run of a method."""

    seconds: float
    extra: int  # bytes
    loss: float


def run_method(method, q, d):
    """Run a method forward and backward once."""
    loss = None

    def step():
        nonlocal loss
        loss = method.loss(q, d)
        loss.backward()

    q.grad = None
    d.grad = None
    seconds, peak = measure(step)
    gradients = q.grad.nbytes + d.grad.nbytes
    return Run(seconds, peak - gradients, loss.item())


@dataclasses.dataclass
class Result:
    """One method at one size: the medians of its runs, or the reason why there are none."""

    size: int  # N = M
    dim: int
    method: str
    matmul: float  # FLOP/s of a plain product between the methods
    seconds: float = float("inf")
    extra: float = 0.0  # bytes
    loss: float = float("nan")
    reason: str = ""

    def row(self):
        """Return the Markdown table's row."""
        if self.reason:
            cells = ["-", "-", "-", "-", self.reason]
        else:
            rate = 8 * self.size**2 * self.dim / self.seconds  # four units of 2 N M D
            cells = [
                f"{self.seconds * 1e3:,.2f}",
                f"{self.extra / 2**20:,.0f}",
                f"{rate / 1e12:,.2f}",
                f"{rate / self.matmul:.0%}",
                f"{self.loss:.5f}",
            ]
        return "| " + " | ".join([f"{self.size:,}", str(self.dim), self.method, *cells]) + " |"


def random_batch(size, dim, dtype):
    """Draw q and d, (size, dim) unit rows with d[i] near q[i]; both require gradients."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    q = F.normalize(torch.randn(size, dim, generator=generator, device=DEVICE), dim=1)
    noise = F.normalize(torch.randn(size, dim, generator=generator, device=DEVICE), dim=1)
    d = F.normalize(q + 5 * noise, dim=1)
    return q.to(dtype).requires_grad_(), d.to(dtype).requires_grad_()


def matmul_rate(q, d):
    """Return the FLOP/s of a plain product of at most 8192 rows of q with d."""
    rows = q.detach()[:8192]
    columns = d.detach().T
    seconds, _ = measure(lambda: rows @ columns)
    return 2 * len(rows) * d.shape[0] * d.shape[1] / seconds


def compare(size, dim, flags):
    """Run all methods at one size, turn by turn -> a Result for each."""
    dtype = DTYPES[flags.dtype]
    q, d = random_batch(size, dim, dtype)
    methods = list_methods(dtype)
    if flags.methods:
        methods = [m for m in methods if any(word in m.name for word in flags.methods)]

    free = free_memory()
    reasons = {}
    for method in methods:
        if method.loss is None:
            reasons[method.name] = "not installed"
        elif method.bytes_per_logit * size**2 > free:
            reasons[method.name] = "does not fit"

    runs = {method.name: [] for method in methods}
    rates = []
    for _ in range(1 + flags.repeats):
        rates.append(matmul_rate(q, d))
        for method in methods:
            if method.name in reasons:
                continue
            try:
                runs[method.name].append(run_method(method, q, d))
            except Exception as error:  # one package that fails must not cost the others' rows
                reasons[method.name] = type(error).__name__
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    reasons[method.name] = "does not fit"
                print(f"{method.name}: {error}", file=sys.stderr)

    # The first turn warmed up: compilation, the allocator.
    matmul = statistics.median(rates[1:])
    results = []
    for method in methods:
        result = Result(size, dim, method.name, matmul, reason=reasons.get(method.name, ""))
        if not result.reason:
            timed = runs[method.name][1:]
            result.seconds = statistics.median(run.seconds for run in timed)
            result.extra = statistics.median(run.extra for run in timed)
            result.loss = timed[-1].loss
        results.append(result)
    return results


def ours_is_faster(results):
    """Say whether the fastest of our methods beats the fastest of the others at one size."""
    ours = [r.seconds for r in results if r.method.startswith(OURS)]
    others = [r.seconds for r in results if not r.method.startswith(OURS)]
    return bool(ours and others) and min(ours) < min(others)


def main():
    flags = parse_flags(Flags, doc=__doc__)
    lines = []

    def say(line):
        lines.append(line)
        print(line, flush=True)

    where = f"CPU, {torch.get_num_threads()} threads"
    if CUDA:
        where = torch.cuda.get_device_name()
    command = " ".join(["python kernels/bench.py", *sys.argv[1:]])
    say(
        f"`{command}` at commit {(git_commit() or 'unknown')[:7]}; {where}; torch "
        f"{torch.__version__}; {flags.dtype}, median of {flags.repeats} runs"
    )
    say("")
    say("| N = M | D | method | ms | extra MiB | TFLOP/s | of matmul | loss |")
    say("|---|---|---|---|---|---|---|---|")

    faster_at = {dim: [] for dim in flags.dims}
    for dim, size in itertools.product(flags.dims, flags.sizes):
        results = compare(size, dim, flags)
        for result in results:
            say(result.row())
        if ours_is_faster(results):
            faster_at[dim].append(f"{size:,}")

    for dim, sizes in faster_at.items():
        listed = ", ".join(sizes) if sizes else "none of these sizes"
        say(f"\nD = {dim}: ours is faster than every other method at N = {listed}.")
    if flags.out:
        Path(flags.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
