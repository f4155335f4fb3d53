"""Grammar masks, found beside the forward: matching needs the tokens before a step, not its logits.

One thread a rank; the matcher's work runs without the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.model import ModelConfig
from sps_runtime.grammar.backends import load_vocabulary, make_backend
from sps_runtime.grammar.matchers import Matchers
from sps_runtime.grammar.protocol import Allowed, GrammarBackend, GrammarError
from sps_runtime.types.errors import ConfigError
from sps_runtime.types.plan import StepPlan
from sps_runtime.types.tokens import pack_ids

Masks = Mapping[int, Allowed | GrammarError]
"""By index in the plan: which ids a sequence under a grammar may have next, or why none."""

NO_MASKS: Masks = {}


class GrammarMasks:
    """One rank's.

    Args:
        matchers: None where this engine has no grammars.
    """

    def __init__(self, matchers: Matchers | None = None) -> None:
        self._matchers = matchers
        self._thread = ThreadPoolExecutor(1, "grammar")

    def begin(
        self, plan: StepPlan, sequences: Sequence[int], board_tokens: Mapping[int, int]
    ) -> Callable[[], Masks]:
        """Start to find the masks of some sequences of a plan; call the result to wait for them.

        Args:
            sequences: indices of those that this rank samples.
            board_tokens: ids that this step read from the board, by index.
        """
        constrained = [index for index in sequences if _grammar(plan, index)]
        if not constrained:
            return lambda: NO_MASKS
        return self._thread.submit(self._find, plan, constrained, board_tokens).result

    def _find(
        self, plan: StepPlan, sequences: Sequence[int], board_tokens: Mapping[int, int]
    ) -> Masks:
        return {index: self._one(plan, index, board_tokens.get(index)) for index in sequences}

    def _one(self, plan: StepPlan, index: int, board_token: int | None) -> Allowed | GrammarError:
        sequence = plan.sequences[index]
        if self._matchers is None or sequence.sample is None:
            return GrammarError("this engine has no grammars")
        generated = sequence.sample.generated
        if board_token is not None:
            generated += pack_ids((board_token,))
        try:
            return self._matchers.allowed(sequence.slot, _grammar(plan, index), generated)
        except (GrammarError, ConfigError) as error:
            return GrammarError(str(error))


def _grammar(plan: StepPlan, index: int) -> str:
    sample = plan.sequences[index].sample
    return sample.params.grammar if sample is not None else ""


def open_masks(engine: EngineConfig, model: ModelConfig) -> GrammarMasks:
    """The masks of an engine's rank."""
    return GrammarMasks(open_matchers(engine, model))


def open_matchers(engine: EngineConfig, model: ModelConfig) -> Matchers | None:
    """The matchers of an engine's rank, None where it has no grammars. The backend is made when the
    first grammar comes."""
    if engine.grammar_backend == "none":
        return None

    def make() -> GrammarBackend:
        path = engine.tokenizer_path or engine.model_path
        vocabulary = load_vocabulary(path, model.vocab_size, model.eos_token_ids)
        return make_backend(engine.grammar_backend, vocabulary)

    return Matchers(make)
