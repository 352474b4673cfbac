"""What the Triton kernels compile to, and whether a tile's epilogue can hide behind its products.

    python tests/compiled_kernels.py        prints Markdown tables; a minute, no GPU needed

Triton brings a compiler and a disassembler for NVIDIA GPUs, so that the machine code for A100
(sm_80), H100 (sm_90) and B200 (sm_100) can be read on any machine. A program of lse_kernel or
grad_kernel runs a loop over D, BK dimensions at a time, and once an epilogue: masks, exponentials,
sums, stores. tests/test_infonce.py holds the counts to the bounds in EPILOGUE below.

The counts are facts about one Triton version. Cycles and efficiency are arithmetic, not measured:

- The tensor cores run at their peak rate, FLOP_PER_CYCLE of the chip, and the loop's other
  instructions hide behind them.
- Each of an SM's four schedulers issues one instruction of a warp per cycle and never waits. Real
  epilogues wait for barriers, shared memory and loads: this is the least they can take.
- An SM computes 16 exponentials per cycle.
- Branches within the epilogue count as not taken, and waits as over at once.
- On sm_100 one warp starts the matrix instructions, but they count for all warps: a few dozen
  among thousands of instructions.

"Alone": the tensor cores rest during the epilogue, which holds where one program fills an SM.
"Together": another program's products run during the epilogue. That needs two programs an SM, or a
persistent kernel with separate warps for the epilogue; no kernel here is persistent.
"""

from __future__ import annotations  # product_kernel's tl.constexpr is not evaluated without Triton

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from kernels import infonce  # noqa: E402

tl = getattr(infonce, "tl", None)  # None without Triton: then nothing here can run

KERNELS = (infonce.lse_kernel, infonce.grad_kernel)
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")  # matrix instructions of sm_80, sm_90, sm_100
DIMS = (1536, 2048, 3584)
SCHEDULERS = 4  # per SM, on all three chips
EXP_PER_CYCLE = 16  # per SM, on all three chips
REGISTERS = 65536  # per SM, on all three chips
RESERVED_SHARED = 1024  # bytes that each program takes besides its own


class Chip(NamedTuple):
    """A GPU as far as the arithmetic needs it."""

    name: str
    arch: int  # 90 for sm_90
    tile: str  # key of infonce.TILES
    tma: bool
    flop_per_cycle: int  # dense bf16, per SM
    shared: int  # bytes of shared memory per SM
    matrix: str  # the fast matrix instruction


# These are compiled by the default tests: name, arch, tile, TMA, FLOP a cycle, shared, matrix.
A100 = Chip("A100", 80, "ampere", False, 2048, 167_936, "HMMA")
H100 = Chip("H100", 90, "hopper", True, 4096, 233_472, "HGMMA")
H100_POINTERS = H100._replace(name="H100, pointers", tma=False)  # for rows not aligned to 16 bytes
B200 = Chip("B200", 100, "blackwell", True, 8192, 233_472, "UTCHMMA")
CHIPS = (A100, H100, H100_POINTERS, B200)
# These are compiled by a slow test alone.
RARE_CHIPS = (
    B200._replace(name="B200, pointers", tma=False),
    Chip("RTX 4090", 89, "ampere", False, 512, 102_400, "HMMA"),
    Chip("RTX 5090", 120, "ampere", True, 512, 102_400, "HMMA"),
)

# Instructions per warp outside of the loop: the larger count of Triton 3.6.0 and 3.7.1.
# tests/test_infonce.py lets them grow by 15 %.
EPILOGUE = {
    ("A100", "lse_kernel"): 4130,
    ("A100", "grad_kernel"): 3756,
    ("H100", "lse_kernel"): 4713,
    ("H100", "grad_kernel"): 4218,
    ("H100, pointers", "lse_kernel"): 4702,
    ("H100, pointers", "grad_kernel"): 4396,
    ("B200", "lse_kernel"): 7607,
    ("B200", "grad_kernel"): 5360,
}


class Alternative(NamedTuple):
    """A tile that only a GPU can judge: edit the chip's line in infonce.TILES to try it."""

    chip: Chip
    name: str
    changes: dict
    per_sm: int  # programs that must fit an SM

    def tile(self):
        """Return the chip's tile with the changes."""
        return infonce.TILES[self.chip.tile] | self.changes


HALF_TILE = dict(BM=128, BN=128, WIDTH=16, num_warps=4, num_stages=3)
ALTERNATIVES = (  # in the order in which to try them
    Alternative(H100, "taller", dict(BM=256, BN=128, WIDTH=16), per_sm=1),
    Alternative(H100, "two an SM", HALF_TILE, per_sm=2),
    Alternative(A100, "taller", dict(BM=256, BN=128, WIDTH=32), per_sm=1),
)


@infonce.jit
def product_kernel(
    q,
    d,
    grad_ptr,
    N,
    M,
    D,
    stride_q,
    stride_d,
    stride_grad,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Store q d^T in bf16: the same tile with the least possible epilogue, for comparison."""
    tile, m, n = infonce._similarity_tile(q, d, N, M, D, stride_q, stride_d, BM, BN, BK, TMA)
    i = m * BM + tl.arange(0, BM)
    j = n * BN + tl.arange(0, BN)
    offset = i.to(tl.int64)[:, None] * stride_grad + j[None, :]
    inside = (i < N)[:, None] & (j < stride_grad)[None, :]
    tl.store(grad_ptr + offset, tile.to(tl.bfloat16), mask=inside)


def compile_kernel(kernel, tile, tma, arch):
    """Compile a kernel for bf16 inputs as a launch would, with no GPU at hand.

    kernel: one of KERNELS or product_kernel. tile: an entry of infonce.TILES. arch: 90 for sm_90.
    D and the strides are assumed to be multiples of 16.
    """
    from triton.backends.compiler import GPUTarget

    constants = {name: tile[name] for name in ("BM", "BN", "BK", "WIDTH")} | {"TMA": tma}
    integers = {f"{name}_ptr" for name in infonce.Masks._fields if name != "threshold"}
    integers.add("target_ptr")
    multiples_of_16 = {"stride_q", "stride_d", "stride_grad", "D"}
    signature = {}  # argument -> type
    values = {}  # (position,) -> constant
    attributes = {}  # (position,) -> the compiler may count on these
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(position,)] = constants[name]
        elif name in ("q", "d"):
            rows = tile["BM"] if name == "q" else tile["BN"]
            signature[name] = f"tensordesc<bf16[{rows}, {tile['BK']}]>" if tma else "*bf16"
        elif name == "grad_ptr":
            signature[name] = "*bf16"
        elif name.endswith("_ptr"):
            signature[name] = "*i32" if name in integers else "*fp32"
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or name in multiples_of_16:
            attributes[(position,)] = [["tt.divisibility", 16]]

    source = infonce.triton.compiler.ASTSource(kernel, signature, values, attributes)
    options = dict(num_warps=tile["num_warps"], num_stages=tile["num_stages"])
    return infonce.triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


class Program(NamedTuple):
    """A compiled kernel: what one program needs of an SM, and its instructions per warp."""

    tile: dict
    registers: int  # per thread
    stack: int  # bytes per thread: spilled registers
    local: int  # bytes per thread, besides the stack
    shared: int  # bytes
    loop: Counter  # opcode -> instructions in one round of the loop over D
    once: Counter  # opcode -> instructions outside of the loop

    def matrix(self, instructions):
        """Count the matrix instructions among them."""
        return sum(instructions[opcode] for opcode in MATRIX)

    def rounds(self, D):
        """Return how often the loop runs: D / BK, less the steps that stand before the loop."""
        before = self.matrix(self.once) // self.matrix(self.loop)
        return D // self.tile["BK"] - before

    def per_sm(self, chip):
        """Return how many programs fit an SM by registers, shared and tensor memory."""
        per_warp = -(-self.registers * 32 // 256) * 256  # registers come in units of 256
        fits = [
            REGISTERS // (per_warp * self.tile["num_warps"]),
            chip.shared // (self.shared + RESERVED_SHARED),
        ]
        if chip.arch == 100:
            fits.append(512 // self.tile["BN"])  # columns of tensor memory
        return min(fits)


def run_tool(name, *arguments):
    """Run one of the CUDA tools that come with Triton and return its output."""
    path = Path(infonce.triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def compile_program(kernel, tile, chip):
    """Compile a kernel for a chip and count its instructions -> Program."""
    binary = compile_kernel(kernel, tile, chip.tma, chip.arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "cubin")
        cubin.write_bytes(binary.asm["cubin"])
        usage = run_tool("cuobjdump", "--dump-resource-usage", cubin)
        assembly = run_tool("nvdisasm", "--print-code", cubin)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    loop, once = count_instructions(assembly)
    return Program(
        tile=tile,
        registers=int(registers),
        stack=int(stack),
        local=int(local),
        shared=binary.metadata.shared,
        loop=loop,
        once=once,
    )


def count_instructions(assembly):
    """Count instructions by opcode, in the loop with the products and outside -> two Counters.

    assembly: nvdisasm's output for one kernel.
    """
    opcodes = []
    labels = {}  # label -> number of the instruction behind it
    jumps = []  # (number of the instruction, label)
    for line in assembly.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        if label:
            labels[label[1]] = len(opcodes)

        #                        /*0f30*/    @!P0      BRA           `(.L_x_2) ;
        instruction = re.match(r"\s*/\*\w+\*/\s+(?:@!?\w+ +)?([A-Z]\w*)(.*)", line)
        if not instruction:
            continue
        opcode, operands = instruction.groups()
        target = re.search(r"`\((\.L_\w+)\)", operands)
        if target:
            jumps.append((len(opcodes), target[1]))
        opcodes.append(opcode)

    # Behind the last EXIT stand waits, entered only when something is late.
    end = len(opcodes) - opcodes[::-1].index("EXIT")
    loops = []
    for jump, label in jumps:
        start = labels[label]
        if start <= jump < end and set(MATRIX) & set(opcodes[start : jump + 1]):
            loops.append((jump + 1 - start, start))
    length, start = min(loops)  # the innermost
    loop = Counter(opcodes[start : start + length])
    return loop, Counter(opcodes[:end]) - loop


class Cycles(NamedTuple):
    """Estimated cycles of an SM for one tile (assumptions: top of the file)."""

    products: float  # of the tensor cores
    loop: float  # to issue the loop's instructions
    epilogue: float  # to issue all other instructions, or for the exponentials if that is longer
    issued: int  # instructions per warp, in all
    matrix: int  # matrix instructions among them

    def alone(self):
        """Return the share of the tensor cores' peak if they rest during the epilogue."""
        return self.products / (max(self.products, self.loop) + self.epilogue)

    def together(self):
        """Return the share of their peak if another program's products fill the epilogue."""
        return self.products / max(self.products, self.loop + self.epilogue)


def estimate(program, chip, D):
    """Estimate the Cycles of one tile with D dimensions."""
    tile = program.tile
    warps = tile["num_warps"]
    rounds = program.rounds(D)
    in_loop = sum(program.loop.values()) * rounds
    once = sum(program.once.values())
    exponentials = program.once["MUFU"] * warps * 32 / EXP_PER_CYCLE
    return Cycles(
        products=2 * tile["BM"] * tile["BN"] * D / chip.flop_per_cycle,
        loop=in_loop * warps / SCHEDULERS,
        epilogue=max(once * warps / SCHEDULERS, exponentials),
        issued=in_loop + once,
        matrix=program.matrix(program.loop) * rounds + program.matrix(program.once),
    )


def resource_row(name, kernel, program, chip):
    """Format a row of the first table."""
    cycles = estimate(program, chip, D=2048)
    tile = program.tile
    threads = tile["num_warps"] * 32
    per_logit = sum(program.once.values()) * threads / (tile["BM"] * tile["BN"])
    cells = [
        name,
        kernel.__name__,
        program.registers,
        program.stack + program.local,
        f"{program.shared / 1024:.0f}",
        program.per_sm(chip),
        f"{program.matrix(program.loop)} {chip.matrix}",
        sum(program.loop.values()),
        f"{sum(program.once.values()):,}",
        f"{per_logit:.0f}",
        program.once["MUFU"],
        f"{1 - cycles.matrix / cycles.issued:.1%}",
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def cycles_row(name, kernel, program, chip):
    """Format a row of the second table."""
    cells = [name, kernel.__name__, program.per_sm(chip)]
    cells.append(f"{estimate(program, chip, D=2048).epilogue:,.0f}")  # the same for every D
    for D in DIMS:
        cycles = estimate(program, chip, D)
        cells.append(f"{cycles.products:,.0f}")
        cells.append(f"{cycles.alone():.0%}")
        cells.append(f"{cycles.together():.0%}")
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main():
    """Print the two tables: counts, and cycles by arithmetic."""
    cases = []
    for chip in CHIPS:
        for kernel in (*KERNELS, product_kernel):
            cases.append((chip.name, kernel, infonce.TILES[chip.tile], chip))
    for other in ALTERNATIVES:
        for kernel in KERNELS:
            cases.append((f"{other.chip.name}, {other.name}", kernel, other.tile(), other.chip))

    resources = [
        "| chip | kernel | registers | spilled, bytes | shared, KiB | programs an SM "
        "| matrix instructions a round | instructions a round | outside of the loop "
        "| per logit and thread | exponentials | not matrix, D = 2048 |",
        "|" + "---|" * 12,
    ]
    dims = " | ".join(f"products, D = {D} | alone | together" for D in DIMS)
    cycles = [
        f"| chip | kernel | programs an SM | epilogue | {dims} |",
        "|" + "---|" * (4 + 3 * len(DIMS)),
    ]
    for name, kernel, tile, chip in cases:
        program = compile_program(kernel, tile, chip)
        resources.append(resource_row(name, kernel, program, chip))
        cycles.append(cycles_row(name, kernel, program, chip))
    print(f"Triton {infonce.triton.__version__}. Instructions are per warp.\n")
    print("\n".join(resources))
    print("\nCycles of an SM per tile, and the share of the tensor cores' peak: arithmetic.\n")
    print("\n".join(cycles))


if __name__ == "__main__":
    main()
