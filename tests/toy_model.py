"""A folder like that of an embedded model, with random weights of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dit_sparse.models.manifest import write_manifest

#: What its tokenizer takes, the end token included.
TEXT_LENGTH = 64


def save_toy_model(folder: Path) -> Path:
    """Writes a whole `WanPipeline`: 4 pixels a latent, 2 frames a latent, as the embedded one.

    Its tokenizer makes one token of every byte but spaces, and one for the end.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = WanPipeline(
            tokenizer=_tokenizer(),
            text_encoder=UMT5EncoderModel(
                UMT5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=1)
            ),
            vae=_vae(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=4.0
            ),
            transformer=WanTransformer3DModel(
                num_attention_heads=1,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                text_dim=16,
                freq_dim=16,
                ffn_dim=16,
                num_layers=2,
            ),
        )
    pipe.to(torch.bfloat16).save_pretrained(folder)
    (folder / "README.md").write_text("# A toy\n", encoding="utf-8")
    write_manifest(folder)
    return folder


def _vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(["<pad>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=TEXT_LENGTH,
    )
