"""Endless captioned clips from sprites: scenes drawn on the host, pictures rendered in batches.

composer = Composer(load_sprites("data", "clips"), "train", torch.device("cuda"))
video, captions = composer.batch(96, 25, 128, 128, torch.Generator().manual_seed(0))
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.data import backgrounds
from scripts.data.captions import write_captions
from scripts.data.motions import Tracks
from scripts.data.scenes import MOST, Scenes, cast, draw_scenes, half_sides, rows_of
from scripts.data.sprites import Sprites

PIXELS_AT_ONCE = 1 << 24  # output pixels of one resampling call; bounds the memory it takes
SHARPNESS = 1.5  # source pixels per output pixel from which a smaller copy of a sprite is read


class Composer:
    """Renders sprites of one split over procedural backgrounds, with captions.

    Args:
        sprites: A loaded set; the pixels of the split are copied to `device`.
        split: "train"; or, for evaluation, "compositions" (designs seen in training, but over a
            kind of background that training never shows with this design and action) or "held_out"
            (designs that training never shows).
        device: Where pictures are made.

    Raises:
        ValueError: unknown split, or one without sprites.
    """

    def __init__(self, sprites: Sprites, split: str, device: torch.device | str) -> None:
        self.split = split
        self.device = torch.device(device)
        self._sprites = sprites.where(rows_of(sprites, split))
        self._cast = cast(self._sprites, split)
        self._levels = _levels(self._sprites.pixels.to(self.device))
        self._colours = _mean_colours(self._levels[-1])

    def batch(
        self, batch: int, frames: int, height: int, width: int, generator: torch.Generator
    ) -> tuple[Tensor, list[str]]:
        """A batch of clips, or of pictures when `frames` is 1.

        Args:
            batch, frames, height, width: Size; any number of frames, sides of 16 and more.
            generator: Decides everything. One on the CPU avoids waiting for the device.

        Returns:
            (float32 [batch, 3, frames, height, width] in [-1, 1], captions).

        Raises:
            ValueError: a size that cannot be made.
        """
        scenes, captions = self._draw(batch, frames, height, width, generator)
        video = self._render(scenes, frames, height, width)
        return video, captions

    def captions(self, batch: int, frames: int, generator: torch.Generator) -> list[str]:
        """The captions of `batch` square clips, without rendering them: for a tokenizer, say."""
        return self._draw(batch, frames, 128, 128, generator)[1]

    def held_out(
        self, count: int, frames: int, height: int, width: int, *, seed: int = 0
    ) -> tuple[Tensor, list[str]]:
        """A fixed evaluation set: the same clips and prompts on every machine for one `seed`.

        Args and returns as `batch`, on the CPU. Pictures differ between devices by rounding alone.

        Raises:
            ValueError: the composer's split is "train", whose clips are not held out.
        """
        if self.split == "train":
            raise ValueError(
                'Expected the split "compositions" or "held_out" for evaluation, got "train". '
                "Make another Composer."
            )
        generator = torch.Generator().manual_seed(seed)
        videos, captions = [], []
        for begin in range(0, count, 16):
            size = min(16, count - begin)
            video, texts = self.batch(size, frames, height, width, generator)
            videos.append(video.cpu())
            captions += texts
        return torch.cat(videos), captions

    def _draw(
        self, batch: int, frames: int, height: int, width: int, generator: torch.Generator
    ) -> tuple[Scenes, list[str]]:
        if batch < 1 or frames < 1 or min(height, width) < 16:
            raise ValueError(
                f"Expected at least 1 clip of 1 frame and sides of 16 pixels, got {batch} of "
                f"{frames} at {height}x{width}. Ask for a larger size."
            )
        seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
        rng = np.random.default_rng(int(seed))
        args = (self._cast, self.split, self._sprites, self._colours)
        scenes = draw_scenes(rng, *args, batch, frames, height, width)
        half = half_sides(height, width)
        return scenes, write_captions(rng, scenes, self._sprites, frames, half)

    def _render(self, scenes: Scenes, frames: int, height: int, width: int) -> Tensor:
        ground = backgrounds.render(scenes.background, height, width, self.device)
        video = ground[:, None].repeat(1, frames, 1, 1, 1).flatten(0, 1)
        tracks = scenes.moves.tracks(frames)
        shown = scenes.stored_frames(frames, self._levels[0].shape[1])
        thetas = _affine(tracks, scenes.mirror.reshape(-1), height, width)
        detail = self._detail(tracks.scale * min(height, width))
        for column in range(MOST):
            scene = np.flatnonzero(scenes.count > column)
            track = scene * MOST + column
            for level in range(len(self._levels)):
                row, frame = np.nonzero(detail[track] == level)
                self._paste(
                    video,
                    self._levels[level],
                    target=scene[row] * frames + frame,
                    sprite=scenes.sprite[scene[row], column],
                    stored=shown[scene[row], column, frame],
                    theta=thetas[track[row], frame],
                )
        clip = video.unflatten(0, (-1, frames)).mul_(2).sub_(1)
        return clip.transpose(1, 2).contiguous()

    def _detail(self, sides: np.ndarray) -> np.ndarray:
        """Which copy of the sprites to read for sides in pixels: small ones would alias."""
        ratio = self._levels[0].shape[-1] / np.maximum(sides, 1)
        level = np.floor(np.log2(np.maximum(ratio / SHARPNESS, 0.5))) + 1
        return np.clip(level, 0, len(self._levels) - 1).astype(np.int64)

    def _paste(
        self,
        video: Tensor,
        source: Tensor,
        target: np.ndarray,
        sprite: np.ndarray,
        stored: np.ndarray,
        theta: np.ndarray,
    ) -> None:
        """Lays sprites over the frames `target` of `video` [B * F, 3, H, W], in place."""
        height, width = video.shape[-2:]
        step = max(1, PIXELS_AT_ONCE // (height * width))
        for begin in range(0, len(target), step):
            part = slice(begin, begin + step)
            to, which, when = (
                torch.from_numpy(a[part]).to(self.device) for a in (target, sprite, stored)
            )
            pixels = source[which, when].float() / 255
            matrix = torch.from_numpy(theta[part]).to(self.device)
            grid = F.affine_grid(matrix, [len(to), 4, height, width], align_corners=False)
            layer = F.grid_sample(pixels, grid, align_corners=False)
            video[to] = layer[:, :3] + (1 - layer[:, 3:]) * video[to]


def _affine(tracks: Tracks, mirror: np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 [N, F, 2, 3]: from normalised places in the picture to those in a sprite's square."""
    half_x, half_y = half_sides(height, width)
    cos, sin = np.cos(tracks.angle), np.sin(tracks.angle)
    x = [cos * half_x, sin * half_y, -(cos * tracks.x + sin * tracks.y)]
    y = [-sin * half_x, cos * half_y, sin * tracks.x - cos * tracks.y]
    theta = np.stack([np.stack(x, -1), np.stack(y, -1)], -2) * (2 / tracks.scale)[..., None, None]
    theta[mirror, :, 0] *= -1
    return theta.astype(np.float32)


def _levels(pixels: Tensor) -> tuple[Tensor, ...]:
    """The pixels at full, half and quarter size; averages of premultiplied colours stay right."""
    levels = [pixels]
    for _ in range(2):
        last = levels[-1]
        small = torch.empty(*last.shape[:3], *(s // 2 for s in last.shape[3:]), dtype=torch.uint8)
        small = small.to(pixels.device)
        for begin in range(0, len(last), 64):
            some = last[begin : begin + 64].flatten(0, 1).float()
            mean = F.avg_pool2d(some, 2).round().to(torch.uint8)
            small[begin : begin + 64] = mean.view_as(small[begin : begin + 64])
        levels.append(small)
    return tuple(levels)


def _mean_colours(pixels: Tensor) -> np.ndarray:
    """float32 [n, 3] in [0, 1]: mean colour of what each sprite's first frame shows."""
    total = pixels[:, 0].float().sum((-2, -1))
    return (total[:, :3] / total[:, 3:].clamp(min=1)).cpu().numpy()
