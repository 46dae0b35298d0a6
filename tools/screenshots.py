"""The README's pictures of the page, by a real Chromium: `tools/screenshots.py [STORE OTHER] [--out FOLDER]`.

The two stores hold the same documents under two teachers. Without them it makes two in .demo/screenshots, from the
demo's teacher and from a student of it that lost a layer: about four minutes on 2 cores.
"""

import argparse
import base64
import json
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any
from urllib.request import urlopen

import uvicorn
from playwright.sync_api import sync_playwright

from logitstore.service.access import Access
from logitstore.service.app import create_app
from logitstore.service.shelf import Shelf

WIDTH, HEIGHT = 1200, 780
DOCUMENTS, TOKENS, STEPS = 24, 320, 12
SIZE_BYTES = 150_000
"""A picture is no larger."""
PIXELS = """async (url) => {
  const image = await createImageBitmap(await (await fetch(url)).blob());
  const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
  canvas.drawImage(image, 0, 0);
  const { data } = canvas.getImageData(0, 0, image.width, image.height);
  let text = "";
  for (let i = 0; i < data.length; i += 32768) text += String.fromCharCode(...data.subarray(i, i + 32768));
  return btoa(text);
}"""


def made(folder: Path) -> list[Path]:
    """Two stores of the same documents, made unless they are there."""
    stores = [folder / "teacher.zarr", folder / "student.zarr"]
    if all(path.exists() for path in stores):
        return stores
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("demo_data.py")), str(folder)]
    teacher = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    lines = (folder / "train.jsonl").read_text().splitlines()
    texts = folder / "texts.jsonl"
    texts.write_text("\n".join([line for line in lines if len(line) > 600][:DOCUMENTS]) + "\n")
    build = ["logitstore", "build", "--dataset", texts, "--max-seq-length", TOKENS]
    run(*build, "--teacher", teacher, "--out", stores[0])
    run("distill-train", "--student", teacher, "--keep-layers", 29, "--fine-tune-type", "full", "--dataset", texts,
        "--max-seq-length", TOKENS, "--batch-size", 1, "--learning-rate", 1e-4, "--alpha", 0, "--iters", STEPS,
        "--out", folder / "student")  # fmt: skip
    run(*build, "--teacher", folder / "student", "--out", stores[1])
    return stores


def run(*command: object) -> None:
    print("$", *command)
    subprocess.run([str(word) for word in command], check=True)


@contextmanager
def serving(places: list[Path]) -> Iterator[str]:
    app = create_app(Shelf(places), None, Access(None))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def png(rgba: bytes) -> bytes:
    """Pixels RGBA [HEIGHT, WIDTH, 4] as an opaque PNG, its rows unfiltered: so letters on plain ground pack best."""
    rgb = bytearray(HEIGHT * WIDTH * 3)
    for channel in range(3):
        rgb[channel::3] = rgba[channel::4]
    rows = b"".join(b"\0" + rgb[at : at + 3 * WIDTH] for at in range(0, len(rgb), 3 * WIDTH))
    chunks = (b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (*chunks, (b"IEND", b""))
    )


def telling(base: str, store: str, number: int) -> int:
    """A position whose label is a candidate, and not the first one."""
    with urlopen(f"{base}/v1/stores/{store}/documents/{number}") as answer:
        found = json.load(answer)
    rows = range(40, len(found["ids"]))
    at = (t for t in rows if found["head"][t] > 4 and found["token_ids"][t + 1] in found["ids"][t][1:4])
    return next(at, 40)


def take(browser: Any, base: str, names: list[str], out: Path) -> None:
    """One picture a view, the comparison in the dark."""
    first, other = names
    t = telling(base, first, 4)
    views = {
        "stores": ("#/", "light", None),
        "store": (f"#/{first}?sort=nll&descending=true", "light", None),
        "document": (f"#/{first}/4?t={t}", "light", ".reading"),
        "comparison": (f"#/{first}/4/compare/{other}?t={t}", "dark", ".reading"),
    }
    for name, (address, scheme, top) in views.items():
        context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
        page = context.new_page()
        page.goto(f"{base}/{address}")
        page.locator("main h1").wait_for()
        page.wait_for_load_state("networkidle")
        if top:
            page.locator(top).evaluate("node => scrollTo(0, node.getBoundingClientRect().top + scrollY - 16)")
        shot = page.screenshot()
        plain = context.new_page()  # the service's own pages may fetch no data: URL
        pixels = base64.b64decode(plain.evaluate(PIXELS, "data:image/png;base64," + base64.b64encode(shot).decode()))
        picture = min(png(pixels), shot, key=len)
        if len(picture) > SIZE_BYTES:
            raise SystemExit(f"{name} takes {len(picture):,} bytes, wanted: {SIZE_BYTES:,}")
        (out / f"{name}.png").write_bytes(picture)
        print(f"{out / name}.png: {len(picture):,} bytes")
        context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("screenshots"))
    args = parser.parse_args()
    if len(args.stores) not in (0, 2):
        parser.error("name two stores of the same documents, or none")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("there is no Chromium here; type tools/browser.sh")
    places = args.stores or made(Path(".demo/screenshots"))
    args.out.mkdir(exist_ok=True)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with serving(places) as base, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        take(browser, base, [path.stem for path in places], args.out)
        browser.close()


if __name__ == "__main__":
    main()
