# SPDX-License-Identifier: Apache-2.0
"""The conversation in the terminal, with lines piped in."""

import io

import pytest
from command_line import run
from evaluation_cases import age_vlm, picture

from agevlm.inference.generation import open_image
from agevlm.inference.replies import reply
from agevlm.serving.chat import chat

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    model, processor = age_vlm()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for number in range(2):
        picture(number).save(folder / f"{number} a.png")
    return folder


def talk(lines, monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return run(monkeypatch, capsys, "chat", *arguments, "--max-new-tokens", 6)


def test_a_conversation_of_several_turns_and_images(folder, monkeypatch, capsys):
    first, second = (folder / f"{number} a.png" for number in range(2))
    lines = ["Is there a dog?", f"/image {second}", "And here?", "/clear", "Hello", "/quit", "Never asked"]
    code, printed = talk(lines, monkeypatch, capsys, folder / "model", "--image", first)
    assert code == 0
    model, processor = age_vlm()
    messages, answers = [], []
    for text, image in (("Is there a dog?", first), ("And here?", second), ("Hello", None)):
        images = [] if image is None else [{"type": "image", "image": open_image(image)}]
        turn = {"role": "user", "content": [*images, {"type": "text", "text": text}]}
        messages = [turn] if image is None else [*messages, turn]
        answers.append(reply(model, processor, [messages], max_new_tokens=6)[0].text)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]})
    said = printed.split("> ")[1:]
    assert [said[0], said[2], said[4]] == [answer + "\n" for answer in answers]
    width, height = picture(1).size
    assert f"{width}x{height}" in said[1]
    assert len(said) == 6


def test_the_end_of_the_input_and_wrong_lines_end_in_no_traceback(folder, monkeypatch, capsys):
    lines = ["/image nowhere.png", "/image", "/pardon", "", "/help"]
    code, printed = talk(lines, monkeypatch, capsys, folder / "model")
    assert (code, "Traceback" in printed) == (0, False)
    assert "there is no such file" in printed
    assert "There is no /pardon." in printed
    assert printed.count("/clear") == 3  # at first, for the unknown command, and when asked for


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_chat():
    model, processor = age_vlm()
    model.generation_config.eos_token_id = None
    shown, lines = [], iter(["Hello", "Dog?", KeyboardInterrupt()])

    def read_line() -> str:
        shown.append("> ")
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    def write(text: str) -> None:
        shown.append(text)
        if shown[:-1] == ["> "]:
            raise KeyboardInterrupt

    chat(model, processor, read_line=read_line, write=write, max_new_tokens=12)
    first = shown[1]
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Dog?"},
    ]
    assert shown[:4] == ["> ", first, "\n", "> "]
    assert "".join(shown[4:-3]) == reply(model, processor, [messages], max_new_tokens=12)[0].text
    assert shown[-3:] == ["\n", "> ", "\n"]
