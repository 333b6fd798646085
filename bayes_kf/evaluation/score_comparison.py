"""A score of several models: differences of every pair with intervals, and the ranking that follows."""

from collections.abc import Sequence
from typing import NamedTuple


def is_higher_better(score: str) -> bool:
    """Whether the larger value of a compared score is the better one: of the accuracy, and of AUROCs."""
    return score == "accuracy" or score.endswith("_auroc")


class Difference(NamedTuple):
    """Score of the first model minus score of the second, with an interval."""

    first: str
    second: str
    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


class Rank(NamedTuple):
    """A model's rank: one plus the number of models that are clearly better."""

    name: str
    value: float
    place: int
    tied_with: tuple[str, ...]  # models without a clear difference


class ScoreComparison(NamedTuple):
    """One score of all models, with differences and ranking."""

    score: str
    values: dict[str, float]
    differences: tuple[Difference, ...]  # of every pair
    ranking: tuple[Rank, ...]  # best first

    @property
    def best(self) -> tuple[str, ...]:
        """The models that no other model clearly beats."""
        return tuple(rank.name for rank in self.ranking if rank.place == 1)

    @property
    def leader(self) -> str:
        """The first in place, and among those the one with the best value."""
        return next(rank.name for rank in self.ranking if rank.place == 1)  # the best value may be of a lower place

    def behind(self, name: str) -> Difference:
        """The score of a model minus that of the leader."""
        pair = next(d for d in self.differences if {d.first, d.second} == {name, self.leader})
        return pair if pair.first == name else Difference(name, pair.first, -pair.value, -pair.high, -pair.low)


def ranked_comparison(score: str, values: dict[str, float], differences: Sequence[Difference]) -> ScoreComparison:
    """The comparison of one score from its values and the differences of every pair."""
    return ScoreComparison(score, values, tuple(differences), _ranking(score, values, differences))


def _ranking(score: str, values: dict[str, float], differences: Sequence[Difference]) -> tuple[Rank, ...]:
    """The ranks of the models from best to worst."""
    sign = -1 if is_higher_better(score) else 1
    ranks = []
    for name in sorted(values, key=lambda n: (sign * values[n], list(values).index(n))):
        own = [d for d in differences if name in (d.first, d.second)]
        losses = [d for d in own if d.is_clear and (sign * (d.low + d.high) > 0) == (d.first == name)]
        ties = tuple(d.second if d.first == name else d.first for d in own if not d.is_clear)
        ranks.append(Rank(name, values[name], 1 + len(losses), ties))
    return tuple(ranks)
