# SPDX-License-Identifier: Apache-2.0
"""Functions of the local tasks, as lmms-eval's own tasks have them."""


def images(doc):
    return [image.convert("RGB") for image in doc["images"]]


def exact(doc, results):
    return {"exact": float(results[0] == doc["answer"])}


def converse(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    """Three rounds: the document's question, its images again with the last answer, and the last answer alone."""
    if round_idx is None:
        return doc["question"]
    if round_idx == 3:
        return None, None, True, previous_output, None
    shown = images(doc) if round_idx == 1 else []
    return shown, f"You said {previous_output[-1]}. Why?", False, previous_output, None


def rounds(doc, results):
    return {"rounds": float(len(results[0]))}
