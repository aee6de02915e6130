"""The files beside the weights in a Hugging Face folder: tokenizer, chat template, generation defaults, model card."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_lit.errors import UserError

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION_FILE = "generation_config.json"
CARD_FILE = "README.md"

QWEN3_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
"""The defaults that the published thinking models ship (Qwen3 model cards)."""


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files that are in ``folder``, none when it holds no tokenizer."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def copy_tokenizer(source: str | Path, target: Path) -> None:
    """Copy tokenizer and chat template from a folder, or fetch them when ``source`` is a name on the hub.

    Raises:
        UserError: there is no tokenizer.
    """
    folder = Path(source)
    files = tokenizer_files(folder)
    if folder.is_dir():
        if not any(file.name in ("tokenizer.json", "vocab.json") for file in files):
            raise UserError(f"{folder}: holds no tokenizer.json or vocab.json; name a tokenizer folder")
        for file in files:
            shutil.copyfile(file, target / file.name)
        return
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(str(source)).save_pretrained(str(target))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: neither a folder nor a tokenizer on the hub ({error})") from error


def tokenizer_ids(folder: Path) -> dict[str, int]:
    """Token -> id of the tokenizer in ``folder``, added tokens included; empty when it has no readable file."""
    ids: dict[str, int] = {}
    try:
        if (folder / "tokenizer.json").is_file():
            spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            vocab = spec["model"]["vocab"]
            ids |= vocab if isinstance(vocab, dict) else {}
            ids |= {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}
        elif (folder / "vocab.json").is_file():
            ids |= json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            settings = read_json(folder / "tokenizer_config.json")
            added = settings.get("added_tokens_decoder", {})
            ids |= {token["content"]: int(number) for number, token in added.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: the tokenizer file is damaged ({error!r}); copy it again") from error
    return ids


def require_fit(ids: Mapping[str, int], vocab_size: int, where: str | Path) -> None:
    """Raises UserError when the tokenizer makes ids that the embedding has no row for."""
    if not ids:
        return
    token, largest = max(ids.items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise UserError(
            f"{where}: the tokenizer does not fit the model: token {token!r} has id {largest}, but the embedding has "
            f"{vocab_size} rows (vocab_size); use the tokenizer that the model was trained with"
        )


def special_token_ids(folder: Path, ids: Mapping[str, int]) -> dict[str, Any]:
    """bos, eos and pad ids for config.json, from what the tokenizer calls its end of sequence and its padding."""
    settings = read_json(folder / "tokenizer_config.json")

    def id_of(role: str) -> int | None:
        token = settings.get(f"{role}_token")
        return ids.get(token["content"] if isinstance(token, dict) else token) if token else None

    end_of_text = ids.get("<|endoftext|>")
    found = {"bos_token_id": end_of_text, "eos_token_id": id_of("eos"), "pad_token_id": id_of("pad")}
    if found["eos_token_id"] is None:
        found["eos_token_id"] = end_of_text
    return {name: number for name, number in found.items() if number is not None}


def generation_defaults(ids: Mapping[str, int], special: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json as the published Qwen3 models have it: sampling, and both tokens that end a turn."""
    stops = [ids[token] for token in ("<|im_end|>", "<|endoftext|>") if token in ids]
    settings: dict[str, Any] = {**special, **QWEN3_SAMPLING}
    if stops:
        settings["eos_token_id"] = stops
        settings.setdefault("pad_token_id", stops[-1])
    return settings


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write sorted, indented JSON, as transformers does."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``, empty when there is no such file. Raises UserError when it is damaged."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON: {error}; copy the file again") from error
    return content if isinstance(content, dict) else {}
