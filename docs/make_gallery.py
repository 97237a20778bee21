"""Runs the code of docs/gallery.md and saves the pictures that it shows: ``python docs/make_gallery.py``."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

HERE = Path(__file__).parent
LARGEST = 60_000  # bytes
PART = re.compile(r"```python\n(?P<code>.*?)```|!\[[^\]]*\]\((?P<picture>gallery/[^)]+)\)", re.DOTALL)


def main() -> None:
    names: dict[str, object] = {}
    for part in PART.finditer((HERE / "gallery.md").read_text()):
        if part["code"]:
            exec(part["code"], names)  # the page's own code
            continue
        path = HERE / part["picture"]
        path.parent.mkdir(exist_ok=True)
        figure = np.ravel(np.asarray(names["ax"], dtype=object))[0].get_figure()
        figure.savefig(path, dpi=90)
        plt.close("all")
        # 64 colours are enough for these, and a third of the size.
        Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
        size = path.stat().st_size
        print(f"{path.name} {size / 1000:.0f} kB")
        if size > LARGEST:
            raise SystemExit(f"{path.name} has {size} bytes, more than {LARGEST}")


if __name__ == "__main__":
    main()
