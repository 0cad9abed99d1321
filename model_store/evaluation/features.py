"""What the encoder sees: maps of its two attentions on one photo, and where photos with each flaw lie among each other.

After figures of the paper (arXiv 2502.03649): S-DA should light up where the degradation is, C-GA where the scene is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model_store.degradations import EVALUATION, Kind, degrade
from model_store.images import as_tensor, read_rgb
from model_store.index import read_model
from service.codec.blocks import HATB
from service.codec.config import CodecConfig
from service.codec.shipped import pad_to_stride
from service.codec.transforms import Analysis, BlockStack

KINDS = (Kind.CLEAN, Kind.NOISE, Kind.RAIN, Kind.SNOW, Kind.HAZE, Kind.LOW_LIGHT, Kind.BLUR, Kind.JPEG)
_RATE = 4
_SIDE, _DIMENSIONS = 256, 20  # of the embedding: pixels of its crops, and what PCA leaves
_SEED = 3456


class Watched:
    """g_a of a model of the store as it was trained, with the outputs of both attentions of its stage at 1/8."""

    def __init__(self, store: Path, name: str | None) -> None:
        model = read_model(store, name)
        self.name = model.entry["name"]
        config = CodecConfig.from_dict(json.loads(model.description)["config"])
        self.g_a = Analysis(config).eval().requires_grad_(False)
        weights = {key[4:]: value.float() for key, value in model.tensors.items() if key.startswith("g_a.")}
        self.g_a.load_state_dict(weights)
        self.outputs: dict[str, Tensor] = {}
        stack = self.g_a.stacks[config.watched]
        assert isinstance(stack, BlockStack)
        for index, block in enumerate(stack.blocks, 1):
            assert isinstance(block, HATB)
            for label, module in (("C-GA", block.content), ("S-DA", block.degradation)):
                module.register_forward_hook(self._keep(f"{label} {index}"))

    def _keep(self, label: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self.outputs[label] = output.float()

        return hook

    def see(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, 3, H, W) in [0, 1]. Returns per block `C-GA n` and `S-DA n`, each (B, C, H/s, W/s)."""
        self.outputs.clear()
        self.g_a(pad_to_stride(x), torch.full((len(x),), _RATE - 1))
        return dict(self.outputs)


def draw_maps(watched: Watched, photo: Path, target: Path) -> None:
    """A row per kind: the photo, then the strength of each block's attentions, the root mean square over channels."""
    from matplotlib.figure import Figure

    x, rows = as_tensor(read_rgb(photo)), []
    for kind in KINDS[:6]:
        degraded = degrade(x, [(kind,)], torch.Generator().manual_seed(_SEED), EVALUATION)
        maps = {name: one.square().mean(1).sqrt()[0].numpy() for name, one in watched.see(degraded).items()}
        rows.append((kind, degraded[0].permute(1, 2, 0).numpy(), dict(sorted(maps.items()))))
    columns = 1 + len(rows[0][2])
    figure = Figure((2.6 * columns, 1.9 * len(rows)))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (kind, picture, maps) in zip(axes, rows):
        line[0].imshow(picture)
        line[0].set_title(kind.value, fontsize=8)
        for axis, (name, values) in zip(line[1:], maps.items()):
            axis.imshow(values, cmap="magma", vmin=0, vmax=float(np.quantile(values, 0.995)))
            axis.set_title(name, fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout(pad=0.4)
    figure.savefig(target, dpi=80, pil_kwargs={"quality": 80})


def draw_embedding(watched: Watched, photos: Sequence[Path], target: Path) -> float:
    """The mean and deviation of every S-DA channel, per photo and kind, on the plane that parts the kinds best.

    The plane is that of linear discriminant analysis (Fisher) after a PCA to 20 dimensions.

    Returns:
        The share of photos that the discriminant puts among their own kind when it has learned from all others.

    Raises:
        ValueError: fewer than two photos.
    """
    if len(photos) < 2:
        raise ValueError(f"expected at least two photos, got {len(photos)}")
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import LeaveOneOut, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows: list[Tensor] = []
    for index, path in enumerate(photos):
        x = as_tensor(read_rgb(path))[:, :, :_SIDE, :_SIDE].expand(len(KINDS), -1, -1, -1)
        kinds = [(kind,) for kind in KINDS]
        degraded = degrade(x, kinds, torch.Generator().manual_seed(_SEED + index), EVALUATION)
        seen = [one for name, one in watched.see(degraded).items() if name.startswith("S-DA")]
        rows.append(torch.cat([part for one in seen for part in (one.mean((2, 3)), one.std((2, 3)).log())], 1))
    features, labels = torch.cat(rows).double().numpy(), np.tile(np.arange(len(KINDS)), len(photos))
    dimensions = min(_DIMENSIONS, len(features) - 2)
    model = make_pipeline(StandardScaler(), PCA(dimensions), LinearDiscriminantAnalysis(n_components=2))
    points = model.fit_transform(features, labels)
    figure = Figure((6.4, 5.2))
    axis = figure.subplots()
    for number, kind in enumerate(KINDS):
        chosen = labels == number
        axis.scatter(points[chosen, 0], points[chosen, 1], s=14, label=kind.value, alpha=0.8)
    axis.set(title=f"{watched.name}: S-DA features of {len(photos)} photos with each flaw", xticks=[], yticks=[])
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=80)
    return float(cross_val_score(model, features, labels, cv=LeaveOneOut()).mean())
