"""An engine that calibrates instantly: it doubles numbers, rounded to 8 bits if quantised."""

from __future__ import annotations

from pathlib import Path

from deployments.load_progress import LoadProgress
from deployments.spec import Facts, ModelSpec

EIGHT_BITS = 128


class Rounding:
    runtimes = ("torch",)

    def __init__(self, precision: str) -> None:
        exact = precision == "fp32"
        self.facts = Facts("cpu", precision, not exact, 400 if exact else 100)

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Rounding:
        return cls(spec.precision)

    def warm_up(self) -> None:
        self.run([1.0])

    def prepare(self, request: float) -> float:
        return request

    def cost(self, item: float) -> int:
        return 1

    def run(self, items: list[float]) -> list[float]:
        doubled = [2 * item for item in items]
        return [round(EIGHT_BITS * each) / EIGHT_BITS for each in doubled] if self.facts.quantized else doubled

    @staticmethod
    def calibration() -> list[list[float]]:
        return [[0.1, 0.2, 0.3], [0.5]]

    @staticmethod
    def agreement(original: list[list[float]], answers: list[list[float]]) -> dict[str, float]:
        pairs = [
            pair for before, after in zip(original, answers, strict=True) for pair in zip(before, after, strict=True)
        ]
        return {"near": sum(abs(before - after) < 1 / EIGHT_BITS for before, after in pairs) / len(pairs)}
