"""AUROC over pairs of like length, for many resamples at once.

A sum over tokens grows with length. Where long answers are wrong more often, a detector may seem
good by counting tokens; among pairs of about the same length it cannot.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from demur.evals.bootstrap import Floats, Ints, ratio

_BLOCK = 256  # wrong answers at once


class MatchedPairs:
    """Pairs of a wrong and a right answer whose lengths differ by at most 10% of the larger.

    Args:
        wrong: shape [N].
        lengths: tokens of each answer, shape [N].
        strata: numbers, shape [N]; a pair lies in one stratum.
        weights_BN: how often each answer counts in each resample.
    """

    def __init__(
        self, wrong: NDArray[np.bool_], lengths: Ints, strata: Ints, weights_BN: Floats
    ) -> None:
        # So sorted, what pairs with a block of wrong answers lies close together.
        order = np.lexsort((lengths, strata))
        self._wrong, self._right = order[wrong[order]], order[~wrong[order]]
        # The sums of float32 are exact: whole numbers and halves, far below 2^23.
        self._wrong_weights = weights_BN[:, self._wrong].astype(np.float32)
        self._right_weights = weights_BN[:, self._right].astype(np.float32)
        self._blocks = []
        for start in range(0, len(self._wrong), _BLOCK):
            rows = slice(start, start + _BLOCK)
            one, other = self._wrong[rows, None], self._right
            gap = np.abs(lengths[one] - lengths[other])
            allowed = 10 * gap <= np.maximum(lengths[one], lengths[other])
            allowed &= strata[one] == strata[other]
            (found,) = np.nonzero(allowed.any(axis=0))
            if found.size:
                columns = slice(found[0], found[-1] + 1)
                self._blocks.append((rows, columns, allowed[:, columns]))
        self._pairs = self._count([allowed for _, _, allowed in self._blocks])

    def auroc(self, doubt: Floats) -> Floats:
        """Share of the pairs whose wrong answer has the higher doubt, ties counting half.

        Returns:
            Shape [B], NaN where there is no pair.
        """
        won = []
        for rows, columns, allowed in self._blocks:
            one, other = doubt[self._wrong[rows], None], doubt[self._right[columns]]
            won.append(allowed * ((one > other) + np.float32(0.5) * (one == other)))
        return ratio(self._count(won), self._pairs)

    def _count(self, matrices: list[NDArray[np.generic]]) -> Floats:
        """Sum over pairs of an amount times how often both answers count, shape [B]."""
        total = np.zeros(len(self._wrong_weights))
        for (rows, columns, _), matrix in zip(self._blocks, matrices, strict=True):
            per_right = self._wrong_weights[:, rows] @ matrix.astype(np.float32)
            per_right *= self._right_weights[:, columns]
            total += per_right.sum(axis=1, dtype=np.float64)
        return total
