"""Which layers each pipeline stage holds. Standard library only."""


def split_layers(layers: int, stages: int) -> list[range]:
    """Consecutive layers for each stage, as even as they come.

    When they do not divide, the last stage gives up a layer first, then the first, then the last
    but one, and so on inwards: those two also carry the head and the embedding (Llama 3 405B has
    126 layers for 128 places).

    Raises:
        ValueError: there are more stages than layers.

    """
    if stages > layers:
        raise ValueError(f"{stages} pipeline stages for {layers} layers")
    most = -(-layers // stages)
    missing = most * stages - layers
    ends_inwards = [stages - 1 - i // 2 if i % 2 == 0 else i // 2 for i in range(stages)]
    short = set(ends_inwards[:missing])
    ranges, start = [], 0
    for stage in range(stages):
        stop = start + most - (stage in short)
        ranges.append(range(start, stop))
        start = stop
    return ranges
