"""Scores of single blocks → what each contributes, how well cheap proxies tell it, and weights for a schedule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from progscale.contribution.cells import ALL, NONE, Target
from progscale.errors import ReportError
from progscale.report.quantities import significant
from progscale.report.record import RunRecord

if TYPE_CHECKING:
    from rich.console import RenderableType

# A weight has to be above 0; a block that adds nothing gets this share of the best one's.
LEAST_SHARE = 0.05


@dataclass(frozen=True)
class Proxies:
    """What a few steps show of each block, from low to high.

    Attributes:
        steps: that were taken.
        gradient_norm: mean over the steps of the gradient's L2 norm.
        weight_change: how far the weights moved, as a share of their norm.
    """

    steps: int
    gradient_norm: Sequence[float]
    weight_change: Sequence[float]


@dataclass(frozen=True)
class Contribution:
    """What blocks contribute.

    Attributes:
        metric: that was scored.
        higher_is_better: its direction.
        num_blocks: of each stack.
        targets: those that were run: none, blocks from low to high, all.
        scores: by target's name, a score for each seed.
        proxies: of all blocks; None where they were not measured.
    """

    metric: str
    higher_is_better: bool
    num_blocks: Mapping[str, int]
    targets: Sequence[Target]
    scores: Mapping[str, Sequence[float]]
    proxies: Proxies | None

    @property
    def blocks(self) -> list[Target]:
        """Targets that are a block."""
        return [target for target in self.targets if target.block is not None]

    def mean(self, name: str) -> float:
        """Over seeds."""
        return statistics.fmean(self.scores[name])

    def deviation(self, name: str) -> float | None:
        """Over seeds (n - 1); None for one."""
        return statistics.stdev(self.scores[name]) if len(self.scores[name]) > 1 else None

    def gain(self, name: str) -> float:
        """Score above that of embeddings and head alone; positive is better."""
        return (self.mean(name) - self.mean(NONE)) * (1 if self.higher_is_better else -1)

    @property
    def weights(self) -> list[float] | dict[str, list[float]] | None:
        """For `schedule.block_weights`: gains, their mean 1; None where not every block was run, or none gains anything.

        A block that gains nothing, or loses, has one twentieth of the best one's: the schedule needs a weight above 0.
        """
        if len(self.blocks) < sum(self.num_blocks.values()):
            return None
        gains = {target: self.gain(target.name) for target in self.blocks}
        best = max(gains.values())
        if best <= 0:
            return None
        raised = {target: max(gain, LEAST_SHARE * best) for target, gain in gains.items()}
        found: dict[str, list[float]] = {}
        for stack in self.num_blocks:
            own = [value for target, value in raised.items() if target.stack == stack]
            found[stack] = [round(value / statistics.fmean(own), 4) for value in own]
        return found if len(found) > 1 else next(iter(found.values()))

    def rank_correlation(self, proxy: str) -> float | None:
        """Spearman's correlation of a proxy with the gains; None where it is not defined."""
        if self.proxies is None or len(self.blocks) < 3:
            return None
        from scipy import stats

        every = [target.name for target in targets_in_order(self.num_blocks)]
        values = dict(zip(every, getattr(self.proxies, proxy), strict=True))
        found = float(stats.spearmanr([values[t.name] for t in self.blocks], [self.gain(t.name) for t in self.blocks]).statistic)
        return None if math.isnan(found) else found

    def proxy(self, name: str, target: Target) -> float | None:
        """Of a block."""
        if self.proxies is None or target.block is None:
            return None
        every = [other.name for other in targets_in_order(self.num_blocks)]
        return float(getattr(self.proxies, name)[every.index(target.name)])

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "num_blocks": dict(self.num_blocks),
            "without_blocks": list(self.scores[NONE]),
            "all_blocks": list(self.scores[ALL]),
            "blocks": [
                {
                    **{"name": target.name, "stack": target.stack, "block": target.block},
                    **{"scores": list(self.scores[target.name]), "mean": self.mean(target.name)},
                    **{"standard_deviation": self.deviation(target.name), "gain": self.gain(target.name)},
                    **{name: self.proxy(name, target) for name in ("gradient_norm", "weight_change")},
                }
                for target in self.blocks
            ],
            "proxy_steps": None if self.proxies is None else self.proxies.steps,
            "rank_correlation": {name: self.rank_correlation(name) for name in ("gradient_norm", "weight_change")},
            "block_weights": self.weights,
        }


def targets_in_order(num_blocks: Mapping[str, int]) -> list[Target]:
    """All blocks."""
    from progscale.contribution.cells import targets_of

    return [target for target in targets_of(num_blocks) if target.block is not None]


def contribution_of(
    runs: Mapping[str, Sequence[RunRecord]], targets: Sequence[Target], num_blocks: Mapping[str, int], proxies: Proxies | None
) -> Contribution:
    """From finished runs, by target's name."""
    first = next(iter(runs.values()))[0]
    metric = str(first.primary_metric)
    for run in (run for found in runs.values() for run in found):
        if run.metrics()[metric] is None:
            raise ReportError(f"{run.path}: its {metric} is not a finite number; run it anew with another optimizer.lr")
    scores = {name: [float(run.metrics()[metric]) for run in found] for name, found in runs.items()}
    return Contribution(metric, bool(first.about["higher_is_better"]), num_blocks, targets, scores, proxies)


def contribution_table(found: Contribution) -> RenderableType:
    """For the terminal."""
    from rich.table import Table

    table = Table(title=f"What each block contributes ({found.metric})", title_justify="left")
    for heading in ("trained beside head", found.metric, "gain", "gradient norm", "weight change"):
        table.add_column(heading, justify="left" if heading.startswith("trained") else "right")
    for target in found.targets:
        deviation = found.deviation(target.name)
        score = significant(found.mean(target.name), 4) + ("" if deviation is None else f" ± {significant(deviation, 2)}")
        proxies = [found.proxy(name, target) for name in ("gradient_norm", "weight_change")]
        words = {NONE: "no block", ALL: "every block"}.get(target.name, target.name.replace("-", " "))
        cells = ["–" if value is None else significant(value) for value in proxies]
        table.add_row(words, score, f"{found.gain(target.name):+.4f}", *cells, end_section=target.name == NONE)
    return table
