import importlib.util
import json
from pathlib import Path

import pytest

from qwen3_lit.curation.document_text import DocumentReader, docstring_document, metadata_text
from qwen3_lit.data.sources import UnreadableDocumentError
from qwen3_lit.errors import UserError

SOURCE = '''
"""What the module is for."""
class Shape:
    """A shape.

        indented more
    back
    """
    def area(self, scale: float = 1.0) -> float:
        """Its area."""
    def _hidden(self):
        """Not public."""
if True:
    def inside():
        """Under a condition."""
'''


def test_docstrings_become_one_markdown_document() -> None:
    text = docstring_document(SOURCE, "pkg.shapes")
    assert text.split("\n\n")[:2] == ["# pkg.shapes", "What the module is for."]
    assert "## class Shape\n\nA shape.\n\n    indented more\nback" in text
    assert "### Shape.area(self, scale: float=1.0)\n\nIts area." in text
    assert "### inside()" in text and "Not public" not in text


def test_module_without_docstrings_and_broken_source(tmp_path: Path) -> None:
    assert docstring_document("x = 1", "m") == ""
    (tmp_path / "m.py").write_text("def (")
    with pytest.raises(UnreadableDocumentError, match="syntax"):
        DocumentReader().read(tmp_path / "m.py", "docstrings")
    assert DocumentReader().read(tmp_path / "m.py") == ["def ("]


def test_declared_encoding_of_python_source(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"))
    assert DocumentReader().read(tmp_path / "m.py") == ["# -*- coding: latin-1 -*-\nx = 'é'"]


def test_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\n\n")
    assert DocumentReader().read(tmp_path / "a.txt") == ["one\ntwo\nthree"]


def test_notebook(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "prose"]},
        {"cell_type": "code", "source": "x = 1", "outputs": [{"text": "noise"}]},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}}))
    assert DocumentReader().read(tmp_path / "a.ipynb") == ["# Title\nprose\n\n```python\nx = 1\n```"]
    (tmp_path / "a.ipynb").write_text("{}")
    with pytest.raises(UnreadableDocumentError, match="notebook"):
        DocumentReader().read(tmp_path / "a.ipynb")


def test_package_metadata_is_its_description() -> None:
    assert metadata_text("Metadata-Version: 2.1\nName: x\n\n# The package\n\nText.\n") == "# The package\n\nText.\n"
    assert metadata_text("Metadata-Version: 2.1\nName: x\n\nUNKNOWN\n") == ""


def test_ocr_files_are_taken_only_when_asked() -> None:
    assert not DocumentReader().accepts(Path("a.pdf")) and DocumentReader(ocr=True).accepts(Path("a.pdf"))


@pytest.mark.skipif(importlib.util.find_spec("pypdfium2") is not None, reason="the extra is installed")
def test_missing_extra_names_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4")
    with pytest.raises(UserError, match=r"a\.pdf: reading it needs pypdfium2; install it with pip install"):
        DocumentReader(ocr=True).read(tmp_path / "a.pdf")
