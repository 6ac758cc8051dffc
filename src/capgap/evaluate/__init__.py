"""How good a model is on held-out text."""

from capgap.evaluate.perplexity import Nats, Score, evaluate, evaluate_nats

__all__ = ["Nats", "Score", "evaluate", "evaluate_nats"]
