"""The README's first picture shows the figures of the run that it is drawn from."""

from __future__ import annotations

from xml.etree import ElementTree

from benchmarks.explained import BOTTOM, TOP, drawing

REPORT = {
    "sparsity": 0.9,
    "kept": 130,
    "total": 1300,
    "scores": {"metric": "top1", "dense": 0.9333, "sparse": 0.9211},
    "bytes": {"dense": 1_107_816, "file": 152_195},
    "settings": {"samples": 512},
    "layers": [{"name": "first<0>", "kept": 100, "total": 100}, {"name": "second", "kept": 30, "total": 1200}],
}


def test_the_picture_has_the_figures_of_the_run_and_a_bar_for_each_layer():
    root = ElementTree.fromstring(drawing(REPORT))
    texts = " ".join(element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text"))
    for figure in ("top-1 93.3", "top-1 92.1", "1,300 weights, 1.11 MB", "130 weights, 0.15 MB", "512 inputs", "90 %"):
        assert figure in texts
    rectangles = root.iter("{http://www.w3.org/2000/svg}rect")
    bars = [float(bar.get("height", 0)) for bar in rectangles if bar.get("class") == "kept"]
    assert bars == [BOTTOM - TOP, round((BOTTOM - TOP) * 30 / 1200, 1)]
