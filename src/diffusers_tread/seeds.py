# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Stateless randomness: the seed of every draw follows from its purpose, so a resumed run needs no saved state."""

import hashlib


def derive_seed(*keys: int | str) -> int:
    """Hashes the keys of a draw into a seed in [0, 2**63).

    Args:
        keys: What distinguishes this draw from all others, such as the run's seed, a purpose, the step and the rank.
            Integers and strings do not collide: 1 and "1" give different seeds.

    Returns:
        The same integer on every machine and in every process.

    Example:
        >>> from diffusers_tread.seeds import derive_seed
        >>> derive_seed(0, "noise", 12) == derive_seed(0, "noise", 12) != derive_seed(0, "noise", 13)
        True
    """
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
