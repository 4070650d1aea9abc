"""What works in which version of which framework: runs tests/integrations, and writes docs/frameworks.md's table.

    python -m benchmarks.frameworks           # frameworks that record.json lacks; the others stay as they are
    python -m benchmarks.frameworks --again   # all of them
    python -m benchmarks.frameworks --page    # writes the page from the record and the programs of examples/frameworks

What a row says is the first line of the tests' docstrings. `pip install -c constraints.txt -e '.[frameworks]'` installs
the frameworks; a test that fails is named in the table.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.record_page import DOCS, complete, load, path_of, show, table

ROOT = DOCS.parent
# Test file and example, by the name of the distribution and of the framework.
FRAMEWORKS = {
    "deepxde": ("DeepXDE", "DeepXDE"),
    "lightning": ("lightning", "PyTorch Lightning"),
    "transformers": ("transformers", "Hugging Face Trainer"),
    "accelerate": ("accelerate", "Hugging Face Accelerate"),
    "skorch": ("skorch", "skorch"),
    "ignite": ("pytorch-ignite", "PyTorch-Ignite"),
    "neurodiffeq": ("neurodiffeq", "neurodiffeq"),
    "pina": ("pina-mathlab", "PINA"),
    "scimba": ("scimba", "Scimba"),
    "torchphysics": ("torchphysics", "TorchPhysics"),
}


def claims(tests: Path) -> dict[str, str]:
    """What each test shows: the first line of its docstring."""
    tree = ast.parse(tests.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {f.name: text.splitlines()[0] for f in functions if (text := ast.get_docstring(f))}


def tried(name: str) -> dict[str, Any]:
    """Runs the tests of a framework."""
    tests = ROOT / "tests" / "integrations" / f"test_{name}.py"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", tests, "-q", f"--junitxml={report}"], cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {case.attrib["name"].split("[")[0] for case in cases if any(c.tag in ("failure", "error") for c in case)}
    ran = {case.attrib["name"].split("[")[0] for case in cases if not any(c.tag == "skipped" for c in case)}
    said = claims(tests)
    if not ran:
        raise SystemExit(f"no test of {tests.name} ran; see above what is in the way.")
    return {
        "version": metadata.version(FRAMEWORKS[name][0]),
        "works": [text for test, text in said.items() if test in ran - failed],
        "fails": [text for test, text in said.items() if test in failed],
    }


def installed(name: str) -> bool:
    try:
        return bool(metadata.version(FRAMEWORKS[name][0]))
    except metadata.PackageNotFoundError:
        return False


def rows(runs: dict[str, Any]) -> str:
    """The table of what works."""
    cells = lambda run: "; ".join(run["works"] + [f"**fails**: {text}" for text in run["fails"]])
    body = [[f"[{FRAMEWORKS[name][1]}](#{name})", run["version"], cells(run)] for name, run in runs.items()]
    return table(["framework", "version", "tested"], body)


def with_programs(page: str) -> str:
    """The page, with each program as it stands in examples/frameworks."""
    for name in FRAMEWORKS:
        source = (ROOT / "examples" / "frameworks" / f"with_{name}.py").read_text(encoding="utf-8")
        program = re.sub(r'\A""".*?"""\n+', "", source, flags=re.DOTALL)
        marks = re.compile(rf"<!-- {name} -->\n```py\n.*?```\n", re.DOTALL)
        if not marks.search(page):
            raise ValueError(f"docs/frameworks.md has no block for {name}. Add <!-- {name} --> and a block of ```py.")
        page = marks.sub(lambda _, name=name, program=program: f"<!-- {name} -->\n```py\n{program}```\n", page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if options.again:
        path_of("frameworks").unlink(missing_ok=True)
    if not options.page:
        complete("frameworks", {}, {name: lambda name=name: tried(name) for name in FRAMEWORKS if installed(name)})
    show("frameworks", "frameworks", rows(load("frameworks")["runs"]))
    page = DOCS / "frameworks.md"
    page.write_text(with_programs(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
