"""The artifact of a calibration: it comes back as it was, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse.calibration import HEADER, TENSORS, Calibration, pack, unpack
from dit_sparse.grid import TokenGrid
from dit_sparse.model_identity import ModelIdentity
from tests.paro_cases import calibration, random_masks

NAMES = [["HWF", "FHW"], ["WFH", "WFH"]]


def some() -> Calibration:
    masks = {s: random_masks(2, (0.3, 0.6), 7, seed=s) for s in (0, 2)}
    return calibration(masks, NAMES, (0, 0, 1, 2, 2))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64])
def test_bits(n: int):
    mask = torch.rand(2, 3, n, generator=torch.Generator().manual_seed(0)) < 0.5
    assert pack(mask).shape == (2, 3, -(-n // 8))
    assert torch.equal(unpack(pack(mask), n), mask)


def test_bits_are_in_the_order_of_numpy():
    numpy = pytest.importorskip("numpy")
    mask = torch.rand(5, 13, generator=torch.Generator().manual_seed(0)) < 0.5
    assert numpy.array_equal(pack(mask).numpy(), numpy.packbits(mask.numpy(), axis=-1))


def test_a_head_of_cogvideox_takes_nine_kilobytes():
    assert pack(torch.zeros(275, 275, dtype=torch.bool)).numel() == 9625


def test_it_comes_back(tmp_path: Path):
    found = some()
    assert found.save_pretrained(tmp_path / "deep" / "down") == tmp_path / "deep" / "down"
    got = Calibration.from_pretrained(tmp_path / "deep" / "down")
    assert (got.model, got.grid, got.block) == (found.model, found.grid, found.block)
    assert (got.segments, got.dense_heads) == (found.segments, found.dense_heads)
    assert (got.provenance, got.steps) == (found.provenance, 5)
    assert torch.equal(got.density, found.density)
    assert torch.equal(got.kept_mass, found.kept_mass)
    assert [got.order_names(layer) for layer in (0, 1)] == [tuple(row) for row in NAMES]
    for segment in (0, 2):
        expected = random_masks(2, (0.3, 0.6), 7, seed=segment)
        assert torch.equal(torch.stack([got.mask(segment, i) for i in (0, 1)]), expected)
    assert "2 layers x 2 heads" in str(got)
    assert "\n" not in str(got)


def test_saving_again_replaces(tmp_path: Path):
    some().save_pretrained(tmp_path)
    other = calibration({0: random_masks(2, (0.3, 0.6), 7, seed=9)}, NAMES)
    other.save_pretrained(tmp_path)
    assert Calibration.from_pretrained(tmp_path).steps == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [HEADER, TENSORS]


class TestRefusals:
    @pytest.mark.parametrize("name", [HEADER, TENSORS])
    def test_a_missing_file(self, name: str, tmp_path: Path):
        some().save_pretrained(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(ValueError, match=rf"got 'No such file or directory' for {name}\."):
            Calibration.from_pretrained(tmp_path)

    @pytest.mark.parametrize("left", [0, 7, 100, 0.5, 0.99])
    @pytest.mark.parametrize("name", [HEADER, TENSORS])
    def test_a_truncated_file(self, name: str, left: int | float, tmp_path: Path):
        some().save_pretrained(tmp_path)
        data = (tmp_path / name).read_bytes()
        kept = left if isinstance(left, int) else int(left * len(data))
        (tmp_path / name).write_bytes(data[:kept])
        with pytest.raises(ValueError, match=r"it is truncated.*copy the folder whole"):
            Calibration.from_pretrained(tmp_path)

    def test_files_of_two_calibrations(self, tmp_path: Path):
        some().save_pretrained(tmp_path)
        other = calibration({0: random_masks(2, (0.3, 0.6), 7, seed=9)}, NAMES)
        (other.save_pretrained(tmp_path / "b") / TENSORS).rename(tmp_path / TENSORS)
        with pytest.raises(ValueError, match="truncated or of another calibration"):
            Calibration.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("change", "fault"),
        [
            ({"version": 2}, "Expected format version 1"),
            ({"grid": "3x5x9"}, "Expected uint8 orders"),
            ({"grid": None}, "one with a fault"),
            ({"segments": []}, "Expected masks for segments"),
            ({"segments": [0, 1]}, "Expected masks for segments"),
            ({"density": [[[0.5]]]}, "Expected density"),
            ({"model": {"kind": "X"}}, "Expected a model with config"),
            ({"dense_heads": [[1]]}, "one with a fault"),
        ],
        ids=str,
    )
    def test_a_header_that_says_something_else(
        self, change: dict[str, Any], fault: str, tmp_path: Path
    ):
        some().save_pretrained(tmp_path)
        header = json.loads((tmp_path / HEADER).read_bytes())
        (tmp_path / HEADER).write_text(json.dumps(header | change))
        with pytest.raises(ValueError, match=fault):
            Calibration.from_pretrained(tmp_path)

    def test_a_header_without_a_field(self, tmp_path: Path):
        some().save_pretrained(tmp_path)
        header = json.loads((tmp_path / HEADER).read_bytes())
        del header["model"]
        (tmp_path / HEADER).write_text(json.dumps(header))
        with pytest.raises(ValueError, match="one with a fault: 'model'"):
            Calibration.from_pretrained(tmp_path)

    def test_a_name_that_is_neither_a_folder_nor_on_the_hub(self, monkeypatch: pytest.MonkeyPatch):
        import huggingface_hub

        def missing(*_: Any, revision: str | None = None) -> str:
            raise OSError("no such repository\nand a second line")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
        with pytest.raises(ValueError, match=r"got 'owner/nothing': no such repository$"):
            Calibration.from_pretrained("owner/nothing")

    def test_orders_that_do_not_exist(self):
        found = some()
        with pytest.raises(ValueError, match="Expected orders below 6, got 6"):
            Calibration(
                *(found.model, found.grid, found.block),
                torch.full((2, 2), 6, dtype=torch.uint8),
                *(found.segments, found.masks, found.density, found.kept_mass),
            )


def test_the_hub_gets_both_files_and_gives_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub

    class Hub:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            assert (private, exist_ok) == (True, True)
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> None:
            for path in folder_path.iterdir():
                (tmp_path / path.name).write_bytes(path.read_bytes())

    def download(repo_id: str, name: str, *, revision: str | None) -> str:
        assert (repo_id, revision) == ("owner/paro", "v1")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = some()
    assert found.push_to_hub("owner/paro", private=True) == "https://hub/owner/paro"
    got = Calibration.from_pretrained("owner/paro", revision="v1")
    assert torch.equal(got.orders, found.orders)


def test_models_agree_by_class_and_configuration():
    one = ModelIdentity("A", "1" * 64, "x/y", "c")
    assert one.agrees(ModelIdentity("A", "1" * 64, "z"))
    assert not one.agrees(ModelIdentity("B", "1" * 64, "x/y", "c"))
    assert not one.agrees(ModelIdentity("A", "2" * 64, "x/y", "c"))
    assert ModelIdentity.of_dict(one.to_dict()) == one
    assert str(one) == "A x/y (config 11111111)"


def test_the_grid_decides_how_many_blocks():
    assert some().blocks == 7
    assert (
        calibration(
            {0: torch.ones(1, 1, 1, 1, dtype=torch.bool)}, [["FHW"]], grid=TokenGrid(1, 2, 2)
        ).blocks
        == 1
    )
