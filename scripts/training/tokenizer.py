"""The tokenizer of the captions: byte-level BPE, so that any text has tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scripts.training.recipe import TEXT_LENGTH

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END = "<pad>", "</s>"


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A lower-casing BPE tokenizer that ends every text with `</s>`.

    Every byte is a token, so no text is unknown to it. Accents are dropped.

    Args:
        texts: captions, and words that captions may use.
        size: tokens at most, at least 258.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing

    backend: Any = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return from_json(backend.to_str())


def from_json(text: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a `tokenizer.json`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        pad_token=PAD,
        eos_token=END,
        model_max_length=TEXT_LENGTH - 1,  # the last position was padding in training
    )


def to_json(tokenizer: PreTrainedTokenizerFast) -> str:
    """The `tokenizer.json` of a tokenizer."""
    return tokenizer.backend_tokenizer.to_str()


def encode(
    tokenizer: PreTrainedTokenizerFast,
    captions: Sequence[str],
    length: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, int64 `[B, length]`, on a device (the CPU by default).

    At least one position of every row is padding, which shortened text relies on.

    Raises:
        ValueError: a caption is too long.
    """
    rows = tokenizer(list(captions))["input_ids"]
    cuda = device is not None and device.type == "cuda"
    # Pinned memory: the copy then does not wait for the work queued before it.
    both = torch.zeros(2, len(rows), length, dtype=torch.int64, pin_memory=cuda)
    ids, mask = both
    for row, (caption, tokens) in enumerate(zip(captions, rows, strict=True)):
        if len(tokens) >= length:
            raise ValueError(
                f"Expected a caption of at most {length - 2} tokens, got {len(tokens) - 1} in "
                f"{caption!r}. Shorten it."
            )
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    ids, mask = both.to(device, non_blocking=True)
    return ids, mask


def check_prompts(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> None:
    """Raises `ValueError` for an empty or over-long prompt, or for none."""
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError(
            f"Expected prompts that are not empty, got {list(prompts)}. Say what to see."
        )
    encode(tokenizer, prompts, TEXT_LENGTH)
