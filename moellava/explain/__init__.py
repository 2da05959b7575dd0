"""What a model looked at and which of its experts worked: records and pictures."""

from moellava.explain.dataset_routing import DatasetRouting, route_dataset
from moellava.explain.explain_answer import explain
from moellava.explain.explanation import KINDS, Explanation
from moellava.explain.page import write_page
from moellava.explain.routing import PHASES, Routing
from moellava.explain.words import draw_words

__all__ = [
    "KINDS",
    "PHASES",
    "DatasetRouting",
    "Explanation",
    "Routing",
    "draw_words",
    "explain",
    "route_dataset",
    "write_page",
]
