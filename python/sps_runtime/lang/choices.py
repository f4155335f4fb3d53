"""How ``select`` decides between choices whose tokens' logprobs are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

# (logprob, or None where nothing comes before; token id; text), as servers answer them
TokenLogprob = Sequence[Any]


@dataclass(frozen=True)
class ChoicesDecision:
    """Attributes:
    decision: the choice.
    meta_info: the figures it was made from.
    """

    decision: str
    meta_info: dict[str, Any] | None = None


class ChoicesSamplingMethod(ABC):
    """Chooses; subclasses may be given to ``select`` as they are."""

    @property
    def requires_unconditional_logprobs(self) -> bool:
        """Whether the choices' tokens must be scored without the prompt, too."""
        return False

    @abstractmethod
    def __call__(
        self,
        *,
        choices: list[str],
        normalized_prompt_logprobs: list[float],
        input_token_logprobs: list[list[TokenLogprob]],
        output_token_logprobs: list[list[TokenLogprob]],
        unconditional_token_logprobs: list[list[TokenLogprob]] | None = None,
    ) -> ChoicesDecision:
        """Decide. All lists have one entry for each choice, of one entry for each token."""


@dataclass(frozen=True)
class Scores:
    """What the built-in methods choose by.

    Attributes:
        means: mean logprob of each choice's tokens.
        tokens: their logprobs, by choice.
        alone: the same without the prompt; empty unless the method asks for it.
    """

    means: list[float]
    tokens: list[list[float]]
    alone: list[list[float]]


class _ByScores(ChoicesSamplingMethod):
    """Chooses by `Scores`, and reports them with figures of its own."""

    @abstractmethod
    def best(self, scores: Scores) -> tuple[int, dict[str, Any]]:
        """The choice's index, and further figures that it was made from."""

    def __call__(
        self,
        *,
        choices: list[str],
        normalized_prompt_logprobs: list[float],
        input_token_logprobs: list[list[TokenLogprob]],
        output_token_logprobs: list[list[TokenLogprob]],
        unconditional_token_logprobs: list[list[TokenLogprob]] | None = None,
    ) -> ChoicesDecision:
        figures: dict[str, Any] = {
            "normalized_prompt_logprobs": normalized_prompt_logprobs,
            "input_token_logprobs": input_token_logprobs,
            "output_token_logprobs": output_token_logprobs,
        }
        alone: list[list[float]] = []
        if self.requires_unconditional_logprobs:
            if unconditional_token_logprobs is None:
                raise ValueError("this method needs unconditional logprobs")
            figures["unconditional_token_logprobs"] = unconditional_token_logprobs
            alone = [logprobs(tokens) for tokens in unconditional_token_logprobs]
        tokens = [logprobs(tokens) for tokens in input_token_logprobs]
        index, more = self.best(Scores(normalized_prompt_logprobs, tokens, alone))
        return ChoicesDecision(choices[index], figures | more)


class TokenLengthNormalized(_ByScores):
    """The highest mean logprob of a token."""

    def best(self, scores: Scores) -> tuple[int, dict[str, Any]]:
        return _first_best(scores.means), {}


class GreedyTokenSelection(_ByScores):
    """Token by token, only the most probable choices remain.

    A choice that has ended stays in the race with its mean logprob for each further token.
    """

    def best(self, scores: Scores) -> tuple[int, dict[str, Any]]:
        length = max(len(row) for row in scores.tokens)
        matrix = [row + [fmean(row)] * (length - len(row)) for row in scores.tokens]
        return self._last_standing(matrix), {"greedy_logprob_matrix": matrix}

    @staticmethod
    def _last_standing(matrix: list[list[float]]) -> int:
        remaining = list(range(len(matrix)))
        for column in zip(*matrix, strict=True):
            best = max(column[row] for row in remaining)
            remaining = [row for row in remaining if column[row] == best]
        return remaining[0]


class UnconditionalLikelihoodNormalized(_ByScores):
    """The choice that the prompt makes more likely than it is by itself, per token."""

    @property
    def requires_unconditional_logprobs(self) -> bool:
        return True

    def best(self, scores: Scores) -> tuple[int, dict[str, Any]]:
        pairs = zip(scores.tokens, scores.alone, strict=True)
        gains = [fmean(given) - fmean(alone) for given, alone in pairs]
        return _first_best(gains), {"normalized_unconditional_prompt_logprobs": gains}


token_length_normalized = TokenLengthNormalized()
greedy_token_selection = GreedyTokenSelection()
unconditional_likelihood_normalized = UnconditionalLikelihoodNormalized()


def logprobs(tokens: Sequence[TokenLogprob]) -> list[float]:
    """The logprobs alone; 0 for a first token, which nothing comes before."""
    return [0.0 if token[0] is None else float(token[0]) for token in tokens]


def _first_best(figures: Sequence[float]) -> int:
    return max(range(len(figures)), key=figures.__getitem__)
