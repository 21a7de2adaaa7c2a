"""The plots are well-formed, to scale, and survive odd names."""

from xml.etree import ElementTree

from edgeship.shipping.plots import layer_bars, trade_off_curve

SVG = "{http://www.w3.org/2000/svg}"


def test_bars_are_as_long_as_their_values():
    tree = ElementTree.fromstring(layer_bars("a <b> & c", [("x<y>", 2.0, "2 & more"), ("z" * 80, 1.0, "1")]))
    bars = [float(item.get("width")) for item in tree.findall(f"{SVG}rect")[1:]]
    assert bars[0] == 2 * bars[1] > 0


def test_the_curve_has_a_dot_a_point_and_one_is_the_choice():
    points = [(1000, 0.5), (2000, 0.01), (3000, 0.0)]
    tree = ElementTree.fromstring(trade_off_curve("t", points, (2000, 0.01)))
    dots = tree.findall(f"{SVG}circle")
    assert len(dots) == 3
    assert [dot.get("fill") for dot in dots].count("#c44") == 1
    heights = [float(dot.get("cy")) for dot in dots]
    assert heights == sorted(heights)


def test_nothing_to_show_is_still_a_picture():
    ElementTree.fromstring(layer_bars("none", []))
    ElementTree.fromstring(trade_off_curve("none", [], None))
    ElementTree.fromstring(trade_off_curve("one", [(5, 0.1)], (5, 0.1)))
