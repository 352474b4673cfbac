"""Turn upstream training annotations into training files of data.py, for the sources of Table 6.

    python extras/convert.py webvid data/train/partitions DIR/webvid.jsonl --media clips
    python extras/check_data.py DIR/webvid.jsonl    # decodes every file that it names

The first example expects DIR/clips/<page_dir>/<videoid>.mp4. SOURCE is a file (.json, .jsonl, .csv,
.tsv, .parquet, .tar of json members) or a folder of such files. Media stay where they are: OUT
names them as upstream does, after --media, relative to OUT's folder. Where upstream leaves a choice
(which of several captions), one is drawn under --seed. Rows without a query or a positive are
dropped and counted.
"""

import csv
import dataclasses
import inspect
import json
import os
import random
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, for a script

from support.files import read_jsonl, visible_files, whole_file
from support.flags import flag, parse_flags

# Upstream's files

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".tar", ".tsv")


def read_rows(source):
    """Yield ("file:row", dict) of an annotation file, or of all such files below a folder by name.

    Raises FileNotFoundError for an absent source, ValueError naming the file and the row for one
    that is not of its kind. csv and tsv need a header.
    """
    path = Path(source)
    if path.is_dir():
        files = [file for file in visible_files(path) if file.suffix in SUFFIXES]
        if not files:
            raise ValueError(f"{path}: no {', '.join(SUFFIXES)} file below this folder")
        for file in files:
            yield from read_rows(file)
        return

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: {path.suffix or 'no suffix'}; accepted: {', '.join(SUFFIXES)}")
    number = 0
    try:
        for number, row in enumerate(parse_rows(path), 1):
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
            yield f"{path}:{number}", row
    except (ValueError, csv.Error, tarfile.TarError) as error:
        raise ValueError(f"{path}: after {number} rows: {error}") from error


def parse_rows(path):
    """Yield the rows of one file in the format that its suffix names."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet  # here, since nothing else needs it

        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()

    elif path.suffix == ".tar":  # webdataset: <key>.json beside <key>.mp4
        with tarfile.open(path) as file:
            for member in file:
                if member.name.endswith(".json"):
                    row = json.load(file.extractfile(member))
                    yield row | {"__key__": Path(member.name).stem}

    elif path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        yield from content if isinstance(content, list) else [content]

    elif path.suffix == ".jsonl":
        for _, row in read_jsonl(path):
            yield row

    elif path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:  # a cell may hold line breaks
            yield from csv.DictReader(file, strict=True)

    else:
        with open(path, encoding="utf-8") as file:
            yield from csv.DictReader(file, delimiter="\t", strict=True)


# A key may have several names, as releases of one dataset differ.


def key_in(where, row, *names):
    """Return the first of `names` that the row has; ValueError with its keys if it has none."""
    for name in names:
        if name in row:
            return name
    found = ", ".join(map(str, row))
    raise ValueError(f"{where}: none of the keys {', '.join(names)}; keys found: {found}")


def pick(where, row, *names):
    """Return the value of the first of `names` that the row has."""
    return row[key_in(where, row, *names)]


# Parts of a training row


def training_row(query, positive, negatives=()):
    """Make a training row of items; None, which drops it, if the query or the positive is empty.

    Empty parts of an item and empty negatives are left out.
    """

    def without_empty_parts(item):
        return {key: value for key, value in item.items() if value}

    query = without_empty_parts(query)
    positive = without_empty_parts(positive)
    if not query or not positive:
        return None
    negatives = map(without_empty_parts, negatives)
    return {"query": query, "positive": positive, "negatives": [n for n in negatives if n]}


def media_path(flags, path):
    """Return a medium's path as OUT names it, None if the row has none."""
    if isinstance(path, list) and len(path) == 1:  # some files have lists of one
        path = path[0]
    return os.path.join(flags.media, path) if path else None


def passage(row):
    """Make an item of a document's title and text."""
    title = (row.get("title") or "").strip()
    text = (row.get("text") or "").strip()
    return {"text": f"{title} {text}".strip()}


# Converters yield training rows, and None for a row that is dropped. Their docstrings are --help.


def mmeb(flags):
    """MMEB-train: qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path.

    <|image_1|> in a text is dropped.
    """
    columns = (
        ("qry", "qry_image_path"),
        ("pos_text", "pos_image_path"),
        ("neg_text", "neg_image_path"),
    )
    for where, row in read_rows(flags.source):
        items = []
        for text_key, image_key in columns:
            text = (pick(where, row, text_key) or "").replace("<|image_1|>", "").strip()
            image = media_path(flags, pick(where, row, image_key))
            items.append({"text": text, "image": image})
        query, positive, negative = items
        yield training_row(query, positive, [negative])


def unite(flags):
    """UNITE: {"query": {"text", "image", "video"}, "candidate": {...}, "negative": ...}.

    The negative is an item like the others, or a list of items.
    """

    def make_item(given):
        image = media_path(flags, given.get("image"))
        video = media_path(flags, given.get("video"))
        return {"text": given.get("text"), "image": image, "video": video}

    for where, row in read_rows(flags.source):
        negatives = row.get("negative") or []
        if not isinstance(negatives, list):
            negatives = [negatives]
        query = make_item(pick(where, row, "query"))
        positive = make_item(pick(where, row, "candidate"))
        yield training_row(query, positive, map(make_item, negatives))


def webvid(flags):
    """WebVid csv: videoid, page_dir, name -> <page_dir>/<videoid>.mp4.

    A caption of more than one video is dropped (A.4).
    """
    # Hashes of captions in place of captions: about 1 GB for 10 million.
    seen = set()
    repeated = set()
    for where, row in read_rows(flags.source):
        caption = hash(pick(where, row, "name"))
        if caption in seen:
            repeated.add(caption)
        seen.add(caption)

    # The second time through: rows whose caption is unique.
    for where, row in read_rows(flags.source):
        path = f"{pick(where, row, 'page_dir')}/{pick(where, row, 'videoid')}.mp4"
        if hash(row["name"]) in repeated:
            yield None
        else:
            yield training_row({"text": row["name"]}, {"video": media_path(flags, path)})


def vast(flags):
    """VAST-27M: id, vision_cap (list) -> <id>.mp4, the clip as cut upstream.

    One caption at random, as in the paper (A.4).
    """
    for where, row in read_rows(flags.source):
        captions = pick(where, row, "vision_cap")
        text = flags.draw.choice(captions) if captions else ""
        path = f"{pick(where, row, 'id', 'clip_id')}.mp4"
        yield training_row({"text": text}, {"video": media_path(flags, path)})


def llava_hound(flags):
    """LLaVA-Hound: video (a folder of frames), conversations [{"from": "human" or "gpt", "value"}].

    The first answer -> the frames.
    """
    for where, row in read_rows(flags.source):
        turns = pick(where, row, "conversations")
        answers = [turn["value"] for turn in turns if turn["from"] == "gpt"]
        text = answers[0] if answers else ""
        video = media_path(flags, pick(where, row, "video"))
        if flags.fps:
            video = {"path": video, "fps": flags.fps}
        yield training_row({"text": text}, {"video": video})


def megapairs(flags):
    """MegaPairs: q_img, q_text (list), t_img, hns (list of images; the first is the query's own).

    The image and one text at random -> the target image.
    """
    for where, row in read_rows(flags.source):
        texts = pick(where, row, "q_text")
        if isinstance(texts, str):
            texts = [texts]
        image = media_path(flags, pick(where, row, "q_img"))
        text = flags.draw.choice(texts) if texts else ""
        target = media_path(flags, pick(where, row, "t_img"))
        negatives = [{"image": media_path(flags, path)} for path in row.get("hns") or []]
        yield training_row({"image": image, "text": text}, {"image": target}, negatives)


def pe_video(flags):
    """PE-Video: train/*.tar with <key>.json -> <key>.mp4; human_caption, as in the paper (A.4)."""
    for where, row in read_rows(flags.source):
        text = pick(where, row, "human_caption")
        path = pick(where, row, "__key__") + ".mp4"
        yield training_row({"text": text}, {"video": media_path(flags, path)})


def tevatron(flags):
    """Tevatron's MS MARCO: query, positive_passages and negative_passages [{"title", "text"}].

    The first positive counts.
    """
    for where, row in read_rows(flags.source):
        query = {"text": pick(where, row, "query")}
        positives = pick(where, row, "positive_passages")
        positive = passage(positives[0]) if positives else {}
        negatives = map(passage, row.get("negative_passages") or [])
        yield training_row(query, positive, negatives)


def triples(flags):
    """MS MARCO's triples.train.*.tsv: query, positive and negative text, no header.

    Lines on end with the same query and positive become one row.
    """
    last = None  # the row that further lines may still join
    with open(flags.source, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\n").split("\t")
            if len(cells) != 3:
                raise ValueError(
                    f"{flags.source}:{number}: {len(cells)} cells; "
                    "query, positive and negative are expected"
                )
            query, positive, negative = ({"text": cell} for cell in cells)

            if last and (last["query"], last["positive"]) == (query, positive):
                last["negatives"].append(negative)
                continue
            if last:
                yield last
            last = training_row(query, positive, [negative])
    if last:
        yield last


def beir(flags):
    """BEIR folder: corpus.jsonl, queries.jsonl, qrels/<split>.tsv (query-id, corpus-id, score).

    Score 0 makes a negative.
    """
    folder = Path(flags.source)
    judged = {}  # {query id: {"positive": [document ids], "negative": [document ids]}}
    needed = set()
    for where, row in read_rows(folder / "qrels" / f"{flags.split}.tsv"):
        query = pick(where, row, "query-id")
        lists = judged.setdefault(query, {"positive": [], "negative": []})
        kind = "positive" if int(pick(where, row, "score")) > 0 else "negative"
        document = pick(where, row, "corpus-id")
        lists[kind].append(document)
        needed.add(document)

    # Texts of the judged documents; a corpus has far more.
    documents = {}
    for where, row in read_rows(folder / "corpus.jsonl"):
        name = str(pick(where, row, "_id"))
        if name in needed:
            documents[name] = passage(row)
    lost = needed - documents.keys()
    if lost:
        raise ValueError(
            f"{folder / 'corpus.jsonl'}: {len(lost)} documents of the qrels are missing, "
            f"such as {min(lost)!r}"
        )

    # A row per positive, each with all negatives of its query.
    for where, row in read_rows(folder / "queries.jsonl"):
        lists = judged.get(str(pick(where, row, "_id")))
        if lists is None:  # of another split
            continue
        query = {"text": pick(where, row, "text")}
        negatives = [documents[name] for name in lists["negative"]]
        for name in lists["positive"]:
            yield training_row(query, documents[name], negatives)


CONVERTERS = {
    "mmeb": mmeb,
    "unite": unite,
    "webvid": webvid,
    "vast": vast,
    "llava-hound": llava_hound,
    "megapairs": megapairs,
    "pe-video": pe_video,
    "tevatron": tevatron,
    "triples": triples,
    "beir": beir,
}


# The command


@dataclasses.dataclass
class Flags:
    name: str = flag(..., "format of the source", choices=list(CONVERTERS), positional=True)
    source: str = flag(..., "upstream's annotation file or folder", positional=True)
    out: str = flag(..., "training file to write (*.jsonl)", positional=True)
    media: str = flag("", "folder of the media, relative to OUT's folder")
    negatives: int = flag(-1, "hard negatives per row at most; -1: all")
    fps: float = flag(0.0, "llava-hound: frame rate of its frames; 0: data.py's default of 8")
    split: str = flag("train", "beir: name of the qrels file")
    seed: int = flag(0, "random seed")

    def __post_init__(self):
        self.draw = random.Random(self.seed)


def describe_formats():
    """Return the part of --help that lists the formats."""
    lines = []
    for name, converter in CONVERTERS.items():
        first, *others = inspect.getdoc(converter).splitlines()
        lines.append(f"  {name:12} {first}")
        lines += [f"{'':15}{line}" for line in others if line]
    return "\n".join(lines)


def main(argv=None):
    """Write a training file. Raises ValueError or FileNotFoundError naming the file and the row."""
    flags = parse_flags(Flags, argv, f"{__doc__}\n{describe_formats()}")
    written = 0
    dropped = 0
    # OUT gets its name once it is complete: a source that breaks off leaves nothing behind.
    with whole_file(flags.out) as file:
        for row in CONVERTERS[flags.name](flags):
            if row is None:
                dropped += 1
                continue
            if flags.negatives >= 0:
                del row["negatives"][flags.negatives :]
            if not row["negatives"]:
                del row["negatives"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    print(f"{flags.out}: {written} rows, {dropped} dropped")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
