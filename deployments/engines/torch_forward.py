"""A sentence-transformers model as one torch module, from padded token ids to rows of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from deployments.engines.encoder import Output
from deployments.engines.inputs import Arrays


class TorchForward:
    """A pass in torch, by one thread at a time."""

    parallel = 1
    multiple = 1

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def __call__(self, batch: Arrays) -> np.ndarray:
        rows = self.model(**{name: torch.from_numpy(array).to(self.device) for name, array in batch.items()})
        array: np.ndarray = rows.float().cpu().numpy()
        if not np.isfinite(array).all():
            raise RuntimeError("the model's answer is not a number")
        return array


class Rows(nn.Module):
    """All modules of a sentence-transformers model, from padded ids to the rows named by `output`."""

    def __init__(self, model: Any, output: Output) -> None:
        super().__init__()
        self.model = model
        self.output = output
        transformer = model[0]
        self.fixed: dict[str, Any] = {"modality": "message" if "message" in transformer.modality_config else "text"}
        if transformer.transformer_task == "text-generation":
            self.fixed["logits_to_keep"] = 1
        self.width: int | None = getattr(model, "truncate_dim", None)
        """Leading dimensions that the checkpoint asks for; None: all."""
        self.counts_positions = is_causal(model) and "position_ids" in transformer._declared_forward_params

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        pooling_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        features = self.fixed | {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            features["token_type_ids"] = token_type_ids
        if self.counts_positions:  # count from each item's first token, not from the padding
            features["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        encoder, *others = self.model
        features = encoder(features)
        if pooling_mask is not None:
            features["attention_mask"] = pooling_mask
        for module in others:
            features = module(features)
        rows: torch.Tensor = features[self.output]
        return rows[..., : self.width]


def is_causal(model: Any) -> bool:
    return bool(model[0].transformer_task == "text-generation")
