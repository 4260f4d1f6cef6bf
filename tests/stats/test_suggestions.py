"""What a finding suggests to run next, and that its commands are ones that can be typed."""

import shlex
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from composed import composed, option_names
from hand_made import rows
from measured import result_of

from vitpatch import types
from vitpatch.runs.results import _python, run_command
from vitpatch.runs.setup import check_config
from vitpatch.stats.finding import find
from vitpatch.stats.suggestions import Possible, stronger_option, suggest
from vitpatch.types import PREFIX, Direction, Donor, Metric

IMAGES, LAYERS = 40, 6
EVERYTHING = Possible(stronger="noise_high", limit=IMAGES, has_cls=True, has_heads=True)
RNG = np.random.default_rng(4)
TOTAL = 0.3 + 0.1 * RNG.normal(size=IMAGES)
AT_3 = 0.02 * RNG.normal(size=(IMAGES, LAYERS)) + np.outer(TOTAL, np.arange(LAYERS) == 3)
NOTHING = 0.05 * RNG.normal(size=(IMAGES, LAYERS))
SMALL = 0.3 * RNG.normal(size=IMAGES)
SMALL += 0.03 - SMALL.mean()
HEADS = pd.concat([rows(range(3), head=head, site="z") for head in (0, 1)], ignore_index=True)
STREAM = pd.concat([rows(range(3), tokens=tokens, site="resid_post") for tokens in ("cls", "patches")])
CONTROLS = {Donor.SAME_CLASS: AT_3, Donor.OTHER_CLASS: 0 * AT_3}

WANTED = {
    "not shown, clear in log odds": (
        result_of(AT_3, SMALL, log_odds=SMALL + 1),
        [{"metric": "log_odds"}, {"corruption": "noise_high"}],
    ),
    "nowhere shown": (
        result_of(NOTHING, TOTAL),
        [{"window": "3"}, {"target": "handover", "window": "1"}],
    ),
    "no head shown": (
        result_of(NOTHING, TOTAL, HEADS),
        [{"target": "attn_out", "window": "1"}, {"data.limit": "150"}],
    ),
    "a window shown": (
        result_of(AT_3, TOTAL, rows(range(LAYERS), window=3)),
        [{"window": "1"}, {"target": "z", "window": "1", "target.layers": "[3]"}],
    ),
    "a layer shown without controls": (
        result_of(AT_3, TOTAL),
        [{"controls": "true"}, {"target": "z", "window": "1", "target.layers": "[3]"}],
    ),
    "a layer shown with controls": (
        result_of(AT_3, TOTAL, controls=CONTROLS),
        [{"target": "z", "window": "1", "target.layers": "[3]"}, {"target": "handover", "window": "1"}],
    ),
    "a head shown": (
        result_of(AT_3, TOTAL, HEADS, controls=CONTROLS),
        [{"direction": "noise"}],
    ),
    "what is necessary": (
        result_of(-AT_3, -TOTAL, HEADS, direction=Direction.NOISE),
        [{"direction": "denoise"}],
    ),
    "the whole stream": (
        result_of(np.repeat(TOTAL[:, None], LAYERS, axis=1), TOTAL, rows(range(LAYERS), site="resid_post")),
        [{"target": "handover", "window": "1"}, {"target": "attn_out", "window": "1"}],
    ),
    "a handover": (
        result_of(AT_3, TOTAL, STREAM.reset_index(drop=True)),
        [{"target": "attn_out", "target.tokens": "[cls]", "window": "1"}, {"direction": "noise"}],
    ),
    "prefixes": (
        result_of(AT_3, TOTAL, rows(range(LAYERS)).assign(window=PREFIX)),
        [{"window": "1"}],
    ),
    "one image": (
        result_of(AT_3[:1], TOTAL[:1]),
        [{"data.limit": "64"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WANTED)
def test_what_is_suggested(case):
    result, wanted = WANTED[case]
    assert [suggestion.overrides for suggestion in suggest(result, find(result), EVERYTHING)] == wanted


def test_nothing_is_suggested_that_a_model_or_data_do_not_have():
    for result, _ in WANTED.values():
        for suggestion in suggest(result, find(result), Possible()):
            assert not {"corruption", "data.limit"} & set(suggestion.overrides)
            assert suggestion.overrides.get("target") in (None, "attn_out")
    result = result_of(-AT_3, TOTAL, HEADS, metric=Metric.KL, test=types.Tested.HEADLINE, controls=CONTROLS)
    assert (
        find(result).places[0].best_is_shown and suggest(result, find(result), Possible()) == []
    )  # kl has no sign there


def test_more_images_are_as_many_as_have_so_many_clusters():
    result = result_of(AT_3, SMALL, clusters=np.arange(IMAGES) // 2, log_odds=0 * SMALL)
    clusters = find(result).remedies.clusters
    more_then_kl = suggest(result, find(result), replace(EVERYTHING, stronger=""))
    assert [suggestion.overrides for suggestion in more_then_kl] == [
        {"data.limit": str(2 * clusters)},
        {"metric": "kl"},
    ]


@pytest.mark.parametrize(
    ("option", "stronger"),
    [
        *(("noise_low", "noise"), ("noise", "noise_high"), ("noise_high", ""), ("gray", ""), ("mine", "")),
        *(("phase_scramble_low", "phase_scramble_half"), ("phase_scramble_half", "phase_scramble")),
        *(("occlude_half", "occlude"), ("silhouette", ""), ("embedding_noise", "embedding_noise_high")),
    ],
)
def test_the_next_stronger_option(option, stronger):
    assert stronger_option(option, option_names("corruption")) == stronger


def test_a_command_keeps_what_was_typed_but_for_what_changes():
    typed = [
        "--config-dir=/my conf",
        "corruption=noise",
        "corruption.clip=false",
        "target=mlp_out",
        "target.layers=[1]",
    ]
    typed += ["window=[1,3]", "+trainer.x=1", "overwrite=true"]
    program, script, *arguments = shlex.split(run_command(typed, {"window": "1", "corruption": "noise_high"}))
    assert (program, script.rpartition("/")[2]) == (_python(), "patch.py")
    kept = ["--config-dir=/my conf", "target=mlp_out", "target.layers=[1]", "+trainer.x=1"]
    assert arguments == [*kept, "window=1", "corruption=noise_high"]
    arguments = shlex.split(run_command(typed, {"target": "z", "target.layers": "[2]"}))[2:]
    assert [a for a in arguments if "target" in a] == ["target=z", "target.layers=[2]"]


@pytest.mark.parametrize("program", ["vitpatch", "vitpatch-train"])
def test_a_command_is_called_as_it_is_found_here(monkeypatch, tmp_path, program):
    for name in ("python", "vitpatch", "vitpatch-compare"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    assert run_command([], {"window": "1"}).split()[0] == str(tmp_path / "python")  # no environment is activated
    monkeypatch.setattr("sys.argv", [str(tmp_path / program)])
    assert run_command([], {"window": "1"}) == f"{tmp_path / 'vitpatch'} window=1"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_command([], {"window": "1"}) == "vitpatch window=1"
    (tmp_path / "vitpatch").rename(tmp_path / "elsewhere")
    assert run_command([], {"window": "1"}) == "vitpatch window=1"


def test_the_commands_compose_to_configs_that_are_valid():
    typed = [
        "corruption=noise",
        "target=attn_out",
        "target.layers=[1,2]",
        "data.limit=40",
        "logger=none",
        "trainer=cpu",
    ]
    commands = {
        run_command(typed, suggestion.overrides)
        for result, _ in WANTED.values()
        for suggestion in suggest(result, find(result), EVERYTHING)
    }
    assert len(commands) > 8
    for command in commands:
        check_config(composed("patch", *shlex.split(command)[2:]))
