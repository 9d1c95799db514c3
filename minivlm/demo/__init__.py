"""The demo world (`world.py`), the tiny models trained on it (`train.py`), and how well they do (`evaluate.py`)."""

from pathlib import Path

DEMO_CHECKPOINT = Path(__file__).with_name("llava_next")  # the model that `python -m minivlm.run` asks by default
DEMO_PICTURE = Path(__file__).with_name("pictures") / "shapes.png"  # and what it is asked about
