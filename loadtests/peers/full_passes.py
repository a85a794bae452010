"""The algorithm that Dure replaces, in its plain form: a full forward pass for each token of each candidate, one
request at a time, with nothing kept between passes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from deployments.engines.predictor import SPECIALS


class FullPasses:
    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **SPECIALS)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.tokens = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        self.special = set(self.tokenizer.all_special_ids)
        self.passes = 0

    @torch.inference_mode()
    def predict(self, text: str, top_k: int = 5, temperature: float = 0.8) -> list[tuple[str, float]]:
        """Words and confidences, best first."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)[-128:]
        first = torch.softmax(self._logits(ids) / temperature, -1)
        candidates = torch.topk(first, min(3 * top_k, 50))
        words: dict[str, float] = {}
        for token, probability in zip(candidates.indices.tolist(), candidates.values.tolist(), strict=True):
            if token not in self.special:
                word, confidence = self._whole_word(ids, token, probability)
                words[word] = max(confidence, words.get(word, 0.0))
        return sorted(words.items(), key=lambda pair: -pair[1])[:top_k]

    def _whole_word(self, ids: list[int], token: int, confidence: float) -> tuple[str, float]:
        word = [token]
        while len(word) < 10:
            probability, best = torch.softmax(self._logits(ids + word), -1).max(-1)
            token = int(best)
            if self.tokens[token].startswith("▁") or token in self.special:
                break
            word.append(token)
            confidence *= float(probability)
        return "".join(self.tokens[each] for each in word).replace("▁", ""), confidence

    def _logits(self, ids: list[int]) -> torch.Tensor:
        self.passes += 1
        logits: torch.Tensor = self.model(torch.tensor([ids])).logits[0, -1].float()
        return logits
