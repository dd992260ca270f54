# SPDX-License-Identifier: Apache-2.0
"""`agevlm ask` and `agevlm attention`: questions about images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..terminal import console, say, say_saved
from .options import check_figure, check_text

if TYPE_CHECKING:
    from ..inference.grounding import Grounded


def _check_question(question: str) -> str:
    """The question without spaces at its ends, which chat templates may cut off."""
    if not question.strip():
        raise ValueError("The question is empty: write what you want to know about the image.")
    return check_text(question.strip(), "The question")


def ask(
    model: Annotated[str, typer.Option(help="Checkpoint: folder or Hub id.")],
    image: Annotated[
        str,
        typer.Option(
            help="Image file or URL. With --out, a folder of images or a list of them: .txt with one a line, or .csv or .jsonl "
            "with image and, where it differs, question."
        ),
    ],
    question: Annotated[str | None, typer.Argument(help="What to ask about the image.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the answers about a folder or a list of images: .jsonl or .csv. The same command continues after a "
            "stop."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images that are asked about together, with --out.", min=1)] = 8,
    heatmap: Annotated[
        Path | None,
        typer.Option(
            help="Figure to write: heat maps of --phrase, by cross-attention block and averaged.",
            callback=check_figure,
        ),
    ] = None,
    phrase: Annotated[
        str | None,
        typer.Option(
            help="Words of the question whose attention --heatmap shows, the last place where they occur; all by default."
        ),
    ] = None,
    ground: Annotated[
        bool,
        typer.Option(
            "--ground",
            help="Also say where it is what question and answer name, and whether it is there. An AGE-VLM needs `agevlm calibrate` for the latter.",
        ),
    ] = False,
    boxes: Annotated[
        Path | None,
        typer.Option(help="Figure to write: the image with the points and boxes of --ground.", callback=check_figure),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 64,
) -> None:
    """Ask a question about an image, or about many images."""
    if out is not None:
        if heatmap is not None or phrase is not None or boxes is not None:
            raise ValueError("--heatmap, --phrase and --boxes are for one image: leave them out, or leave out --out.")
        question = None if question is None else _check_question(question)
        _ask_many(model, image, question, out, batch_size, max_new_tokens, ground)
        return
    if question is None:
        raise ValueError("The question is missing: write what you want to know about the image.")
    from ..inference.attention import Phrase, find_phrase, show_reply

    question = _check_question(question)
    if Path(image).is_dir():
        raise ValueError(f"--image {image} is a folder: name a file for the answers about its images with --out.")
    if phrase is not None and heatmap is None:
        raise ValueError("--phrase says what --heatmap shows: name the figure to write with --heatmap.")
    start, end = (0, len(question)) if phrase is None else find_phrase(question, phrase)

    if boxes is not None and not ground:
        raise ValueError("--boxes draws what --ground finds: add --ground.")

    from ..inference.generation import ask_about, load_model, open_image
    from ..inference.grounding import find_calibration, ground_reply
    from ..inference.replies import reply

    picture = open_image(image)
    maps = heatmap is not None or ground
    vlm, processor = load_model(model)
    calibration = find_calibration(vlm, model) if ground else None
    (found,) = reply(vlm, processor, [ask_about(question, picture)], max_new_tokens=max_new_tokens, maps=maps)
    say(found.text.strip())
    if heatmap is not None:
        shown = Phrase(question[start:end], "question", start, end)
        show_reply(vlm, processor, found, question, [shown]).draw(heatmap)
    if ground:
        grounded = ground_reply(vlm, processor, found, question, calibration=calibration)
        _say_phrases(grounded)
        if boxes is not None:
            grounded.draw(boxes)


def _say_phrases(grounded: "Grounded") -> None:
    """A table of what is where."""
    from rich.table import Table

    table = Table("phrase", "in", "point", "box", "confidence", "there")
    for phrase in grounded.phrases:
        table.add_row(
            phrase.text,
            phrase.source,
            *(
                "–" if place is None else ", ".join(f"{side:g}" for side in place)
                for place in (phrase.point, phrase.box)
            ),
            "–" if phrase.confidence is None else f"{phrase.confidence:.2f}",
            {True: "there", False: "not there", None: "–"}[phrase.there],
        )
    if grounded.phrases:
        console().print(table)
    else:
        say("Question and answer name nothing that an image can show.")
    if grounded.reason is not None:
        say(f"No confidence: {grounded.reason}.")


def _ask_many(
    model: str, images: str, question: str | None, out: Path, batch_size: int, max_new_tokens: int, ground: bool
) -> None:
    from ..evaluation.answer_images import LISTS, OUTPUTS, answer_images, read_image_list
    from ..inference.generation import load_model
    from ..inference.grounding import find_calibration

    if not (Path(images).is_dir() or images.endswith(LISTS)):
        raise ValueError(f"--image {images}: with --out, name a folder of images or a list ({', '.join(LISTS)}).")
    if out.suffix not in OUTPUTS:  # before the model is loaded
        raise ValueError(f"--out {out}: the name must end with {' or '.join(OUTPUTS)}.")
    asked = read_image_list(images, question)
    vlm, processor = load_model(model)
    settings: dict[str, Any] = {
        "settings": {"model": model},
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    bad = answer_images(
        vlm, processor, asked, out, ground=find_calibration(vlm, model) if ground else None, **settings
    )
    say_saved(out, f"{len(asked)} answers." if not bad else f"{len(asked)} rows; {len(bad)} images cannot be read.")


def attention(
    question: Annotated[str, typer.Argument(help="What to ask about the image.")],
    model: Annotated[str, typer.Option(help="Checkpoint: folder or Hub id.")],
    image: Annotated[str, typer.Option(help="Image file or URL.")],
    out: Annotated[Path, typer.Option(help="Folder for attention.png and attention.json; must not exist yet.")],
    answer: Annotated[
        str | None, typer.Option(help="The answer whose words are shown; by default, the model's own.")
    ] = None,
    phrase: Annotated[
        list[str] | None,
        typer.Option(
            help="Words of the answer or, if they do not occur there, of the question; where they occur several times, the "
            "last one. May be repeated; every word of the answer by default."
        ),
    ] = None,
    predicting: Annotated[
        bool,
        typer.Option(
            "--predicting",
            help="Show the attention while the model chooses the answer's words (one token earlier), rather than "
            "once it has read them.",
        ),
    ] = False,
    heads_of: Annotated[
        int | None,
        typer.Option(
            help="Number of a layer whose heads are shown, in place of all layers; not of an AGE-VLM.", min=0
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer of the model, in tokens.", min=1)] = 64,
) -> None:
    """Show where words of a question and its answer attend in an image: heat maps by block or layer and averaged, or by head."""
    from ..files import check_new_folder
    from ..inference.attention import attend, choose_phrases

    question = _check_question(question)
    if answer is not None:
        choose_phrases(question, check_text(answer, "--answer"), phrase or None)
    check_new_folder(out)  # before the model is loaded

    from ..inference.generation import load_model, open_image

    picture = open_image(image)
    vlm, processor = load_model(model)
    settings: dict[str, Any] = {"predicting": predicting, **({} if heads_of is None else {"heads_of": heads_of})}
    found = attend(
        vlm, processor, picture, question, answer, phrase or None, max_new_tokens=max_new_tokens, **settings
    )
    found.save(out, model=model, image=image, generated=answer is None, **settings)
    say(found.answer.strip())
    say_saved(out, f"attention.png, attention.json ({len(found.phrases)} phrases).")
