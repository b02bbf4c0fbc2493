# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What is true of a scan in both directions, and of one whose tokens skip it, against the recurrence of Mamba-2.

S_t = exp(a_t) S_{t-1} + x_t (x) b_t, y_t = S_t c_t (arXiv 2405.21060). Shapes: B batch, L tokens, H heads, P channels
of a head, S of the state; a direction is 0 (forward) or 1 (backward).
"""

import pytest
import torch
import torch.nn.functional as F
from closeness import difference, rounding

from diffusers_tread.models.mamba_tread_2d import TREADMamba2Mixer, _find_kernel, _scan_by_kernel, bidirectional_scan


BATCH, HEADS, CHANNELS, STATES = 2, 3, 4, 5


def sequences(length, *, decay=1.0, dtype=torch.float64):
    """x [B, L, H, P], time steps and log decays [B, L, 2, H], b and c [B, L, 2, S]."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(BATCH, length, *shape, generator=generator, dtype=torch.float64)

    x, b, c = normal(HEADS, CHANNELS), normal(2, STATES), normal(2, STATES)
    time_step, log_decay = normal(2, HEADS).sigmoid(), -decay * normal(2, HEADS).sigmoid()
    return [tensor.to(dtype) for tensor in (x, time_step, log_decay, b, c)]


def recurrence(x, time_step, log_decay, b, c):
    """One direction with the token itself; time steps and log decays [B, L, H], b and c [B, L, S]."""
    state, outputs = torch.zeros(x.shape[0], *x.shape[2:], b.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        written = torch.einsum("bh,bhp,bs->bhps", time_step[:, t], x[:, t], b[:, t])
        state = log_decay[:, t].exp()[..., None, None] * state + written
        outputs.append(torch.einsum("bhps,bs->bhp", state, c[:, t]))
    return torch.stack(outputs, dim=1)


def both_recurrences(x, *others):
    """Forward plus reversed backward, with the token itself in both."""
    backward = recurrence(x.flip(1), *(one[:, :, 1].flip(1) for one in others)).flip(1)
    return recurrence(x, *(one[:, :, 0] for one in others)) + backward


def own_parts(x, time_step, log_decay, b, c):
    """What a token reads of what it wrote itself, in both directions together."""
    return (time_step * (b * c).sum(-1, keepdim=True)).sum(2).unsqueeze(-1) * x


def quadratic(x, time_step, log_decay, b, c):
    """Both directions as a matrix of tokens by tokens, each entry by itself."""
    length, y = x.shape[1], torch.zeros_like(x)
    for t in range(length):
        for s in range(length):
            if s == t:
                continue
            d, passed = (0, slice(s + 1, t + 1)) if s < t else (1, slice(t, s))
            weight = log_decay[:, passed, d].sum(1).exp() * time_step[:, s, d]  # B H
            y[:, t] += (weight * (c[:, t, d] * b[:, s, d]).sum(-1, keepdim=True)).unsqueeze(-1) * x[:, s]
    return y


def assert_equal_within(found, expected, limit):
    assert (found - expected).abs().max() <= limit * expected.abs().max()


# 1. Three forms of one function.


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 50, 64, None])
def test_recurrence_quadratic_and_chunked_forms_agree(chunk_size):
    given = sequences(50)
    expected = both_recurrences(*given) - own_parts(*given)
    assert_equal_within(quadratic(*given), expected, 1e-12)
    assert_equal_within(bidirectional_scan(*given, chunk_size=chunk_size), expected, 1e-12)


def test_long_sequences_are_cut_and_padded():
    given = sequences(150)
    assert_equal_within(bidirectional_scan(*given), both_recurrences(*given) - own_parts(*given), 1e-12)


def test_the_gradient_is_that_of_finite_differences():
    given = [tensor[:1].requires_grad_() for tensor in sequences(5)]
    assert torch.autograd.gradcheck(lambda *args: bidirectional_scan(*args, chunk_size=2), given)


# 2. Each direction sees one side only.


@pytest.mark.parametrize("chunk_size", [8, 32])
def test_a_direction_sees_one_side_only_to_the_last_bit(chunk_size):
    x, time_step, log_decay, b, c = sequences(32)
    changed = x.clone()
    changed[:, 20] += 1
    for direction, unseen, seen in ((0, slice(0, 21), 21), (1, slice(20, None), 19)):
        only = c.clone()
        only[:, :, 1 - direction] = 0
        before, after = (
            bidirectional_scan(one, time_step, log_decay, b, only, chunk_size=chunk_size) for one in (x, changed)
        )
        assert torch.equal(before[:, unseen], after[:, unseen])
        assert (before[:, seen] != after[:, seen]).any()


# 3. The diagonal.


def test_a_token_reads_itself_only_through_d():
    x, *others = sequences(1)
    assert not bidirectional_scan(x, *others).any()
    mixer = TREADMamba2Mixer(8, expand=2, head_dim=4, state_size=3, conv_kernel=1, norm_eps=1e-6)
    mixed = torch.randn(2, 1, mixer.splits[1])
    scanned = mixer._scan(mixed, torch.randn(2, 1, mixer.splits[2]))
    assert torch.equal(scanned, mixed[..., :16])  # D starts as 1


# 4. What "skipping" means in a scan.


def removed_and_kept():
    kept = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:20].sort().values
    removed = torch.ones(40, dtype=torch.bool).index_fill_(0, kept, False)
    return removed, kept


def test_a_sorted_gather_is_the_dense_scan_without_input_and_decay_of_the_removed():
    (x, time_step, log_decay, b, c), (removed, kept) = sequences(40), removed_and_kept()
    gathered = bidirectional_scan(*(one[:, kept] for one in (x, time_step, log_decay, b, c)), chunk_size=8)
    x[:, removed], log_decay[:, removed] = 0, 0
    assert_equal_within(gathered, bidirectional_scan(x, time_step, log_decay, b, c, chunk_size=8)[:, kept], 1e-12)


def test_a_gather_that_carries_decays_over_gaps_is_the_dense_scan_without_input_of_the_removed():
    (x, time_step, log_decay, b, c), (removed, kept) = sequences(40), removed_and_kept()
    carried = log_decay[:, kept].clone()
    edges = [-1, *kept.tolist(), 40]
    for index, (last, here, following) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        carried[:, index, 0] = log_decay[:, last + 1 : here + 1, 0].sum(1)
        carried[:, index, 1] = log_decay[:, here:following, 1].sum(1)
    gathered = bidirectional_scan(*(one[:, kept] for one in (x, time_step)), carried, b[:, kept], c[:, kept])
    x[:, removed] = 0
    assert_equal_within(gathered, bidirectional_scan(x, time_step, log_decay, b, c)[:, kept], 1e-12)


# 5 and 6. Order.


def test_order_matters_through_decays_alone():
    x, time_step, log_decay, b, c = sequences(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    # The same in both directions.
    time_step, b, c = (one[:, :, :1].expand(-1, -1, 2, -1) for one in (time_step, b, c))

    def error(log_decay):
        given = x, time_step, log_decay, b, c
        shuffled, expected = bidirectional_scan(*(one[:, order] for one in given)), bidirectional_scan(*given)
        return difference(shuffled, expected[:, order])

    assert error(torch.zeros_like(log_decay)) < 1e-12
    assert error(log_decay) > 0.1


# 7. Precision.


@pytest.mark.parametrize("chunk_size, limit", [(64, 1e-5), (128, 5e-5)])
def test_float32_holds_under_strong_decay(chunk_size, limit):
    """Up to exp(-8) a token; what is lost is that of differences of sums, which grow with the chunk."""
    given = sequences(256, decay=8.0)
    expected = both_recurrences(*given) - own_parts(*given)
    found = bidirectional_scan(*(one.float() for one in given), chunk_size=chunk_size)
    assert difference(found, expected) < limit


def test_a_scan_under_autocast_stays_in_float32():
    mixer = TREADMamba2Mixer(8, expand=2, head_dim=4, state_size=3, conv_kernel=1, norm_eps=1e-6)
    mixed, time_step = torch.randn(2, 9, mixer.splits[1]), torch.randn(2, 9, mixer.splits[2])
    expected = mixer._scan(mixed, time_step)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixer._scan(mixed, time_step), expected)


# 8. Neighbours.


def test_the_convolution_of_kept_rows_is_the_dense_one_except_at_their_ends():
    mixer = TREADMamba2Mixer(8, expand=2, head_dim=4, state_size=3, conv_kernel=3, norm_eps=1e-6)
    tokens = torch.randn(1, mixer.splits[1], 1, 6 * 5)  # 6 rows of 5
    rows = torch.tensor([0, 2, 5])
    kept = mixer.conv(tokens.unflatten(-1, (6, 5))[..., rows, :].flatten(-2)).unflatten(-1, (3, 5))
    dense = mixer.conv(tokens).unflatten(-1, (6, 5))[..., rows, :]
    torch.testing.assert_close(kept[..., 1:-1], dense[..., 1:-1], atol=1e-6, rtol=1e-5)
    assert (kept - dense)[..., [0, -1]].abs().amax() > 0.01


# Others' scans.


def test_the_forward_scan_is_that_of_transformers():
    """Mamba-2's causal mixer around the forward direction, with its convolution, norm and a token's own part."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, expand=2, state_size=6, n_groups=1, chunk_size=16, conv_kernel=4,
        num_hidden_layers=1,
    )  # fmt: skip
    mixer = Mamba2Mixer(config, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in (mixer.A_log, mixer.D, mixer.dt_bias):
            parameter.copy_(torch.randn(4))
    tokens = torch.randn(2, 37, 16)

    gate, mixed, time_step = mixer.in_proj(tokens).split([32, 44, 4], dim=-1)
    mixed = F.silu(mixer.conv1d(mixed.transpose(1, 2))[..., :37]).transpose(1, 2)
    x, b, c = mixed.split([32, 6, 6], dim=-1)
    x, time_step = x.unflatten(-1, (4, 8)), F.softplus(time_step + mixer.dt_bias)
    given = x, time_step, -time_step * mixer.A_log.exp(), b, c
    x, *others = x, *(torch.stack([one, torch.zeros_like(one)], dim=2) for one in given[1:])
    y = bidirectional_scan(x, *others, chunk_size=16) + own_parts(x, *others) + mixer.D.unsqueeze(-1) * x
    expected = mixer.out_proj(mixer.norm(y.flatten(2), gate))
    assert difference(mixer(tokens), expected) < rounding(37 + 16 + 32)


def causal_kernel(x, dt, A, B, C, chunk_size):
    """What `mamba_chunk_scan_combined` documents, by the recurrence: B and C are [B, L, groups, S]."""
    return recurrence(x, dt, dt * A, B[:, :, 0], C[:, :, 0])


def test_a_causal_kernel_gives_both_directions():
    x, time_step, _, b, c = sequences(20)
    decay_rate = -torch.rand(HEADS, dtype=torch.float64)
    expected = bidirectional_scan(x, time_step, time_step * decay_rate, b, c)
    assert_equal_within(_scan_by_kernel(causal_kernel, x, time_step, decay_rate, b, c), expected, 1e-12)


@pytest.mark.gpu
def test_the_kernel_of_mamba_ssm_gives_what_torch_gives():
    if not torch.cuda.is_available() or _find_kernel() is None:
        pytest.skip("needs CUDA and mamba-ssm")
    shape = (2, 300, 2)
    x, time_step = torch.randn(2, 300, 4, 64, device="cuda"), torch.rand(*shape, 4, device="cuda")
    b, c = torch.randn(2, *shape, 64, device="cuda")
    decay_rate = -torch.rand(4, device="cuda")
    results = []
    for scan in (
        lambda *args: _scan_by_kernel(_find_kernel(), *args),
        lambda x, time_step, rate, b, c: bidirectional_scan(x, time_step, time_step * rate, b, c),
    ):
        given = [one.clone().requires_grad_() for one in (x, time_step, decay_rate, b, c)]
        y = scan(*given)
        results.append([y, *torch.autograd.grad(y.square().sum(), given)])
    assert difference(*results) < 0.01  # the kernel multiplies in TF32
