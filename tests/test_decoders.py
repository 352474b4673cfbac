"""support/decoders.py: clips that hang in C or crash, results of any size, parents that die."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from support.decoders import DecoderPool, Failed

ROOT = Path(__file__).parent.parent


def decode(key):
    """Stand in for a decoder: the key says how it behaves."""
    if key == "hang":
        ctypes.PyDLL(None).sleep(1000)  # in C, holding the interpreter's lock
    if key == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if key == "slow":
        time.sleep(1)
        return key
    if key == "large":
        return torch.ones(5_000_000)
    if key == "damaged":
        raise ValueError("damaged.mp4: not a readable video")
    if key == "odd":
        raise KeyError("odd")
    return {"number": torch.tensor([key]), "half": torch.zeros(2, dtype=torch.bfloat16)}


def failures(results):
    return [result.reason for _, result in results if isinstance(result, Failed)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_whole_and_in_order(workers):
    keys = [*range(100), "large", *range(100, 200)]
    results = list(DecoderPool(decode, workers=workers).map(iter(keys)))
    assert [key for key, _ in results] == keys
    for key, result in results:
        if key == "large":
            assert torch.equal(result, torch.ones(5_000_000))
        else:
            assert result["number"].item() == key and result["half"].dtype == torch.bfloat16


def test_a_clip_that_hangs_or_crashes_costs_itself_alone():
    keys = [0, "hang", 1, "crash", "crash", "damaged", "odd", *range(2, 50), "hang", 50]
    pool = DecoderPool(decode, lambda key: f"clip {key}", workers=2, seconds=2)
    began = time.time()
    results = list(pool.map(keys))
    assert time.time() - began < 30
    assert [key for key, _ in results] == keys
    assert failures(results) == [
        "clip hang: not decoded within 2 s",
        "clip crash: its decoder crashed",
        "clip crash: its decoder crashed",
        "damaged.mp4: not a readable video",
        "clip odd: KeyError('odd')",
        "clip hang: not decoded within 2 s",
    ]
    assert pool("crash") == Failed("clip crash: its decoder crashed")
    assert pool(7)["number"].item() == 7


def test_without_workers_errors_are_results_as_well():
    results = list(DecoderPool(decode, lambda key: f"clip {key}").map([1, "damaged", "odd"]))
    assert failures(results) == ["damaged.mp4: not a readable video", "clip odd: KeyError('odd')"]


def test_a_decoder_killed_from_outside_costs_one_clip():
    """As the kernel's out-of-memory killer does, to a decoder at work and to an idle one."""
    earlier = set(multiprocessing.active_children())
    stream = DecoderPool(decode, workers=2, seconds=100).map([0, "hang", "hang", *range(20)])
    next(stream)
    decoders = set()
    while len(decoders) < 2:
        decoders = set(multiprocessing.active_children()) - earlier
        time.sleep(0.01)
    for decoder in decoders:
        decoder.kill()
    assert failures(stream) == ["hang: its decoder crashed"] * 2

    pool = DecoderPool(decode, workers=1, seconds=100)
    assert pool(1)["number"].item() == 1
    decoder = pool.thread.worker.process
    decoder.kill()
    decoder.join()
    assert pool(2) == Failed("2: its decoder crashed")
    assert pool(3)["number"].item() == 3


def test_no_process_is_forked_while_the_caller_holds_the_lock():
    lock = threading.Lock()
    stream = DecoderPool(decode, workers=1, fork_lock=lock).map(["crash", *range(40)])
    with lock:
        began = time.time()
        threading.Timer(1, lock.release).start()
        next(stream)
        assert time.time() - began > 0.9
        lock.acquire()
    assert failures(stream) == []


PARENT = """
import multiprocessing, os, sys, time
from support.decoders import DecoderPool
sys.path.insert(0, "tests")
from test_decoders import decode, failures
"""


def start(code):
    return subprocess.Popen(
        [sys.executable, "-c", PARENT + code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_decoders_die_with_their_parent_even_while_they_hang_in_c():
    parent = start("""
stream = DecoderPool(decode, workers=2).map([0, 1, "hang", "hang"])
next(stream), next(stream)
time.sleep(0.5)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
time.sleep(100)
""")
    decoders = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(decoders) == 2 and all(running(pid) for pid in decoders)
    parent.kill()
    parent.wait()
    deadline = time.time() + 10
    while any(running(pid) for pid in decoders):
        assert time.time() < deadline, "a decoder outlived its parent"
        time.sleep(0.05)


def test_a_signal_to_the_process_group_leaves_the_parent_its_decoders():
    parent = start("""
import signal
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
stream = DecoderPool(decode, workers=2).map([0, *["slow"] * 4, *range(20)])
next(stream)
print("ready", flush=True)
while not stopped:
    time.sleep(0.05)
results = list(stream)
print(len(results), failures(results), flush=True)
""")
    assert parent.stdout.readline() == "ready\n"
    os.killpg(parent.pid, signal.SIGTERM)
    assert parent.communicate(timeout=60)[0] == "24 []\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_every_process_of_the_job_leaves_the_parent_its_decoders(number):
    """As SLURM sends it; torchrun's and a terminal's signals reach a process group."""
    parent = start("""
stream = DecoderPool(decode, workers=2).map([0, *["slow"] * 4, *range(20)])
next(stream)
time.sleep(0.3)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
results = list(stream)
print(len(results), failures(results), flush=True)
""")
    decoders = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(decoders) == 2
    for decoder in decoders:
        os.kill(decoder, number)
    assert parent.communicate(timeout=60)[0] == "24 []\n"


def test_a_process_ends_at_once_with_a_decoder_that_its_main_thread_left_idle_or_hanging():
    idle = start("print(DecoderPool(decode, workers=1)(7) and 'decoded', flush=True)")
    assert idle.communicate(timeout=30)[0] == "decoded\n"
    assert idle.returncode == 0

    # A child of multiprocessing, which runs no handlers of atexit
    child = multiprocessing.get_context("fork").Process(
        target=lambda: DecoderPool(decode, workers=1)(7)
    )
    child.start()
    child.join(30)
    child.kill()
    assert child.exitcode == 0

    hanging = start("""
import signal, threading
threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
DecoderPool(decode, workers=1)("hang")
""")
    hanging.communicate(timeout=30)
    assert hanging.returncode == -signal.SIGINT
