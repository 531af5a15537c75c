"""Sources, tokenizers, the build of shards, and what is found when they are damaged."""

import concurrent.futures
import gzip
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from processes import run, tfdist

from tfdist import files
from tfdist.config import DataConfig
from tfdist.data import build, corpus, documents, globs, pieces, shards, tfds_source, token_files, tokenizer, verified
from tfdist.data.index import data_hash, documents_of
from tfdist.data.tokenizer import ByteTokenizer
from tfdist.errors import DataError


def plan(source, fraction=0.1, **options):
    return corpus.plan(source, "text", fraction, **options)


def parts_of(source, fraction=0.1):
    """name -> (split of each part, whole text)."""
    whole = {}
    for part in plan(source, fraction).documents():
        whole.setdefault(part.name, []).append(part)
    return whole


def opened(source, cache, **data):
    return shards.open_source(DataConfig(source=source, validation_fraction=0.1, **data), cache)


def whole_split(dataset, split="train"):
    return np.concatenate([shard.read() for shard in dataset.splits[split].shards])


@pytest.fixture(scope="module")
def dataset(text_files, cache_dir):
    return opened(f"files:{text_files}/*.txt", cache_dir)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 3 kB, parts of 500 bytes, shards of 1,500 tokens: what a large corpus is cut into."""
    monkeypatch.setattr(pieces, "_PIECE_BYTES", 3000)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 500)
    monkeypatch.setattr(build, "SHARD_TOKENS", 1500)


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


# ---- sources ----


def test_stdlib_is_split_by_file_in_a_fixed_order():
    found = list(plan("stdlib", 0.05).documents())
    names = {split: [d.name for d in found if d.split == split and d.begins] for split in ("train", "validation")}
    assert "argparse.py" in names["train"] + names["validation"]
    assert not set(names["train"]) & set(names["validation"])
    assert 0.03 < len(names["validation"]) / len(found) < 0.07
    assert [d.name for d in found] == sorted(d.name for d in found)
    assert found == list(plan("stdlib", 0.05).documents())
    assert not any("site-packages" in d.name for d in found)


@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
def test_few_documents_give_their_tails_to_validation(tmp_path, suffix):
    text = "naïve Δx → 0\n".encode() * 7 + "é".encode() * 9  # the tail begins in the middle of a character
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    ((train, validation),) = parts_of(f"files:{path}").values()
    assert (train.split, validation.split) == ("train", "validation") and train.begins and validation.begins
    assert train.text + validation.text == text and not train.replaced
    assert abs(len(validation.text) - len(text) // 10) < 4


@pytest.mark.parametrize("kind", ["files", "jsonl"])
def test_pieces_of_a_large_file_hold_each_byte_once(tmp_path, small_pieces, kind):
    """With lines, without any, with characters of several bytes; the parts of a document follow each other."""
    lines = [f"Zeile {i}: äöü {'x' * (i % 97)}" for i in range(900)]
    text = {"files": "\n".join(lines), "jsonl": "\n".join(json.dumps({"text": line * 9}) for line in lines)}[kind]
    for content in (text, text.replace("\n", "") if kind == "files" else text):
        path = tmp_path / f"large.{kind}"
        path.write_text(content)
        found = plan(f"{kind}:{path}")
        assert len(found.pieces) > 3
        parts = list(found.documents())
        assert not any(part.replaced for part in parts)
        whole = b"".join(part.text for part in parts).decode()
        assert whole == (content if kind == "files" else "".join(line * 9 for line in lines))
        begins = sum(part.begins for part in parts)
        assert begins == (2 if kind == "files" else len(lines))  # one file: its tail is validation
        if kind == "jsonl":
            assert len({part.name for part in parts}) == len(lines)
            assert 0.05 < sum(part.split == "validation" for part in parts if part.begins) / begins < 0.2


def test_gzipped_files_read_like_plain_ones(tmp_path, small_pieces):
    for i in range(25):
        text = "".join(f"{i} line {j}\n" for j in range(300))
        (tmp_path / f"{i:02}.txt").write_text(text)
        (tmp_path / f"{i:02}.txt.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = parts_of(f"files:{tmp_path}/*.txt"), parts_of(f"files:{tmp_path}/*.gz")
    for name, parts in plain.items():
        assert b"".join(p.text for p in parts) == b"".join(p.text for p in packed[name + ".gz"])


@pytest.mark.parametrize(
    ("content", "pattern", "expected"),
    [
        (None, "files:none/*.txt", "expected files at"),
        (b"", "files:*.txt", "expected text, found an empty source"),
        (b"ab\0cd", "files:*.txt", "found a binary file"),
        (b"\x1f\x8b nothing", "files:x.gz", "cannot read .*x.gz"),
        (gzip.compress(b"text " * 999, mtime=0)[:-20], "files:x.gz", "cannot read .*x.gz: Compressed file ended"),
        (b'{"text": "a"}\n{"txt": "b"}', "jsonl:*.txt", "bad record in .* at byte 14: expected the key 'text', found txt"),
        (b'{"text": 3}', "jsonl:*.txt", "expected an object with text at 'text'"),
        (b"{", "jsonl:*.txt", "expected a JSON object"),
        (b"[" * 100_000, "jsonl:*.txt", "expected a JSON object, maximum recursion"),
        (b"{}", "jsonl:*.txt#body", "expected the key 'body'"),
        (b"abc", "bin:*.txt", "expected uint16 tokens in .*, found 3 bytes"),
        (b"a", "txt:*.txt", "data.source: expected stdlib, files:GLOB"),
    ],
)
def test_bad_sources_are_one_line(tmp_path, content, pattern, expected):
    if content is not None:
        (tmp_path / ("x.gz" if pattern.endswith("gz") else "x.txt")).write_bytes(content)
    with pytest.raises(DataError, match=expected) as error:
        parts_of(pattern.replace(":", f":{tmp_path}/", 1))
    assert error.value.exit_code == 3 and "\n" not in str(error.value)


def test_an_unreadable_file_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.txt").mkdir()  # to root every file is readable: a folder is not
    with pytest.raises(DataError, match="expected files at"):
        parts_of(f"files:{tmp_path}/a.txt")
    (tmp_path / "b.txt").write_text("text")
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(DataError, match="cannot read .*b.txt: Permission denied"):
        parts_of(f"files:{tmp_path}/b.txt")


def test_what_is_no_utf8_is_replaced_and_counted(tmp_path):
    for i in range(25):
        (tmp_path / f"{i:02}.txt").write_bytes(b"good\n" if i else b"bad \xff\xfe\n")
    found = opened(f"files:{tmp_path}/*.txt", tmp_path / "cache")
    index = json.loads((found.path / "dataset.json").read_text())
    assert sum(split["not_utf8"] for split in index["splits"].values()) == 1
    assert "bad \ufffd\ufffd\n".encode() in bytes(whole_split(found)[whole_split(found) < 256].astype(np.uint8))


def test_json_that_is_no_utf8_is_replaced_and_counted(tmp_path, caplog):
    """Bytes, and halves of a surrogate pair, which JSON can name."""
    lines = [b'{"text": "good %d"}' % i for i in range(23)] + [b'{"text": "bad \xff"}', b'{"text": "half \\ud800"}']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    found = opened(f"jsonl:{tmp_path}/x.jsonl", tmp_path / "cache")
    text = "".join(found.make_tokenizer().decode(whole_split(found, split)) for split in ("train", "validation"))
    assert "bad \ufffd" in text and "half \ufffd" in text
    assert "2 parts were not UTF-8: replaced" in caplog.text


def test_files_that_did_not_change_are_not_read_again(tmp_path, text_files, monkeypatch):
    source, computed = f"files:{text_files}/*.txt", []
    whole = shards.content_hash
    monkeypatch.setattr(shards, "content_hash", lambda *arguments: computed.append(1) or whole(*arguments))
    first = opened(source, tmp_path)
    assert opened(source, tmp_path) == first and len(computed) == 1
    os.utime(text_files / "00.txt")
    assert opened(source, tmp_path) == first and len(computed) == 2


def test_globs_reach_into_folders(tmp_path):
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    for name in ("docs/a.txt", "docs/deep/b.txt"):
        (tmp_path / name).write_text("text " * 50)
    assert set(parts_of(f"files:{tmp_path}/docs/**/*.txt")) == {"a.txt", "deep/b.txt"}


def test_a_file_with_several_paths_has_the_one_without_a_link(tmp_path):
    for folder in "AB":
        (tmp_path / folder).mkdir()
    (tmp_path / "B" / "y.txt").write_text("text")
    (tmp_path / "A" / "x.txt").symlink_to("../B/y.txt")
    assert globs.files_of([f"{tmp_path}/A/*.txt", f"{tmp_path}/**/*.txt"]) == ([f"{tmp_path}/B/y.txt"], [])


def test_a_line_without_an_end_is_read_once(tmp_path, monkeypatch):
    path, ticks = tmp_path / "a.jsonl", []
    path.write_bytes(b"x" * (1 << 16) + b"\n{}\n")
    monkeypatch.setattr(pieces, "_LINE_BYTES", 1 << 10)
    monkeypatch.setattr(pieces, "supervisor", lambda: types.SimpleNamespace(tick=lambda: ticks.append(1)))
    assert len(pieces._cut_at_line(pieces.Span(str(path), "a", 0, path.stat().st_size), 1 << 11)) < 4
    assert len(ticks) <= 1 << 6


def test_bad_records_are_skipped_within_a_budget(tmp_path):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(40)]
    lines[7], lines[20] = "not json", '{"other": 1}'
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    source, cache = f"jsonl:{tmp_path}/x.jsonl", tmp_path / "cache"
    found = opened(source, cache, on_bad_record="skip", max_bad_records=2)
    assert sum(split.documents for split in found.splits.values()) == 38
    assert json.loads((found.path / "dataset.json").read_text())["bad_records"] == 2
    with pytest.raises(DataError, match="expected at most 1 bad records .* found more: .*at byte"):
        opened(source, tmp_path / "other", on_bad_record="skip", max_bad_records=1)
    with pytest.raises(DataError, match="expected at most 1 bad records .* found 2 in jsonl"):
        opened(source, cache, on_bad_record="skip", max_bad_records=1)
    with pytest.raises(DataError, match="bad record in .*data.on_bad_record=skip"):
        opened(source, tmp_path / "other")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_line_above_the_limit_is_a_bad_record_and_those_around_it_are_read(tmp_path, small_pieces, suffix):
    """One byte decides; pieces are cut in the middle of the long line."""
    limit = 1 << 20

    def line(name, size):
        return json.dumps({"text": f"{name} "}).encode()[:-2] + b"x" * (size - len(json.dumps({"text": f"{name} "}))) + b'"}'

    lines = [line("first", 40), line("limit", limit), line("long", limit + 1), line("longer", 5 * limit), line("last", 40)]
    lines += [line(f"more{i}", 60) for i in range(200)]
    content = b"\n".join(lines)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(gzip.compress(content, 1) if suffix.endswith("gz") else content)
    found = corpus.plan(f"jsonl:{path}", "text", 0.1, "skip", 1)
    records = list(found.documents())
    bad = [record.what for record in records if isinstance(record, documents.BadRecord)]
    places = [content.index(b'{"text": "long '), content.index(b'{"text": "longer')]
    assert bad == [
        f"{path} at byte {place}: expected a line of at most 1 MB (data.max_record_mb), found a longer one"
        for place in places
    ]
    texts = b"".join(record.text for record in records if isinstance(record, documents.Part))
    assert texts == b"".join(json.loads(one)["text"].encode() for one in (*lines[:2], *lines[4:]))
    with pytest.raises(DataError, match="at byte .*: expected a line of at most 1 MB .*on_bad_record=skip"):
        list(corpus.plan(f"jsonl:{path}", "text", 0.1, "refuse", 1).documents())


READ_LONG = """
import resource, sys
from tfdist.data import corpus
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = list(corpus.plan(sys.argv[1], "text", 0.1, "skip").documents())
print(len(found), type(found[0]).__name__, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_a_line_of_200_mb_takes_no_such_memory(tmp_path):
    with open(tmp_path / "x.jsonl", "wb") as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "good"}\n')
    done = run(["-c", READ_LONG, f"jsonl:{tmp_path}/x.jsonl"], limit_s=60)
    number, first, megabytes = done.stdout.split()
    assert (number, first) == ("2", "BadRecord"), done.stderr
    assert int(megabytes) < 200


# ---- token files ----


@pytest.mark.parametrize("kind", ["nanogpt", "llm.c", "llama"])
def test_token_files_of_other_projects(tmp_path, kind):
    numbers = {name: np.random.default_rng(len(name)).integers(0, 50257, 5000) for name in ("train", "val")}
    for name, tokens in numbers.items():
        head = np.zeros(256, "<i4")
        head[:3] = {"llm.c": 20240520, "llama": 20240801}.get(kind, 0), 1, len(tokens)
        body = tokens.astype(np.uint32 if kind == "llama" else np.uint16).tobytes()
        (tmp_path / f"{name}.bin").write_bytes(body if kind == "nanogpt" else head.tobytes() + body)
    found = opened(f"bin:{tmp_path}/*.bin", tmp_path / "cache", tokenizer="ids:50257")
    np.testing.assert_array_equal(whole_split(found), numbers["train"])
    np.testing.assert_array_equal(whole_split(found, "validation"), numbers["val"])
    assert found.splits["train"].bytes_per_token == 0 and found.document_start == -1
    alone = opened(f"bin:{tmp_path}/train.bin", tmp_path / "cache", tokenizer="ids:50257")
    together = np.concatenate([whole_split(alone), whole_split(alone, "validation")])
    np.testing.assert_array_equal(together, numbers["train"])
    with pytest.raises(DataError, match="expected token ids below the 100 of ids:100, found"):
        opened(f"bin:{tmp_path}/*.bin", tmp_path / "cache", tokenizer="ids:100")
    if kind != "nanogpt":
        path = tmp_path / "train.bin"
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(DataError, match="expected 5000 tokens .*its header says so"):
            token_files.header(str(path))


# ---- TensorFlow Datasets ----


class TinyPoems(tfds.core.GeneratorBasedBuilder):
    """A dataset that the test prepares on disk, with real `tfds` code."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"verse": tfds.features.Text(), "year": tfds.features.Scalar(np.int32)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(40), "test": self._generate_examples(5)}

    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"verse": f"verse {i} of {n}", "year": i}


@pytest.fixture
def tfds_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source, "_data_dir", lambda _: tmp_path)
    return tmp_path


def test_tfds_is_read_from_its_files(tfds_dir):
    TinyPoems(data_dir=tfds_dir).download_and_prepare()
    found = corpus.plan("tfds:tiny_poems", "verse", 0.5)
    texts = {split: [d.text for d in found.documents() if d.split == split] for split in ("train", "validation")}
    assert sorted(texts["train"]) == sorted(f"verse {i} of 40".encode() for i in range(40))
    assert len(texts["validation"]) == 5  # its own test split
    folder, sizes = tfds_source.prepare("tiny_poems:1.0.0", "verse")
    assert sizes == {"train": 40, "test": 5}
    some = [text for a, b in ((0, 7), (7, 40)) for text in tfds_source.read(str(folder), "train", "verse", a, b)]
    assert some == texts["train"], "parts follow each other"
    with pytest.raises(DataError, match="expected a feature of tfds:tiny_poems .verse, year., found 'text'"):
        tfds_source.prepare("tiny_poems", "text")
    with pytest.raises(DataError, match="expected text in feature 'year', found"):
        tfds_source.prepare("tiny_poems", "year")


def test_an_unknown_tfds_name_is_one_line_with_near_names(tfds_dir):
    with pytest.raises(DataError, match="unknown TensorFlow dataset 'tiny_shakespear'; did you mean tiny_shakespeare"):
        tfds_source.prepare("tiny_shakespear", "text")


def test_a_download_that_stalls_is_given_up(tfds_dir, monkeypatch):
    """Here there is no network, or there is one and this downloads a megabyte: both end well within the limit."""
    monkeypatch.setattr(tfds_source, "_STALL_S", 2.0)
    monkeypatch.setattr(tfds_source, "_PREPARE", "import time; time.sleep(60)")
    with pytest.raises(DataError, match="cannot download tfds:tiny_shakespeare: nothing arrived for 2 s"):
        tfds_source.prepare("tiny_shakespeare", "text")


def test_a_download_that_fails_says_why(tfds_dir, monkeypatch):
    noise = "import sys; sys.stderr.write('x' * 200_000 + chr(10))"  # more than a pipe holds
    monkeypatch.setattr(tfds_source, "_PREPARE", f"{noise}; raise OSError('no route to host')")
    with pytest.raises(DataError, match="cannot download tfds:tiny_shakespeare: OSError: no route to host"):
        tfds_source.prepare("tiny_shakespeare", "text")


# ---- tokenizers ----

TEXTS = ["def main():\n    return 'naïve Δx → 0'\n" * 30, "the <|document|> of a <|padding|>, and \U0001f600\n" * 9]


def test_bytes_round_trip():
    made, text = ByteTokenizer(), "naïve Δx → 0\n"
    (tokens,) = made.encode([text.encode()])
    assert made.decode([made.document_start, *tokens, made.padding]) == text
    assert [made.document_start, *tokens] == made.encode_prompt(text)


def test_bpe_round_trips_and_is_the_same_each_time(tmp_path):
    texts = [text.encode() for text in TEXTS]
    made = tokenizer.make("bpe:300", texts)
    assert made.vocab_size == 300 and made.json == tokenizer.make("bpe:300", texts).json
    for text, tokens in zip(TEXTS, made.encode(texts), strict=True):
        assert made.decode(tokens) == text, "what looks like a special token is text"
        assert tokens.dtype == np.uint16 and len(tokens) < len(text)
        assert made.document_start not in tokens and made.is_text()[tokens].all()
        assert made.encode_prompt(text) == [made.document_start, *tokens]
    assert (~made.is_text()).sum() == 2
    (tmp_path / "t.json").write_text(made.json)
    again = tokenizer.make(f"file:{tmp_path}/t.json", ())
    assert tokenizer.fingerprint(again) == tokenizer.fingerprint(made)


@pytest.mark.parametrize("spec", ["byte", "bpe:", "bpe:100", "bpe:x", "file:", "ids:0", "bytes:3"])
def test_a_bad_tokenizer_is_one_line(spec):
    with pytest.raises(DataError, match="data.tokenizer: expected bytes, bpe:SIZE"):
        tokenizer.make(spec, ())


def test_bad_tokenizer_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="cannot read .*tokenizer.json: No such file"):
        tokenizer.make(f"file:{path}", ())
    path.write_text("{}")
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        tokenizer.make(f"file:{path}", ())
    made = json.loads(tokenizer.make("bpe:300", [b"text"]).json)
    made["added_tokens"] = []
    made["model"]["vocab"] = {("x" + k if k.startswith("<|") else k): v for k, v in made["model"]["vocab"].items()}
    path.write_text(json.dumps(made))
    with pytest.raises(DataError, match="expected a token that starts a document"):
        tokenizer.make(f"file:{path}", ())


# ---- the cache ----


def test_the_cache_is_addressed_by_content_not_by_place(dataset, text_files, cache_dir, tmp_path):
    assert dataset.path.parent == cache_dir
    assert opened(f"files:{text_files}/*.txt", cache_dir) == dataset
    shutil.copytree(text_files, tmp_path / "moved")
    assert opened(f"files:{tmp_path}/moved/*.txt", cache_dir) == dataset
    (tmp_path / "a.txt").write_text("some text " * 100)
    first = opened(f"files:{tmp_path}/a.txt", cache_dir)
    (tmp_path / "a.txt").write_text("other text " * 100)
    assert opened(f"files:{tmp_path}/a.txt", cache_dir).data_hash != first.data_hash


def test_shards_hold_every_document_and_say_so(dataset, text_files):
    parts = parts_of(f"files:{text_files}/*.txt")
    for split in ("train", "validation"):
        found = {name: d for name, (d,) in parts.items() if d.split == split}
        texts = [np.concatenate([[256], np.frombuffer(d.text, np.uint8)]) for d in found.values()]
        np.testing.assert_array_equal(whole_split(dataset, split), np.concatenate(texts))
        info = dataset.splits[split]
        assert (info.tokens, info.documents) == (sum(map(len, texts)), len(found))
        assert info.text_bytes == sum(len(d.text) for d in found.values())
        starts, keys = info.starts_and_keys().T
        np.testing.assert_array_equal(starts, np.cumsum([0, *map(len, texts[:-1])]))
        assert list(keys) == [documents.key_of(name) for name in found]


# ---- the build ----


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_any_number_of_processes_writes_the_same_bytes(tmp_path, text_files, small_pieces, spec):
    """One here, two with spawn; a build that was broken off goes on with what it has."""
    found = plan(f"files:{text_files}/*.txt")
    assert len(found.pieces) > 8
    arguments = (found, spec, "source")
    build.build(*arguments, tmp_path / "one")
    build.build(*arguments, tmp_path / "two", processes=2)
    broken = tmp_path / "three"

    def enough(size):
        if len(list(broken.with_name("three.building").glob("piece-*.json"))) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.build(*arguments, broken, progress=enough)
    assert not broken.exists()
    kept = {p.name: p.stat().st_mtime_ns for p in broken.with_name("three.building").glob("train-*")}
    build.build(*arguments, broken)
    assert kept and all((broken / name).stat().st_mtime_ns == time_ns for name, time_ns in kept.items())
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(broken)
    assert len(list((tmp_path / "one").glob("train-*.npy"))) > 16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "three", "two"]
    one, whole = shards.read(tmp_path / "one"), b"".join(p.text for p in found.documents() if p.split == "train")
    assert one.make_tokenizer().decode(whole_split(one)).encode() == whole


def test_a_build_that_is_killed_goes_on(tmp_path):
    """SIGKILL to the command and its processes, in the middle, again and again."""
    (tmp_path / "corpus").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        (tmp_path / "corpus" / f"{i}.txt").write_bytes(rng.integers(32, 127, 2_000_000, dtype=np.uint8).tobytes())
    arguments = ["data", "build", f"--source=files:{tmp_path}/corpus/*.txt", "--processes=2"]
    out, killed = tmp_path / "out", 0
    for wait_pieces in (1, 2):
        command = [sys.executable, "-m", "tfdist.cli", *arguments, f"--out={out}"]
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        until_s = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until_s:
            if len(list(out.with_name("out.building").glob("piece-*.json"))) >= wait_pieces:
                os.killpg(process.pid, signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.005)
        process.wait()
        assert not out.exists()
    done = tfdist(*arguments, f"--out={out}")
    assert done.returncode == 0 and killed, done.stderr
    other = tfdist(*arguments[:-1], "--processes=1", f"--out={tmp_path}/other")
    assert other.returncode == 0, other.stderr
    assert files_of(out) == files_of(tmp_path / "other")


def test_a_full_disk_is_one_line_and_keeps_what_is_whole(tmp_path, text_files, small_pieces):
    """The limit on the size of a file stands for the disk's: writes fail in the middle."""
    found = plan(f"files:{text_files}/*.txt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))
        with pytest.raises(DataError, match="cannot write .*: File too large; what is finished is kept in") as error:
            build.build(found, "bytes", "source", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.exit_code == 3 and not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.building").glob("*.tmp"))
    build.build(found, "bytes", "source", tmp_path / "out")
    assert shards.read(tmp_path / "out").splits["train"].documents == 27


def test_two_builds_at_once_make_one_dataset(tmp_path, text_files, small_pieces):
    """Threads of this process hold the lock by different files, as processes do."""
    found, out = plan(f"files:{text_files}/*.txt"), tmp_path / "out"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(build.build, found, "bytes", "source", out) for _ in range(4)]:
            done.result()
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and shards.read(out).splits["train"].documents == 27


@pytest.mark.slow
def test_a_build_whose_parent_alone_was_killed_goes_on_at_once(tmp_path):
    """Its processes live on for up to a second: what they write is under names of their own."""
    (tmp_path / "corpus").mkdir()
    for i in range(8):
        (tmp_path / "corpus" / f"{i}.txt").write_bytes(
            np.random.default_rng(i).integers(32, 127, 9_000_000, np.uint8).tobytes()
        )
    command = ["data", "build", f"--source=files:{tmp_path}/corpus/*.txt", f"--out={tmp_path}/out", "--processes=2"]
    process = subprocess.Popen([sys.executable, "-m", "tfdist.cli", *command], start_new_session=True)
    until_s = time.monotonic() + 60
    while not list(tmp_path.glob("out.building/*.tmp")) and process.poll() is None and time.monotonic() < until_s:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    done = tfdist(*command)
    assert done.returncode == 0, done.stderr
    assert shards.read(tmp_path / "out").splits["train"].tokens > 60_000_000


def test_a_tokenizer_file_that_changed_is_read_anew(tmp_path, text_files, small_pieces):
    made, found = tmp_path / "t.json", plan(f"files:{text_files}/*.txt")
    made.write_text(tokenizer.make("bpe:300", [b"one text " * 99]).json)
    spec = f"file:{made}"
    with pytest.raises(KeyboardInterrupt):
        build.build(found, spec, "source", tmp_path / "out", progress=lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    made.write_text(tokenizer.make("bpe:300", [b"another " * 99]).json)
    build.build(found, spec, "source", tmp_path / "out")
    assert shards.read(tmp_path / "out").tokenizer_hash == tokenizer.fingerprint(tokenizer.make(spec, ()))


def test_a_changed_source_is_built_anew(tmp_path, text_files, small_pieces):
    shutil.copytree(text_files, tmp_path / "corpus")
    source = f"files:{tmp_path}/corpus/*.txt"
    with pytest.raises(KeyboardInterrupt):
        build.build(
            plan(source), "bytes", source, tmp_path / "out", progress=lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
        )
    (tmp_path / "corpus" / "00.txt").write_text("new\n" * 99)
    build.build(plan(source), "bytes", source, tmp_path / "out")
    build.build(plan(source), "bytes", source, tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


# ---- damage ----


def damaged(name):
    def register(fn):
        DAMAGE[name] = fn
        return fn

    return register


DAMAGE = {}


@damaged("expected the shard .*, found no such file")
def missing(shard):
    shard.unlink()


@damaged("cannot read shard|tokens of uint16")
def truncated(shard):
    shard.write_bytes(shard.read_bytes()[:-10])


@damaged("found another: train-extra.npy")
def extra(shard):
    shutil.copy(shard, shard.with_name("train-extra.npy"))


@damaged("expected the SHA-256 .* the file has changed")
def edited(shard):
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(bytes(content))


@damaged("tokens of uint16 in .*, found int32")
def wrong_dtype(shard):
    np.save(shard, np.load(shard).astype(np.int32))


@damaged("expected token ids below its vocabulary of 258, found")
def beyond_the_vocabulary(shard):
    tokens = np.load(shard)
    tokens[5] = 300
    np.save(shard, tokens)
    renew(shard, "sha256", shard)


@damaged("is damaged .dtype: expected uint16, found None")
def index_without_a_key(shard):
    edit_index(shard, dtype=None)


@damaged("is damaged .dtype: expected uint16, found 'int32'")
def signed_tokens(shard):
    edit_index(shard, dtype="int32")


@damaged("has been edited .it does not match its own SHA-256")
def edited_index(shard):
    path = shard.with_name("dataset.json")
    text = path.read_text()
    path.write_text(text.replace('"source": "', '"source": "x', 1))
    assert path.read_text() != text


@damaged("expected documents that begin one after the other within .* tokens .*train")
def documents_that_do_not_rise(shard):
    change_documents(shard, lambda starts: starts[[1, 0]])


@damaged("expected documents that begin one after the other within .* found other places")
def documents_beyond_the_shard(shard):
    change_documents(shard, lambda starts: starts + 10**6)


@damaged("found another header; build the dataset again")
def another_header(shard):
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)


@damaged("cannot read shard .*: expected a regular file")
def a_link(shard):
    shard.rename(shard.with_name("beside"))
    shard.symlink_to("beside")


@damaged("dataset.json: expected a regular file")
def a_pipe(shard):
    shard.with_name("dataset.json").unlink()
    os.mkfifo(shard.with_name("dataset.json"))


@damaged("dataset.json is damaged .nested too deep")
def deep_json(shard):
    shard.with_name("dataset.json").write_text("[" * 100_000)


@damaged("expected the tokenizer .* has changed")
def other_tokenizer(shard):
    edit_index(shard, tokenizer_hash="0" * 16)


@damaged("is damaged .tokens: expected .*, its shards', found 5")
def edited_totals(shard):
    index = json.loads(shard.with_name("dataset.json").read_text())
    index["splits"]["train"]["tokens"] = 5
    edit_index(shard, splits=index["splits"])


@damaged("dataset.json is damaged")
def splits_of_another_kind(shard):
    edit_index(shard, splits=[])


@damaged("expected format")
def other_format(shard):
    edit_index(shard, format=1)


def edit_index(shard, **values):
    path = shard.with_name("dataset.json")
    index = {k: v for k, v in (json.loads(path.read_text()) | values).items() if v is not None}
    path.write_text(json.dumps(files.sealed(index)))


def renew(shard, key, path):
    """The checksums of a file that was written again."""
    index = json.loads(shard.with_name("dataset.json").read_text())
    for split in index["splits"].values():
        for entry in split["shards"]:
            if entry["file"] == shard.name:
                entry[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_index(shard, splits=index["splits"], data_hash=data_hash(index["splits"], index["tokenizer_hash"]))


def change_documents(shard, change):
    path = shard.with_name(documents_of(shard.name))
    found = np.load(path)
    found[:2, 0] = change(found[:2, 0])
    np.save(path, found)
    renew(shard, "documents_sha256", path)


@pytest.mark.parametrize("expected", DAMAGE, ids=lambda text: DAMAGE[text].__name__)
def test_damage_is_found_and_said_in_one_line(dataset, tmp_path, expected):
    copy = tmp_path / "copy"
    shutil.copytree(dataset.path, copy)
    assert shards.read(copy).data_hash == dataset.data_hash
    shard = next(path for path in copy.glob("train-*.npy") if "documents" not in path.name)
    DAMAGE[expected](shard)
    with pytest.raises(DataError, match=expected) as error:
        shards.read(copy)
    assert error.value.exit_code == 3 and "\n" not in str(error.value)


def test_checksums_are_computed_once(dataset, tmp_path, monkeypatch):
    copy, computed = tmp_path / "copy", []
    shutil.copytree(dataset.path, copy, ignore=shutil.ignore_patterns(".verified*"))
    whole = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: computed.append(path.name) or whole(path))
    shards.read(copy)
    assert len(computed) == 4  # two splits, tokens and documents
    shards.read(copy)
    assert len(computed) == 4
    os.utime(next(copy.glob("validation-*.npy")))
    shards.read(copy)
    assert len(computed) == 5
    monkeypatch.setattr(verified, "_machine", lambda: "another")
    for _ in range(2):
        shards.read(copy)
        assert len(computed) == 9
    monkeypatch.undo()
    monkeypatch.setattr(files, "sha256", lambda path: pytest.fail("this machine has not forgotten"))
    shards.read(copy)


@pytest.mark.parametrize("memo", ["[]", "{", "[" * 100_000, '{"x": []}', "null", None])
def test_what_was_verified_is_read_again_where_the_note_is_none(dataset, tmp_path, memo):
    copy = tmp_path / "copy"
    shutil.copytree(dataset.path, copy)
    (copy / ".verified.json").unlink(missing_ok=True)
    (copy / ".verified.json").write_text(memo) if memo is not None else os.mkfifo(copy / ".verified.json")
    edited(next(path for path in copy.glob("train-*.npy") if "documents" not in path.name))
    with pytest.raises(DataError, match="the file has changed"):
        shards.read(copy)


@pytest.mark.parametrize("how", ["in place", "by a copy"])
def test_a_note_of_what_was_verified_does_not_hold_for_other_content_of_the_same_size_and_time(dataset, tmp_path, how):
    copy = tmp_path / "copy"
    shutil.copytree(dataset.path, copy)
    shards.read(copy)
    shard = next(path for path in copy.glob("train-*.npy") if "documents" not in path.name)
    before = shard.stat()
    time.sleep(0.02)  # the system's clock of files is coarse
    edited(shard)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    if how == "by a copy":
        subprocess.run(["cp", "-a", copy, tmp_path / "other"], check=True)
        copy = tmp_path / "other"
    with pytest.raises(DataError, match="the file has changed"):
        shards.read(copy)


def test_a_tokenizer_that_does_not_match_the_shards(dataset, tmp_path):
    with pytest.raises(DataError, match="expected bytes .* found bpe:500; --config.data.tokenizer=bytes"):
        opened(f"shards:{dataset.path}", tmp_path, tokenizer="bpe:500")
    with pytest.raises(DataError, match="expected a token dataset"):
        opened(f"shards:{tmp_path}", tmp_path)


# ---- mixtures ----


def test_a_mixture_is_its_datasets_one_after_the_other(dataset, tmp_path, cache_dir):
    (tmp_path / "x.txt").write_text("other " * 500)
    mixed = opened(f"mix:0.7*shards:{dataset.path};0.3*files:{tmp_path}/x.txt", cache_dir)
    first, second = (part for _, part in mixed.mixture)
    both = np.concatenate([whole_split(first), whole_split(second)])
    np.testing.assert_array_equal(whole_split(mixed), both)
    assert mixed.splits["train"].tokens == len(both) and mixed.data_hash not in (first.data_hash, second.data_hash)


@pytest.mark.parametrize("source", ["mix:", "mix:1*", "mix:x*stdlib", "mix:0*stdlib", "mix:stdlib"])
def test_a_bad_mixture_is_one_line(tmp_path, source):
    with pytest.raises(DataError, match="data.source: expected"):
        opened(source, tmp_path)


# ---- the command line ----


def test_build_and_inspect(text_files, tmp_path):
    out = tmp_path / "built"
    done = tfdist("data", "build", f"--source=files:{text_files}/*.txt", "--tokenizer=bpe:300", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "29 documents" in done.stdout and f"--config.data.source=shards:{out}" in done.stdout
    shown = tfdist("data", "inspect", str(out), f"--plot={tmp_path}/lengths.png")
    assert shown.returncode == 0, shown.stderr
    assert "bytes a token" in shown.stdout and "the quick brown fox" in shown.stdout and "####" in shown.stdout
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    again = tfdist("data", "build", f"--source=files:{text_files}/*.txt", f"--out={out}")
    assert again.returncode == 2 and "expected a new folder" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["data"], 2, "data: expected build, inspect, audit"),
        (["data", "buidl"], 2, "did you mean build?"),
        (["data", "build", "--out=x"], 2, "expected --source=..., found none"),
        (["data", "build", "--source=files:/no/*.txt", "--out=x"], 3, "expected files at"),
        (["data", "build", "--source=stdlib", "--out=x", "--tokeniser=bytes"], 2, "unknown flag --tokeniser; did you mean"),
        (["data", "inspect", "/nowhere"], 3, "expected a token dataset"),
        (["data", "audit"], 2, "expected --config=FILE.py"),
    ],
)
def test_usage_errors_are_one_line(arguments, code, expected):
    done = tfdist(*arguments)
    lines = [line for line in done.stderr.splitlines() if line.startswith("tfdist: ")]
    assert done.returncode == code and len(lines) == 1 and expected in lines[0], done.stderr
