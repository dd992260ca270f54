# SPDX-License-Identifier: Apache-2.0
"""What the app shows: its HTML, its styles and its one script. Colors are Gradio's, so that light and dark are right."""

import base64
import functools
import html
import io
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..inference.attention import Attention, find_words
from ..inference.grounding import Grounded
from ..plots import ATTENTION_SCALE, COLORS, color_attention
from .conversation import Turn

PICTURE_SIDE, THUMB_SIDE = 1024, 96
"""Longest sides, in pixels, of the picture in the page and of its thumbnail."""


def escape(text: str) -> str:
    """A text as HTML, without the characters of Gradio's templates either."""
    escaped = html.escape(text)
    for character in "{}$`":
        escaped = escaped.replace(character, f"&#{ord(character)};")
    return escaped


def data_uri(image: Image.Image, side: int | None = None) -> str:
    """An image as an address: within `side` pixels as JPEG, or as it is as PNG."""
    buffer = io.BytesIO()
    if side is None:
        image.save(buffer, "PNG")
    else:
        small = image.copy()
        small.thumbnail((side, side))
        small.save(buffer, "JPEG", quality=88)
    kind = "png" if side is None else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- the conversation ---


def show_question(question: str, images: Sequence[Image.Image], first: int, image: int | None = None) -> str:
    """A question that is being answered, with its images, whose numbers begin at `first`."""
    return _question(escape(question), images, first, image)


def show_answer(text: str) -> str:
    """An answer so far."""
    return f'<p class="answer" aria-live="polite">{escape(text)}<span class="writing">▍</span></p>'


def show_conversation(turns: Sequence[Turn], image: int | None = None) -> str:
    """The turns, with a button for each word of those that see an image. `image` is the number of the one that is shown."""
    found = []
    first = 0
    for number, turn in enumerate(turns):
        question, answer = turn.question, turn.reply.text
        if turn.reply.images:  # else words look at nothing
            question = _words(question, number, "question")
            answer = _words(answer, number, "answer")
        else:
            question, answer = escape(question), escape(answer)
        if not turn.reply.text.strip():
            answer = '<span class="note">(an empty answer)</span>'
        elif turn.reply.finish_reason == "length":
            answer += ' <span class="note">(cut at the longest length)</span>'
        found.append(_question(question, turn.images, first, image) + f'<p class="answer">{answer}</p>')
        first += len(turn.images)
    return "".join(found)


def _question(shown: str, images: Sequence[Image.Image], first: int, image: int | None) -> str:
    thumbs = "".join(
        f'<button type="button" class="thumb" data-image="{number}" aria-pressed="{str(number == image).lower()}" '
        f'aria-label="Show image {number + 1}"><img src="{data_uri(one, THUMB_SIDE)}" alt=""></button>'
        for number, one in enumerate(images, first)
    )
    return f'<div class="asked">{f"<div>{thumbs}</div>" if thumbs else ""}<p class="question">{shown}</p></div>'


def _words(text: str, turn: int, source: str) -> str:
    pieces, last = [], 0
    for start, end in find_words(text):
        pieces.append(
            f'{escape(text[last:start])}<button type="button" class="word" data-turn="{turn}" data-source="{source}" '
            f'data-start="{start}" data-end="{end}" aria-pressed="false">{escape(text[start:end])}</button>'
        )
        last = end
    return "".join(pieces) + escape(text[last:])


# --- the picture ---


def show_image(image: Image.Image) -> str:
    """An image, as wide as there is room for."""
    style = f"--ratio:{image.width / image.height:.4f}"
    return f'<img class="base" style="{style}" src="{data_uri(image, PICTURE_SIDE)}" alt="the image that is shown">'


def show_map(found: Attention | None, block: int | None) -> tuple[str, str]:
    """The map of a phrase of one block, or the average of all, as a layer over its image; and what is to be said of it. None is the map
    of a word that stands before the image."""
    if found is None:
        return "", say("This word comes before the image, and cannot see it.")
    phrase = found.phrases[0]
    maps, sinks = found.maps[:, 0], None if found.sink is None else found.sink[:, 0]
    attention = maps.mean(0) if block is None else maps[block]
    rows, columns = attention.shape
    size = f"width:{100 * columns * found.cell[0] / found.image.width:.3f}%;height:{100 * rows * found.cell[1] / found.image.height:.3f}%"
    strongest = found.strongest(attention)
    layer = f'<img class="map" style="{size}" src="{data_uri(color_attention(attention))}" alt="heat map of {escape(phrase.text)}">'
    if attention.max() * attention.size > ATTENTION_SCALE[0]:
        layer += f'<div class="strongest" style="{_place(strongest["box"], found.image)}"></div>'
    facts = {"strongest cell": strongest["attention"], "this image": float(attention.sum())}
    if sinks is not None:
        facts["sink"] = float(sinks.mean() if block is None else sinks[block])
    rest = 1 - facts["this image"] - facts.get("sink", 0)
    if rest > 0.005:
        facts["other images"] = rest
    said = " · ".join(f"{name} <b>{value:.2f}</b>" for name, value in facts.items())
    where = "all blocks" if block is None else f"block {found.blocks[block]}"
    return (
        layer,
        f'<p><b class="phrase">{escape(phrase.text)}</b> in the {phrase.source}, {where}</p><p>Attention: {said}</p>{legend()}',
    )


def show_grounded(found: Grounded) -> tuple[str, str]:
    """Points and boxes of the phrases that are there, as a layer over the image; and a list of all."""
    layer, items = "", []
    for phrase, color in zip(found.phrases, itertools.cycle(COLORS[:-1]), strict=False):
        drawn = phrase.there is not False
        if phrase.box is None or phrase.point is None:
            drawn = False
        elif drawn:
            layer += f'<div class="box" style="{_place(phrase.box, found.image)};border-color:{color}"></div>'
            layer += f'<div class="point" style="{_place([*phrase.point] * 2, found.image)};background:{color}"></div>'
        state = {True: "there", False: "not there", None: "" if drawn else "comes before the image"}[phrase.there]
        confidence = "" if phrase.confidence is None else f"confidence {phrase.confidence:.2f}"
        said = ", ".join(filter(None, (state, confidence)))
        items.append(
            f'<li><span class="key" style="{f"background:{color}" if drawn else ""}"></span>'
            f"<b>{escape(phrase.text)}</b> in the {phrase.source}{f': {said}' if said else ''}</li>"
        )
    listed = (
        f"<ul>{''.join(items)}</ul>" if items else say("Question and answer name nothing that could be in the image.")
    )
    note = f'<p class="note">No confidence: {escape(found.reason)}</p>' if found.reason and items else ""
    return layer, f'<div class="grounded">{listed}{note}</div>'


def _place(box: Sequence[float], image: Image.Image) -> str:
    """Style of a box `[left, top, right, bottom]` in pixels of the image."""
    left, top, right, bottom = box
    sides = {
        "left": left / image.width,
        "top": top / image.height,
        "width": (right - left) / image.width,
        "height": (bottom - top) / image.height,
    }
    return ";".join(f"{name}:{100 * share:.3f}%" for name, share in sides.items())


@functools.cache
def legend() -> str:
    """The color scale.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    steps = np.geomspace(*ATTENTION_SCALE, 64)
    bar = data_uri(color_attention(steps[None] / steps.size, zoom=1))
    ticks = "".join(f"<span>{tick:g}</span>" for tick in np.geomspace(*ATTENTION_SCALE, 4))
    return (
        f'<div class="legend"><img src="{bar}" alt=""><div>{ticks}</div>'
        "attention on a cell, in multiples of an even spread over the image</div>"
    )


def say(text: str, role: str = "status") -> str:
    """A line for the user; `role` "alert" for what went wrong."""
    return f'<p role="{role}">{escape(text)}</p>' if text else ""


PAGE_CSS = """
#picture { --picture-height: 54vh; }
.gradio-container { max-width: 1400px !important; overflow: clip !important; }
#title h1 { font-size: 1.25rem; font-weight: 600; margin: 0; }
#columns { align-items: flex-start; }
/* A long answer scrolls, at its end, and does not push the question's box and its stop button away. */
#writing { display: flex; flex-direction: column-reverse; max-height: 40vh; overflow-y: auto !important; }
#conversation:not(:has(p)), #writing:not(:has(p)), #notice:not(:has(p)) { display: none; }
@media (min-width: 800px) {
  #seen { position: sticky; top: 12px; }
  #conversation { max-height: calc(100vh - 280px); overflow-y: auto !important; }
}
@media (max-width: 799px) {
  /* The picture stays in view above all of the conversation. */
  #columns { flex-direction: column; flex-wrap: nowrap; align-items: stretch; }
  #seen { display: contents; }
  #picture { --picture-height: 26vh; position: sticky; top: 0; z-index: 10; background: var(--body-background-fill); padding: 8px 0; }
  #picture .legend { display: none; }
  #picture figcaption { max-height: 9em; overflow-y: auto; font-size: .9rem; line-height: 1.35; }
}
"""

PICTURE = """<figure><div class="frame">${image}${value}</div>
<figcaption aria-live="polite">${caption}</figcaption></figure>"""

PICTURE_CSS = """
figure { margin: 0; }
.frame { position: relative; overflow: hidden; border-radius: var(--radius-lg); width: fit-content; max-width: 100%; margin: 0 auto; }
.frame img { display: block; margin: 0; }
.base { width: calc(var(--ratio) * var(--picture-height)); height: auto; max-width: 100%; }
.frame:has(.map) .base { filter: grayscale(1); }
.frame .map { position: absolute; left: 0; top: 0; max-width: none; opacity: .6; }
.strongest { position: absolute; border: 2px solid cyan; box-sizing: border-box; }
.box { position: absolute; border: 3px solid; box-sizing: border-box; border-radius: 3px; box-shadow: 0 0 0 1px white, inset 0 0 0 1px white; }
.point { position: absolute; width: 12px !important; height: 12px !important; transform: translate(-50%, -50%); border-radius: 50%; border: 2px solid white; }
figcaption { color: var(--body-text-color); margin-top: 8px; line-height: 1.45; overflow-wrap: anywhere; }
figcaption p { margin: 0; }
figure:not(:has(.base)) figcaption { border: 1px dashed var(--border-color-primary); border-radius: var(--radius-lg); padding: 3.5rem 1rem;
  text-align: center; }
.legend, .note { font-size: .8rem; color: color-mix(in srgb, var(--body-text-color) 75%, transparent); margin-top: 6px; }
.legend { max-width: 26rem; }
.legend img { width: 100%; height: 8px; margin: 0; border-radius: 2px; }
.legend div { display: flex; justify-content: space-between; }
.grounded ul { list-style: none; margin: 8px 0 0; padding: 0; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em; border: 1px solid var(--border-color-primary); }
"""

TURNS_CSS = """
.asked { margin: 12px 0 0 auto; width: fit-content; max-width: 92%; }
.asked > div { display: flex; flex-wrap: wrap; gap: 6px; justify-content: flex-end; margin-bottom: 6px; }
.question, .answer { margin: 0; padding: 8px 12px; border-radius: var(--radius-lg); color: var(--body-text-color);
  line-height: 1.6; white-space: pre-wrap; overflow-wrap: anywhere; width: fit-content; }
.question { background: var(--color-accent-soft); border: 1px solid var(--border-color-accent-subdued); margin-left: auto; }
.answer { background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); margin-top: 8px;
  max-width: 92%; }
button { font: inherit; color: inherit; background: none; transition: none; border: 0; padding: 0; margin: 0; cursor: pointer; border-radius: 3px; }
button:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 1px; }
.word { text-decoration: underline dotted var(--body-text-color-subdued) 1px; text-underline-offset: 4px; }
.word:hover { background: var(--background-fill-primary); text-decoration-style: solid; }
.word[aria-pressed=true] { background: var(--color-accent); color: #111; text-decoration: none; box-shadow: 0 0 0 2px var(--color-accent); }
.thumb { line-height: 0; border: 2px solid var(--border-color-primary); border-radius: 6px; overflow: hidden; }
.thumb[aria-pressed=true] { border-color: var(--color-accent); }
.thumb img { height: 56px; width: auto; margin: 0; }
.note { opacity: .75; font-size: .85em; }
.writing { animation: blink 1s steps(2) infinite; }
@keyframes blink { 50% { opacity: 0; } }
"""

NOTICE_CSS = """
p { margin: 0; padding: 8px 12px; border-radius: var(--radius-lg); color: var(--error-text-color);
  background: var(--error-background-fill); border: 1px solid var(--error-border-color); overflow-wrap: anywhere; }
p[role=status] { color: var(--body-text-color); background: none; border: 0; }
"""

PICK = """
const all = (kind) => [...element.querySelectorAll('button.' + kind)];
const press = (kind, chosen) => all(kind).forEach((b) => b.setAttribute('aria-pressed', chosen.includes(b)));
// Tab reaches one word, arrows the others: a conversation has hundreds.
const reach = (word) => all('word').forEach((b) => { b.tabIndex = b === word ? 0 : -1; });
const renewed = () => reach(element.querySelector('button.word[aria-pressed=true]') || all('word').pop());
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.classList.contains('thumb')) {
    press('thumb', [button]);
    trigger('pick', { image: button.dataset.image });
    return;
  }
  const first = element.querySelector('button.word[aria-pressed=true]');
  let chosen = [button];
  // With Shift, all words from the one chosen before.
  if (event.shiftKey && first && first.dataset.turn === button.dataset.turn && first.dataset.source === button.dataset.source) {
    const words = all('word');
    const [from, to] = [words.indexOf(first), words.indexOf(button)].sort((a, b) => a - b);
    chosen = words.slice(from, to + 1);
  }
  press('word', chosen);
  reach(button);
  trigger('pick', { ...chosen[0].dataset, end: chosen[chosen.length - 1].dataset.end });
});
element.addEventListener('keydown', (event) => {
  const words = all('word'), at = words.indexOf(event.target);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: words.length - 1 }[event.key];
  if (at < 0 || !words[to]) return;
  event.preventDefault();
  reach(words[to]);
  words[to].focus();
});
watch('value', () => { renewed(); element.scrollTop = element.scrollHeight; });
renewed();
"""
