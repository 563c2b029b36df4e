"""Masks that are fetched ahead (test P10 of the specification)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from dit_sparse.calibration import Calibration
from dit_sparse.mask_feed import MaskFeed
from tests.paro_cases import blocks_of, calibration, random_masks

LAYERS, HEADS = 3, (0.2, 0.5)
CPU = torch.device("cpu")


def found(segments: int = 4) -> Calibration:
    masks = {s: random_masks(LAYERS, HEADS, blocks_of(), seed=s) for s in range(segments)}
    return calibration(masks, [("FHW", "WHF")] * LAYERS, range(segments))


def poisoned(masks: Calibration, device: torch.device) -> MaskFeed:
    feed = MaskFeed(masks, device)
    for buffer in feed._buffers:
        buffer.fill_(0xA5)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the first copy waits for no other stream
    return feed


def two_runs(segments: int) -> Iterator[tuple[int, int]]:
    for _ in range(2):
        for segment in range(segments):
            for layer in range(LAYERS):
                yield segment, layer


def test_two_whole_runs_through_two_buffers():
    masks = found()
    feed = poisoned(masks, CPU)
    for segment, layer in two_runs(4):
        assert torch.equal(feed.take(segment, layer), masks.mask(segment, layer))


def test_the_next_layer_is_there_before_it_is_asked_for():
    feed = poisoned(found(), CPU)
    asked = list(two_runs(4))
    for (segment, layer), following in pairwise(asked):
        feed.take(segment, layer)
        assert following in feed._holds
    feed.take(1, LAYERS - 1)
    feed.take(1, LAYERS - 1)  # both branches of guidance
    assert set(feed._holds) == {(1, LAYERS - 1), (2, 0)}


def test_any_order_of_calls_is_served():
    masks = found()
    feed = poisoned(masks, CPU)
    places = [(s, layer) for s in range(4) for layer in range(LAYERS)]
    for number in torch.randint(len(places), (60,), generator=torch.Generator().manual_seed(0)):
        place = places[int(number)]
        assert torch.equal(feed.take(*place), masks.mask(*place))


def test_buffers_made_in_inference_mode_serve_outside_of_it():
    masks = found()
    with torch.inference_mode():
        feed = MaskFeed(masks, CPU)
        feed.take(0, 0)
    assert torch.equal(feed.take(2, 1), masks.mask(2, 1))


def test_copies_have_buffers_of_their_own():
    feed = poisoned(found(), CPU)
    expected = feed.take(2, 1)
    for other in (copy.deepcopy(feed), pickle.loads(pickle.dumps(feed))):
        other.take(0, 0)
        assert torch.equal(other.take(2, 1), expected)
        assert other._buffers[0].data_ptr() != feed._buffers[0].data_ptr()


def test_segments_that_were_not_seen():
    masks = calibration({0: random_masks(1, HEADS, blocks_of())}, [("FHW", "WHF")], (0, 1))
    with pytest.raises(ValueError, match="Expected a step that the calibration has seen"):
        MaskFeed(masks, CPU).take(1, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_busy_device_reads_what_was_meant_for_it():
    """The host runs far ahead: buffers are asked for while the device is at earlier layers."""
    masks, device = found(), torch.device("cuda")
    feed = poisoned(masks, device)
    work = torch.randn(4096, 4096, device=device)
    taken = []
    for segment, layer in two_runs(4):
        for _ in range(3):
            work = work @ work * 1e-3
        taken.append(((segment, layer), feed.take(segment, layer)))
    for place, mask in taken:
        assert torch.equal(mask.cpu(), masks.mask(*place)), place
