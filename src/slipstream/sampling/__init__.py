"""Sampling: what a request may ask of it, and the choice of a token as a pure function."""

from slipstream.sampling.host import chances_of, choose_on_host
from slipstream.sampling.params import SamplingParams
from slipstream.sampling.sampler import Choice, Row, Sampler, TokenLogprob

__all__ = ["Choice", "Row", "Sampler", "SamplingParams", "TokenLogprob", "chances_of", "choose_on_host"]
