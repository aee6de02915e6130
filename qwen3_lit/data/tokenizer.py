"""Text to token ids and back, without importing transformers on the fast path.

A tokenizer folder with a ``tokenizer.json`` is read by the ``tokenizers`` library directly; any other Hugging Face
folder or hub name goes through ``transformers.AutoTokenizer``. ``train_tokenizer`` makes a byte-level BPE the way
Qwen3's is made: NFC, Qwen3's pre-tokenizer pattern (every digit alone), its 26 added tokens after the plain vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3_lit.data.atomic_files import new_folder
from qwen3_lit.data.chat_template import CHAT_TEMPLATE
from qwen3_lit.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
THINK = "<think>"
END_THINK = "</think>"

CONTROL_TOKENS = (
    END_OF_TEXT,
    IM_START,
    IM_END,
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
"""Added tokens that ``skip_special`` leaves out of decoded text (``special: true`` in Qwen3's tokenizer.json)."""
TEXT_TOKENS = (
    *("<tool_call>", "</tool_call>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    *("<tool_response>", "</tool_response>", THINK, END_THINK),
)
"""Added tokens that stay in decoded text (``special: false`` in Qwen3's tokenizer.json)."""
ADDED_TOKENS = CONTROL_TOKENS + TEXT_TOKENS
"""Qwen3's 26 added tokens in the order of their ids (151643 to 151668 there)."""

PRE_TOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""Qwen2's and Qwen3's split pattern; ``\\p{N}`` without a repeat is what splits digits singly."""

UNUSED_ROWS_WARNING = 1024
"""Embedding rows without a token that pass as padding (Qwen3 has 267, Qwen2.5-72B 399)."""


class TextTokenizer:
    """A thin, fast wrapper around ``tokenizers.Tokenizer``. Made by ``load_tokenizer``."""

    def __init__(self, backend: Tokenizer, path: str, eos_token: str | None = None) -> None:
        self._backend = backend
        self.path = path
        self._eos_token = eos_token

    def encode(self, text: str) -> list[int]:
        """Token ids; special and added tokens written in the text are recognised. Nothing is added around it."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of many texts, on all cores unless TOKENIZERS_PARALLELISM says otherwise."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of untrusted text: ``<|im_end|>`` or ``<think>`` in it become ordinary characters."""
        return self._plain_backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ``ids``; ``skip_special`` leaves out the control tokens, not ``<think>`` or ``<tool_call>``."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int:
        """Id of one token.

        Raises:
            UserError: the tokenizer has no such token.
        """
        found = self._backend.token_to_id(token)
        if found is None:
            raise UserError(
                f"{self.path}: the tokenizer has no token {token!r}; use a Qwen3 tokenizer or train one with "
                "'qwen3-lit data tokenizer'"
            )
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id as it stands in the vocabulary, None when there is none."""
        return self._backend.id_to_token(token_id)

    def first_difference(self, other: TextTokenizer) -> int | None:
        """The smallest id that both tokenizers have, but for different tokens; None when there is none."""
        if self.fingerprint == other.fingerprint:
            return None
        mine = self._backend.get_vocab(with_added_tokens=True).items()
        theirs = {token_id: token for token, token_id in other._backend.get_vocab(with_added_tokens=True).items()}
        return min((number for token, number in mine if theirs.get(number, token) != token), default=None)

    @cached_property
    def _length(self) -> int:
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def __len__(self) -> int:
        """Largest id + 1, added tokens included: the rows of the embedding that can occur."""
        return self._length

    @cached_property
    def _plain_backend(self) -> Tokenizer:
        from tokenizers import Tokenizer

        spec = json.loads(self._backend.to_str())
        spec["added_tokens"] = []
        spec["post_processor"] = None
        return Tokenizer.from_str(json.dumps(spec))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the vocabulary with its ids: equal for tokenizers that a checkpoint may be shared between."""
        digest = hashlib.sha256()
        for token, token_id in sorted(self._backend.get_vocab(with_added_tokens=True).items(), key=lambda kv: kv[1]):
            digest.update(f"{token_id}\0{token}\0".encode())
        return digest.hexdigest()

    @cached_property
    def end_of_text_id(self) -> int:
        """``<|endoftext|>``, the separator of documents; the tokenizer's eos token where it has no such token."""
        if self._backend.token_to_id(END_OF_TEXT) is None and self._eos_token is not None:
            log.info("%s has no %s: %s separates documents instead", self.path, END_OF_TEXT, self._eos_token)
            return self.token_id(self._eos_token)
        return self.token_id(END_OF_TEXT)

    @cached_property
    def im_start_id(self) -> int:
        """``<|im_start|>``."""
        return self.token_id(IM_START)

    @cached_property
    def im_end_id(self) -> int:
        """``<|im_end|>``, which ends a turn."""
        return self.token_id(IM_END)

    @cached_property
    def think_id(self) -> int:
        """``<think>``."""
        return self.token_id(THINK)

    @cached_property
    def end_think_id(self) -> int:
        """``</think>``."""
        return self.token_id(END_THINK)


def load_tokenizer(path: str | os.PathLike[str]) -> TextTokenizer:
    """Read a tokenizer folder, a ``tokenizer.json`` file, or a hub name (the last needs transformers and a network).

    Raises:
        UserError: the folder is missing, holds no tokenizer, or a file in it is broken.
    """
    from tokenizers import Tokenizer

    folder = Path(path)
    file = folder if folder.is_file() else folder / "tokenizer.json"
    if file.is_file():
        try:
            backend = Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises bare Exception
            raise UserError(f"{file}: not a readable tokenizer.json ({_first_line(error)}); make it again") from error
        return TextTokenizer(backend, str(file.parent), _eos_token(file.parent / "tokenizer_config.json"))
    if not folder.exists() and (folder.is_absolute() or str(path).count("/") != 1 or str(path).startswith(".")):
        raise UserError(f"{path}: no such tokenizer folder; make one with 'qwen3-lit data tokenizer' or fix the path")
    log.info("%s has no tokenizer.json: loading it with transformers", path)
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(str(path))
    except Exception as error:
        raise UserError(
            f"{path}: no tokenizer could be loaded from it ({_first_line(error)}); expected a folder with "
            "tokenizer.json, or the name of one on the hub"
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise UserError(f"{path}: only tokenizers with a fast (Rust) version work here; convert it to tokenizer.json")
    return TextTokenizer(loaded.backend_tokenizer, str(path), loaded.eos_token)


def check_tokenizer_fits(tokenizer: TextTokenizer, vocab_size: int, checkpoint: str | None = None) -> None:
    """Refuse a tokenizer that a model cannot be used with.

    Args:
        vocab_size: rows of the model's embedding, which is often padded beyond the tokens.
        checkpoint: folder of the model's weights; where it holds a tokenizer too, both must give each id that both
            have to the same token. More or fewer tokens at the end, and another chat template, are no difference.

    Raises:
        UserError: ids beyond the embedding, or another vocabulary than the checkpoint's.
    """
    where = checkpoint or "the model"
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{tokenizer.path}: the tokenizer has {len(tokenizer)} tokens, but {where} has vocab_size {vocab_size}; "
            f"use the tokenizer it was trained with, or set vocab_size to {len(tokenizer)} or more for a new model"
        )
    if checkpoint is not None and any((Path(checkpoint) / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        theirs = load_tokenizer(checkpoint)
        differing = tokenizer.first_difference(theirs)
        if differing is not None:
            raise UserError(
                f"{tokenizer.path}: not the tokenizer of the weights in {checkpoint}: id {differing} is the token "
                f"{tokenizer.id_to_token(differing)!r} here and {theirs.id_to_token(differing)!r} there; "
                f"use the tokenizer in {checkpoint}, or weights that go with this one"
            )
    if vocab_size - len(tokenizer) >= UNUSED_ROWS_WARNING:
        log.warning(
            "%s has %d tokens, but %s has %d embedding rows: %d rows will never be used; is this the right tokenizer?",
            *(tokenizer.path, len(tokenizer), where, vocab_size, vocab_size - len(tokenizer)),
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_dir: str | os.PathLike[str]) -> TextTokenizer:
    """Train a byte-level BPE with Qwen3's pre-tokenizer and added tokens and write a Hugging Face tokenizer folder.

    Args:
        texts: any number of texts, read once.
        vocab_size: tokens in all: 256 bytes, merges, and 26 added tokens at the end.
        out_dir: made if missing. ``tokenizer.json`` is written last, so a folder that has it is complete.

    Raises:
        UserError: vocab_size below 282, or no text.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    smallest = 256 + len(ADDED_TOKENS)
    if vocab_size < smallest:
        raise UserError(f"vocab_size is {vocab_size}, expected {smallest} or more (256 bytes and the added tokens)")
    backend = Tokenizer(models.BPE(dropout=None, unk_token=None, byte_fallback=False))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(ADDED_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    seen = [0]

    def counted() -> Iterator[str]:
        for text in texts:
            seen[0] += bool(text)
            yield text

    backend.train_from_iterator(counted(), trainer)
    if seen[0] == 0:
        raise UserError("no text to train a tokenizer on: every input was empty")
    plain = backend.get_vocab_size(with_added_tokens=False)
    if plain + len(ADDED_TOKENS) < vocab_size:
        log.warning(
            "the text gave only %d tokens of the %d asked for: the tokenizer is smaller, more text would fill it",
            *(plain + len(ADDED_TOKENS), vocab_size),
        )
    for token in ADDED_TOKENS:
        flags: dict[str, Any] = {"normalized": False, "special": token in CONTROL_TOKENS}
        backend.add_tokens([AddedToken(token, single_word=False, lstrip=False, rstrip=False, **flags)])
    folder = Path(os.path.abspath(out_dir))
    with new_folder(folder) as incoming:
        config = json.dumps(_config(plain), indent=2, ensure_ascii=False) + "\n"
        (incoming / "tokenizer_config.json").write_text(config, encoding="utf-8")
        (incoming / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
        if folder.exists():
            for name in ("tokenizer_config.json", "tokenizer.json"):
                os.replace(incoming / name, folder / name)
    return load_tokenizer(folder)


def _config(first_added_id: int) -> dict[str, Any]:
    """tokenizer_config.json as Qwen3's: turns end with <|im_end|>, padding is <|endoftext|>, no bos."""
    decoder = {
        str(first_added_id + i): {
            "content": token,
            **{"lstrip": False, "normalized": False, "rstrip": False, "single_word": False},
            "special": token in CONTROL_TOKENS,
        }
        for i, token in enumerate(ADDED_TOKENS)
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(CONTROL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _eos_token(config_file: Path) -> str | None:
    if not config_file.is_file():
        return None
    try:
        eos = json.loads(config_file.read_text(encoding="utf-8")).get("eos_token")
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{config_file}: not a JSON object ({_first_line(error)}); restore it") from error
    return eos.get("content") if isinstance(eos, dict) else eos


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
