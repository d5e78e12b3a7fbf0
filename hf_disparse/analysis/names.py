"""Reads from a weight's name its layer and which of the layer's matrices it is."""

from collections.abc import Iterable


def layer_and_kind(names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """name -> (layer, kind): the first number in the name, and the shortest unambiguous ending of the rest.

    `encoder.layer.3.attention.self.query.weight` is (3, "query"); BERT's `attention.output.dense` and `output.dense` are
    "attention.output" and "output". Names without a number belong to no layer and are left out.
    """
    layers, paths = {}, {}
    for name in names:
        parts = name.removesuffix(".weight").split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if number is not None:
            inner = parts[number + 1 :]
            inner = inner[:-1] if len(inner) > 1 and inner[-1] == "dense" else inner
            layers[name], paths[name] = int(parts[number]), tuple(inner) or ("weight",)
    length = dict.fromkeys(paths.values(), 1)
    while True:
        endings: dict[tuple, list[tuple]] = {}
        for path in length:
            endings.setdefault(path[-length[path] :], []).append(path)
        longer = [p for same in endings.values() if len(same) > 1 for p in same if length[p] < len(p)]
        if not longer:
            return {name: (layers[name], ".".join(path[-length[path] :])) for name, path in paths.items()}
        for path in longer:
            length[path] += 1
