"""What the source archive and the wheel built from it hold."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build")
pytest.importorskip("setuptools", minversion="77")

from tests.toy_model import save_toy_model

ROOT = Path(__file__).parents[1]
MODELS = Path("dit_sparse/models")
WHEEL_BYTES = 60_000_000
FILES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md")
FOLDERS = ("dit_sparse", "kernels", "pipelines", "tests")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, with a toy for an embedded model that is not in the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    leftovers = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=leftovers)
    if not (copy / MODELS / "tiny-video").exists():
        save_toy_model(copy / MODELS / "tiny-video")
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the source archive of a copy, so that no build folder stays behind."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_one_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"dit_sparse"}


def test_the_wheel_holds_the_defaults_of_families(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert "dit_sparse/pipelines/defaults.json" in archive.namelist()


def test_the_wheel_holds_the_table_of_kernel_variants(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert "dit_sparse/kernels/variants.json" in archive.namelist()


def test_the_wheel_holds_every_module(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.endswith(".py")}
    expected = {
        str(Path("dit_sparse", *path.relative_to(ROOT).parts[skip:]))
        for folder, skip in (("dit_sparse", 1), ("kernels", 0), ("pipelines", 0))
        for directory, _, files in os.walk(ROOT / folder)
        for path in (Path(directory, name) for name in files)
        if path.suffix == ".py"
    }
    assert inside == expected


def test_the_wheel_holds_the_models_and_stays_light(source, wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith(f"{MODELS}/tiny-")}
    files = (path for path in (source / MODELS).glob("tiny-*/**/*") if path.is_file())
    assert inside == {path.relative_to(source).as_posix() for path in files}
    assert f"{MODELS}/tiny-video/manifest.json" in inside
    assert wheel.stat().st_size <= WHEEL_BYTES


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel puts beside other packages."""
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run_installed(installed: Path, here: Path, *arguments: str) -> str:
    """What Python prints with the installed package, away from the repository."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_works_away_from_the_repository(installed, tmp_path):
    code = (
        "import dit_sparse, dit_sparse.kernels.reference\n"
        "from dit_sparse.pipelines.family import families\n"
        "print(dit_sparse.__file__, len(families()))"
    )
    file, families = run_installed(installed, tmp_path, "-c", code).split()
    assert Path(file).is_relative_to(installed)
    assert int(families) > 0


def test_the_wheel_samples_from_its_own_model_by_default(installed, tmp_path):
    words = "sample --prompt cow --device cpu --frames 5 --height 32 --width 32 --steps 1"
    words += " --warmup 0 --format json"
    out = run_installed(installed, tmp_path, "-m", "dit_sparse", *words.split())
    assert json.loads(out)["model"] == "tiny-video"
    assert (tmp_path / "sample.mp4").stat().st_size > 0
