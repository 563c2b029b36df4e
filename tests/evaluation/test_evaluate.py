"""The command from end to end on tiny pipelines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.evaluation import generate as generating
from dit_sparse.evaluation import runner as running
from dit_sparse.evaluation.store import Store

SIZE = ["--steps", "2", "--frames", "9", "--height", "64", "--width", "96", "--device", "cpu"]
SWEEP = ["evaluate", "--model", "tiny:wan", *SIZE, "--metrics", "psnr,ssim,temporal", "-q"]
SWEEP += ["--methods", "window:density=0.2|1.0:block=64", "--count", "2", "--rounds", "0"]
SWEEP += ["--probe-at", "none", "--output", "out", "--format", "json"]
LABEL = "pisa density={} block=64 dense_first=0.2 dense_layers=0"  # Wan's defaults
LABELS = ["stock", "dense", "window density=0.2 block=64", "window density=1.0 block=64"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, [*SWEEP, *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def sweep(*arguments: str) -> dict[str, Any]:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.stdout + result.stderr
    assert result.stdout == ""
    return result.stderr


def count_generations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of what is generated from now on."""
    made: list[str] = []
    true = running.generate

    def counted(model: Any, variant: Any, *rest: Any) -> Any:
        made.append(variant.label)
        return true(model, variant, *rest)

    monkeypatch.setattr(running, "generate", counted)
    return made


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in report["rows"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a whole sweep, which tests leave as it is, and what it reported."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, sweep("--output", str(folder))


def test_a_sweep_measures_every_variant(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, report = finished
    rows = rows_of(report)
    assert list(rows) == LABELS
    assert all(row["clips"] == 2 and row["failed"] is None for row in rows.values())
    assert rows["dense"]["identical"] == 2
    full = rows["window density=1.0 block=64"]
    assert full["identical"] == 2 or full["quality"]["psnr"] > 70
    sparse = rows["window density=0.2 block=64"]
    assert 10 < sparse["quality"]["psnr"] < 70
    assert sparse["worst"]["psnr"] <= sparse["quality"]["psnr"]
    assert 0 < sparse["density"] < 1
    assert sparse["layers"] == [sparse["density"]] * 2
    assert rows[report["baseline"]]["speedup"] == 1.0
    assert report["settings"]["model"] == "tiny:wan"
    assert sparse["command"][:4] == ["dit-sparse", "sample", "--model", "tiny:wan"]
    again = CliRunner().invoke(app, [*sparse["command"][1:], "--device", "cpu", "-o", "a.png"])
    assert again.exit_code == 0, again.stderr
    lines = [json.loads(line) for line in (folder / "summary.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == LABELS


def test_clips_are_those_of_the_stock_pipeline_without_loss(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    from dit_sparse import media

    folder, _ = finished
    words = ["sample", "--model", "tiny:wan", *SIZE, "--method", "dense", "--output", "a.png"]
    prompt = json.loads((folder / "runs-0.jsonl").read_text().splitlines()[0])["prompt"]
    assert CliRunner().invoke(app, [*words, "--prompt", prompt]).exit_code == 0
    from imageio import v3 as iio

    store = Store(folder)
    (line,) = [
        li for li in store.lines() if li.get("variant") == "stock" and li.get("prompt") == prompt
    ]
    clip = np.load(folder / line["clip"])
    np.testing.assert_array_equal(media.contact_sheet(clip), iio.imread("a.png"))


def test_nothing_is_run_twice(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, first = finished
    made = count_generations(monkeypatch)
    again = sweep("--output", str(folder))
    assert made == []
    assert again == first


def test_more_methods_prompts_and_seeds_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep("--count", "1")
    made = count_generations(monkeypatch)
    rows = rows_of(sweep("--methods", "window:density=0.5:block=64", "--seeds", "0,1"))
    assert "window density=0.5 block=64" in rows
    assert all(row["clips"] == 4 for row in rows.values())
    assert len(made) == 4 * 5 - 4


def test_a_killed_sweep_goes_on(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finished[1]
    with monkeypatch.context() as patch:
        made = count_generations(patch)
        true = running.Runner._begin

        def killed(self: Any, *rest: Any) -> Any:
            if len(made) == 5:
                raise KeyboardInterrupt
            return true(self, *rest)

        patch.setattr(running.Runner, "_begin", killed)
        result = CliRunner().invoke(app, SWEEP)
        assert result.exit_code != 0
    path = Path("out/runs-0.jsonl")
    assert len(path.read_text().splitlines()) == 5
    path.write_bytes(path.read_bytes()[:-20])  # and the last line was cut short
    made = count_generations(monkeypatch)
    again = sweep()
    assert len(made) == 8 - 4
    for label, row in rows_of(again).items():
        assert row["quality"] == rows_of(whole)[label]["quality"]
        assert row["clips"] == 2


def test_what_takes_too_long_is_reported_as_far_as_it_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = count_generations(monkeypatch)
    monkeypatch.setattr(running.time, "monotonic", lambda: 60.0 * len(made))
    rows = rows_of(sweep("--minutes", "6", "--rounds", "2"))
    assert len(made) == 6
    assert [row["clips"] for row in rows.values()] == [2, 2, 1, 1]
    assert rows_of(sweep())["window density=1.0 block=64"]["clips"] == 2


def test_a_file_of_options_does_the_same() -> None:
    Path("sweep.yaml").write_text(
        "model: tiny:wan\nsize: 9x64x96\nsteps: 2\ndevice: cpu\nmetrics: [psnr, ssim, temporal]\n"
        "methods:\n  - window: {density: [0.2, 1.0], block: 64}\ncount: 1\nrounds: 3\n"
        "probe_at: []\noutput: from-file\n"
    )
    words = ["evaluate", "--config", "sweep.yaml", "--rounds", "0", "-q", "--format", "json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr + str(result.exception)
    report = json.loads(result.stdout)
    assert report["output"] == "from-file"
    wanted = sweep("--count", "1")
    for label, row in rows_of(wanted).items():
        assert rows_of(report)[label]["quality"] == row["quality"]
        assert row["times"] == 0


def test_the_command_of_a_variant_has_all_that_it_was_run_with() -> None:
    words = ["--dtype", "bfloat16", "--methods", "window:density=0.5:block=64"]
    rows = rows_of(sweep("--count", "1", *words))
    command = rows["window density=0.5 block=64"]["command"]
    assert command[-2:] == ["--dtype", "bfloat16"]


def test_a_failing_method_is_recorded_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--methods", "pisa:density=0.01:block=64", "--rounds", "2"]
    report = sweep(*words)
    rows = rows_of(report)
    assert "Expected a density" in rows[LABEL.format("0.01")]["failed"]
    assert rows[LABEL.format("0.01")]["clips"] == 0
    assert all(rows[label]["clips"] == 2 and rows[label]["times"] >= 2 for label in LABELS)
    page = Path("out/report.md").read_text()
    assert "## Failed" in page
    made = count_generations(monkeypatch)
    sweep(*words)
    assert made == [], "a failure is not repeated unless asked for"
    sweep(*words, "--retry")
    assert made == [LABEL.format("0.01")]


def test_a_failing_stock_pipeline_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        generating.media, "as_bytes", lambda _: (_ for _ in ()).throw(ValueError("no frames"))
    )
    assert "no frames" in refused()


def test_times_are_medians_of_warm_runs() -> None:
    rows = rows_of(sweep("--count", "1", "--rounds", "3"))
    lines = [li for li in Store(Path("out")).lines() if li.get("variant") == "dense"]
    assert [li["warm"] for li in lines] == [False, True, True, True]
    assert [li["kind"] for li in lines] == ["clip", "repeat", "repeat", "repeat"]
    warm = sorted(li["seconds"]["denoise"] for li in lines if li["warm"])
    assert rows["dense"]["seconds"]["denoise"] == warm[1]
    assert rows["dense"]["times"] == 3
    parts = lines[0]["seconds"]
    assert parts["total"] == pytest.approx(
        sum(parts[n] for n in ("encode", "denoise", "decode")), abs=1e-5
    )
    assert sum(parts["steps"]) == pytest.approx(parts["denoise"], abs=1e-5)


def test_metrics_that_come_later_are_computed_from_the_clips(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = rows_of(sweep("--metrics", "psnr"))
    assert "ssim" not in first["dense"]["quality"]
    made = count_generations(monkeypatch)
    later = rows_of(sweep())
    assert made == []
    assert later["dense"]["quality"]["ssim"] == pytest.approx(1.0)
    assert later["dense"]["identical"] == 2


def test_fid_and_kid_come_with_the_weights_of_inception(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit_sparse.evaluation import metrics

    def means(path: Path | None, _: Any) -> Any:
        assert path == Path("inception.pt")
        return lambda pictures: pictures.mean((2, 3))

    monkeypatch.setattr(metrics, "load_inception", means)
    shutil.copytree(finished[0], "out")
    made = count_generations(monkeypatch)
    words = ["--metrics", "inception", "--inception-weights", "inception.pt"]
    rows = rows_of(sweep(*words))
    assert made == [], "features are those of clips that are there"
    assert rows["dense"]["quality"]["FID"] == pytest.approx(0, abs=1e-9)
    assert rows["window density=0.2 block=64"]["quality"]["FID"] > 0
    assert "| FID | KID |" in Path("out/report.md").read_text()


def test_missing_weights_are_named_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(Path("empty").absolute()))
    report = sweep("--metrics", "psnr,lpips,clip", "--count", "1")
    assert set(report["gaps"]) == {"lpips", "clip"}
    assert "AlexNet" in Path("out/report.html").read_text()


def test_the_probe_is_part_of_the_report() -> None:
    report = sweep("--count", "1", "--probe-at", "0.5", "--rounds", "1")
    sparse = rows_of(report)["window density=0.2 block=64"]["model_of_speed"]
    assert sparse["kernel_ms"] > 0
    assert 0 < sparse["attention_share"] <= 1
    assert sparse["ideal"] > 1
    page = Path("out/report.html").read_text()
    for name in ("Error by layer", "Kept mass by layer", "Attention maps", "PSNR"):
        assert f'alt="{name}"' in page, name
    from scripts.report import quality_table
    from scripts.report import rows_of as rows_in

    table = quality_table(rows_in(Path("out/summary.jsonl")))
    assert "tiny:wan, height 64, num_frames 9" in table
    assert "| window density=1.0 block=64 | 1.000 |" in table, "what is best is on the front"
    assert "Of 2 methods" in table
    assert "| stock |" not in table


@pytest.mark.parametrize("family", ["flux", "dit"])
def test_image_models(family: str) -> None:
    prompts = Path("classes.txt")
    prompts.write_text("1\n7\n" if family == "dit" else "a cat\na dog\n")
    words = ["evaluate", "--model", f"tiny:{family}", "--steps", "2", "--device", "cpu", "-q"]
    words += ["--prompts", str(prompts), "--methods", "window:density=0.4:block=64"]
    words += ["--metrics", "psnr,temporal", "--rounds", "0", "--output", "out"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr + str(result.exception)
    assert "moving" not in " ".join(path.name for path in Path("out/pictures").iterdir())


def test_processes_give_the_same_as_one(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, one = finished
    words = [sys.executable, "-m", "dit_sparse", *SWEEP, "--output", "two", "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout[done.stdout.index("{") :])
    assert {path.name for path in Path("two").glob("runs-*")} == {"runs-0.jsonl", "runs-1.jsonl"}
    for path in (folder / "clips").rglob("*.npy"):
        other = Path("two") / path.relative_to(folder)
        np.testing.assert_array_equal(np.load(path), np.load(other))
    for label, row in rows_of(two).items():
        assert row["quality"] == rows_of(one)[label]["quality"]


def merged(folders: str, *words: str) -> Any:
    return CliRunner().invoke(
        app, ["evaluate", "--merge", folders, "--output", "all", "--format", "json", *words]
    )


def test_folders_with_methods_of_their_own_are_merged(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    """The same rows as of one folder, and speedups over the dense variants of each."""
    folder, one = finished
    methods = ["--methods", "pisa:density=0.5:block=64", "--rounds", "2", "--probe-at", "0.5"]
    words = [word for word in SWEEP if not word.startswith("window:")]
    words.pop(words.index("--methods"))
    result = CliRunner().invoke(app, [*words, *methods, "--output", "part"])
    assert result.exit_code == 0, result.stderr
    part = json.loads(result.stdout)
    for _ in range(2):  # a merged folder is made anew
        result = merged(f"{folder},part")
        assert result.exit_code == 0, result.stderr
    rows = rows_of(json.loads(result.stdout))
    assert list(rows) == [*LABELS, LABEL.format("0.5")]
    for label in LABELS[2:]:
        assert rows[label] == rows_of(one)[label]
    theirs = rows_of(part)[LABEL.format("0.5")]
    assert rows[LABEL.format("0.5")] == {**theirs, "part": 1}
    page = Path("all/report.md").read_text()
    assert "Merged from 2 folders" in page
    assert "dense clips of" not in page
    assert any("pisa" in path.name for path in Path("all/clips").iterdir())
    assert "merge them again" in refused("--output", "all")


def test_dense_clips_that_differ_are_named(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    shutil.copytree(folder, "part")
    path = next(Path("part/clips/stock").iterdir())
    frames = np.load(path)
    frames[0] ^= 1
    np.save(path, frames)
    report = json.loads(merged(f"{folder},part").stdout)
    assert "1 differ from those of" in report["gaps"]["dense clips of 'part'"]


def test_a_merged_folder_keeps_nothing_of_parts_that_were_made_again(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = finished
    shutil.copytree(folder, "part")
    assert merged(f"part,{folder}").exit_code == 0
    path = next(Path("part/clips/stock").iterdir())
    frames = np.load(path)
    frames[0] ^= 1
    np.save(path, frames)
    assert merged(f"part,{folder}").exit_code == 0
    assert np.array_equal(np.load(Path("all/clips/stock") / path.name), frames)


def test_a_label_stands_for_one_method(finished: tuple[Path, dict[str, Any]]) -> None:
    """Labels have the last part of a path only, and other folders may have the same."""
    shutil.copytree(finished[0], "out")
    path = Path("out/runs-0.jsonl")
    before = path.read_text()
    path.write_text(before.replace("window(density=0.2,", "window(density=0.25,"))
    assert path.read_text() != before
    assert "Rename one of the folders" in refused()
    result = merged(f"{finished[0]},out")
    assert result.exit_code == 2, result.stdout
    assert "one method by the name of 'window density=0.2 block=64'" in result.stderr


def test_as_many_pictures_as_wanted(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    shutil.copytree(folder, "part")
    shutil.rmtree("part/pictures")
    for count, sentence in ((2, None), (1, "Of 1 of the 2 methods"), (0, None)):
        words = ["--output", "part", "--shown", str(count)]
        assert len(sweep(*words)["rows"]) == len(LABELS), "tables have all"
        page = Path("part/report.html").read_text()
        assert page.count("image/webp") == 2 * count, "moving, and frames"
        assert sentence is None or page.count(sentence) == 2
    assert merged(f"{folder},part", "--shown", "1").exit_code == 0
    assert Path("all/report.html").read_text().count("image/webp") == 2


@pytest.mark.parametrize(
    ("folders", "words", "sentence"),
    [
        ("{done}", [], "two or more different folders"),
        ("{done},{done}", [], "two or more different folders"),
        ("{done},nowhere", [], "got nothing"),
        ("{done},other", [], "dtype is"),
        ("{done},part", ["--output", "full"], "Choose another --output"),
        ("{done},part", ["--seeds", "1"], "leave it out"),
        ("{done},part", ["--shown", "-1"], "--shown of at least 0"),
        ("{done},part", ["--config", "a.yaml"], "got --config"),
    ],
)
def test_what_cannot_be_merged_is_a_sentence(
    finished: tuple[Path, dict[str, Any]], folders: str, words: list[str], sentence: str
) -> None:
    folder, _ = finished
    shutil.copytree(folder, "part")
    shutil.copytree(folder, "other")
    settings = Path("other/settings.json")
    settings.write_text(settings.read_text().replace('"float32"', '"bfloat16"'))
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    result = merged(folders.format(done=folder), *words)
    assert result.exit_code == 2, result.stdout
    assert sentence in result.stderr
    assert not Path("all").exists()


def test_a_launched_process_launches_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.commands import evaluate

    monkeypatch.setenv("DIT_SPARSE_LAUNCHED", "1")
    monkeypatch.setattr(evaluate.subprocess, "run", lambda *_, **__: pytest.fail("launched"))
    assert "--processes" in refused("--processes", "2")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods", "windw"], "Did you mean 'window'"),
        (["--metrics", "psrn"], "Did you mean 'psnr'"),
        (["--baselines", "flsh"], "Did you mean 'flash'"),
        (["--prompts", "empty.txt"], "empty file"),
        (["--prompts", "none.txt"], "UTF-8 text file"),
        (["--config", "none.yaml"], "YAML file"),
        (["--seeds", "a"], "an integer for seeds"),
        (["--seeds", "0,0"], "different seeds"),
        (["--height", "65"], "multiple of"),
        (["--shown", "-1"], "--shown of at least 0"),
        (["--model", "nowhere"], "existing folder"),
        (["--output", "empty.txt"], "a folder for --output"),
    ],
)
def test_wrong_input_is_a_sentence(arguments: list[str], sentence: str) -> None:
    Path("empty.txt").write_text("\n \n")
    message = refused(*arguments)
    assert sentence in message
    assert "Traceback" not in message
    assert not Path("out").exists(), "nothing may be written"


def test_another_size_in_the_same_folder_is_refused() -> None:
    sweep("--count", "1")
    assert "another --output" in refused("--frames", "5")


def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from dit_sparse.evaluation import store as storing

    true = storing.replace_file

    def refuse(path: Path, data: bytes) -> None:
        if path.suffix == ".npy" and "window" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        true(path, data)

    monkeypatch.setattr(storing, "replace_file", refuse)
    assert "the disk is full" in refused()
    monkeypatch.undo()


class _Page(HTMLParser):
    """Notes what is open, what is wrong, and where pictures come from."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.sources += [found[name] or "" for name in ("src", "href") if name in found]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page() -> Path:
    words = ["--metrics", "psnr,ssim", "--probe-at", "0.5", "--rounds", "1", "--count", "1"]
    prompts = Path("p.txt")
    prompts.write_text("a <b>cat</b> & a dog\n")
    sweep(*words, "--prompts", str(prompts))
    return Path("out/report.html")


def test_the_page_is_whole_and_needs_no_other_file(page: Path) -> None:
    found = _Page()
    found.feed(page.read_text(encoding="utf-8"))
    assert found.open == []
    assert len(found.sources) > 6
    assert all(source.startswith("data:image/") for source in found.sources)
    assert "a <b>cat</b> & a dog" in found.text
    assert all(label in found.text for label in LABELS)


def test_the_page_shows_its_pictures_in_a_browser(page: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("needs Chromium")
    script = (
        "<script>addEventListener('load', () => { const all = [...document.images];"
        "document.title = 'shown ' + all.filter(i => i.naturalWidth > 0).length + ' of ' "
        "+ all.length + ', width ' + (document.documentElement.scrollWidth <= innerWidth); });"
        "</script>"
    )
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,2000"]
    words += [f"--user-data-dir={Path('profile').absolute()}", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [browser, *words, "--dump-dom", page.absolute().as_uri()],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    count = text.count("<img ")
    assert f"shown {count} of {count}, width true" in done.stdout
