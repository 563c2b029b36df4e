"""The part of the video model that learns to remove noise: text encoder and transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.training.recipe import PIPELINE_TEXT_LENGTH, TEXT_LENGTH

#: Logit of padding in a fresh model, and the share of a query's norm that makes it.
_PADDING_LOGIT, _SHARE = -12.0, 0.75

#: Value of the number in a key that tells padding: small beside a token's, large beside RMSNorm's
#: epsilon.
_TRACE = 0.05

#: Mean square of GELU of a normal number.
_GELU_POWER = 0.425


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


@torch.no_grad()
def avert_from_padding(transformer: Any) -> None:
    """Has the cross-attention of a fresh `WanTransformer3DModel` read text and not its padding.

    The stock pipeline pads a caption of a dozen tokens to 512 and masks nothing. A model with stock
    initialisation spends 96 % of its cross-attention on padding at first, and after 11,500 steps of
    training 90 to 99 % still: text hardly reached the picture.

    Padding is the zero vector, so without biases in the text embedder its key is the bias of `to_k`
    alone, which RMSNorm blows up to full length. That bias is one number in each head, where tokens
    start with almost 0, and queries start with a large negative number. The biases are frozen, so
    that the key of padding does not turn in training.

    The logit is so low because training first flees to padding, whose value is the same for all
    captions, and hardly any gradient comes from keys that weigh next to nothing. In a small trial
    (four layers, batches of eight) a logit of -6.5 put 83 % of the attention on text at first and 3
    to 7 % after 200 steps; -12 put 99.9 % there, and 54 to 79 % after 600, when stock
    initialisation had 1 % left and the loss did not tell right captions from wrong ones.

    The text embedder is made to keep the size of what it reads. Stock weights shrink it to a fifth,
    values included.
    """
    embedder = transformer.condition_embedder.text_embedder
    for layer, power in ((embedder.linear_1, 1.0), (embedder.linear_2, _GELU_POWER)):
        nn.init.normal_(layer.weight, std=(layer.in_features * power) ** -0.5)
        nn.init.zeros_(layer.bias).requires_grad_(False)
    for block in transformer.blocks:
        attn = block.attn2
        size = attn.to_k.out_features // attn.heads
        marked = slice(None, None, size)  # the first number of each head
        nn.init.zeros_(attn.to_k.weight[marked])
        nn.init.zeros_(attn.to_k.bias).requires_grad_(False)[marked] = _TRACE
        # After RMSNorm the key of padding is sqrt(size) there, times this weight, and 0 elsewhere.
        attn.norm_k.weight[marked] = -_PADDING_LOGIT / (_SHARE * math.sqrt(size))
        nn.init.zeros_(attn.to_q.bias)[marked] = -_SHARE * math.sqrt(
            size * _query_power(attn.to_q) / (1 - _SHARE**2)
        )


def _query_power(layer: nn.Linear) -> float:
    """Mean square of what a layer makes of normalised input, without its bias."""
    return float(layer.weight.square().sum(1).mean())
