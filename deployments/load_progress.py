"""Progress of a load, as events with messages in Korean and English."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

Status = Literal["preparing", "loading_tokenizer", "loading_checkpoint", "loaded", "ready", "failed"]
ORDER: tuple[Status, ...] = get_args(Status)

PREPARING, TOKENIZER, LOADED, READY = 15.0, 25.0, 85.0, 100.0
CHECKPOINT_SHARE = (LOADED - TOKENIZER) / 100


@dataclass(frozen=True)
class LoadEvent:
    """One step of a load. `progress` is in percent; `shard` of `shards` shards are complete."""

    status: Status
    progress: float
    message: str
    message_ko: str
    shard: int | None = None
    shards: int | None = None

    def as_ready(self) -> LoadEvent:
        """The final event of the same load."""
        return replace(self, status="ready", progress=READY, message="Ready", message_ko="준비 완료")


class LoadProgress:
    """Turns the steps of a load into events. Status and percentage never go back, even if something is loaded again."""

    def __init__(self, publish: Callable[[LoadEvent], None]) -> None:
        self._publish = publish
        self._lock = threading.Lock()
        self._last: LoadEvent | None = None

    def preparing(self) -> None:
        self._emit("preparing", PREPARING, "Preparing files", "파일 준비 중")

    def waiting(self, what: str) -> None:
        """Report that the load waits for another server."""
        self._emit("preparing", PREPARING, f"Waiting: {what}", f"대기 중: {what}")

    def tokenizer(self) -> None:
        self._emit("loading_tokenizer", TOKENIZER, "Loading the tokenizer", "토크나이저 로드 중")

    def checkpoint(self, percent: float, shard: int, shards: int) -> None:
        """Report that `percent` of the checkpoint's bytes, and `shard` of its `shards` files, are in memory."""
        self._emit(
            "loading_checkpoint",
            TOKENIZER + percent * CHECKPOINT_SHARE,
            f"Loading checkpoint {shard}/{shards}... {percent:.0f}%",
            f"체크포인트 로드 중 {shard}/{shards}... {percent:.0f}%",
            shard,
            shards,
        )

    def loaded(self) -> None:
        self._emit("loaded", LOADED, "Model loaded, warming up", "모델 로드 완료, 워밍업 중")

    def measuring(self) -> None:
        self._emit("loaded", LOADED, "Measuring precision", "정밀도 측정 중")

    def ready(self) -> None:
        self._emit("ready", READY, "Ready", "준비 완료")

    def failed(self, reason: str) -> None:
        self._emit("failed", 0.0, f"Failed: {reason}", f"실패: {reason}")

    def relay(self, event: LoadEvent) -> None:
        """Pass on a step of this load from another process."""
        self._emit(event.status, event.progress, event.message, event.message_ko, event.shard, event.shards)

    def _emit(
        self,
        status: Status,
        progress: float,
        message: str,
        message_ko: str,
        shard: int | None = None,
        shards: int | None = None,
    ) -> None:
        with self._lock:
            last = self._last
            if last is not None:
                if ORDER.index(status) < ORDER.index(last.status):
                    return
                progress = max(progress, last.progress)
                if shards is None and status != "failed":
                    shard, shards = last.shard, last.shards
            event = LoadEvent(status, round(progress, 1), message, message_ko, shard, shards)
            if event == last:
                return
            self._last = event
            self._publish(event)
