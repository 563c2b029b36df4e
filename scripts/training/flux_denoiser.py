"""The part of the image model that learns to remove noise: two text encoders and transformer.

`FluxPipeline` pads the text to 512 tokens and masks nothing: neither T5 nor the transformer knows
what is padding. Training on 512 text tokens would cost a third of all work at 1,024 image tokens,
and training on fewer would be another model. Two facts make 64 tokens equal 512 exactly:

* T5's attention here is blind beyond `SIGHT` tokens (`blind_far_tokens`), so padding that is far
  from the caption sees padding alone. It then is the same vector at every place.
* All text has the same position in Flux, so equal tokens stay equal through all blocks. One of them
  is computed, and as a key and value it is repeated for those left out (`RepeatedPadding`).

In a fresh model the caption's own tokens get 0.8 % of the attention and padding 28 %. Nothing is
done about that: the pooled text reaches every block by modulation, and in a small trial the loss
told right captions from wrong ones after 300 steps.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.training.recipe import PIPELINE_TEXT_LENGTH, TEXT_LENGTH

#: Buckets of T5's relative positions, and the distance that belongs to the last of each side.
BUCKETS, FAR = 32, 13

#: How far a token of T5 sees, per layer. Two layers leave `TEXT_LENGTH - 1 - 2 * 12` = 39 tokens
#: for a caption whose padding ends in the common vector; the longest of four thousand has 38.
SIGHT = FAR - 1

_UNSEEN = -1e4


def blind_far_tokens(text_encoder: Any) -> None:
    """Ends the sight of a fresh `T5EncoderModel` at `SIGHT` tokens.

    The bias of the outermost buckets becomes so low that its gradient is exactly 0, and training
    leaves it low: weight decay halves it in 70,000 steps at most.
    """
    bias = text_encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    with torch.no_grad():
        bias[BUCKETS // 2 - 1] = _UNSEEN
        bias[BUCKETS - 1] = _UNSEEN


class RepeatedPadding:
    """Attention to a shortened text as if its last token were there `missing` more times.

    The attention core of a rebound stock processor, see `dit_sparse.pipelines.processor`. Copies
    in keys and values keep the mask-free kernels, which are faster than a bias of log n.

    Args:
        last: place of the token to repeat.
        missing: how many are left out.
    """

    def __init__(self, last: int, missing: int) -> None:
        self.last = last
        self.missing = missing

    def serving(self, module: object) -> RepeatedPadding:
        """This core: it serves any module."""
        return self

    def dispatch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        """Stands for `dispatch_attention_fn`: q, k, v `[B, N, H, D]`, text first, no mask.

        Raises:
            ValueError: a mask, another backend or a parallel configuration is asked for.
        """
        if not (attn_mask is None and backend is None and parallel_config is None):
            raise ValueError(
                "Expected attention without mask, backend and parallel configuration, got one of "
                "them. Train the transformer with its default settings."
            )
        q, k, v = (x.transpose(1, 2) for x in (query, self._repeat(key), self._repeat(value)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def _repeat(self, tokens: Tensor) -> Tensor:
        padding = tokens[:, self.last : self.last + 1].expand(-1, self.missing, -1, -1)
        return torch.cat([tokens, padding], dim=1)


class FluxDenoiser(nn.Module):
    """Predicts the flow of noisy latents from token ids, as `FluxPipeline` would.

    Args:
        text_encoder: a `CLIPTextModel`, for the pooled text.
        text_encoder_2: a `T5EncoderModel`.
        transformer: a `FluxTransformer2DModel` with a guidance input.
    """

    def __init__(self, text_encoder: Any, text_encoder_2: Any, transformer: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.transformer = transformer

    def forward(
        self,
        noisy: Tensor,
        times: Tensor,
        ids: Tensor,
        mask: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Flow `[B, C, H, W]` of `noisy`, at noise levels `times` `[B]` from 0 to 1.

        Args:
            noisy: latents `[B, C, H, W]`.
            times: share of noise.
            ids: token ids `[B, L]`, for both text encoders.
            mask: not read, since `FluxPipeline` has no mask either.
            guidance: guidance scale `[B]`; `None` is 1.
        """
        flow = self.transformer(
            hidden_states=pack(noisy),
            timestep=times,
            guidance=torch.ones_like(times) if guidance is None else guidance,
            pooled_projections=self.text_encoder(ids).pooler_output,
            encoder_hidden_states=self.text_of(ids),
            txt_ids=torch.zeros(ids.shape[1], 3, device=noisy.device),
            img_ids=positions(noisy.shape[2] // 2, noisy.shape[3] // 2, noisy.device),
            return_dict=False,
        )[0]
        return unpack(flow, noisy.shape[2], noisy.shape[3])

    def text_of(self, ids: Tensor) -> Tensor:
        """T5's vectors of token ids `[B, L]`, `[B, L, D]`, as if more padding followed."""
        more = F.pad(ids, (0, SIGHT))  # what the last of L tokens would see after it
        return self.text_encoder_2(more)[0][:, : ids.shape[1]]

    def shorten_text(self) -> None:
        """From now on, reads `TEXT_LENGTH` tokens as if they were the pipeline's 512.

        Takes cuDNN's attention out of PyTorch's choice, in the whole process.
        """
        from dit_sparse.pipelines.processor import sparse_processor

        # PyTorch 2.11 died of an illegal memory access on an H200, in compiled steps with CUDA
        # graphs. cuDNN 9.19's attention, its choice where keys outnumber queries, is suspected but
        # not proven to be the cause. A context around the call did not compile there.
        torch.backends.cuda.enable_cudnn_sdp(False)
        core: Any = RepeatedPadding(TEXT_LENGTH - 1, PIPELINE_TEXT_LENGTH - TEXT_LENGTH)
        blocks = (self.transformer.transformer_blocks, self.transformer.single_transformer_blocks)
        for block in chain(*blocks):
            block.attn.set_processor(sparse_processor(block.attn.processor, core))


def pack(latents: Tensor) -> Tensor:
    """Squares of 2x2 latents `[B, C, H, W]` as tokens `[B, H/2 * W/2, 4 C]`, channels slowest."""
    squares = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """What `pack` was given, `[B, C, height, width]`."""
    squares = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Position ids of image tokens, `[rows * columns, 3]`: 0, row, column."""
    sides = (torch.arange(n, dtype=torch.float32, device=device) for n in (1, rows, columns))
    return torch.cartesian_prod(*sides)


def close_gates(transformer: Any) -> None:
    """Makes a fresh `FluxTransformer2DModel` predict 0 and its blocks do nothing."""
    modulations = [block.norm.linear for block in transformer.single_transformer_blocks]
    for block in transformer.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for layer in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
