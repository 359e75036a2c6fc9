"""What the online trainer reads of the spool: texts for each draft, and some that none learns from.

A conversation belongs to one student, by the same hash that cuts training data (DDD). Some are
held out, by a hash that clients cannot foresee. Each student's position in the spool moves as it
takes texts, and is kept by the trainer with the weights that came of them: so each text is learned
from once, whenever the trainer is killed.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from itertools import islice

from osd.corpus import Text
from osd.online_config import OnlineConfig
from osd.shards import is_held_out, shard_of
from osd.spool import START, Entry, Spool, order

logger = logging.getLogger(__name__)

_PAGE = 500


class Traffic:
    """Entries of a spool, dealt out to students.

    Args:
        spool: what is read.
        positions: of each student's last text.
        config: `diverse`, what is held out, how long texts may be, and how much may wait.
        vocab_size: of the target.

    Attributes:
        unusable: texts, since this was made, whose prompt leaves no token to learn from or to
            measure, or which are of another model.
    """

    def __init__(
        self, spool: Spool, positions: list[str], config: OnlineConfig, vocab_size: int
    ) -> None:
        self.unusable = 0
        # One text a conversation, the latest ones last.
        self._held_out: OrderedDict[int, Entry] = OrderedDict()
        self._salt = spool.identity()
        self._spool = spool
        self._config = config
        self._vocab_size = vocab_size
        self._skipped = 0
        self._cleared = spool.cleared()
        self.go_to(positions)

    def go_to(self, positions: list[str]) -> None:
        """Go on behind these positions, one of each student."""
        self.positions = list(positions)
        self._waiting: list[deque[Entry]] = [deque() for _ in positions]
        self._read = min(positions, key=order)
        self._held_out.clear()
        # Those that were read before, and are kept in no checkpoint.
        for entry in self._spool.newest(
            2 * self._config.held_out_one_in * self._config.held_out_texts
        ):
            if order(entry.position) <= order(self._read):
                self._keep_if_held_out(entry)

    def pull(self) -> None:
        """Read what has come."""
        self.forget_if_cleared()
        while entries := self._spool.read(self._read, _PAGE):
            for entry in entries:
                self._read = entry.position
                if not self._keep_if_held_out(entry):
                    self._deal(entry)

    def forget_if_cleared(self) -> bool:
        """Drop all that is held in memory if the spool was emptied since the last look."""
        if (cleared := self._spool.cleared()) == self._cleared:
            return False
        self._cleared = cleared
        for queue in self._waiting:
            queue.clear()
        self._held_out.clear()
        return True

    def waiting(self, student: int) -> int:
        """How many texts wait for a student."""
        return len(self._waiting[student])

    def next_texts(self, student: int, count: int) -> list[Text]:
        """A student's next texts, at most so many."""
        return [entry.text for entry in islice(self._waiting[student], count)]

    def done(self, student: int, count: int) -> None:
        """So many of a student's next texts were learned from: its position moves behind them."""
        for _ in range(count):
            self.positions[student] = self._waiting[student].popleft().position

    def all_waiting(self) -> list[int]:
        """The same for each student."""
        return [len(queue) for queue in self._waiting]

    def count_skipped(self) -> int:
        """How many texts were skipped since the last call."""
        skipped, self._skipped = self._skipped, 0
        return skipped

    def held_out_after(self, position: str | None = None) -> list[Text]:
        """Held-out texts that came behind a position; None: all that are kept."""
        after = order(position or START)
        return [entry.text for entry in self._held_out.values() if order(entry.position) > after]

    @property
    def last(self) -> str:
        """The position up to which the spool was read."""
        return self._read

    def _keep_if_held_out(self, entry: Entry) -> bool:
        key = entry.text.key
        if not is_held_out(key, self._config.held_out_one_in, self._salt):
            return False
        if not self._is_usable(entry.text, self._config.measured_tokens):
            return True
        self._held_out.pop(key, None)
        self._held_out[key] = entry
        if len(self._held_out) > self._config.held_out_texts:
            self._held_out.popitem(last=False)
        return True

    def _deal(self, entry: Entry) -> None:
        count = len(self._waiting)
        text = entry.text
        if not self._is_usable(text, self._config.max_tokens):
            return
        cut = entry
        if self._config.max_tokens < len(text.token_ids):
            # What waits is held in memory.
            ids = text.token_ids[: self._config.max_tokens]
            cut = Entry(entry.position, text.model_copy(update={"token_ids": ids}))
        own = [shard_of(entry.text.key, count)] if self._config.diverse else range(count)
        for student in own:
            if order(entry.position) <= order(self.positions[student]):
                continue  # learned from, before a restart
            queue = self._waiting[student]
            queue.append(cut)
            if len(queue) > self._config.max_backlog:
                queue.popleft()
                self._skipped += 1

    def _is_usable(self, text: Text, max_tokens: int) -> bool:
        """Whether anything is left of a text that is cut; what is in a spool may be of another
        model."""
        if text.response_start < max_tokens and max(text.token_ids) < self._vocab_size:
            return True
        if not self.unusable:
            logger.warning(
                "a text cannot be used: its answer begins at token %d, and texts are cut at %d "
                "(max_tokens, measured_tokens), or it is of another model; more are only counted",
                text.response_start,
                max_tokens,
            )
        self.unusable += 1
        return False
