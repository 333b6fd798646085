"""Language models: over the next token, option tokens, option texts, or the learned tokens of sequences; rewards.

Each class is an :class:`AdapterModel` of the language model itself. So ``bkf.fit``, ``KalmanFilter`` and
``Posterior.predict`` accept it like any model, and the saved adapter is an ordinary PEFT adapter of the language model.
After loading, ``posterior.with_adapter(OptionTokens(model, options))`` uses it as a classifier again. These classes
are our own.
"""

from bayes_kf.models.batch import IGNORED
from bayes_kf.models.language.labelled_tokens import LabelledTokens, labels_tokens, token_reading
from bayes_kf.models.language.learned_tokens import LearnedTokens
from bayes_kf.models.language.logits import learns_prompt
from bayes_kf.models.language.next_token import Examples, NextToken, next_token_examples
from bayes_kf.models.language.options import OptionTexts, OptionTokens, option_examples
from bayes_kf.models.language.preference_pairs import PreferencePairs, Reward, preference_examples
from bayes_kf.models.language.supervised_tokens import SupervisedTokens
from bayes_kf.models.preference_batch import randomly_ordered

__all__ = [
    "IGNORED",
    "Examples",
    "LabelledTokens",
    "LearnedTokens",
    "NextToken",
    "OptionTexts",
    "OptionTokens",
    "PreferencePairs",
    "Reward",
    "SupervisedTokens",
    "labels_tokens",
    "learns_prompt",
    "next_token_examples",
    "option_examples",
    "preference_examples",
    "randomly_ordered",
    "token_reading",
]
