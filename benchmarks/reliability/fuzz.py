"""Every reader of files against broken files: a result or an error in one sentence, within five seconds.

Each case starts from a valid file (or an empty one), which Hypothesis edits: bits, cuts, copies, and pieces that are
hard to read (deep nesting, huge numbers, other encodings, pickles, shapes larger than memory). A result, a ValueError
and an OSError are allowed. Any other exception, or more than five seconds, is a failure, which Hypothesis reduces.

    python -m benchmarks.reliability.fuzz                    # 10,000 for each of 13 readers, half an hour
    python -m benchmarks.reliability.fuzz --cases 500 --readers npz csv
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import time
import warnings
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers import BertTokenizer

import bayes_kf as bkf
from bayes_kf.cli.config_flags import read_settings
from bayes_kf.cli.lora_adapters import _read_config
from bayes_kf.cli.posterior_folder import LABELS_FILE, read_labels
from bayes_kf.cli.stream_files import STREAM_FILE, read_stream
from bayes_kf.data import open_dataset, read_predictions
from bayes_kf.data.text import text_data
from bayes_kf.files.checksums import write_checksums
from bayes_kf.inference.saving.file_names import STATE_FILE
from benchmarks.common.command import Command
from benchmarks.common.result_files import ResultFile, markdown_table

SECONDS = 5.0  # processor time, so that other work on the machine has no effect
EXPECTED = (ValueError, OSError)


@functools.cache
def _tokenizer() -> BertTokenizer:
    with TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "good", "so"]))
        return BertTokenizer(str(vocabulary))


class Reader(NamedTuple):
    """A reader of a kind of file, and valid files of that kind."""

    name: str
    read: Callable[[Path], Any]
    valid: list[bytes]


def _npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def _huge() -> bytes:
    """An array whose header declares 10¹² elements."""
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("x.npy", "y.npy", "probs.npy", "targets.npy"):
            archive.writestr(name, header.getvalue())
    return buffer.getvalue()


def _dataset(path: Path) -> int:
    return sum(1 for _ in open_dataset(path).loader)


def _images(path: Path) -> int:
    folder = path.parent / "images" / "one"
    folder.mkdir(parents=True, exist_ok=True)
    path.rename(folder / "1.png")
    (path.parent / "images" / "two").mkdir(exist_ok=True)
    (path.parent / "images" / "two" / "1.png").write_bytes(_png())
    return _dataset(path.parent / "images")


def _text(path: Path) -> int:
    return sum(1 for _ in text_data(path, _tokenizer(), max_length=32).loader)


def _settings(path: Path) -> Any:
    return read_settings(Namespace(config=str(path), seed=None))


def _state(path: Path) -> Any:
    folder = path.parent
    kf = _filter()
    bkf.Posterior(kf, kf.init(torch.ones(1, 3))).save_pretrained(folder / "kept")
    (folder / "kept" / "SHA256SUMS").unlink()  # so that the checksums do not refuse the file first
    path.replace(folder / "kept" / "kalman_state.safetensors")
    return bkf.Posterior.from_pretrained(folder / "kept", _filter().adapter.model)


def _filter() -> bkf.KalmanFilter:
    torch.manual_seed(0)
    return bkf.KalmanFilter(nn.Linear(3, 2), bkf.KalmanConfig(rank=2))


def _valid_state() -> bytes:
    with TemporaryDirectory() as folder:
        kf = _filter()
        bkf.Posterior(kf, kf.init(torch.ones(1, 3))).save_pretrained(Path(folder) / "kept")
        return (Path(folder) / "kept" / "kalman_state.safetensors").read_bytes()


def _beside(name: str, read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A reader that finds the file under ``name`` in a folder."""

    def reading(path: Path) -> Any:
        (path.parent / "kalman_config.json").write_text("{}")
        path.replace(path.parent / name)
        return read(path.parent)

    return reading


def readers() -> list[Reader]:
    """All readers."""
    x, y, probs = np.ones((4, 1, 2, 2), np.float32), np.arange(4) % 2, np.full((4, 2), 0.5)
    arrays = [_npz(x=x, y=y), _npz(x=x.astype(np.uint8), y=np.array(["a", "b"] * 2)), _huge()]
    saved = [_npz(targets=y, probs=probs), _npz(targets=np.ones(4), mean=np.ones(4), variance=np.ones(4)), _huge()]
    table, lines = (
        b'text,label\na film,good\n"so, bad",bad\n',
        b'{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}\n',
    )
    config = json.dumps({"rank": 3, "covariance": "diagonal", "tune": {"beta": [0.9, 0.95]}}).encode()
    stream = json.dumps({"lines": 3, "run_length": 50.0, "detector": [0.0, 0.1, 0.2], "alarms": [2]}).encode()
    labels = json.dumps({"class_names": ["a", "b"], "num_outputs": 2}).encode()

    def streamed(folder: Path) -> Any:
        (folder / LABELS_FILE).write_bytes(labels)
        (folder / STATE_FILE).write_bytes(b"")  # only its existence is checked here
        write_checksums(folder)
        return read_stream(Namespace(output=folder, classes=["a", "b"], alarm=50.0))

    return [
        Reader("arrays.npz", _dataset, arrays),
        Reader("images.png", _images, [_png()]),
        Reader("text.csv", _text, [table]),
        Reader("text.tsv", _text, [table.replace(b",", b"\t")]),
        Reader("text.jsonl", _text, [lines]),
        Reader("predictions.npz", read_predictions, saved),
        Reader("predictions.csv", read_predictions, [b"target,cat,dog\ncat,0.9,0.1\n", b"y,mean,variance\n1,2,3\n"]),
        Reader("settings.yaml", _settings, [b"rank: 3\ncovariance: diagonal\ntune:\n  beta: [0.9, 0.95]\n"]),
        Reader("settings.json", _settings, [config]),
        Reader("lora.json", _read_config, [b'{"r": 2, "lora_alpha": 4, "target_modules": ["query"]}']),
        Reader("labels.json", _beside(LABELS_FILE, read_labels), [labels]),
        Reader("stream.json", _beside(STREAM_FILE, streamed), [stream]),
        Reader("state.safetensors", _state, [_valid_state()]),
    ]


PIECES = [
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"1e999",
    b"-1",
    b"nan",
    b"9" * 5000,
    b"\x00" * 64,
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r",
    b'"',
    b"\n\n",
    b"," * 300,
    b"true",
    b"null",
    b"&a [*a, *a]",
    b"!!python/object/apply:os.system ['true']",
    b"../../../etc/passwd",
    "﷽\u202e\U0001f600".encode(),
    pickle.dumps(Counter("ab")),
    b"PK\x03\x04",
]


@st.composite
def edited(draw: st.DrawFn, valid: list[bytes]) -> bytes:
    """A valid file after up to five edits."""
    content = bytearray(draw(st.sampled_from([*valid, b""])))
    for _ in range(draw(st.integers(0, 5))):
        kind, place = draw(st.integers(0, 5)), draw(st.integers(0, max(0, len(content))))
        if kind == 0 and content:
            content[place % len(content)] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            content[place:place] = draw(st.sampled_from(PIECES))
        elif kind == 3:
            content[place:place] = draw(st.binary(max_size=20))
        elif kind == 4:
            end = place + draw(st.integers(0, 200))
            content[place:place] = content[place:end]
        else:
            del content[place : place + draw(st.integers(0, 30))]
    return bytes(content)


def attack(reader: Reader, cases: int, number: int = 0) -> dict[str, Any]:
    """Counts of outcomes over ``cases`` files for one reader.

    Raises:
        Exception: that a reader must not raise, for the smallest file that Hypothesis found.
    """
    outcomes: Counter[str] = Counter()
    longest = [0.0]

    @seed(number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(edited(reader.valid))
    def case(content: bytes) -> None:
        with TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(scratch) / reader.name
            path.write_bytes(content)
            begun = time.process_time()
            try:
                reader.read(path)
                outcomes["read"] += 1
            except EXPECTED as error:
                outcomes["refused"] += 1
                if not str(error).strip():
                    raise AssertionError("an error without a message") from error
            taken = time.process_time() - begun
            longest[0] = max(longest[0], taken)
            if taken > SECONDS:
                raise AssertionError(f"{taken:.1f} seconds")

    case()
    return {"cases": outcomes.total(), **outcomes, "longest_seconds": longest[0]}


def main() -> None:
    """The command line."""
    command = Command(__doc__).option("--cases", type=int, default=10_000, help="files for each reader (%(default)s)")
    args = command.option("--readers", nargs="+", metavar="NAME", help="parts of readers' names (all)").parse()
    file = ResultFile("fuzz")
    file.begin()
    rows = []
    for reader in readers():
        if args.readers and not any(part in reader.name for part in args.readers):
            continue
        cell = attack(reader, args.cases)
        file.put(reader.name, cell)
        rows.append([reader.name, *(str(cell.get(k, 0)) for k in ("cases", "read", "refused"))])
        rows[-1].append(f"{cell['longest_seconds']:.2f}")
        print(*rows[-1], flush=True)
    header = ["file", "cases", "read", "refused in a sentence", "longest, s"]
    file.write_markdown("Files made to break readers", markdown_table(header, rows))


if __name__ == "__main__":
    main()
