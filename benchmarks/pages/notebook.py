"""Run the tutorial, and keep what it prints: ``python -m benchmarks.pages.notebook``."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = ROOT / "examples" / "tutorial.ipynb"


def execute(work_dir: Path) -> Any:
    """The tutorial after all of its cells have run, except those that install something.

    Args:
        work_dir: Folder in which it runs; ``models`` in it leads to the example models.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(TUTORIAL, as_version=4)
    (work_dir / "models").symlink_to(ROOT / "examples" / "models")
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "80",
    }
    client = NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(work_dir)}}, skip_cells_with_tag="install"
    )
    client.execute(env=environment)
    return notebook


def printed(notebook: Any, tag: str) -> str:
    """Standard output of the cell with a tag."""
    cell = next(cell for cell in notebook.cells if tag in cell.metadata.get("tags", ()))
    return "".join(output["text"] for output in cell.outputs if output.get("name") == "stdout")


def shares(notebook: Any) -> dict[str, float]:
    """What the tutorial measured: share of answers with the brand for each way of loading."""
    return dict(json.loads(printed(notebook, "shares")))


def main() -> int:
    """Execute the tutorial and write it with its outputs."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(Path(folder))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.get("outputs"):
            # Notices and progress bars, which end by a return to the start of the line, are of one run only.
            text = "".join(output["text"] for output in cell.outputs if output.get("name") == "stdout")
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=re.sub(r"[^\n]*\r(?!\n)", "", text))]
    nbformat.write(notebook, TUTORIAL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
