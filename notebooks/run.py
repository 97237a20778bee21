"""Run notebooks from top to bottom and store what they print and draw.

    python notebooks/run.py                       # all of them, at full size
    python notebooks/run.py notebooks/09_*.ipynb  # these

Outputs are kept as plain text, HTML tables and small pictures; execution times and counts are not, so that a run that
changes nothing changes no file.
"""

import base64
import os
import sys
import time
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
KINDS = ("text/plain", "text/html", "image/png")
START = """
import matplotlib, mixjax
matplotlib.rcParams.update({"figure.dpi": 72, "savefig.dpi": 72, "figure.constrained_layout.use": True})
mixjax.enable_compilation_cache()
"""


def tidy(output):
    """The output without what differs between runs, or None if nothing is to be kept."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    if output.output_type in ("display_data", "execute_result"):
        output.data = {kind: value for kind, value in output.data.items() if kind in KINDS}
        output.metadata = {}
        if "image/png" in output.data:
            output.data.pop("text/plain", None)
            output.data["image/png"] = smaller(output.data["image/png"])
        if output.output_type == "execute_result":
            output.execution_count = None
    return output


def smaller(png):
    """The picture in 64 colours, which are enough for these: a third of the size. Base64 in and out."""
    picture, packed = Image.open(BytesIO(base64.b64decode(png))), BytesIO()
    picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(packed, "png", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def run(path):
    notebook = nbformat.read(path, as_version=4)
    # Settings of pictures and the compilation cache: a cell in front, taken away again.
    notebook.cells.insert(0, nbformat.v4.new_code_cell(START))
    begin = time.perf_counter()
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(path.parent)}}).execute()
    del notebook.cells[0]
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [kept for output in cell.outputs if (kept := tidy(output)) is not None]
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)
    print(f"{path.name}: {time.perf_counter() - begin:.1f} s, {path.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    for each in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(HERE.glob("*.ipynb")):
        run(each.resolve())
