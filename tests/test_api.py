"""``vitpatch.patch`` and ``vitpatch.summarize``: the numbers of patch.py, from two tensors."""

import io
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, pictures, save_model
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

import vitpatch
from vitpatch import VitPatchError, api
from vitpatch.schema import EFFECTS_SCHEMA
from vitpatch.types import BT601_LUMA


@pytest.fixture(scope="module")
def model(made):
    return AutoModelForImageClassification.from_pretrained(made / "vit")


@pytest.fixture(scope="module")
def tensors():
    clean = torch.from_numpy(np.stack([np.asarray(p) for p in pictures(13)])).permute(0, 3, 1, 2).float() / 255
    gray = (clean * torch.tensor(BT601_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True).expand_as(clean)
    return (clean - 0.5) / 0.5, (gray - 0.5) / 0.5, torch.arange(13) % CLASSES


@pytest.mark.parametrize(
    ("overrides", "arguments"),
    [
        ((), {}),
        (("target=z", "direction=noise", "metric=kl"), dict(target="z", direction="noise", metric="kl")),
        (("target=resid_post", "window=[1,2,suffix]", "target.tokens=[cls,grid]", "target.grid=[2,2]", "rival=clean"),
         dict(target="resid_post", window=[1, 2, "suffix"], tokens=["cls", "grid"], grid=(2, 2), rival="clean")),
        (("target=q", "target.heads=joint", "target.layers=[1,3]", "metric=log_odds"),
         dict(target="q", heads="joint", layers=[1, 3], metric="log_odds")),
        (("target=v", "target.heads=[0,2]"), dict(target="v", heads=[0, 2])),
    ],
)  # fmt: skip
def test_the_numbers_are_those_of_patch_py(patched, model, tensors, overrides, arguments):
    folder = patched(*overrides, "controls=false")
    effects, summary = pd.read_parquet(folder / "effects.parquet"), pd.read_csv(folder / "summary.csv")
    table = vitpatch.patch(model, *tensors, **arguments)
    means = vitpatch.summarize(table)
    for name in EFFECTS_SCHEMA.names:
        if effects[name].dtype == np.float32:
            scale = max(1.0, float(effects[name].abs().max()))
            np.testing.assert_allclose(table[name], effects[name], atol=2e-6 * scale, rtol=0, err_msg=name)
        else:
            assert (table[name] == effects[name]).all(), name
    assert means.columns.tolist() == summary.columns.tolist()
    for name in summary:
        if summary[name].dtype == float:
            scale = max(1.0, float(summary[name].abs().max()))
            atol = 2e-3 if name in ("p", "peak_share") else 5e-5 * scale  # counts of resamples and flips
            np.testing.assert_allclose(means[name], summary[name], atol=atol, rtol=0, err_msg=name)
        else:
            assert (means[name] == summary[name]).all(), name


def test_the_model_is_left_as_it_was(made, tensors):
    model = AutoModelForImageClassification.from_pretrained(made / "vit")
    model.train()
    model.vit.layers[1].eval()

    def state():
        flags = [p.requires_grad for p in model.parameters()] + [m.training for m in model.modules()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return flags, hooks, [sorted(vars(m)) for m in model.modules()]

    before = state()
    assert any(before[0]) and not all(before[0])
    vitpatch.patch(model, *tensors)
    assert state() == before
    with pytest.raises(VitPatchError):
        vitpatch.patch(model, *tensors, window=9)
    assert state() == before


def test_a_loaded_model_is_verified_once_and_patched_many_times(made, model, tensors, monkeypatch):
    wanted, verified = vitpatch.patch(model, *tensors, target="z", window=1), []
    verify_model = vitpatch.api.verify_model
    monkeypatch.setattr(vitpatch.api, "verify_model", lambda vit: (verified.append(vit), verify_model(vit)))
    training = AutoModelForImageClassification.from_pretrained(made / "vit").train()
    vit = vitpatch.load(training)
    assert all(module.training for module in training.modules())
    for loaded in (vit, vit, vitpatch.load(str(made / "vit")), vitpatch.load(made / "vit")):
        table = vitpatch.patch(loaded, *tensors, target="z", window=1)
        pd.testing.assert_frame_equal(table, wanted, rtol=0, atol=1e-5)
    assert verified == [vit] and all(module.training for module in training.modules())
    vitpatch.patch(model, *tensors)
    assert len(verified) == 2
    with pytest.raises(VitPatchError, match=r"clean: shape .*; expected \(13, 3, 32, 32\)"):
        vitpatch.patch(vit, torch.zeros(13, 3, 8, 8), *tensors[1:])


def test_a_model_that_is_loaded_from_a_folder_is_its_users_own(made, tensors):
    one, other = vitpatch.load(made / "vit"), vitpatch.load(str(made / "vit"))
    before = vitpatch.patch(other, *tensors, window=1)
    with torch.no_grad():
        one.model.classifier.bias += torch.arange(5.0)
    assert vitpatch.patch(other, *tensors, window=1).equals(before)
    assert not vitpatch.patch(one, *tensors, window=1).equals(before)
    with pytest.raises(VitPatchError, match=r"input_size \(32, 32\): is of a loaded model"):
        vitpatch.load(made / "vit", input_size=(32, 32))


@pytest.mark.parametrize(
    ("given", "says"), [("./nowhere", "no such folder"), (torch.nn.Linear(2, 2), "got Linear"), (3, "got int")]
)
def test_what_cannot_be_loaded_is_said_in_one_line(given, says):
    with pytest.raises(VitPatchError, match=says) as error:
        vitpatch.load(given)
    assert "\n" not in str(error.value)


def test_a_hook_of_the_users_own_is_seen(model, tensors):
    before = vitpatch.patch(model, *tensors, window=1)

    def halved(module, args, output):
        output.logits = output.logits / 2
        return output

    with model.register_forward_hook(halved):
        after = vitpatch.patch(model, *tensors, window=1)
    assert after["logit"].to_numpy() == pytest.approx(before["logit"].to_numpy() / 2, abs=1e-5)
    assert vitpatch.patch(model, *tensors, window=1)["logit"].equals(before["logit"])


def test_other_hooks_forwards_and_projections_are_verified_anew(made, tensors):
    model = AutoModelForImageClassification.from_pretrained(made / "vit")

    def times(factor):
        def act(module, args, output):
            output.logits = output.logits * factor
            return output

        return act

    def logits():
        return vitpatch.patch(model, *tensors, target="z", layers=[1], heads=[0])["logit"].to_numpy()

    plain = logits()
    for factor in (2, 3):  # as many hooks, but another one
        with model.register_forward_hook(times(factor)):
            assert logits() == pytest.approx(factor * plain, abs=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert vitpatch.patch(model, *tensors)["direct_log_odds"].notna().all()
    assert logits() == pytest.approx(plain, abs=1e-6)
    block = model.vit.layers[1].attention
    with block.o_proj.register_forward_hook(lambda module, args, output: output * 2):  # as an adapter would
        table = vitpatch.patch(model, *tensors, target="z", layers=[1], heads=[0])
        whole = vitpatch.patch(model, *tensors, target="z", layers=[1], heads="joint", window=1)
    assert table["direct_log_odds"].isna().all()  # full forward passes: the weight does not say what the module does
    block.o_proj.weight.data *= 2
    block.o_proj.bias.data *= 2
    merged = vitpatch.patch(model, *tensors, target="z", layers=[1], heads=[0])
    assert table["effect"].to_numpy() == pytest.approx(merged["effect"].to_numpy(), abs=1e-5)
    assert whole["effect"].to_numpy() == pytest.approx(
        vitpatch.patch(model, *tensors, layers=[1], window=1)["effect"].to_numpy(), abs=1e-5
    )


def test_what_has_ceased_to_be_true_is_seen_in_the_run_itself(made, tensors, caplog, monkeypatch):
    """A hook that does something else than when the model was verified, or only on some images."""
    model, strength = AutoModelForImageClassification.from_pretrained(made / "vit"), [1.0]

    def steered(module, args, output):
        output.last_hidden_state = output.last_hidden_state * strength[0]
        return output

    def of_negatives(module, args, kwargs):
        images = kwargs["pixel_values"]
        return args, kwargs | {"pixel_values": images.where(images >= 0, images / 2)}

    with model.vit.register_forward_hook(steered):
        vit = vitpatch.load(model)
        assert vitpatch.patch(vit, *tensors)["direct_log_odds"].notna().all()
        strength[0] = 0.5
        table = vitpatch.patch(vit, *tensors)
        assert table["direct_log_odds"].isna().all() and vit.stepwise  # the next call looks for itself
        execute = api.execute

        def interrupted(plan, model, *rest):
            if not model.stepwise:
                raise KeyboardInterrupt
            return execute(plan, model, *rest)

        with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
            once.setattr(api, "execute", interrupted)
            vitpatch.patch(vit, *tensors)
        assert vit.stepwise
        pd.testing.assert_frame_equal(vitpatch.patch(model, *tensors), table, rtol=0, atol=1e-5)
        for run, pixels in zip(("clean", "corrupt"), tensors, strict=False):
            want = model(pixels).logits.double().softmax(-1)[range(13), tensors[2]]
            got = table.drop_duplicates("example_id")[f"prob_{run}"].to_numpy()
            assert got == pytest.approx(want.detach().numpy(), abs=1e-5)
    assert "every patch is a full forward pass" in caplog.text
    plain = vitpatch.patch(model, *tensors)["prob"]
    forward = type(model.vit).forward
    with pytest.MonkeyPatch.context() as patching:  # on the class
        patching.setattr(type(model.vit), "forward", lambda self, *a, **k: steered(self, a, forward(self, *a, **k)))
        table = vitpatch.patch(model, *tensors)
        want = model(pixel_values=tensors[0]).logits.double().softmax(-1)[range(13), tensors[2]]
        got = table.drop_duplicates("example_id")["prob_clean"].to_numpy()
        assert got == pytest.approx(want.detach().numpy(), abs=1e-5)
    assert vitpatch.patch(model, *tensors)["prob"].equals(plain)
    with model.register_forward_pre_hook(of_negatives, with_kwargs=True):
        table = vitpatch.patch(model, *tensors)
        want = model(pixel_values=tensors[0]).logits.double().softmax(-1)[range(13), tensors[2]]
    got = table.drop_duplicates("example_id")["prob_clean"].to_numpy()
    assert got == pytest.approx(want.detach().numpy(), abs=1e-5)


def test_clusters_and_masks(model, tensors):
    clean, corrupt, labels = tensors
    masks = torch.zeros(13, 1, 32, 32)
    masks[:, :, :, :16] = 1
    masks[0] = 0
    table = vitpatch.patch(model, *tensors, tokens=["object", "random_object"], masks=masks, clusters=[0] * 6 + [1] * 7)
    assert set(table["n_tokens"]) == {0, 8} and (table[table.example_id == 0]["effect"].abs() < 1e-6).all()
    assert vitpatch.summarize(table)["n_clusters"].unique().tolist() == [2]
    other = vitpatch.patch(model, clean[1:4], corrupt[1:4], labels[1:4], tokens="random_object", masks=masks[1:4],
                           ids=[1, 2, 3])  # fmt: skip
    same = table[(table.tokens == "random_object") & table.example_id.isin([1, 2, 3])]
    assert other["prob"].to_numpy() == pytest.approx(same["prob"].to_numpy(), abs=2e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(target="attention"), "target 'attention': expected one of resid_pre, attn_out"),
        (dict(window="all"), "window 'all': expected a whole number, 1 or more, prefix, suffix"),
        (dict(window=0), "window 0: expected"),
        (dict(window=[]), "window"),
        (dict(tokens=[]), "tokens: empty"),
        (dict(tokens="object"), "object masks"),
        (dict(tokens="grid"), r"^tokens grid: .* for instance grid=\[4,4\]"),
        (dict(heads=[9], target="z"), "^heads 9: .*0 to 3"),
        (dict(direction="up"), "direction 'up'"),
        (dict(memory_gb=0), "memory_gb 0"),
        (dict(memory_gb=1e-6), "memory_gb 1e-06: one image of this plan"),
        (dict(metric="loss"), "metric 'loss'"),
        (dict(ids=[1] * 13), "ids: expected 13 different"),
        (dict(ids=range(-1, 12)), "ids: expected 13 different numbers, 0 or more"),
        (dict(seed=-1), "seed -1"),
        (dict(clusters=[0]), "clusters: 1 of them, 13 images"),
        (dict(labels=["cat"] * 13), "labels .*expected a list of whole numbers"),
        (dict(labels=[0.9] * 13), "labels .*expected a list of whole numbers"),
        (dict(labels=3), "labels .*expected a list of whole numbers"),
        (dict(window=1.5), "window 1.5"),
        (dict(window=[[1, 3]]), "window .1, 3.: expected"),
        (dict(tokens=3), "tokens 3: expected one of all"),
        (dict(layers="all"), "layers 'all': expected a list"),
        (dict(target="z", heads="some"), "heads 'some': expected a list"),
        (dict(target="z", heads=[True]), "heads .*expected a list"),
        (dict(tokens="grid", grid=(0, 2)), r"grid \(0, 2\): expected \(rows, columns\)"),
        (dict(tokens="grid", grid=4), "grid '4': expected a list"),
        (dict(clean=np.zeros((13, 3, 32, 32))), "clean: got ndarray; expected a tensor"),
        (dict(clean=torch.zeros(13, 3, 32, 32, dtype=torch.uint8)), "clean: got torch.uint8; expected normalised"),
        (dict(grid=(2, 2)), r"^grid \[2, 2\]: is only of tokens=grid"),
        (dict(corrupt=torch.full((13, 3, 32, 32), torch.nan)), "corrupt: not finite"),
        (dict(masks=torch.full((13, 1, 32, 32), 255.0)), "masks: values 255 to 255; expected 0 to 1"),
        (dict(masks=torch.zeros(2, 1, 32, 32)), r"masks: shape \(2, 1, 32, 32\); expected \(13, 1"),
        (dict(labels=torch.full((13,), 7)), "labels 7 to 7: the model has 5 classes"),
        (dict(labels=[]), "clean: shape .* for 0 labels"),
        (dict(clean=torch.zeros(13, 3, 8, 8)), r"clean: shape \(13, 3, 8, 8\); expected \(13, 3, 32, 32\)"),
        (dict(model=torch.nn.Linear(2, 2)), "got Linear; expected a Hugging Face image classifier"),
        (dict(model="google/vit"), "got str"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(model, tensors, change, says):
    arguments = dict(model=model, clean=tensors[0], corrupt=tensors[1], labels=tensors[2]) | change
    with pytest.raises(VitPatchError, match=says) as error:
        vitpatch.patch(**arguments)
    assert "\n" not in str(error.value)


def test_another_family_is_refused_with_the_known_ones(tensors):
    resnet = ResNetForImageClassification(ResNetConfig(depths=[1] * 4, hidden_sizes=[8] * 4, embedding_size=8))
    with pytest.raises(VitPatchError, match="'resnet' is not a known family; nearest known: DeiT"):
        vitpatch.patch(resnet, *tensors)


def test_summarize_does_not_mind_the_order_and_refuses_what_is_not_one_table(model, tensors):
    clean, corrupt, labels = tensors
    table = vitpatch.patch(model, *tensors, window=[1, 3])
    means = vitpatch.summarize(table)
    shuffled = vitpatch.summarize(table.sample(frac=1, random_state=0))
    wanted = shuffled.set_index(["window", "layer"]).loc[list(zip(means["window"], means["layer"], strict=True))]
    np.testing.assert_allclose(wanted["effect"], means["effect"], atol=1e-12)
    np.testing.assert_allclose(wanted["recovered_low"], means["recovered_low"], atol=1e-12)
    halves = [vitpatch.patch(model, clean[h], corrupt[h], labels[h], window=[1, 3], ids=range(13)[h])
              for h in (slice(0, 5), slice(5, 13))]  # fmt: skip
    np.testing.assert_allclose(vitpatch.summarize(pd.concat(halves))["effect"], means["effect"], atol=1e-6)
    with pytest.raises(VitPatchError, match=r"two rows of example_id 0, layer 0; .*give each its own ids"):
        vitpatch.summarize(pd.concat([table, table]))
    with pytest.raises(VitPatchError, match="103 rows for 13 images and 8 patches"):
        vitpatch.summarize(table.iloc[1:])


def test_a_float64_model_is_run_by_its_parts(made, tensors):
    model = AutoModelForImageClassification.from_pretrained(made / "vit")
    wanted = vitpatch.patch(model, *tensors)
    table = vitpatch.patch(model.double(), *tensors)
    assert table["direct_log_odds"].notna().all()
    np.testing.assert_allclose(table["effect"], wanted["effect"], atol=1e-5)


def test_the_default_window_fits_a_model_of_one_layer(tensors, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(save_model(tmp_path / "one", "vit", num_hidden_layers=1))
    assert set(vitpatch.patch(model, *tensors)["window"]) == {1}


def test_summarize_wants_the_table_of_patch(model, tensors):
    with pytest.raises(VitPatchError, match="lacks cluster"):
        vitpatch.summarize(vitpatch.patch(model, *tensors).drop(columns="cluster"))


def test_a_bar_shows_how_many_images_are_done_where_somebody_watches(model, tensors, monkeypatch):
    """In a terminal or a notebook, unless ``progress`` is false."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown(stream, **more):
        monkeypatch.setattr("sys.stderr", stream)
        vitpatch.patch(model, *tensors, layers=[0], **more)
        return stream.getvalue()

    assert "0/13 [" in shown(Terminal()) and not shown(Terminal(), progress=False) and not shown(io.StringIO())
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert "patching:" in shown(io.StringIO())
