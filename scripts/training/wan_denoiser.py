"""The part of the video model that learns to remove noise: text encoder and transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scripts.training.recipe import PIPELINE_TEXT_LENGTH, TEXT_LENGTH


class PaddedText:
    """Cross-attention to a short text that equals the stock one to a text padded with zeros.

    The stock pipeline pads the text to 512 tokens with zeros and Wan's cross-attention has no
    mask, so the padding takes part in the softmax. All padding is equal: n copies of a key weigh
    as much as one key whose logit is larger by log n. The last key here stands for those left out.
    (In bfloat16 log 449 is rounded, which changes the weight of the padding by 1.3 %.)

    Args:
        processor: the stock processor, which does the work.
        missing: how many zero tokens the text lacks; 0 or more.
    """

    def __init__(self, processor: Callable[..., Tensor], missing: int) -> None:
        self.processor = processor
        self.extra = math.log1p(missing)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        keys = encoder_hidden_states.shape[1]
        logits = F.pad(hidden_states.new_full((1,), self.extra), (keys - 1, 0))
        rows = logits.expand(hidden_states.shape[0], 1, hidden_states.shape[1], keys)
        return self.processor(attn, hidden_states, encoder_hidden_states, rows, rotary_emb)


class WanDenoiser(nn.Module):
    """Predicts the flow of noisy latents from token ids, as `WanPipeline` would.

    Args:
        text_encoder: an `UMT5EncoderModel`.
        transformer: a `WanTransformer3DModel`.
    """

    def __init__(self, text_encoder: nn.Module, transformer: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer

    def forward(self, noisy: Tensor, times: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Flow `[B, C, F, H, W]` of `noisy`, at noise levels `times` `[B]` from 0 to 1.

        Args:
            noisy: latents `[B, C, F, H, W]`.
            times: share of noise.
            ids: token ids `[B, L]`.
            mask: 1 where a token is real, `[B, L]`.
        """
        text = self.text_encoder(ids, mask).last_hidden_state * mask[..., None]
        return self.transformer(
            hidden_states=noisy,
            timestep=times * 1000,
            encoder_hidden_states=text,
            return_dict=False,
        )[0]

    def shorten_text(self) -> None:
        """From now on, reads `TEXT_LENGTH` tokens as if they were the pipeline's 512."""
        for block in self.transformer.blocks:
            stock = block.attn2.processor
            block.attn2.set_processor(PaddedText(stock, PIPELINE_TEXT_LENGTH - TEXT_LENGTH))


def close_gates(transformer: Any) -> None:
    """Makes a fresh `WanTransformer3DModel` predict 0 and its blocks do nothing."""
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.condition_embedder.time_proj.weight)
    nn.init.zeros_(transformer.condition_embedder.time_proj.bias)
    for block in transformer.blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
