# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A term of the loss in one file: it keeps the tokens after a block small."""

from dataclasses import dataclass

from diffusers_tread import LossTerm, register_loss_term


@dataclass(frozen=True, kw_only=True)
class SmallTokens(LossTerm):
    block: int
    """0-based."""

    weight: float = 0.1

    @property
    def hidden_states_at(self):
        return (self.block,)

    @classmethod
    def for_model(cls, model, *, block, weight=0.1):
        return cls(block=block, weight=weight)

    def __call__(self, record):
        return self.weight * record.hidden_states[self.block].float().square().mean(dim=(1, 2))


register_loss_term("small_tokens", SmallTokens)
