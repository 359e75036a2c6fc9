"""Conversations on their way into the traffic spool. No answer waits for them."""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from osd.corpus import Text
from osd.errors import SpoolError
from osd.spool import Spool
from server import metrics

logger = logging.getLogger(__name__)

_AT_ONCE = 256
_LOOK_EVERY_S = 0.2
_TRIM_EVERY_S = 60.0
_WAITS_S = (0.2, 1.0, 5.0)  # after errors in a row; the last one from then on
_MAX_TOKENS = 2**22  # that wait, at some 36 bytes each
_KNOWN = 20_000  # texts that are remembered, so that one that comes again is not kept again


class _Batch(NamedTuple):
    texts: list[Text]
    name: str
    forgotten: int  # what `Capture._forgotten` was when they were taken


class Capture:
    """A bounded queue, and a thread that empties it into the spool.

    Args:
        open_spool: called in the thread, until it works.
        max_queued: conversations beyond it are dropped and counted.
    """

    def __init__(self, open_spool: Callable[[], Spool], max_queued: int) -> None:
        self._open = open_spool
        self._queue: queue.Queue[Text] = queue.Queue(max_queued)
        self._tokens = 0  # of what is in the queue
        self._counting = threading.Lock()
        self._known: OrderedDict[int, None] = OrderedDict()
        self._writing = threading.Lock()
        self._forgotten = 0  # how often what waited was dropped
        self._came = threading.Event()
        self._ending = threading.Event()
        self._end_by = float("inf")
        self._thread = threading.Thread(target=self._run, name="demur-capture", daemon=True)
        self.error: str | None = None  # why the spool does not take them now

    def start(self) -> None:
        self._thread.start()

    def offer(self, key: int, token_ids: list[int], response_start: int) -> None:
        """Keep a conversation, if there is room and it did not come before. Never waits."""
        if response_start < 1 or response_start >= len(token_ids):
            return  # nothing to learn from, or from nothing
        known, digest = self._known, hash((response_start, *token_ids))
        if _came_before(known, digest):
            metrics.CAPTURED.labels("repeated").inc()
            return
        try:
            self._put(Text(key=key, response_start=response_start, token_ids=token_ids))
        except queue.Full:
            known.pop(digest, None)  # it may come again
            metrics.CAPTURED.labels("dropped").inc()
        self._came.set()

    @property
    def queued(self) -> int:
        """How many wait for the spool."""
        return self._queue.qsize()

    def _put(self, text: Text) -> None:
        with self._counting:
            if self._tokens + len(text.token_ids) > _MAX_TOKENS:
                raise queue.Full
            self._queue.put_nowait(text)
            self._tokens += len(text.token_ids)

    def _get(self) -> Text:
        with self._counting:
            text = self._queue.get_nowait()
            self._tokens -= len(text.token_ids)
        return text

    def forget(self) -> int:
        """Drop what waits; how many that were. It waits for a batch that is being written."""
        with self._writing:
            self._forgotten += 1
            dropped = 0
            with suppress(queue.Empty):
                while True:
                    self._get()
                    dropped += 1
            self._known = OrderedDict()
        return dropped

    def end(self, within_s: float) -> None:
        """Write what waits, and stop; what is not written by then is counted as dropped."""
        self._end_by = time.monotonic() + within_s
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(within_s + 1)
        if left := self.forget():
            metrics.CAPTURED.labels("dropped").inc(left)
            logger.warning("%d conversations were not written to the spool: %s", left, self.error)

    def _run(self) -> None:
        spool: Spool | None = None
        batch = _Batch([], "", 0)
        failures, trimmed = 0, 0.0
        while not self._ending.is_set() or ((batch.texts or self.queued) and self._in_time()):
            try:
                spool = spool or self._open()
                batch = batch if batch.texts else self._next()
                self._write(spool, batch)
                batch = _Batch([], "", 0)
                if time.monotonic() - trimmed > _TRIM_EVERY_S:
                    spool.trim()
                    trimmed = time.monotonic()
            except Exception as error:  # the thread must outlive whatever it was
                if not isinstance(error, SpoolError):
                    logger.exception("unexpected error while writing to the spool")
                self._failed(error)
                self._ending.wait(_WAITS_S[min(failures, len(_WAITS_S) - 1)])
                failures += 1
            else:
                if self.error is not None:
                    logger.info("the spool works again")
                self.error, failures = None, 0
        metrics.CAPTURED.labels("dropped").inc(len(batch.texts))
        if spool is not None:
            spool.close()

    def _write(self, spool: Spool, batch: _Batch) -> None:
        with self._writing:
            if batch.texts and batch.forgotten == self._forgotten:
                spool.append(batch.texts, batch.name)
                metrics.CAPTURED.labels("kept").inc(len(batch.texts))

    def _in_time(self) -> bool:
        return time.monotonic() < self._end_by

    def _failed(self, error: Exception) -> None:
        metrics.SPOOL_ERRORS.inc()
        if self.error is None:
            logger.error("%s; conversations wait, and are dropped once too many do", error)
        self.error = str(error)

    def _next(self) -> _Batch:
        """What waits, at most so much; waits a moment if nothing does."""
        self._came.wait(_LOOK_EVERY_S)
        self._came.clear()
        texts: list[Text] = []
        with self._writing:  # so that `forget` finds a text in the queue, or in a batch of before
            with suppress(queue.Empty):
                while len(texts) < _AT_ONCE:
                    texts.append(self._get())
            return _Batch(texts, uuid.uuid4().hex, self._forgotten)


def _came_before(known: OrderedDict[int, None], digest: int) -> bool:
    """Whether a text is known; from now on it is."""
    before = digest in known
    known[digest] = None
    known.move_to_end(digest)
    if len(known) > _KNOWN:
        known.popitem(last=False)
    return before
