"""IDC, the identity consistency of the paper (section 4.1): cosine of DINOv2 features of frames and reference.

The paper names DINOv2 (Oquab et al. 2023) but neither its size, nor the crop. Here: whatever size the user's folder
holds, the whole frame at 224 x 224, the class token.

Shape legend: T pixel frames, H W pixel size, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .video import Frames

_SIDE = 224
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_BATCH = 16


def load_dino(folder: Path) -> Any:
    """DINOv2 from a local folder in the layout of transformers (config.json and model.safetensors).

    Raises ValueError for a folder that holds no such model, ImportError without transformers.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ImportError("IDC needs transformers: pip install transformers") from error
    try:
        model = AutoModel.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: not a model folder of transformers ({str(error).splitlines()[0]})") from None
    if not model.config.model_type.startswith("dinov2"):
        raise ValueError(f"{folder}: holds a {model.config.model_type} model; IDC is measured with DINOv2")
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def features(model: Any, frames: Frames) -> Tensor:
    """Class tokens [T, D], of length one, of frames [T, H, W, 3]."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _DEVIATION))
    found = []
    for piece in torch.from_numpy(np.ascontiguousarray(frames)).split(_BATCH):
        pixels = piece.permute(0, 3, 1, 2).float() / 255
        pixels = F.interpolate(pixels, (_SIDE, _SIDE), mode="bicubic", antialias=True, align_corners=False)
        found.append(model(pixel_values=(pixels - mean) / deviation).last_hidden_state[:, 0])
    return F.normalize(torch.cat(found), dim=1)


def consistency(model: Any, frames: Frames, reference: Frames) -> float:
    """IDC: mean cosine of the frames [T, H, W, 3] and the reference [H, W, 3]."""
    own = features(model, reference[None])
    return float((features(model, frames) @ own[0]).mean())
