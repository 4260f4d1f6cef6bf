"""The loop against the oracle, and the identities that must hold whatever the model."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLASSES, DEPTH, pictures
from oracle import expected, layers_of

from vitpatch.models.checkpoint import Checkpoint
from vitpatch.patching.metrics import metrics
from vitpatch.schema import EFFECTS_SCHEMA, EXAMPLES_SCHEMA


def read(folder):
    return pd.read_parquet(folder / "examples.parquet"), pd.read_parquet(folder / "effects.parquet")


def by_layer(effects, column="effect"):
    return effects.pivot(index="example_id", columns="layer", values=column).to_numpy()


def total_effect(examples, metric="prob"):
    return (examples[f"{metric}_clean"] - examples[f"{metric}_corrupt"]).to_numpy()[:, None]


@pytest.mark.parametrize("family", ["vit", "deit", "deit_with_teacher"])
@pytest.mark.parametrize(
    ("site", "window", "direction", "tokens"),
    [
        ("attn_out", 3, "denoise", "all"),
        ("attn_out", 2, "noise", "patches"),
        ("mlp_out", 1, "noise", "all"),
        ("resid_post", 1, "denoise", "cls"),
    ],
)
def test_every_number_is_the_oracles(made, patched, family, site, window, direction, tokens):
    overrides = [f"target={site}", f"window={window}", f"direction={direction}", f"target.tokens={tokens}"]
    examples, effects = read(patched(*overrides, family=family))
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures(13)])).permute(0, 3, 1, 2).float() / 255
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    gray = (pixels * luma).sum(1, keepdim=True).expand_as(pixels)
    model = Checkpoint(str(made / family)).load().model
    labels = torch.arange(13) % CLASSES
    clean, corrupt, patches = expected(
        model, family.split("_")[0], (pixels - 0.5) / 0.5, (gray - 0.5) / 0.5,
        site=site, window=window, direction=direction, tokens=tokens,
    )  # fmt: skip
    others = torch.stack([corrupt, clean])
    others[:, range(13), labels] = -torch.inf
    rivals, other_rivals = others.argmax(-1)
    assert examples["rival"].tolist() == rivals.tolist()
    assert examples["other_rival"].tolist() == other_rivals.tolist()
    for run, logits in (("clean", clean), ("corrupt", corrupt)):
        for name, want in metrics(logits, labels, rivals, other_rivals, clean).items():
            if f"{name}_{run}" in examples:
                assert examples[f"{name}_{run}"].to_numpy() == pytest.approx(want.numpy(), rel=1e-4, abs=1e-5), name
    recipient = examples[f"prob_{'corrupt' if direction == 'denoise' else 'clean'}"].to_numpy()
    for layer, logits in enumerate(patches):
        rows = effects[effects.layer == layer]
        parse_window = layers_of(layer, window, DEPTH)
        assert set(zip(rows.first_layer, rows.last_layer, rows.n_layers, strict=True)) == {
            (parse_window[0], parse_window[-1], len(parse_window))
        }
        for name, want in metrics(logits, labels, rivals, other_rivals, clean).items():
            assert rows[name].to_numpy() == pytest.approx(want.numpy(), rel=1e-4, abs=1e-5), (layer, name)
        assert rows["effect"].to_numpy() == pytest.approx(rows["prob"].to_numpy() - recipient, abs=1e-6)
    assert np.abs(effects["effect"]).max() > 0.05  # the random models answer to the patch


@pytest.mark.parametrize("target", ["attn_out", "mlp_out", "resid_post"])
def test_patching_a_run_with_itself_changes_nothing(patched, target):
    """Under ``none`` donor and recipient are the same run; matrix products of other sizes round otherwise."""
    examples, effects = read(patched("corruption=none", f"target={target}", "window=2"))
    assert np.abs(effects["effect"]).max() < 1e-6
    assert (examples["prob_clean"] == examples["prob_corrupt"]).all()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_whole_residual_stream_gives_the_total_effect_at_every_layer(patched, direction):
    examples, effects = read(patched("target=resid_post", "window=1", f"direction={direction}"))
    sign = 1 if direction == "denoise" else -1
    assert by_layer(effects) == pytest.approx(sign * total_effect(examples).repeat(DEPTH, 1), abs=1e-6)


@pytest.mark.parametrize("corruption", ["gray", "noise", "blur"])
def test_attention_of_all_layers_gives_the_total_effect(patched, corruption):
    """A ViT's classifier reads CLS, whose embedding a pixel corruption leaves alone."""
    examples, effects = read(patched("window=4", f"corruption={corruption}"))
    whole = effects[effects.n_layers == DEPTH]
    assert whole.layer.unique().tolist() == [DEPTH // 2]
    assert whole["effect"].to_numpy() == pytest.approx(total_effect(examples)[:, 0], abs=1e-6)
    partial = effects[effects.n_layers < DEPTH]
    assert np.abs(by_layer(partial) - total_effect(examples)).max() > 0.01  # the identity is not a triviality


@pytest.mark.parametrize("overrides", [("corruption=noise", "corruption.std=0.3"), ("corruption=gray",)])
def test_batch_size_changes_nothing(patched, overrides):
    whole, few, one = (read(patched(*overrides, f"batch_size={n}", folder=f"b{n}")) for n in (13, 4, 1))
    for examples, effects in (few, one):
        for got, want in ((examples, whole[0]), (effects, whole[1])):
            for column in want:
                if want[column].dtype == np.float32:
                    # probabilities and their effects within 1e-6; logits (up to 6 here) within that share of their size
                    scale = 1 if column.startswith(("prob", "effect")) else max(1.0, float(np.abs(want[column]).max()))
                    assert got[column].to_numpy() == pytest.approx(want[column].to_numpy(), abs=1e-6 * scale), column
                else:
                    assert (got[column] == want[column]).all(), column


def test_a_run_again_is_the_same_to_the_bit(patched):
    first, again = (patched("corruption=noise", folder=name) for name in "ab")
    for file in ("examples.parquet", "effects.parquet", "summary.csv"):
        assert (first / file).read_bytes() == (again / file).read_bytes(), file


def test_the_tables_have_the_contracts_columns_and_order(patched):
    folder = patched("window=3", "target.layers=[2,0]")
    assert pq.read_schema(folder / "examples.parquet").equals(EXAMPLES_SCHEMA)
    assert pq.read_schema(folder / "effects.parquet").equals(EFFECTS_SCHEMA)
    examples, effects = read(folder)
    assert set(examples.columns) == {
        *("example_id", "label", "label_name", "label_is_predicted", "rival", "other_rival", "included", "cluster"),
        *(f"{m}_{r}" for m in ("prob", "log_odds", "logit", "logit_diff", "pred") for r in ("clean", "corrupt")),
        *("kl_corrupt", "logit_diff_other_rival_clean", "logit_diff_other_rival_corrupt"),
    }
    assert effects.columns.tolist() == [
        *("example_id", "site", "layer", "head", "tokens", "window", "first_layer", "last_layer", "n_layers"),
        *("prob", "log_odds", "logit", "logit_diff", "kl", "logit_diff_other_rival", "pred", "effect"),
        *("delta_norm", "direct_log_odds", "n_tokens"),
    ]
    assert examples.example_id.tolist() == list(range(13))
    assert not examples.label_is_predicted.any()
    assert examples.label_name.tolist() == [f"class_{i % 5}" for i in range(13)]
    assert effects.example_id.tolist() == [i for i in range(13) for _ in range(2)]
    assert effects.layer.tolist() == [2, 0] * 13
    assert set(effects["head"]) == {-1} and set(effects["site"]) == {"attn_out"} and set(effects["tokens"]) == {"all"}


@pytest.mark.parametrize("metric", ["log_odds", "logit", "logit_diff", "kl"])
def test_the_headline_metric_is_the_one_asked_for(patched, metric):
    examples, effects = read(patched(f"metric={metric}", "window=1"))
    recipient = examples[f"{metric}_corrupt"].to_numpy()[:, None]
    assert by_layer(effects) == pytest.approx(by_layer(effects, metric) - recipient, abs=2e-5)
    assert np.abs(by_layer(effects)).max() > 1e-3


def test_the_rival_is_the_clean_runs_when_asked(patched):
    of_corrupt, _ = read(patched(folder="a"))
    of_clean, _ = read(patched("rival=clean", folder="b"))
    assert (of_corrupt.rival != of_clean.rival).any() and (of_clean.rival != of_clean.label).all()
