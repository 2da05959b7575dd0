"""Installed packages extend a registry through entry points."""

from moellava import plugins


def test_every_entry_point_of_a_group_is_called_once(monkeypatch):
    called = []

    class EntryPoint:
        def __init__(self, name):
            self.name = name

        def load(self):
            return lambda: called.append(self.name)

    def entry_points(group):
        return [EntryPoint("a"), EntryPoint("b")] if group == "moellava.toys" else []

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    for _ in range(2):
        plugins.load_plugins("moellava.toys")
    plugins.load_plugins("moellava.others")
    assert called == ["a", "b"]
