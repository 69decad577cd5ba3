"""The two fused primitives every compiled method runs on, and the scoring pass for teachers.

    linear_logprobs   log-probabilities at given words, log-sum-exp, entropy; autograd behind them
    linear_rowwise    full-vocabulary row programs, gradient in the forward pass
    linear_score      no-grad: at given words, own top-k, log-sum-exp, entropy

None of them holds more than one [rows, V] tile per model. They need torch and nothing else.
"""

from .head import Head
from .linear_logprobs import Score, linear_logprobs, linear_score
from .linear_rowwise import Dense, Program, linear_rowwise

__all__ = ["Dense", "Head", "Program", "Score", "linear_logprobs", "linear_rowwise", "linear_score"]
