"""Statistics that were gathered before (`qcompile calibrate`), given to the passes without a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.data.readers import FeedReader
from qcompile.calib.observe import Probe, Stat
from qcompile.calib.store.merge import words
from qcompile.calib.store.store import Statistics, load
from qcompile.calib.sweep.provider import Sweeps
from qcompile.errors import DataError
from qcompile.execute.session import SAMPLES
from qcompile.ir.model import Model


@dataclass
class StoredStatistics:
    """Answers probes from a file, and from `fallback` what the file does not hold."""

    statistics: Statistics
    path: str
    fallback: Sweeps | None = None

    @classmethod
    def open(cls, path: str, model: Model, fallback: Sweeps | None = None, data: Dataset | None = None) -> StoredStatistics:
        """Read a file for a compilation of `model`, with `data` if there is some too.

        Raises:
            DataError: the file is unreadable, of another model or other data, or not complete.
        """
        statistics = load(path)
        held = statistics.key
        if (digest := model.digest()) != held.model:
            raise DataError(f"{path} is of another model ({held.model[:12]}..., this is {digest[:12]}...); calibrate this one")
        if data is not None and data.fingerprint() != held.data:
            raise DataError(f"{path} was gathered on other data than {data.source}; leave --calib out, or calibrate on this data")
        if gaps := statistics.missing():
            what = words(gaps)
            raise DataError(f"{path} lacks {what}; run its calibrate command again to finish it, or merge the missing shards")
        return cls(statistics, path, fallback)

    def known(self) -> dict[Probe, Stat]:
        """Statistics of the source model itself: passes carry them as far as they can."""
        sweep = self.statistics.sweep_of(self.statistics.key.model)
        return {} if sweep is None else dict(sweep.stats)

    def collect(self, model: Model, probes: Sequence[Probe]) -> dict[Probe, Stat]:
        """The stored statistics of `model` as it is now.

        Raises:
            DataError: some are not there, and there is no data to sweep.
        """
        sweep = self.statistics.sweep_of(model.digest())
        held = {} if sweep is None else {p: sweep.stats[p] for p in probes if p in sweep.stats}
        missing = [p for p in probes if p not in held]
        if not missing:
            return held
        if self.fallback is not None:
            return held | self.fallback.collect(model, missing)
        first = missing[0]
        raise DataError(
            f"{self.path} lacks {len(missing)} of {len(probes)} statistics that the passes ask for (first: {first.observer} of"
            f" tensor {first.tensor!r}); give --calib too, or calibrate again with the same --passes, --target and --scheme"
        )

    def feeds(self) -> Dataset | None:
        """The stored samples to verify on."""
        feeds = self.statistics.feeds
        if not feeds:
            return None
        names, alone = tuple(n for n in feeds[0] if n != SAMPLES), SAMPLES in feeds[0]
        held = tuple({n: f[n] for n in names} for f in feeds)
        index = tuple(range(len(held)))  # what they hold was let through before
        return Dataset(FeedReader(held), index, names, self.path, alone=alone, masks=frozenset(names))
