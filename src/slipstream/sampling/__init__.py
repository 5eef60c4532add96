"""Sampling: what a request may ask of it, and the choice of a token as a pure function."""

from slipstream.sampling.host import chances_of, choose_on_host
from slipstream.sampling.params import SamplingParams
from slipstream.sampling.sampler import NO_TOKEN, Choice, Row, Sampler, TokenLogprob

__all__ = ["NO_TOKEN", "Choice", "Row", "Sampler", "SamplingParams", "TokenLogprob", "chances_of", "choose_on_host"]
