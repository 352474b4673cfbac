"""Time the fused InfoNCE, forward and backward, beside every other way to compute it.

    python kernels/bench.py                      on a GPU: N 1k to 128k, D 768 to 3584, bf16
    python kernels/bench.py --sizes 8192         on a CPU: D = 1536, fp32; 5 minutes on 2 idle cores
    python kernels/bench.py --out records/x.md --json x.json     also writes the table to files
    TRITON_INTERPRET=1 python kernels/bench.py --sizes 64 100 --dims 64
        on a CPU, in seconds: the Triton kernels, peers' too, interpreted; errors alone, no times

The table justifies kernels/infonce.py, so losing cases stay in, and methods that are not installed,
fail, or do not fit the device are listed as such. Each method computes one of four losses, and its
errors are taken against that loss:

    symmetric        InfoNCE in both directions without masks
    masks and ids    the same as training calls it: content ids, query ids and a margin
    q to d, margin   query to document alone, with a margin (Qwen3-Embedding's)
    sigmoid          SigLIP's, another loss: a row for its speed

Times are medians of runs taken in turn, so that a shared machine slows all methods alike. Extra
memory is the peak less inputs and returned gradients. TFLOP/s count, for every method, the four
units of 2 N M D that infonce.py needs, though three would do for the last two losses. The next
column is their share of the rate of a plain matrix product, measured between the methods.

Errors are relative, against fp64 on the same inputs: of the loss, and of the gradients of the first
256 rows of q and d. They are taken from the warm-up run, and expose speed that was bought with
accuracy. Rounding exact gradients to bf16 alone gives 1.7e-3. Packages that take no scale are given
scaled inputs, and the rounding of those counts against them.

Estimated time of `--sizes 1024 8192 32768 --dims 1536 2048 3584` on a GPU: one unit at all nine
sizes is 16 TFLOP. 20 methods of 4 units, 6 runs each, take half a minute at 300 TFLOP/s; one method
of 10 units at 40 TFLOP/s takes as long again. Compilation is extra. --limit stops slower methods.

Estimated memory of ours at N = 131072, D = 3584 in bf16: 6.4 GB (of 1e9 bytes). q and d take 1.9,
their gradients 1.9, the fp32 sums of d's gradient 1.9, those of one block of q's gradient .2, and
the workspace .5.
"""

import ctypes
import dataclasses
import gc
import importlib
import importlib.metadata
import importlib.util
import itertools
import math
import statistics
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of kernels/, whose files are not top-level modules

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from kernels.infonce import INTERPRET, info_nce, info_nce_ref  # noqa: E402
from support.files import git_commit, short_commit, write_json  # noqa: E402
from support.flags import flag, parse_flags  # noqa: E402

SCALE = 1 / 0.03
MARGIN = 0.1
SIGMOID_SCALE = 10.0  # where SigLIP's training starts
SIGMOID_BIAS = -10.0
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TIMED = CUDA or not INTERPRET  # interpreted, times would mean nothing
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GPU_SIZES = [1024, 8192, 32768, 131072]
GPU_DIMS = [768, 1536, 2048, 3584]
OURS = "ours"  # how our methods' names begin
# Packages of others, each optional
PEERS = ["inf_cl", "liger_kernel", "cut_cross_entropy", "memeff", "siglip_kernel"]

# The losses
SYMMETRIC = "symmetric"
MASKED = "masks and ids"
ONE_WAY = "q to d, margin"
SIGMOID = "sigmoid"
LOSSES = [SYMMETRIC, MASKED, ONE_WAY, SIGMOID]  # in the table's order

CHECKED_ROWS = 256  # rows of q and of d whose gradients are compared with fp64
BLOCK = 4096  # rows and columns of a block of fp64 logits: 134 MB


@dataclasses.dataclass
class Flags:
    """What to time, and how often."""

    sizes: list[int] = flag(GPU_SIZES if CUDA else [1024, 8192], "N = M")
    dims: list[int] = flag(GPU_DIMS if CUDA else [1536], "D")
    dtype: str = flag("bf16" if CUDA else "fp32", "of q and d", choices=list(DTYPES))
    methods: list[str] = flag([], "run only methods whose loss or name has one of these words")
    repeats: int = flag(5 if CUDA else 3, "runs per method, after one that warms up")
    limit: float = flag(60.0, "seconds; stop a method whose runs at one size would take longer")
    out: str = flag("", "also write the table to this file")
    json: str = flag("", "also write rows and conditions to this file, as one JSON object")


@dataclasses.dataclass
class Batch:
    """Random inputs; row i's positive is d[i]."""

    q: torch.Tensor  # (N, D) unit rows
    d: torch.Tensor  # (N, D) unit rows
    ids: torch.Tensor  # (N,) int64 content ids of d
    q_ids: torch.Tensor  # (N,) int64 ids of q

    def options(self, loss):
        """Return the keyword arguments with which info_nce computes a loss of this table."""
        if loss == SYMMETRIC:
            return {}
        if loss == MASKED:
            return {"ids": self.ids, "q_ids": self.q_ids, "margin": MARGIN}
        assert loss == ONE_WAY, loss
        return {"margin": MARGIN, "symmetric": False}


def random_batch(size, dim, dtype):
    """Draw a Batch with d[i] near q[i], in which every mask drops something.

    Of every eight rows, one has the document id of the row before, another the query id of the row
    before, and the document of a third is nearer to the query of the row before than its own is.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)
    q = F.normalize(torch.randn(size, dim, generator=generator, device=DEVICE), dim=1)
    noise = F.normalize(torch.randn(size, dim, generator=generator, device=DEVICE), dim=1)
    d = q + 5 * noise
    d[5::8] += 3 * q[4:-1:8]
    d = F.normalize(d, dim=1)

    number = torch.arange(size, device=DEVICE)
    ids = number - (number % 8 == 1).long()
    q_ids = number - (number % 8 == 3).long()
    return Batch(q.to(dtype).requires_grad_(), d.to(dtype).requires_grad_(), ids, q_ids)


# The methods: functions (q, d) -> 0-dim loss, in which d[i] is the positive of q[i].


def fused(impl, options):
    """Return our loss: the Triton kernels, or their torch twin."""

    def loss(q, d):
        return info_nce(q, d, SCALE, impl=impl, **options)

    return loss


def definition(options):
    """Return the loss by its definition, which stores the similarities and the masks."""

    def loss(q, d):
        return info_nce_ref(q, d, SCALE, **options)

    return loss


def plain(logits_dtype):
    """Return the usual torch code, whose logits are stored in `logits_dtype`."""

    def loss(q, d):
        logits = (q @ d.T).to(logits_dtype) * SCALE  # (N, N)
        target = torch.arange(len(q), device=q.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return loss


def plain_sigmoid(q, d):
    """Run SigLIP's loss (arXiv 2303.15343) with stored logits."""
    logits = (q @ d.T).float() * SIGMOID_SCALE + SIGMOID_BIAS
    labels = torch.eye(len(q), device=q.device)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(q)


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

    # It works on parts of the vectors that are a power of two wide, 256 by default.
    part = math.gcd(q.shape[1], 256)
    forward = cal_flash_loss(q, d, scale=SCALE, head_dim=part).mean()
    return (forward + cal_flash_loss(d, q, scale=SCALE, head_dim=part).mean()) / 2


def liger(queries, candidates, target):
    """Run Liger's fused linear cross entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(queries, candidates, target, accum_dtype=torch.float32)


def cut_cross_entropy(queries, candidates, target):
    """Run CCE without its default filter, which drops the small gradients that InfoNCE lives on."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(queries, candidates, target, filter_eps=None)


def memeff_clip(q, d):
    """Run memeff's symmetric loss."""
    from memeff import MemoryEfficientCLIPLoss

    # stable=True, the default, would multiply the gradients by sqrt(N / SCALE).
    return MemoryEfficientCLIPLoss(1 / SCALE, normalized_inputs=True, stable=False)(q, d)


def memeff_qwen3(q, d):
    """Run memeff's InfoNCE of Qwen3-Embedding, without its negatives from q to q and d to d."""
    from memeff import MemoryEfficientQwen3Loss

    return MemoryEfficientQwen3Loss(1 / SCALE, MARGIN, normalized_inputs=True, stable=False)(q, d)


def siglip(q, d):
    """Run siglip-kernel's chunked loss, which the package itself chooses for bf16 and fp16."""
    from siglip_kernel import fused_siglip_loss

    log_scale = torch.full((), math.log(SIGMOID_SCALE), device=q.device)
    bias = torch.full((), SIGMOID_BIAS, device=q.device)
    return fused_siglip_loss(q, d, log_scale, bias, backend="chunked_bf16")


def is_installed(package):
    """Say whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def let_peers_be_interpreted():
    """Replace what peers need of a GPU and the interpreter lacks; their arithmetic stays as it is.

    Peers ask for the GPU's capability, to choose tile sizes; the answer is an H100's.
    """
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    if is_installed("memeff"):
        for name in ("memeff.clip_loss", "memeff.clip_qwen3_loss"):
            importlib.import_module(name)._validate_features = lambda q, d: None
    if is_installed("cut_cross_entropy"):
        import triton.language as tl

        tools = importlib.import_module("cut_cross_entropy.tl_utils")
        tools.tl_libdevice = types.SimpleNamespace(log1p=lambda x: tl.log(1 + x))


@dataclasses.dataclass
class Method:
    """One way to compute one of the losses."""

    loss: str
    name: str
    run: Callable  # (q, d) -> loss
    bytes_per_logit: int = 0  # at the peak; sizes that would not fit are not tried
    package: str = ""  # the one that must be installed

    def is_named(self, words):
        """Say whether one of the words is in the method's loss or name."""
        return any(word in self.loss or word in self.name for word in words)

    def obstacle(self, size, free_bytes):
        """Return why the method cannot run with N = M = size; "" if it can."""
        if self.package and not is_installed(self.package):
            return "not installed"
        if self.bytes_per_logit * size**2 > free_bytes:
            return "does not fit"
        return ""


def list_methods(batch):
    """List all methods for this batch's dtype on this device."""
    dtype = batch.q.dtype
    methods = []
    for loss in (SYMMETRIC, MASKED, ONE_WAY):
        options = batch.options(loss)
        if CUDA or INTERPRET:
            methods.append(Method(loss, f"{OURS} (triton)", fused("triton", options)))
        methods.append(Method(loss, f"{OURS} (torch twin)", fused("torch", options)))
        methods.append(Method(loss, "the definition, info_nce_ref", definition(options), 40))

    methods.append(Method(SYMMETRIC, "plain, fp32 logits", plain(torch.float32), 24))
    methods.append(Method(SIGMOID, "plain, fp32 logits", plain_sigmoid, 24))
    if dtype != torch.float32:
        methods.append(Method(SYMMETRIC, "plain, half logits", plain(dtype), 14))
    if CUDA:
        torch.compiler.reset()  # else sizes after the first are compiled for any size
        compiled = torch.compile(plain(torch.float32))
        methods.append(Method(SYMMETRIC, "plain, torch.compile", compiled, 24))
    chunked = both_ways(torch_linear)
    methods.append(Method(SYMMETRIC, "F.linear_cross_entropy x 2", chunked))

    if CUDA or INTERPRET:
        cce = both_ways(cut_cross_entropy)
        methods += [
            Method(SYMMETRIC, "inf_cl x 2", inf_cl, package="inf_cl"),
            Method(SYMMETRIC, "liger_kernel x 2", both_ways(liger), package="liger_kernel"),
            Method(SYMMETRIC, "cut_cross_entropy x 2", cce, package="cut_cross_entropy"),
            Method(SYMMETRIC, "memeff", memeff_clip, package="memeff"),
            Method(ONE_WAY, "memeff", memeff_qwen3, package="memeff"),
            Method(SIGMOID, "siglip_kernel", siglip, package="siglip_kernel"),
        ]
    return sorted(methods, key=lambda method: LOSSES.index(method.loss))


# The same losses in fp64, block by block, so that memory does not grow with N M


@dataclasses.dataclass
class Exact:
    """A loss, and its gradients for the first rows of q and d, (CHECKED_ROWS, D) fp64."""

    loss: float
    dq: torch.Tensor
    dd: torch.Tensor


def exact_loss(loss, batch):
    """Compute one of the table's losses in fp64 -> Exact."""
    q = batch.q.detach()
    d = batch.d.detach()
    if loss == SIGMOID:
        return exact_sigmoid(q, d)
    return exact_infonce(q, d, **batch.options(loss))


def exact_infonce(q, d, ids=None, q_ids=None, margin=None, symmetric=True):
    """Compute InfoNCE, with info_nce's arguments, in fp64 -> Exact.

    A first pass over all blocks collects the log-sum-exps of rows and columns. From these, any
    block of the gradient follows without the other blocks.
    """
    n = len(q)
    positive = [(q[rows].double() * d[rows].double()).sum(1) for rows in blocks(n)]
    positive = torch.cat(positive)  # (N,) cosines

    def logits(rows, columns):
        cosines = q[rows].double() @ d[columns].double().T
        dropped = torch.zeros_like(cosines, dtype=torch.bool)
        if ids is not None:
            dropped |= ids[rows, None] == ids[columns]
            dropped |= q_ids[rows, None] == q_ids[columns]
        if margin is not None:
            dropped |= cosines > positive[rows, None] + margin
        dropped &= ~on_diagonal(rows, columns, q.device)
        return (SCALE * cosines).masked_fill(dropped, -torch.inf)

    row_lse = torch.full_like(positive, -torch.inf)
    column_lse = torch.full_like(positive, -torch.inf)
    for rows, columns in itertools.product(blocks(n), blocks(n)):
        z = logits(rows, columns)
        row_lse[rows] = torch.logaddexp(row_lse[rows], z.logsumexp(1))
        column_lse[columns] = torch.logaddexp(column_lse[columns], z.logsumexp(0))

    losses = row_lse - SCALE * positive  # (N,)
    if symmetric:
        losses = (losses + column_lse - SCALE * positive) / 2

    def gradient(rows, columns):
        z = logits(rows, columns)
        p = (z - row_lse[rows, None]).exp()
        if symmetric:
            p = (p + (z - column_lse[columns]).exp()) / 2
        return (p - on_diagonal(rows, columns, q.device).double()) * SCALE / n

    return Exact(losses.mean().item(), *first_gradients(q, d, gradient))


def exact_sigmoid(q, d):
    """Compute SigLIP's loss in fp64 -> Exact."""
    n = len(q)

    def logits(rows, columns):
        return q[rows].double() @ d[columns].double().T * SIGMOID_SCALE + SIGMOID_BIAS

    # softplus(-z) of a positive is softplus(z) - z.
    total = 0.0
    for rows, columns in itertools.product(blocks(n), blocks(n)):
        z = logits(rows, columns)
        total += F.softplus(z).sum().item()
        total -= z[on_diagonal(rows, columns, q.device)].sum().item()

    def gradient(rows, columns):
        p = logits(rows, columns).sigmoid()
        return (p - on_diagonal(rows, columns, q.device).double()) * SIGMOID_SCALE / n

    return Exact(total / n, *first_gradients(q, d, gradient))


def blocks(n):
    """Cut n rows or columns into slices of at most BLOCK."""
    return [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]


def on_diagonal(rows, columns, device):
    """Mark the positives in a block, bool; rows and columns are slices."""
    i = torch.arange(rows.start, rows.stop, device=device)
    j = torch.arange(columns.start, columns.stop, device=device)
    return i[:, None] == j


def first_gradients(q, d, gradient):
    """Return dq and dd of the first CHECKED_ROWS rows in fp64.

    gradient(rows, columns): a block of the gradient with respect to the cosines q d^T.
    """
    n = len(q)
    first = slice(0, min(CHECKED_ROWS, n))
    dq = torch.zeros_like(q[first], dtype=torch.float64)
    dd = torch.zeros_like(d[first], dtype=torch.float64)
    for others in blocks(n):
        dq += gradient(first, others) @ d[others].double()
        dd += gradient(others, first).T @ q[others].double()
    return dq, dd


def relative_error(x, exact):
    """Return |x - exact| / |exact| of two tensors, in the Euclidean norm."""
    exact_norm = torch.linalg.vector_norm(exact)
    return (torch.linalg.vector_norm(x[: len(exact)].double() - exact) / exact_norm).item()


# Measurements


def read_bytes(path, key):
    """Return the bytes that a line "key: number kB" of a /proc file states."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{path}: no line {key}")


def free_memory():
    """Return the device's free bytes."""
    if CUDA:
        torch.cuda.empty_cache()  # memory cached from earlier sizes would not count as free
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
    """Run a method forward and backward once; q and d then hold its gradients."""
    loss = None

    def step():
        nonlocal loss
        loss = method.run(q, d)
        loss.backward()

    q.grad = None
    d.grad = None
    seconds, peak = measure(step)
    gradients = q.grad.nbytes + d.grad.nbytes
    return Run(seconds, peak - gradients, loss.item())


@dataclasses.dataclass
class Result:
    """One method at one size: medians of its runs, its errors, and a note if some are missing.

    Fields that were not measured are None.
    """

    size: int  # N = M
    dim: int
    loss: str  # one of LOSSES
    method: str
    matmul: float | None = None  # FLOP/s of a plain matrix product, median of all turns
    seconds: float | None = None
    extra: float | None = None  # bytes
    value: float | None = None  # the loss, in nats
    loss_error: float | None = None  # relative, like the other two
    dq_error: float | None = None
    dd_error: float | None = None
    note: str = ""

    def row(self):
        """Return the row of the Markdown table."""
        times = ["-", "-", "-", "-"]
        if self.seconds is not None:
            rate = 8 * self.size**2 * self.dim / self.seconds  # four units of 2 N M D
            times = [
                f"{self.seconds * 1e3:,.2f}",
                f"{self.extra / 2**20:,.0f}",
                f"{rate / 1e12:,.2f}",
                f"{rate / self.matmul:.0%}",
            ]
        errors = []
        for error in (self.loss_error, self.dq_error, self.dd_error):
            errors.append("-" if error is None else f"{error:.1e}")

        cells = [f"{self.size:,}", str(self.dim), self.loss, self.method]
        cells += [*times, *errors, self.note] if TIMED else [*errors, self.note]
        return "| " + " | ".join(cells) + " |"

    def take_errors(self, exact, value, q, d):
        """Compare a run's loss and the gradients that it left behind with fp64."""
        self.value = value
        self.loss_error = abs(value - exact.loss) / abs(exact.loss)
        self.dq_error = relative_error(q.grad, exact.dq)
        self.dd_error = relative_error(d.grad, exact.dd)

    def take_times(self, runs, matmul):
        """Enter the medians of the runs, if there were any, and the rate of a plain product."""
        if not runs:
            return
        self.matmul = matmul
        self.seconds = statistics.median(run.seconds for run in runs)
        self.extra = statistics.median(run.extra for run in runs)


def header():
    """Return the Markdown table's first two lines."""
    columns = ["N = M", "D", "loss", "method"]
    if TIMED:
        columns += ["ms", "extra MiB", "TFLOP/s", "of matmul"]
    columns += ["loss error", "dq error", "dd error", "note"]
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def matmul_rate(q, d):
    """Return the FLOP/s of a plain product of at most 8192 rows of q with d."""
    rows = q.detach()[:8192]
    columns = d.detach().T
    flops = 2 * len(rows) * d.shape[0] * d.shape[1]
    # Several at once where one is short: a launch alone takes microseconds.
    products = math.ceil((1e12 if CUDA else 1e9) / flops)

    def multiply():
        for _ in range(products):
            rows @ columns

    seconds, _ = measure(multiply)
    return products * flops / seconds


def compare(size, dim, flags):
    """Run all methods at one size, turn by turn -> a list of Results."""
    batch = random_batch(size, dim, DTYPES[flags.dtype])
    q = batch.q
    d = batch.d
    methods = list_methods(batch)
    if flags.methods:
        methods = [m for m in methods if m.is_named(flags.methods)]
    exact = {}
    for loss in {method.loss for method in methods}:
        exact[loss] = exact_loss(loss, batch)

    free = free_memory()
    results = []
    for method in methods:
        note = method.obstacle(size, free)
        results.append(Result(size, dim, method.loss, method.name, note=note))

    # The first turn warms up: compilation, the allocator. Errors are taken there.
    runs = [[] for _ in methods]
    rates = []
    repeats = flags.repeats if TIMED else 0
    for turn in range(1 + repeats):
        rates.append(matmul_rate(q, d))
        for method, result, done in zip(methods, results, runs, strict=True):
            if result.note:
                continue
            try:
                run = run_method(method, q, d)
            except Exception as error:  # one package that fails must not cost the others' rows
                result.note = describe(error)
                done.clear()
                print(f"{method.loss}, {method.name}: {error!r}", file=sys.stderr)
                continue

            done.append(run)
            if turn == 0:
                result.take_errors(exact[method.loss], run.loss, q, d)
            ahead = repeats - turn  # runs to come
            if turn == 0:
                ahead = min(ahead, 1)  # most of the first run may be compilation
            if ahead * run.seconds > flags.limit:
                result.note = f"stopped after {turn} runs" if turn else "its first run, compiling"

    if TIMED:
        matmul = statistics.median(rates[1:] or rates)
        for result, done in zip(results, runs, strict=True):
            result.take_times(done[1:] or done, matmul)
    return results


def describe(error):
    """Say in a few words why a method failed."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "does not fit"
    # An assertion without a message is described by its line.
    message = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
    return f"{type(error).__name__}: {message.splitlines()[0][:70]}".replace("|", "/")


def ours_is_faster(results):
    """Say whether the fastest of our methods beats the fastest of the others at one size."""
    timed = [r for r in results if r.seconds is not None]
    ours = [r.seconds for r in timed if r.method.startswith(OURS)]
    others = [r.seconds for r in timed if not r.method.startswith(OURS)]
    return bool(ours and others) and min(ours) < min(others)


def conditions(flags):
    """Return command, commit, device, versions and flags of this run, for --json."""
    versions = {"torch": torch.__version__}
    for package in ["triton", *PEERS]:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None

    device = f"CPU, {torch.get_num_threads()} threads"
    if CUDA:
        device = torch.cuda.get_device_name()
    elif INTERPRET:
        device += ", Triton interpreted"
    return {
        "command": " ".join(["python kernels/bench.py", *sys.argv[1:]]),
        "commit": git_commit(),
        "device": device,
        "versions": versions,
        "flags": dataclasses.asdict(flags),
    }


def describe_conditions(where):
    """Return the sentence above the table."""
    flags = where["flags"]
    installed = [f"{name} {version}" for name, version in where["versions"].items() if version]
    runs = f"median of {flags['repeats']} runs" if TIMED else "one run"
    return (
        f"`{where['command']}` at commit {short_commit()}; {where['device']}; "
        f"{', '.join(installed)}; {flags['dtype']}, {runs}"
    )


def main():
    flags = parse_flags(Flags, doc=__doc__)
    if not TIMED:
        if flags.dtype == "bf16":
            sys.exit("--dtype bf16: Triton's interpreter computes it wrongly; try fp16")
        let_peers_be_interpreted()
    where = conditions(flags)
    lines = []

    def say(line):
        lines.append(line)
        print(line, flush=True)
        # Written line by line: a run that is cut off leaves the lines it has.
        if flags.out:
            Path(flags.out).write_text("\n".join(lines) + "\n")

    say(describe_conditions(where))
    say("")
    for line in header():
        say(line)

    results = []
    for dim, size in itertools.product(flags.dims, flags.sizes):
        at_size = compare(size, dim, flags)
        for result in at_size:
            say(result.row())
        results += at_size
        if flags.json:
            rows = [dataclasses.asdict(result) for result in results]
            write_json(flags.json, {"where": where, "rows": rows})

    if not TIMED:
        return
    # Ours does not compute the sigmoid loss.
    for loss, dim in itertools.product((SYMMETRIC, MASKED, ONE_WAY), flags.dims):
        faster_at = []
        for size in flags.sizes:
            same = [r for r in results if (r.loss, r.dim, r.size) == (loss, dim, size)]
            if ours_is_faster(same):
                faster_at.append(f"{size:,}")
        listed = ", ".join(faster_at) or "none of these sizes"
        say(f"\n{loss}, D = {dim}: ours is faster than every other method at N = {listed}.")


if __name__ == "__main__":
    main()
