"""Writes a contact sheet of composed samples with their captions.

    python scripts/data/preview.py --kind clips --frames 25 --output sheet.png

Stills fill a grid; of a clip, one row shows frames spread over its length. Deterministic by seed.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a bare checkout

from scripts.data.compose import Composer
from scripts.data.scenes import SPLITS
from scripts.data.sprites import KINDS, load_sprites

CAPTION_HEIGHT = 40


def contact_sheet(video: Tensor, captions: list[str], columns: int) -> Image.Image:
    """A picture of clips [B, 3, F, H, W] in [-1, 1]: `columns` stills a row, or as many frames."""
    shown = np.linspace(0, video.shape[2] - 1, min(columns, video.shape[2])).round().astype(int)
    across = columns if video.shape[2] == 1 else 1
    height, width = video.shape[-2:]
    cell = width * len(shown)
    rows = -(-len(captions) // across)
    sheet = Image.new("RGB", (across * cell, rows * (height + CAPTION_HEIGHT)), "white")
    pen = ImageDraw.Draw(sheet)
    pixels = ((video + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).numpy()
    for i, caption in enumerate(captions):
        left, top = (i % across) * cell, (i // across) * (height + CAPTION_HEIGHT)
        sheet.paste(Image.fromarray(np.concatenate(pixels[i, shown], axis=1)), (left, top))
        text = "\n".join(textwrap.wrap(caption, max(cell // 6, 12))[:3])
        pen.text((left + 2, top + height + 1), text, fill="black")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--kind", choices=KINDS, default="clips")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/sheet.png"))
    arguments = parser.parse_args()
    try:
        composer = Composer(load_sprites(arguments.data, arguments.kind), arguments.split, "cpu")
        size = (arguments.count, arguments.frames, arguments.height, arguments.width)
        video, captions = composer.batch(*size, torch.Generator().manual_seed(arguments.seed))
    except (ValueError, FileNotFoundError, RuntimeError) as failure:
        sys.exit(str(failure))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(video, captions, arguments.columns).save(arguments.output)
    print(f"{arguments.output}: {len(captions)} samples")


if __name__ == "__main__":
    main()
