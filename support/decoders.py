"""Decode in processes that may hang or crash without harm to the process that runs the model.

    pool = DecoderPool(decode, describe, workers=4, seconds=60)
    for key, result in pool.map(keys):
        if isinstance(result, Failed): print(result.reason)

FFmpeg and Pillow are C code: a damaged file can crash the process or take for ever. Either costs
that one item here.

Why not torch's DataLoader: a crashed or hung worker ends the training process, and there is no time
limit per item. Why not pebble.ProcessPool (tried, see NOTES.md): its workers share one pipe, so a
worker killed at the wrong moment ends the pool, and a large result keeps the other workers waiting,
which counts against their time limits.
"""

import collections
import contextlib
import ctypes
import dataclasses
import io
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal that a process gets when its parent dies


@dataclasses.dataclass(frozen=True)
class Failed:
    """Stands for the result of an item that could not be decoded."""

    reason: str


class TensorPickler(pickle.Pickler):
    """Pickle tensors as arrays, four times as fast as torch does (numpy has no bfloat16)."""

    def reducer_override(self, value):
        if isinstance(value, torch.Tensor) and value.dtype != torch.bfloat16:
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def dumps(value):
    """Pickle to bytes.

    Not multiprocessing's own way, in which tensors lie in shared memory and die with the worker.
    """
    buffer = io.BytesIO()
    TensorPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def serve(pipe, parents_end, decode):
    """Run in a worker process: receive keys, send decode(key), until the parent closes the pipe."""
    parents_end.close()  # an open copy in this process would hide the parent's death

    # A worker that hangs in C outlives its parent otherwise, and keeps a dead rank's GPU memory.
    # (To Linux the parent is the thread that forked: workers end with DecoderPool.map's threads.)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Own session: a SIGTERM to the process group must not kill decoders, since the parent finishes
    # its step first.
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler is not this process's
    torch.set_num_threads(1)

    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send_bytes(dumps(decode(pipe.recv())))


class Worker:
    """One process that calls decode(key), replaced when it crashes or exceeds its time limit."""

    def __init__(self, decode, describe, seconds, fork_lock):
        self.decode = decode
        self.describe = describe
        self.seconds = seconds
        self.fork_lock = fork_lock
        self.process = None

    def start(self):
        # A forked process has everything that `decode` refers to: nothing need be pickled. It also
        # has copies of all locks in their current state: never fork while a thread runs the model.
        fork = multiprocessing.get_context("fork")
        with self.fork_lock:
            self.pipe, workers_end = fork.Pipe()
            self.process = fork.Process(
                target=serve, args=(workers_end, self.pipe, self.decode), daemon=True
            )
            self.process.start()
            workers_end.close()

    def __call__(self, key):
        """Return decode(key), or Failed if the process died or took too long."""
        if self.process is None:
            self.start()

        try:
            self.pipe.send(key)
            if self.pipe.poll(self.seconds):
                return pickle.loads(self.pipe.recv_bytes())
            reason = f"not decoded within {self.seconds:g} s"
        except (EOFError, OSError):
            reason = "its decoder crashed"

        self.process.kill()  # code that hangs in C ends only with its process
        self.process = None
        return Failed(f"{self.describe(key)}: {reason}")


class DecoderPool:
    """Call decode(key) in worker processes, ahead of the caller and in order.

    decode     key -> anything that pickles. A ValueError or FileNotFoundError becomes Failed with
               its message, any other exception Failed with describe(key) before it: a decoder may
               raise anything over a damaged file.
    describe   key -> str that names the item; a crash gives Failed("<name>: its decoder crashed").
    workers    processes; 0 decodes in this process, without a time limit.
    seconds    time limit of one item.
    fork_lock  held by the caller while it runs the model, so that no process is forked meanwhile.
    """

    def __init__(self, decode, describe=str, *, workers=0, seconds=60.0, fork_lock=None):
        self.decode = decode
        self.describe = describe
        self.workers = workers
        self.seconds = seconds
        self.fork_lock = fork_lock or threading.Lock()
        self.thread = threading.local()  # .worker: each thread has a process of its own

    def decode_here(self, key):
        """Run decode(key) in this process and turn exceptions into Failed."""
        try:
            return self.decode(key)
        except (ValueError, FileNotFoundError) as error:
            return Failed(str(error))
        except Exception as error:
            return Failed(f"{self.describe(key)}: {error!r}")

    def __call__(self, key):
        """Decode one item now -> decode(key) or Failed."""
        if not self.workers:
            return self.decode_here(key)
        if not hasattr(self.thread, "worker"):
            self.thread.worker = Worker(
                self.decode_here, self.describe, self.seconds, self.fork_lock
            )
        return self.thread.worker(key)

    def map(self, keys, ahead=0, lend_threads=False):
        """Yield (key, decode(key) or Failed) in the order of keys, perhaps an endless iterator.

        ahead: the least number of items to decode before they are asked for. lend_threads: until
        the end, torch in this process uses one thread less for each worker; for callers that wait
        for their decoders, not for training.
        """
        if not self.workers:
            for key in keys:
                yield key, self.decode_here(key)
            return

        executor = ThreadPoolExecutor(self.workers)
        threads_before = torch.get_num_threads()
        if lend_threads:
            torch.set_num_threads(max(1, threads_before - self.workers))

        # Submitted as results are taken, because keys may have no end.
        tasks = ((key, executor.submit(self, key)) for key in keys)
        waiting = collections.deque(itertools.islice(tasks, max(ahead, 32 * self.workers)))
        try:
            while waiting:
                key, future = waiting.popleft()
                yield key, future.result()
                waiting.extend(itertools.islice(tasks, 1))
        finally:
            torch.set_num_threads(threads_before)
            executor.shutdown(cancel_futures=True)
