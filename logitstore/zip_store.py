"""A store's folder as one zip file: members as they are, in the order of their names; the same bytes each time."""

import shutil
import zipfile
from pathlib import Path
from typing import IO

from logitstore.files import LocalFiles

ZIP_SUFFIX = ".zip"
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
_LARGE = 1 << 31  # from here on a member's sizes take 64 bits
_PLAIN_FILE = 0o100644 << 16


def write_zip(folder: Path, file: IO[bytes]) -> None:
    """Write all of a store's files but those that are being written (dot names).

    Raises:
        OSError: full disk.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in LocalFiles(folder).names():
            member = zipfile.ZipInfo(name, _LONG_AGO)
            member.create_system, member.external_attr = 3, _PLAIN_FILE
            member.file_size = (folder / name).stat().st_size
            with (
                (folder / name).open("rb") as source,
                archive.open(member, "w", force_zip64=member.file_size >= _LARGE) as out,
            ):
                shutil.copyfileobj(source, out, 1 << 20)
