"""Donors, controls, inclusion, synergy and tests as a run leaves them, against numbers computed another way."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, DEPTH, pictures, write_parquet

import vitpatch
from vitpatch.errors import VitPatchError
from vitpatch.formatting import DONOR_IMAGES
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.plots.run_figures import profile_references
from vitpatch.runs.reading import load_run
from vitpatch.stats.inference import sign_flip_p

OTHERS = ("same_class", "other_class")
CLOSE = dict(rtol=0, atol=1e-5)


def read(folder):
    tables = [pd.read_parquet(folder / f"{name}.parquet") for name in ("examples", "effects")]
    return *tables, pd.read_csv(folder / "summary.csv"), json.loads((folder / "manifest.json").read_text())


def pixels_of(made):
    """(clean, gray) as the model takes them, by image."""
    stacked = np.stack([np.asarray(image) for image in pictures(13)])
    clean = torch.tensor(stacked, dtype=torch.float32).permute(0, 3, 1, 2) / 255
    luma = (clean * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True).expand_as(clean)
    return (clean - 0.5) / 0.5, (luma - 0.5) / 0.5


def model_of(made):
    return Checkpoint(str(made / "vit")).load().model


def test_controls_are_another_images_clean_activations(made, patched):
    examples, effects, summary, manifest = read(patched("window=1"))
    assert manifest["donors"] == ["pair", *OTHERS] and len(effects) == 13 * DEPTH
    clean, gray = pixels_of(made)
    labels = examples["label"].to_numpy()
    for donor in OTHERS:
        partner = examples[f"partner_{donor}"].to_numpy()
        assert ((labels[partner] == labels) == (donor == "same_class")).all() and (partner != np.arange(13)).all()
        table = vitpatch.patch(model_of(made), clean[torch.tensor(partner)], gray, labels, window=1)
        assert np.allclose(effects[f"effect_{donor}"], table["effect"], **CLOSE)
        assert np.allclose(effects[f"prob_{donor}"], table["prob"], **CLOSE)
        assert np.allclose(examples[f"prob_{donor}"], table.drop_duplicates("example_id")["prob_clean"], **CLOSE)
        means = effects.groupby("layer")[f"effect_{donor}"].mean()
        assert np.allclose(summary[f"effect_{donor}"], means, rtol=0, atol=1e-7)
        assert (summary[f"n_{donor}"] == 13).all()
        assert (summary[f"effect_{donor}_low"] <= summary[f"effect_{donor}"]).all()
    every = vitpatch.patch(model_of(made), clean, gray, labels, window="suffix", layers=[0])
    assert np.allclose(examples["effect_all_layers"], every["effect"], **CLOSE)


def test_the_test_of_interest_is_own_less_other_class(patched):
    examples, effects, summary, manifest = read(patched("window=1"))
    apart = (effects["log_odds"] - effects["log_odds_other_class"]).to_numpy(float).reshape(13, DEPTH)
    own = effects["log_odds"].to_numpy(float).reshape(13, DEPTH) - examples["log_odds_corrupt"].to_numpy(float)[:, None]
    clusters = examples["cluster"].to_numpy()
    assert np.allclose(summary["own_minus_other"], apart.mean(0), rtol=0, atol=1e-5)
    assert np.allclose(summary["p_own_minus_other"], sign_flip_p(apart, clusters, 0), rtol=0, atol=0.003)
    assert np.allclose(summary["p"], sign_flip_p(own, clusters, 0), rtol=0, atol=0.003)
    assert manifest["statistics"]["tests"] == "log_odds"


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("donor", OTHERS)
def test_another_image_as_the_donor_of_a_run(made, patched, donor, direction):
    examples, effects, summary, manifest = read(patched(f"donor={donor}", f"direction={direction}", "window=2"))
    partner, (clean, gray) = examples[f"partner_{donor}"].to_numpy(), pixels_of(made)
    recipient, name = (gray, "corrupt") if direction == "denoise" else (clean, "clean")
    table = vitpatch.patch(model_of(made), clean[torch.tensor(partner)], recipient, examples["label"], window=2)
    assert np.allclose(effects["effect"], table["effect"], **CLOSE)
    total = (examples[f"prob_{donor}"] - examples[f"prob_{name}"]).mean()
    assert manifest["total_effect"]["mean"] == pytest.approx(total, abs=1e-6)
    assert DONOR_IMAGES[donor] in manifest["title"] and manifest["donors"] == [donor]
    share = summary["recovered"].dropna()
    assert np.allclose(share, summary.loc[share.index, "effect"] / total, rtol=1e-4)


def test_a_run_against_the_clean_runs_rival_is_the_call_from_python(made, patched):
    """Which takes it from the logits at once; a run stores both, and puts them in their places."""
    examples, effects, _, _ = read(patched("metric=logit_diff", "rival=clean", "window=2", "data.limit=6"))
    clean, gray = (pixels[:6] for pixels in pixels_of(made))
    asked = {"metric": "logit_diff", "window": 2}
    table = vitpatch.patch(model_of(made), clean, gray, examples["label"], rival="clean", **asked)
    first = table.drop_duplicates("example_id")
    for name in ("effect", "logit_diff", "logit_diff_other_rival"):
        assert np.allclose(effects[name], table[name], **CLOSE)
    assert (examples["rival"] == first["rival"].to_numpy()).all() and (
        examples["rival"] != examples["other_rival"]
    ).any()
    other = vitpatch.patch(model_of(made), clean, gray, examples["label"], rival="corrupt", **asked)
    assert np.allclose(effects["logit_diff_other_rival"], other["logit_diff"], **CLOSE)


def hooked(model, pixels, layers, value):
    """Softmax with the attention output of layers replaced by ``value(layer)``, by hooks of this test's own."""
    handles = [
        model.vit.layers[layer].attention.register_forward_hook(
            lambda m, a, out, layer=layer: (
                (value(layer).expand_as(out[0]), *out[1:]) if isinstance(out, tuple) else value(layer).expand_as(out)
            )
        )
        for layer in layers
    ]
    try:
        with torch.no_grad():
            return model(pixel_values=pixels).logits.double().softmax(-1)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("donor", ["zero", "mean"])
def test_constants_go_into_the_clean_run(made, patched, tmp_path, donor):
    folder = tmp_path / "data"
    folder.mkdir()
    write_parquet(folder / "test.parquet", pictures(13), [i % CLASSES for i in range(13)])
    write_parquet(folder / "train.parquet", pictures(9, seed=1), [i % CLASSES for i in range(9)])
    examples, effects, summary, manifest = read(
        patched(f"donor={donor}", "window=1", f"data.path={folder}", "data.split=test")
    )
    assert manifest["config"]["direction"] == "noise" and manifest["total_effect"]["mean"] is None
    assert summary["recovered"].isna().all() and any("no run" in note for note in manifest["notes"])
    assert manifest["title"].startswith("vit on data · attn_out")  # no corruption: it plays no part
    model, (clean, _) = model_of(made), pixels_of(made)
    labels = torch.tensor(examples["label"].to_numpy())
    constants = [torch.zeros(())] * DEPTH
    if donor == "mean":
        train = np.stack([np.asarray(image) for image in pictures(9, seed=1)])
        train = (torch.tensor(train, dtype=torch.float32).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        seen = {}
        handles = [
            layer.attention.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out))
            for i, layer in enumerate(model.vit.layers)
        ]
        with torch.no_grad():
            model(pixel_values=train)
        for handle in handles:
            handle.remove()
        constants = [(seen[i][0] if isinstance(seen[i], tuple) else seen[i]).mean(0) for i in range(DEPTH)]
    before = hooked(model, clean, [], None).gather(1, labels[:, None])[:, 0]
    for layer in range(DEPTH):
        after = hooked(model, clean, [layer], constants.__getitem__).gather(1, labels[:, None])[:, 0]
        got = effects.loc[effects["layer"] == layer, "effect"].to_numpy()
        assert np.allclose(got, after - before, **CLOSE)
    assert manifest["peak_layer"] == int(summary["effect"].idxmin())  # what does most harm


def test_means_need_a_training_split(patched):
    with pytest.raises(VitPatchError, match=r"split"):
        patched("donor=mean", "window=1")


@pytest.mark.parametrize(
    ("include", "want"),
    [
        ("all", lambda e: e["label"] == e["label"]),
        ("clean_correct", lambda e: e["pred_clean"] == e["label"]),
        ("flipped", lambda e: (e["pred_clean"] == e["label"]) & (e["pred_corrupt"] != e["label"])),
        ("min_total_effect:0.01", lambda e: e["prob_clean"] - e["prob_corrupt"] >= 0.01),
    ],
)
def test_inclusion(patched, include, want):
    examples, effects, summary, manifest = read(patched(f"include='{include}'", "window=2", "direction=noise"))
    kept = want(examples)
    assert len(examples) == 13 and len(effects) == 13 * DEPTH and 0 < kept.sum()
    assert examples["included"].tolist() == kept.tolist() and (summary["n"] == kept.sum()).all()
    of_kept = effects[effects["example_id"].isin(examples.loc[kept, "example_id"])].groupby("layer")["effect"].mean()
    assert np.allclose(summary["effect"], of_kept, rtol=0, atol=1e-6)
    dropped = {} if kept.all() else {f"not {include}": int((~kept).sum())}
    assert manifest["counts"]["dropped"] == dropped and manifest["counts"]["included"] == kept.sum()
    if include in ("all", "clean_correct"):
        assert "unselected" not in manifest and "effect_unselected" not in summary
        return
    assert manifest["unselected"]["n"] == 13
    assert np.allclose(summary["effect_unselected"], effects.groupby("layer")["effect"].mean(), rtol=0, atol=1e-6)
    total = (examples["prob_corrupt"] - examples["prob_clean"]).mean()
    assert manifest["unselected"]["total_effect"]["mean"] == pytest.approx(total, abs=1e-6)
    assert any("chosen by what the corruption did" in note for note in manifest["notes"])


def test_nobody_included_is_said(patched):
    with pytest.raises(VitPatchError, match=r"include min_total_effect:5: none of 13 images"):
        patched("include='min_total_effect:5'")


@pytest.mark.parametrize("windows", ["window=3", "window=[1,3]"])
def test_synergy_and_marginals(made, patched, windows):
    folder = patched(windows, "synergy=true")
    examples, effects, summary, _ = read(folder)
    assert set(effects["window"]) == {1, 3} and len(effects) == 13 * 2 * DEPTH
    for metric in ("prob", "log_odds"):
        base = examples.set_index("example_id")[f"{metric}_corrupt"]
        effects[metric + "_effect"] = effects[metric] - base.loc[effects["example_id"]].to_numpy()
        by = effects.pivot_table(index=["window", "layer"], columns="example_id", values=metric + "_effect")
        for row in summary[summary["window"] == 3].itertuples():
            alone = sum(by.loc[(1, layer)] for layer in range(row.first_layer, row.last_layer + 1))
            want = (by.loc[(3, row.layer)] - alone).mean()
            assert getattr(row, f"synergy_{metric}") == pytest.approx(want, abs=1e-5)
            assert getattr(row, f"synergy_{metric}_low") <= want + 1e-6
    assert summary.loc[summary["window"] == 1, "synergy_prob"].isna().all()
    marginals, clean_gray = pd.read_csv(folder / "marginals.csv"), pixels_of(made)
    middle = marginals[(marginals["layer"] == 1) & (marginals["without"] == 0)].iloc[0]  # layers 1 and 2 are left
    rest = vitpatch.patch(model_of(made), *clean_gray, examples["label"], window=2, layers=[2])["effect"].mean()
    whole = effects.loc[(effects["window"] == 3) & (effects["layer"] == 1), "effect"].mean()
    assert middle["marginal_prob"] == pytest.approx(whole - rest, abs=1e-5)
    assert len(marginals) == sum(n for n in summary.loc[summary["n_layers"] > 1, "n_layers"])


def test_windows_beside_single_layers_have_their_synergy_unasked(patched):
    summary = read(patched("window=[1,3]"))[2]
    assert summary.loc[summary["window"] == 3, "synergy_log_odds"].notna().all()
    assert "synergy_prob" not in read(patched("window=3", folder="alone"))[2]


def test_controls_do_not_depend_on_batches(patched):
    one, other = (read(patched("window=1", f"batch_size={n}", folder=str(n)))[1] for n in (2, 13))
    columns = [f"{name}_{donor}" for name in ("prob", "effect") for donor in OTHERS]
    assert np.allclose(one[columns], other[columns], rtol=0, atol=1e-6)


def test_an_image_alone_in_its_class_is_left_out_of_that_control(patched, tmp_path):
    path = write_parquet(tmp_path / "x.parquet", pictures(6), [0, 0, 1, 1, 2, 2], base=list("aabcde"))
    data = (f"data.path={path}", "data.cluster_column=base")
    examples, effects, summary, _ = read(patched("window=1", *data))
    assert examples["partner_same_class"].tolist() == [-1, -1, 3, 2, 5, 4] and (summary["n_same_class"] == 4).all()
    assert effects.groupby("example_id")["effect_same_class"].apply(lambda x: x.isna().all()).tolist() == [
        True, True, False, False, False, False,
    ]  # fmt: skip
    known = effects.groupby("layer")["effect_same_class"].mean()
    assert np.allclose(summary["effect_same_class"], known, rtol=0, atol=1e-7)
    examples, _, summary, manifest = read(patched("donor=same_class", "window=1", *data, folder="donor"))
    assert examples["included"].tolist() == [False] * 2 + [True] * 4 and (summary["n"] == 4).all()
    assert manifest["counts"]["dropped"] == {"no same_class partner": 2}


def test_without_partners_or_labels_there_are_no_controls(patched, tmp_path, caplog):
    path = write_parquet(tmp_path / "x.parquet", pictures(3), [0, 0, 0])
    with caplog.at_level(logging.INFO):
        manifest = read(patched("window=1", f"data.path={path}"))[3]
    assert manifest["donors"] == ["pair", "same_class"] and "no image has a other_class partner" in caplog.text
    unlabelled = ("window=1", f"data.path={path}", "data.label_column=null")
    assert read(patched(*unlabelled, folder="unlabelled"))[3]["donors"] == ["pair"]
    for wrong, said in (("controls=true", "no labels to go by"), ("donor=other_class", "no labels to go by")):
        with pytest.raises(VitPatchError, match=said):
            patched(*unlabelled, wrong, folder="wrong")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("donor=pears",), "donor 'pears': expected one of pair, same_class, other_class, zero, mean"),
        (("donor=zero", "direction=denoise"), "goes into the clean run; leave it out"),
        (("donor=zero", "controls=true"), "controls stand beside donor=pair"),
        (("controls=maybe",), "controls 'maybe': expected true, false or null"),
        (("include=flopped",), "include 'flopped': expected all, clean_correct, flipped or min_total_effect:x"),
        (("include='min_total_effect:much'",), "expected all, clean_correct"),
        (("include=min_total_effect",), "expected all, clean_correct"),
        (("synergy=true", "window=1"), "use window=3"),
        (("synergy=true", "target=z"), "single heads"),
        (("test=headline", "metric=kl", "direction=noise"), "≥ 0 by construction"),
        (("test=kl",), "test 'kl': expected log_odds or headline"),
        (("interval=normal",), "interval 'normal': expected percentile or bca"),
        (("wanted_width=0",), "expected a number above 0"),
    ],
)
def test_wrong_words_are_said(patched, overrides, said):
    with pytest.raises(VitPatchError, match=said):
        patched(*overrides)


def test_bca_intervals_are_others_around_the_same_means(patched):
    one, other = (read(patched(f"interval={kind}", folder=kind))[2] for kind in ("percentile", "bca"))
    assert np.allclose(one["effect"], other["effect"]) and not np.allclose(one["effect_low"], other["effect_low"])


def test_effects_on_the_headline_can_be_tested_too(patched):
    folder = patched("window=1", "test=headline")
    _, effects, summary, manifest = read(folder)
    own, other = (effects[c].to_numpy(float).reshape(13, DEPTH) for c in ("effect", "effect_other_class"))
    assert np.allclose(summary["p"], sign_flip_p(own, np.arange(13), 0), rtol=0, atol=0.003)
    assert np.allclose(summary["p_own_minus_other"], sign_flip_p(own - other, np.arange(13), 0), rtol=0, atol=0.003)
    assert manifest["statistics"]["tests"] == "prob" and any("neutral in log odds" in n for n in manifest["notes"])


def strictly(folder):
    """The manifest, where NaN is no number."""

    def refuse(word):
        raise AssertionError(f"{word} in manifest.json")

    return json.loads((folder / "manifest.json").read_text(), parse_constant=refuse)


def test_a_manifest_is_json_also_where_nothing_is_known(patched):
    folder = patched("donor=zero", "include='min_total_effect:0.01'", "window=1")
    manifest = strictly(folder)
    assert "nan" not in profile_references(load_run(folder).result).unselected
    assert manifest["unselected"]["total_effect"]["mean"] is None and "nan" not in str(manifest["notes"]).lower()
    reduced = patched("donor=same_class", "data.limit=8", "model.dtype=bfloat16", "window=2", folder="reduced")
    assert strictly(reduced)["precision_error"]["largest"] > 0  # some of these images have no partner


@pytest.mark.usefixtures("small_pictures")
def test_a_run_without_a_peak_ends_well(patched, caplog):
    with caplog.at_level(logging.INFO):
        folder = patched("corruption=none", "window=[1,3]", pictures=True)
    assert read(folder)[3]["peak_set"] is None and (folder / "figures" / "windows.png").exists()
    assert "Nothing is said of places" in caplog.text


def test_a_derangement_within_a_class_has_no_total_effect_and_says_why(patched, tmp_path):
    path = write_parquet(tmp_path / "x.parquet", pictures(6), [0, 0, 1, 1, 2, 2])
    manifest = read(patched("donor=same_class", "direction=noise", "window=2", f"data.path={path}"))[3]
    assert abs(manifest["total_effect"]["mean"]) < 1e-6
    assert any("derangement" in sentence for sentence in manifest["finding"])
    assert not any("corruption is not shown" in sentence for sentence in manifest["finding"])


@pytest.mark.usefixtures("small_pictures")
def test_controls_of_images_that_are_not_included_have_no_mean(patched, tmp_path):
    path = write_parquet(tmp_path / "x.parquet", pictures(6), [0, 0, 1, 2, 3, 4])
    damage = pd.read_parquet(patched(f"data.path={path}", "window=1", folder="all") / "examples.parquet")
    least = (damage["prob_clean"] - damage["prob_corrupt"])[:2].max()  # neither of the one pair is included
    assert least < (damage["prob_clean"] - damage["prob_corrupt"])[2:].max()
    rule = f"include='min_total_effect:{least + 1e-4}'"
    _, _, summary, _ = read(patched(f"data.path={path}", "window=1", rule, pictures=True))
    assert (summary["n_same_class"] == 0).all() and summary["effect_same_class"].isna().all()
    assert summary["effect_other_class"].notna().all()


def test_what_an_image_has_no_partner_for_is_empty_in_every_file(patched):
    folder = patched("donor=same_class", "synergy=true", "window=3", "data.limit=8")
    examples, effects, _, _ = read(folder)
    alone = examples.loc[examples["partner_same_class"] < 0, "example_id"]
    assert 0 < len(alone) < 8
    for table in (effects, pd.read_parquet(folder / "leave_outs.parquet")):
        assert (table["effect"].isna() == table["example_id"].isin(alone)).all()


def test_against_the_corrupted_run_controls_are_not_compared(patched):
    _, _, summary, manifest = read(patched("window=1", "direction=noise"))
    assert "effect_other_class" in summary and not {"own_minus_other", "p_own_minus_other"} & set(summary)
    assert any("not compared" in note for note in manifest["notes"])


def test_a_class_that_moves_in_the_package_keeps_its_run_id(config, monkeypatch):
    """Users' own classes are known by their full path: two of one name are two."""
    import sys
    from types import ModuleType

    from vitpatch import corruptions
    from vitpatch.runs.setup import prepare

    class Gray(corruptions.Gray):
        """Another corruption of the same name."""

    def run_id(target):
        return prepare(config("window=1", *target)).run_id

    for name, classes in (
        ("vitpatch.elsewhere", {"Gray": corruptions.Gray, "Chain": corruptions.Chain, "Blur": corruptions.Blur}),
        ("theirs", {"Gray": Gray}),
        ("moved", {"Gray": Gray}),
    ):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(classes)
    plain = run_id(["corruption=gray"])
    assert run_id(["corruption._target_=vitpatch.elsewhere.Gray"]) == plain
    others = [run_id([f"corruption._target_={module}.Gray"]) for module in ("theirs", "moved")]
    assert len({plain, *others}) == 3
    steps = "[{_target_:vitpatch.%s.Gray},{_target_:vitpatch.%s.Blur,sigma:2}]"
    here, there = (
        run_id(["corruption=chain", "corruption.steps=" + steps % (module, module)])
        for module in ("corruptions", "elsewhere")
    )
    assert here == there != plain


def test_a_users_class_that_is_edited_is_another_run(config, tmp_path, monkeypatch):
    import sys

    from vitpatch.runs.setup import prepare

    file = tmp_path / "edited_by_its_user.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "class Darker:\n    def __call__(self, batch, seed):\n        return batch.images * {}\n"
    identities = []
    for factor, steps in ((0.5, "corruption"), (0.25, "corruption"), (0.25, "chain")):
        file.write_text(code.format(factor))
        sys.modules.pop(file.stem, None)
        target = f"{{_target_:{file.stem}.Darker}}"
        own = ["~corruption", f"+corruption={target}"]
        if steps == "chain":
            own = ["corruption=chain", f"corruption.steps=[gray,{target}]"]
        identities.append(prepare(config(*own)).identity)
    codes = [identity["corruption_code"][f"{file.stem}.Darker"] for identity in identities]
    assert codes[0] != codes[1] == codes[2]
    assert "corruption_code" not in prepare(config("corruption=gray")).identity


def test_one_question_has_one_run_id(config):
    from vitpatch.runs.setup import prepare

    assert prepare(config("window=3")).run_id == prepare(config("window=[3]")).run_id
    assert prepare(config("target.layers=0")).run_id == prepare(config("target.layers=[0]")).run_id


def test_the_run_id_is_of_donors(config):
    from vitpatch.runs.setup import prepare

    overrides = ("window=1", "controls=false"), ("window=1",), ("donor=zero",), ("donor=same_class",), (), (
        "synergy=true",)  # fmt: skip
    assert len({prepare(config(*each)).run_id for each in overrides}) == len(overrides)
    assert prepare(config("wanted_width=0.1")).run_id == prepare(config()).run_id
