"""Pictures of the experts' work."""


def test_the_load_is_drawn_with_counts_and_the_even_line(explanation):
    figure = explanation.draw_load()
    panels = figure.axes[:3]
    assert [panel.get_title(loc="left").split(":")[0] for panel in panels] == [
        "image",
        "question",
        "answer",
    ]
    counts = explanation.routing.counts("image")
    texts = [int(text.get_text()) for text in panels[0].texts]
    assert sorted(texts) == sorted(counts[counts > 0].tolist())
    even = panels[0].lines[0].get_ydata()
    assert set(even) == {1 / explanation.routing.num_experts}


def test_pathways_are_drawn_for_every_phase(explanation, tmp_path):
    figure = explanation.draw_pathways(tmp_path / "paths.png")
    num_layers = len(explanation.routing.layers)
    for panel, phase in zip(figure.axes, ("image", "question", "answer"), strict=True):
        flows = explanation.routing.flows(phase)
        assert len(panel.collections) == (flows >= 0.005).sum() + num_layers
    assert (tmp_path / "paths.png").stat().st_size > 1000
