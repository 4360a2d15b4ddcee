"""Arguments that every technique of edges refuses, each with what its error says."""

WRONG_FOR_EDGES = [
    ({"direction": "both"}, "direction: expected 'denoise' or 'noise'"),
    ({"positions": ["S9"]}, "positions: expected names"),
    ({"positions": "END"}, "positions: expected a list"),
    ({"positions": [-1]}, "positions: an index from the end"),
    ({"positions": [7]}, "positions: expected"),  # no prompt has one: a typing error would score 0
    ({"positions": [1.5]}, r"positions\[0\]: expected"),
    ({"positions": []}, "positions: expected"),
    ({"budget": 0}, "budget: expected"),
]
