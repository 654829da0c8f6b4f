"""YAML of others: plain values alone, and memory in proportion to the file."""

from __future__ import annotations

from typing import Any

import yaml

LARGEST = 1_000_000  # values, each alias counted as all that it stands for: a recipe has some hundred


def load_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The value of a YAML text: of a tag that names a Python object none is made. loader: of safe ones.

    An alias is one object in memory, but whoever writes, compares or flattens the value meets all that it stands for,
    each time: a few lines of aliases of aliases are billions of values. Raises yaml.YAMLError for these, and for
    whatever else is no YAML, such as the thirteenth month.
    """
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        if size_of(node, {}) > LARGEST:
            raise yaml.YAMLError(f"its aliases stand for more than {LARGEST:,} values")
        return reader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, OverflowError) as error:  # of numbers and dates, which PyYAML lets pass
        raise yaml.YAMLError(f"it holds a value that cannot be: {error}") from error
    finally:
        reader.dispose()


def size_of(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node, those behind aliases counted each time. known: of nodes by their identity, 0 while they are
    counted. Raises yaml.YAMLError where one holds itself."""
    size = known.get(id(node))
    if size == 0:
        raise yaml.YAMLError("one of its aliases stands for what it is a part of")
    if size is not None:
        return size
    known[id(node)] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(size_of(part, known) for part in inner)
    return known[id(node)]
