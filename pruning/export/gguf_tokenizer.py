"""A Hugging Face tokenizer in GGUF's terms. What llama.cpp would tokenise differently is refused, not approximated."""

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from pruning.errors import UnsupportedExport

# How a text is split before byte-level BPE, as listed by `_splitters` -> llama.cpp's name for it.
_GPT2, _DIGITS, _BYTES = "ByteLevel regex", "Digits individual", "ByteLevel"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    (_GPT2,): "gpt-2",
    (_DIGITS, _GPT2): "smollm",
    (_LLAMA3, _BYTES): "llama-bpe",
    (_QWEN2, _BYTES): "qwen2",
}
SPECIAL_TOKENS = ("bos", "eos", "unk", "pad")


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Add the vocabulary (filled up to `vocab_size` rows), merges, special tokens and chat templates.

    Raises:
        UnsupportedExport: Neither byte-level BPE with a known splitter nor SentencePiece-style BPE.
    """
    data = _description(tokenizer)
    _check_kind(data)
    if _is_sentencepiece(data):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(data, tokenizer, vocab_size))
        writer.add_add_space_prefix(_adds_space(data))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(data))
        writer.add_token_merges([_merge(pair) for pair in data["model"]["merges"]])
    tokens, types = _vocabulary(data, tokenizer, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name in SPECIAL_TOKENS:
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id])
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        templates = [{"name": name, "template": template} for name, template in templates.items()]
    if templates:
        writer.add_chat_template(templates)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse early what `add_tokenizer` would refuse."""
    data = _description(tokenizer)
    _check_kind(data)
    if not _is_sentencepiece(data):
        _pre_tokenizer(data)


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedExport(f"GGUF needs a fast tokenizer; {type(tokenizer).__name__} is none: export --format hf.")
    description: dict[str, Any] = json.loads(backend.to_str())
    return description


def _check_kind(data: dict[str, Any]) -> None:
    kind = data["model"]["type"]
    if kind != "BPE":
        raise UnsupportedExport(
            f"llama.cpp reads BPE tokenizers from this exporter, this model has {kind}: export --format hf."
        )


def _is_sentencepiece(data: dict[str, Any]) -> bool:
    return bool(data["model"].get("byte_fallback"))


def _adds_space(data: dict[str, Any]) -> bool:
    metaspaces = _parts(data, "pre_tokenizer", "Metaspace")
    return bool(_parts(data, "normalizer", "Prepend")) or any(part["prepend_scheme"] != "never" for part in metaspaces)


def _parts(data: dict[str, Any], step: str, kind: str = "") -> list[dict[str, Any]]:
    """The parts of a step of the tokenizer, whether it is one or a sequence."""
    part = data[step]
    if part is None:
        return []
    parts = part.get("normalizers") or part.get("pretokenizers") or [part]
    return [part for part in parts if kind in ("", part["type"])]


def _pre_tokenizer(data: dict[str, Any]) -> str:
    splitters = tuple(_splitter(part) for part in _parts(data, "pre_tokenizer"))
    if splitters not in PRE_TOKENIZERS:
        raise UnsupportedExport(
            f"This tokenizer splits text in a way that no llama.cpp tokenizer is known to share ({' + '.join(splitters)}): "
            "export --format hf and use llama.cpp's own converter."
        )
    return PRE_TOKENIZERS[splitters]


def _splitter(part: dict[str, Any]) -> str:
    flags = [name for name in ("individual_digits", "use_regex", "add_prefix_space") if part.get(name)]
    named = {
        ("ByteLevel", ("use_regex",)): _GPT2,
        ("ByteLevel", ()): _BYTES,
        ("Digits", ("individual_digits",)): _DIGITS,
    }
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return str(part["pattern"].get("Regex", part["pattern"]))
    return named.get((part["type"], tuple(flags)), " ".join([part["type"], *flags]))


def _merge(pair: str | list[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _vocabulary(
    data: dict[str, Any], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        tokens[index] = token
        is_byte = _is_sentencepiece(data) and len(token) == 6 and token.startswith("<0x")
        types[index] = TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in data["added_tokens"]:
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if _is_sentencepiece(data) and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return tokens, types


def _scores(data: dict[str, Any], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[float]:
    """llama.cpp merges the pair whose result has the highest score; the earlier a merge is listed, the sooner it is done."""
    scores = [0.0] * vocab_size
    vocabulary = tokenizer.get_vocab()
    for rank, pair in reversed(list(enumerate(data["model"]["merges"]))):
        scores[vocabulary["".join(pair.split(" ") if isinstance(pair, str) else pair)]] = -float(rank)
    return scores
