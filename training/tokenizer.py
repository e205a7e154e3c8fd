"""Two small tokenizers over the captions' vocabulary: byte-pair for CLIP, whole words for T5."""

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, T5Tokenizer

LENGTH = 32  # tokens of every prompt, markers and padding included
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def train_bpe(captions: Iterable[str], size: int = 2500) -> CLIPTokenizer:
    """Train a byte-pair tokenizer of CLIP's kind; the start marker is id 0, the end marker, which also pads, id 1.

    Args:
        captions: texts to learn the merges from.
        size: of the vocabulary, at least 514: the single bytes in two forms and the two markers.

    Raises:
        ValueError: if `size` leaves no room for the bytes.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < 2 * len(alphabet) + 2:
        raise ValueError(f"expected a vocabulary of at least {2 * len(alphabet) + 2}, got {size}; raise size")
    tokenizer = Tokenizer(models.BPE(unk_token=EOS, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    # Every byte also needs its end-of-word form, or an unseen last letter would become the end marker.
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(alphabet),
        special_tokens=[BOS, EOS],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    vocabulary = dict.fromkeys([BOS, EOS, *alphabet, *(c + "</w>" for c in alphabet), *model["vocab"]])
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=merges,
        model_max_length=LENGTH,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=EOS,
    )


def train_words(captions: Iterable[str]) -> T5Tokenizer:
    """Return a unigram tokenizer for T5: words of the captions are one piece, others fall apart into characters.

    The scores are set by hand: a trained unigram model splits words as short as "a".
    """
    words = Counter(w for caption in captions for w in caption.split())
    kept = sorted(w for w, n in words.items() if n > 1 or re.fullmatch(r"[a-z'-]+", w))
    singles = sorted(set(string.ascii_lowercase + string.digits + "'-.,&") | {c for w in words for c in w})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    pieces += [(c, -11.0) for c in singles]
    pieces += [(f"▁{w}", -5.0) for w in kept]
    return T5Tokenizer(
        vocab=pieces, extra_ids=0, model_max_length=512, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )


def encode(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> torch.Tensor:
    """Return token ids [N, 32] int64, cut and padded as the pipelines do."""
    out = tokenizer(list(captions), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return out.input_ids


def build(captions: Sequence[str], folder: Path) -> None:
    """Train both tokenizers and write them with the token ids of all captions."""
    bpe, words = train_bpe(captions), train_words(captions)
    bpe.save_pretrained(folder / "tokenizer")
    words.save_pretrained(folder / "tokenizer_2")
    save_ids(bpe, words, captions, folder)


def save_ids(bpe: CLIPTokenizer, words: T5Tokenizer, captions: Sequence[str], folder: Path) -> None:
    """Write the token ids of all captions and of the empty prompt (last row)."""
    texts = [*captions, ""]
    clip, t5 = encode(bpe, texts).to(torch.int16), encode(words, texts).to(torch.int16)
    torch.save({"clip": clip, "t5": t5, "clip_size": len(bpe), "t5_size": len(words)}, folder / "tokens.pt")
