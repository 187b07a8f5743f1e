"""CIFAR's pickles: what Python 2 and 3 and NumPy 1 and 2 write is read; what is crafted to do harm is refused."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from made import python2_pickle

from flatcl.datasets import _files, _pickled
from flatcl.utils.engine.memory import peak_memory_mib, reset_peak_memory
from flatcl.utils.errors import DataError

# Instructions of what CIFAR's files are made of, to be put together in other ways.
UINT8 = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
FROMBUFFER = b"cnumpy.core.numeric\n_frombuffer\n"
ENCODE = b"c_codecs\nencode\n"
SHAPE = b"(K\x01M\x00\x0ct"  # (1, 3072)
ROW = b"T" + struct.pack("<I", 3072) + bytes(range(256)) * 12


def number(value):
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def text(content):
    return b"X" + struct.pack("<I", len(content)) + content


def state(shape=SHAPE, dtype=UINT8, data=ROW, version=b"K\x01"):
    return b"(" + version + shape + dtype + b"\x89" + data + b"t"


def array(**parts):
    return EMPTY + state(**parts) + b"b"


LATIN1 = text(b"latin1")


def batch(data, labels=b"](K\x00e"):
    return b"\x80\x02}(U\x04data" + data + b"U\x06labels" + labels + b"u."


def load(data):
    return _files._cifar_batch(data, Path("batch"), "labels", 10)


def refused(data, match=None):
    with pytest.raises(DataError, match=match) as caught:
        load(data)
    message = str(caught.value)
    assert message.startswith("batch: ") and len(message) < 500 and message.isprintable()


def test_the_parts_make_a_sound_batch():
    record, labels = load(batch(array()))
    assert (record.shape, record.order, record.data, labels) == ((1, 3072), "C", bytes(range(256)) * 12, [0])
    assert pickle.loads(batch(array()), encoding="latin1")["data"].tobytes() == record.data


@pytest.mark.parametrize("protocol", ["Python 2", 2, 3, 4, 5])
@pytest.mark.parametrize("numpy", [b"numpy._core.", b"numpy.core."], ids=["NumPy 2", "NumPy 1"])
@pytest.mark.parametrize("order", "CF")
def test_what_each_version_writes_is_read(protocol, numpy, order):
    rows = np.random.default_rng(0).integers(0, 256, (3, 3072)).astype(np.uint8)
    content = {
        "data": np.array(rows, order=order),
        b"labels": [1, 2, 9],
        "filenames": [b"\xff.png", "\u20ac"],
        "mean": 0.5,
    }
    data = python2_pickle(content) if protocol == "Python 2" else pickle.dumps(content, protocol=protocol)
    here = b"numpy._core." if b"numpy._core." in data else b"numpy.core."
    if isinstance(protocol, int) and protocol > 3:  # a text after its length
        start = data.index(here) - 1
        data = data[:start] + bytes([data[start] + len(numpy) - len(here)]) + data[start + 1 :]
    record, labels = load(data.replace(here, numpy))
    got = np.frombuffer(record.data, np.uint8).reshape(record.shape, order=record.order)
    assert np.array_equal(got, rows) and labels == [1, 2, 9]


DEEP = b")" + b"\x85" * 100_000  # a tuple in a tuple in a tuple ...
WIDE = b")" + b"q\x00h\x00\x86" * 60  # a tuple of twice the same, 60 levels deep: 2^60 leaves
HOSTILE = {
    "object dtype": array(dtype=UINT8.replace(b"u1", b"O8"), shape=b"(K\x01t", data=b"U\x08" + bytes(8)),
    "wider type": array(dtype=UINT8.replace(b"u1", b"i8")),
    "big-endian": array(dtype=UINT8.replace(b"|", b">")),
    "structured dtype": array(dtype=UINT8.replace(b"|NNN", b"|N(U\x01at}U\x01aNs")),
    "subarray dtype": array(dtype=UINT8.replace(b"|NNN", b"|(K\x02K\x02tNN")),
    "dtype with flags": array(dtype=UINT8.replace(b"K\x00tb", b"K\x3ftb")),
    "dtype of a dtype": array(dtype=b"cnumpy\ndtype\n(" + UINT8 + b"K\x00K\x01tR"),
    "dtype that is not called": array(dtype=b"cnumpy\ndtype\n"),
    "dtype that is no dtype": array(dtype=b"U\x02u1"),
    "array of raw memory": b"cnumpy\nndarray\n(" + SHAPE + UINT8 + b"tR",
    "array beyond a buffer": b"cnumpy\nndarray\n(" + SHAPE + UINT8 + ROW + b"K\x00(K\x01J\x00\x00\x00\xc0ttR",
    "negative shape": array(shape=b"(J\xff\xff\xff\xffJ\x00\xf4\xff\xfft"),
    "negative rows": array(shape=b"(J\xff\xff\xff\xffM\x00\x0ct"),
    "huge shape": array(shape=b"(" + number(2**62) + b"M\x00\x0ct"),
    "shape that fits modulo 2^64": array(shape=b"(" + number(2**64 + 1) + b"M\x00\x0ct"),
    "shape of huge numbers": array(shape=b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 10_000 + b"t"),
    "shape of many numbers": array(shape=b"(" + b"K\x01" * 100 + b"t"),
    "shape without rows": array(shape=b"(K\x00M\x00\x0ct", data=b"U\x00"),
    "too many rows": array(shape=b"(K\x02M\x00\x0ct"),
    "too few bytes": array(data=b"U\x03abc"),
    "no bytes": array(data=b"N"),
    "text for bytes": array(data=text(b"a" * 3072)),
    "text for a shape": array(shape=text(b"ab")),
    "floats for a shape": array(shape=b"(G?\xf0\x00\x00\x00\x00\x00\x00M\x00\x0ct"),
    "number for a shape": array(shape=b"M\x00\x0c"),
    "state of another version": array(version=b"K\x07"),
    "state without version": array(version=b""),
    "state too short": EMPTY + b"(K\x01tb",
    "state too long": EMPTY + state()[:-1] + b"Ntb",
    "state empty": EMPTY + b")b",
    "state None": EMPTY + b"Nb",
    "state a dict": EMPTY + b"}b",
    "state itself": EMPTY + b"q\x01h\x01b",
    "state for a list": b"]" + state() + b"b",
    "state for a name": b"cnumpy\nndarray\n" + state() + b"b",
    "never filled": EMPTY,
    "filled twice": array() + state() + b"b",
    "filled twice, smaller": FROMBUFFER + b"(" + ROW + UINT8 + SHAPE + b"U\x01CtR" + state() + b"b",
    "buffer that does not fit": FROMBUFFER + b"(" + ROW + UINT8 + b"(K\x02M\x00\x0ctX\x01\x00\x00\x00CtR",
    "buffer of objects": FROMBUFFER + b"(" + ROW + UINT8.replace(b"u1", b"O8") + SHAPE + b"X\x01\x00\x00\x00CtR",
    "reconstructs a dtype": EMPTY.replace(b"ndarray", b"dtype"),
    "reconstructs with a shape": EMPTY.replace(b"(K\x00t", SHAPE),
    "encodes what is encoded": ENCODE + b"(" + ENCODE + b"(" + text(b"a") + LATIN1 + b"tR" + LATIN1 + b"tR",
    "encodes by another codec": ENCODE + b"(" + text(b"a" * 99) + text(b"zlib") + b"tR",
    "encodes what latin1 lacks": ENCODE + b"(" + text("\u20ac".encode()) + LATIN1 + b"tR",
    "text in no encoding": text(b"\xff"),
    "calls a text": b"U\x05numpy)R",
    "calls an array": array() + b")R",
    "calls without arguments": b"cnumpy\ndtype\nNR",
    "name of NumPy that makes scalars": b"cnumpy.core.multiarray\nscalar\n",
    "name with control characters": text(b"o\ns\x1b[2J") + text(b"system") + b"\x93",
    "name that is long": text(b"a" * 100_000) + text(b"system") + b"\x93",
    "name that is deep": DEEP + text(b"dtype") + b"\x93",
    "name without end": b"c" + b"a" * 5000,
    "instance": b"cnumpy\nndarray\n)\x81",
    "extension": b"\x82\x01",
    "persistent id": b"U\x01aQ",
    "buffer out of band": b"\x97",
    "key that is deep": b"}" + DEEP + b"Ns",
    "key that is wide": b"}" + WIDE + b"Ns",
    "key that is a list": b"}]Ns",
    "odd number of items": b"}(Nu",
    "items of a list": b"](U\x01aNu",
    "appends to a dict": b"}Na",
    "value that was not kept": b"h\x07",
    "nothing left": b"aaaa",
    "no mark": b"t",
    "deep": DEEP,
    "list of itself": b"]q\x01h\x01a",
    "long bytes": b"\x8e" + b"\xff" * 8,
    "long text": b"\x8d" + b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    "negative length": b"T\xff\xff\xff\xffabc",
    "set": b"\x8f(K\x01\x90",
    "protocol 0": b"I1\n",
    "newer protocol": b"\x80\x06",
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_data(what):
    refused(batch(HOSTILE[what]))


@pytest.mark.parametrize(
    "labels, match",
    [
        (DEEP, "not a list of 1 labels"),
        (array(), "not a list of 1 labels"),
        (b"](" + DEEP + b"e", "not all integers"),
        (b"]q\x01h\x01a", "not all integers"),
        (b"](" + number(2**2000) + b"e", "not all integers"),
        (b"](G" + bytes(8) + b"e", "not all integers"),
    ],
)
def test_hostile_labels(labels, match):
    refused(batch(array(), labels), match)


def grown_mib(act):
    """How much memory `act` takes at its peak."""
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory_mib(cpu)
    act()
    return peak_memory_mib(cpu) - before


ONE_TEXT = text(b"a" * 10**6) + b"q\x01" + (ENCODE + b"(h\x01" + LATIN1 + b"tR") * 3000
STEPS = 200_000
STEP_BYTES = 300  # that one instruction may take
GROWING = {
    "one text encoded 3000 times": lambda: ONE_TEXT,
    "dicts": lambda: b"}" * 3 * STEPS,
    "marks": lambda: b"(" * 3 * STEPS,
    "kept values": lambda: b"".join(b"]r" + struct.pack("<I", k << 8) for k in range(STEPS)),
    "bytes that are not there": lambda: b"\x96" + struct.pack("<Q", 2**40),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux")
@pytest.mark.parametrize("what", GROWING)
def test_a_small_file_cannot_fill_the_memory(what, monkeypatch):
    assert STEP_BYTES * _pickled.MAX_STEPS < 1 << 30
    monkeypatch.setattr(_pickled, "MAX_STEPS", STEPS)
    data = batch(GROWING[what]())
    assert grown_mib(lambda: refused(data)) < STEPS * STEP_BYTES / 2**20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux")
def test_a_far_place_in_the_memo_takes_no_room():
    far = b"r\xff\xff\xff\x7f"
    assert grown_mib(lambda: load(batch(array() + far))) < 50


@pytest.mark.parametrize("protocol", ["Python 2", 2, 4, 5])
def test_damage_anywhere_is_refused_or_does_no_harm(protocol):
    """Every prefix, every flipped bit, and instructions put in, out and in other places."""
    rng = np.random.default_rng(0)
    content = {
        b"data": rng.integers(0, 256, (2, 5)).astype(np.uint8),
        b"labels": [1, 2],
        "names": [b"a", "b", 2**40, None],
    }
    data = python2_pickle(content) if protocol == "Python 2" else pickle.dumps(content, protocol=protocol)
    damaged = [data[:end] for end in range(len(data))]
    damaged += [data[:k] + bytes([data[k] ^ 1 << bit]) + data[k + 1 :] for k in range(len(data)) for bit in range(8)]
    codes = b"(.0K)\x85\x86\x87t]}aesuRbq h\x94NU\x8c\x93\x88\x8aXTcj"
    for _ in range(3000):
        piece = bytearray(data)
        for place, kind, code in zip(*(rng.integers(0, n, 4) for n in (len(data), 4, len(codes))), strict=True):
            piece[place : place + kind % 3] = [codes[code : code + 1], b"", data[place // 2 : place // 2 + 9], b"\xff"][
                kind
            ]
        damaged.append(bytes(piece))
    refusals = 0
    for piece in damaged:
        try:
            _files._cifar_batch(piece, Path("batch"), "labels", 10)
        except DataError as error:
            refusals += 1
            assert str(error).isprintable()
    assert refusals == len(damaged), "rows of 5 pixels are no CIFAR images"
