"""What the online trainer reads of the spool: texts for each draft, and some that none learns from.

A conversation belongs to one student, by the same hash that cuts training data (DDD). Some are
held out, by a hash that clients cannot foresee. Each student's position in the spool moves as it
takes texts, and is kept by the trainer with the weights that came of them: so each text is learned
from once, whenever the trainer is killed.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from osd.corpus import Text
from osd.online_config import OnlineConfig
from osd.shards import is_held_out, shard_of
from osd.spool import START, Entry, Spool, order

_PAGE = 500


class Traffic:
    """Entries of a spool, dealt out to students.

    Args:
        spool: what is read.
        positions: of each student's last text.
        config: `diverse`, what is held out, and how much may wait.
    """

    def __init__(self, spool: Spool, positions: list[str], config: OnlineConfig) -> None:
        # One text a conversation, the latest ones last.
        self._held_out: OrderedDict[int, Entry] = OrderedDict()
        self._salt = spool.identity()
        self._spool = spool
        self._config = config
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
        if (cleared := self._spool.cleared()) != self._cleared:
            self._cleared = cleared
            for queue in self._waiting:
                queue.clear()
            self._held_out.clear()
        while entries := self._spool.read(self._read, _PAGE):
            for entry in entries:
                self._read = entry.position
                if not self._keep_if_held_out(entry):
                    self._deal(entry)

    def waiting(self, student: int) -> int:
        """How many texts wait for a student."""
        return len(self._waiting[student])

    def take(self, student: int, count: int) -> list[Text]:
        """A student's next texts, at most so many; its position moves behind them."""
        queue = self._waiting[student]
        taken = [queue.popleft() for _ in range(min(count, len(queue)))]
        if taken:
            self.positions[student] = taken[-1].position
        return [entry.text for entry in taken]

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
        self._held_out.pop(key, None)
        self._held_out[key] = entry
        if len(self._held_out) > self._config.held_out_texts:
            self._held_out.popitem(last=False)
        return True

    def _deal(self, entry: Entry) -> None:
        count = len(self._waiting)
        text = entry.text
        cut = entry
        if text.response_start < self._config.max_tokens < len(text.token_ids):
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
