"""Checkpoint files made to harm whoever reads them: none runs anything, crashes or hangs the
reader."""

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import textwrap
import zipfile

import torch

from tests.soak.conftest import FULL

COUNT = 500 if FULL else 100
SECONDS = 5  # for one file

# What a pickle may ask for, with arguments that would write a file; `%s` is its path.
CALLS = [
    ("os", "system", ("touch %s",)),
    ("posix", "system", ("touch %s",)),
    ("subprocess", "check_call", (["touch", "%s"],)),
    ("builtins", "open", ("%s", "w")),
    ("__builtin__", "file", ("%s", "w")),
    ("io", "open", ("%s", "w")),
    ("builtins", "exec", ("open('%s', 'w')",)),
    ("builtins", "eval", ("open('%s', 'w')",)),
    ("pathlib", "Path.touch", ("%s",)),
    ("torch", "load", ("%s",)),
    ("torch", "save", ([], "%s")),
    ("numpy", "save", ("%s", [])),
    ("numpy", "ndarray.tofile", ("%s",)),
    ("numpy.core.memmap", "memmap", ("%s", "u1", "w+", 0, [1])),
    ("shutil", "copyfile", ("/dev/null", "%s")),
    ("importlib", "import_module", ("antigravity",)),
    ("runpy", "_run_code", ("open('%s', 'w')", {})),
    ("torch.storage", "UntypedStorage.from_file", ("%s", True, 8)),
    ("collections", "OrderedDict", ([["a", "b"]],)),
    ("builtins", "bytearray", (1 << 40,)),
    ("builtins", "range", (1 << 60,)),
    ("numpy.core.multiarray", "_reconstruct", ("ndarray", [1 << 40], "b")),
]
PLAIN = [None, True, 1.5, "x", "__class__", "model", b"y", 1 << 30, -1, 1 << 70]


class Call:
    """Pickles as a call of whatever name."""

    def __init__(self, module, name, arguments):
        self.parts = module, name, arguments


class Writer(pickle._Pickler):
    """Writes calls by their names, which need not exist."""

    def save(self, value, *args, **kwargs):
        if not isinstance(value, Call):
            return super().save(value, *args, **kwargs)
        module, name, arguments = value.parts
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        self.save(tuple(arguments))
        self.write(pickle.REDUCE)
        return None


def written(value, protocol=2):
    out = io.BytesIO()
    Writer(out, protocol=protocol).dump(value)
    return out.getvalue()


def nested(rng):
    """A program for a value of exponential or very deep nesting."""
    levels = rng.choice([30, 60, 5000, 200_000])
    if rng.random() < 0.5:
        return b")" + b"2\x86" * min(levels, 5000)
    opening, closing = rng.choice([(b"", b"\x85"), (b"]", b"a")])
    return (b"]" * levels + b"a" * (levels - 1)) if opening else b")" + closing * levels


def program(rng, canary):
    """A hostile pickle, with or without weights around it."""
    kind = rng.randrange(6)
    if kind <= 1:
        module, name, arguments = rng.choice(CALLS)
        text = json.dumps(arguments, default=list).replace("%s", str(canary))
        call = Call(module, name, json.loads(text))
        place = rng.randrange(4)
        value = [call, {"model": call}, {"model": {"a": call}}, [{"x": [call]}] * 3][place]
        return written(value, rng.choice([0, 1, 2]))
    if kind == 2:  # a key or member that is costly to hash
        return b"\x80\x04" + rng.choice(
            [
                b"}" + nested(rng) + b"K\x01s.",
                b"\x8f(" + nested(rng) + b"\x90.",
                b"(" + nested(rng) + b"\x91.",
                b"}(" + nested(rng) + b"K\x01u.",
                b"(" + nested(rng) + b"K\x01d.",
                b"cbuiltins\nset\n]" + nested(rng) + b"a\x85R.",
                nested(rng) + b".",
            ]
        )
    if kind == 3:  # lengths far beyond the file
        length = rng.choice([1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1])
        return b"\x80\x05" + rng.choice([b"\x8e", b"\x8d", b"\x96"]) + struct.pack("<Q", length)
    if kind == 4:  # instructions at random
        codes = [getattr(pickle, x) for x in dir(pickle) if x.isupper() and len(x) > 2]
        codes = [x for x in codes if isinstance(x, bytes) and len(x) == 1]
        body = b"".join(
            rng.choice(codes) + (rng.randbytes(rng.randrange(4)) if rng.random() < 0.3 else b"")
            for _ in range(rng.randrange(5, 300))
        )
        return b"\x80\x02" + body + b"."
    value = written([rng.choice(PLAIN) for _ in range(20)])[:-1]  # memo bomb
    return value + b"q\x01" + b"(h\x01h\x01h\x01lq\x01" * rng.randrange(10, 60) + b"."


def archive(rng, canary, folder):
    """A hostile archive as of torch, or a file in another format with a huge header."""
    kind = rng.randrange(5)
    out = io.BytesIO()
    if kind == 0:  # a program among true weights
        torch.save({"model": {"a": torch.arange(4.0)}}, folder / "true.pth")
        with zipfile.ZipFile(folder / "true.pth") as true, zipfile.ZipFile(out, "w") as changed:
            for info in true.infolist():
                data = true.read(info)
                is_pickle = info.filename.endswith("data.pkl")
                changed.writestr(info.filename, program(rng, canary) if is_pickle else data)
    elif kind == 1:  # names that lead elsewhere, or thousands of them
        with zipfile.ZipFile(out, "w") as made:
            made.writestr("x/data.pkl", written({"model": {}}))
            for number in range(rng.choice([1, 5000])):
                made.writestr(f"../../../..{canary}{number or ''}", b"x")
    elif kind == 2:  # much from little
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
            made.writestr("x/data.pkl", bytes(1 << 26))
            made.writestr("x/version", "3")
    elif kind == 3:  # safetensors
        header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}})
        size = rng.choice([len(header), 1 << 62, 0])
        return struct.pack("<Q", size) + header.encode() + bytes(16), ".safetensors"
    else:  # the five pickles of torch's first format
        magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
        parts = [magic, pickle.dumps(1001, protocol=2), pickle.dumps({}, protocol=2)]
        parts.insert(rng.randrange(1, 4), program(rng, canary))
        return b"".join(parts), ".pth"
    return out.getvalue(), ".pth"


READER = """
    import os, resource, sys, time
    from d2ext.checkpoint.formats import read_file
    from d2ext.errors import UserError
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    for path in sys.stdin.read().splitlines():
        start, outcome = time.process_time(), "read"
        try:
            read_file(path)
        except UserError as error:
            outcome = "refused"
            assert len(str(error)) < 500 and "\\n" not in str(error), error
        print(path, outcome, time.process_time() - start, flush=True)
"""


def test_hostile_files_are_refused_or_read_and_do_nothing(tmp_path, counted):
    rng = random.Random(12)
    canary = tmp_path / "canary"
    files = tmp_path / "files"
    files.mkdir()
    for number in range(COUNT):
        data, suffix = program(rng, canary), rng.choice([".pkl", ".pth"])
        if rng.random() < 0.4:
            data, suffix = archive(rng, canary, tmp_path)
        (files / f"{number}{suffix}").write_bytes(data)
    os.system(f"touch {canary}")
    assert canary.exists()  # what the files try would be noticed
    canary.unlink()
    before = set(tmp_path.iterdir())
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(READER)],
        input="\n".join(map(str, sorted(files.iterdir()))),
        capture_output=True,
        text=True,
        timeout=60 + COUNT,
        cwd=tmp_path,
    )
    lines = [line.rsplit(" ", 2) for line in process.stdout.splitlines()]
    assert process.returncode == 0 and len(lines) == COUNT, (
        f"crash at the file after {lines[-1:]}: {process.stderr[-2000:]}"
    )
    slow = [line for line in lines if float(line[2]) > SECONDS]
    assert not slow
    assert set(tmp_path.iterdir()) == before and len(list(files.iterdir())) == COUNT
    outcomes = [outcome for _, outcome, _ in lines]
    assert outcomes.count("refused") > COUNT / 2
    counted(
        {
            "files": COUNT,
            "refused": outcomes.count("refused"),
            "read as plain values": outcomes.count("read"),
            "crashes": 0,
            "executions": 0,
            "slowest, seconds": round(max(float(line[2]) for line in lines), 2),
        }
    )
