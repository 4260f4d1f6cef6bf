import pytest

from vitpatch.plan import make_plan
from vitpatch.spec import Direction, Site, Target, TokenGroup, VitPatchError, window_layers


@pytest.mark.parametrize(
    ("centre", "window", "layers"),
    [
        (5, 1, (5,)),
        (5, 2, (4, 5)),
        (5, 3, (4, 5, 6)),
        (5, 4, (3, 4, 5, 6)),
        (0, 3, (0, 1)),
        (11, 3, (10, 11)),
        (0, 2, (0,)),
        (6, 12, tuple(range(12))),
        (0, 12, tuple(range(6))),
    ],
)
def test_window_is_centred_and_clipped(centre, window, layers):
    assert window_layers(centre, window, depth=12) == layers


def test_the_plan_lists_the_layers_asked_for_and_reads_each_place_once():
    plan = make_plan(Target(Site.MLP_OUT, (3, 1)), 3, Direction.NOISE, depth=4)
    assert [(p.layer, p.layers, p.clipped) for p in plan.patches] == [(3, (2, 3), True), (1, (0, 1, 2), False)]
    assert plan.recorded == tuple((Site.MLP_OUT, layer) for layer in range(4))
    assert (plan.direction.donor, plan.direction.recipient) == ("corrupt", "clean")


def test_only_the_whole_residual_stream_restores_everything():
    def restores(site, tokens):
        return make_plan(Target(site, None, tokens), 1, Direction.DENOISE, 4).restores_everything

    assert restores(Site.RESID_POST, TokenGroup.ALL)
    assert not restores(Site.RESID_POST, TokenGroup.PATCHES)
    assert not restores(Site.ATTN_OUT, TokenGroup.ALL)


@pytest.mark.parametrize(("window", "layers", "says"), [(5, None, "window 5.*4 layers.*1 to 4"), (1, (4,), "0 to 3")])
def test_what_does_not_fit_the_model_is_refused(window, layers, says):
    with pytest.raises(VitPatchError, match=says):
        make_plan(Target(Site.ATTN_OUT, layers), window, Direction.DENOISE, depth=4)
