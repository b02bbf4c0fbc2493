# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Routes: where they may lie, and how many tokens they keep (counted in exact fractions)."""

import dataclasses
import json
import math
import warnings
from fractions import Fraction

import pytest

from diffusers_tread import TokenRoute
from diffusers_tread.routing import default_route, num_kept_tokens, resolve_routes


@pytest.mark.parametrize("num_layers, start, end", [(12, 2, 8), (24, 2, 20), (28, 2, 24), (34, 2, 30)])
def test_default_route_is_the_papers(num_layers, start, end):
    route = default_route(num_layers)
    assert (route.start, route.end, route.selection_ratio) == (start, end, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert route.resolve(num_layers) == route


@pytest.mark.parametrize("num_layers", [0, 1, 5])
def test_default_route_of_a_shallower_model_is_refused(num_layers):
    assert default_route(6).resolve(6) == TokenRoute(start=2, end=2)
    with pytest.raises(ValueError, match=f"at least 6 blocks.*got {num_layers}"):
        default_route(num_layers)


def test_negative_ends_count_from_the_end_as_in_a_list():
    blocks = list(range(12))
    for start in range(-12, 9):
        for end in range(-12, 9):
            if blocks[start] <= blocks[end] <= 8:
                resolved = TokenRoute(start=start, end=end, selection_ratio=0.3).resolve(12)
                assert resolved == TokenRoute(start=blocks[start], end=blocks[end], selection_ratio=0.3)


OUTSIDE = r"inside the model's 12 blocks \(0 to 11\), got start=.*"
TOO_LATE = "at least two blocks after the route.*"


@pytest.mark.parametrize(
    "places, message",
    [
        ([(0, 12), (12, 12), (-13, 3), (2, -13), (40, 41)], OUTSIDE),
        ([(5, 4), (-4, 2), (8, -5)], "empty route"),
        ([(2, 10), (2, 11), (2, -1), (2, -2)], TOO_LATE + "Use end <= 9"),
        ([(10, 11)], TOO_LATE + "Start earlier, or use a deeper model"),
    ],
)
def test_a_place_where_no_route_can_lie_is_refused(places, message):
    for start, end in places:
        with pytest.raises(ValueError, match=message):
            TokenRoute(start=start, end=end).resolve(12)


@pytest.mark.parametrize("end", [9, -3])
def test_two_blocks_after_the_rejoin_warn(end):
    with pytest.warns(UserWarning, match="only two blocks are left"):
        assert TokenRoute(start=2, end=end).resolve(12).end == 9


@pytest.mark.parametrize(
    "field, values, message",
    [
        ("selection_ratio", [1.0, 1, 1.5, -0.1, math.nan, math.inf, True, "0.5", None], r"ratio in \[0, 1\)"),
        ("start", [2.0, None, True], "block index"),
        ("end", ["8"], "block index"),
        ("rejoin_from", ["1", 1.0, False], "`rejoin_from` to be a block index"),
        (
            "rejoin",
            ["x_T", "both", "", None, True, ["state"]],
            "Expected rejoin 'state', 'input', 'sum' or 'fuse', got",
        ),
        ("magnitude_mix", [1.1, -1.1, math.nan, "0.5", True, None], r"Expected magnitude_mix in \[-1, 1\], got"),
    ],
)
def test_fields_outside_their_range_are_refused(field, values, message):
    for value in values:
        with pytest.raises(ValueError, match=message):
            TokenRoute(**{"start": 2, "end": 8, field: value})


def test_a_route_cannot_be_changed_nor_given_by_position():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TokenRoute(start=2, end=8).start = 3
    with pytest.raises(TypeError):
        TokenRoute(2, 8)


@pytest.mark.parametrize(
    "options",
    [{}, {"rejoin": "input"}, {"magnitude_mix": -0.5}, {"rejoin": "sum", "magnitude_mix": 1}, {"rejoin_from": 0}],
)
def test_routes_survive_json_and_resolving(options):
    route = TokenRoute(start=2, end=-4, selection_ratio=0.75, **options)
    assert TokenRoute(**json.loads(json.dumps(route.to_dict()))) == route
    assert eval(repr(route)) == route
    assert route.resolve(12) == TokenRoute(start=2, end=8, selection_ratio=0.75, **options)


@pytest.mark.parametrize("rejoin_from, resolved", [(0, 0), (1, 1), (-11, 1), (2, None), (-10, None)])
def test_tokens_rejoin_from_a_block_up_to_the_start(rejoin_from, resolved):
    route = TokenRoute(start=2, end=8, rejoin_from=rejoin_from).resolve(12)
    assert route == TokenRoute(start=2, end=8, rejoin_from=resolved)
    assert ("rejoin_from" in route.to_dict()) == (resolved is not None)


@pytest.mark.parametrize("rejoin_from", [3, 8, 12, -9, -13])
def test_states_that_tokens_did_not_have_when_the_route_began_are_refused(rejoin_from):
    with pytest.raises(ValueError, match=r"0 <= rejoin_from <= start \(2\), got rejoin_from=.* leave it out"):
        TokenRoute(start=2, end=8, rejoin_from=rejoin_from).resolve(12)


@pytest.mark.parametrize("rejoin", ["input", "sum"])
def test_a_route_has_one_way_to_rejoin(rejoin):
    with pytest.raises(ValueError, match="Expected rejoin='state' with rejoin_from=0.*Leave one of them out"):
        TokenRoute(start=2, end=8, rejoin=rejoin, rejoin_from=0)


@pytest.mark.parametrize("rejoin_from, fits", [(1, True), (2, True), (3, False), (4, False), (5, True)])
def test_a_state_inside_another_route_is_refused(rejoin_from, fits):
    routes = [TokenRoute(start=6, end=7, rejoin_from=rejoin_from), TokenRoute(start=2, end=4)]
    if fits:
        assert resolve_routes(routes, 12) == tuple(routes[::-1])
    else:
        with pytest.raises(ValueError, match="outside of other routes, got .* blocks 2-4.* rejoin_from=2 or 5"):
            resolve_routes(routes, 12)


def test_options_that_are_off_leave_no_trace():
    route = TokenRoute(start=2, end=8, rejoin="state", magnitude_mix=0.0, rejoin_from=None)
    assert route.to_dict() == {"start": 2, "end": 8, "selection_ratio": 0.5}
    assert repr(route) == "TokenRoute(start=2, end=8, selection_ratio=0.5)"
    assert route == TokenRoute(start=2, end=8)


def test_routes_may_be_given_in_any_form_and_order():
    first, second = TokenRoute(start=1, end=3), TokenRoute(start=4, end=-4, selection_ratio=0.25)
    resolved = (first, TokenRoute(start=4, end=8, selection_ratio=0.25))
    assert resolve_routes([second, first], 12) == resolved
    assert resolve_routes((route.to_dict() for route in (second, first)), 12) == resolved
    assert resolve_routes(first, 12) == resolve_routes(first.to_dict(), 12) == (first,)
    assert resolve_routes({"start": 1, "end": 3}, 12) == (first,)
    assert resolve_routes(None, 12) == resolve_routes([], 12) == ()


@pytest.mark.parametrize("second", [(2, 5), (3, 4), (4, 8), (0, 2), (-10, -7)])
def test_overlapping_routes_are_refused(second):
    routes = [TokenRoute(start=2, end=4), TokenRoute(start=second[0], end=second[1])]
    for given in (routes, routes[::-1]):
        with pytest.raises(ValueError, match="do not overlap.*Start the second at"):
            resolve_routes(given, 12)


@pytest.mark.parametrize(
    "routes", ["2-8", 3, [3], ["default"], {"start": 2}, [{"start": 2, "end": 8, "ratio": 0.5}], [None]]
)
def test_what_is_no_route_is_refused(routes):
    with pytest.raises(ValueError, match="Expected a TokenRoute"):
        resolve_routes(routes, 12)


@pytest.mark.parametrize(
    "denominator, lengths",
    [
        (100, [*range(1, 130), 256, 1000, 1024, 4096, 10_000, 16_384, 65_536, 1_000_000]),
        (1000, [7, 64, 100, 250, 256, 1000, 4096]),
    ],
)
def test_the_number_of_kept_tokens_is_exact_for_ratios_of_two_and_three_digits(denominator, lengths):
    for numerator in range(denominator):
        for num_tokens in lengths:
            expected = num_tokens - math.floor(num_tokens * Fraction(numerator, denominator))
            assert num_kept_tokens(num_tokens, numerator / denominator) == expected, (num_tokens, numerator)


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 256])
def test_one_token_is_kept_at_the_largest_ratio_below_one(num_tokens):
    assert num_kept_tokens(num_tokens, math.nextafter(1.0, 0.0)) == 1
