"""Files: JSON lines, writes that are whole or absent, locks, fingerprints, hashes.

for number, row in read_jsonl("items.jsonl"): ...
with whole_file("vectors.npy", "wb") as file: np.save(file, vectors)
with whole_folder("runs/gve") as staging: model.save_pretrained(staging)
with file_lock("runs/synth/lock"): ...
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import uuid
from pathlib import Path

import filelock


def parse_json(text, where, kind=dict):
    """Parse `text` (str or bytes) as one JSON value of type `kind` (dict or list).

    Raises ValueError that begins with `where`, usually "file:line".
    """
    try:
        value = json.loads(text)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "list"
        raise ValueError(f"{where}: expected a JSON {wanted}, got {type(value).__name__}")
    return value


def read_jsonl(path):
    """Yield (line number from 1, dict) for each line of a JSON-lines file that is not blank.

    Raises ValueError naming file:line.
    """
    with open(path, "rb") as file:  # bytes: bad UTF-8 spoils its own line only
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line, f"{path}:{number}")
            except ValueError as error:
                raise ValueError(f"{error}{guess_cause(line)}") from error
            yield number, row


def guess_cause(line):
    """Guess how a file was saved of which this line (bytes) is no JSON object; "" if unknown."""
    if b"\0" in line:
        return " (UTF-16? Save the file as UTF-8)"
    if b"\r" in line.strip():
        return " (do its lines end in a carriage return alone? Save it with line feeds)"
    if line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        return " (a JSON list? Write one object a line, without brackets around and commas between)"
    return ""


def load_jsonl(path):
    """Return all rows of a JSON-lines file as a list of dicts."""
    return [row for _, row in read_jsonl(path)]


@contextlib.contextmanager
def name_what_failed(path):
    """Turn an error of the disk inside the block into an OSError that names `path` and the reason.

    A full disk raises an OSError without a name from write(), and errors of their own types from
    the Rust libraries safetensors and tokenizers. All other errors pass as they are.
    """
    try:
        yield
    except OSError as error:
        named = error.filename is not None and not str(error.filename).endswith(".part")
        if named or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # as Rust words it
        if not found:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


@contextlib.contextmanager
def whole_file(path, mode="w", sync=True):
    """Open a file for writing that gets its name only once it is complete and on the disk.

    A reader sees the old file or the new one, never half of it. If the block raises, the old file
    stays; an error of the disk names it. sync=False does not wait for the disk: whole whatever
    happens to the process, but not if the machine loses power.
    """
    path = Path(path)
    # A name of its own for each writer: several processes may write the same file at once.
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    encoding = None if "b" in mode else "utf-8"
    try:
        with name_what_failed(path), open(part, mode, encoding=encoding) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # a folder that cannot be written has none
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder):
    """Yield an empty folder; its files move into `folder` once all are written and on the disk.

    Other files of `folder` stay. If the block raises, nothing has changed, and an error of the disk
    names `folder`.
    """
    folder = Path(folder).absolute()  # "." has no name
    staging = folder.with_name(folder.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)  # of a killed process
    try:
        with name_what_failed(folder):
            staging.mkdir(parents=True)
            yield staging
            sync_folder(staging)
            shutil.copytree(staging, folder, copy_function=os.replace, dirs_exist_ok=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync_folder(folder):
    """Wait until a folder's files are on the disk; a full network disk may only say so here."""
    for path in [*Path(folder).rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path, value, indent=1):
    """Write one JSON value, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=indent) + "\n")


def write_jsonl(path, rows, indent=None):
    """Write JSON lines, whole or not at all (indent: for files that people read)."""
    with whole_file(path) as file:
        for row in rows:
            text = json.dumps(row, ensure_ascii=False, indent=indent)
            # Half an emoji, or a file name that is not UTF-8: JSON can escape it, UTF-8 cannot.
            text = re.sub(r"[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)
            file.write(text + "\n")


@contextlib.contextmanager
def file_lock(path, wait=True):
    """Hold an exclusive lock on `path` and yield True; False if it is taken and wait is False.

    The operating system releases the lock when its process dies, however it dies.
    """
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=wait)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def visible_files(folder):
    """List the files below a folder as sorted Paths; hidden files and folders are left out.

    Hidden are a Mac's companions of files (._a.mp4), for one. Links to folders are followed.
    """
    found = []
    seen = set()  # a link to a folder above would lead round in circles
    for at, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(at)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(at) / name for name in names if not name.startswith(".")]
    return sorted(found)


def file_fingerprint(path):
    """Return [[name, size, mtime in ns]] of a file, or of each file in a folder of frames.

    Used in cache keys as a cheap proxy for file contents.
    """
    files = sorted(Path(path).iterdir()) if os.path.isdir(path) else [Path(path)]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def hash_files(folder, pattern="*.safetensors"):
    """Return the SHA-256 of a folder's matching files; None if it has none (a hub id, say).

    Takes about a second per GB.
    """
    files = sorted(Path(folder).glob(pattern))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def git_commit():
    """Return this repository's checked-out commit, for the record; None outside a checkout.

    "+edited" follows it if tracked files were changed since.
    """
    repository = Path(__file__).resolve().parent.parent
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+edited"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=repository)
    except FileNotFoundError:  # no git on this machine
        return None
    return found.stdout.strip() or None


def short_commit():
    """Return git_commit() with seven digits, "unknown" outside a checkout."""
    commit, plus, edited = (git_commit() or "unknown").partition("+")
    return commit[:7] + plus + edited
