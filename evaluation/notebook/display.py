"""Displays for notebooks: images and texts with their labels and scores.

Functions return a matplotlib figure, or an object with HTML, which a notebook displays if it is the last
expression of a cell. The plots of `plots` can be imported from here too. `train` and `test` are data sets
whose items are `(input, ..., label)`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray

from ...errors import bad_value
from ..report.pictures import picture
from .plots import (
    new_figure,
    short,
    show_budgets,
    show_curves,
    show_drops,
    show_histograms,
    show_matrix,
    show_points,
    show_values,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Html",
    "show_budgets",
    "show_curves",
    "show_drops",
    "show_histograms",
    "show_images",
    "show_matrix",
    "show_points",
    "show_suspects",
    "show_texts",
    "show_top",
    "show_values",
]

#: Colors of examples with the class of the test point, and of another class.
SAME, OTHER = "#00695c", "#b3261e"


def show_images(
    images: Sequence[Any],
    titles: Sequence[str] = (),
    *,
    colors: Sequence[str] = (),
    columns: int = 8,
) -> Figure:
    """Images in a grid, each with a title.

    Args:
        images: `(1, h, w)`, `(3, h, w)` or `(h, w)` each (`report.pictures.picture`).
        titles: One for each image, or none.
        colors: Colors of the titles; black if there are none.
        columns: Images in a row.

    Raises:
        ValueError: There is no image, the number of titles or colors differs, or something is not an image.
    """
    n = len(images)
    if not n:
        raise bad_value("images", "hold at least one image", "none")
    for name, given in (("titles", titles), ("colors", colors)):
        if len(given) not in (0, n):
            raise bad_value(name, f"have one entry for each of the {n} images", len(given))
    columns = min(columns, n)
    figure, axes = _grid(-(-n // columns), columns)
    for i in range(n):
        title = titles[i] if len(titles) else ""
        _draw(axes[i // columns, i % columns], images[i], title, colors[i] if len(colors) else "black")
    return figure


def show_top(
    tops: Any,
    test: Sequence[Any],
    train: Any,
    *,
    classes: Sequence[str] | None = None,
) -> Figure:
    """Test images, each followed by its most influential training images.

    Above each image are its label and its score. Labels of the test point's class are green, others red.

    Args:
        tops: What `influence(test, k)` returns: `KMostInfluentialResults` of `(n_test, k)`; or several of
            them by name, for instance proponents and opponents, or two methods, which are put side by side.
        test: The test batch `(images, labels)`.
        train: The training set.
        classes: Names of the classes; None shows their numbers.

    Raises:
        ValueError: The results have another shape than the test batch, or something is not an image.

    >>> images, labels = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 1])
    >>> top = torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.1]])
    >>> figure = show_top(top, (images[1:2], labels[1:2]), list(zip(images, labels)))
    >>> [axes.get_title() for axes in figure.axes if axes.get_title()]
    ['test: 1', '1  0.5', '0  0.1']
    """
    images, labels = test[0], test[-1]
    blocks = _blocks(tops, len(labels))
    widths = [1.0]
    for indices, _ in blocks.values():
        widths += [0.25, *[1.0] * indices.shape[1]]
    figure, axes = _grid(len(labels), len(widths), widths, heading=any(blocks))
    for t, label in enumerate(labels):
        own = int(label)
        _draw(axes[t, 0], images[t], f"test: {_name(own, classes)}", "black")
        column = 1
        for indices, scores in blocks.values():
            column += 1
            for i, score in zip(indices[t], scores[t], strict=True):
                example = train[int(i)]
                text = f"{_name(int(example[-1]), classes)}  {short(score)}"
                _draw(axes[t, column], example[0], text, SAME if int(example[-1]) == own else OTHER)
                column += 1
    _head(figure, axes[0], blocks)
    return figure


def show_suspects(
    scores: Any,
    train: Any,
    *,
    n: int = 16,
    true_labels: Any = None,
    classes: Sequence[str] | None = None,
    columns: int = 8,
) -> Figure:
    """The training images with the most suspect labels, most suspect first.

    Args:
        scores: `(n_train,)`, high = suspect; ties by lower index.
        train: The training set, with the labels that the model was trained on.
        n: Number of images.
        true_labels: `(n_train,)`, if they are known: wrong labels are red and followed by the true one.
        classes: Names of the classes; None shows their numbers.
        columns: Images in a row.

    Raises:
        ValueError: Not one score for each training example.

    >>> train = list(zip(torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 1])))
    >>> [axes.get_title() for axes in show_suspects([0.1, 0.9, 0.5], train, n=2, true_labels=[0, 0, 1]).axes]
    ['1, truly 0', '1']
    """
    values = np.asarray(scores)
    if values.shape != (len(train),):
        raise bad_value("scores", f"have shape ({len(train)},)", values.shape)
    first = np.argsort(-values, kind="stable")[:n]
    images, titles, colors = [], [], []
    for i in first:
        example = train[int(i)]
        given = int(example[-1])
        true = given if true_labels is None else int(true_labels[i])
        images.append(example[0])
        titles.append(_name(given, classes) + ("" if true == given else f", truly {_name(true, classes)}"))
        colors.append("black" if true == given else OTHER)
    return show_images(images, titles, colors=colors, columns=columns)


@dataclass(frozen=True)
class Html:
    """HTML for a notebook, and the same as plain text.

    Attributes:
        html: Returned by `_repr_html_`.
        text: Returned by `repr`.
    """

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def show_texts(
    tops: Any,
    test_texts: Sequence[str],
    train_texts: Sequence[str],
    *,
    test_labels: Sequence[str] = (),
    train_labels: Sequence[str] = (),
) -> Html:
    """Test texts, each followed by its most influential training texts and their scores.

    Args:
        tops: As for `show_top`.
        test_texts: One for each row of the results.
        train_texts: One for each training example.
        test_labels: Name of the class of each test text, or none.
        train_labels: The same for the training texts.

    Raises:
        ValueError: The results have another shape than the test texts.

    >>> top = torch.tensor([[1]]), torch.tensor([[0.5]])
    >>> show_texts({"for": top}, ["a mat"], ["a dog", "a cat"])
    test: a mat
      for 0.5: a cat
    """
    blocks = _blocks(tops, len(test_texts))
    rows, lines = [], []
    cell = Markup('<td style="text-align:{};vertical-align:top{}">{}</td>')
    for t, text in enumerate(test_texts):
        label = test_labels[t] if len(test_labels) else ""
        head = Markup('<th colspan="3" style="text-align:left">test{} {}</th>')
        rows.append(Markup("<tr>{}</tr>").format(head.format(f" [{label}]:" if label else ":", text)))
        lines.append(f"test {label}: {text}" if label else f"test: {text}")
        for title, (indices, scores) in blocks.items():
            for i, score in zip(indices[t], scores[t], strict=True):
                other = train_labels[int(i)] if len(train_labels) else ""
                color = f";color:{SAME if other == label else OTHER}" if other and label else ""
                cells = [
                    cell.format("right", "", f"{title} {short(score)}"),
                    cell.format("left", color, other),
                    cell.format("left", "", train_texts[int(i)]),
                ]
                rows.append(Markup("<tr>{}</tr>").format(Markup("").join(cells)))
                words = [w for w in (title, short(score), other) if w]
                lines.append(f"  {' '.join(words)}: {train_texts[int(i)]}")
    return Html(str(Markup("<table>{}</table>").format(Markup("\n").join(rows))), "\n".join(lines))


def _blocks(tops: Any, n_test: int) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Indices and scores by name; a single result has the name ""."""
    # A KMostInfluentialResults is a named tuple of indices and scores, as Captum's own methods return it.
    named = tops if isinstance(tops, Mapping) else {"": tops}
    found = {}
    for name, top in named.items():
        indices, scores = (torch.as_tensor(part).detach().cpu().numpy() for part in top)
        if indices.ndim != 2 or indices.shape != scores.shape or len(indices) != n_test:
            raise bad_value(
                "tops",
                f"hold indices and scores of shape ({n_test}, k), as `influence(test, k)` returns them",
                f"{indices.shape} and {scores.shape}",
            )
        found[str(name)] = (indices, scores)
    return found


def _name(label: int, classes: Sequence[str] | None) -> str:
    return str(label) if classes is None else classes[label]


def _grid(n_rows: int, n_columns: int, widths: Sequence[float] = (), heading: bool = False) -> Any:
    """A figure for images and its axes `(n_rows, n_columns)`, without frames."""
    wide = sum(widths) or n_columns
    figure = new_figure(0.95 * wide, 1.15 * n_rows + (0.3 if heading else 0.0))
    ratios = {"width_ratios": list(widths)} if len(widths) else None
    axes = figure.subplots(n_rows, n_columns, squeeze=False, gridspec_kw=ratios)
    for one in axes.flat:
        one.set_axis_off()
    return figure, axes


def _head(figure: Figure, axes: Any, blocks: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]) -> None:
    """Write the names of the blocks above the first row, after the layout: a long name must move nothing."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    column = 2
    for title, (indices, _) in blocks.items():
        axes[column].text(0, 1.42, title, transform=axes[column].transAxes, size=10)
        column += indices.shape[1] + 1


def _draw(axes: Axes, image: Any, title: str, color: str) -> None:
    from matplotlib.image import imread

    uri = picture(torch.as_tensor(image), 0)
    if uri is None:
        raise bad_value("images", "be (1, h, w), (3, h, w) or (h, w)", f"shape {tuple(np.shape(image))}")
    pixels = imread(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, color=color, size=9)
