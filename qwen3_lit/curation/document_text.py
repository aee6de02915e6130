"""Text out of files: code, Markdown, rst, notebooks, plain text, package metadata, docstrings, PDF, images.

Contract: ``DocumentReader.accepts(path)`` says by name alone whether a file is worth opening; ``read(path, part)``
gives its documents as clean Unicode (``\\n`` line ends, no BOM, no trailing blank lines) or raises
``UnreadableDocumentError`` for a file that is binary, wrongly encoded or not parseable, so that the caller can count it
and go on. Only a missing OCR installation is a ``UserError``: the user asked for OCR and nothing would be read.

PDF and images need the ``ocr`` extra (pypdfium2, pytesseract, Pillow) and the ``tesseract`` program. A PDF page that
has a text layer is read from it; a page without one is rendered and recognised.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path
from typing import Any

from qwen3_lit.data.sources import UnreadableDocumentError
from qwen3_lit.errors import UserError

_CODE = """
    .py .pyi .pyx .pxd .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .m .rs .go .java .kt .scala .swift .js .mjs .jsx .ts
    .tsx .rb .php .pl .lua .jl .r .sh .bash .zsh .sql .hs .ml .mli .ex .exs .erl .clj .el .lisp .f90 .f .zig .nim
    .dart .cmake .mk .toml .yaml .yml .ini .cfg .proto .css .tex
"""
CODE_SUFFIXES = frozenset(_CODE.split())
TEXT_SUFFIXES = frozenset([".md", ".markdown", ".rst", ".txt", ".text", ".adoc", ".org"])
NOTEBOOK_SUFFIXES = frozenset({".ipynb"})
OCR_SUFFIXES = frozenset([".pdf", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"])
TEXT_NAMES = frozenset(
    {"README", "CHANGES", "CHANGELOG", "NEWS", "HISTORY", "TODO", "INSTALL", "Makefile", "Dockerfile"}
)
METADATA_NAME = "METADATA"

_HTML_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_TEXT_LAYER_MIN_CHARS = 32
_OCR_DOTS_PER_INCH = 200


@dataclass(frozen=True)
class DocumentReader:
    """Reads documents out of files. Picklable, so that worker processes can carry it.

    ``ocr``: take PDF files and images too. ``language``: tesseract's language code.
    """

    ocr: bool = False
    language: str = "eng"

    def accepts(self, path: Path) -> bool:
        """True for a file whose name promises text this reader understands."""
        suffix = path.suffix.lower()
        if suffix in OCR_SUFFIXES:
            return self.ocr
        return (
            suffix in CODE_SUFFIXES
            or suffix in TEXT_SUFFIXES
            or suffix in NOTEBOOK_SUFFIXES
            or path.name in TEXT_NAMES
            or path.name == METADATA_NAME
        )

    def read(self, path: Path, part: str = "text") -> list[str]:
        """The documents of one file.

        ``part``: ``text`` = the file itself; ``docstrings`` = one document made of a Python module's docstrings;
        ``text+docstrings`` = both. Raises ``UnreadableDocumentError`` for a file without usable text.
        """
        suffix = path.suffix.lower()
        if suffix in OCR_SUFFIXES:
            return _nonempty([read_pdf(path, self.language) if suffix == ".pdf" else read_image(path, self.language)])
        text = decode_text(path)
        if suffix == ".py" and part != "text":
            documents = [text] if part == "text+docstrings" else []
            return _nonempty([*documents, docstring_document(text, module_name(path))])
        if suffix in NOTEBOOK_SUFFIXES:
            return _nonempty([notebook_text(text)])
        if suffix in {".md", ".markdown"}:
            return _nonempty([_HTML_COMMENT.sub("", _FRONT_MATTER.sub("", text))])
        if path.name == METADATA_NAME:
            return _nonempty([metadata_text(text)])
        return _nonempty([text])


def _nonempty(texts: list[str]) -> list[str]:
    return [text for text in (text.strip("\n").rstrip() for text in texts) if text]


def decode_text(path: Path) -> str:
    """A text file's contents; Python files by their declared encoding, all others as UTF-8.

    Raises ``UnreadableDocumentError`` when the bytes are no text; ``OSError`` when the file cannot be opened.
    """
    data = path.read_bytes()
    if b"\0" in data[:8192]:
        raise UnreadableDocumentError("binary")
    try:
        if path.suffix == ".py":
            with path.open("rb") as lines:
                encoding = tokenize.detect_encoding(lines.readline)[0]
            text = data.decode(encoding)
        else:
            text = data.decode("utf-8")
    except (UnicodeDecodeError, SyntaxError, LookupError):
        raise UnreadableDocumentError("encoding") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def module_name(path: Path) -> str:
    """Dotted name of a module file: walks up while the folder is a package."""
    parts = [] if path.stem == "__init__" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").exists() and folder != folder.parent:
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts) or path.stem


def docstring_document(source: str, name: str) -> str:
    """A module's docstrings as one Markdown document: a heading with the signature, then the cleaned text.

    Empty when nothing public is documented. Raises ``UnreadableDocumentError`` for source this Python cannot parse.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UnreadableDocumentError("syntax") from None
    sections: list[str] = []
    module_doc = ast.get_docstring(tree)
    if module_doc:
        sections.append(f"# {name}\n\n{module_doc}")
    sections.extend(_documented(tree, ""))
    if sections and not module_doc:
        sections.insert(0, f"# {name}")
    return "\n\n".join(sections)


def _documented(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try):
            yield from _documented(child, prefix)
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if child.name.startswith("_") and not child.name.startswith("__"):
            continue
        doc = ast.get_docstring(child)
        if isinstance(child, ast.ClassDef):
            if doc:
                yield f"## class {prefix}{child.name}\n\n{doc}"
            yield from _documented(child, f"{prefix}{child.name}.")
        elif doc:
            yield f"### {prefix}{child.name}({ast.unparse(child.args)})\n\n{inspect.cleandoc(doc)}"


def notebook_text(text: str) -> str:
    """A Jupyter notebook as Markdown: prose cells as they are, code cells fenced, outputs left out."""
    try:
        notebook: dict[str, Any] = json.loads(text)
        cells = notebook["cells"]
        language = notebook.get("metadata", {}).get("kernelspec", {}).get("language", "python")
        blocks = []
        for cell in cells:
            body = "".join(cell["source"]).strip("\n")
            if body and cell["cell_type"] == "markdown":
                blocks.append(body)
            elif body and cell["cell_type"] == "code":
                blocks.append(f"```{language}\n{body}\n```")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UnreadableDocumentError("notebook") from None
    return "\n\n".join(blocks)


def metadata_text(text: str) -> str:
    """The long description out of an installed package's METADATA; empty when the package has none."""
    message = message_from_string(text)
    body = message.get_payload()
    description = body if isinstance(body, str) and body.strip() else str(message.get("Description") or "")
    return description if description.strip() != "UNKNOWN" else ""


def read_pdf(path: Path, language: str = "eng") -> str:
    """A PDF's text, page by page: the text layer where there is one, else the rendered page through tesseract.

    Raises ``UserError`` when the extra is missing, ``UnreadableDocumentError`` for a broken file.
    """
    try:
        import pypdfium2
    except ImportError:
        raise _missing("pypdfium2", path) from None
    try:
        document = pypdfium2.PdfDocument(str(path))
    except pypdfium2.PdfiumError:
        raise UnreadableDocumentError("pdf") from None
    pages = []
    try:
        for page in document:
            text = page.get_textpage().get_text_range().replace("\r\n", "\n").strip()
            if len(text) < _TEXT_LAYER_MIN_CHARS and _has_image(page):
                text = _recognise(page.render(scale=_OCR_DOTS_PER_INCH / 72).to_pil(), path, language) or text
            pages.append(text)
    finally:
        document.close()
    return "\n\n".join(page for page in pages if page)


def _has_image(page: Any) -> bool:
    import pypdfium2.raw as pdfium

    return any(item.type == pdfium.FPDF_PAGEOBJ_IMAGE for item in page.get_objects(max_depth=3))


def read_image(path: Path, language: str = "eng") -> str:
    """The text that tesseract sees in an image.

    Raises ``UserError`` without tesseract, ``UnreadableDocumentError`` for a broken file.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise _missing("Pillow", path) from None
    try:
        with Image.open(path) as image:
            return _recognise(image.convert("RGB"), path, language)
    except (UnidentifiedImageError, OSError):
        raise UnreadableDocumentError("image") from None


def _recognise(image: Any, path: Path, language: str) -> str:
    try:
        import pytesseract
    except ImportError:
        raise _missing("pytesseract", path) from None
    try:
        return str(pytesseract.image_to_string(image, lang=language)).strip()
    except pytesseract.TesseractNotFoundError:
        raise UserError(
            f"{path}: the program tesseract is not on PATH; expected it for OCR; install it with the system's package "
            "manager (for example apt install tesseract-ocr) or leave --ocr out"
        ) from None
    except pytesseract.TesseractError as error:
        raise UserError(
            f"{path}: tesseract failed: {str(error).splitlines()[0]}; check the language {language!r}"
        ) from None


def _missing(package: str, path: Path) -> UserError:
    return UserError(
        f"{path}: reading it needs {package}; install it with pip install 'qwen3_lit[ocr]' or leave it out"
    )
