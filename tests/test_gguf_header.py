"""A GGUF header that lies is told in one line, before MLX's reader, which would end the process, sees the file."""

import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from logitstore.errors import ModelError
from logitstore.gguf_header import check_header
from tests.gguf_files import gguf_bytes, gguf_string, smollm2_path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
NUMBERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q"}
HUGE = 2**63 + 1


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


# Every value type alone and in an array, every tensor type that MLX reads.
METADATA = [
    ("general.architecture", STRING, gguf_string("llama")),
    ("general.alignment", U32, u32(64)),
    *((f"one.{kind}", kind, struct.pack(f"<{code}", 1)) for kind, code in NUMBERS.items()),
    *((f"many.{kind}", ARRAY, array(kind, 3, struct.pack(f"<3{code}", 1, 0, 1))) for kind, code in NUMBERS.items()),
    ("none", ARRAY, array(STRING, 0)),
    ("words", ARRAY, array(STRING, 3, gguf_string("a") + gguf_string("") + gguf_string("né"))),
]
TENSORS = [
    ("f32", [3], 0, bytes(12)),
    ("f16.weight", [3, 2, 1, 2], 1, bytes(24)),
    ("q4_0.weight", [64, 2], 2, bytes(4 * 18)),
    ("q4_1.weight", [32, 2], 3, bytes(2 * 20)),
    ("q8_0.weight", [32], 8, bytes(34)),
    ("q2_k", [256], 10, bytes(84)),
    ("q4_k", [256, 2], 12, bytes(2 * 144)),
    ("q6_k", [512], 14, bytes(2 * 210)),
    ("bf16", [5], 30, bytes(10)),
]
SOUND = gguf_bytes(METADATA, TENSORS, alignment=64)
# What each variant of SOUND does when MLX reads it: in a process of its own, which a crash would end.
LOAD_EACH = """
import sys
from pathlib import Path
import distill_kernels
import mlx.core as mx
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(path.name, flush=True)
    try:
        mx.load(str(path), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError):
        pass
print("alive")
"""


def check(folder: Path, content: bytes) -> None:
    (folder / "x.gguf").write_bytes(content)
    check_header(folder / "x.gguf")


def test_every_value_type_and_tensor_type_that_mlx_reads_passes(tmp_path: Path) -> None:
    check(tmp_path, SOUND)
    check(tmp_path, gguf_bytes(METADATA[:1], version=2))


def test_the_header_of_a_real_model_passes() -> None:
    check_header(smollm2_path())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot mmap an empty file; expected a .gguf file, download it again"),
        (b"PK\x03\x04" + SOUND[4:], r"it starts with b'PK\\x03\\x04', expected b'GGUF'; type the path"),
        (gguf_bytes([], version=1), "of version 1, expected 2 or 3; convert"),
        (b"GGUF" + bytes(range(200)), "of version 50462976, expected 2 or 3"),
        (SOUND[:10], "ends within the list of tensors, 6 bytes early; download it again"),
        (SOUND[:4] + struct.pack("<IQQ", 3, HUGE, 0), "list of tensors has length .*, but only 8 bytes follow"),
        (SOUND[:4] + struct.pack("<IQQ", 3, 0, HUGE), "the metadata has length .*, but only 0 bytes follow"),
        (gguf_bytes([("k", STRING, struct.pack("<Q", HUGE))]), "`k` has length .*, but only"),
        (gguf_bytes([("k", STRING, gguf_string(b"\xff"))]), "`k` holds bytes that are not UTF-8"),
        (gguf_bytes([(b"\xff", U8, b"1")]), "a metadata key holds bytes that are not UTF-8"),
        (gguf_bytes([("a\nb", U8, b"1")]), r"a metadata key is 'a\\nb', expected letters"),
        (gguf_bytes([("k", U8, b"1"), ("k", U8, b"1")]), "a metadata key is there twice: `k`"),
        (gguf_bytes([("k", ARRAY, array(U64, HUGE, bytes(64)))]), "`k` has length .*, but only"),
        (gguf_bytes([("k", ARRAY, array(STRING, 2**40))]), "`k` has length 1,099,511,627,776, but only"),
        (gguf_bytes([("k", ARRAY, array(ARRAY, 1, array(U8, 0)))]), "`k` is an array of arrays"),
        (gguf_bytes([("k", ARRAY, array(77, 1))]), "`k` has value type 77, expected 0 to 12"),
        (gguf_bytes([("k", 13, b"")]), "`k` has value type 13, expected 0 to 12"),
        (gguf_bytes([("k", F64, bytes(8))]), "`k` is a float64, which MLX misreads; use"),
        (gguf_bytes([("k", ARRAY, array(F64, 1, bytes(8)))]), "`k` is a float64, which MLX misreads"),
        (gguf_bytes([("general.alignment", U32, u32(0))]), "alignment` is no power of two in a uint32, expected 32"),
        (gguf_bytes([("general.alignment", U64, struct.pack("<Q", 32))]), "alignment` is no power of two"),
        (gguf_bytes([], [("t", [], 0, bytes(4))]), "`t` has 0 dimensions, expected 1 to 4"),
        (gguf_bytes([], [("t", [1] * 9, 0, bytes(4))]), "`t` has 9 dimensions, expected 1 to 4"),
        (gguf_bytes([], [("t", [4, 0], 0, b"")]), r"`t` has shape \[4, 0\], expected 1 to"),
        (gguf_bytes([], [("t", [96, 384307168202282326], 8, bytes(68))]), r"`t` has shape \[96, 3843.*\], expected"),
        (gguf_bytes([], [("t", [256], 13, bytes(176))]), "`t` is Q5_K, expected one of F32, .*; use the model's safe"),
        (gguf_bytes([], [("t", [256], 4711, bytes(176))]), "`t` is type 4711, expected one of F32"),
        (gguf_bytes([], [("t", [48], 8, bytes(51))]), "`t` has rows of 48, Q8_0 packs 32 at once"),
        (gguf_bytes([], [("t", [1], 0, bytes(4)), ("t", [1], 0, bytes(4))]), "a tensor name is there twice: `t`"),
        (gguf_bytes([], [("t", [8], 0, bytes(64)), ("u", [1], 0, bytes(4))]), "`u` starts at 64 .*, expected 32"),
        (SOUND[:-1], "1 bytes are missing at its end, up to tensor `bf16`; download it again"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_header_that_cannot_be_is_told_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        check(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path}/x.gguf cannot be read as GGUF: ")
    assert len(str(caught.value).splitlines()) == 1


def test_no_cut_of_a_sound_file_passes(tmp_path: Path) -> None:
    for end in range(len(SOUND)):
        with pytest.raises(ModelError, match="cannot be read as GGUF"):
            check(tmp_path, SOUND[:end])


def test_mlx_survives_whatever_passes(tmp_path: Path) -> None:
    rng = random.Random(0)
    (tmp_path / "passed").mkdir()
    for n in range(1500):
        content = bytearray(SOUND)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content) // 2)  # the header, for the most part
            content[at] = rng.choice([content[at] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)])
        try:
            check(tmp_path, bytes(content))
        except ModelError:
            continue
        (tmp_path / "x.gguf").rename(tmp_path / "passed" / f"{n}.gguf")
    command = [sys.executable, "-c", LOAD_EACH, str(tmp_path / "passed")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.endswith("alive\n"), (done.returncode, done.stdout[-20:], done.stderr[-500:])
    assert done.stdout.count("\n") > 100
