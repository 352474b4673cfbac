"""UVRB, the universal video retrieval benchmark: its 16 datasets, how to read and check their
folders, and its nine abilities (arXiv 2510.27571, section 3.1, Tables 4 and 5).

    python uvrb.py check DIR             a summary, and bad rows as file:line: reason (seconds)
    python uvrb.py check DIR --decode    also decode every video and image (hours on the full UVRB)

`read` turns a dataset's <DS>/jsonl/{queries,corpus,instances}.jsonl into items and lists of
indices. `abilities` turns 16 scores into the paper's nine abilities: from the paper's Table 1 it
computes its Table 2 to within 0.0011, two misprints apart (tests/test_uvrb.py).

A file benchmark.json in the folder declares another benchmark. It gives the sizes of those of
UVRB's datasets that are there, and may define datasets of its own:

    {"name": "mine", "datasets": {
        "MSRVTT": {"queries": 200, "corpus": 200},
        "MyVideos": {"queries": 5, "corpus": 20,
                     "task": "TXT", "metric": "R@1", "prompt": "Find my video."}}}

Legend: N queries, M corpus items; "positives" and "pools" are lists of corpus indices per query.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import data
from support.decoders import DecoderPool, Failed
from support.files import parse_json
from support.flags import flag, parse_flags
from support.media import load_image, open_clip
from support.progress import first_few

MODALITIES = ("text", "image", "video")
# The values that a dataset's task, domain and metric may have.
TASKS = ("TXT", "CMP", "VIS", "V2T")
DOMAINS = ("CG", "S", "T", "PR", "LC")
METRICS = ("R@1", "R@5", "R@10", "P@1")
# Table 2's columns; its average is over the first six.
ABILITIES = ("TXT", "CMP", "VIS", "CG", "FG", "LC", "S", "T", "PR")


class Dataset(NamedTuple):
    name: str
    task: str  # form of the query: TXT text, CMP composed, VIS visual; V2T: labels as the corpus
    domain: str  # of a TXT dataset: CG, S, T, PR or LC (FG is made of S, T and PR); else empty
    metric: str  # Table 5
    # Sizes of the complete dataset, None where they are not known (Table 4).
    # PAPER: the corpus of 10 of MS-TI and MS-TV is read as each query's pool, as in MMEB-V2.
    queries: int | None
    corpus: int | None
    prompt: str  # instruction of the queries (Table 5); corpus items get the default system prompt
    in_average: bool = False  # one of the paper's 16, over which its averages are taken


PROMPTS = {
    "MSRVTT": "Find the clip that corresponds to the described scene in the given video.",
    "DiDeMo": "Find a video that includes the following described scenes.",
    "CRB-G": "Find the video according to the general text description.",
    "CRB-S": "Find the video according to the spatial description.",
    "VDC-O": "Find the video according to the object description.",
    "CRB-T": "Find the video according to the temporal description.",
    "CMRB": "Find the video according to the camera motion description.",
    "DREAM-E": "Find the video according to the text description.",
    "LoVR-TH": "Find the video according to text description about video theme information.",
    "PEV-K": "Find the video according to the text description of a series of keywords.",
    "LoVR-V": "Find the long video according to the long text description.",
    "VDC-D": "Find the video according to the detailed text description.",
    "MS-TI": "Find the video clip that corresponds to the given text and the given image.",
    "MS-TV": "Find the video clip that corresponds to the given text and the given video.",
    "MSRVTT-I2V": "Find the video according to the image.",
    "LoVR-C2V": "Find the original long video according to the short video clip.",
}

TABLE_4 = [  # name, task, domain, metric, queries, corpus, prompt
    Dataset("MSRVTT", "TXT", "CG", "R@1", 1000, 1000, PROMPTS["MSRVTT"], in_average=True),
    Dataset("DiDeMo", "TXT", "CG", "R@1", 1004, 1004, PROMPTS["DiDeMo"], in_average=True),
    Dataset("CRB-G", "TXT", "CG", "R@1", 1000, 1000, PROMPTS["CRB-G"], in_average=True),
    Dataset("CRB-S", "TXT", "S", "R@1", 1000, 1000, PROMPTS["CRB-S"], in_average=True),
    Dataset("VDC-O", "TXT", "S", "R@1", 1027, 1027, PROMPTS["VDC-O"], in_average=True),
    Dataset("CRB-T", "TXT", "T", "R@1", 1000, 1000, PROMPTS["CRB-T"], in_average=True),
    Dataset("CMRB", "TXT", "T", "R@10", 728, 1071, PROMPTS["CMRB"], in_average=True),
    Dataset("DREAM-E", "TXT", "PR", "R@1", 6251, 1000, PROMPTS["DREAM-E"], in_average=True),
    Dataset("LoVR-TH", "TXT", "PR", "R@10", 8854, 8854, PROMPTS["LoVR-TH"], in_average=True),
    Dataset("PEV-K", "TXT", "PR", "R@1", 14427, 15000, PROMPTS["PEV-K"], in_average=True),
    Dataset("LoVR-V", "TXT", "LC", "R@1", 100, 467, PROMPTS["LoVR-V"], in_average=True),
    Dataset("VDC-D", "TXT", "LC", "R@1", 1000, 1027, PROMPTS["VDC-D"], in_average=True),
    Dataset("MS-TI", "CMP", "", "P@1", 400, 10, PROMPTS["MS-TI"], in_average=True),
    Dataset("MS-TV", "CMP", "", "P@1", 400, 10, PROMPTS["MS-TV"], in_average=True),
    Dataset("MSRVTT-I2V", "VIS", "", "R@1", 1000, 1000, PROMPTS["MSRVTT-I2V"], in_average=True),
    Dataset("LoVR-C2V", "VIS", "", "R@1", 467, 467, PROMPTS["LoVR-C2V"], in_average=True),
]
DATASETS = {dataset.name: dataset for dataset in TABLE_4}

# Table 11, zero-shot classification: clips are queries, class names the corpus, accuracy is R@1.
# PAPER: sizes and prompt are not given. The prompt is ours, and a folder counts as complete if
# every item in it could be encoded.
LABEL_PROMPT = "Find the label that names what happens in the video."
ZERO_SHOT = {
    name: Dataset(name, "V2T", "", "R@1", None, None, LABEL_PROMPT)
    for name in ("K700", "UCF101", "HMDB51", "SSV2", "Breakfast")
}
ALL = DATASETS | ZERO_SHOT


def abilities(scores: dict) -> dict:
    """Average dataset scores into the nine abilities and two averages (section 3.1).

    The rules are recovered from Tables 1 and 2. The means are hierarchical: FG is the mean of S, T
    and PR, and TXT the mean of CG, FG and LC, not of their 7 and 12 datasets.

    scores: {dataset: score in [0, 1], or None}; only the paper's 16 enter.
    Returns {"TXT", ..., "PR", "AVG-D", "AVG-A"}; a mean over an absent score is None.
    """

    def mean(values):
        return None if None in values else sum(values) / len(values)

    members = [dataset for dataset in DATASETS.values() if dataset.in_average]
    means = {}
    for tag in ("CMP", "VIS", "CG", "LC", "S", "T", "PR"):
        means[tag] = mean([scores.get(d.name) for d in members if tag in (d.task, d.domain)])
    means["FG"] = mean([means["S"], means["T"], means["PR"]])
    means["TXT"] = mean([means["CG"], means["FG"], means["LC"]])

    result = {tag: means[tag] for tag in ABILITIES}
    # AVG-D is Table 1's column, the plain mean of 16 scores.
    result["AVG-D"] = mean([scores.get(d.name) for d in members])
    # AVG-A is Table 2's, a mean of six: S, T and PR count through FG alone.
    result["AVG-A"] = mean([means[tag] for tag in ABILITIES[:6]])
    return result


@dataclass
class Bench:
    """One dataset as read from its folder.

    Its rows are {"id", "item", "where": "file:line"}; items hold absolute media paths.
    """

    name: str
    dataset: Dataset
    queries: list  # N rows
    corpus: list  # M rows
    positives: list  # N sorted lists of corpus indices
    # N sorted lists of corpus indices, positives and negatives; None: the whole corpus is ranked.
    pools: list | None
    # (queries, corpus) of the complete dataset, None where not known. The corpus of a CMP dataset
    # is not: Table 4's 10 is the size of a pool.
    expected: tuple
    # "file:line: reason" of absent media. Their items still name the path and fail when encoded.
    missing: list
    outside: int = 0  # media that are refused, since they lie outside the allowed folders
    # "file:line: note" of damaged videos that gave a part of their frames, as `scan` decodes them.
    damaged: list = field(default_factory=list)


def folder_of(root, name: str) -> Path | None:
    """Find the folder of a dataset's jsonl files, None if it is absent.

    Accepts <DS> and, as the released archives unpack, UVRB/<DS>, with jsonl/ or without.
    """
    root = Path(root)
    for folder in (root / name, root / name / "UVRB" / name, root / "UVRB" / name):
        for rows in (folder / "jsonl", folder):
            if (rows / "queries.jsonl").is_file():
                return rows
    return None


class Benchmark(NamedTuple):
    name: str
    datasets: dict  # {name: Dataset} with this benchmark's sizes: UVRB's, Table 11's, then its own


def benchmark(root) -> Benchmark:
    """Read which benchmark a folder holds: benchmark.json, or without that file "UVRB" and Table 4.

    Raises FileNotFoundError if root is no folder, ValueError naming the file, the key and the
    accepted values.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root}: no such benchmark folder")
    path = Path(root) / "benchmark.json"
    if not path.is_file():
        return Benchmark("UVRB", ALL)

    content = parse_json(path.read_bytes(), path)
    name = content.get("name")
    entries = content.get("datasets")
    if not isinstance(name, str):
        raise ValueError(f'{path}: "name" must be a string, got {name!r}')
    if not isinstance(entries, dict):
        form = '{DS: {"queries": int, "corpus": int, ...}}'
        raise ValueError(f'{path}: "datasets" must be {form}, got {entries!r}')

    declared = {}
    for key, entry in entries.items():
        try:
            declared[key] = define(key, entry)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    # Sizes that are not declared are unknown.
    datasets = {}
    for key, dataset in ALL.items():
        datasets[key] = declared.get(key, dataset._replace(queries=None, corpus=None))
    return Benchmark(name, datasets | declared)


def define(name, entry):
    """Return the Dataset that an entry of benchmark.json stands for: one of ours, or its own.

    Raises ValueError naming the key and the accepted values.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{name} must be an object with queries and corpus, got {entry!r}")
    needed = ["queries", "corpus"]
    if name not in ALL:
        needed += ["task", "metric", "prompt"]
    absent = [key for key in needed if key not in entry]
    if absent and name not in ALL:
        raise ValueError(f"{name} is none of UVRB's datasets and so needs {', '.join(absent)}, too")
    if absent:
        raise ValueError(f"{name} needs {', '.join(absent)}, too")

    sizes = {key: entry[key] for key in ("queries", "corpus")}
    for key, size in sizes.items():
        if type(size) is not int or size < 0:
            raise ValueError(f"{name}: {key} {size!r}; accepted: a number of rows")

    if name in ALL:
        changed = entry.keys() & {"task", "domain", "metric", "prompt"}
        if changed:
            raise ValueError(
                f"{name} is UVRB's: its {', '.join(sorted(changed))} cannot be changed"
            )
        return ALL[name]._replace(**sizes)

    if name == ".." or Path(name).parts != (name,):
        raise ValueError(f"{name!r} is not the name of a folder")
    for key, accepted in (("task", TASKS), ("domain", DOMAINS), ("metric", METRICS)):
        if key in entry and entry[key] not in accepted:
            raise ValueError(f"{name}: {key} {entry[key]!r}; accepted: {', '.join(accepted)}")
    if not isinstance(entry["prompt"], str):
        raise ValueError(f"{name}: prompt must be a string, got {entry['prompt']!r}")

    domain = entry.get("domain", "")
    return Dataset(name, entry["task"], domain, entry["metric"], *sizes.values(), entry["prompt"])


def find(root) -> tuple[list, list]:
    """Find the datasets of a benchmark folder -> (their names, a sentence for each thing amiss).

    Amiss are folders that no benchmark.json defines, datasets that it declares and that are not
    here, and a folder without any dataset. Raises as benchmark() does.
    """
    root = Path(root)
    known = benchmark(root).datasets
    names = [name for name in known if folder_of(root, name)]
    if not names and folder_of(root.resolve().parent, root.resolve().name):
        above = root.resolve().parent
        return [], [f"{root} is a dataset: give the folder that holds it, {above}"]

    amiss = []
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and folder.name not in known and folder_of(root, folder.name):
            amiss.append(definition_of(root, folder.name))

    if (root / "benchmark.json").is_file():
        declared = [name for name, dataset in known.items() if dataset.queries is not None]
        absent = [name for name in declared if name not in names]
        if absent:
            amiss.append(
                f"{root}: benchmark.json declares {', '.join(absent)}, but there is no "
                f"{absent[0]}/jsonl/queries.jsonl"
            )
    if not names and not amiss:
        amiss.append(
            f"{root}: none of the 16 datasets is here ({', '.join(DATASETS)}), nor one of your "
            "own, that is NAME/jsonl/queries.jsonl and a benchmark.json that defines NAME"
        )
    return names, amiss


def definition_of(root, name) -> str:
    """Say in one line how to define a dataset whose folder is in `root`, with its sizes."""
    path = Path(root) / "benchmark.json"
    folder = folder_of(root, name)
    entry = {}
    for key in ("queries", "corpus"):
        file = folder / f"{key}.jsonl"
        entry[key] = len(file.read_bytes().splitlines()) if file.is_file() else 0
    entry |= {"task": "TXT", "metric": "R@1", "prompt": "Find the video."}

    if path.is_file():
        return f'{name} is not defined; add to "datasets" of {path}: "{name}": {json.dumps(entry)}'
    content = {"name": "my benchmark", "datasets": {name: entry}}
    return f"{name} is none of UVRB's datasets; define it in {path}: {json.dumps(content)}"


def read(root, name: str, roots=()) -> Bench:
    """Read one dataset.

    Media may lie under `root`, under the folder that holds it, and under `roots`; a path or symlink
    that leads elsewhere is refused.

    Raises FileNotFoundError if the dataset is not below root, ValueError with file, line and reason
    of the first bad rows. Missing media do not raise: they are listed in `.missing`, and the
    evaluation reports n/expected.
    """
    bench, bad = scan(root, name, roots)
    if bad:
        raise ValueError("\n".join(first_few(bad, 5, f"more: python uvrb.py check {root}")))
    return bench


def scan(root, name: str, roots=(), decode=False) -> tuple[Bench, list]:
    """Read one dataset and collect its faults instead of stopping -> (Bench, ["file:line: why"]).

    decode: also load every video and image; those that cannot be decoded join `.missing`, those of
    which only a part can be decoded `.damaged`.
    """
    root = Path(root).resolve()
    known = benchmark(root).datasets
    if name not in known and folder_of(root, name):
        raise ValueError(definition_of(root, name))
    if name not in known:
        raise ValueError(f"unknown dataset {name!r} (accepted: {', '.join(known)})")
    folder = folder_of(root, name)
    if folder is None:
        raise FileNotFoundError(
            f"{root}: no {name} (expected {name}/jsonl/queries.jsonl, also below UVRB/ or without "
            "jsonl/)"
        )

    # Paths start at the dataset's folder or at a given root.
    bases = [folder.parent if folder.name == "jsonl" else folder]
    bases += [Path(path).resolve() for path in roots]
    # Videos may lie beside the benchmark, but not just anywhere: its parent is allowed, / never is.
    allowed = [root, *bases[1:]]
    if root.parent != root.parent.parent:
        allowed.append(root.parent)

    dataset = known[name]
    decoder = None
    if decode:  # in a process: a clip may hang or crash its decoder
        decoder = DecoderPool(load_medium, lambda key: str(key[1]), workers=1)
    reader = Reader(name, bases, allowed, decoder, bad=[], missing=[], outside=[], damaged=[])
    if dataset.queries is None and name in DATASETS:
        reader.bad.append(f"{root / 'benchmark.json'}: no sizes for {name}, whose folder is here")
    queries = reader.items(folder / "queries.jsonl")
    corpus = reader.items(folder / "corpus.jsonl")
    positives, pools = reader.instances(folder / "instances.jsonl", queries, corpus)
    if reader.outside:
        reader.bad.append(reader.explain_outside())

    whole_corpus = None if dataset.task == "CMP" else dataset.corpus
    expected = (dataset.queries or None, whole_corpus or None)
    outside = len(reader.outside)
    bench = Bench(
        name,
        dataset,
        queries,
        corpus,
        positives,
        pools,
        expected,
        reader.missing,
        outside,
        reader.damaged,
    )
    return bench, reader.bad


def load_medium(key):
    """Decode a medium, given as ("image" or "video", its path or span) -> a note on its damage.

    The note is empty if all of it can be decoded. Raises MediaError if none of it can.
    """
    kind, media = key
    if kind == "video":
        return open_clip(media).note
    load_image(media)
    return ""


@dataclass
class Reader:
    """Reads a dataset's three files. Faults go to lists and do not raise."""

    name: str
    bases: list  # folders that paths are relative to, the first that has the file counts
    allowed: list  # folders that media may lie in
    decoder: DecoderPool | None  # decodes every medium, if there is one
    bad: list  # "file:line: reason" of rows that cannot be used
    missing: list  # the same of media that are absent or cannot be decoded
    outside: list  # ("file:line", path as given, where it leads) of media in no allowed folder
    damaged: list  # "file:line: note" of videos that can be decoded in part

    def rows(self, path):
        """Yield ("file:line", row) of a jsonl file, good rows alone."""
        if not path.is_file():
            self.bad.append(f"{path}: no such file")
            return
        empty = True
        with open(path, "rb") as file:  # bytes: bad UTF-8 spoils its own line only
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = parse_json(line, where)
                except ValueError as error:
                    self.bad.append(str(error))
                    continue
                empty = False
                yield where, row
        if empty:
            self.bad.append(f"{path}: no rows")

    def items(self, path):
        """Read queries or corpus in file order -> [{"id", "item", "where"}].

        A row with a bad item keeps its place, its item None, so that references to it stay good.
        """
        out = []
        first = {}  # {id: "file:line" where it first stands}
        # Only decoding takes long. None: no bar where stderr is no terminal.
        no_bar = None if self.decoder else True
        label = f"{self.name} {path.name}"
        for where, row in tqdm(self.rows(path), label, leave=False, disable=no_bar):
            key = row.get("id")
            if not isinstance(key, str):
                self.bad.append(f'{where}: "id" must be a string, not {key!r}')
                continue
            if key in first:
                line = first[key].rpartition(":")[2]
                self.bad.append(f"{where}: duplicate id {key!r}, first on line {line}")
                continue
            first[key] = where
            try:
                item = self.item(row, where)
            except ValueError as error:
                self.bad.append(f"{where}: {error}")
                item = None
            out.append({"id": key, "item": item, "where": where})
        return out

    def item(self, row, where):
        """Turn a row into an item with absolute media paths; media that are absent are noted.

        Returns None if one of them leads outside the allowed folders, which is noted, too. Raises
        ValueError if the row is empty or has the wrong form.
        """
        item = {key: row[key] for key in MODALITIES if row.get(key)}  # released texts may be empty
        if not item:
            raise ValueError(
                f"nothing to embed: the row has {', '.join(row)}; one of "
                f"{', '.join(MODALITIES)} is needed"
            )
        data.check_item(item)

        for kind, inner in (("image", "video"), ("video", "path")):
            if kind not in item:
                continue
            media = item[kind]
            given = media[inner] if isinstance(media, dict) else media
            path = os.path.realpath(self.locate(given))
            item[kind] = {**media, inner: path} if isinstance(media, dict) else path

            if not any(Path(path).is_relative_to(folder) for folder in self.allowed):
                self.outside.append((where, given, path))
                return None
            if not os.path.exists(path):
                folders = ", ".join(map(str, self.bases))
                self.missing.append(
                    f"{where}: missing media: no {given!r} in {folders}, nor in videos/ or images/ "
                    "there"
                )
            elif self.decoder:
                result = self.decoder((kind, item[kind]))
                if isinstance(result, Failed):
                    self.missing.append(f"{where}: undecodable media: {result.reason}")
                elif result:
                    self.damaged.append(f"{where}: {result}")
        return item

    def locate(self, path):
        """Find a path below a base: as given, in videos/ or images/, or as videos_frames/<stem>."""
        places = []
        for base in self.bases:
            places += [base / path, base / "videos" / path, base / "images" / path]
            places.append(base / "videos_frames" / Path(path).stem)
        for place in places:
            if os.path.exists(place):  # False, and no error, of a path that is too long
                return str(place)
        return str(places[0])

    def explain_outside(self):
        """Say once for all media outside the allowed folders where they lie and how to allow it."""
        where, given, path = self.outside[0]
        others = ""
        if len(self.outside) > 1:
            others = f", and so do {len(self.outside) - 1} more media of {self.name}"
        folder = os.path.commonpath([os.path.dirname(path) for _, _, path in self.outside])
        if folder == os.sep:
            folder = os.path.dirname(path)
        allowed = ", ".join(map(str, self.allowed))
        return (
            f"{where}: {given!r} leaves the allowed roots: it leads to {path}{others}. "
            f"Allowed are {allowed}; add --root {folder}"
        )

    def instances(self, path, queries, corpus):
        """Read rows {"qid", "pos", "neg"?}, merging those of one query -> (positives, pools).

        Both are N sorted lists of corpus indices; pools is None if no row has a "neg".
        """
        query_of = {row["id"]: i for i, row in enumerate(queries)}
        corpus_of = {row["id"]: j for j, row in enumerate(corpus)}
        positives = [set() for _ in queries]
        negatives = [set() for _ in queries]
        for where, row in self.rows(path):
            i = query_of.get(str(row.get("qid")))
            if i is None:
                self.bad.append(f"{where}: qid {row.get('qid')!r} is not in queries.jsonl")
                continue
            for kind, found in (("pos", positives[i]), ("neg", negatives[i])):
                ids = row.get(kind) or []
                for key in ids if isinstance(ids, list) else [ids]:
                    if isinstance(key, str) and key in corpus_of:
                        found.add(corpus_of[key])
                    else:
                        self.bad.append(f"{where}: {kind} {key!r} is not in corpus.jsonl")

        pooled = any(negatives)
        for row, pos, neg in zip(queries, positives, negatives, strict=True):
            query = f"{row['where']}: query {row['id']!r}"
            if not pos:
                self.bad.append(f"{query} has no positive in {path.name}")
            if pos & neg:
                both = corpus[min(pos & neg)]["id"]
                self.bad.append(f"{query} has {both!r} as pos and as neg in {path.name}")
            # Its pool would hold positives only, and every ranking of it would be right.
            if pooled and not neg:
                self.bad.append(f"{query} has no neg in {path.name}, where others have")

        pools = None
        if pooled:
            pools = [sorted(pos | neg) for pos, neg in zip(positives, negatives, strict=True)]
        return [sorted(pos) for pos in positives], pools


def check(root, roots=(), decode=False, show=5) -> list:
    """Scan the datasets that are in `root` and print a line for each, with its first `show` faults.

    Returns all faults, bad rows and absent media as "file:line: reason". A damaged video of which a
    part can be decoded is no fault: it is printed alone.
    """
    title, _ = benchmark(root)
    names, bad = find(root)
    print_some(bad, len(bad))
    absent = [name for name in DATASETS if name not in names]
    if title == "UVRB" and names and absent:
        print(f"not here: {', '.join(absent)}")

    for name in names:
        bench, problems = scan(root, name, roots, decode)
        n = len(bench.queries)
        m = len(bench.corpus)
        pools = ""
        if bench.pools:
            sizes = [len(pool) for pool in bench.pools]
            pools = f", pools of {min(sizes)}-{max(sizes)}"
        outside = ""
        if bench.outside:
            outside = f", {bench.outside} outside the allowed roots"
        damaged = ""
        if bench.damaged:
            damaged = f", {len(bench.damaged)} damaged in part"
        print(
            f"{name:10}  {n} queries, {m} corpus items{pools}, {len(bench.missing)} media missing"
            f"{outside}{damaged}"
        )

        queries, corpus = bench.expected
        if n != (queries or n) or m != (corpus or m):
            folder = folder_of(root, name)
            problems.append(
                f"{folder}: {n} queries, {m} corpus items; {title} has {queries} and {corpus}"
            )
        print_some(problems, show)
        print_some(bench.missing, show)
        print_some([f"remark: {note}" for note in bench.damaged], show)
        bad += problems + bench.missing
    return bad


def print_some(lines, show):
    """Print the first `show` lines, indented, and how many there are besides."""
    for line in first_few(lines, show, f"more like these (--show {len(lines)} lists them)"):
        print(f"  {line}")


@dataclass
class Flags:
    command: str = flag(..., "list bad rows of a folder", choices=["check"], positional=True)
    dir: str = flag(..., "benchmark folder, with <DS>/jsonl/queries.jsonl", positional=True)
    root: list[str] = flag([], "further folders for media; paths may be relative to them, too")
    decode: bool = flag(False, "also decode every video and image")
    show: int = flag(
        5, "bad rows that are listed per dataset, and as many missing and damaged media"
    )


def main(flags):
    try:
        bad = check(flags.dir, flags.root, flags.decode, flags.show)
    except (ValueError, OSError) as error:  # the message names the file
        sys.exit(f"uvrb.py: {error}")
    print(f"{len(bad)} problems in {flags.dir}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main(parse_flags(Flags, doc=__doc__))
