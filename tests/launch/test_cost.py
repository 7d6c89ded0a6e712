"""What downsampling and freezing save, and that growth is seamless."""

from launch.cost import growth, pretraining, seamless


def test_halving_the_resolution_divides_the_flops_by_about_four():
    rows = pretraining((16, 8))
    # fewer padded taps are counted at small sizes, so the ratio is a little below 1/4
    assert rows["16"]["ratio"] == 1 and 0.15 < rows["8"]["ratio"] < 0.26


def test_the_frozen_part_needs_no_backward():
    row = growth(doublings=1)["32"]
    assert 0 < row["trainable_share"] < 0.6
    assert row["flops_share"] < 0.9


def test_a_grown_network_starts_as_an_enlargement():
    assert seamless()["max_difference"] < 1e-4
