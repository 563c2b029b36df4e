"""Examples that are learnt from more than once."""

import random

import pytest
import torch

from scripts.training.buckets import Bucket
from scripts.training.loop import Randomness
from scripts.training.replay import Replay

SMALL, LARGE = Bucket(1, 64, 64, 4), Bucket(1, 128, 128, 2)


class Maker:
    """Numbers its examples."""

    def __init__(self):
        self.made = 0

    def __call__(self, bucket, draws):
        first, self.made = self.made, self.made + bucket.batch
        numbers = torch.arange(first, self.made)
        return numbers[:, None].float().expand(-1, bucket.height), numbers


def draws(step):
    generator = torch.Generator().manual_seed(step)
    return Randomness(generator, random.Random(step), torch.Generator())


def test_one_use_draws_every_example_once():
    replay = Replay(Maker(), 1)
    drawn = [replay(SMALL, draws(step))[1] for step in range(5)]
    assert torch.cat(drawn).tolist() == list(range(20))


def test_examples_are_made_as_often_as_asked_and_drawn_with_all_their_parts():
    maker = Maker()
    replay = Replay(maker, 3)
    for step in range(30):
        latents, numbers = replay(SMALL, draws(step))
        assert latents.shape == (4, 64)
        assert len(set(numbers.tolist())) == 4
        assert torch.equal(latents, numbers[:, None].float().expand(-1, 64))
    assert maker.made == 40


def test_sizes_have_pools_of_their_own():
    replay = Replay(Maker(), 2)
    first = {int(n) for step in range(8) for n in replay(SMALL, draws(step))[1]}
    second = {int(n) for step in range(8) for n in replay(LARGE, draws(step))[1]}
    assert len(first) > 4
    assert len(second) > 2
    assert not first & second


def test_old_examples_are_replaced():
    replay = Replay(Maker(), 2)
    for step in range(200):
        _, numbers = replay(LARGE, draws(step))
    made = 100 * LARGE.batch
    assert min(numbers) >= made - 32 * LARGE.batch


def test_a_batch_stays_as_it_is_while_the_pool_changes():
    replay = Replay(Maker(), 2)
    latents, _numbers = replay(SMALL, draws(0))
    before = latents.clone()
    for step in range(1, 100):
        replay(SMALL, draws(step))
    assert torch.equal(latents, before)


def test_fewer_than_one_use_is_refused():
    with pytest.raises(ValueError, match="at least once, got 0"):
        Replay(Maker(), 0)
