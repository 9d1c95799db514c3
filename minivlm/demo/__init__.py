"""The demo world (`world.py`), what is measured on it (`evaluate.py`), and the tiny models trained on it."""
