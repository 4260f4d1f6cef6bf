"""``python -m vitpatch.compare``: where pictures go, and what is no finished run."""

import json
import shutil

import pytest

from vitpatch import compare


@pytest.fixture
def call(capsys):
    def make(*arguments):
        try:
            compare.main([str(a) for a in arguments])
            code = 0
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr()
        return code, said.out + said.err

    return make


@pytest.fixture
def finished(patched, monkeypatch):
    monkeypatch.setattr("vitpatch.examples.IMAGES_A_PAGE", 1)
    return patched("window=2", "data.limit=4")


def test_runs_of_two_sweeps_keep_their_own_pictures(finished, call, tmp_path):
    for sweep in ("one", "two"):
        shutil.copytree(finished, tmp_path / sweep / "window=2")
    code, said = call(tmp_path / "one", tmp_path / "two", "--output", tmp_path / "out")
    assert code == 0 and len(said.splitlines()) == 2
    for sweep in ("one", "two"):
        assert (tmp_path / "out" / sweep / "window=2" / "figures" / "layer_profile.png").exists()
        assert not list((tmp_path / sweep / "window=2" / "figures").glob("*.png"))
    shutil.copytree(tmp_path / "one", tmp_path / "deeper" / "one")
    code, said = call(tmp_path / "one", tmp_path / "deeper" / "one", "--output", tmp_path / "out")
    assert code == 1 and "two of the folders have the same name" in said


def test_without_an_output_a_run_gets_its_own_pictures_once(finished, call):
    code, said = call(finished, finished.parent)
    assert code == 0 and len(said.splitlines()) == 1 and (finished / "figures" / "peak.png").exists()


@pytest.mark.parametrize("broken", ["effects", "pages", "key", "nowhere", "unfinished"])
def test_what_cannot_be_drawn_is_one_line(finished, call, broken):
    where = finished
    if broken == "key":
        manifest = json.loads((finished / "manifest.json").read_text())
        del manifest["config"]["interval"]
        (finished / "manifest.json").write_text(json.dumps(manifest))
    elif broken == "nowhere":
        where = finished / "nowhere"
    elif broken == "unfinished":
        (finished / "manifest.json").unlink()
    else:
        file = finished / f"{broken}.parquet"
        file.write_bytes(file.read_bytes()[:50])
    code, said = call(where)
    assert code == 1 and said.startswith("error: ") and len(said.splitlines()) == 1, said


def test_a_broken_run_does_not_stop_the_others(finished, call, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(finished, tmp_path / "sweep" / name)
    (tmp_path / "sweep" / "a" / "effects.parquet").write_bytes(b"PAR1")
    code, said = call(tmp_path / "sweep")
    assert code == 1 and "error: " in said and (tmp_path / "sweep" / "b" / "figures" / "peak.png").exists()
