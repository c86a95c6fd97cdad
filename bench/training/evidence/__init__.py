"""The parts of the study of what the paper claims; `bench/training/study.py` runs it."""
