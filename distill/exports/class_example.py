"""Classifies texts with the model in this folder: python example.py "a text" "another one".

It needs only torch and transformers. Each text gives one line of JSON. A text that is longer than the model can read is
cut off at its end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import pipeline

if __name__ == "__main__":
    folder = str(Path(__file__).parent)
    classify: Any = pipeline("text-classification", model=folder, tokenizer=folder, device="cpu", top_k=None)
    for text in sys.argv[1:] or ["a text"]:
        (classes,) = classify([text], truncation=True)
        probabilities = {item["label"]: round(item["score"], 4) for item in classes}
        answer = max(probabilities, key=probabilities.__getitem__)
        print(json.dumps({"text": text, "answer": answer, "probabilities": probabilities}, ensure_ascii=False))
