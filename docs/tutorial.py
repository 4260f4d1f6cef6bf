# %% [markdown]
# # Where does a vision transformer use colour?
#
# `vitpatch` answers such questions by *activation patching*. An image is run twice, clean and corrupted; then what some
# layers compute in the clean run is put into the corrupted one. If the true class gains by it, these layers carry what
# the corruption took away.
#
# This tutorial does it in Python, on the model and the images that ship with the package: a transformer of 12 layers
# that tells nine kinds of emoji apart. Nothing is downloaded. The notebook is made of `docs/tutorial.py`; every number
# and picture comes from its cells.

# %%
import pandas as pd
from datasets import Dataset
from IPython.display import Image
from matplotlib import pyplot as plt

import vitpatch

vit = vitpatch.load(f"{vitpatch.ASSETS}/emoji_vit")
data = Dataset.from_parquet(f"{vitpatch.ASSETS}/emoji/test.parquet")[:128]

# %% [markdown]
# ## Corrupting images
#
# `vitpatch.corrupt` takes each corruption by its name; a wrong name is answered with the list of all. Given the model,
# it also brings the images to the size and scale that the model wants. The clean images are those of the corruption
# that does nothing, `none`.

# %%
images = {name: vitpatch.corrupt(name, data["image"], model=vit) for name in ("none", "gray", "noise")}

figure, rows = plt.subplots(3, 1, figsize=(6, 2.6), layout="constrained")
for axes, (name, pixels) in zip(rows, images.items(), strict=True):
    side_by_side = (pixels[:10] * vit.std + vit.mean).permute(2, 0, 3, 1).flatten(1, 2)
    axes.imshow(side_by_side.clamp(0, 1))
    axes.set(ylabel=name, xticks=[], yticks=[])

# %% [markdown]
# ## From model to picture
#
# `vitpatch.patch` puts what attention adds in the clean run into the corrupted run, three layers at a time, and returns
# one row an image and place. `vitpatch.show` says what the table says: the finding in sentences, the profile, and the
# means with their intervals. Skin tones of one emoji are not independent images, so they are one cluster.

# %%
clusters = pd.factorize(pd.Series(data["base"]))[0]
shown = {}
for name in ("gray", "noise"):
    table = vitpatch.patch(vit, images["none"], images[name], data["label"], clusters=clusters)
    shown[name] = vitpatch.show(table)
shown["gray"]

# %% [markdown]
# The dashed line is all that could be restored; 0 is what the corrupted run has by itself. Colour is not used in one
# place: no gain is shown in the first two layers, and then nearly every window of three layers restores a part of it,
# up to the last. Rings mark the layers that may be the peak. A finding never says more than its intervals: where many
# layers are about equal, it names them all.
#
# Noise is another matter.

# %%
shown["noise"]

# %% [markdown]
# Two corruptions do not do the same damage, so it is the *shares* of it that compare:

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for name, one in shown.items():
    axes.plot(one.summary["layer"], one.summary["recovered"], "o-", label=name)
axes.set(xlabel="layer (the centre of a window of 3)", ylabel="share of the total effect recovered")
axes.axhline(0, color="black", linewidth=0.8)
_ = axes.legend(frameon=False)

# %% [markdown]
# So they are undone in different places: already the first windows restore a part of what noise takes away, those at
# layers 1 to 5 most, while there nothing is shown of colour at layers 0 and 1. From layer 6 on colour's share is the
# larger one.
#
# ## Which heads?
#
# The same question by head: `z` is what a head hands to the output projection, and heads are patched one at a time.

# %%
heads = vitpatch.patch(vit, images["none"], images["noise"], data["label"], "z", clusters=clusters)
vitpatch.show(heads)

# %% [markdown]
# A single head restores little; the work is spread over many. The intervals of the finding hold for all heads at once,
# so that a head which it names was not simply the luckiest of many.
#
# ## A finished run in another metric
#
# Longer studies are better run by the command, which keeps what it computes, goes on where it was stopped, and has
# sweeps. This one asks where the colour moves from the image's patches to the CLS token, which the classifier reads.

# %%
# !vitpatch corruption=gray target=handover window=1 data.limit=128 logger=none hydra.run.dir=run > log 2>&1 || cat log

# %%
run = vitpatch.load_run("run")
vitpatch.show(run)

# %% [markdown]
# Every metric is stored, so the run is read in another one without the model. In log odds, confident and unsure images
# count alike:

# %%
print(*run.read(metric="log_odds").finding, sep="\n")

# %% [markdown]
# ## A figure for a paper
#
# `save` writes the picture as PNG, SVG or PDF, with a width in inches in words and marks that fit it; in a PDF text is
# text. Here it is one column wide and has no title, which the caption will say; the lines on top say of how many images
# it is. For anything else, `vitpatch.plot` draws on axes of your own.

# %%
shown["noise"].save("profile.pdf", width=3.3, title="")
shown["noise"].save("profile.png", width=3.3, title="", dpi=110)
Image("profile.png")

# %% [markdown]
# ## Your own
#
# `vitpatch.load` takes any image classifier of the known families, by its folder or its name on the hub, and
# `vitpatch.corrupt` takes PIL images, arrays and tensors. `help(vitpatch.patch)` has all sites, token groups and
# windows; the README has the commands.
